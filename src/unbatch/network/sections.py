"""Sections: the part of a network between two of its tensors, as a function of its own."""

from __future__ import annotations

from torch import fx

from unbatch.errors import NotApplicable
from unbatch.network.branches import branches
from unbatch.network.graph import Call, Graph, Value


def between(graph: Graph, given: Value, gave: Value) -> tuple[Call, ...]:
    """The calls by which one tensor of a network becomes another, in the order in which they ran.

    Those that compute something from parameters alone are among them. Raises NotApplicable: the second depends on the
    input by another way as well.

    >>> from torch import nn
    >>> from unbatch.network.tracing import trace
    >>> graph = trace(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), (4,))
    >>> first = graph.calls[0].gave[0]
    >>> [call.name for call in between(graph, first, graph.output)]
    ['1', '2']
    """
    needed, left = set[Call](), [gave]
    while left:
        value = left.pop()
        if value is given or value.held is not None:
            continue
        if value.call is None:
            raise NotApplicable("another way leads from the network's input around this tensor.")
        if value.call not in needed:
            needed.add(value.call)
            left += value.call.given
    return tuple(call for call in graph.calls if call in needed)


def section(graph: Graph, given: Value, gave: Value) -> fx.GraphModule:
    """The module that computes one tensor of a network from another; its layers are the graph's own, in its mode.

    >>> import torch
    >>> from torch import nn
    >>> from unbatch.network.tracing import trace
    >>> graph = trace(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), (4,))
    >>> section(graph, graph.calls[0].gave[0], graph.calls[1].gave[0])(torch.tensor([[-1.0, 0.0, 2.0]]))
    tensor([[0., 0., 2.]])
    """
    return branches(between(graph, given, gave), given, gave, "", "Section")
