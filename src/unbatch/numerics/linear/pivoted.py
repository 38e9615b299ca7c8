"""Pivoted: the rank of a Gram matrix and its factor, by Cholesky's decomposition with pivoting."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# Times the floor above which the least pivot lies, and below which the next does, where the rank is sure.
PIVOT_GAP = 100.0


@dataclass(frozen=True)
class Pivoted:
    """The factor of a Gram matrix by its independent rows.

    G [s, s] = B B^T of rank r, B [s, r]; with `first` (r independent rows), B[first] is lower triangular.

    An eigenvalue decomposition takes some twenty times as long. As any factor of a Gram matrix A A^T it is as exact as A's
    condition number squared times the rounding allows. Source: Higham, Accuracy and Stability of Numerical Algorithms,
    2002, ch. 10.3; LAPACK's dpstrf.

    >>> found = pivoted(torch.tensor([[2.0, 2.0], [2.0, 2.0]]).double(), 1e-12)
    >>> found.rank, found.first.tolist(), found.rest.round(decimals=6).tolist()
    (1, [0], [[1.0]])
    """

    root: Tensor  # [r, r] lower triangular
    rest: Tensor  # [s - r, r]: C, G[others] = C G[first] for the rows that depend on the first
    first: Tensor  # [r] numbers of rows
    others: Tensor  # [s - r]

    @property
    def rank(self) -> int:
        """How many rows are independent."""
        return len(self.first)

    def solve(self, y: Tensor) -> Tensor:
        """G[first, first]^-1 y [r, k]."""
        return torch.cholesky_solve(y, self.root)

    def coordinates(self, b: Tensor) -> Tensor:
        """argmin over c [r, k] of |[1; C] c - b|, b [s, k]: the right side of the first rows that fits all of them best."""
        c = b[self.first] + self.rest.T @ b[self.others]
        if not len(self.others):
            return c
        found: Tensor = c - self.rest.T @ torch.cholesky_solve(
            self.rest @ c, self._excess
        )  # (1 + C^T C)^-1 by Woodbury
        return found

    @cached_property
    def _excess(self) -> Tensor:
        eye = torch.eye(len(self.rest), dtype=self.rest.dtype, device=self.rest.device)
        root: Tensor = torch.linalg.cholesky(eye + self.rest @ self.rest.T)
        return root


def pivoted(gram: Tensor, floor: float) -> Pivoted | None:
    """The rank and the factor of a Gram matrix, some twenty times as fast as by its eigenvalues.

    The factor of a symmetric positive semidefinite G [s, s], pivots below `floor` being 0; None where any is near it.

    Near: within a factor of 100. On the CPU in float64.

    >>> pivoted(torch.eye(2).double(), 1e-12).rank
    2
    >>> pivoted(torch.diag(torch.tensor([1.0, 1e-12])).double(), 1e-12) is None  # too near to tell
    True
    """
    from scipy.linalg import lapack

    if gram.is_cuda or gram.dtype != torch.float64 or not floor > 0:
        return None
    packed, pivots, r, _ = lapack.dpstrf(gram.numpy(), tol=floor / PIVOT_GAP, lower=1)
    order, lower = torch.as_tensor(pivots).long() - 1, torch.as_tensor(packed)[:, :r]
    if not r or not float(lower.diagonal().min()) ** 2 > PIVOT_GAP * floor:
        return None
    root = lower[:r].tril().contiguous()
    rest = torch.linalg.solve_triangular(root, lower[r:], upper=False, left=False)
    return Pivoted(root, rest, order[:r], order[r:])


def orthonormal(rows: Tensor, root: Tensor, rounds: int = 3) -> Tensor:
    """An orthonormal basis of given independent rows.

    An orthonormal basis [r, q] of independent rows [r, q], from their own Gram matrix's factor `root` [r, r].

    root^-1 rows, and again with the factor of what that has for a Gram matrix, until it is the identity to rounding: two
    or three times (Fukaya et al., SIAM J. Sci. Comput. 42, 2020), which is less work than Householder's reflections.

    >>> rows = torch.tensor([[3.0, 0.0, 0.0], [1.0, 2.0, 0.0]]).double()
    >>> Q = orthonormal(rows, torch.linalg.cholesky(rows @ rows.T))
    >>> (Q @ Q.T).round(decimals=6)
    tensor([[1., 0.],
            [0., 1.]], dtype=torch.float64)
    """
    Q: Tensor = torch.linalg.solve_triangular(root, rows, upper=False)
    probe = torch.randn(len(Q), 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(Q)
    for _ in range(rounds):
        if float((Q @ (Q.T @ probe) - probe).norm()) < 1e-13 * len(Q) ** 0.5 * float(probe.norm()):
            break
        Q = torch.linalg.solve_triangular(torch.linalg.cholesky(Q @ Q.T), Q, upper=False)
    return Q
