"""Rank law: how many independent equations a convolution's output and gradient give on its input, by counting alone.

With generic weights and gradients the weight constraint W x = z and the gradient constraint K x = dL/dW of c_out filters
overlap in exactly the identities <w_g, dL/dw_f> = <dz_f, z_g>, so rank [W; K] = rank W + rank K - c_out^2 until every pixel
that the filters touch is determined (Chen and Campbell, 2021). The phases of a stride, padding, and where counting is
right, are this library's, measured on random layers against their matrices.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

MARGIN = (0.9, 1.1)  # equations by count over touched pixels


@dataclass(frozen=True)
class ConvRanks:
    """How many independent equations a convolution gives on its input.

    Ranks of the equations on a layer's input.

    >>> ConvRanks(unknowns=48, weight=27, gradient=27, both=45).deficit
    3
    """

    unknowns: int  # entries of the input
    weight: int | None  # of W: forward equations; None where counting does not tell
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
    padding: Sequence[int],
    groups: int = 1,
) -> ConvRanks | None:
    """How many independent equations a convolution gives on its input, by counting alone.

    The ranks for `before` -> `after` channels on an input of those sides, or None where counting fails.

    Counting does where filters do not outnumber the channels of the stride's phases that hold a tap, c_out <= c_in phases
    in each group (beyond, filters commute, w_f * (w_g * x) = w_g * (w_f * x), and rows of W depend on each other); where
    dilation divides the stride (else the input falls apart into lattices); where the kernel reaches less far than the
    outputs do (else rows of K depend on each other); where padding hides less than half the taps of a window; and where
    the count is not within `MARGIN` of the touched pixels, about which a few equations more depend on each other, nor below
    them under padding, whose windows at the edge are no generic ones.
    Under padding the equations of W may depend on each other, and `weight` is not told.
    Raises ValueError: the kernel is larger than the input, or groups do not divide the channels.

    >>> conv_ranks(3, 1, (6, 6), (3, 3), stride=(1, 1), dilation=(1, 1), padding=(0, 0))
    ConvRanks(unknowns=108, weight=16, gradient=27, both=42)
    """
    if before % groups or after % groups:
        raise ValueError(f"{before} and {after} channels do not fall into {groups} groups.")
    c_in, c_out = before // groups, after // groups
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    out = [(n + 2 * p - r) // s + 1 for n, p, r, s in zip(sides, padding, reach, stride, strict=True)]
    if min(out) < 1:
        raise ValueError(f"a kernel that reaches over {reach} does not fit an input of sides {list(sides)}.")
    lines = [_Side(*line) for line in zip(sides, out, kernel, stride, dilation, padding, strict=True)]
    pixels, places = math.prod(len(line.touched()) for line in lines), math.prod(out)
    taps, phases = math.prod(kernel), [line.phases() for line in lines]
    if c_out > c_in * math.prod(len(side) for side in phases) or any(
        s % d for s, d in zip(stride, dilation, strict=True)
    ):
        return None
    if any(r > (o - 1) * s for r, o, s in zip(reach, out, stride, strict=True)):
        return None
    if any(p > (k - 1) // 2 * d for p, k, d in zip(padding, kernel, dilation, strict=True)):
        return None
    weight = sum(
        math.prod(n for _, n in place) * min(c_out, c_in * math.prod(t for t, _ in place))
        for place in product(*(line.places() for line in lines))
    )
    weight = min(weight, c_in * pixels)
    gradient = c_in * sum(
        min(c_out * math.prod(t for t, _ in phase), math.prod(p for _, p in phase)) for phase in product(*phases)
    )
    count = weight + gradient - min(c_out, c_in * taps) * min(c_out, places)
    if (0.0 if any(padding) else MARGIN[0]) < count / (c_in * pixels) < MARGIN[1]:
        return None
    both = min(c_in * pixels, max(count, weight, gradient))
    told = None if any(padding) else groups * weight
    return ConvRanks(before * math.prod(sides), told, groups * gradient, groups * both)


class _Side(NamedTuple):
    """A convolution along one side of its input."""

    size: int
    out: int
    kernel: int
    stride: int
    dilation: int
    padding: int

    def touched(self, phase: int | None = None) -> set[int]:
        """Pixels under the taps j with j dilation = phase modulo the stride; under all of them without a phase."""
        taps = [j * self.dilation for j in range(self.kernel)]
        near = [tap for tap in taps if phase is None or tap % self.stride == phase]
        seen = {t * self.stride + tap - self.padding for t in range(self.out) for tap in near}
        return {pixel for pixel in seen if 0 <= pixel < self.size}

    def places(self) -> list[tuple[int, int]]:
        """How many taps of an output lie on the input and not on its padding, and for how many outputs."""
        starts = (t * self.stride - self.padding for t in range(self.out))
        taps = [sum(0 <= start + j * self.dilation < self.size for j in range(self.kernel)) for start in starts]
        return list(Counter(taps).items())

    def phases(self) -> list[tuple[int, int]]:
        """For each remainder by the stride that holds a tap: how many, and the pixels that they touch."""
        count = Counter(j * self.dilation % self.stride for j in range(self.kernel))
        return [(taps, len(self.touched(phase))) for phase, taps in count.items()]
