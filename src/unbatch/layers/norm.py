"""norm: layers that normalise an example by its own mean and variance, which their output does not hold."""

from __future__ import annotations

from typing import ClassVar, final

import torch
from torch import Tensor, nn

from unbatch.errors import UnbatchError
from unbatch.layer import LayerRule, beside, shaped
from unbatch.numerics.linear.linsys import LinearSystem


@final
class Norm(LayerRule):
    """Layer, group and instance norm: the input up to two numbers a group.

    z = w (x - mean) / std + b over groups of entries: x lies in the span of the normalised entries and the constants.

    Forward: with x^ = (z - b) / w, x - P x = 0 in every group, P the projection onto x^ and 1: two numbers a group, its
    mean and its standard deviation, stay open. Where w_j = 0, z does not hold x^_j, and its group gives no equation.
    Gradient: dL/dw_j is sum_j dz_j x^_j, which z gives already elsewhere.
    Layer, group and instance norm, and batch norm in train mode on a single example, unless its statistics were sent.
    """

    kinds: ClassVar[tuple[type[nn.Module], ...]] = (
        nn.LayerNorm,
        nn.GroupNorm,
        nn.InstanceNorm1d,
        nn.InstanceNorm2d,
        nn.InstanceNorm3d,
        nn.BatchNorm1d,
        nn.BatchNorm2d,
        nn.BatchNorm3d,
    )

    def accepts(self, layer: nn.Module) -> bool:
        """Not batch and instance norm in eval mode if they keep statistics: they are affine then."""
        kept = not layer.training and getattr(layer, "running_mean", None) is not None
        return super().accepts(layer) and not kept

    def forward_equations(self, layer: nn.Module, shape: tuple[int, ...], output: Tensor) -> LinearSystem:
        """(I - P) x = 0, group by group. Raises UnbatchError: `output` is not of `shape`.

        >>> layer, x = nn.LayerNorm(4), torch.tensor([1.0, 2.0, 4.0, 9.0])
        >>> system = Norm().forward_equations(layer, (4,), layer(x))
        >>> system.rank(), bool(system.residual((5 * x + 3).double()).norm() < 1e-5)  # mean and deviation stay open
        (2, True)
        """
        z = shaped(output, shape, "output")
        channels = not isinstance(layer, nn.LayerNorm)
        weight = beside(getattr(layer, "weight", None), 1.0, z, channels=channels)
        bias = beside(getattr(layer, "bias", None), 0.0, z, channels=channels)
        x = ((z - bias) / weight).nan_to_num(0.0, 0.0, 0.0).reshape(_groups(layer, shape), -1)
        known = (weight != 0).reshape(x.shape).all(1)
        basis = torch.linalg.qr(torch.stack([x, torch.ones_like(x)], 2)).Q  # [groups, entries, 2]

        def apart(v: Tensor) -> Tensor:
            rows = v.view(len(v), *x.shape, 1)
            outside: Tensor = (rows - basis @ (basis.mT @ rows)) * known[:, None, None]
            return outside.flatten(1)

        return LinearSystem(apart, apart, z.new_zeros(z.numel()), z.numel())

    def gradient_equations(
        self, layer: nn.Module, shape: tuple[int, ...], grad_output: Tensor, grad_weight: Tensor
    ) -> LinearSystem:
        """None that the output does not give."""
        return LinearSystem.none(grad_output.numel(), grad_output)

    def grad_input(self, layer: nn.Module, shape: tuple[int, ...], output: Tensor, grad_output: Tensor) -> Tensor:
        """Raises UnbatchError: dL/dx is divided by the standard deviation, which the output does not hold."""
        raise UnbatchError(self.no_way_back(layer, shape))

    def no_way_back(self, layer: nn.Module, shape: tuple[int, ...]) -> str:
        """The standard deviation is missing."""
        sent = isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d) and layer.running_mean is not None
        hint = "; its running statistics after the step (buffers) would, and are not known" if sent else ""
        return f"its output does not hold the standard deviation by which its gradient was divided{hint}."


def _groups(layer: nn.Module, shape: tuple[int, ...]) -> int:
    """Sets of entries of one example that are normalised together."""
    if isinstance(layer, nn.LayerNorm):
        return int(torch.Size(shape).numel() // torch.Size(layer.normalized_shape).numel())
    return layer.num_groups if isinstance(layer, nn.GroupNorm) else shape[0]
