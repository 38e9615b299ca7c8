import math

import pytest
import torch

from unbatch.numerics.moments.hermite import coefficients, hermite
from unbatch.numerics.moments.moments import (
    GROUPS,
    first_moments,
    fitted_degree,
    head_moments,
    moment_subspace,
    non_gaussianity,
    whitened,
)


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slope(s, t: torch.Tensor) -> torch.Tensor:
    t = t.clone().requires_grad_()
    return torch.autograd.grad(s(t).sum(), t)[0]


class Layer:
    """m Gaussian neurons, n unit vectors, k outputs, and what they send."""

    def __init__(self, s, n: int = 3, m: int = 4000, k: int = 2, d: int | None = None, seed: int = 0) -> None:
        self.s, self.U, self.a = s, draw(m, d or n, seed=seed), draw(m, k, seed=seed + 1)
        self.X = draw(n, d or n, seed=seed + 2)
        self.X /= self.X.norm(dim=1, keepdim=True)
        self.r = draw(n, k, seed=seed + 3)
        z = self.U @ self.X.T
        self.g = s(z) @ self.r  # [m, k]
        self.G = (slope(s, z) * (self.a @ self.r.T)) @ self.X  # [m, d]

    def true(self, p: int, mixing: torch.Tensor | None = None) -> torch.Tensor:
        """sum_i r_i E s^(p) x_i^{x p}, written out."""
        r = self.r if mixing is None else self.r @ mixing
        powers = self.X
        for _ in range(p - 1):
            powers = torch.einsum("i...,ib->i...b", powers, self.X)
        return float(coefficients(self.s)[p]) * torch.einsum("ik,i...->k...", r, powers)


def mixing(a: torch.Tensor) -> torch.Tensor:
    """M with a = whitened(a) M^T, so that T of the whitened outputs is that of r M."""
    return torch.linalg.lstsq(whitened(a), a).solution.T


@pytest.mark.parametrize("p", [1, 2, 3])
def test_averages_are_the_dense_formula(p: int) -> None:
    """The coefficients by averages are (1/m) sum_j g_j H_p(u_j), symmetrised for the first layer."""
    layer = Layer(torch.tanh, m=300)
    head = head_moments(layer.g, layer.U, p, fit=False)[-1]
    expected = torch.einsum("jk,j...->k...", layer.g, hermite(layer.U, p)) / 300
    torch.testing.assert_close(head.tensor(head.value), expected)
    first = first_moments(layer.G, layer.a, layer.U, p, fit=False)[-1]
    raw = torch.einsum("jk,ja,j...->ka...", whitened(layer.a), layer.G, hermite(layer.U, p - 1)) / 300
    expected = torch.stack([raw.movedim(1, 1 + i) for i in range(p)]).mean(0)
    torch.testing.assert_close(first.tensor(first.value), expected)
    assert head.order == first.order == p


@pytest.mark.parametrize("fit", [True, False])
@pytest.mark.parametrize("s", [torch.tanh, torch.relu, torch.nn.functional.gelu], ids=["tanh", "relu", "gelu"])
def test_moments_are_the_tensors_within_their_error(s, fit: bool) -> None:
    """The squared error of the middle trial is what the shares say, for every order and both routes."""
    ratios: dict[tuple[str, int], list[float]] = {}
    for seed in range(12):
        layer = Layer(s, n=2, m=1500, seed=10 * seed)
        M = mixing(layer.a)
        found = head_moments(layer.g, layer.U, 4, fit=fit) + first_moments(layer.G, layer.a, layer.U, 4, fit=fit)
        for q in found:
            true = layer.true(q.order, None if q.route == "head" else M)
            error = (q.tensor(q.value) - true).square().sum()
            spread = sum(q.tensor(share).square().sum() for share in q.shares)
            ratios.setdefault((q.route, q.order), []).append(float(error / spread))
    for key, values in ratios.items():
        assert 0.2 < sorted(values)[len(values) // 2] < 2.5, key  # a whitened a makes order one of `first` less noisy


def test_least_squares_is_exact_for_polynomials() -> None:
    layer = Layer(lambda t: t**2 + t**3, n=4, m=900)
    M = mixing(layer.a)
    for q in head_moments(layer.g, layer.U, 3) + first_moments(layer.G, layer.a, layer.U, 3):
        true = layer.true(q.order, None if q.route == "head" else M)
        torch.testing.assert_close(q.tensor(q.value), true, rtol=1e-9, atol=1e-9)
        assert q.noise < 1e-12


def test_slices_have_unit_noise() -> None:
    layer = Layer(torch.relu, n=3, m=3000)
    for q in head_moments(layer.g, layer.U, 3)[1:] + first_moments(layer.G, layer.a, layer.U, 3)[1:]:
        spread = sum(q.slices(share).square().sum() for share in q.shares)
        count = q.shares[0].numel()
        symmetric = spread / count  # the first layer's mean over positions averages some of the noise away
        assert 0.1 < float(symmetric) < 1.2


def test_shares_are_of_as_many_groups_and_few_neurons_fall_back_to_averages() -> None:
    assert fitted_degree(3000, 3, 2, 3) == 3
    assert fitted_degree(60, 3, 2, 3) == 2
    assert fitted_degree(10, 3, 2, 3) == 0
    assert fitted_degree(3, 3, 2, 3) == -1
    layer = Layer(torch.tanh, n=3, m=60, k=2)
    found = first_moments(layer.G, layer.a, layer.U, 4)
    assert [q.shares.shape[0] for q in found] == [GROUPS] * 4
    assert all(bool(q.value.isfinite().all()) for q in found)


def test_whitening_outputs_drops_what_depends() -> None:
    a = draw(500, 3, seed=0)
    a = torch.cat([a, a.sum(1, keepdim=True)], 1)
    white = whitened(a)
    torch.testing.assert_close(white.T @ white, 500 * torch.eye(3, dtype=torch.float64))


def test_non_gaussianity() -> None:
    gaussian = draw(20_000, 3, seed=1)
    assert non_gaussianity(gaussian, torch.Generator().manual_seed(0)) < 0.01
    uniform = (torch.rand(20_000, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64) - 0.5) * 12**0.5
    found = non_gaussianity((uniform - uniform.mean()) / uniform.std(correction=0), torch.Generator().manual_seed(0))
    assert found == pytest.approx(1.2 / math.sqrt(24), rel=0.05)  # excess kurtosis of a uniform law
    assert non_gaussianity(draw(20_000, 30, seed=3), torch.Generator().manual_seed(0)) < 0.01


@pytest.mark.parametrize("route", ["head", "first"])
@pytest.mark.parametrize("orders", [(2,), (3,), (2, 3)], ids=str)
def test_the_moment_s_subspace_is_the_span_within_its_error(route: str, orders: tuple[int, ...]) -> None:
    s = {(2,): torch.relu, (3,): torch.tanh, (2, 3): lambda t: t**2 + t**3}[orders]
    ratios = []
    for seed in range(6):
        layer = Layer(s, n=2, d=8, m=60_000, k=1 if seed % 2 else 2, seed=10 * seed)
        layer.r = layer.r.sign()
        z = layer.U @ layer.X.T
        layer.g, layer.G = s(z) @ layer.r, (slope(s, z) * (layer.a @ layer.r.T)) @ layer.X
        Y = layer.g if route == "head" else layer.G
        P, values, errors = moment_subspace(
            Y, layer.a, layer.U, 2, orders, torch.Generator().manual_seed(1), route=route
        )
        torch.testing.assert_close(P @ P.T, torch.eye(2, dtype=torch.float64))
        assert bool((values[:-1] >= values[1:]).all())
        basis = torch.linalg.qr(layer.X.T).Q
        off = (P - P @ basis @ basis.T).square().sum()
        ratios.append(float(off / errors.square().sum()))
    assert sorted(ratios)[len(ratios) // 2] < 3
    assert sum(r < 9 for r in ratios) >= 5


@pytest.mark.parametrize("route", ["head", "first"])
def test_both_orders_find_the_subspace_better_than_either(route: str) -> None:
    """x^2 + x^3 has both; with order 2 alone the third order is noise, and so it is the other way round."""
    off: dict[tuple[int, ...], float] = {}
    for orders in ((2,), (3,), (2, 3)):
        total = 0.0
        for seed in range(4):
            layer = Layer(lambda t: t**2 + t**3, n=2, d=20, m=8000, k=1, seed=10 * seed)
            Y = layer.g if route == "head" else layer.G
            P, _, _ = moment_subspace(Y, layer.a, layer.U, 2, orders, torch.Generator().manual_seed(1), route=route)
            basis = torch.linalg.qr(layer.X.T).Q
            total += float((P - P @ basis @ basis.T).square().sum())
        off[orders] = total
    assert off[2, 3] < min(off[2,], off[3,])


def test_an_odd_activation_s_subspace_needs_no_luck() -> None:
    """One random contraction of order 3 has 1 / sqrt(d) of the signal: an error near 1 here. Along the span it has all."""
    layer = Layer(torch.tanh, n=2, d=100, m=5000, k=1, seed=3)
    layer.X, layer.r = torch.eye(100, dtype=torch.float64)[:2], torch.tensor([[30.0], [31.0]], dtype=torch.float64)
    G = (slope(torch.tanh, layer.U @ layer.X.T) * layer.r.T) @ layer.X
    P, _, _ = moment_subspace(G, torch.ones(5000, 1).double(), layer.U, 2, (3,), torch.Generator(), route="first")
    assert float((layer.X - layer.X @ P.T @ P).norm(dim=1).max()) < 0.15
