"""Null space: the directions in which a large matrix of squares is nothing, without all of its eigenvectors."""

from __future__ import annotations

import torch
from torch import Tensor

ITERATIONS = 3  # each takes what lies outside down by floor over the next eigenvalue
SPARE = 8  # directions more than are looked for, so that it shows when there are others
MOST_SHARE = 0.25  # of the dimension, above which all eigenvectors are cheaper


def null_space(squares: Tensor, floor: float, *, most: int | None = None) -> Tensor:
    """The eigenvectors with eigenvalues below `floor` of a symmetric matrix without negative ones, as rows [m, d].

    Inverse iteration on a block of directions, by one factorisation of squares + floor I, costs d^3 / 3 in place of some
    10 d^3. `squares` [d, d]; `most` are looked for: where there are more, some `most` + SPARE of them come back. Without
    it all eigenvectors are computed.

    Source: Parlett, The Symmetric Eigenvalue Problem, SIAM 1998, chapters 4 and 14.

    >>> half = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 2.0]], dtype=torch.float64)
    >>> null_space(half.T @ half, 1e-10, most=1).abs()
    tensor([[0.7071, 0.7071, 0.0000]], dtype=torch.float64)
    """
    d = len(squares)
    block = d if most is None else most + SPARE
    if block > MOST_SHARE * d:
        values, vectors = torch.linalg.eigh(squares)
        found: Tensor = vectors[:, values < floor].T
        return found
    shifted = squares.clone()
    shifted.diagonal().add_(floor)
    root = torch.linalg.cholesky(shifted)
    Q = torch.randn(d, block, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(squares)
    for _ in range(ITERATIONS):
        Q = torch.linalg.qr(torch.cholesky_solve(Q, root)).Q
    values, turn = torch.linalg.eigh(Q.T @ squares @ Q)
    inside: Tensor = Q @ turn[:, values < floor]
    return inside.T
