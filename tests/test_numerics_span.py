import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unbatch.numerics.linear.span import leading_span, numerical_rank, rank_tolerance, rounding_noise


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 20),
    m=st.integers(25, 80),
    d=st.integers(25, 400),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_the_rank_of_a_gradient_is_the_number_of_examples(seed, n, m, d, dtype) -> None:
    rng = torch.Generator().manual_seed(seed)
    delta, x = torch.randn(m, n, generator=rng, dtype=dtype), torch.rand(n, d, generator=rng, dtype=dtype)
    A = delta @ x
    assert numerical_rank(A) == n
    P = leading_span(A, rng).rows
    assert P.shape == (n, d)
    gap = (x.double() - x.double() @ P.T @ P).norm() / x.norm()
    assert gap < 1e4 * torch.finfo(dtype).eps
    torch.testing.assert_close(P @ P.T, torch.eye(n, dtype=torch.float64))


def test_noise_has_full_rank_and_zero_has_none() -> None:
    A = torch.randn(30, 50, generator=torch.Generator().manual_seed(0))
    assert numerical_rank(A) == 30
    assert numerical_rank(torch.zeros(4, 5)) == 0


@pytest.mark.parametrize("shape", [(30, 3000), (300, 300)])
def test_the_tolerance_is_above_what_rounding_alone_gives(shape) -> None:
    A = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rounding = A.float().double() - A
    eps = torch.finfo(torch.float32).eps
    largest = float(torch.linalg.matrix_norm(rounding, 2))
    assert largest < rank_tolerance(A, eps) < 200 * largest


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 40), dtype=st.sampled_from([torch.float64, torch.float32]))
def test_the_randomised_span_is_that_of_the_svd(seed, n, dtype) -> None:
    rng = torch.Generator().manual_seed(seed)
    A = torch.randn(90, n, generator=rng, dtype=dtype) @ torch.rand(n, 150, generator=rng, dtype=dtype)
    found, rows = leading_span(A, rng), torch.linalg.svd(A.double())[2][:n]  # more than 16 makes it look again
    assert found.rows.shape == rows.shape == (n, 150)
    torch.testing.assert_close(found.values, torch.linalg.svdvals(A.double())[:n], rtol=1e-6, atol=0)
    gap = found.rows.T @ found.rows - rows.T @ rows
    assert float(torch.linalg.matrix_norm(gap, 2)) < 10 * found.noise / float(found.values[-1]) + 1e-12


@pytest.mark.parametrize("spread", [1.0, 1e3, 1e6])
def test_columns_are_orthonormal_however_unequal_the_values(spread) -> None:
    """What is built on I - U U^T is wrong by as much as U is not orthonormal: A rows^T / values is, by eps spread^2."""
    rng = torch.Generator().manual_seed(1)
    values = torch.logspace(0, -math.log10(spread), 5, dtype=torch.float64)
    left, right = (torch.linalg.qr(torch.randn(p, 5, generator=rng, dtype=torch.float64)).Q for p in (80, 60))
    A = (left * values) @ right.T
    found = leading_span(A, rng)
    for basis in (found.columns.T, found.rows):
        torch.testing.assert_close(basis @ basis.T, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-14)
    left = A @ found.rows.T - found.columns * found.values
    assert float(left.norm()) <= 2 * found.arithmetic + 1e-15 < 1e-13
    torch.testing.assert_close(found.values, values, rtol=1e-15 * spread * 100, atol=0)


def test_a_known_rank_leads_through_noise() -> None:
    rng = torch.Generator().manual_seed(0)
    signal = torch.randn(80, 3, generator=rng, dtype=torch.float64) @ torch.randn(3, 60, generator=rng).double()
    A = signal + 0.01 * torch.randn(80, 60, generator=rng, dtype=torch.float64)
    found = leading_span(A, rng, rank=3)
    S = torch.linalg.svdvals(A)
    torch.testing.assert_close(found.values, S[:3])
    assert abs(found.noise / float(S[3]) - 1) < 0.05
    assert len(leading_span(A, rng).values) == 60


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [2, 9])
def test_half_precision_keeps_the_rank(dtype, n) -> None:
    """A finished gradient is rounded once; the size of its entries is that of a batch mean."""
    rng = torch.Generator().manual_seed(n)
    delta = 1e-3 * torch.randn(200, n, generator=rng, dtype=torch.float64)
    A = (delta @ torch.randn(n, 300, generator=rng, dtype=torch.float64)).to(dtype)
    found = leading_span(A, rng, noise=rounding_noise(dtype))
    assert len(found.values) == n
    rest = torch.linalg.svdvals(A.double())[n]
    assert 0.9 * rest < found.noise < 100 * rest


def test_small_float16_entries_lose_more_than_their_last_bit() -> None:
    A = 1e-6 * torch.randn(100, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spread = float((A.half().double() - A).std())
    assert 0.8 < spread / rounding_noise(torch.float16) < 1.25
    assert rounding_noise(torch.bfloat16) < 1e-39


def test_noise_that_is_known_is_not_rank() -> None:
    rng = torch.Generator().manual_seed(0)
    signal = torch.randn(80, 3, generator=rng, dtype=torch.float64) @ torch.randn(3, 60, generator=rng).double()
    A = signal + 0.01 * torch.randn(80, 60, generator=rng, dtype=torch.float64)
    assert len(leading_span(A, rng, noise=0.01).values) == 3


@pytest.mark.slow
def test_a_large_photograph() -> None:
    rng = torch.Generator().manual_seed(0)
    delta, x = torch.randn(64, 8, generator=rng), torch.rand(8, 3 * 224 * 224, generator=rng)
    found = leading_span(delta @ x, rng)
    assert found.rows.shape == (8, 150_528)
    assert float((x.double() - x.double() @ found.rows.T @ found.rows).norm() / x.norm()) < 1e-5
