import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unbatch.numerics.span import leading_span, numerical_rank, rank_tolerance, row_space


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
    P = row_space(A)
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
    found, rows = leading_span(A, rng), row_space(A)  # more than 16 makes it look again
    assert found.rows.shape == rows.shape == (n, 150)
    torch.testing.assert_close(found.values, torch.linalg.svdvals(A.double())[:n], rtol=1e-6, atol=0)
    gap = found.rows.T @ found.rows - rows.T @ rows
    assert float(torch.linalg.matrix_norm(gap, 2)) < 10 * found.noise / float(found.values[-1]) + 1e-12


def test_a_known_rank_leads_through_noise() -> None:
    rng = torch.Generator().manual_seed(0)
    signal = torch.randn(80, 3, generator=rng, dtype=torch.float64) @ torch.randn(3, 60, generator=rng).double()
    A = signal + 0.01 * torch.randn(80, 60, generator=rng, dtype=torch.float64)
    found = leading_span(A, rng, rank=3)
    S = torch.linalg.svdvals(A)
    torch.testing.assert_close(found.values, S[:3])
    assert abs(found.noise / float(S[3]) - 1) < 0.05
    assert len(leading_span(A, rng).values) == 60
