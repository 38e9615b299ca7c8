"""Batched Levenberg-Marquardt: many small independent least-squares problems at once, each with its own damping."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Residual = Callable[[Tensor, Tensor], Tensor]  # x [q, p] of problems i [q] -> r [q, e]
Pull = Callable[[Tensor, Tensor, Tensor], Tensor]  # the same, u [q, e] -> J^T u [q, p]
Normal = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # the same -> J^T J [q, p, p], J^T r [q, p]

BENT = 0.75  # of a step's length, at most twice that of its second order
REACH = 0.1  # share of a step over which its curvature is measured
SEEN = 100  # roundings of the residual above which a curvature is one


def levenberg_marquardt(
    residual: Residual,
    normal: Normal,
    start: Tensor,
    *,
    pull: Pull | None = None,
    steps: int = 20,
    damping: float = 1e-2,
    target: float = 0.0,
    gain: float = 0.0,
    tries: int = 5,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """Minimise |r_i(x_i)|^2 for every problem i from start [g, p]: x [g, p] and the costs reached [g].

    A problem takes the step d of (J^T J + damping s I) d = -J^T r, s the mean diagonal of J^T J, where that lowers its
    cost; its damping falls tenfold then, and rises eightfold otherwise, at most `tries` times a step. It leaves the
    batch once its cost is at most `target`, when no step helps, or when one takes away less than the share `gain`.
    `chunk` problems are linearised at a time, which bounds memory.

    With `pull` the step follows the geodesic to second order (Transtrum and Sethna, arXiv:1201.5885): d + d' with
    (J^T J + damping s I) d' = -J^T r''(d, d) / 2, refused where 2 |d'| > BENT |d|. Long curved valleys, such as those of
    examples of one class that look alike, then take a few steps instead of hundreds.
    """
    x = start.clone()
    costs = []
    for which in torch.split(torch.arange(len(x), device=x.device), chunk):
        x[which], cost = _solve(residual, normal, pull, x[which], which, steps, damping, target, gain, tries)
        costs.append(cost)
    return x, torch.cat(costs) if costs else x.new_zeros(0)


def _solve(
    residual: Residual,
    normal: Normal,
    pull: Pull | None,
    x: Tensor,
    which: Tensor,
    steps: int,
    damping: float,
    target: float,
    gain: float,
    tries: int,
) -> tuple[Tensor, Tensor]:
    costs = residual(x, which).square().sum(1).nan_to_num(torch.inf)
    level = torch.full_like(costs, damping)
    live = (costs > target).nonzero()[:, 0]
    eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    for _ in range(steps):
        if not len(live):
            break
        here, now, damp = x[live], costs[live], level[live]
        gram, downhill = normal(here, which[live])
        scale = gram.diagonal(dim1=1, dim2=2).mean(1) + 1e-300
        r = residual(here, which[live])
        better = torch.zeros_like(now, dtype=torch.bool)
        moved, reached = here.clone(), now.clone()
        for _ in range(tries):
            factors = torch.linalg.lu_factor_ex(gram + (damp * scale)[:, None, None] * eye)[:2]
            step = -torch.linalg.lu_solve(*factors, downhill[:, :, None])[..., 0].nan_to_num()
            straight = torch.ones_like(better)
            if pull is not None:
                bend = _second(residual, here, r, step, which[live])
                turn = -torch.linalg.lu_solve(*factors, pull(here, which[live], bend)[:, :, None])[..., 0] / 2
                straight = 2 * turn.norm(dim=1) <= BENT * step.norm(dim=1)
                step = step + turn.nan_to_num()
            tried = torch.where(better[:, None], moved, here + step)
            value = residual(tried, which[live]).square().sum(1).nan_to_num(torch.inf)
            good = ~better & straight & (value < now)
            moved, reached = torch.where(good[:, None], tried, moved), torch.where(good, value, reached)
            better |= good
            if bool(better.all()):
                break
            damp = torch.where(better, damp, damp * 8)
        x[live], costs[live] = moved, reached
        level[live] = torch.where(better, damp / 10, damp).clamp_min(1e-15)
        live = live[better & (reached > target) & (reached <= (1 - gain) * now)]
    return x, costs


def _second(residual: Residual, x: Tensor, r: Tensor, step: Tensor, which: Tensor) -> Tensor:
    """The second derivative of the residuals r along `step`, by a central difference; 0 where it is lost in rounding."""
    ahead, behind = residual(x + REACH * step, which), residual(x - REACH * step, which)
    change = (ahead - 2 * r + behind).nan_to_num()
    seen = change.norm(dim=1) > SEEN * torch.finfo(x.dtype).eps * r.shape[1] ** 0.5
    return torch.where(seen[:, None], change / REACH**2, 0.0)
