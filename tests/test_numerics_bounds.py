"""The mathematics of lower bounds: traces of inverses, rate distortion, and noisy sums, against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm
from torch import Tensor

from unbatch.numerics.bounds.prior import GaussianPrior
from unbatch.numerics.bounds.rate_distortion import distortion, guessing_radius, level
from unbatch.numerics.bounds.subsampled_gaussian import Robustness, information, replacement_divergence
from unbatch.numerics.linear.inverse_diagonal import InverseDiagonal, dense_inverse_diagonal, inverse_diagonal
from unbatch.numerics.linear.inverse_trace import dense_inverse_trace, dense_water_trace, inverse_trace, kronecker


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(7,), (1, 4, 5), (3, 4, 4), (2, 3, 3)])
def test_the_prior_s_products_are_transposes_and_its_draws_have_its_covariance(shape: tuple[int, ...]) -> None:
    prior = GaussianPrior(shape, (-1.0, 3.0))
    R = prior.push(torch.eye(prior.d).double()).T
    assert torch.allclose(prior.pull(torch.eye(prior.d).double()), R)
    assert torch.allclose(R.T @ R, torch.diag(prior.variances))
    assert float(prior.variances.mean()) == pytest.approx(1.0)  # a quarter of the range of 4, squared
    x = prior.draw(40000, torch.Generator().manual_seed(0)).flatten(1)
    assert float((x.mean(0) - 1).abs().max()) < 0.05
    assert torch.allclose(torch.cov(x.T), R @ R.T, atol=0.07)


def test_probes_agree_with_the_dense_trace_within_their_error() -> None:
    n, d = 3, 20
    J = normal(200, n * d) * torch.linspace(0.3, 3, n * d)
    A, off = J.T @ J, []
    dense, _, _ = dense_inverse_trace([[A]], torch.ones(n * d).double())
    assert dense == pytest.approx(float(torch.linalg.inv(A).trace()))
    for seed in range(20):
        rng = torch.Generator().manual_seed(seed)
        found = inverse_trace([[lambda v: (A @ v.flatten()).view(n, d)]], normal(n, d), rng, probes=8, tolerance=1e-9)
        off.append((found.value - dense) / found.error)
        assert float(found.diagonal.sum()) == pytest.approx(found.value, rel=1e-4)
    assert np.sqrt(np.mean(np.square(off))) < 2
    assert abs(np.mean(off)) < 0.8


def ways(J: Tensor, n: int, seed: int = 0, **how: int) -> tuple[InverseDiagonal, InverseDiagonal]:
    """diag (J^T J)^-1 from the matrix, and from products with J."""
    A, like = J.T @ J, torch.zeros(n, J.shape[1] // n).double()
    rng = torch.Generator().manual_seed(seed)
    probed = inverse_diagonal(lambda v: (A @ v.flatten()).view_as(v), like, rng, **({"probes": 8} | how))
    return dense_inverse_diagonal(A, J.__matmul__), probed


def test_the_inverse_s_diagonal_by_products_is_the_dense_one_within_its_error() -> None:
    n, d = 3, 20
    J = normal(200, n * d) * torch.linspace(0.3, 3, n * d)
    true = torch.linalg.inv(J.T @ J).diagonal()
    off, whole = [], []
    for seed in range(20):
        dense, probed = ways(J, n, seed)
        assert torch.allclose(dense.diagonal, true)
        assert float(dense.error.abs().max()) == dense.spread == dense.lost == probed.lost == 0
        off.append((probed.diagonal.flatten() - true) / probed.error.flatten())
        whole.append((probed.total - float(true.sum())) / probed.spread)
        assert probed.total == pytest.approx(float(probed.diagonal.sum()))
    scores = torch.stack(off)
    assert 0.7 < float(scores.square().mean().sqrt()) < 1.5  # Student's t at 7 degrees of freedom: 1.18
    assert float(scores.mean(0).abs().max()) < 1.2
    assert np.sqrt(np.mean(np.square(whole))) < 2
    fine = ways(J, n, probes=2000)[1]
    assert bool(((fine.diagonal.flatten() - true).abs() < 5 * fine.error.flatten()).all())
    assert float((fine.error.flatten() / true).median()) < 0.05


def test_what_a_neighbour_with_a_known_diagonal_saves() -> None:
    n, d = 4, 15
    mix = normal(n, n) + 2 * torch.ones(n, n)
    J = torch.kron(mix, torch.eye(d).double()) + 0.004 * normal(n * d, n * d, seed=1)
    A, like, rng = J.T @ J, torch.zeros(n, d).double(), torch.Generator()
    solve = kronecker(mix.T @ mix, torch.ones(1).double(), 0.0)
    start = solve(torch.eye(n).double()).diagonal()[:, None].expand(n, d)
    told = [
        inverse_diagonal(
            lambda v: (A @ v.flatten()).view_as(v), like, rng.manual_seed(0), probes=8, precondition=solve, start=each
        )
        for each in (None, start)
    ]
    true = torch.linalg.inv(A).diagonal().view(n, d)
    errors = [float((each.diagonal - true).norm()) for each in told]
    assert errors[1] < 0.4 * errors[0]
    assert told[1].spread < 0.4 * told[0].spread


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_entries_in_the_null_space_are_infinite_and_the_others_are_not(scale: float) -> None:
    n, d = 2, 12
    J = scale * normal(60, n * d)
    J[:, [0, 5]] = 0.0  # never seen
    J[:, 7] = J[:, 8]  # their sum alone
    seen = torch.ones(n * d, dtype=torch.bool)
    seen[[0, 5, 7, 8]] = False
    columns = [i for i in range(n * d) if i not in (0, 5, 8)]  # 7 stands for the sum of 7 and 8
    alone = J[:, columns]
    true = torch.linalg.inv(alone.T @ alone).diagonal()
    kept = [i for i, j in enumerate(columns) if j != 7]
    for found in ways(J, n, probes=400):
        flat = found.diagonal.flatten()
        assert torch.equal(flat.isfinite(), seen)
        assert torch.allclose(flat[seen], true[kept], rtol=0.3)
    assert ways(J, n)[0].lost == 3
    assert 1 <= ways(J, n)[1].lost <= 8
    everything = ways(torch.zeros(5, n * d).double(), n)
    assert all(bool(found.diagonal.isinf().all()) for found in everything)


def test_what_is_hardly_determined_is_finite_and_what_conjugate_gradients_leave_is_told() -> None:
    J = normal(60, 24) @ torch.diag(torch.logspace(0, -4, 24).double()) @ torch.linalg.qr(normal(24, 24, seed=1))[0]
    dense, probed = ways(J, 2, steps=400)
    assert probed.lost == dense.lost == 0
    assert bool(probed.diagonal.isfinite().all())
    assert float(dense.diagonal.max()) > 1e5
    short = ways(J, 2, steps=4)[1]
    assert short.open > 0.1
    assert short.lost == 0
    assert short.total < 0.5 * dense.total
    J[:, 1] = J[:, 0] + 1e-7 * J[:, 1]  # nearly alike, and told apart
    assert ways(J, 2)[0].lost == 0
    assert bool(ways(J, 2)[0].diagonal.isfinite().all())


def test_an_early_end_and_few_draws_only_lower_the_trace() -> None:
    n, d = 2, 15
    draws = [J.T @ J + torch.eye(n * d) for J in normal(4000, 25, n * d, seed=1)]
    true = float(torch.linalg.inv(torch.stack(draws).mean(0)).trace())
    rng, short, few = torch.Generator().manual_seed(0), [], []
    products = [lambda v, A=A: (A @ v.flatten()).view(n, d) for A in draws[:400]]
    for k in range(50):
        held = draws[8 * k : 8 * k + 8]
        few.append(dense_inverse_trace([held[i::4] for i in range(4)], torch.ones(n * d).double())[0])
        folds = [products[8 * k : 8 * k + 4], products[8 * k + 4 : 8 * k + 8]]
        short.append(inverse_trace(folds, normal(n, d), rng, probes=2, steps=1).value)
    naive = np.mean([float(torch.linalg.inv(torch.stack(draws[8 * k : 8 * k + 8]).mean(0)).trace()) for k in range(50)])
    assert naive > 1.03 * true  # the mean of inverses is no bound
    for values in (few, short):
        assert np.mean(values) < true + 3 * np.std(values) / 50**0.5
    assert np.mean(few) > 0.5 * true


def test_few_draws_only_lower_what_water_leaves() -> None:
    p = 15
    draws = [J.T @ J + torch.eye(p) for J in normal(2000, 10, p, seed=1)]
    v = torch.linalg.eigvalsh(torch.linalg.inv(torch.stack(draws).mean(0)))
    for water in (0.5 * float(v.mean()), 2 * float(v.mean()), math.inf):
        true = float(torch.where(v > water, water * (1 + (v / water).log()), v).sum())
        few = []
        for k in range(100):
            held = draws[8 * k : 8 * k + 8]
            few.append(dense_water_trace([held[i::4] for i in range(4)], water)[0])
        assert 0.3 * true < np.mean(few) < true + 3 * np.std(few) / 100**0.5
        whole = dense_water_trace([draws[i::4] for i in range(4)], water)
        assert whole[0] == pytest.approx(true, abs=4 * whole[1] + 0.01 * true)


def test_the_preconditioner_inverts_what_it_says() -> None:
    gram, variances = normal(9, 3).T @ normal(9, 3), torch.rand(4, generator=torch.Generator().manual_seed(0)).double()
    A = torch.kron(gram, torch.diag(variances)) + 2 * torch.eye(12)
    v = normal(3, 4)
    assert torch.allclose(A @ kronecker(gram, variances, 2.0)(v).flatten(), v.flatten())


def test_rate_distortion() -> None:
    v = torch.tensor([4.0, 1.0, 0.25, 0.01]).double()
    assert distortion(v, 0.0) == pytest.approx(5.26)
    for nats in (8.0, 20.0, 300.0):  # Shannon's bound, and the formula of zero-concentrated privacy
        h = 0.5 * float((2 * math.pi * math.e * v).log().sum())
        assert distortion(v, nats) == pytest.approx(4 / (2 * math.pi * math.e) * math.exp(2 * (h - nats) / 4))
    assert distortion(torch.ones(5), 2.0) == pytest.approx(5 * math.exp(-4 / 5))
    few = [distortion(v, nats) for nats in (0.0, 0.1, 0.3, 1.0, 2.0, 4.0)]
    assert few == sorted(few, reverse=True)
    assert distortion(v, 0.3) == pytest.approx(4 * math.exp(-0.6) + 1.26)  # the largest alone is told
    with pytest.raises(ValueError, match="at least 0"):
        distortion(v, -1.0)


def test_what_matching_leaves_of_variances() -> None:
    v = torch.tensor([4.0, 1.0, 0.25, 0.01]).double()
    for nats in (0.01, 0.3, 1.0, 2.0):
        t = level(v, nats)
        found = float((v * t / (v + t)).sum()) - t * nats / 2
        assert 0.5 * distortion(v, nats) < found < distortion(v, nats)
        for other in (0.5 * t, 2 * t):
            assert float((v * other / (v + other)).sum()) - other * nats / 2 < found
    assert level(v, 0.0) == math.inf


@pytest.mark.parametrize("chance", [0.5, 0.05, 1e-3])
def test_no_guess_comes_closer_than_the_radius_with_more_than_the_chance(chance: float) -> None:
    v = torch.tensor([4.0, 1.0, 0.25, 0.25, 0.25])
    x = normal(10**6, 5) * v.sqrt()
    radius = guessing_radius(v, math.log(chance))
    share = float((x.norm(dim=1) <= radius).double().mean())
    assert 0.01 * chance < share <= chance
    assert guessing_radius(v, 0.0) > 0


@pytest.mark.parametrize(("z", "q"), [(0.5, 0.1), (1.0, 0.01), (3.0, 0.5), (0.7, 0.999999)])
def test_information_and_divergence_of_a_subsampled_gaussian(z: float, q: float) -> None:
    def density(w: float, *means: tuple[float, float]) -> float:
        return sum(share * norm.pdf(w, mean, z) for share, mean in means)

    ends = -1 - 15 * z, 1 + 15 * z
    kl = quad(
        lambda w: (p := density(w, (1 - q, 0), (q, 1))) * math.log(p / norm.pdf(w, 0, z)) if abs(w) < 12 * z else 0.0,
        *ends,
        limit=500,
    )[0]
    assert information(z, q) == pytest.approx(kl, rel=1e-5)
    assert information(z, q, 7) == pytest.approx(7 * kl, rel=1e-5)
    assert information(z, q) <= q * information(z) + 1e-12
    chi = [
        quad(lambda w: density(w, (1 - q, 0), (q, a)) ** 2 / density(w, (1 - q, 0), (q, b)), *ends, limit=500)[0]  # noqa: B023
        for a, b in ((1, -1), (1, 0), (0.5, -0.5), (0, 1), (-0.3, 0.9))
    ]
    assert max(map(math.log, chi)) <= replacement_divergence(z, q) * (1 + 1e-6)
    assert replacement_divergence(z, q) <= 4 / z**2 + 1e-9


def test_the_full_batch_has_closed_forms() -> None:
    assert information(2.0, 1.0, 8) == 1.0
    assert replacement_divergence(2.0, 1.0, 8) == 8.0
    assert replacement_divergence(0.05, 0.5) > 1500
    assert replacement_divergence(1.0, 0.0) == information(1.0, 0.0) == 0
    assert Robustness(2.0, 1.0, 4).success(math.log(0.1))[0] == pytest.approx(norm.cdf(norm.ppf(0.1) + 1.0))
    assert Robustness(1.0, 1.0, 100).success(-500.0) == (pytest.approx(0.0, abs=1e-6), 0.0)
    with pytest.raises(ValueError, match="give z > 0"):
        information(0.0)
    with pytest.raises(ValueError, match="at most 0"):
        Robustness(1.0).success(0.1)


@pytest.mark.parametrize(("z", "q", "chance"), [(1.0, 0.2, 0.1), (0.5, 0.5, 0.01), (2.0, 0.9, 0.3)])
def test_success_by_monte_carlo_meets_one_step_s_closed_form(z: float, q: float, chance: float) -> None:
    found, error = Robustness(z, q).success(math.log(chance))
    t = norm.isf(chance, 0, z)
    true = q * norm.sf(t, 1, z) + (1 - q) * norm.sf(t, 0, z)
    assert true - 4 * error < found < 1.1 * true + 4 * error
    several = [Robustness(z, q, steps).success(math.log(chance))[0] for steps in (1, 4, 16)]
    assert several == sorted(several)
    rare = norm.isf(2e-3, 0, z)
    least = q * norm.sf(rare, 1, z) + (1 - q) * norm.sf(rare, 0, z)
    draws = [Robustness(z, q, 1, torch.Generator().manual_seed(seed)).success(math.log(2e-3))[0] for seed in range(12)]
    assert min(draws) > least  # the threshold is on the safe side, and not on the right side on average
    assert Robustness(z, q).success(math.log(1e-9))[0] > 0  # of a chance that draws can tell: larger, hence safe


def test_success_after_several_steps_that_all_take_the_example() -> None:
    found, error = Robustness(2.0, 1 - 1e-9, 4).success(math.log(0.1))
    assert found == pytest.approx(norm.cdf(norm.ppf(0.1) + 1.0), abs=4 * error + 0.01)


def test_no_decoder_tells_candidates_apart_more_often() -> None:
    """The maximum-likelihood decoder among orthogonal gradients of the clipping norm."""
    count, N = 10, 40000
    for z in (0.3, 0.7, 2.0):
        release = z * normal(N, count, seed=1)
        release[:, 0] += 1
        share = float((release.argmax(1) == 0).double().mean())
        assert share < Robustness(z).success(-math.log(count))[0] + 3 * (share * (1 - share) / N) ** 0.5
