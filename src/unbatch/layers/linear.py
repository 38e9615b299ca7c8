"""linear: what a dense layer's output and gradient say of its input."""

from __future__ import annotations

from typing import ClassVar, final

import torch
from torch import Tensor, nn

from unbatch.layer import LayerRule
from unbatch.numerics.linsys import LinearSystem


@final
class Linear(LayerRule):
    """z = W x + b of one example x [d], with z [m].

    Forward: W x = z - b, m equations of rank W. Gradient: dL/dW = dz x^T, so dz_j x = (dL/dW)_j for every j; weighted by
    dz / |dz| and added up over j, which keeps their least-squares solution, these are d equations |dz| x = dL/dW^T dz /
    |dz|, of rank d unless dz = 0.
    """

    kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)

    def forward_equations(self, layer: nn.Module, output: Tensor) -> LinearSystem:
        """W x = z - b for `output` z [m]; the system is in float64. Raises ValueError: z is not of that shape."""
        weight, bias = _parameters(layer)
        z = _shaped(output, (len(weight),), "output")
        return LinearSystem(weight, z if bias is None else z - bias)

    def gradient_equations(self, layer: nn.Module, grad_output: Tensor, grad_weight: Tensor) -> LinearSystem:
        """|dz| x = dL/dW^T dz / |dz| for `grad_output` dz [m], `grad_weight` [m, d]. Raises ValueError: other shapes."""
        weight, _ = _parameters(layer)
        m, d = weight.shape
        dz = _shaped(grad_output, (m,), "grad_output")
        rows = _shaped(grad_weight, (m, d), "grad_weight")
        size = torch.linalg.vector_norm(dz)
        unit = dz / size if size > 0 else dz
        return LinearSystem(size * torch.eye(d, dtype=dz.dtype, device=dz.device), rows.T @ unit)


def _parameters(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    if not isinstance(layer, nn.Linear):
        raise ValueError(f"the rule is for nn.Linear, not {type(layer).__name__}; find the rule by the layer's type.")
    return layer.weight.detach().double(), None if layer.bias is None else layer.bias.detach().double()


def _shaped(tensor: Tensor, shape: tuple[int, ...], name: str) -> Tensor:
    """One example's tensor in float64, without the batch's side of 1."""
    if tuple(tensor.shape) not in (shape, (1, *shape)):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; for one example of this layer it has {shape}.")
    return tensor.detach().double().reshape(shape)
