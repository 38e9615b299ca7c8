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
        """Equations for the windows of one entry alone. Raises UnbatchError: `output` is not the layer's.

        >>> output = torch.tensor([[7.0, 8.0]])
        >>> MaxPool().forward_equations(nn.MaxPool1d(2), (1, 4), output).equations
        0
        >>> MaxPool().forward_equations(nn.MaxPool1d(1, stride=2), (1, 4), output).matrix().tolist()
        [[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]]
        """
        last, alone = _windows(layer, shape, output.device)
        which = alone.flatten().nonzero()[:, 0]
        z = shaped(output, tuple(last.shape), "output").flatten()
        return LinearSystem.some(last.flatten()[which], z[which], int(torch.Size(shape).numel()))

    def gradient_equations(
        self, layer: nn.Module, shape: tuple[int, ...], grad_output: Tensor, grad_weight: Tensor
    ) -> LinearSystem:
        """None: a pooling has no weight."""
        return LinearSystem.none(int(torch.Size(shape).numel()), grad_output)

    def grad_input(self, layer: nn.Module, shape: tuple[int, ...], output: Tensor, grad_output: Tensor) -> Tensor:
        """dz at the entries that are read. Raises UnbatchError: a window has several, and which is the largest is open."""
        if why := self.no_way_back(layer, shape):
            raise UnbatchError(why)
        read = self.forward_equations(layer, shape, grad_output)
        return read.pull(read.b[None]).view(shape)

    def no_way_back(self, layer: nn.Module, shape: tuple[int, ...]) -> str:
        """A window has several entries."""
        alone = _windows(layer, shape, torch.device("cpu"))[1]
        return "" if bool(alone.all()) else "which entry of a window was the largest cannot be read off its output."


def _windows(layer: nn.Module, shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """The number of the last entry of every window [*after], and whether it is the only one."""
    at = torch.arange(torch.Size(shape).numel(), dtype=torch.float64, device=device).view(1, *shape)
    last, first = layer(at)[0], -layer(-at)[0]
    return last.long(), last == first
