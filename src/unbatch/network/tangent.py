"""Tangent: a network as a linear function of its parameters, around those that it has."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp

from unbatch.network.dense import in_mode


@dataclass(frozen=True, eq=False)
class TangentMap:
    """The derivative J of a model's outputs on some inputs with respect to its parameters, never formed as a whole.

    >>> model = nn.Linear(2, 1, bias=False).double()
    >>> tangent = TangentMap.of(model, torch.tensor([[1.0, 0.0], [1.0, 2.0]]).double())
    >>> tangent.kernel()  # J J^T, here the inputs' products
    tensor([[1., 1.],
            [1., 5.]], dtype=torch.float64)
    >>> tangent.pulled(torch.tensor([[2.0], [1.0]]).double())["weight"]
    tensor([[3., 2.]], dtype=torch.float64)
    """

    model: nn.Module
    inputs: Tensor
    values: Mapping[str, Tensor]  # of the parameters that move
    outputs: Tensor  # [n, k] at these parameters

    @classmethod
    def of(cls, model: nn.Module, inputs: Tensor, names: Collection[str] | None = None) -> TangentMap:
        """The derivative at the model's own parameters, in evaluation mode; of all that are trained, or of those named."""
        held = dict(model.named_parameters())
        wanted = [name for name, p in held.items() if p.requires_grad] if names is None else list(names)
        with torch.no_grad(), in_mode(model, "eval"):
            outputs = model(inputs)
        return cls(model, inputs, {name: held[name].detach() for name in wanted}, outputs)

    def _run(self, values: Mapping[str, Tensor]) -> Tensor:
        with in_mode(self.model, "eval"):
            found: Tensor = functional_call(self.model, dict(values), (self.inputs,))
        return found

    def pulled(self, duals: Tensor) -> dict[str, Tensor]:
        """J^T a: the sum of the outputs' gradients, each times its number in `duals` [n, k]."""
        pull = vjp(self._run, dict(self.values))[1]
        found: tuple[dict[str, Tensor]] = pull(duals.to(self.outputs).view_as(self.outputs))
        return {name: g.detach() for name, g in found[0].items()}

    def pushed(self, change: Mapping[str, Tensor]) -> Tensor:
        """J d: by how much the outputs [n, k] change with the parameters, to first order."""
        moved = {name: change[name].to(p) for name, p in self.values.items()}
        found: Tensor = jvp(self._run, (dict(self.values),), (moved,))[1]
        return found.detach()

    def kernel(self) -> Tensor:
        """J J^T [n k, n k], the tangent kernel; one row at a time."""
        count = self.outputs.numel()
        units = torch.eye(count).to(self.outputs)
        rows = [self.pushed(self.pulled(unit)).flatten() for unit in units]
        return torch.stack(rows)
