"""The searches of numerics: matching, least_squares, softening."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from unbatch.numerics.search.least_squares import conjugate_gradients, minimise_by_products, resized
from unbatch.numerics.search.matching import cosine_distance, lbfgs, signed_adam, squared_difference, total_variation
from unbatch.numerics.search.softening import Softened, has_kinks


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_squared_difference_and_cosine_see_all_parameters_as_one_vector() -> None:
    a, b = [normal(3, 2), normal(4, seed=1)], [normal(3, 2, seed=2), normal(4, seed=3)]
    u, v = torch.cat([t.flatten() for t in a]), torch.cat([t.flatten() for t in b])
    assert torch.isclose(squared_difference(a, b), (u - v).square().sum())
    assert torch.isclose(cosine_distance(a, b), 1 - F.cosine_similarity(u, v, dim=0))


def test_cosine_distance_ignores_size_and_survives_zero() -> None:
    a = [normal(3), normal(2, seed=1)]
    assert float(cosine_distance([7 * t for t in a], a)) == pytest.approx(0, abs=1e-15)
    assert float(cosine_distance([torch.zeros_like(t) for t in a], a)) == 1


def test_total_variation_of_a_ramp_is_its_slopes() -> None:
    ramp = 2.0 * torch.arange(5).view(1, 1, 5, 1) + 3.0 * torch.arange(4).view(1, 1, 1, 4)
    assert float(total_variation(ramp)) == 5
    assert float(total_variation(torch.full((2, 3, 4, 4), 0.7))) == 0
    assert float(total_variation(torch.ones(1, 1, 1, 1))) == 0


def test_lbfgs_solves_a_quadratic_and_yields_points_with_their_own_values() -> None:
    target = normal(2, 3)
    weights = torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64)

    def objective(x: Tensor) -> Tensor:
        return ((x - target).square() * weights).sum()

    found = list(lbfgs(objective, torch.zeros(2, 3, dtype=torch.float64), steps=60))
    for value, point in found[:5]:
        assert value == pytest.approx(float(objective(point)))
    assert torch.allclose(found[-1][1], target, atol=1e-8)


def test_lbfgs_ends_where_the_objective_is_not_finite() -> None:
    found = list(lbfgs(lambda x: x.log().sum(), -torch.ones(1, 2), steps=9))
    assert len(found) == 1
    assert found[0][0] == math.inf


def test_signed_adam_stays_in_the_box_and_its_rate_falls() -> None:
    found = [p for _, p in signed_adam(lambda x: (x - 5).square().sum(), torch.zeros(1, 2), steps=80, box=2.0)]
    assert len(found) == 81
    assert max(float(p.abs().max()) for p in found) <= 2
    free = [p for _, p in signed_adam(lambda x: -x.sum(), torch.zeros(1, 1), steps=80)]
    moves = torch.cat(free).diff(dim=0).flatten()
    assert moves[0] == pytest.approx(0.1, rel=1e-4)
    assert moves[-1] == pytest.approx(1e-4, rel=1e-2)


def test_conjugate_gradients_solve_in_as_many_steps_as_unknowns() -> None:
    root = normal(6, 6)
    A, b = root @ root.T + torch.eye(6, dtype=torch.float64), normal(6, seed=1)
    *_, x = conjugate_gradients(A.matmul, b, lambda v: v / A.diagonal(), 6, 1e-14)
    assert torch.allclose(A @ x, b, atol=1e-8)


def test_least_squares_converges_quadratically_on_a_consistent_nonlinear_system() -> None:
    W, truth = normal(40, 5, seed=1), normal(3, 5, seed=2)

    def residual(x: Tensor, /, *, create_graph: bool = False) -> Tensor:
        return (torch.tanh(x @ W.T) - torch.tanh(truth @ W.T)).flatten()

    start = truth + 0.1 * normal(3, 5, seed=3)
    search = minimise_by_products(residual, start, torch.Generator().manual_seed(0), steps=20)
    costs = []
    for cost, x in search:
        if not costs or cost < costs[-1]:
            costs.append(cost)
        assert cost == pytest.approx(float(residual(x).square().sum()), rel=1e-6, abs=1e-28)
    assert costs[-1] < 1e-20 * costs[0]
    assert torch.allclose(x, truth, atol=1e-9)


def test_least_squares_follows_a_smooth_surrogate_to_the_solution_of_what_jumps() -> None:
    W, truth = normal(40, 5, seed=1), normal(3, 5, seed=2)

    def smooth(x: Tensor, /, *, create_graph: bool = False) -> Tensor:
        return (torch.tanh(x @ W.T) - torch.tanh(truth @ W.T)).flatten() + 0.1  # its own minimum lies elsewhere

    def stairs(x: Tensor, /, *, create_graph: bool = False) -> Tensor:
        steps = (200 * torch.tanh(x @ W.T)).round() - (200 * torch.tanh(truth @ W.T)).round()
        return steps.flatten().detach() / 200

    start = truth + 0.1 * normal(3, 5, seed=3)
    alone = [
        cost
        for cost, _ in minimise_by_products(stairs, start, torch.Generator().manual_seed(0), steps=1, surrogate=smooth)
    ]
    *_, (cost, x) = minimise_by_products(stairs, start, torch.Generator().manual_seed(0), steps=20, surrogate=smooth)
    assert cost < 0.01 * alone[0]
    assert float((x - truth).norm()) < 0.05 * float((start - truth).norm())


def test_least_squares_stops_where_nothing_depends_on_the_point() -> None:
    flat = minimise_by_products(
        lambda x, /, create_graph=False: 0 * x.flatten() + 1,
        torch.ones(2, 2, dtype=torch.float64),
        torch.Generator().manual_seed(0),
        steps=50,
    )
    assert list(flat) == []


def test_resized_doubles_and_halves_only_what_gains() -> None:
    truth = normal(3, 4)
    x = truth * torch.tensor([[0.5], [1.0], [2.0]], dtype=torch.float64)

    def residual(v: Tensor, /, *, create_graph: bool = False) -> Tensor:
        return (v - truth).flatten()

    assert torch.allclose(resized(residual, x), truth)


@pytest.mark.parametrize("activation", [F.relu, torch.relu, Tensor.relu, F.leaky_relu])
def test_softened_networks_have_no_kink_and_sharpen_to_the_network_itself(activation: object) -> None:
    z = normal(200)
    soft = Softened(5.0)
    with soft:
        rounded = activation(z)  # type: ignore[operator]
    exact = activation(z)  # type: ignore[operator]
    spread = float(z.square().mean().sqrt())
    assert 0 < float((rounded - exact).abs().max()) <= math.log(2) * spread / 5
    soft.sharpen(1e4)
    with soft:
        assert float((activation(z) - exact).abs().max()) < 1e-3  # type: ignore[operator]
    soft.sharpen(math.inf)
    with soft:
        assert torch.equal(activation(z), exact)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("shape", "kernel", "stride"), [((1, 2, 6, 8), 2, None), ((2, 7, 7), (3, 2), 2), ((1, 1, 5, 5), 3, 1)]
)
def test_softened_max_pooling_goes_from_the_mean_of_a_window_to_its_maximum(
    shape: tuple[int, ...], kernel: int | tuple[int, int], stride: int | None
) -> None:
    z = normal(math.prod(shape)).view(shape)
    largest, soft = F.max_pool2d(z, kernel, stride), Softened(1e-6)
    with soft:
        mean = F.max_pool2d(z, kernel, stride)
    torch.testing.assert_close(mean, F.avg_pool2d(z, kernel, stride), rtol=0, atol=1e-5)
    soft.sharpen(1e6)
    with soft:
        sharp = F.max_pool2d(z, kernel, stride)
    torch.testing.assert_close(sharp, largest, rtol=0, atol=1e-5)
    soft.sharpen(math.inf)
    with soft:
        assert torch.equal(F.max_pool2d(z, kernel, stride), largest)


def test_softened_leaves_padded_max_pooling_as_it_is() -> None:
    z = normal(36).view(1, 6, 6)
    largest = F.max_pool2d(z, 3, padding=1)
    with Softened(1.0):
        assert torch.equal(F.max_pool2d(z, 3, padding=1), largest)


def test_softened_keeps_the_spread_of_its_first_block() -> None:
    soft, z = Softened(3.0), normal(50)
    with soft:
        first = F.relu(z)
    with soft:
        F.relu(10 * z)
    with soft:
        assert torch.equal(F.relu(z), first)


@pytest.mark.parametrize(
    ("activation", "bent"), [(F.relu, True), (F.leaky_relu, True), (F.gelu, False), (torch.tanh, False)]
)
def test_kinked_tells_relu_networks_from_smooth_ones(activation: object, bent: bool) -> None:
    W, v = normal(300, 20) / 5, normal(300, seed=1)

    def update(x: Tensor) -> list[Tensor]:
        w = W.clone().requires_grad_()
        return list(torch.autograd.grad((activation(x @ w.T) @ v).square().sum(), [w]))  # type: ignore[operator]

    assert has_kinks(update, normal(4, 20, seed=2), torch.Generator().manual_seed(0), reach=0.1) is bent
