"""Layer rule: what one layer's output and gradient say of its input, as linear equations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor, nn

from unbatch.numerics.linsys import LinearSystem
from unbatch.plugin import Plugin


class LayerRule(Plugin, ABC):
    """Equations on the input x of one layer, for a single example.

    The forward equations (weight constraint) hold x to a known output; the gradient equations (gradient constraint) hold
    it to a known gradient of the layer's weight, given the gradient with respect to its output.
    Source: Zhu and Blaschko, R-GAP, ICLR 2021; Chen and Campbell, 2021.
    """

    kind: ClassVar[str] = "layer rule"
    folder: ClassVar[str] = "layers"

    kinds: ClassVar[tuple[type[nn.Module], ...]]

    @abstractmethod
    def forward_equations(self, layer: nn.Module, output: Tensor) -> LinearSystem:
        """A x = b that `output` imposes."""

    @abstractmethod
    def gradient_equations(self, layer: nn.Module, grad_output: Tensor, grad_weight: Tensor) -> LinearSystem:
        """A x = b that `grad_weight` imposes, given `grad_output`."""
