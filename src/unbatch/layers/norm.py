"""norm: layers that normalise an example by its own mean and variance, which their output does not hold."""

from __future__ import annotations

from typing import ClassVar, final

import torch
from torch import Tensor, nn

from unbatch.layer import LayerRule
from unbatch.numerics.linsys import LinearSystem


@final
class Norm(LayerRule):
    """z = w (x - mean) / std + b over groups of entries: x lies in the span of the normalised entries and the constants.

    Forward: with x^ = (z - b) / w, x - P x = 0 in every group, P the projection onto x^ and 1: two numbers a group, its
    mean and its standard deviation, stay open. Gradient: dL/dw_j = dz_j x^_j says nothing of x that z does not.
    Layer, group and instance norm, and batch norm in train mode on a single example. Where statistics were sent, put them
    into the layer and take it in eval mode: it is affine then.
    """

    kinds: ClassVar[tuple[type[nn.Module], ...]] = (
        nn.LayerNorm,
        nn.GroupNorm,
        nn.InstanceNorm1d,
        nn.InstanceNorm2d,
        nn.BatchNorm1d,
        nn.BatchNorm2d,
    )

    def accepts(self, layer: nn.Module) -> bool:
        """Batch norm in train mode, or without statistics, only."""
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            return layer.training or layer.running_mean is None
        return isinstance(layer, self.kinds)

    def forward_equations(self, layer: nn.Module, shape: tuple[int, ...], output: Tensor) -> LinearSystem:
        """(I - P) x = 0, group by group. Raises ValueError: an entry of the weight is 0, which hides what it scales."""
        z = output.detach().double().reshape(shape)
        weight, bias = (getattr(layer, name, None) for name in ("weight", "bias"))
        if weight is not None and bool((weight == 0).any()):
            raise ValueError("an entry of the weight is 0: the output does not hold what it scales.")
        for tensor, undo in ((bias, torch.sub), (weight, torch.div)):
            if tensor is not None:
                side = tensor if isinstance(layer, nn.LayerNorm) else tensor.view(-1, *[1] * (z.ndim - 1))
                z = undo(z, side.detach().to(z))
        groups = _groups(layer, shape)
        x = z.reshape(groups, -1)
        basis = torch.linalg.qr(torch.stack([x, torch.ones_like(x)], 2)).Q  # [groups, entries, 2]

        def apart(v: Tensor) -> Tensor:
            rows = v.view(len(v), groups, -1, 1)
            outside: Tensor = rows - basis @ (basis.mT @ rows)
            return outside.flatten(1)

        return LinearSystem(apart, apart, z.new_zeros(z.numel()), z.numel())

    def gradient_equations(
        self, layer: nn.Module, shape: tuple[int, ...], grad_output: Tensor, grad_weight: Tensor
    ) -> LinearSystem:
        """None that the output does not give."""
        dz = grad_output.detach().double().flatten()
        return LinearSystem.some(torch.zeros(0, dtype=torch.long, device=dz.device), dz.new_zeros(0), dz.numel())


def _groups(layer: nn.Module, shape: tuple[int, ...]) -> int:
    """Sets of entries of one example that are normalised together."""
    if isinstance(layer, nn.LayerNorm):
        return int(torch.Size(shape).numel() // torch.Size(layer.normalized_shape).numel())
    return layer.num_groups if isinstance(layer, nn.GroupNorm) else shape[0]
