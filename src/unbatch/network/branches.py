"""Branches: a part of a network's graph, from one tensor to another, as a module of its own."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from unbatch.network.graph import BatchSize, Call, Value, leaves, mapped
from unbatch.network.operations import layer_of, outplace, recognised

_ADDS = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__}


def branches(calls: Sequence[Call], given: Value, gave: Value, prefix: str, kind: str) -> fx.GraphModule:
    """The module that runs some calls of a graph, between two of its tensors, with functions as the layers they are.

    Its parameters and layers have the network's own names, without the `prefix` of the module that they belong to; `kind`
    is what its class is called.

    >>> from unbatch.network.tracing import trace
    >>> class Net(nn.Module):
    ...     def __init__(self) -> None:
    ...         super().__init__()
    ...         self.side = nn.Linear(4, 4)
    ...     def forward(self, x: Tensor) -> Tensor:
    ...         return x + torch.relu(self.side(x))
    >>> graph = trace(Net(), (4,))
    >>> made = branches(graph.calls, graph.input, graph.output, "", "Sum")
    >>> [name for name, _ in made.named_modules()][1:], made(torch.ones(1, 4)).shape
    (['side', 'relu'], torch.Size([1, 4]))
    """
    return _Writer(given, prefix).written(calls, gave, kind)


class _Writer:
    """A module as it is written, call by call."""

    def __init__(self, given: Value, prefix: str) -> None:
        self.graph, self.prefix = fx.Graph(), f"{prefix}." if prefix else ""
        self.root: dict[str, Any] = {}
        self.nodes: dict[Value, fx.Node] = {given: self.graph.placeholder("x")}
        self.given = given

    def written(self, calls: Sequence[Call], gave: Value, kind: str) -> fx.GraphModule:
        """The module."""
        for call in calls:
            self._write(call)
        self.graph.output(self.nodes[gave])
        training = any(call.ran.training for call in calls if isinstance(call.ran, nn.Module))
        modes = {name: module.training for name, module in self.root.items() if isinstance(module, nn.Module)}
        made = fx.GraphModule(self.root, self.graph, kind).train(training)
        for name, mode in modes.items():
            made.get_submodule(name).train(mode)
        return made

    def _write(self, call: Call) -> None:
        layer, sources = self._layer(call), set(call.given)
        if layer is not None:
            (source,) = sources if isinstance(call.ran, nn.Module) else [v for v in sources if v.fed]
            node = self.graph.call_module(self._held(call.name, layer), (self._node(source),))
        elif isinstance(call.ran, nn.Module):
            node = self.graph.call_module(self._held(call.name, call.ran), *self._arguments(call))
        else:
            args, kwargs = self._arguments(call)
            if kwargs.get("inplace"):
                kwargs["inplace"] = False
            plain = call.ran in _ADDS and len(args) == 2 and not kwargs
            node = self.graph.call_function(operator.add if plain else outplace(call.ran), args, kwargs)
        if call.alone:
            self.nodes[call.gave[0]] = node
            return
        for k, value in enumerate(call.gave):
            self.nodes[value] = self.graph.call_function(_tensor, (node, k))

    def _layer(self, call: Call) -> nn.Module | None:
        """The layer that a call of one fed tensor is; None where it is none, or takes what other calls gave besides."""
        fed = {value for value in call.given if value.fed}
        computed = any(not value.fed and value.call is not None for value in call.given)
        if len(fed) != 1 or computed or not call.alone:
            return None
        if isinstance(call.ran, nn.Module):
            return call.ran if len(call.args) + len(call.kwargs) == 1 else None
        layer = layer_of(call, next(iter(fed)))
        return layer if recognised(layer) else None

    def _held(self, name: str, layer: nn.Module) -> str:
        """The name under which a layer is kept here: its own, or the next that is free where another one has it."""
        first = name = name.removeprefix(self.prefix)
        k = 0
        while self.root.get(name, layer) is not layer:
            k += 1
            name = f"{first}_{k}"
        if isinstance(getattr(layer, "inplace", None), bool):
            layer.inplace = False  # another branch may take what it would write over
        self.root[name] = layer
        return name

    def _arguments(self, call: Call) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = mapped((call.args, call.kwargs), self._argument)
        return args, kwargs

    def _argument(self, leaf: Any) -> Any:
        if isinstance(leaf, BatchSize):
            n = self.graph.call_function(len, (self.nodes[self.given],))
            return self.graph.call_function(operator.mul, (n, leaf.times)) if leaf.times != 1 else n
        return self._node(leaf) if isinstance(leaf, Value) else leaf

    def _node(self, value: Value) -> fx.Node:
        """Where a value comes from."""
        if value not in self.nodes:
            name = value.name.removeprefix(self.prefix) or f"constant{len(self.root)}"
            self.root[name] = value.held
            self.nodes[value] = self.graph.get_attr(name)
        return self.nodes[value]


def _tensor(found: Any, k: int) -> Tensor:
    """The k-th tensor of what a call returned."""
    tensors = [leaf for leaf in leaves(found) if isinstance(leaf, Tensor)]
    return tensors[k]
