"""Factors by Gram matrices against singular values: the same rank, solution and bases, where they tell it."""

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from unbatch.numerics.linear.factored import eigenvalue_rounding, regular, tall, wide
from unbatch.numerics.linear.pivoted import orthonormal, pivoted


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of_rank(p: int, q: int, rank: int, seed: int) -> Tensor:
    return drawn(p, rank, seed=seed) @ drawn(rank, q, seed=seed + 1)


@hypothesis_settings(deadline=None, max_examples=60)
@given(p=st.integers(2, 60), q=st.integers(2, 60), lost=st.integers(0, 40), seed=st.integers(0, 10**6))
def test_rank_solution_and_bases_are_those_of_the_singular_values(p: int, q: int, lost: int, seed: int) -> None:
    rank = max(1, min(p, q) - lost)
    A, b = of_rank(p, q, rank, seed), drawn(p, seed=seed + 2)
    S = torch.linalg.svdvals(A)
    if S[0] > 1e3 * S[rank - 1]:
        return  # nearly of lower rank: neither tells
    found = tall(A.T @ A, lambda v: v @ A.T, lambda u: u @ A) if q <= p else wide(A)
    inverse, r, bases = found
    pinv = torch.linalg.pinv(A, rtol=1e-9)
    assert r == rank
    scale = float(pinv.norm() * b.norm())
    x = inverse(b)
    x = x + inverse(b - A @ x)  # as it is refined where it is used
    torch.testing.assert_close(x, pinv @ b, rtol=0, atol=1e-9 * scale)
    rows, null = bases()
    if rows is not None:
        torch.testing.assert_close(rows.T @ rows, pinv @ A, rtol=0, atol=1e-8)
        torch.testing.assert_close(rows @ rows.T, torch.eye(rank).to(rows), rtol=0, atol=1e-11)
    if null is not None:
        assert len(null) == q - rank
        assert float((A @ null.T).norm()) < 1e-10 * float(A.norm())
    assert (rows is None and null is None) == (rank == q and q <= p)


def test_a_pivot_near_the_floor_leaves_the_rank_open() -> None:
    U = torch.linalg.qr(drawn(30, 30)).Q
    values = torch.ones(30, dtype=torch.float64)
    values[-1] = 1e-13
    floor = 100 * 30 * torch.finfo(torch.float64).eps  # what rounding leaves of a pivot that is 0 is far below
    assert pivoted((U * values) @ U.T, floor) is None
    values[-1] = 0
    assert pivoted((U * values) @ U.T, floor).rank == 29
    values[-1] = 1e-6
    assert pivoted((U * values) @ U.T, floor).rank == 30


def test_a_matrix_that_its_gram_matrix_does_not_show_to_be_regular_is_left_to_the_singular_values() -> None:
    A = of_rank(20, 30, 19, 0)
    assert regular(A) is None
    assert regular(A.T) is None
    assert regular(A[:15])[1] == 15
    assert regular(A.T[:, :15])[1] == 15


def test_coordinates_are_least_squares_over_dependent_rows() -> None:
    A = of_rank(12, 20, 7, 3)
    found = pivoted(A @ A.T, 1e3 * eigenvalue_rounding(A @ A.T))  # clear of what rounding leaves of a pivot that is 0
    b = drawn(12, 1, seed=4)
    C = torch.zeros(12, 7, dtype=torch.float64)
    C[found.first], C[found.others] = torch.eye(7).double(), found.rest
    torch.testing.assert_close(found.coordinates(b), torch.linalg.lstsq(C, b).solution, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(C @ A[found.first], A, rtol=0, atol=1e-9)


@pytest.mark.parametrize("spread", [1.0, 1e4])
def test_rows_are_made_orthonormal_to_rounding(spread: float) -> None:
    rows = drawn(20, 50) * torch.logspace(0, -1, 20, dtype=torch.float64)[:, None]
    rows[1] = rows[0] + rows[1] / spread
    Q = orthonormal(rows, torch.linalg.cholesky(rows @ rows.T))
    torch.testing.assert_close(Q @ Q.T, torch.eye(20).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close((rows @ Q.T) @ Q, rows, rtol=0, atol=1e-7)
