"""Whole batches out of convolutional and residual networks, their bounds held to the truth."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unbatch
from unbatch import NotApplicable, Protocol
from unbatch.attacks import Descend
from unbatch.observation import Observation
from unbatch.reconstruction import Reconstruction

CLASSES = 4


class Block(nn.Module):
    """A residual block, its functions called in `forward`."""

    def __init__(self, inner: int, outer: int, stride: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        plain = isinstance(norm(1), nn.Identity)
        self.a, self.na = nn.Conv2d(inner, outer, 3, stride, 1, bias=plain), norm(outer)
        self.b, self.nb = nn.Conv2d(outer, outer, 3, 1, 1, bias=plain), norm(outer)
        self.side = nn.Conv2d(inner, outer, 1, stride, bias=plain)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.nb(self.b(F.relu(self.na(self.a(x))))) + self.side(x))


def residual(norm: Callable[[int], nn.Module] = nn.BatchNorm2d, width: int = 12, seed: int = 0) -> nn.Module:
    """A small residual network of pictures [2, 8, 8] whose running statistics have moved."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(2, width, 3, padding=1, bias=isinstance(norm(1), nn.Identity)),
        norm(width),
        nn.ReLU(),
        Block(width, 2 * width, 2, norm),
        Block(2 * width, 4 * width, 2, norm),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, CLASSES),
    )
    with torch.no_grad():
        for _ in range(20):
            net(torch.randn(16, 2, 8, 8))
    return net.double().eval()


def plain(seed: int = 0) -> nn.Module:
    """Convolutions one after the other, with strides and a hidden dense layer."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 32),
        nn.ReLU(),
        nn.Linear(32, CLASSES),
    ).double()


def bent(activation: type[nn.Module], norm: bool = False, seed: int = 0) -> nn.Module:
    """Convolutions with an activation that makes nothing zero; the last two look at windows of whole maps."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 12, 3, padding=1),
        activation(),
        nn.Conv2d(12, 24, 3, stride=2, padding=1),
        nn.GroupNorm(2, 24) if norm else nn.Identity(),
        activation(),
        nn.Conv2d(24, 48, 3, padding=1),
        activation(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(48, CLASSES),
    ).double()


def batch(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(100 + seed)
    return torch.randn(n, 2, 8, 8, generator=rng, dtype=torch.float64), torch.randint(CLASSES, (n,), generator=rng)


def seen(net: nn.Module, x: Tensor, y: Tensor, loss: unbatch.Loss = F.cross_entropy) -> Observation:
    return unbatch.observe(net, loss, x, y, protocol=Protocol(mode="eval"))[0]


def errors(found: Reconstruction, x: Tensor) -> Tensor:
    """Of every recovered example, relative to the nearest true one."""
    assert found.inputs is not None
    far = torch.cdist(found.inputs.flatten(1).cpu().double(), x.flatten(1).double())
    return far.min(1).values / found.inputs.flatten(1).norm(dim=1).cpu()


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, lambda c: nn.Identity()], ids=["batch norm", "no norm"])
def test_a_batch_behind_a_residual_network_is_recovered(norm: Callable[[int], nn.Module], n: int) -> None:
    x, y = batch(n)
    found = Descend()(seen(residual(norm), x, y))
    assert len(found) == n
    assert float(errors(found, x).max()) < 1e-9
    assert found.labels is not None
    assert sorted(found.labels.tolist()) == sorted(y.tolist())


@pytest.mark.parametrize(
    ("activation", "n"),
    [
        pytest.param(nn.GELU, 1, marks=pytest.mark.slow),
        (nn.GELU, 2),
        pytest.param(nn.Tanh, 2, marks=pytest.mark.slow),
        pytest.param(nn.SiLU, 2, marks=pytest.mark.slow),
        pytest.param(nn.LeakyReLU, 2, marks=pytest.mark.slow),
    ],
)
def test_a_batch_behind_smooth_activations_is_recovered(activation: type[nn.Module], n: int) -> None:
    x, y = batch(n)
    found = Descend()(seen(bent(activation), x, y))
    assert len(found) == n
    far = errors(found, x)
    assert float(far.max()) < 1e-6
    assert found.bound is not None
    assert bool((far <= found.bound).all())
    assert found.labels is not None
    assert sorted(found.labels.tolist()) == sorted(y.tolist())


class Around(nn.Module):
    """Two smooth convolutions and a branch that leads around them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(channels, channels, 3, padding=1), nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.b(F.gelu(self.a(x))) + x)


@pytest.mark.parametrize("n", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_smooth_batch_is_told_apart_at_a_layer_that_a_branch_leads_around(n: int) -> None:
    """What the layer gave does not tell the rest of the network, but its maps do."""
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 16, 3, padding=1), nn.GELU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.GELU(), Around(32)
    x, y = batch(n)
    y = torch.ones_like(y)  # of one class, whose deltas are nearly parallel
    found = Descend()(seen(nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, CLASSES)).double(), x, y))
    assert found.trace["layer"] == "4.a"
    assert len(found) == n
    assert found.bound is not None
    assert bool((errors(found, x) <= found.bound).all())
    assert float(errors(found, x).max()) < 1e-9


def test_a_smooth_batch_of_more_windows_than_channels_is_not_told_apart() -> None:
    x, y = batch(4)  # 64 windows, 48 outputs
    found = Descend()(seen(bent(nn.GELU), x, y))
    assert not len(found)
    assert found.bound is not None
    assert "stopped" in found.trace


@pytest.mark.slow
def test_bounds_hold_behind_smooth_activations() -> None:
    ratios = list[float]()
    for seed in range(40):
        activation = (nn.GELU, nn.Tanh, nn.SiLU, nn.ELU, nn.LeakyReLU)[seed % 5]
        x, y = batch(1 + seed % 3, seed)
        net = bent(activation, norm=seed % 4 == 3, seed=seed)
        dtype = torch.float64 if seed % 8 < 6 else torch.float32
        found = Descend()(seen(net.to(dtype), x.to(dtype), y))
        if len(found):
            assert found.bound is not None
            ratios += (found.bound.cpu() / errors(found, x)).tolist()
    print(
        f"{len(ratios)} examples certified, bound / error {min(ratios):.2g} at least, {median(ratios):.3g} in the median"
    )
    assert len(ratios) > 20
    assert min(ratios) >= 1
    assert median(ratios) < 100


def test_equal_labels_change_nothing() -> None:
    x, _ = batch(2)
    found = Descend()(seen(residual(), x, torch.tensor([1, 1])))
    assert len(found) == 2
    assert float(errors(found, x).max()) < 1e-9


def test_a_chain_of_convolutions_with_a_dense_layer_between() -> None:
    x, y = batch(2)
    found = Descend()(seen(plain(), x, y))
    assert len(found) == 2
    assert float(errors(found, x).max()) < 1e-9


@pytest.mark.parametrize(
    ("loss", "labels"),
    [
        (F.mse_loss, torch.rand(2, CLASSES, generator=torch.Generator().manual_seed(1), dtype=torch.float64)),
        (F.cross_entropy, torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1]], dtype=torch.float64)),
        (nn.CrossEntropyLoss(reduction="sum"), torch.tensor([3, 0])),
    ],
    ids=["squares", "soft rows", "summed"],
)
def test_labels_of_every_form_are_told(loss: unbatch.Loss, labels: Tensor) -> None:
    x, _ = batch(2)
    found = Descend()(seen(residual(), x, labels, loss))
    assert len(found) == 2
    assert found.labels is not None
    order = torch.cdist(x.flatten(1), found.inputs.flatten(1)).argmin(1)  # type: ignore[union-attr]
    assert torch.allclose(found.labels[order].double(), labels.double(), atol=1e-8)


def drawn(seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A random small problem: a network, and a batch."""
    rng = torch.Generator().manual_seed(seed)
    kind, width, n = (int(torch.randint(k, (), generator=rng)) for k in (3, 5, 3))
    net = plain(seed) if kind == 2 else residual([nn.BatchNorm2d, lambda c: nn.Identity()][kind], 10 + width, seed)
    return net, *batch(1 + n, seed)


def held(seeds: range, dtype: torch.dtype = torch.float64) -> tuple[int, int, list[float]]:
    """Examples that were certified, those whose bound fails, and bound over error of each."""
    made, false, ratios = 0, 0, list[float]()
    for seed in seeds:
        net, x, y = drawn(seed)
        net, x = net.to(dtype), x.to(dtype)
        found = Descend()(seen(net, x, y))
        if not len(found):
            continue
        far = errors(found, x)
        assert found.bound is not None
        made += len(found)
        false += int((far > found.bound).sum())
        ratios += (found.bound / far.clamp_min(1e-300)).tolist()
    return made, false, ratios


def test_bounds_hold_in_a_sample() -> None:
    made, false, ratios = held(range(6))
    assert made >= 6
    assert not false
    assert median(ratios) < 100


@pytest.mark.slow
def test_bounds_hold(capsys: pytest.CaptureFixture[str]) -> None:
    made, false, ratios = held(range(300))
    with capsys.disabled():
        print(
            f"300 problems: {made} examples certified, {false} bounds fail, median bound / error {median(ratios):.1f}"
        )
    assert made >= 300
    assert not false
    assert median(ratios) < 100


def test_a_perturbed_update_is_not_certified() -> None:
    x, y = batch(2)
    obs = seen(residual(), x, y)
    rng = torch.Generator().manual_seed(0)
    sent = {
        name: u + 1e-3 * u.norm() / u.numel() ** 0.5 * torch.randn(u.shape, generator=rng)
        for name, u in obs.update.items()
    }
    found = Descend()(Observation(model=obs.model, loss=obs.loss, update=sent, knowledge=obs.knowledge))
    assert not len(found)


def test_what_it_does_not_read_is_refused_in_words() -> None:
    x, y = batch(2)
    net = residual()
    steps = unbatch.observe(
        net, F.cross_entropy, x, y, protocol=Protocol(mode="eval", local_steps=2, learning_rate=0.1)
    )[0]
    with pytest.raises(NotApplicable, match="local steps"):
        Descend()(steps)
    noisy = unbatch.observe(net, F.cross_entropy, x, y, protocol=Protocol(mode="eval"), defences="noise:sigma=0.01")[0]
    with pytest.raises(NotApplicable, match="noise"):
        Descend()(noisy)


def test_a_layer_that_is_missing_is_named() -> None:
    x, y = batch(2)
    obs = seen(residual(), x, y)
    without = {name: u for name, u in obs.update.items() if not name.startswith("7")}
    with pytest.raises(NotApplicable, match="'7'"):
        Descend()(Observation(model=obs.model, loss=obs.loss, update=without, knowledge=obs.knowledge))


def frozen(obs: Observation, *layers: str) -> Observation:
    """The same exchange, without the gradients of some layers."""
    sent = {name: u for name, u in obs.update.items() if name.rsplit(".", 1)[0] not in layers}
    return Observation(model=obs.model, loss=obs.loss, update=sent, knowledge=obs.knowledge)


def test_layers_that_the_way_does_not_need_may_be_missing() -> None:
    """Of the first convolution, of a norm, and of the shortcut beside a stride-1 way."""
    x, y = batch(1)
    found = Descend()(frozen(seen(residual(), x, y), "0", "1", "4.nb", "4.side"))
    assert len(found) == 1
    assert float(errors(found, x).max()) < 1e-9


def test_a_layer_on_the_way_down_that_is_missing_is_named() -> None:
    x, y = batch(2)
    found = Descend(steps=1, attempts=1)(frozen(seen(residual(), x, y), "3.b"))
    assert not len(found)
    assert any(why.startswith("'3.b'") and "sent no gradient" in why for why in found.trace["stops"])


def test_a_network_without_the_layers_that_tell_apart_says_which() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),
        nn.GELU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(512, 3),
    ).double()
    x, y = batch(2)
    found = Descend()(frozen(seen(net, x, y % 3), "2"))
    assert not len(found)
    assert "No gradient was sent by '2'." in found.trace["stopped"]


@pytest.mark.parametrize("defence", ["prune:share=0.5", "quantise:bits=8"])
def test_an_update_that_was_pruned_or_quantised_is_refused_in_words(defence: str) -> None:
    x, y = batch(2)
    obs = unbatch.observe(residual(), F.cross_entropy, x, y, protocol=Protocol(mode="eval"), defences=defence)[0]
    with pytest.raises(NotApplicable, match="altered by"):
        Descend()(obs)


def test_dropout_in_train_mode_is_refused_in_words() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 16, 3, padding=1), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(512, CLASSES),
    ).double()  # fmt: skip
    x, y = batch(1)
    obs = unbatch.observe(net, F.cross_entropy, x, y, protocol=Protocol(mode="train"))[0]
    with pytest.raises(NotApplicable, match="dropout in train mode"):
        Descend()(obs)
    found = Descend()(seen(net, x, y))
    assert len(found) == 1  # in eval mode it is nothing


@pytest.mark.parametrize("classes", [10, 1000])
def test_a_head_of_any_width_with_or_without_bias(classes: int) -> None:
    net = residual()
    torch.manual_seed(1)
    net[7] = nn.Linear(48, classes, bias=classes == 10).double()
    x, _ = batch(2)
    y = torch.tensor([classes - 1, 3])
    found = Descend()(seen(net, x, y))
    assert len(found) == 2
    assert found.labels is not None
    assert sorted(found.labels.tolist()) == sorted(y.tolist())
    assert float(errors(found, x).max()) < 1e-9


def test_a_float32_gradient_of_a_deep_network_is_read_and_certified() -> None:
    """Of its entries the judge looks at a sample, in which not every tensor has one."""
    setting = unbatch.Case.parse("photos:batch=2,size=16,model=resnet18,width=16").setting()
    found = Descend()(seen(setting.model, setting.inputs, setting.labels))
    assert len(found) == 2
    assert found.bound is not None
    assert bool((errors(found, setting.inputs) <= found.bound.to(torch.float64)).all())
    assert float(found.bound.max()) < 1e-3
