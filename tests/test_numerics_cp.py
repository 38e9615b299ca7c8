import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from unbatch.numerics.moments.cp import compress, diagonalise, misfit, refine_factors, response, tangent_misfit


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def family(V: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """V diag(d_q) V^T, written out."""
    return torch.einsum("ai,qi,bi->qab", V, d, V)


def unit(V: torch.Tensor) -> torch.Tensor:
    return V / V.norm(dim=0)


def angles(found: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """|sin| between matched columns."""
    C = (unit(found).T @ unit(true)).abs()
    rows, columns = linear_sum_assignment(-C.numpy())
    return (1 - C[rows, columns].clamp_max(1).square()).sqrt()


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 9), q=st.integers(2, 12))
def test_exact_families_are_diagonalised_exactly(seed: int, n: int, q: int) -> None:
    V, d = draw(n, n, seed=seed) + 2 * torch.eye(n, dtype=torch.float64), draw(max(q, n), n, seed=seed + 1)
    slices = family(V, d)
    E, C = compress(slices, n)
    assert E.shape == (n, n, n)
    torch.testing.assert_close(C @ C.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-8)
    assert float(E.square().sum()) == pytest.approx(float(slices.square().sum()), rel=1e-9)
    assert float(angles(diagonalise(E, rng(seed)), V).max()) < 1e-5


def test_the_slices_of_a_symmetric_tensor() -> None:
    V, weight = draw(5, 5, seed=1), torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0], dtype=torch.float64)
    T = torch.einsum("i,ai,bi,ci->abc", weight, V, V, V)
    assert float(angles(diagonalise(compress(T, 5)[0], rng()), V).max()) < 1e-6


def test_one_contraction_with_clustered_eigenvalues_is_no_obstacle() -> None:
    """In the first slices all ratios are within 1e-6; only the others tell the components apart."""
    V = draw(6, 6, seed=2) + torch.eye(6, dtype=torch.float64)
    d = torch.ones(8, 6, dtype=torch.float64) + 1e-6 * draw(8, 6, seed=3)
    d[6:] = draw(2, 6, seed=4)
    assert float(angles(diagonalise(compress(family(V, d), 6)[0], rng()), V).max()) < 1e-6


def test_parallel_components_are_not_told_apart_and_the_others_are() -> None:
    V, d = draw(4, 4, seed=5), draw(6, 4, seed=6)
    d[:, 3] = 2 * d[:, 2]
    found = diagonalise(compress(family(V, d), 4)[0], rng())
    C = (unit(found).T @ unit(V)).abs()
    assert bool((C[:, :2].max(0).values > 1 - 1e-6).all())
    assert bool(found.isfinite().all())


def test_noise_costs_what_the_response_says() -> None:
    """The predicted change of V is the actual one up to second order, also where V is ill-conditioned."""
    for seed in (0, 1, 2):
        V, d = unit(draw(5, 5, seed=seed) + 2 * torch.eye(5, dtype=torch.float64)), draw(5, 5, seed=seed + 50)
        E, noise = family(V, d), draw(3, 5, 5, 5, seed=seed + 100)
        noise = noise + noise.mT
        for size, limit in ((1e-5, 0.05), (1e-6, 0.005)):
            for one, dE in zip(response(E, V, size * noise), size * noise, strict=True):
                moved = refine_factors(E + dE, V)
                assert float((moved - unit(V + one)).norm()) < limit * float((moved - V).norm())


def test_what_the_response_leaves_of_noise() -> None:
    """Noise of unit variance leaves as much as there are entries beyond the parameters; a change of V or d nothing."""
    n = 6
    V, d = unit(draw(n, n, seed=1)), draw(n, n, seed=2)
    E = family(V, d)
    step = 1e-6
    along = (family(unit(V + step * draw(n, n, seed=3)), d + step * draw(n, n, seed=4)) - E) / step
    assert tangent_misfit(E, V, along) < 1e-6 * float(along.square().sum())
    left = []
    for seed in range(40):
        noise = draw(n, n, n, seed=seed + 10)
        noise = torch.tril(noise) + torch.tril(noise, -1).mT  # each distinct entry has variance one
        noise = torch.where(torch.eye(n, dtype=torch.bool), noise, noise / 2**0.5)
        left.append(tangent_misfit(E, V, noise))
    free = n * n * (n + 1) / 2 - n * n - n * (n - 1)
    assert sum(left) / len(left) == pytest.approx(free, rel=0.1)


def test_as_good_as_alternating_least_squares() -> None:
    """Against tensorly's CP from the true factors: a misfit within what its second free factor gains, no larger error."""
    from tensorly.decomposition import parafac

    ours, theirs = [], []
    for seed in range(8):
        V, d = unit(draw(5, 5, seed=seed) + 2 * torch.eye(5, dtype=torch.float64)), draw(5, 5, seed=seed + 50)
        noise = 0.005 * draw(5, 5, 5, seed=seed + 100)
        E = family(V, d) + (noise + noise.mT) / 2
        found = diagonalise(E, rng(seed))
        start = (np.ones(5), [d.numpy().copy(), V.numpy().copy(), V.numpy().copy()])
        _, (D, A, B) = parafac(E.numpy(), 5, init=start, n_iter_max=500, tol=1e-10)
        left = float(np.square(E.numpy() - np.einsum("qi,ai,bi->qab", D, A, B)).sum())
        assert misfit(E, found) < 1.5 * left
        ours.append(float(angles(found, V).max()))
        theirs.append(float(angles(torch.as_tensor(A), V).max()))
    assert np.mean(ours) <= 1.05 * np.mean(theirs)


def test_the_misfit_is_what_no_diagonal_explains() -> None:
    V, d = draw(4, 4, seed=1), draw(4, 4, seed=2)
    E = family(V, d)
    assert misfit(E, V) < 1e-18
    noise = draw(4, 4, 4, seed=3)
    K = (V[:, None, :] * V[None]).flatten(0, 1)
    explained = torch.linalg.lstsq(K, noise.flatten(1).T).solution
    expected = float((noise.flatten(1).T - K @ explained).square().sum())
    assert misfit(E + noise, V) == pytest.approx(expected, rel=1e-9)
