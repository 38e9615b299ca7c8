"""Layer rules against autograd: the true input satisfies the equations, and they give it back where rank allows."""

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor, nn

from unbatch.layer import LayerRule
from unbatch.layers.linear import Linear
from unbatch.testing import check_layer_rule


def drawn(seed: int, d: int, m: int, bias: bool, *, double: bool = True) -> tuple[nn.Linear, Tensor, Tensor]:
    """A layer, one input [d] and a gradient with respect to its output [m]."""
    rng = torch.Generator().manual_seed(seed)
    layer = nn.Linear(d, m, bias=bias, device="meta").to_empty(device="cpu")
    for parameter in layer.parameters():
        nn.init.normal_(parameter, generator=rng)
    dtype = torch.float64 if double else torch.float32
    return layer.to(dtype), torch.randn(d, generator=rng).to(dtype), torch.randn(m, generator=rng).to(dtype)


SHAPES = {"seed": st.integers(0, 10**6), "d": st.integers(1, 12), "m": st.integers(1, 12), "bias": st.booleans()}


@hypothesis_settings(deadline=None)
@given(**SHAPES)
def test_linear_equations_hold_and_recover(seed: int, d: int, m: int, bias: bool) -> None:
    layer, x, dz = drawn(seed, d, m, bias)
    (dW,) = torch.autograd.grad(layer(x) @ dz, layer.weight)
    forward = Linear().forward_equations(layer, layer(x))
    backward = Linear().gradient_equations(layer, dz, dW)
    for system in (forward, backward, forward + backward):
        assert system.A.shape[1] == d
        assert torch.allclose(system.A @ x, system.b, rtol=1e-9, atol=1e-9)
    found, rank = backward.solve()
    assert rank == d
    assert torch.allclose(found, x, rtol=1e-9, atol=1e-9)
    found, rank = forward.solve()
    assert rank == min(m, d)
    recovered = bool((found - x).norm() < 1e-6 * (1 + x.norm()))
    assert recovered or m < d or float(torch.linalg.cond(layer.weight.detach())) > 1e8
    if m < d:  # the part of x that no row of W sees is gone, and nothing is put in its place
        seen = torch.linalg.pinv(layer.weight.detach()) @ (layer.weight.detach() @ x)
        assert torch.allclose(found, seen, rtol=1e-6, atol=1e-6)
    check_layer_rule(Linear(), layer, x[None])


@hypothesis_settings(deadline=None)
@given(**SHAPES)
def test_linear_gradient_equations_are_the_least_squares_of_all_rows(seed: int, d: int, m: int, bias: bool) -> None:
    layer, x, dz = drawn(seed, d, m, bias)
    noisy = torch.outer(dz, x) + torch.randn(m, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    every = torch.kron(dz[:, None], torch.eye(d, dtype=torch.float64))
    expected = torch.linalg.lstsq(every, noisy.flatten()[:, None]).solution.flatten()
    assert torch.allclose(Linear().gradient_equations(layer, dz, noisy).solve()[0], expected, rtol=1e-7, atol=1e-9)


def test_linear_systems_are_in_float64_and_hold_no_graph() -> None:
    layer, x, dz = drawn(0, 3, 4, True, double=False)
    (dW,) = torch.autograd.grad(layer(x) @ dz, layer.weight)
    for system in (Linear().forward_equations(layer, layer(x)), Linear().gradient_equations(layer, dz, dW)):
        assert system.A.dtype == system.b.dtype == torch.float64
        assert not system.A.requires_grad
        assert not system.b.requires_grad
        assert torch.allclose(system.solve()[0], x.double(), atol=1e-5)


def test_a_dead_output_gives_no_gradient_equation() -> None:
    layer, _, dz = drawn(0, 3, 4, True)
    found, rank = Linear().gradient_equations(layer, 0 * dz, torch.zeros(4, 3)).solve()
    assert rank == 0
    assert not found.any()


def test_linear_refuses_what_is_no_single_example() -> None:
    layer, x, dz = drawn(0, 3, 4, True)
    with pytest.raises(ValueError, match="output has shape"):
        Linear().forward_equations(layer, layer(torch.stack([x, x])))
    with pytest.raises(ValueError, match="grad_output has shape"):
        Linear().gradient_equations(layer, dz[:3], torch.zeros(4, 3))
    with pytest.raises(ValueError, match="grad_weight has shape"):
        Linear().gradient_equations(layer, dz, torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"nn\.Linear, not ReLU"):
        Linear().forward_equations(nn.ReLU(), dz)


def test_linear_is_found_as_a_plugin() -> None:
    assert LayerRule.find("linear") is Linear
    assert Linear.kinds == (nn.Linear,)
