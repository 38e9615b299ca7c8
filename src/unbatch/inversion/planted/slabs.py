"""Slabs: the directions and thresholds of a planted layer, so that few examples lie between two that follow each other."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from unbatch.errors import NotApplicable
from unbatch.knowledge import Knowledge

TAIL = 6.0  # standard deviations below which no example is looked for
SMOOTHED = 10  # public examples between two knots of a quantile function
SHARE_OF_RANGE = 0.25  # the standard deviation that an entry is taken to have where only its range is known


def units_each(m: int, groups: int) -> list[int]:
    """How many of m units each of some directions gets, the first ones one more."""
    return [m // groups + (i < m % groups) for i in range(groups)]


def levels(m: int) -> Tensor:
    """The shares of the data [m] below each of m thresholds that cut it into as many equal parts; the first is 0."""
    return torch.arange(m, dtype=torch.float64) / m


def from_public(x: Tensor, m: int, groups: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Directions [m, d] and thresholds [m] at the quantiles of public examples x [p, d].

    The first direction is the mean of all entries, the others are random.
    """
    p, d = x.shape
    if p < 2:
        raise NotApplicable("quantiles need two public examples or more.")
    rows, cuts = list[Tensor](), list[Tensor]()
    for g, share in enumerate(units_each(m, groups)):
        u = torch.full((d,), d**-0.5, dtype=torch.float64) if g == 0 else _random(d, rng)
        h = x.double() @ u
        at = _quantiles(h, share)
        at[0] = float(h.mean() - max(TAIL * float(h.std()), float(h.mean() - h.min()) + float(h.std())))
        rows += [u] * share
        cuts.append(at)
    return torch.stack(rows), torch.cat(cuts)


def from_statistics(centre: float, spread: float, m: int, d: int) -> tuple[Tensor, Tensor]:
    """The direction of the mean of all entries [m, d], and thresholds [m] at the quantiles of a normal law of that mean."""
    u = torch.full((d,), d**-0.5, dtype=torch.float64)
    at = centre + spread * _normal_levels(m)
    return u.expand(m, d).contiguous(), at * d**0.5


def from_range(spread: float, m: int, d: int, groups: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random directions [m, d] that add up to zero, and thresholds [m] by the Gaussian rule: w . x ~ N(0, spread^2 |w|^2).

    That is the law of independent entries; of others it holds on average over directions, which is why there are several.
    """
    rows, cuts = list[Tensor](), list[Tensor]()
    for share in units_each(m, groups):
        u = _random(d, rng)
        rows += [u] * share
        cuts.append(spread * _normal_levels(share))
    return torch.stack(rows), torch.cat(cuts)


def _quantiles(h: Tensor, m: int) -> Tensor:
    """Quantiles of h [p] at m levels, drawn between knots that hold several examples each, which smooths their chance."""
    knots = torch.linspace(0, 1, max(2, min(m, len(h) // SMOOTHED) + 1), dtype=torch.float64)
    at, want = torch.quantile(h, knots), levels(m)
    k = (want * (len(knots) - 1)).long().clamp_max(len(knots) - 2)
    found: Tensor = at[k] + (at[k + 1] - at[k]) * (want * (len(knots) - 1) - k)
    return found


def _normal_levels(m: int) -> Tensor:
    at = math.sqrt(2) * torch.erfinv(2 * levels(m) - 1)
    at[0] = -TAIL
    return at


def random_directions(m: int, d: int, rng: torch.Generator) -> Tensor:
    """Random directions [m, d] of length 1 that add up to zero each."""
    return torch.stack([_random(d, rng) for _ in range(m)])


def _random(d: int, rng: torch.Generator) -> Tensor:
    u = torch.randn(d, generator=rng, dtype=torch.float64)
    if d > 1:
        u -= u.mean()
    unit: Tensor = u / u.norm()
    return unit


def thresholds_for(known: Knowledge, W: Tensor, above: Tensor) -> Tensor:
    """Thresholds [m] above which a share `above` [m] of all examples lies along each row of W [m, d].

    Of a normal law: of public examples where there are some, else by the Gaussian rule for rows that add up to zero.
    """
    z: Tensor = math.sqrt(2) * torch.erfinv(1 - 2 * above)
    if "public" in known:
        h: Tensor = known.public.flatten(1).double() @ W.T  # [p, m]
        return h.mean(0) + h.std(0) * z
    size: Tensor = W.norm(dim=1)
    return _entry_spread(known) * size * z


def bins_for(
    known: Knowledge, m: int, d: int, rng: torch.Generator, directions: int | None = None, spread: float | None = None
) -> tuple[Tensor, Tensor]:
    """Directions [m, d] and thresholds [m] of bins by what is known: public examples, else the range of the inputs."""
    if "public" in known:
        return from_public(known.public.flatten(1), m, min(directions or 2, m), rng)
    return from_range(spread if spread is not None else _entry_spread(known), m, d, min(directions or 4, m), rng)


def _entry_spread(known: Knowledge) -> float:
    """The standard deviation that an entry is taken to have; 1, as of standardised ones, where no range is known."""
    low, high = known.get("input_range", (0.0, 1 / SHARE_OF_RANGE))
    return float(SHARE_OF_RANGE * (high - low))
