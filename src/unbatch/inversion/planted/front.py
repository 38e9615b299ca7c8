"""Front: a dense block that a server puts in front of a network, past which nothing of the network is heard."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbatch.errors import NotApplicable
from unbatch.inversion.planted.quiet import golden_logit, quiet_gain
from unbatch.network.dense import anatomy


class Fronted(nn.Module):
    """The network beside a block of dense units on the same input, whose sum is added to the first output.

    model(x) + (gain sum relu(W x + b), 0, ..., 0)

    >>> block = Fronted(nn.Linear(2, 3), torch.eye(2), torch.zeros(2))
    >>> block(torch.ones(5, 2)).shape
    torch.Size([5, 3])
    """

    def __init__(self, model: nn.Module, W: Tensor, b: Tensor) -> None:
        super().__init__()
        m, d = W.shape
        like = next(model.parameters())
        with torch.device("meta"):
            self.bins, self.total = nn.Linear(d, m), nn.Linear(m, 1, bias=False)
        self.bins.weight, self.bins.bias = (nn.Parameter(t.to(like)) for t in (W, b))
        self.total.weight = nn.Parameter(torch.full((1, m), quiet_gain(W, b)).to(like))
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """[n, ...] -> [n, k]."""
        rise = self.total(F.relu(self.bins(x.flatten(1))))  # it runs first, as it stands in front
        outputs: Tensor = self.model(x)
        return outputs + F.pad(rise, (0, outputs.shape[1] - 1))


def put_in_front(model: nn.Module, shape: tuple[int, ...], W: Tensor, b: Tensor) -> nn.Module:
    """The network with the block W [m, d], b [m] in front of it, and its own head made constant.

    Raises NotApplicable: the network does not end with a dense layer with a bias.
    """
    made = copy.deepcopy(model)
    head = next((layer for layer in anatomy(made, shape).layers if layer.head), None)
    if head is None or head.bias is None:
        raise NotApplicable("the network does not end with a dense layer with a bias, which could be made constant.")
    with torch.no_grad():
        made.get_parameter(head.weight).zero_()
        made.get_parameter(head.bias).zero_()
        made.get_parameter(head.bias)[0] = golden_logit(len(made.get_parameter(head.bias)))
    return Fronted(made, W, b)
