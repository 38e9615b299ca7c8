"""Completion: a matrix of low rank from some of its entries."""

from __future__ import annotations

import torch
from torch import Tensor

from unbatch.numerics.callables import Tick

RIDGE = 1e-10  # of the mean squared factor: what no entry tells stays small


def complete(
    A: Tensor,
    seen: Tensor,
    rank: int,
    *,
    steps: int = 500,
    target: float = 0.0,
    tick: Tick = lambda share: True,
) -> tuple[Tensor, float]:
    """A matrix of low rank filled in where its entries are missing.

    The matrix [p, q] of that rank nearest to A on the entries `seen` [p, q], and the relative misfit there.

    Alternating least squares from the leading singular vectors of A with zeros for what is not seen, extrapolated while
    that helps. Ends at a misfit of `target`, or where steps take away less than a thousandth.
    Source: Hastie, Mazumder, Lee, Zadeh, JMLR 2015; Koren, Bell, Volinsky, Computer 2009.

    >>> A = torch.outer(torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([1.0, 1.0, 2.0]).double())
    >>> seen = torch.ones(3, 3).bool()
    >>> seen[2, 2] = False
    >>> filled, misfit = complete(A, seen, 1, target=1e-12)
    >>> round(float(filled[2, 2]), 6)
    6.0
    """
    M = seen.to(A.dtype)
    held = A * M
    size = float(held.norm())
    if not size:
        return torch.zeros_like(A), 0.0
    S, Vh = torch.linalg.svd(held, full_matrices=False)[1:]
    R = S[:rank].sqrt()[:, None] * Vh[:rank]
    before, reach, misfit = R, 0.0, torch.inf
    L = _solved(held, M, R)
    for step in range(steps):
        tried = R + reach * (R - before)
        left = _solved(held, M, tried)
        right = _solved(held.T, M.T, left.T).T
        new = float(((left @ right - A) * M).norm()) / size
        if new >= misfit and reach:
            reach = 0.0
            continue
        before, R, L = R, right, left
        done = new <= target or new > (1 - 1e-3) * misfit
        reach, misfit = min(2 * reach + 0.25, 8.0), new
        if done or not tick(step / steps):
            break
    return L @ R, misfit


def _solved(held: Tensor, M: Tensor, R: Tensor) -> Tensor:
    """L [p, r] of least |M (L R - A)|^2, row by row, R [r, q]."""
    r = len(R)
    gram = (M @ (R[:, None] * R[None]).reshape(r * r, -1).T).view(-1, r, r)
    gram.diagonal(dim1=1, dim2=2).add_(RIDGE * float(R.square().mean()) + 1e-300)
    found: Tensor = torch.linalg.solve(gram, (held @ R.T)[..., None])[..., 0]
    return found
