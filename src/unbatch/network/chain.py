"""Chain: the layers of a network in the order in which they run, one feeding the next, found by running it.

The network's graph is cut wherever all that flows goes through one tensor. What lies between two cuts is a link: a layer, a
function as the layer that computes the same, or a block of branches.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from unbatch.errors import NotApplicable
from unbatch.network.branches import branches
from unbatch.network.dense import forward
from unbatch.network.graph import Call, Graph, Scope, Value
from unbatch.network.operations import Reshape, layer_of, recognised
from unbatch.network.tracing import PROBES, draws_kept, trace

MISFIT_ROUNDINGS = 1e4  # of the largest output, by which the links together may miss the network's own output
_NO_CHAIN = "the network is no chain of layers: "


@dataclass(frozen=True)
class Link:
    """One layer of a chain, and the shapes of one example before and after it.

    >>> Link("dense", nn.Linear(6, 2), (2, 3), (2,)).unknowns
    6
    """

    name: str
    module: nn.Module
    before: tuple[int, ...]
    after: tuple[int, ...]
    tensors: Mapping[str, str] = field(default_factory=dict, repr=False)  # where they are not name.own: see `called`
    line: str = field(default="", repr=False)  # "file.py:12" of a function's call in a forward; empty for a module

    @property
    def unknowns(self) -> int:
        """Numbers in its input."""
        return int(torch.Size(self.before).numel())

    def called(self, own: str) -> str:
        """The network's name for a parameter or buffer of the layer.

        >>> Link("dense", nn.Linear(6, 2), (6,), (2,), {"weight": "w1"}).called("weight")
        'w1'
        """
        return self.tensors.get(own, f"{self.name}.{own}" if self.name else own)


def chain(model: nn.Module, input_shape: tuple[int, ...], mode: Literal["train", "eval"] = "eval") -> list[Link]:
    """The layers of a network as links from its input to its output; what reshapes between them belongs to the next one.

    Functions that a forward calls are links as modules are: `F.relu(x)` is an `nn.ReLU`, named after the module that called
    it. Branches that meet again are one link: the module that is made of them, or a module of their own. The modules are
    those of a copy, in the mode given.
    Raises NotApplicable: the network as a whole is no chain, and where it breaks, or two of its layers share a weight,
    whose gradient then is a sum over both.

    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    >>> [(link.name, link.after) for link in chain(model, (3, 8, 8))]
    [('0', (4, 6, 6)), ('1', (4, 6, 6)), ('2', (144,)), ('3', (2,))]
    >>> class Net(nn.Module):
    ...     def __init__(self) -> None:
    ...         super().__init__()
    ...         self.fc = nn.Linear(4, 2)
    ...     def forward(self, x: Tensor) -> Tensor:
    ...         return torch.tanh(self.fc(x.flatten(1)))
    >>> [(link.name, link.module) for link in chain(Net(), (2, 2))]
    [('fc', Linear(in_features=4, out_features=2, bias=True)), ('tanh', Tanh())]
    """
    model = copy.deepcopy(model).train(mode == "train")  # a copy, since in train mode batch norm writes its statistics
    graph = trace(model, input_shape, mode)
    names = graph.names()
    names |= {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    links = list(_Cutter(graph, names).links())
    _alone(links)
    _hold(model, links, input_shape, mode)
    return links


class Chained(nn.Module):
    """The network that links make, one after the other.

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
    >>> Chained(chain(model, (4,))).named()
    {'layers.0.weight': '0.weight', 'layers.0.bias': '0.bias'}
    """

    def __init__(self, links: Sequence[Link]) -> None:
        super().__init__()
        self.links = tuple(links)
        self.layers = nn.ModuleList(link.module for link in links)

    def forward(self, x: Tensor) -> Tensor:
        """[n, *links[0].before] -> [n, *links[-1].after]."""
        for link, layer in zip(self.links, self.layers, strict=True):
            x = layer(x.reshape(len(x), *link.before))
        return x

    def named(self) -> dict[str, str]:
        """By the name of a parameter here, its name in the network that the links come from."""
        own = ((i, link, name) for i, link in enumerate(self.links) for name, _ in link.module.named_parameters())
        return {f"layers.{i}.{name}": link.called(name) for i, link, name in own}


def named_after(weight: str) -> str:
    """The name of the layer that a parameter is the weight of.

    >>> named_after("features.0.weight"), named_after("w1"), named_after("weight")
    ('features.0', 'w1', '')
    """
    return "" if weight == "weight" else weight.removesuffix(".weight")


def follow(links: Sequence[Link], x: Tensor) -> Tensor:
    """The output [n, ...] of the links one after the other, for inputs x [n, *links[0].before]; x, if there are none.

    >>> links = chain(nn.Sequential(nn.ReLU(), nn.AvgPool1d(2)), (1, 4))
    >>> follow(links, torch.tensor([[[-1.0, 1.0, 2.0, 4.0]]]))
    tensor([[[0.5000, 3.0000]]])
    """
    for link in links:
        x = link.module(x.reshape(len(x), *link.before))
    return x


@dataclass(frozen=True)
class Cut:
    """The calls between two cuts: what lies there, from the tensor given to the tensor that it gave."""

    given: Value
    gave: Value
    calls: tuple[Call, ...]  # all that it takes, those as well that do not come from the network's input
    fed: int  # how many do

    @property
    def last(self) -> Call:
        return self.calls[-1]

    @property
    def single(self) -> bool:
        """Whether one call alone, of one tensor, leads from one to the other."""
        return len(self.calls) == 1 and self.last.alone

    @property
    def plain(self) -> bool:
        """Whether it is a module that takes one tensor and gives one."""
        one = len(self.last.args) + len(self.last.kwargs) == 1
        return self.single and one and isinstance(self.last.ran, nn.Module)


class _Cutter:
    """A graph as links."""

    def __init__(self, graph: Graph, names: Mapping[int, str]) -> None:
        self.graph, self.names = graph, names
        self.cuts = list(cuts(graph))
        self.layers = [self._layer(cut) for cut in self.cuts]
        self.taken: set[str] = set()

    def links(self) -> Iterator[Link]:
        """One link for every cut or block, but for the reshapes between them."""
        i = 0
        while i < len(self.cuts):
            scope, end = self._block(i)
            first, last, layer = self.cuts[i], self.cuts[end], self.layers[i]
            after = last.gave.shape[1:]
            if scope is not None:
                yield self._link(scope.name, self._made(scope, i, end), first.given, after, "")
            elif own := next((call for call in first.calls if call.own_gradient), None):
                raise NotApplicable(
                    f"{_NO_CHAIN}{own.where} runs in an autograd function of its own; make that a module of its own."
                )
            elif layer is None:
                calls = first.calls
                self._twice(calls)
                made = branches(calls, first.given, last.gave, "", "Branches")
                yield self._link(last.last.name, made, first.given, after, last.last.line)
            elif isinstance(layer, Reshape) and (i + 1 < len(self.cuts) or first.given.shape == first.gave.shape):
                pass  # the next link's: it takes its input in its own shape
            else:
                line = "" if first.plain else first.last.line
                yield self._link(self._named(first, layer), layer, first.given, after, line)
            i = end + 1

    def _layer(self, cut: Cut) -> nn.Module | None:
        """The layer of a single call; None of branches, and of what takes other values from calls."""
        if cut.plain:
            return layer_of(cut.last, cut.given)
        if not cut.single or isinstance(cut.last.ran, nn.Module):
            return None
        return layer_of(cut.last, cut.given)

    def _block(self, i: int) -> tuple[Scope | None, int]:
        """The module that is one link by itself and begins at a cut, and where it ends.

        One without modules of its own, of which something is no known layer; and one of branches that meet again, with
        an elementwise layer behind them or none.
        """
        ends = {cut.gave: j for j, cut in enumerate(self.cuts) if j >= i}
        inside = [(each, ends[each.gave]) for each in self.graph.scopes if each.gave in ends]
        inside = [(each, end) for each, end in inside if each.given is self.cuts[i].given]
        for scope, end in reversed(inside):  # inner ones first
            rough = any(layer is None or not recognised(layer) for layer in self.layers[i : end + 1])
            rough |= any(call.own_gradient for cut in self.cuts[i : end + 1] for call in cut.calls)
            if not scope.nested and rough:
                return scope, end
        meets = i
        while isinstance(self.layers[meets], nn.Identity) and meets + 1 < len(self.cuts):
            meets += 1  # it gives the very tensor that it is given, so a shortcut seems to lie before the branches
        if self.layers[meets] is None:
            whole = any(end == meets for _, end in inside)
            for scope, end in reversed(inside):
                if end == meets or (end == meets + 1 and self._elementwise(end) and not whole):
                    return scope, end
        return None, i

    def _elementwise(self, i: int) -> bool:
        """Whether a cut is one layer that leaves the shape as it is, without more than a slope to learn."""
        cut, layer = self.cuts[i], self.layers[i]
        own = layer is not None and (isinstance(layer, nn.PReLU) or not any(True for _ in layer.parameters()))
        return own and cut.given.shape == cut.gave.shape

    def _made(self, scope: Scope, i: int, end: int) -> nn.Module:
        """A module that is one link: itself, or the same from layers alone where it calls functions that are layers."""
        calls = [call for cut in self.cuts[i : end + 1] for call in cut.calls]
        functions = [call for call in calls if not isinstance(call.ran, nn.Module) and _fed(call) is not None]
        if any(call.own_gradient for call in calls):
            return scope.module
        if not scope.nested or not any(
            recognised(layer_of(call, value)) for call in functions if (value := _fed(call))
        ):
            return scope.module
        kind = type(scope.module).__name__
        return branches(calls, self.cuts[i].given, self.cuts[end].gave, scope.name, kind)

    def _twice(self, calls: Sequence[Call]) -> None:
        """Raises NotApplicable: branches share a parameter."""
        used: dict[int, str] = {}
        for call in calls:
            given = [value.held for value in call.given if isinstance(value.held, nn.Parameter)]
            own = [*given, *(call.ran.parameters() if isinstance(call.ran, nn.Module) else ())]
            for p in own:
                if id(p) in used:
                    name = used[id(p)]
                    raise NotApplicable(f"{_NO_CHAIN}{name!r} runs 2 times; give every place a module of its own.")
            used |= {id(p): call.name for p in own}

    def _named(self, cut: Cut, layer: nn.Module) -> str:
        """The module's name, that of the weight it takes, or the function's behind the module that called it."""
        weight = getattr(layer, "weight", None)
        if cut.plain or weight is None:
            own = [s for s in self.graph.scopes if not s.nested and (s.given, s.gave) == (cut.given, cut.gave)]
            return own[-1].name if own and own[-1].name and not cut.plain else cut.last.name
        name = self.names.get(id(weight))
        return cut.last.name if name is None else named_after(name)

    def _link(self, name: str, module: nn.Module, given: Value, after: tuple[int, ...], line: str) -> Link:
        first, k = name, 0
        while name in self.taken:  # a layer without parameters may run at several places
            k += 1
            name = f"{first}_{k}"
        self.taken.add(name)
        held = (*module.named_parameters(), *module.named_buffers())
        tensors = {own: self.names[id(tensor)] for own, tensor in held if id(tensor) in self.names}
        return Link(name, module, given.shape[1:], after, tensors, line)


def _fed(call: Call) -> Value | None:
    """The only value that feeds a call of those that come from the network's input; None if there are several."""
    found = {value for value in call.given if value.call is not None or value.held is None}
    return found.pop() if len(found) == 1 else None


def cuts(graph: Graph) -> Iterator[Cut]:
    """The calls between every two tensors through which all goes. Raises NotApplicable: examples stay folded.

    >>> graph = trace(nn.Sequential(nn.Flatten(), nn.Linear(4, 2), nn.ReLU()), (2, 2))
    >>> [cut.gave.shape for cut in cuts(graph)]
    [(2, 4), (2, 2), (2, 2)]
    """
    fed = [call for call in graph.calls if call.fed]
    until: dict[Value, float] = {}
    for i, call in enumerate(fed):
        until |= dict.fromkeys(call.given, i)
    until[graph.output] = torch.inf
    side = {value: call for call in graph.calls if not call.fed for value in call.gave}
    given, here, open_ = graph.input, list[Call](), {graph.input}
    for i, call in enumerate(fed):
        here.append(call)
        open_ = {value for value in (*open_, *call.gave) if until.get(value, -1) > i}
        if len(open_) == 1 and (gave := next(iter(open_))).each:
            needed = _needed(here, side)
            order = [each for each in graph.calls if each in needed]
            yield Cut(given, gave, tuple(order), len(here))
            given, here = gave, []
    if here:
        raise NotApplicable(f"{_NO_CHAIN}{here[0].where} folds examples into each other.")


def _needed(calls: Sequence[Call], side: Mapping[Value, Call]) -> set[Call]:
    """Calls, and those that compute what they take from parameters and constants alone."""
    found, left = set[Call](), list(calls)
    while left:
        call = left.pop()
        if call not in found:
            found.add(call)
            left += [side[value] for value in call.given if value in side]
    return found


def _alone(links: Sequence[Link]) -> None:
    """Raises NotApplicable: two links share a parameter."""
    for i, link in enumerate(links):
        for other in links[:i]:
            shared = {id(p) for p in link.module.parameters()} & {id(p) for p in other.module.parameters()}
            if shared and link.module is other.module:
                raise NotApplicable(f"{_NO_CHAIN}{other.name!r} runs 2 times; give every place a module of its own.")
            if shared:
                raise NotApplicable(
                    f"{other.name!r} and {link.name!r} share a weight: its gradient is a sum over both."
                )


def _hold(model: nn.Module, links: Sequence[Link], shape: tuple[int, ...], mode: Literal["train", "eval"]) -> None:
    """Raises NotApplicable: the links one after the other do not give the network's output, for inputs of their own."""
    rng = torch.Generator().manual_seed(3)
    x = 2 * torch.rand(PROBES[1], *shape, generator=rng) - 1
    found = []
    for network in (copy.deepcopy(model), Chained(copy.deepcopy(links)).train(mode == "train")):
        with draws_kept(model):
            found.append(forward(network, x.clone(), mode).double())
    own, made = found
    allowed = min(MISFIT_ROUNDINGS * torch.finfo(next(model.parameters(), x).dtype).eps, 0.1)
    largest = float(own[own.isfinite()].abs().amax()) if bool(own.isfinite().any()) else 0.0
    if own.shape != made.shape or not torch.allclose(own, made, 0.0, allowed * largest, equal_nan=True):
        raise NotApplicable(f"{_NO_CHAIN}its forward does more than its calls of torch show.")
