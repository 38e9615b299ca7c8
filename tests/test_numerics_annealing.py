import math

import pytest
import torch
from torch import Tensor, nn

from unbatch.numerics.search.annealing import annealed


def linear(m: int, d: int, seed: int) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(m, d, generator=rng, dtype=torch.float64), torch.randn(d, generator=rng, dtype=torch.float64)


@pytest.mark.parametrize(("m", "d"), [(5, 12), (20, 12)])
@pytest.mark.parametrize("at", [0.0, 1.0])
def test_of_linear_equations_it_is_the_solution_nearest_to_the_start(m: int, d: int, at: float) -> None:
    A, x = linear(m, d, 0)
    start = torch.full((d,), at, dtype=torch.float64)
    found = annealed(lambda z, b: A @ z - A @ x, lambda z, b: A, start)
    torch.testing.assert_close(found, start + torch.linalg.pinv(A) @ (A @ (x - start)), rtol=0, atol=1e-8)


def test_kinks_are_told_how_sharp_they_are_and_a_unit_changes_sides() -> None:
    """relu(A x) from the wrong side of every unit, where the derivative of the sharp one is zero."""
    A, x = linear(30, 8, 1)
    start = -0.5 * torch.ones(8, dtype=torch.float64)
    A = A.abs()
    b = (A @ x.abs()).relu()
    told: list[float] = []

    def residual(z: Tensor, sharpness: float) -> Tensor:
        told.append(sharpness)
        return nn.functional.softplus(sharpness * (A @ z), threshold=40) / sharpness - b

    def jacobian(z: Tensor, sharpness: float) -> Tensor:
        return torch.sigmoid(sharpness * (A @ z))[:, None] * A

    assert not (A @ start).relu().any()
    found = annealed(residual, jacobian, start, levels=30)
    torch.testing.assert_close(found, x.abs(), rtol=0, atol=1e-5)
    assert told[0] == 1.0
    assert math.isclose(told[-1], 1e4)
    assert told == sorted(told)


def test_it_stops_where_it_is_told_to_and_keeps_what_it_has() -> None:
    A, x = linear(20, 12, 2)
    shares: list[float] = []

    def tick(share: float) -> bool:
        shares.append(share)
        return share < 0.3

    start = torch.zeros(12, dtype=torch.float64)
    early = annealed(lambda z, b: A @ z - A @ x, lambda z, b: A, start, levels=11, tick=tick)
    assert shares == [0.0, 0.1, 0.2, 0.3]
    assert 1e-4 < float((early - x).norm()) < float(x.norm())
    assert torch.equal(annealed(lambda z, b: A @ z - A @ x, lambda z, b: A, start, tick=lambda s: False), start)


@pytest.mark.parametrize(("m", "d"), [(5, 12), (20, 12)])
def test_at_one_level_it_is_the_posterior_s_mode(m: int, d: int) -> None:
    A, x = linear(m, d, 3)
    found = annealed(lambda z, b: A @ z - A @ x, lambda z, b: A, torch.zeros_like(x), levels=1)
    mode = torch.linalg.solve(A.T @ A + torch.eye(d).to(A), A.T @ (A @ x))
    torch.testing.assert_close(found, mode, rtol=1e-6, atol=1e-6)
