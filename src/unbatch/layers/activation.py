"""activation: the numbers that an elementwise activation lets through, inverted where it rises."""

from __future__ import annotations

from typing import ClassVar, final

import torch
from torch import Tensor, nn

from unbatch.layer import LayerRule
from unbatch.numerics.linsys import LinearSystem

FAR = 1e3  # an input beyond it is not looked for
HALVINGS = 80  # of an interval of that length, to the last digit
FLAT = 1e-12  # slope below which the output says nothing of the input in float64
_RISES = {nn.ReLU: (0.0, FAR), nn.GELU: (0.0, FAR), nn.SiLU: (0.0, FAR), nn.Mish: (0.0, FAR), nn.ReLU6: (0.0, 6.0)}
_RISES |= {nn.Hardtanh: (-1.0, 1.0), nn.Hardsigmoid: (-3.0, 3.0), nn.Hardswish: (0.0, FAR)}


@final
class Activation(LayerRule):
    """z = s(x), entry by entry: x_j = s^-1(z_j) wherever s rises and x_j alone gives z_j.

    Everywhere for leaky relu, elu, softplus, sigmoid and tanh; where z > 0 for relu, gelu, silu, mish and hardswish (a
    negative output has two inputs, or none of its own); inside the flat parts of hardtanh, relu6 and hardsigmoid.
    Saturated entries (slope below 1e-12) give no equation. No weight, so no gradient equations.
    """

    kinds: ClassVar[tuple[type[nn.Module], ...]] = (
        nn.ReLU,
        nn.ReLU6,
        nn.LeakyReLU,
        nn.ELU,
        nn.CELU,
        nn.SELU,
        nn.GELU,
        nn.SiLU,
        nn.Mish,
        nn.Softplus,
        nn.Sigmoid,
        nn.Tanh,
        nn.Hardtanh,
        nn.Hardsigmoid,
        nn.Hardswish,
    )

    def forward_equations(self, layer: nn.Module, shape: tuple[int, ...], output: Tensor) -> LinearSystem:
        """x_j = s^-1(z_j) for the entries of `output` z that have one input."""
        z = output.detach().double().flatten()
        low, high = _RISES.get(type(layer), (-FAR, FAR))
        if isinstance(layer, nn.Hardtanh) and not isinstance(layer, nn.ReLU6):
            low, high = float(layer.min_val), float(layer.max_val)
        ends = _apply(layer, torch.tensor([low, high], dtype=z.dtype, device=z.device))
        inside = ((z > ends[0]) & (z < ends[1])).nonzero()[:, 0]
        x = _inverse(layer, z[inside], low, high)
        slope = torch.func.vmap(torch.func.grad(lambda t: _apply(layer, t[None])[0]))(x) if len(x) else x
        sure = slope.abs() > FLAT
        return LinearSystem.some(inside[sure], x[sure], z.numel())

    def gradient_equations(
        self, layer: nn.Module, shape: tuple[int, ...], grad_output: Tensor, grad_weight: Tensor
    ) -> LinearSystem:
        """None: an activation has no weight."""
        dz = grad_output.detach().double().flatten()
        return LinearSystem.some(torch.zeros(0, dtype=torch.long, device=dz.device), dz.new_zeros(0), dz.numel())


def _apply(layer: nn.Module, x: Tensor) -> Tensor:
    if getattr(layer, "inplace", False):
        x = x.clone()
    found: Tensor = layer(x)
    return found


def _inverse(layer: nn.Module, z: Tensor, low: float, high: float) -> Tensor:
    """The x between low and high with s(x) = z: halved down to rounding."""
    below, above = torch.full_like(z, low), torch.full_like(z, high)
    for _ in range(HALVINGS):
        middle = (below + above) / 2
        short = _apply(layer, middle) < z
        below, above = torch.where(short, middle, below), torch.where(short, above, middle)
    return (below + above) / 2
