"""Annealing: the likeliest root of equations under a Gaussian prior, first trusted as little as a guess is."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from unbatch.numerics.gauss_newton import levenberg_marquardt

Apply = Callable[[Tensor, float], Tensor]  # z [d] and the sharpness of kinks -> r [e], or its Jacobian [e, d]
Tick = Callable[[float], bool]  # share done -> whether to go on
LOOSE, TIGHT = 1.0, 1e-6  # standard deviations of a residual at the first level and at the last
BLUNT, SHARP = 1.0, 1e4  # kinks' sharpness, likewise
STEPS, DAMPING, GAIN = 2, 1e-8, 1e-3  # at most, of a level; and the least share of the cost that one takes


def annealed(
    residual: Apply, jacobian: Apply, start: Tensor, *, levels: int = 30, tick: Tick = lambda share: True
) -> Tensor:
    """argmin over z [d] of |r(z)|^2 / s^2 + |z|^2 as s falls from 1 to 1e-6, each level from the last one's.

    With x = middle + R z that is the posterior's mode at noise s under the prior N(middle, R R^T). While s is large only
    what the prior holds likely moves, smooth pictures first; and kinks, whose sharpness b the residual is told, are
    rounded until b = 1e4, so that a unit may still change sides. From `start` [d].
    Source: graduated non-convexity, Blake and Zisserman, Visual Reconstruction, 1987.
    """
    z = start
    for level in range(levels):
        share = level / max(levels - 1, 1)
        if not tick(share):
            break
        s, b = LOOSE * (TIGHT / LOOSE) ** share, BLUNT * (SHARP / BLUNT) ** share

        def cost(each: Tensor, which: Tensor, s: float = s, b: float = b) -> Tensor:
            return torch.stack([torch.cat([residual(own, b) / s, own]) for own in each])

        def normal(each: Tensor, which: Tensor, s: float = s, b: float = b) -> tuple[Tensor, Tensor]:
            own = each[0]
            J, r = jacobian(own, b) / s, residual(own, b) / s
            return (J.T @ J + torch.eye(len(own)).to(own))[None], (J.T @ r + own)[None]

        z = levenberg_marquardt(cost, normal, z[None], steps=STEPS, damping=DAMPING, gain=GAIN)[0][0]
    return z
