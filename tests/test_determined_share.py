"""determined_share: against closed forms where the update is linear, and how noise, prior and what is sent move it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from unbatch.analysis import Analysis
from unbatch.auditing.client import observe
from unbatch.case import Case
from unbatch.errors import NotApplicable
from unbatch.inversion.determined_share import ENTRY_ROUNDINGS, determined, work
from unbatch.loss import loss_named
from unbatch.models.small import build
from unbatch.numerics.bounds.prior import CONTRAST
from unbatch.progress import Watch, watching
from unbatch.protocol import Protocol

Y = torch.tensor([1])
LOSS = loss_named("cross-entropy")


def total(output: Tensor, target: Tensor) -> Tensor:
    """A loss whose gradient with respect to a linear layer's weight is its input."""
    return output.sum()


def network(*layers: nn.Module, shape: tuple[int, ...] = (3, 6, 6), seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    size = nn.Sequential(*layers, nn.Flatten()).eval()(torch.zeros(1, *shape)).numel()
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(size, 4)).double().eval()


@pytest.mark.parametrize("noise", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("box", [(0.0, 1.0), (-2.0, 6.0)])
def test_a_linear_update_has_the_posterior_of_linear_regression(noise: float, box: tuple[float, float]) -> None:
    x, width = torch.rand(1, 7).double(), box[1] - box[0]
    found = determined(nn.Linear(7, 1, bias=False), total, x, Y, box=box, eps=1e-3, noise=noise)
    prior = (CONTRAST * width) ** 2
    error = (ENTRY_ROUNDINGS * 1e-3 * float(x.square().mean().sqrt())) ** 2 + noise**2
    posterior = 1 / (1 / prior + 1 / error)
    assert found.share == pytest.approx(1 - posterior / prior, rel=1e-9)
    assert found.psnr == pytest.approx(-10 * math.log10(posterior / width**2), rel=1e-9)


def test_what_is_not_sent_determines_nothing() -> None:
    model, x = network(nn.Conv2d(3, 4, 3), nn.Tanh()), torch.rand(1, 3, 6, 6)
    names = [name for name, _ in model.named_parameters()]
    shares = [determined(model, LOSS, x, Y, sent=names[:k]).share for k in range(len(names) + 1)]
    assert shares[0] == 0
    assert shares == sorted(shares)
    assert shares[-1] > 0.999


def test_noise_and_coarser_numbers_lower_it() -> None:
    model, x = network(nn.Conv2d(3, 4, 3), nn.Tanh()), torch.rand(1, 3, 6, 6)
    by_noise = [determined(model, LOSS, x, Y, noise=s).share for s in (0.0, 1e-4, 1e-2, 1.0, 100.0)]
    assert by_noise == sorted(by_noise, reverse=True)
    assert by_noise[-1] < 0.01
    by_eps = [determined(model, LOSS, x, Y, eps=e).psnr for e in (1e-16, 1e-7, 1e-3)]
    assert by_eps == sorted(by_eps, reverse=True)


def test_pixels_that_the_stride_skips_are_known_from_their_neighbours_alone() -> None:
    x = torch.rand(1, 1, 8, 8)
    skipped = determined(network(nn.Conv2d(1, 4, 1, 2), nn.Tanh(), shape=(1, 8, 8)), LOSS, x, Y)
    whole = determined(network(nn.Conv2d(1, 4, 1, 1), nn.Tanh(), shape=(1, 8, 8)), LOSS, x, Y)
    assert 0.25 < skipped.share < 0.95
    assert whole.share > 0.9999


def test_a_sketch_of_the_entries_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.rand(1, 3, 6, 6)
    for channels in (1, 2, 6):
        model = network(nn.Conv2d(3, channels, 3, 2), nn.Tanh(), nn.Conv2d(channels, 24, 1), nn.Tanh())
        monkeypatch.setattr("unbatch.inversion.determined_share.ROWS_AN_UNKNOWN", 2)
        short = determined(model, LOSS, x, Y)
        monkeypatch.setattr("unbatch.inversion.determined_share.ROWS_AN_UNKNOWN", 1000)
        whole = determined(model, LOSS, x, Y)
        assert short.share == pytest.approx(whole.share, abs=0.02)
        assert short.psnr == pytest.approx(whole.psnr, abs=3)


def test_rows_that_all_tensors_share_say_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """As they are shared by inputs as large as CIFAR's."""
    x = torch.rand(1, 3, 12, 12)
    for noise in (0.0, 1e-3):
        model = network(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3, 2), nn.ReLU(), shape=(3, 12, 12))
        whole = determined(model, LOSS, x, Y, noise=noise)
        monkeypatch.setattr("unbatch.inversion.determined_share.JACOBIAN_ENTRIES", 1)
        shared = determined(model, LOSS, x, Y, noise=noise)
        monkeypatch.undo()
        assert shared != whole
        assert shared.share == pytest.approx(whole.share, abs=0.02)
        assert shared.psnr == pytest.approx(whole.psnr, abs=3)


@pytest.mark.slow
def test_a_picture_of_cifar_size_within_the_default_work() -> None:
    setting = Case.parse("photos:model=lenet").setting()
    obs, truth = observe(setting.model, setting.loss, setting.inputs, setting.labels, knowledge=setting.knowledge)
    assert math.prod(obs.knowledge.input_shape) == 3072
    verdicts = Analysis.parse("security-metric")(obs, at=(truth.inputs, truth.labels))
    (verdict,) = (v for v in verdicts if v.name == "determined share")
    assert 0.9 < verdict.value < 1


def test_what_costs_too_much_is_said_in_operations() -> None:
    x = torch.rand(1, 3, 32, 32)
    model = build("resnet-small", (3, 32, 32), 4, rng=torch.Generator().manual_seed(0))
    assert 5e12 < work(model, LOSS, x, Y) < 2e13
    obs, _ = observe(model, LOSS, x, Y, protocol=Protocol(mode="eval"))
    with pytest.raises(ValueError, match=r"about .*e\+12 operations, more than work=3\.0e\+11.*3,072 unknowns"):
        Analysis.parse("security-metric")(obs)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_model_is_left_alone_in_either_mode(mode: str) -> None:
    model = build("resnet-small", (1, 6, 6), 4, width=2, rng=torch.Generator().manual_seed(0))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = determined(model, LOSS, torch.rand(1, 1, 6, 6), Y, mode=mode)
    assert 0 < found.share <= 1
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_analysis_answers_for_networks_that_are_no_chain() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.head = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(torch.tanh(self.one(x)) * self.two(x))
            return out

    obs, _ = observe(Sum(), LOSS, torch.rand(1, 6), Y, protocol=Protocol(mode="eval"))
    (verdict,) = Analysis.parse("security-metric")(obs)
    assert verdict.name == "determined share"
    assert verdict.value > 0.999
    assert (
        "c(M) knows convolutions and elementwise layers before the first dense one, not 'mul' (Branches)"
        in verdict.words
    )


def test_it_is_watched_column_by_column() -> None:
    model, x = network(nn.Conv2d(3, 4, 3), nn.Tanh()), torch.rand(1, 3, 6, 6)
    heard: list[float] = []
    with watching(Watch(listener=lambda share, best: heard.append(share))) as watch:
        whole = determined(model, LOSS, x, Y)
        assert heard == [0, 64 / 108]
        watch.listener = lambda share, best: setattr(watch, "stop", share > 0)
        with pytest.raises(NotApplicable, match="cut short before 44 of the 108 unknowns were looked at"):
            determined(model, LOSS, x, Y)
        watch.stop, watch.deadline = False, 0.0
        with pytest.raises(NotApplicable, match="cut short before a matrix of"):
            determined(model, LOSS, x, Y)
    assert determined(model, LOSS, x, Y) == whole


@pytest.mark.parametrize("shared", [False, True])
def test_a_dense_layer_is_held_without_loss(shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As all entries of its gradient say it; also where two calls share a weight, whose gradient is no outer product."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.layer(x))
            out: Tensor = self.head(torch.tanh(self.layer(x)) if shared else x)
            return out

    torch.manual_seed(0)
    model, x = Twice().double(), torch.rand(1, 6)
    monkeypatch.setattr("unbatch.inversion.determined_share.ROWS_AN_UNKNOWN", 1000)
    found = determined(model, LOSS, x, Y, noise=0.05)
    monkeypatch.setattr("unbatch.inversion.determined_share.OUTER_PRODUCT_ERROR", -1.0)
    every = determined(model, LOSS, x, Y, noise=0.05)
    assert 0.05 < every.share < 0.999
    assert found.share == pytest.approx(every.share, rel=1e-9)


def test_a_gradient_that_is_not_finite_is_named() -> None:
    model = network(nn.Conv2d(3, 4, 3))
    with pytest.raises(ValueError, match=r"'0\.weight' is not finite"):
        determined(model, LOSS, torch.full((1, 3, 6, 6), torch.inf), Y)
