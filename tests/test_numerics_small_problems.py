import pytest
import torch

from unbatch.numerics.search.small_problems import minimise_each


def rosenbrock(x, which):
    return torch.stack([10 * (x[:, 1] - x[:, 0] ** 2), 1 - x[:, 0]], 1)


def rosenbrock_slopes(x, which):
    zero, one = torch.zeros(len(x), dtype=x.dtype), torch.ones(len(x), dtype=x.dtype)
    to_first = torch.stack([-20 * x[:, 0], -one], 1)
    to_second = torch.stack([10 * one, zero], 1)
    return rosenbrock(x, which), torch.stack([to_first, to_second], 1)


def normal(linearise):
    """The normal equations of what `linearise` gives."""

    def found(x, which):
        r, Jt = linearise(x, which)
        return Jt @ Jt.mT, (Jt @ r[:, :, None])[..., 0]

    return found


def test_many_valleys_at_once() -> None:
    start = 3 * torch.randn(200, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x, costs = minimise_each(rosenbrock, normal(rosenbrock_slopes), start, steps=200, target=1e-24, chunk=37)
    assert float(costs.max()) <= 1e-24
    torch.testing.assert_close(x, torch.ones_like(x))
    torch.testing.assert_close(costs, rosenbrock(x, None).square().sum(1))


def test_each_problem_keeps_its_own_data_when_others_leave() -> None:
    goal = torch.arange(6, dtype=torch.float64)[:, None]
    start = goal.clone()
    start[3:] += torch.tensor([[0.5], [1.0], [3.0]])

    def residual(x, which):
        return torch.atan(x - goal[which])

    def linearise(x, which):
        gap = x - goal[which]
        return residual(x, which), (1 / (1 + gap**2))[:, None]

    x, costs = minimise_each(residual, normal(linearise), start, steps=300, target=1e-26, chunk=4)
    assert bool((costs <= 1e-26).all())
    torch.testing.assert_close(x, goal)


def test_a_problem_that_cannot_improve_is_left_where_it_is() -> None:
    def residual(x, which):
        return 1 + (x - 1).abs()

    def linearise(x, which):
        return residual(x, which), torch.ones(len(x), 1, 1, dtype=x.dtype)

    start = torch.ones(2, 1, dtype=torch.float64)
    x, costs = minimise_each(residual, normal(linearise), start, steps=5)
    assert torch.equal(x, start)
    assert costs.tolist() == [1.0, 1.0]


def test_nothing_to_solve() -> None:
    x, costs = minimise_each(rosenbrock, normal(rosenbrock_slopes), torch.zeros(0, 2, dtype=torch.float64))
    assert x.shape == (0, 2)
    assert costs.shape == (0,)


@pytest.mark.parametrize("gain", [0.0, 0.5])
def test_convergence_is_quadratic_near_an_exact_solution(gain: float) -> None:
    start = torch.tensor([[1.001, 1.0]], dtype=torch.float64)
    ends = [
        minimise_each(rosenbrock, normal(rosenbrock_slopes), start, steps=k, damping=1e-14, gain=gain)[1].item()
        for k in (1, 2)
    ]
    assert ends[1] < max(1e3 * ends[0] ** 2, 1e-26)


def test_a_curved_valley_takes_half_the_steps_along_the_geodesic() -> None:
    def valley(x, which):
        return torch.stack([100 * (x[:, 1] - x[:, 0] ** 2), 1 - x[:, 0]], 1)

    def slopes(x, which):
        zero, one = torch.zeros(len(x), dtype=x.dtype), torch.ones(len(x), dtype=x.dtype)
        to_first = torch.stack([-200 * x[:, 0], -one], 1)
        return valley(x, which), torch.stack([to_first, torch.stack([100 * one, zero], 1)], 1)

    def pull(x, which, u):
        return (slopes(x, which)[1] @ u[:, :, None])[..., 0]

    start = torch.tensor([[-1.0, 1.0]], dtype=torch.float64)

    def cost(steps, way):
        return minimise_each(valley, normal(slopes), start, pull=way, steps=steps)[1].item()

    assert cost(30, pull) < 1e-20
    assert cost(55, None) > 1e-3
