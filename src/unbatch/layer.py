"""Layer rule: what one layer's output and gradient say of its input, as linear equations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from unbatch.errors import UnbatchError
from unbatch.numerics.linear.linsys import LinearSystem
from unbatch.plugin import Plugin


class LayerRule(Plugin, ABC):
    """How one kind of layer is read backward: what its output and its gradient say of its input, as linear equations.

    All of it is for a single example, whose input is x [*shape]. The forward equations (weight constraint) hold x to a
    known output; the gradient equations (gradient constraint) hold it to a known gradient of the layer's weight, given the
    gradient with respect to its output. Both are in float64; a layer is passed in the mode in which it ran.
    Source: Zhu and Blaschko, R-GAP, ICLR 2021; Chen and Campbell, 2021.
    """

    kind: ClassVar[str] = "layer rule"
    folder: ClassVar[str] = "layers"

    kinds: ClassVar[tuple[type[nn.Module], ...]]
    reads_output: ClassVar[bool] = False  # whether `grad_input`, of a layer that is no activation, needs its values

    @abstractmethod
    def forward_equations(self, layer: nn.Module, shape: tuple[int, ...], output: Tensor) -> LinearSystem:
        """A x = b that `output` imposes. Raises UnbatchError: the layer does not give such an output."""

    @abstractmethod
    def gradient_equations(
        self, layer: nn.Module, shape: tuple[int, ...], grad_output: Tensor, grad_weight: Tensor
    ) -> LinearSystem:
        """A x = b that `grad_weight` imposes, given `grad_output`. Raises UnbatchError: the shapes are not the layer's."""

    @abstractmethod
    def grad_input(self, layer: nn.Module, shape: tuple[int, ...], output: Tensor, grad_output: Tensor) -> Tensor:
        """dL/dx [*shape], given the output and dL/d(output). Raises UnbatchError: they do not tell it."""

    def no_way_back(self, layer: nn.Module, shape: tuple[int, ...]) -> str:
        """Why `grad_input` refuses this layer whatever its output is, in words; empty where it does not, or it depends.

        A reading backward is planned by it: such a layer is read with those around it, by Gauss and Newton.
        """
        return ""

    def weights(self, layer: nn.Module) -> tuple[str, ...]:
        """Names of the parameters whose gradients, flat and one after the other, are the `grad_weight` of its equations."""
        return ("weight",) if isinstance(getattr(layer, "weight", None), Tensor) else ()

    def accepts(self, layer: nn.Module) -> bool:
        """Whether the rule is for this layer, as it is configured: of one of the kinds themselves, weights its own."""
        return type(layer) in self.kinds and not parametrize.is_parametrized(layer)


def shaped(tensor: Tensor, shape: tuple[int, ...], name: str, *, batch: bool = True) -> Tensor:
    """A tensor in float64 and of that shape; with `batch` it may have a first side of 1, for the one example.

    Raises UnbatchError: it has another shape; the message calls it by `name`.

    >>> shaped(torch.ones(1, 2), (2,), "output")
    tensor([1., 1.], dtype=torch.float64)
    """
    if tuple(tensor.shape) not in ((tuple(shape), (1, *shape)) if batch else (tuple(shape),)):
        raise UnbatchError(
            f"{name} has shape {tuple(tensor.shape)}; for one example of this layer it has {tuple(shape)}."
        )
    return tensor.detach().double().reshape(shape)


def beside(own: Tensor | None, default: float, z: Tensor, *, channels: bool = True) -> Tensor:
    """A layer's parameter beside every entry of z [c, ...]: one number a channel, or its last sides; or the default.

    >>> beside(torch.tensor([1.0, 2.0]), 0.0, torch.zeros(2, 3)).tolist()
    [[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]]
    """
    if own is None:
        return torch.full_like(z, default)
    side = own.detach().to(z)
    return (side.view(-1, *[1] * (z.ndim - 1)) if channels else side).expand_as(z)


def rule_for(layer: nn.Module) -> LayerRule | None:
    """The rule by which a layer is read backward, or None.

    >>> [rule and rule.name for rule in map(rule_for, (nn.Linear(2, 2), nn.ReLU(), nn.LayerNorm(2), nn.GLU()))]
    ['affine', 'activation', 'norm', None]
    """
    return next((rule for found in LayerRule.find().values() if (rule := found()).accepts(layer)), None)
