import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from unbatch.numerics.moments import hermite

PARITY = {  # activation -> E s^(p)(Z), p = 1 ... 4
    "relu": (torch.relu, [0.5, 0.399, 0, -0.399]),
    "leaky relu": (lambda t: F.leaky_relu(t, 0.01), [0.505, 0.395, 0, -0.395]),
    "tanh": (torch.tanh, [0.606, 0, -0.364, 0]),
    "sigmoid": (torch.sigmoid, [0.207, 0, -0.062, 0]),
    "softplus": (F.softplus, [0.5, 0.207, 0, -0.062]),
    "gelu": (F.gelu, [0.5, 0.423, 0, -0.353]),
    "silu": (F.silu, [0.5, 0.351, 0, -0.185]),
    "elu": (F.elu, [0.762, 0.262, -0.137, -0.137]),
    "erf": (lambda t: torch.erf(t / 2**0.5), [0.564, 0, -0.282, 0]),
}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def derivative_of_density(u: torch.Tensor, p: int) -> torch.Tensor:
    """(-1)^p / density times the p-th derivative of the normal density, by automatic differentiation."""

    def density(v: torch.Tensor) -> torch.Tensor:
        return torch.exp(-v.square().sum() / 2)

    function = density
    for _ in range(p):
        function = torch.func.jacrev(function)
    return (-1) ** p * function(u) / density(u)


def test_polynomials_are_numpy_s() -> None:
    t = draw(50)
    for p, values in enumerate(hermite.polynomials(t, 6)):
        expected = np.polynomial.hermite_e.HermiteE.basis(p)(t.numpy())
        np.testing.assert_allclose(values, expected, atol=1e-10)


@pytest.mark.parametrize("p", [1, 2, 3, 4])
def test_tensors_are_derivatives_of_the_density(p: int) -> None:
    U = draw(3, 3, seed=p)
    expected = torch.stack([derivative_of_density(u, p) for u in U])
    torch.testing.assert_close(hermite.hermite(U, p), expected, rtol=1e-9, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), m=st.integers(1, 9), n=st.integers(1, 5), r=st.integers(1, 4))
def test_contracted_forms_are_the_dense_ones(seed: int, m: int, n: int, r: int) -> None:
    U, g, a, V = draw(m, n, seed=seed), draw(m, seed=seed + 1), draw(n, seed=seed + 2), draw(n, r, seed=seed + 3)
    H2, H3 = (hermite.hermite(U, p) for p in (2, 3))
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(hermite.second(g, U), torch.einsum("j,jab->ab", g, H2), **close)
    torch.testing.assert_close(hermite.third_along(g, U, a), torch.einsum("j,jabc,c->ab", g, H3, a), **close)
    torch.testing.assert_close(
        hermite.third(g, U, V), torch.einsum("j,jabc,ax,by,cz->xyz", g, H3, V, V, V), rtol=1e-8, atol=1e-8
    )


@pytest.mark.parametrize("p", [0, 1, 2, 3, 4])
def test_distinct_entries_are_uncorrelated_with_variance_alpha(p: int) -> None:
    n, m = 3, 400_000
    H = hermite.entries(draw(m, n, seed=p), p)
    assert H.shape == (m, math.comb(n + p - 1, p)) == (m, len(hermite.variances(n, p)))
    covariance = H.T @ H / m / hermite.variances(n, p).sqrt().outer(hermite.variances(n, p).sqrt())
    torch.testing.assert_close(covariance, torch.eye(len(covariance), dtype=torch.float64), rtol=0, atol=0.12)


def test_unpacking_puts_every_entry_at_all_its_places() -> None:
    packed = torch.arange(10, dtype=torch.float64)
    T = hermite.unpack(packed, 3, 3)
    for value, (i, j, k) in zip(packed, hermite.indices(3, 3).tolist(), strict=True):
        places = {(i, j, k), (i, k, j), (j, i, k), (j, k, i), (k, i, j), (k, j, i)}
        assert {float(T[place]) for place in places} == {float(value)}


@pytest.mark.parametrize("name", PARITY)
def test_coefficients_of_the_parity_table(name: str) -> None:
    s, expected = PARITY[name]
    found = hermite.coefficients(s)[1:]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=6e-4)
    for value, stated in zip(found.tolist(), expected, strict=True):
        assert (abs(value) < 1e-12) == (stated == 0)


def test_coefficients_in_closed_form() -> None:
    c = hermite.coefficients(lambda t: torch.erf(t / 2**0.5))
    root = math.pi**-0.5
    torch.testing.assert_close(c, torch.tensor([0, root, 0, -root / 2, 0], dtype=torch.float64), rtol=0, atol=1e-12)
    c = hermite.coefficients(lambda t: t**2 + t**3, scale=0.3, mean=0.7)
    expected = [0.7**2 + 0.3**2 + 0.7**3 + 3 * 0.7 * 0.09, 1.4 + 3 * (0.49 + 0.09), 2 + 6 * 0.7, 6.0, 0.0]
    torch.testing.assert_close(c, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("mean", "scale"), [(0.0, 1.0), (0.3, 0.05), (-0.2, 2.0), (0.0, 30.0), (0.4, 9.0)])
def test_a_kink_costs_no_accuracy(mean: float, scale: float) -> None:
    a = mean / scale
    density, share = math.exp(-(a**2) / 2) / (2 * math.pi) ** 0.5, 0.5 * (1 + math.erf(a / 2**0.5))
    expected = [mean * share + scale * density, share, density / scale, -a * density / scale**2]
    found = hermite.coefficients(torch.relu, scale=scale, mean=mean)[:4]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["tanh", "gelu", "elu", "relu"])
def test_coefficients_are_what_samples_say(name: str) -> None:
    """E s(mean + scale Z) He_p(Z) / scale^p over samples, within five standard errors."""
    s, scale, mean = PARITY[name][0], 0.8, 0.4
    Z = draw(500_000, seed=5)
    samples = s(mean + scale * Z) * hermite.polynomials(Z, 4) / (scale ** torch.arange(5))[:, None]
    error = samples.std(1) / len(Z) ** 0.5
    assert bool(((samples.mean(1) - hermite.coefficients(s, scale=scale, mean=mean)).abs() < 5 * error).all())
