"""Annealing: the likeliest solution of equations that leave much open, trusted a little at first and fully at last."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from unbatch.numerics.callables import Tick
from unbatch.numerics.search.damped_gauss_newton import Damping, Steps, Stop, damped_gauss_newton, end_of

AtSharpness = Callable[[Tensor, float], Tensor]  # z [d] and the sharpness of kinks -> r [e], or its Jacobian [e, d]
FIRST_DEVIATION, LAST_DEVIATION = 1.0, 1e-6  # standard deviations of a residual at the first level and at the last
FIRST_SHARPNESS, LAST_SHARPNESS = 1.0, 1e4  # kinks' sharpness, likewise
LEVEL_STEPS, STEP_TRIES, LEAST_GAIN = (
    2,
    12,
    1e-3,
)  # of a level, and of a step, at most; the least share of the cost that a step takes
LEAST_DAMPING, DAMPING_RISE, DAMPING_FALL = (
    1e-8,
    8.0,
    100.0,
)  # of a step: at least; times after a try that fails, and less after one that helps


def annealed(
    residual: AtSharpness,
    jacobian: AtSharpness,
    start: Tensor,
    *,
    levels: int = 30,
    tight: float = LAST_DEVIATION,
    steps: int = LEVEL_STEPS,
    tick: Tick = lambda share: True,
) -> Tensor:
    """The likeliest solution of equations that do not suffice, by trusting them a little more step by step.

    argmin over z [d] of |r(z)|^2 / s^2 + |z - start|^2 as s falls from 1 to `tight`, each level from the last one's.

    With x = middle + R z, from start = 0, that is the posterior's mode at noise s under the prior N(middle, R R^T); from a
    draw of z it is the root that lies nearest to what was drawn. While s is large only what the prior holds likely moves,
    smooth pictures first; and kinks, whose sharpness b the residual is told, are rounded until b = 1e4, so that a unit may
    still change sides. Steps are Levenberg and Marquardt's.
    Source: graduated non-convexity, Blake and Zisserman, Visual Reconstruction, 1987.

    >>> A = torch.tensor([[1.0, 1.0]]).double()
    >>> start = torch.zeros(2).double()
    >>> annealed(lambda z, sharpness: A @ z - 2, lambda z, sharpness: A, start).round(decimals=6)  # nearest to the start
    tensor([1., 1.], dtype=torch.float64)
    """
    z, damping = start[None], torch.tensor([LEAST_DAMPING], dtype=torch.float64)
    for level in range(levels):
        share = level / max(levels - 1, 1)
        if not tick(share):
            break
        s, b = (
            FIRST_DEVIATION * (tight / FIRST_DEVIATION) ** share,
            FIRST_SHARPNESS * (LAST_SHARPNESS / FIRST_SHARPNESS) ** share,
        )
        last = end_of(
            damped_gauss_newton(
                partial(_residuals, residual, start, s, b),
                partial(_posterior_steps, jacobian, s, b),
                z,
                damping=Damping(first=float(damping), rise=DAMPING_RISE, fall=DAMPING_FALL, least=LEAST_DAMPING),
                stop=Stop(steps=steps, tries=STEP_TRIES, gain=LEAST_GAIN),
            )
        )
        z, damping = last.x, last.damping
    return z[0]


def _residuals(residual: AtSharpness, start: Tensor, s: float, b: float, z: Tensor, which: Tensor) -> Tensor:
    """[1, e + d]: r / s, and how far z is from the start."""
    return torch.cat([residual(z[0], b) / s, z[0] - start])[None]


def _posterior_steps(jacobian: AtSharpness, s: float, b: float, z: Tensor, r: Tensor, which: Tensor) -> Steps:
    """Steps [1, d] from z [1, d], where `_residuals` are r."""
    d = z.shape[1]
    step = _Step(jacobian(z[0], b) / s, r[0, :-d], r[0, -d:])
    return lambda damping, rows: iter([step(float(damping))[None]])


class _Step:
    """-(J^T J + I + c m I)^-1 (J^T r + p) [d] for any damping c, m the mean diagonal, by one Gram matrix for all.

    J [e, d], r [e], p [d]; of the smaller of J J^T and J^T J, as (J^T J + c)^-1 = (1 - J^T (J J^T + c)^-1 J) / c.
    """

    def __init__(self, J: Tensor, r: Tensor, p: Tensor) -> None:
        self.wide = J if len(J) < J.shape[1] else None
        self.gram = J.T @ J if self.wide is None else J @ J.T
        self.down = J.T @ r + p
        self.scale = 1 + float(self.gram.trace()) / J.shape[1]
        self.along = self.down if self.wide is None else J @ self.down

    def __call__(self, damping: float) -> Tensor:
        c = 1 + damping * self.scale
        shifted = self.gram.clone()
        shifted.diagonal().add_(c)
        root = torch.linalg.cholesky_ex(shifted).L
        inverse = torch.cholesky_solve(self.along[:, None], root)[:, 0]
        return -inverse if self.wide is None else (self.wide.T @ inverse - self.down) / c
