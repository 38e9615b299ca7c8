"""The dense layer that a model's input enters, for a server that chooses its parameters."""

from __future__ import annotations

from torch import nn

from unbatch.errors import NotApplicable


def first_linear(model: nn.Module) -> nn.Linear:
    """The nn.Linear that holds the first matrix among a model's parameters, with a bias.

    Raises NotApplicable: the first layer is of another kind, or has no bias.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> first_linear(model) is model[1]
    True
    """
    first = next((p for p in model.parameters() if p.ndim >= 2), None)
    layer = next((m for m in model.modules() if isinstance(m, nn.Linear) and m.weight is first), None)
    if layer is None:
        raise NotApplicable("the first layer with weights is no dense one (nn.Linear), and rows are planted in that.")
    if layer.bias is None:
        raise NotApplicable("the first dense layer has no bias, by whose gradient that of the weight is divided.")
    return layer
