"""How tensors lie in memory changes nothing: layouts, strides and storage of models, inputs and updates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unbatch
from unbatch.analysis import Analysis
from unbatch.attack import Attack
from unbatch.auditing.client import observe
from unbatch.knowledge import Knowledge
from unbatch.observation import Observation
from unbatch.protocol import Protocol

LAYOUTS = ["channels-last", "transposed", "sliced", "offset"]


def laid(t: Tensor, layout: str) -> Tensor:
    """The same numbers, elsewhere in memory."""
    t = t.clone(memory_format=torch.contiguous_format)
    if layout == "channels-last":
        return t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t
    if layout == "transposed":
        return t.movedim(0, -1).contiguous().movedim(-1, 0)
    if layout == "sliced":
        return t.new_zeros([2 * side for side in t.shape])[tuple(slice(None, None, 2) for _ in t.shape)].copy_(t)
    if layout == "offset":
        return t.new_zeros(t.numel() + 3)[3:].view(t.shape).copy_(t)
    return t


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.f = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3), nn.Linear(192, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.a(x))
        return self.f(torch.flatten(F.leaky_relu(self.b(x), 0.2), 1))


def convolutional() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Tanh(), nn.Flatten(), nn.Linear(128, 10))


def dense() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(108, 60), nn.ReLU(), nn.Linear(60, 10))


def placed(make: type[nn.Module], n: int, layout: str) -> tuple[Observation, Tensor]:
    torch.manual_seed(0)
    model, x, y = make().double().eval(), torch.rand(n, 3, 6, 6, dtype=torch.float64), torch.arange(n)
    for p in model.parameters():
        p.data = laid(p.data, layout)
    known = Knowledge(input_range=(0.0, 1.0))
    obs, _ = observe(model, F.cross_entropy, laid(x, layout), y, knowledge=known, protocol=Protocol(mode="eval"))
    return replace(obs, update={name: laid(t, layout) for name, t in obs.update.items()}), x


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("make", "n", "attack"),
    [
        (Functional, 1, "layer-by-layer"),
        (convolutional, 1, "layer-by-layer"),
        (dense, 3, "unmix"),
        (dense, 1, "bias-ratio"),
        (dense, 3, "label-count"),
    ],
)
def test_an_attack_gives_the_same(make: type[nn.Module], n: int, attack: str, layout: str) -> None:
    found = [Attack.parse(attack)(placed(make, n, each)[0], seed=0) for each in ("", layout)]
    assert found[0].bound is not None
    assert torch.equal(found[0].bound.isfinite(), found[1].bound.isfinite())
    if found[0].inputs is not None:
        torch.testing.assert_close(found[1].inputs, found[0].inputs, rtol=1e-6, atol=1e-6)
        assert bool(found[0].bound.isfinite().all())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("make", [Functional, dense])
@pytest.mark.parametrize("analysis", ["gradient-rank", "layer-equations", "security-metric"])
def test_an_analysis_says_the_same(make: type[nn.Module], analysis: str, layout: str) -> None:
    said = [
        [(getattr(each, "rank", None), getattr(each, "value", None)) for each in Analysis.parse(analysis)(obs)]
        for obs in (placed(make, 1, "")[0], placed(make, 1, layout)[0])
    ]
    for (rank, value), (other, number) in zip(*said, strict=True):
        assert rank == other
        assert value is None or value == pytest.approx(number, rel=1e-6)


@pytest.mark.parametrize("layout", ["", *LAYOUTS, "expanded"])
def test_an_audit_of_inputs_that_lie_elsewhere(layout: str) -> None:
    torch.manual_seed(0)
    model = Functional()
    if layout == "channels-last":
        model = model.to(memory_format=torch.channels_last)
    x = torch.rand(1, 1, 6, 6).expand(1, 3, 6, 6) if layout == "expanded" else laid(torch.rand(1, 3, 6, 6), layout)
    setting = unbatch.Setting(model=model, loss=F.cross_entropy, inputs=x, labels=torch.tensor([1]))
    record = unbatch.audit(setting, attacks=["layer-by-layer"], analyses=[], budget=20)
    assert record.verdict().startswith("1 of 1")


@pytest.mark.parametrize("layout", [*LAYOUTS, "expanded"])
def test_a_bundle_holds_the_numbers_and_not_their_layout(layout: str, tmp_path: Path) -> None:
    obs, _ = placed(Functional, 1, "")
    told = {
        name: t.mean().expand(t.shape) if layout == "expanded" else laid(t, layout) for name, t in obs.update.items()
    }
    replace(obs, update=told).save(tmp_path / "one.safetensors")
    again = Observation.load(tmp_path / "one.safetensors", model=Functional().double(), loss=F.cross_entropy)
    assert all(torch.equal(again.update[name], t) for name, t in told.items())
