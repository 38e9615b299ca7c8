"""max-pool: max pooling, whose output is the largest entry of each window and says nothing linear of the others."""

from __future__ import annotations

from typing import ClassVar, final

import torch
from torch import Tensor, nn

from unbatch.errors import UnbatchError
from unbatch.layer import LayerRule, shaped
from unbatch.numerics.linear.linsys import LinearSystem


@final
class MaxPool(LayerRule):
    """Max pooling, whose output does not say which entry was the largest: no equation.

    z = max over a window of x: which entry is the largest cannot be read off z, so there is no linear equation.

    Windows of one entry are a selection: x_j = z_j. Average pooling is affine and has its rule there.
    """

    kinds: ClassVar[tuple[type[nn.Module], ...]] = (
        nn.MaxPool1d,
        nn.MaxPool2d,
        nn.MaxPool3d,
        nn.AdaptiveMaxPool1d,
        nn.AdaptiveMaxPool2d,
        nn.AdaptiveMaxPool3d,
    )

    def accepts(self, layer: nn.Module) -> bool:
        """Not with the indices beside the output."""
        return super().accepts(layer) and not layer.return_indices

    def forward_equations(self, layer: nn.Module, shape: tuple[int, ...], output: Tensor) -> LinearSystem:
        """Equations for the windows of one entry alone. Raises ValueError: `output` is not the layer's."""
        entries = int(torch.Size(shape).numel())
        at = torch.arange(entries, dtype=torch.float64, device=output.device).view(1, *shape)
        last, first = layer(at), -layer(-at)  # numbers of the last and of the first entry of each window
        z = shaped(output, tuple(last.shape[1:]), "output").flatten()
        alone = (last == first).flatten().nonzero()[:, 0]
        return LinearSystem.some(last.flatten()[alone].long(), z[alone], entries)

    def gradient_equations(
        self, layer: nn.Module, shape: tuple[int, ...], grad_output: Tensor, grad_weight: Tensor
    ) -> LinearSystem:
        """None: a pooling has no weight."""
        return LinearSystem.none(int(torch.Size(shape).numel()), grad_output)

    def grad_input(self, layer: nn.Module, shape: tuple[int, ...], output: Tensor, grad_output: Tensor) -> Tensor:
        """dz at the entries that are read. Raises ValueError: a window has several, and which is the largest is open."""
        read = self.forward_equations(layer, shape, grad_output)
        if read.equations < grad_output.numel():
            raise UnbatchError("which entry of a window was the largest cannot be read off its output.")
        return read.pull(read.b[None]).view(shape)
