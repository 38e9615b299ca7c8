"""Trimming: least squares whose equations come in blocks, some of which are wrong altogether."""

from __future__ import annotations

import torch
from torch import Tensor

STANDS_OUT = 5.0  # times the median of the blocks' misfits
SHARE = 0.5  # of the largest misfit, down to which blocks go at once
LEAST_HOLD = 0.05  # of a direction that the other blocks must still measure


def trimmed(U: Tensor, B: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
    """Which blocks of equations contradict all others, and how far each equation is from what those others say.

    Of equations A X = B, `U` [m, r] is an orthonormal basis of A's columns, `B` [m, c], `block` [m] counts the block of
    each row from 0. The worst blocks are left out and predicted by the rest until none stands out. With R = B - U U^T
    B, the equations D that are left out miss their prediction by E_D = (I - U_D U_D^T)^-1 R_D, the rest by R + U U_D^T
    E_D: no system is solved again. Returns whether a block is left out [blocks], and E [m, c]: with B - E in place of B
    in the rows that are left out, U^T B gives the least-squares solution of the rest. None is left out where the rest
    would not do.

    >>> U = torch.linalg.qr(torch.randn(12, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    >>> B = U @ torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    >>> B[3] += 1.0
    >>> out, E = trimmed(U, B, torch.arange(12) // 2)
    >>> out.nonzero().flatten().tolist(), [round(e, 9) for e in E[:, 0].abs().tolist()][2:5]
    ([1], [0.0, 1.0, 0.0])
    """
    R = E = B - U @ (U.T @ B)
    free = (1 - U.square().sum(1)).clamp_min(LEAST_HOLD)  # share of its error that an equation shows
    rows = torch.zeros(int(block[-1]) + 1).to(U).index_add(0, block, free)
    none = torch.zeros(len(rows), dtype=torch.bool, device=B.device)
    out, floor = none, torch.finfo(B.dtype).eps * float(B.norm())
    while True:
        miss = torch.zeros_like(rows).index_add(0, block, E.square().sum(1)).div(rows).sqrt()
        bar = STANDS_OUT * float(miss[~out].median()) + floor
        worst = float(miss[~out].max())
        if not worst > bar:
            return out, E
        out = out | (miss > max(bar, SHARE * worst))
        if bool(out.sum() * 2 > len(out)):
            return none, R
        D = out[block]
        values, turn = torch.linalg.eigh(torch.eye(int(D.sum())).to(U) - U[D] @ U[D].T)
        if not float(values[0]) > LEAST_HOLD:
            return none, R
        missed = turn @ ((turn.T @ R[D]) / values[:, None])
        E = R + U @ (U[D].T @ missed)
        E[D] = missed
