"""Bounds of descend behind norms, held to the truth over random small problems, family by family."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import median

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unbatch
from unbatch import Knowledge, Protocol
from unbatch.attacks import Descend

CLASSES = 4
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "group norm": lambda c: nn.GroupNorm(4, c),
    "layer norm": lambda c: nn.GroupNorm(1, c),
    "train mode": nn.BatchNorm2d,
    "train mode, averages sent": nn.BatchNorm2d,
}


class Block(nn.Module):
    """A residual block, its norms inside, its shortcut with a norm or the identity."""

    def __init__(self, inner: int, outer: int, stride: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.a, self.na = nn.Conv2d(inner, outer, 3, stride, 1, bias=False), norm(outer)
        self.b, self.nb = nn.Conv2d(outer, outer, 3, 1, 1, bias=False), norm(outer)
        self.side: nn.Module = nn.Identity()
        if stride > 1 or inner != outer:
            self.side = nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), norm(outer))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.nb(self.b(F.relu(self.na(self.a(x))))) + self.side(x))


def network(norm: Callable[[int], nn.Module], kind: int, width: int) -> nn.Module:
    """Two convolutions, three, or a residual network, of pictures of two channels."""
    layers: list[nn.Module]
    if kind == 2:
        layers = [nn.Conv2d(2, width, 3, padding=1, bias=False), norm(width), nn.ReLU()]
        layers += [Block(width, 2 * width, 2, norm), Block(2 * width, 2 * width, 1, norm)]
        last = 2 * width
    else:
        layers, last = [], 2
        for gave, stride in ((width, 1), (2 * width, 2), (3 * width, 1))[: 2 + kind]:
            layers += [nn.Conv2d(last, gave, 3, stride, padding=1, bias=False), norm(gave), nn.ReLU()]
            last = gave
        if kind == 0:
            layers += [nn.Conv2d(last, 3 * width, 3, 1, padding=1), nn.ReLU()]
            last = 3 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, CLASSES))


@dataclass
class Count:
    """Examples that were certified, those whose bound fails, bound over error of each, and which problems failed."""

    problems: int = 0
    made: int = 0
    false: int = 0
    ratios: list[float] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)

    def __str__(self) -> str:
        middle = f"{median(self.ratios):.1f}" if self.ratios else "none"
        return (
            f"{self.problems} problems: {self.made} examples certified, {self.false} bounds fail {self.seeds or ''}, "
            f"median bound / error {middle}"
        )


def drawn(family: str, seed: int) -> tuple[unbatch.Observation, Tensor]:
    """A random small problem behind norms, and its batch."""
    rng = torch.Generator().manual_seed(seed)
    kind, more, n, side, double = (int(torch.randint(k, (), generator=rng)) for k in (3, 3, 3, 2, 4))
    torch.manual_seed(seed)
    net, n, side = network(NORMS[family], kind, 16 + 4 * more), n + 1, 6 + 2 * side
    dtype = torch.float64 if double else torch.float32
    net = net.to(dtype)
    x = torch.randn(n, 2, side, side, generator=rng, dtype=torch.float64).to(dtype)
    y = torch.randint(CLASSES, (n,), generator=rng)
    told = Knowledge()
    if "sent" in family:
        after = copy.deepcopy(net).train()
        after(x)
        told = Knowledge(buffers=dict(after.named_buffers()))
    mode = "train" if "train" in family else "eval"
    return unbatch.observe(net, F.cross_entropy, x, y, protocol=Protocol(mode=mode), knowledge=told)[0], x  # type: ignore[arg-type]


def held(family: str, seeds: Iterable[int]) -> Count:
    """Bounds held to the truth in one family's problems."""
    count = Count()
    for seed in seeds:
        obs, x = drawn(family, seed)
        count.problems += 1
        found = Descend(steps=60, attempts=2)(obs)
        if not len(found):
            continue
        assert found.inputs is not None
        assert found.bound is not None
        gap = torch.cdist(
            found.inputs.flatten(1).double(), x.flatten(1).double(), compute_mode="donot_use_mm_for_euclid_dist"
        )
        claimed = found.bound.isfinite()
        far = (gap.min(1).values / found.inputs.flatten(1).norm(dim=1))[claimed]
        bound = found.bound[claimed]
        false = int((far > bound).sum())
        count.made, count.false = count.made + len(far), count.false + false
        count.ratios += (bound / far.clamp_min(1e-300)).tolist()
        count.seeds += [seed] if false else []
    return count


@pytest.mark.slow
@pytest.mark.parametrize("family", NORMS)
def test_bounds_behind_norms_hold(family: str, capsys: pytest.CaptureFixture[str]) -> None:
    count = held(family, range(60))
    with capsys.disabled():
        print(f"\n{family}: {count}")
    assert count.made
    assert not count.false
