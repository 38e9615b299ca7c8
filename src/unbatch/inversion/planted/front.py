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
        return _only_own(self, "bins", number)


class FrontedStill(nn.Module):
    """A `FrontedForEach` network in which local training moves nothing that is heard, while its parameters take all down.

    What is planted is frozen: rows and thresholds W x + b, the gain, and outputs of which the first has the golden share.
    Parameters stand beside and are 0: (W + dW) x + b + db, gain (1 + dV). Steps change them by far less than what they
    are added to can show, and from 0 they are kept to their last digit. The network itself is not heard.

    >>> block = FrontedStill(nn.Linear(2, 3), torch.eye(2), torch.zeros(2), clients=2, outputs=3)
    >>> block(torch.ones(5, 2)).shape, block.bins.weight.count_nonzero().item(), block.planted.weight.requires_grad
    (torch.Size([5, 3]), 0, False)
    """

    constant: Tensor

    def __init__(self, model: nn.Module, W: Tensor, b: Tensor, clients: int, outputs: int) -> None:
        super().__init__()
        m, d = W.shape
        like = next(model.parameters())
        with torch.device("meta"):
            self.planted, self.bins = nn.Linear(d, m), nn.Linear(d, m)
            self.total = nn.Linear(m, 1, bias=False)
        self.planted.weight, self.planted.bias = (nn.Parameter(t.to(like), requires_grad=False) for t in (W, b))
        self.bins.weight, self.bins.bias = (nn.Parameter(torch.zeros_like(t).to(like)) for t in (W, b))
        self.total.weight = nn.Parameter(torch.zeros(1, m).to(like))
        self.register_buffer("constant", F.pad(torch.tensor([golden_logit(outputs)]), (0, outputs - 1)).to(like))
        self.gain, self.clients, self.model = quiet_gain(W, b), clients, model

    def forward(self, x: Tensor) -> Tensor:
        """[n, ...] -> [n, k]."""
        flat = x.flatten(1)
        units = F.relu(self.planted(flat) + self.bins(flat))
        rise = self.gain * (units.sum(1, keepdim=True) + self.total(units))
        unheard: Tensor = 0.0 * self.model(x)
        return unheard + self.constant + F.pad(rise, (0, len(self.constant) - 1))

    def for_client(self, number: int) -> nn.Module:
        """The network that the client of that number receives."""
        return _only_own(self, "planted", number)

    def moving(self) -> FrontedForEach:
        """The same network with the planted numbers as parameters, as clients who send one gradient would receive it."""
        W, b = (p.detach() for p in (self.planted.weight, self.planted.bias))
        made = FrontedForEach(_Constant(self.constant), W, b, self.clients)
        with torch.no_grad():
            made.total.weight.fill_(self.gain)
        return made.train(self.training)


def _only_own(model: FrontedForEach | FrontedStill, name: str, number: int) -> nn.Module:
    """A model with the same parameters, but for the biases of the layer `name`: those of other clients' units are off."""
    other = copy.copy(model)
    other._modules = dict(model._modules)
    planted = model.get_submodule(name)
    weight, bias = planted.get_parameter("weight"), planted.get_parameter("bias")
    own = torch.arange(len(bias)).tensor_split(model.clients)[number]
    off = torch.full_like(bias, OFF)
    off[own] = bias.detach()[own]
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], len(off))
    layer.weight, layer.bias = weight, nn.Parameter(off, requires_grad=bias.requires_grad)
    other._modules[name] = layer.train(planted.training)
    return other


class _Constant(nn.Module):
    """A network with the same outputs [k] for all examples."""

    def __init__(self, outputs: Tensor) -> None:
        super().__init__()
        self.outputs = nn.Parameter(outputs.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.outputs.expand(len(x), -1)


def put_in_front(
    model: nn.Module, shape: tuple[int, ...], W: Tensor, b: Tensor, clients: int | None = None, still: bool = False
) -> nn.Module:
    """The network with the block W [m, d], b [m] in front of it, and its own head made constant.

    With `clients` the units are dealt to them in equal shares, and each receives a model in which only its own are on;
    `still` asks for one that local training does not move.

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
    if still:
        return FrontedStill(made, W, b, clients or 1, len(made.get_parameter(head.bias)))
    return Fronted(made, W, b) if clients is None else FrontedForEach(made, W, b, clients)
