import math

import pytest
import torch
from torch import Tensor

from unbatch.numerics.linear.linsys import LinearSystem, Solution
from unbatch.numerics.search.smoothest import Variation, smoothest, smoothest_root

SHAPE = (3, 10, 12)
D = math.prod(SHAPE)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def flags() -> Tensor:
    """A grey wall with one bright and one coloured rectangle [D]."""
    x = torch.full(SHAPE, 0.4, dtype=torch.float64)
    x[:, 2:7, 1:6] = 0.9
    x[0, 4:9, 7:11] = 0.1
    return x.flatten()


def solved(A: Tensor, x: Tensor) -> Solution:
    return LinearSystem.of(A, A @ x).solve()


@pytest.mark.parametrize("shape", [SHAPE, (1, 7, 5), (2, 4, 4)])
def test_the_joint_step_undoes_the_differences(shape: tuple[int, int, int]) -> None:
    x = drawn(math.prod(shape))
    variation = Variation(shape, x)
    torch.testing.assert_close(variation.solve(variation.push(x), 7 * x, 7.0), x)


def test_a_ramp_varies_by_its_slope_and_colour_weighs_more_than_light() -> None:
    ramp = torch.linspace(0, 1, 12, dtype=torch.float64).expand(10, 12)
    light = torch.stack([ramp, ramp, ramp])
    colour = torch.stack([ramp, torch.zeros_like(ramp), -ramp]) * math.sqrt(3 / 2)  # of the same norm
    variation = Variation(SHAPE, ramp)
    assert variation(torch.full((D,), 0.3, dtype=torch.float64)) < 1e-12
    steps = 10 * 11 * math.sqrt(3) / 11 * 0.6 + 10 * 2 * math.sqrt(3) / 11  # slopes, and the bends at mirrored edges
    assert variation(light.flatten()) == pytest.approx(steps, rel=1e-9)
    assert variation(colour.flatten()) == pytest.approx(4 * steps, rel=1e-9)


def test_a_piecewise_constant_picture_from_fewer_equations_than_pixels() -> None:
    x = flags()
    known = solved(drawn(D * 2 // 3, D), x)
    assert float((known.x - x).abs().max()) > 0.3
    found = smoothest(known.x, known.free, SHAPE, rounds=1500)
    assert float((found - x).abs().max()) < 1e-5


def test_equations_box_and_optimality() -> None:
    x = (flags() + 0.1 * drawn(D, seed=2)).clamp(0, 1)
    A = drawn(150, D)
    known = solved(A, x)
    found = smoothest(known.x, known.free, SHAPE, rounds=1500)
    variation = Variation(SHAPE, x)
    assert float((A @ (found - x)).abs().max()) < 1e-9
    assert float((found - found.clamp(0, 1)).abs().max()) < 1e-4
    assert variation(found) < 0.9 * variation(x) < 0.9 * variation(known.x)
    inside = [
        known.free(v[None])[0] for v in (x - found, drawn(D, seed=3), drawn(D, seed=4), known.x.clamp(0, 1) - found)
    ]
    for v in inside:
        nearby = found + 0.02 * v / v.abs().max()
        excess = float((nearby - nearby.clamp(0, 1)).abs().sum())
        assert variation(found) < variation(nearby) + 1e-3 + 100 * excess
    early = smoothest(known.x, known.free, SHAPE)
    assert variation(early) < 1.005 * variation(found)


def test_a_box_is_a_change_of_units() -> None:
    known = solved(drawn(150, D), flags())
    found = smoothest(known.x, known.free, SHAPE)
    other = smoothest(4 * known.x - 1, known.free, SHAPE, (-1.0, 3.0))
    torch.testing.assert_close(other, 4 * found - 1)


def test_a_caller_can_stop_it() -> None:
    x, seen = flags(), list[float]()
    known = solved(drawn(150, D), x)

    def tick(share: float) -> bool:
        seen.append(share)
        return share < 0.5

    stopped = smoothest(known.x, known.free, SHAPE, tick=tick)
    assert seen == sorted(seen)
    assert 0.5 <= seen[-1] < 1
    assert float((known.free((stopped - x)[None])[0] - (stopped - x)).abs().max()) < 1e-9
    assert torch.equal(smoothest(known.x, known.free, SHAPE, tick=lambda share: False), known.x)


def test_what_is_no_picture_or_no_box_is_refused() -> None:
    x = flags()
    with pytest.raises(ValueError, match="finite numbers"):
        smoothest(x[1:], lambda v: v, SHAPE)
    with pytest.raises(ValueError, match="finite numbers"):
        smoothest(x / 0, lambda v: v, SHAPE)
    with pytest.raises(ValueError, match="low < high"):
        smoothest(x, lambda v: v, SHAPE, (1.0, 1.0))
    with pytest.raises(ValueError, match="not finite at the start"):
        smoothest_root(lambda v: v.log(), -x, SHAPE)


@pytest.mark.parametrize("gain", [0.05, 0.3])
def test_a_nonlinear_system_from_grey(gain: float) -> None:
    x, A = flags(), gain * drawn(240, D)
    b = torch.tanh(A @ x)
    found = smoothest_root(lambda v: torch.tanh(A @ v) - b, torch.full_like(x, 0.5), SHAPE)
    assert float((torch.tanh(A @ found) - b).abs().max()) < 1e-9
    assert float((found - x).abs().max()) < 0.02


def test_dependent_and_blind_equations_do_no_harm() -> None:
    x, A = flags(), 0.1 * drawn(200, D)
    A = torch.cat([A, A, torch.zeros(3, D).double(), 1e-9 * drawn(5, D, seed=5)])
    b = torch.tanh(A @ x)
    found = smoothest_root(lambda v: torch.tanh(A @ v) - b, torch.full_like(x, 0.5), SHAPE)
    assert float((torch.tanh(A @ found) - b).abs().max()) < 1e-8
    assert float((found - found.clamp(0, 1)).abs().max()) < 0.01
    assert Variation(SHAPE, x)(found) <= 1.01 * Variation(SHAPE, x)(x)


def test_a_start_that_solves_the_equations_is_still_smoothed() -> None:
    x, A = flags(), 0.1 * drawn(200, D)
    start = x + solved(A, x).free(0.1 * drawn(1, D, seed=7))[0]
    found = smoothest_root(lambda v: torch.tanh(A @ v) - torch.tanh(A @ x), start, SHAPE)
    assert Variation(SHAPE, x)(found) < Variation(SHAPE, x)(start) / 2
