"""activation: the numbers that an elementwise activation lets through, inverted where it rises."""

from __future__ import annotations

import copy
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from unbatch.layer import LayerRule, shaped
from unbatch.numerics.linsys import LinearSystem

FAR = 1e3  # an input beyond it is not looked for
HALVINGS = 80  # of an interval of that length, to the last digit
SURE = 1e-4  # error, relative or below 1, that the output's own rounding may have caused in an input


@final
class Activation(LayerRule):
    """z = s(x), entry by entry: x_j = s^-1(z_j) wherever s rises and x_j alone gives z_j.

    For |x| up to 1000. Everywhere for leaky relu, elu, softplus, sigmoid and tanh; where z > 0 for relu, gelu, silu, mish
    and hardswish (a negative output has two inputs, or none of its own); between the flat parts of hardtanh, relu6 and
    hardsigmoid. Saturated entries give no equation: those where the rounding of the output, in its own dtype, moves x by
    more than 1e-4. No gradient equations.
    """

    kinds: ClassVar[tuple[type[nn.Module], ...]] = (
        nn.ReLU,
        nn.ReLU6,
        nn.LeakyReLU,
        nn.PReLU,
        nn.ELU,
        nn.CELU,
        nn.SELU,
        nn.GELU,
        nn.SiLU,
        nn.Mish,
        nn.Softplus,
        nn.LogSigmoid,
        nn.Softsign,
        nn.Sigmoid,
        nn.Tanh,
        nn.Hardtanh,
        nn.Hardsigmoid,
        nn.Hardswish,
    )

    def accepts(self, layer: nn.Module) -> bool:
        """No leaky slope below 0, with which it falls; no softplus cut off where it still bends."""
        if isinstance(layer, nn.LeakyReLU) and layer.negative_slope < 0:
            return False
        if isinstance(layer, nn.PReLU) and bool((layer.weight < 0).any()):
            return False
        return super().accepts(layer) and not (isinstance(layer, nn.Softplus) and layer.threshold < 20)

    def forward_equations(self, layer: nn.Module, shape: tuple[int, ...], output: Tensor) -> LinearSystem:
        """x_j = s^-1(z_j) for the entries of `output` z that have one input. Raises ValueError: z is not of `shape`."""
        x, sure, _ = _inverted(layer, shape, output)
        which = sure.flatten().nonzero()[:, 0]
        return LinearSystem.some(which, x.flatten()[which], x.numel())

    def gradient_equations(
        self, layer: nn.Module, shape: tuple[int, ...], grad_output: Tensor, grad_weight: Tensor
    ) -> LinearSystem:
        """None: only prelu has a weight, and its gradient says nothing that z does not."""
        return LinearSystem.none(grad_output.numel(), grad_output)

    def grad_input(self, layer: nn.Module, shape: tuple[int, ...], output: Tensor, grad_output: Tensor) -> Tensor:
        """dz s'(s^-1(z)), and 0 where s is flat.

        Raises ValueError: an entry of `output` with a gradient has two inputs, of different slopes.
        """
        _, sure, slope = _inverted(layer, shape, output)
        dz = shaped(grad_output, shape, "grad_output")
        if isinstance(layer, _TURNS) and bool((~sure & (dz != 0)).any()):
            raise ValueError(
                f"{int((~sure).sum()):,} of {dz.numel():,} outputs are below 0, where the activation falls and rises: they "
                "have two inputs."
            )
        return dz * slope * sure


def _inverted(layer: nn.Module, shape: tuple[int, ...], output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x = s^-1(z), where it is sure, and s'(x), each [*shape].

    Outputs that were computed stray from those that s can give: nothing within three times the farthest is told from an
    end of its range.
    """
    z, eps = shaped(output, shape, "output"), torch.finfo(output.dtype).eps
    s = _Elementwise(layer, z)
    low, high = torch.full_like(z, -FAR), torch.full_like(z, FAR)
    if isinstance(layer, _TURNS):
        low = torch.zeros_like(z)  # below 0 it falls first, or has no slope
        stray = z.new_zeros(())
    else:
        stray = 3 * torch.maximum(s(low) - z, z - s(high)).clamp_min(0).max()
    inside = (z > s(low) + stray) & (z < s(high) - stray)
    x = s.inverse(z, low, high)
    slope = s.slope(x)
    return x, inside & (eps * z.abs() < SURE * slope * x.abs().clamp_min(1.0)), slope


class _Elementwise:
    """s on tensors shaped like one example, in float64 and not in place."""

    def __init__(self, layer: nn.Module, like: Tensor) -> None:
        self.layer = copy.deepcopy(layer).to(like.device, torch.float64)

    def __call__(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x[None].clone())[0]
        return found.detach()

    def slope(self, x: Tensor) -> Tensor:
        live = x.detach().requires_grad_()
        with torch.enable_grad():
            z = self.layer(live[None].clone())
        return torch.autograd.grad(z.sum(), live)[0].abs()

    def inverse(self, z: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """The x between low and high with s(x) = z, halved down to rounding."""
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            short = self(middle) < z
            low, high = torch.where(short, middle, low), torch.where(short, high, middle)
        return (low + high) / 2


_TURNS = (nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish)
