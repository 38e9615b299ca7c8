"""batch-norm: batch norm in train mode whose statistics were sent, which makes it affine in its input."""

from __future__ import annotations

from typing import ClassVar, final

import torch
from torch import Tensor, nn

from unbatch.errors import UnbatchError
from unbatch.layer import LayerRule, beside, shaped
from unbatch.network.batch_norm import KnownBatchNorm
from unbatch.numerics.linear.linsys import LinearSystem, affine


@final
class BatchNorm(LayerRule):
    """Batch norm on one example, its mean and standard deviation known.

    z = w (x - mean) / std + b with known mean and std = sqrt(var + eps), for a batch of one example.

    Forward: w x / std = z - b + w mean / std, entry by entry. Backward, per channel with x^ = (z - b) / w: dL/dx = w / std
    (dz - mean(dz) - x^ mean(dz x^)), since mean and std move with x. Gradient: dL/dw = sum dz x^, which z gives already.
    """

    kinds: ClassVar[tuple[type[nn.Module], ...]] = (KnownBatchNorm,)
    reads_output: ClassVar[bool] = True

    def forward_equations(self, layer: nn.Module, shape: tuple[int, ...], output: Tensor) -> LinearSystem:
        """One equation an entry. Raises UnbatchError: `output` is not of `shape`, or the statistics are of no use.

        >>> none = torch.zeros(1, dtype=torch.float64)
        >>> known = KnownBatchNorm(nn.BatchNorm1d(1, eps=0.0), none + 2, none + 4, (none, none))
        >>> BatchNorm().forward_equations(known, (1, 2), torch.tensor([[0.0, 1.0]])).solve().x.tolist()
        [2.0, 4.0]
        """
        z = shaped(output, shape, "output")
        mean, scale, bias = _parts(layer, z)
        return affine(lambda x: (x - mean) * scale + bias, shape, z)

    def gradient_equations(
        self, layer: nn.Module, shape: tuple[int, ...], grad_output: Tensor, grad_weight: Tensor
    ) -> LinearSystem:
        """None that the output does not give."""
        return LinearSystem.none(grad_output.numel(), grad_output)

    def grad_input(self, layer: nn.Module, shape: tuple[int, ...], output: Tensor, grad_output: Tensor) -> Tensor:
        """As above. Raises UnbatchError: an entry of the output is not known (NaN), or the statistics are of no use."""
        z, dz = shaped(output, shape, "output"), shaped(grad_output, shape, "grad_output")
        _, scale, bias = _parts(layer, z)
        own = layer.weight if isinstance(layer.weight, Tensor) else None
        weight = beside(own, 1.0, z)
        normal = torch.where(weight == 0, 0.0, (z - bias) / weight)
        if bool(normal.isnan().any()):
            raise UnbatchError(
                "what it passes back needs its whole output, and the layers after it, up to the next activation's output, "
                "hide some of that."
            )
        sides = list(range(1, z.ndim))
        mean, slope = dz.mean(sides, keepdim=True), (dz * normal).mean(sides, keepdim=True)
        return scale * (dz - mean - normal * slope)

    def no_way_back(self, layer: nn.Module, shape: tuple[int, ...]) -> str:
        """The statistics are of no use."""
        return layer.flaw if isinstance(layer, KnownBatchNorm) else ""


def _parts(layer: nn.Module, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """mean, w / std and b beside every entry of z."""
    if not isinstance(layer, KnownBatchNorm):
        raise UnbatchError(f"the statistics of a {type(layer).__name__} are not known.")
    if layer.flaw:
        raise UnbatchError(layer.flaw)
    scale = beside(layer.weight, 1.0, z) / beside((layer.var + layer.eps).sqrt(), 1.0, z)
    return beside(layer.mean, 0.0, z), scale, beside(layer.bias, 0.0, z)
