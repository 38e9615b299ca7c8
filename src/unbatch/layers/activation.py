"""activation: the numbers that an elementwise activation lets through, inverted where it rises."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from unbatch.errors import UnbatchError
from unbatch.layer import LayerRule, shaped
from unbatch.numerics.linear.linsys import LinearSystem

FARTHEST_INPUT = 1e3  # one beyond it is not looked for
INVERSE_HALVINGS = 80  # of an interval of that length, to the last digit
INPUT_ERROR = 1e-4  # relative or below 1: what the output's own rounding may have caused


@final
class Activation(LayerRule):
    """Activations that work entry by entry: the input is read off the output wherever only one gives it.

    z = s(x), entry by entry: x_j = s^-1(z_j) wherever s rises and x_j alone gives z_j.

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
        """x_j = s^-1(z_j) for the entries of `output` z that have one input. Raises UnbatchError: z is not of `shape`.

        >>> Activation().forward_equations(nn.ReLU(), (3,), torch.tensor([0.0, 2.0, 0.0])).matrix().tolist()
        [[0.0, 1.0, 0.0]]
        """
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

        Raises UnbatchError: an entry of `output` with a gradient has two inputs, of different slopes.
        """
        _, sure, slope = _inverted(layer, shape, output)
        dz = shaped(grad_output, shape, "grad_output")
        if isinstance(layer, _TURNS) and bool((~sure & (dz != 0)).any()):
            raise UnbatchError(
                f"{int((~sure).sum()):,} of {dz.numel():,} outputs are below 0, where the activation falls and rises: they "
                "have two inputs."
            )
        return dz * slope * sure

    def settled(self, layer: nn.Module, outputs: Sequence[Tensor], error: float) -> list[Tensor]:
        """Computed outputs [*shape], all nearly the same, in which what lies at a flat end of the range lies there exactly.

        Those are the entries of the first that an error of that size cannot tell from an end, or whose slope is so small
        that it moves the input by more than 1e-4, relative or below 1, and a hundred times itself: the same in all.
        """
        z = outputs[0].double()
        s = _Elementwise(layer, z)
        low, high = _ends(layer, z)
        x = s.inverse(z, low, high)
        bottom, top = s(low), s(high)
        lost = (z < bottom + error) | (z > top - error)
        lost |= error > max(INPUT_ERROR, 100 * error) * s.slope(x) * x.abs().clamp_min(1.0)
        if isinstance(layer, _TURNS):
            lost &= z > -error  # a negative output is no end: it has two inputs
        end = torch.where(z - bottom < top - z, bottom, top)
        return [torch.where(lost, end, output.double()) for output in outputs]


def _inverted(layer: nn.Module, shape: tuple[int, ...], output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x = s^-1(z), where it is sure, and s'(x), each [*shape]."""
    z, eps = shaped(output, shape, "output"), torch.finfo(output.dtype).eps
    s = _Elementwise(layer, z)
    low, high = _ends(layer, z)
    x = s.inverse(z, low, high)
    slope = s.slope(x)
    return x, (z > s(low)) & (z < s(high)) & (eps * z.abs() < INPUT_ERROR * slope * x.abs().clamp_min(1.0)), slope


def _ends(layer: nn.Module, z: Tensor) -> tuple[Tensor, Tensor]:
    """Between which inputs s is inverted; the turning ones fall first below 0, or have no slope there."""
    return torch.full_like(z, 0.0 if isinstance(layer, _TURNS) else -FARTHEST_INPUT), torch.full_like(z, FARTHEST_INPUT)


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
        for _ in range(INVERSE_HALVINGS):
            middle = (low + high) / 2
            short = self(middle) < z
            low, high = torch.where(short, middle, low), torch.where(short, high, middle)
        return (low + high) / 2


_TURNS = (nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish)
