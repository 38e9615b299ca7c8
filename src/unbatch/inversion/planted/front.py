"""Front: a dense block that a server puts in front of a network, past which nothing of the network is heard."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbatch.errors import NotApplicable
from unbatch.inversion.planted.quiet import dense_layers, golden_logit, quiet_gain

OFF = -1e30  # a bias with which no input makes a unit fire


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


class FrontedForEach(Fronted):
    """A `Fronted` network with as many units for each client of a sum; what each receives has only its own switched on.

    >>> block = FrontedForEach(nn.Linear(2, 3), torch.eye(2), torch.zeros(2), clients=2)
    >>> block.for_client(1).bins.bias.tolist()
    [-1.0000000150474662e+30, 0.0]
    """

    def __init__(self, model: nn.Module, W: Tensor, b: Tensor, clients: int) -> None:
        super().__init__(model, W, b)
        self.clients = clients

    def for_client(self, number: int) -> nn.Module:
        """The network that the client of that number receives."""
        other = copy.copy(self)
        other._modules = dict(self._modules)
        own = torch.arange(len(self.bins.bias)).tensor_split(self.clients)[number]
        off = torch.full_like(self.bins.bias, OFF)
        off[own] = self.bins.bias.detach()[own]
        with torch.device("meta"):
            other.bins = nn.Linear(self.bins.in_features, len(off))
        other.bins.weight, other.bins.bias = self.bins.weight, nn.Parameter(off)
        other.bins.train(self.bins.training)
        return other


def put_in_front(
    model: nn.Module, shape: tuple[int, ...], W: Tensor, b: Tensor, clients: int | None = None
) -> nn.Module:
    """The network with the block W [m, d], b [m] in front of it, and its own head made constant.

    With `clients` the units are dealt to them in equal shares, and each receives a model in which only its own are on.

    Raises NotApplicable: the network does not end with a dense layer with a bias.
    """
    made = copy.deepcopy(model)
    head = next((layer for layer in dense_layers(made, shape) if layer.head), None)
    if head is None or head.bias is None:
        raise NotApplicable("the network does not end with a dense layer with a bias, which could be made constant.")
    with torch.no_grad():
        made.get_parameter(head.weight).zero_()
        made.get_parameter(head.bias).zero_()
        made.get_parameter(head.bias)[0] = golden_logit(len(made.get_parameter(head.bias)))
    return Fronted(made, W, b) if clients is None else FrontedForEach(made, W, b, clients)
