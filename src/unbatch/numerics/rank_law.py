"""Rank law: how many independent equations a convolution's output and gradient give on its input, by counting alone.

With generic weights and gradients, and no padding, the weight constraint W x = z and the gradient constraint K x = dL/dW
of c_out filters overlap in exactly the identities <w_g, dL/dw_f> = <dz_f, z_g>, so rank [W; K] = rank W + rank K - c_out^2
until every pixel that the filters touch is determined. The identity is Chen and Campbell's (2021); the phases of a stride,
and where counting is right, are this library's, measured on random layers against their matrices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

MARGIN = (0.9, 1.1)  # equations by count over touched pixels


@dataclass(frozen=True)
class ConvRanks:
    """Ranks of the equations on one example's input."""

    unknowns: int  # entries of the input
    covered: int  # those that a filter touches; strides may leave out a margin
    weight: int  # of W: forward equations
    gradient: int  # of K: gradient equations
    both: int  # of [W; K]

    @property
    def deficit(self) -> int:
        """Unknowns that both together leave open."""
        return self.unknowns - self.both


def conv_ranks(
    before: int,
    after: int,
    sides: Sequence[int],
    kernel: Sequence[int],
    *,
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
) -> ConvRanks | None:
    """The ranks for `before` -> `after` channels on an input of those sides, or None where counting is not known to do.

    Counting does where filters do not outnumber the channels of the stride's phases that hold a tap, c_out <= c_in phases
    in each group (beyond, filters commute, w_f * (w_g * x) = w_g * (w_f * x), and rows of W depend on each other); where
    the kernel reaches less far than the outputs do (else the same holds for K); and not within `MARGIN` of the count at
    which every touched pixel is determined, where a few equations more depend on each other.
    Raises ValueError: the kernel is larger than the input.
    """
    c_in, c_out = before // groups, after // groups
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    out = [(n - r) // s + 1 for n, r, s in zip(sides, reach, stride, strict=True)]
    if min(out) < 1:
        raise ValueError(f"a kernel that reaches over {reach} does not fit an input of sides {list(sides)}.")
    touched = [
        len({t * s + j * d for t in range(o) for j in range(k)})
        for o, k, s, d in zip(out, kernel, stride, dilation, strict=True)
    ]
    pixels, places, taps = math.prod(touched), math.prod(out), math.prod(kernel)
    phases = [_phases(o, k, s, d) for o, k, s, d in zip(out, kernel, stride, dilation, strict=True)]
    if c_out > c_in * math.prod(len(side) for side in phases):
        return None
    if any(r > (o - 1) * s for r, o, s in zip(reach, out, stride, strict=True)):
        return None
    weight = min(places * min(c_out, c_in * taps), c_in * pixels)
    gradient = c_in * sum(
        min(c_out * math.prod(t for t, _ in phase), math.prod(p for _, p in phase)) for phase in product(*phases)
    )
    count = weight + gradient - min(c_out, c_in * taps) * min(c_out, places)
    if MARGIN[0] < count / (c_in * pixels) < MARGIN[1]:
        return None
    both = min(c_in * pixels, count)
    return ConvRanks(before * math.prod(sides), before * pixels, groups * weight, groups * gradient, groups * both)


def _phases(out: int, kernel: int, stride: int, dilation: int) -> list[tuple[int, int]]:
    """Along one side, for each remainder by the stride that holds a tap: its taps, and the pixels that they touch."""
    found = []
    for phase in range(stride):
        taps = [j * dilation for j in range(kernel) if (j * dilation) % stride == phase]
        if taps:
            found.append((len(taps), len({t * stride + tap for t in range(out) for tap in taps})))
    return found
