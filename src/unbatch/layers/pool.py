"""pool: max pooling, whose output is the largest entry of each window and says nothing linear of the others."""

from __future__ import annotations

from typing import ClassVar, final

import torch
from torch import Tensor, nn

from unbatch.layer import LayerRule
from unbatch.numerics.linsys import LinearSystem


@final
class MaxPool(LayerRule):
    """z = max over a window of x: which entry is the largest cannot be read off z, so there is no linear equation.

    Windows of one entry are a selection: x_j = z_j. Average pooling is affine and has its rule there.
    """

    kinds: ClassVar[tuple[type[nn.Module], ...]] = (
        nn.MaxPool1d,
        nn.MaxPool2d,
        nn.AdaptiveMaxPool1d,
        nn.AdaptiveMaxPool2d,
    )

    def forward_equations(self, layer: nn.Module, shape: tuple[int, ...], output: Tensor) -> LinearSystem:
        """Equations for the windows of one entry alone."""
        z = output.detach().double().flatten()
        at = torch.arange(int(torch.Size(shape).numel()), dtype=z.dtype, device=z.device).view(1, *shape)
        top, bottom = layer(at).flatten(), -layer(-at).flatten()  # the last and the first entry of each window
        alone = (top == bottom).nonzero()[:, 0]
        return LinearSystem.some(top[alone].long(), z[alone], at.numel())

    def gradient_equations(
        self, layer: nn.Module, shape: tuple[int, ...], grad_output: Tensor, grad_weight: Tensor
    ) -> LinearSystem:
        """None: a pooling has no weight."""
        dz = grad_output.detach().double()
        entries = int(torch.Size(shape).numel())
        return LinearSystem.some(torch.zeros(0, dtype=torch.long, device=dz.device), dz.new_zeros(0), entries)
