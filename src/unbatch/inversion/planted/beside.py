"""Beside: rows planted in an adapter beside a frozen dense layer, and one way through the frozen network above it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from unbatch.errors import NotApplicable
from unbatch.inversion.planted.quiet import REACH, STEADY, dense_layers, golden_logit
from unbatch.models.parallel_adapter import ParallelAdapter
from unbatch.network.dense import Dense, in_mode

OPEN = 2.0  # times the most that a unit can be given otherwise, by which an adapter's bias opens or shuts it
EXAMPLES_TRIED = 8  # on which it is looked at that all examples send the same


def plant_beside(model: nn.Module, shape: tuple[int, ...], rows: Callable[[int], tuple[Tensor, Tensor]]) -> nn.Module:
    """A copy of `model` with rows in its first adapter, and quiet above; only what a client trains is changed.

    `rows` gives W [m, d] and b [m] for m units on the network's inputs. The adapters' biases shut all units of the frozen
    layers but one each, which they open for all examples: so there is one way through the frozen network, linear, from the
    sum of the adapter's units to the head, whose first output is a constant and a trifle of that sum.
    Raises NotApplicable: the model is no chain of dense layers with relu and parallel adapters, or its head is frozen.
    """
    made = copy.deepcopy(model)
    adapters = [module for module in made.modules() if isinstance(module, ParallelAdapter)]
    first, head = _ends(made, shape, adapters)
    feeds = first.feeds
    if feeds is None:
        raise NotApplicable("more than a normalisation lies between the inputs and the first adapter.")
    W, b = rows(len(adapters[0].down.weight))
    W, b = W / feeds.scale.to(W), b - (W / feeds.scale.to(W)) @ feeds.shift.to(W)
    way = _way(adapters)
    size = float(REACH * (feeds.scale.abs() + feeds.shift.abs()).max()) * math.sqrt(W.shape[1])  # of what enters, l2
    rise = len(W) * (float(W.norm(dim=1).max()) * size + float(b.abs().max()))  # of the sum of all units
    with torch.no_grad():
        adapters[0].down.weight.copy_(W)
        adapters[0].down.bias.copy_(b)
        top = _opened(adapters, way, size, rise)
        weight, bias = made.get_parameter(head.weight), made.get_parameter(head.bias or "")
        weight.zero_()
        bias.zero_()
        weight[0, way[-1]] = STEADY / top
        bias[0] = golden_logit(len(bias))
    _refuse_uneven(made, shape, adapters[0])
    return made


def _ends(made: nn.Module, shape: tuple[int, ...], adapters: Sequence[ParallelAdapter]) -> tuple[Dense, Dense]:
    """The first adapter's way down and the head. Raises NotApplicable: the network is made otherwise."""
    if not adapters:
        raise NotApplicable(
            "no adapter stands beside a frozen layer of this model (unbatch.models.parallel_adapter.adapted)."
        )
    layers = dense_layers(made, shape)
    names = {id(parameter): name for name, parameter in made.named_parameters()}
    first = next((one for one in layers if one.weight == names[id(adapters[0].down.weight)]), None)
    head = next((one for one in layers if one.head), None)
    if first is None:
        raise NotApplicable("the first adapter reads several vectors of an example, such as tokens or patches.")
    if head is None or head.bias is None or not made.get_parameter(head.weight).requires_grad:
        raise NotApplicable("the network does not end with a dense layer with a bias that the client trains.")
    if any(held.requires_grad for adapter in adapters for held in adapter.layer.parameters()):
        raise NotApplicable("the layers beside the adapters are trained, too: imprint plants its rows there.")
    beside = {id(held) for adapter in adapters for held in adapter.parameters()}
    beside |= {id(made.get_parameter(name)) for name in (head.weight, head.bias)}
    odd = [name for name, held in made.named_parameters() if id(held) not in beside]
    if odd:
        raise NotApplicable(f"the network has more than dense layers with adapters: {odd[0]!r} is no part of one.")
    return first, head


def _way(adapters: Sequence[ParallelAdapter]) -> list[int]:
    """Of each layer the one unit that stays open, so that the weights from one to the next are large."""
    units = [0]
    for adapter in reversed(adapters[1:]):
        units.insert(0, int(adapter.layer.weight[units[0]].abs().argmax()))
    for adapter, (below, above) in zip(adapters[1:], pairwise(units), strict=True):
        if adapter.layer.weight[above, below] == 0:
            raise NotApplicable("a frozen layer passes nothing on, so that nothing above the adapter is heard.")
    return units


def _opened(adapters: Sequence[ParallelAdapter], way: Sequence[int], size: float, rise: float) -> float:
    """Sets the adapters' ways up; returns the most that the last open unit may be given.

    `size` is the most that enters the first layer, l2, `rise` the most that its adapter's units sum up to.
    """
    most = size
    for number, (adapter, unit) in enumerate(zip(adapters, way, strict=True)):
        W, b = adapter.layer.weight, adapter.layer.bias
        given = float(W.norm(dim=1).max()) * most + (float(b.abs().max()) if b is not None else 0.0)
        adapter.up.weight.zero_()
        adapter.up.bias.fill_(-OPEN * given)
        adapter.up.bias[unit] = OPEN * given
        if number == 0:
            adapter.up.weight[unit] = 1.0
        most = (1 + OPEN) * given + (rise if number == 0 else 0.0)
    return most


def _refuse_uneven(made: nn.Module, shape: tuple[int, ...], adapter: ParallelAdapter) -> None:
    """Raises NotApplicable unless each example sends the same back to the adapter's units that fire for it, and no more."""
    double = copy.deepcopy(made).double()
    held = next(module for module in double.modules() if isinstance(module, ParallelAdapter))
    x = torch.rand(EXAMPLES_TRIED, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    given = list[Tensor]()
    hook = held.down.register_forward_hook(lambda module, args, out: given.append(out))
    with in_mode(double, "eval"):
        outputs = double(x.to(held.down.weight.device)).flatten(1)
    hook.remove()
    (sent,) = torch.autograd.grad(outputs[:, 0].sum(), given[0])
    fires = given[0] > 0
    gain = sent.abs().amax()
    even = bool(gain > 0) and torch.allclose(sent.abs(), torch.where(fires, gain, 0.0), rtol=1e-9, atol=0.0)
    if not even or bool(outputs[:, 1:].any()):
        raise NotApplicable(
            "more than relu, dense layers and adapters make up the network, so it cannot be made quiet."
        )
