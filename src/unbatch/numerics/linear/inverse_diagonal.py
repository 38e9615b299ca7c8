"""Inverse diagonal: the variance of every entry, diag A^-1, of an information matrix that is held or known by products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from unbatch.numerics.callables import Apply, Tick
from unbatch.numerics.search.least_squares import conjugate_gradients

NULL_TOLERANCE = 1e-10  # relative residual, at which what A does not determine stands out
FLAT_SHARE = 1e-16  # of A's mean eigenvalue: less is no slow convergence, but nothing
MOVED_SHARE = 1e-6  # of a random direction's size: what is left in an entry that A determines
PROBE_TOLERANCE = 1e-4  # relative residual of a probe
FACTOR_ERROR = 1e-4  # relative error of a factored matrix
FEWEST_PROBES = 2  # that have a spread: fewer are not stopped at


@dataclass(frozen=True)
class InverseDiagonal:
    """What is known of the diagonal of an inverse.

    diag A^-1 [n, d], infinite in entries that A's null space moves, the standard error of each, and what it is worth.

    `lost` is the dimension of the null space (about, where it was probed), `open` the share of a random direction that
    conjugate gradients left: what they hide there only makes the true diagonal larger. `total` is the sum over entries that
    are determined, from below but for the sampling of the probes, whose standard error is `spread`.

    >>> InverseDiagonal(torch.ones(1, 2), torch.zeros(1, 2), total=2.0).lost
    0
    """

    diagonal: Tensor
    error: Tensor
    lost: int = 0
    open: float = 0.0
    total: float = 0.0
    spread: float = 0.0
    probes: int = 0  # random ones that it was estimated from


def dense_inverse_diagonal(A: Tensor, push: Callable[[Tensor], Tensor]) -> InverseDiagonal:
    """The diagonal of the inverse of a matrix that is held; infinite where nothing determines an entry.

    Of A = J^T J [p, p], J v by `push`; without error but for rounding.

    By Cholesky's factors where rounding, times the condition number (at most tr A tr A^-1), stays below FACTOR_ERROR. Else
    by eigenvectors: those of A below its own rounding are told apart by J itself, whose rounding is that of a square root.

    >>> J = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.5, 0.0]]).double()
    >>> dense_inverse_diagonal(J.T @ J, lambda v: J @ v).diagonal
    tensor([1., 4., inf], dtype=torch.float64)
    """
    eps, p = torch.finfo(A.dtype).eps, len(A)
    factor, info = torch.linalg.cholesky_ex(A)
    if not int(info):
        diagonal = torch.cholesky_inverse(factor).diagonal()
        if float(A.diagonal().sum() * diagonal.sum()) * eps < FACTOR_ERROR:
            return InverseDiagonal(diagonal, torch.zeros_like(diagonal), total=float(diagonal.sum()))
    values, V = torch.linalg.eigh(A)
    weak = values <= p * eps * values[-1]
    if weak.any():
        image = torch.stack([push(v) for v in V[:, weak].T], 1)
        square = torch.nn.functional.pad(image, (0, 0, 0, max(0, image.shape[1] - len(image))))
        _, s, W = torch.linalg.svd(square, full_matrices=False)
        values[weak], V[:, weak] = s.square(), V[:, weak] @ W.T
    lost = values <= (10 * p * eps) ** 2 * values.max()
    inverse = (V[:, ~lost].square() / values[~lost]).sum(1)
    moved = V[:, lost].square().sum(1) > eps
    total = float(inverse[~moved].sum())
    return InverseDiagonal(
        torch.where(moved, torch.inf, inverse), torch.zeros_like(inverse), int(lost.sum()), total=total
    )


def inverse_diagonal(
    apply: Apply,
    like: Tensor,  # [n, d]
    rng: torch.Generator,
    *,
    probes: int,
    precondition: Apply = lambda v: v,
    start: Tensor | None = None,
    steps: int = 60,
    tick: Tick = lambda share: True,
) -> InverseDiagonal:
    """The diagonal of the inverse of a positive semidefinite matrix A too large to hold, by random probes.

    First one random direction g is given back, A w = A g: what g - w keeps and A does not see is A's null space, and the
    entries that it moves are infinite. Then for random signs v on the other entries diag A^-1 = E v * A^-1 v (Bekas,
    Kokiopoulou and Saad), A^-1 v by conjugate gradients, and the sum of each v * w is no larger than v . A^-1 v (Gauss
    quadrature). If `precondition` is an inverse A0^-1 whose diagonal `start` [n, d] is known,
    diag A0^-1 + v * (A^-1 - A0^-1) v has the same mean; of the two the one that spreads less is taken.

    Source: Hutchinson, Comm. Stat. 1990; Bekas, Kokiopoulou and Saad, Appl. Numer. Math. 57, 2007.

    >>> scale = torch.tensor([[1.0, 2.0, 4.0]]).double()
    >>> inverse_diagonal(lambda v: scale * v, scale, torch.Generator().manual_seed(0), probes=2).diagonal
    tensor([[1.0000, 0.5000, 0.2500]], dtype=torch.float64)
    """

    def solve(b: Tensor, tolerance: float, steps: int) -> Tensor:
        *_, w = torch.zeros_like(b), *conjugate_gradients(apply, b, precondition, steps, tolerance)
        return w

    g = torch.randn(like.shape, generator=rng, dtype=torch.float64).to(like)
    image = apply(g)
    left = g - solve(image, NULL_TOLERANCE, 2 * steps)
    if float(left.norm()) > MOVED_SHARE * float(g.norm()):
        left = left - solve(
            apply(left), NULL_TOLERANCE, steps
        )  # once more, for the digits that the first solution rounds off
    mean, size = float((g * image).sum() / g.square().sum()), float(left.norm() / g.norm())
    unseen = float((left * apply(left)).sum()) <= FLAT_SHARE * mean * float(left.square().sum())
    moved = (left.abs() > MOVED_SHARE) & unseen
    lost = max(1, round(float((g * left).sum()))) if moved.any() else 0
    kept = (~moved).to(like)
    plain, less = [], []
    for k in range(probes if lost < like.numel() and kept.any() else 0):
        if k >= FEWEST_PROBES and not tick(k / probes):
            break
        v = kept * (2.0 * torch.randint(2, like.shape, generator=rng) - 1).to(like)
        w = solve(v, PROBE_TOLERANCE, steps)
        plain.append(v * w)
        less.append(v * (w - precondition(v)) + (torch.zeros_like(v) if start is None else start * kept))
    if not plain:
        return InverseDiagonal(torch.full_like(like, torch.inf), torch.zeros_like(like), lost)
    each, other = torch.stack(plain), torch.stack(less)
    if start is not None and not lost and other.var(0).sum() < each.var(0).sum():
        each = other
    sums = each.flatten(1).sum(1)
    return InverseDiagonal(
        torch.where(moved, torch.inf, each.mean(0)),
        each.std(0) / len(each) ** 0.5,
        lost,
        0.0 if unseen else size if size > MOVED_SHARE else 0.0,
        float(sums.mean()),
        float(sums.std() / len(each) ** 0.5),
        len(each),
    )
