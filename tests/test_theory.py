"""The rates of the theorems, fitted: minutes of work, run by `make slow`."""

from collections.abc import Callable

import numpy as np
import pytest
from test_tensor_moment import ACTIVATIONS, errors, exchange

from unbatch import Attack

pytestmark = pytest.mark.slow


def slope(x: list[int], y: list[float]) -> float:
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def typical(spec: str, make: Callable[[int], tuple], trials: int) -> float:
    """Root of the mean over trials, trimmed of the tenth that is largest, of the mean squared relative error."""
    squares = []
    for seed in range(trials):
        obs, truth = make(seed)
        squares.append(float(errors(Attack.parse(spec)(obs), truth)[0].square().mean()))
    kept = sorted(squares)[: len(squares) - len(squares) // 10]
    return (sum(kept) / len(kept)) ** 0.5


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_error_falls_as_one_over_the_root_of_the_width(name: str) -> None:
    """Each at the order that `auto` takes. Least squares is exact for polynomials, so x^2 + x^3 takes averages.

    200 trials at a lever of 32 give the slope a standard error of about 0.03; 60 trials at 16 gave 0.055.
    """
    spec = "tensor-moment:estimate=" + ("stein" if name == "x2+x3" else "regression")
    widths = [2000, 11_300, 64_000]
    found = [typical(spec, lambda seed, m=m: exchange(name, d=6, m=m, seed=seed), trials=200) for m in widths]
    assert abs(slope(widths, found) + 0.5) < 0.1, (slope(widths, found), found)


@pytest.mark.parametrize("name", ["tanh", "gelu"])
def test_the_error_with_the_span_does_not_depend_on_the_dimension(name: str) -> None:
    sizes = [50, 200, 784, 3072]
    found = [typical("tensor-moment", lambda seed, d=d: exchange(name, d=d, m=2000, seed=seed), 40) for d in sizes]
    assert abs(slope(sizes, found)) < 0.1, found


def test_the_error_with_the_paper_s_subspace_grows_as_the_root_of_the_dimension() -> None:
    spec = "tensor-moment:subspace=moment,estimate=stein,gradient=first"
    sizes = [10, 20, 40, 80, 160]
    found = [typical(spec, lambda seed, d=d: exchange("x2+x3", d=d, m=20_000, seed=seed), 20) for d in sizes]
    assert abs(slope(sizes, found) - 0.5) < 0.1, found


@pytest.mark.parametrize("name", ["tanh", "gelu"])
def test_the_error_grows_with_the_batch_no_faster_than_predicted(name: str) -> None:
    """The theorem bounds the projected tensor's error by n^{5/2} / sqrt(m)."""
    sizes = [2, 4, 8, 16]
    found = [
        typical("tensor-moment", lambda seed, n=n: exchange(name, n=n, d=300, m=8000, seed=seed), 10) for n in sizes
    ]
    assert 0 < slope(sizes, found) < 2.5, found


@pytest.mark.parametrize("default", [False, True], ids=["paper", "default"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_bound_covers(name: str, default: bool) -> None:
    """At least 95% of 200 random trials have every example within its bound."""
    settings = {"k": 4, "n": 3, "norm": 3.0} if default else {}
    held = 0
    for seed in range(200):
        obs, truth = exchange(name, d=20, m=1000, default=default, seed=seed, **settings)
        held += bool(errors(Attack.parse("tensor-moment")(obs), truth)[1].all())
    assert held >= 190
