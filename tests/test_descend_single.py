"""One picture behind networks that no window tells apart: the head's features, and the gradients of all that lies below."""

from __future__ import annotations

from statistics import median

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unbatch
from unbatch import Protocol
from unbatch.attacks import Descend
from unbatch.observation import Observation
from unbatch.reconstruction import Reconstruction

CLASSES = 5


class Block(nn.Module):
    """A depthwise convolution, layer norm over channels, two dense layers at every place and a scale, beside a shortcut."""

    def __init__(self, channels: int, scale: float) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.expand, self.project = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        self.scale = nn.Parameter(torch.full((channels,), scale))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.project(F.gelu(self.expand(y)))
        found: Tensor = x + y.permute(0, 3, 1, 2)
        return found


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of a map [n, c, h, w]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Pooled(nn.Module):
    """The mean over all places."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def depthwise(scale: float = 1.0, seed: int = 0, stages: int = 2) -> nn.Module:
    """One or two stages of such blocks for pictures [2, 8, 8]."""
    torch.manual_seed(seed)
    layers = [nn.Conv2d(2, 12, 2, 2), ChannelNorm(12), Block(12, scale)]
    if stages == 2:
        layers += [ChannelNorm(12), nn.Conv2d(12, 24, 2, 2), Block(24, scale)]
    width = 12 * stages
    return nn.Sequential(*layers, Pooled(), nn.LayerNorm(width), nn.Linear(width, CLASSES)).double()


def layer_normed(seed: int = 0) -> nn.Module:
    """Convolutions with a layer norm over channels and places, strides too large for windows to overlap."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 16, 2, 2),
        nn.SiLU(),
        nn.Conv2d(16, 32, 2, 2),
        nn.LayerNorm([32, 2, 2]),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(128, CLASSES),
    ).double()


def seen(net: nn.Module, x: Tensor, y: Tensor) -> Observation:
    return unbatch.observe(net, F.cross_entropy, x, y, protocol=Protocol(mode="eval"))[0]


def picture(n: int, seed: int) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(100 + seed)
    coarse = torch.randn(n, 2, 4, 4, generator=rng, dtype=torch.float64)
    grain = torch.randn(n, 2, 8, 8, generator=rng, dtype=torch.float64)
    x = F.interpolate(coarse, size=(8, 8), mode="bilinear") + 0.3 * grain
    return x, torch.randint(CLASSES, (n,), generator=rng)


def error(found: Reconstruction, x: Tensor) -> float:
    assert found.inputs is not None
    return float((found.inputs.double() - x.double()).norm() / x.double().norm())


@pytest.mark.parametrize("stages", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_one_picture_behind_depthwise_convolutions_and_layer_norms_is_recovered(stages: int) -> None:
    x, y = picture(1, 0)
    found = Descend(steps=100)(seen(depthwise(stages=stages), x, y))
    assert len(found) == 1
    assert found.bound is not None
    assert error(found, x) <= float(found.bound[0]) < 1e-9
    assert found.labels is not None
    assert found.labels.tolist() == y.tolist()
    assert found.trace["layer"] == str(2 + 3 * stages)


def test_two_pictures_there_are_refused_by_the_name_of_the_head() -> None:
    x, _ = picture(2, 0)
    found = Descend()(seen(depthwise(stages=1), x, torch.tensor([0, 3])))
    assert not len(found)
    assert found.trace["stopped"] == "5: its gradient mixes 2 examples, whose features may have any sign"


@pytest.mark.slow
def test_bounds_of_one_picture_hold(capsys: pytest.CaptureFixture[str]) -> None:
    ratios = list[float]()
    for seed in range(10):
        net = layer_normed(seed) if seed % 3 == 2 else depthwise((1.0, 0.1)[seed % 2], seed, 1 + seed % 2)
        dtype = torch.float32 if seed % 5 == 4 else torch.float64
        x, y = picture(1, seed)
        found = Descend()(seen(net.to(dtype), x.to(dtype), y))
        if len(found):
            assert found.bound is not None
            ratios.append(float(found.bound[0]) / error(found, x.to(dtype)))
    with capsys.disabled():
        print(
            f"10 problems: {len(ratios)} certified, bound / error {min(ratios):.2g} at least, "
            f"{median(ratios):.3g} in the median"
        )
    assert len(ratios) > 5
    assert min(ratios) >= 1
    assert median(ratios) < 100
