"""Parallel: which rows of a matrix point the same way."""

from __future__ import annotations

import torch
from torch import Tensor

MOST_ROWS = 2048  # of a larger matrix so many are drawn, evenly
ANGLE = 0.01  # radians between two rows, or one and the other's opposite, that count as one direction


def parallel(rows: Tensor) -> Tensor:
    """Which rows of [m, d] point the same way or the opposite one, [m, m]; zero rows point no way.

    >>> parallel(torch.tensor([[1.0, 2.0], [-2.0, -4.0], [1.0, 0.0], [0.0, 0.0]])).sum(1).tolist()
    [2, 2, 1, 0]
    """
    norms = rows.norm(dim=1)
    unit = rows / norms.clamp_min(1e-300)[:, None]
    sine = 1 - (unit @ unit.T).square()  # of the angle, squared
    same: Tensor = (sine < ANGLE**2) & (norms > 0) & (norms > 0)[:, None]
    return same


def spread_evenly(m: int) -> Tensor:
    """The numbers of at most MOST_ROWS rows of m, evenly apart.

    >>> spread_evenly(3).tolist(), len(spread_evenly(100_000))
    ([0, 1, 2], 2048)
    """
    return torch.arange(m) if m <= MOST_ROWS else torch.linspace(0, m - 1, MOST_ROWS).long()
