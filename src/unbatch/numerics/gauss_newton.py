"""Batched Levenberg-Marquardt: many small independent least-squares problems at once, each with its own damping."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Residual = Callable[[Tensor, Tensor], Tensor]  # x [q, p] of problems i [q] -> r [q, e]
Normal = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # the same -> J^T J [q, p, p], J^T r [q, p]


def levenberg_marquardt(
    residual: Residual,
    normal: Normal,
    start: Tensor,
    *,
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
    """
    x = start.clone()
    costs = []
    for which in torch.split(torch.arange(len(x), device=x.device), chunk):
        x[which], cost = _solve(residual, normal, x[which], which, steps, damping, target, gain, tries)
        costs.append(cost)
    return x, torch.cat(costs) if costs else x.new_zeros(0)


def _solve(
    residual: Residual,
    normal: Normal,
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
        better = torch.zeros_like(now, dtype=torch.bool)
        moved, reached = here.clone(), now.clone()
        for _ in range(tries):
            step = torch.linalg.solve_ex(gram + (damp * scale)[:, None, None] * eye, downhill[:, :, None])[0][..., 0]
            tried = torch.where(better[:, None], moved, here - step.nan_to_num())
            value = residual(tried, which[live]).square().sum(1).nan_to_num(torch.inf)
            good = ~better & (value < now)
            moved, reached = torch.where(good[:, None], tried, moved), torch.where(good, value, reached)
            better |= good
            if bool(better.all()):
                break
            damp = torch.where(better, damp, damp * 8)
        x[live], costs[live] = moved, reached
        level[live] = torch.where(better, damp / 10, damp).clamp_min(1e-15)
        live = live[better & (reached > target) & (reached <= (1 - gain) * now)]
    return x, costs
