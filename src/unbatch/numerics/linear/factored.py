"""Factored: the pseudo-inverse of a large matrix and what it leaves open, by the smaller of its Gram matrices.

In float64; what lies below sqrt(2 s eps) of the largest singular value counts as 0, s the Gram matrix's side.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from unbatch.numerics.callables import Apply
from unbatch.numerics.linear.pivoted import Pivoted, orthonormal, pivoted

Bases = tuple[Tensor | None, Tensor | None]  # orthonormal, of A's rows and of its null space
Factored = tuple[
    Apply, int, Callable[[], Bases]
]  # b [equations] -> x of least norm, the rank, the smaller of the bases


def whole() -> Bases:
    """The bases of a matrix of full column rank, of which none is needed.

    Of full column rank: neither is of use.

    >>> whole()
    (None, None)
    """
    return None, None


def above(gram: Tensor, floor: float | None = None) -> bool:
    """Whether a Gram matrix is certainly of full rank.

    Whether every eigenvalue of A^T A [s, s] lies above rounding, 2 s eps of the largest.

    >>> above(torch.eye(2).double()), above(torch.ones(2, 2).double())
    (True, False)
    """
    floor = eigenvalue_rounding(gram) if floor is None else floor
    return bool(torch.linalg.cholesky_ex(gram - floor * torch.eye(len(gram)).to(gram)).info == 0)


def eigenvalue_rounding(gram: Tensor) -> float:
    """The size of an eigenvalue of a Gram matrix that rounding alone can make.

    2 s eps of the largest eigenvalue of A^T A [s, s].

    >>> f"{eigenvalue_rounding(torch.eye(3).double()):.2e}"
    '1.33e-15'
    """
    v = torch.nn.functional.normalize(gram @ gram.sum(1), dim=0)
    for _ in range(20):  # the largest, from below to within a hundredth or so
        v = torch.nn.functional.normalize(gram @ v, dim=0)
    return float(2 * len(gram) * torch.finfo(gram.dtype).eps * (v @ gram @ v))


def regular(A: Tensor) -> Factored | None:
    """The pseudo-inverse of a matrix that is plainly of full rank.

    Of a matrix of full rank, by Cholesky's decomposition; None where its Gram matrix does not tell that it is.

    >>> inverse, rank, bases = regular(torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 1.0]]).double())
    >>> inverse(torch.tensor([2.0, 3.0, 3.0]).double()).round(decimals=6), rank
    (tensor([1., 3.], dtype=torch.float64), 2)
    """
    p, q = A.shape
    gram = A.T @ A if q <= p else A @ A.T
    if not above(gram):
        return None
    return tall(gram, lambda v: v @ A.T, lambda u: u @ A) if q <= p else wide(A, gram)


def tall(gram: Tensor, push: Apply, pull: Apply) -> Factored:
    """The pseudo-inverse of a matrix of no fewer rows than columns, by its Gram matrix.

    By A^T A [q, q], of no fewer equations than unknowns; `push` and `pull` are products with A and A^T, on rows.

    >>> A = torch.tensor([[1.0, 1.0], [1.0, 1.0], [0.0, 0.0]]).double()
    >>> inverse, rank, bases = tall(A.T @ A, lambda v: v @ A.T, lambda u: u @ A)
    >>> rank
    1
    >>> inverse(torch.tensor([2.0, 2.0, 0.0]).double()).round(decimals=6)
    tensor([1., 1.], dtype=torch.float64)
    """
    floor, q = eigenvalue_rounding(gram), len(gram)
    if above(gram, floor):
        root = torch.linalg.cholesky(gram)
        return lambda b: torch.cholesky_solve(pull(b[None]).T, root)[:, 0], q, whole
    if (found := pivoted(gram, floor)) is not None:
        return _sparing(found, push, pull)
    values, vectors = torch.linalg.eigh(gram)
    kept = values > 2 * q * torch.finfo(gram.dtype).eps * values[-1]
    values, others, V = values[kept], vectors[:, ~kept], vectors[:, kept]

    def inverse(b: Tensor) -> Tensor:
        x: Tensor = V @ ((pull(b[None])[0] @ V) / values)
        return x

    def bases() -> Bases:
        if others.shape[1] >= len(values):
            return torch.linalg.qr(V).Q.T, None
        if not others.shape[1]:
            return whole()
        seen = pull(push(others.T)) @ V  # eigenvectors are as exact as A^T A: one step to A's own null space
        return None, torch.linalg.qr(others - V @ (seen / values).T).Q.T

    return inverse, len(values), bases


def wide(A: Tensor, gram: Tensor | None = None) -> Factored:
    """The pseudo-inverse of a matrix of fewer rows than columns that is held.

    By A A^T, of fewer equations than unknowns; a matrix A [p, q] that is held.

    >>> inverse, rank, bases = wide(torch.tensor([[1.0, 1.0, 0.0]]).double())
    >>> inverse(torch.tensor([2.0]).double()).round(decimals=6), rank
    (tensor([1., 1., 0.], dtype=torch.float64), 1)
    """
    gram = A @ A.T if gram is None else gram
    if (found := pivoted(gram, eigenvalue_rounding(gram))) is None:
        return broad(gram, lambda u: u @ A)
    rows = A[found.first]

    @cache
    def bases() -> Bases:
        return orthonormal(rows, found.root), None

    return lambda b: rows.T @ found.solve(found.coordinates(b[:, None]))[:, 0], found.rank, bases


def broad(gram: Tensor, pull: Apply) -> Factored:
    """The pseudo-inverse of a matrix of fewer rows than columns that is known by its products.

    By A A^T and products with A^T, on rows.

    >>> A = torch.tensor([[1.0, 1.0, 0.0]]).double()
    >>> inverse, rank, bases = broad(A @ A.T, lambda u: u @ A)
    >>> inverse(torch.tensor([2.0]).double()).round(decimals=6), rank
    (tensor([1., 1., 0.], dtype=torch.float64), 1)
    """
    values, vectors = torch.linalg.eigh(gram)
    kept = values > 2 * len(gram) * torch.finfo(gram.dtype).eps * values[-1]
    values, vectors = values[kept], vectors[:, kept]
    V = pull(vectors.T).T / values.sqrt()

    def inverse(b: Tensor) -> Tensor:
        x: Tensor = V @ ((pull(b[None])[0] @ V) / values)
        return x

    return inverse, len(values), lambda: (None if len(values) == len(V) else torch.linalg.qr(V).Q.T, None)


def _sparing(found: Pivoted, push: Apply, pull: Apply) -> Factored:
    """`tall` by some columns of A that span its range: x = 0 elsewhere solves it, and less its free part least so."""
    r, first, others = found.rank, found.first, found.others
    q = r + len(others)

    def basic(y: Tensor) -> Tensor:
        """x [k, q] on the first columns with A^T A x = y [k, q] there."""
        return y.new_zeros(len(y), q).index_copy_(1, first, found.solve(y[:, first].T).T)

    @cache
    def bases() -> Bases:
        if len(others) >= r:
            root = torch.cat([found.root, found.rest @ found.root])[torch.argsort(torch.cat([first, others]))]
            return torch.linalg.qr(root).Q.T, None
        null = found.root.new_zeros(len(others), q)
        null[:, first] = -found.rest
        null[:, others] = torch.eye(len(others)).to(null)
        null = null - basic(pull(push(null)))  # to A's own null space, beyond that of A^T A
        return None, torch.linalg.qr(null.T).Q.T

    def inverse(b: Tensor) -> Tensor:
        x, (rows, null) = basic(pull(b[None])), bases()
        if null is not None:
            x = x - (x @ null.T) @ null
        return x[0] if rows is None else ((x @ rows.T) @ rows)[0]

    return inverse, r, bases
