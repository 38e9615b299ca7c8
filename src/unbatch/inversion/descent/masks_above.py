"""Masks above a known tensor that its small error decides wrongly, found by the layers whose gradients contradict them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from unbatch.inversion.descent.masks import flipped
from unbatch.inversion.descent.places import WindowLayer
from unbatch.network.graph import Call, Graph, Value
from unbatch.network.operations import AffineOperation, layer_of
from unbatch.network.sections import between

CONTRADICTS = 10.0  # times what most channels' gradients are off, by which one is where a mask is wrong
LEAST = 1e-2  # of the error of what is known: a gradient that is less off contradicts nothing
IN_QUESTION = (
    100.0  # times that error, relative to a tensor's mean size, below which an entry may be on either side of zero
)
ROUNDS = 60  # of flips, from the head downwards
LINEAR = (nn.BatchNorm1d, nn.BatchNorm2d, nn.Identity, AffineOperation)
ADDS = (torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__iadd__)


@dataclass(eq=False)
class CallsHeard:
    """What some calls of a section were given and gave, by the values that they gave in the graph."""

    given: dict[Value, Tensor] = field(default_factory=dict)
    gave: dict[Value, Tensor] = field(default_factory=dict)


@contextmanager
def listening(
    whole: fx.GraphModule, calls: Iterable[Call], flips: Mapping[Value, Tensor] | None = None
) -> Iterator[CallsHeard]:
    """Listens to some calls of a section, while it runs once.

    Of what ReLUs gave, `flips` has the entries [n, ...] whose derivative is to be one less itself. A module that ran
    several times must have all its calls among `calls`.
    """
    heard, by_name, flips = CallsHeard(), dict[str, list[Value]](), flips or {}
    for call in calls:
        by_name.setdefault(call.name, []).append(call.gave[0])

    def hook(left: list[Value], given: Tensor, gave: Tensor) -> Tensor:
        value = left.pop(0)
        if value in flips:
            through = given * ((given > 0) ^ flips[value])
            gave = through + (gave - through).detach()
        heard.given[value], heard.gave[value] = given, gave
        return gave

    held = list[Any]()
    try:
        for name, values in by_name.items():
            layer = whole.get_submodule(name)
            if isinstance(layer, nn.ReLU):
                layer.inplace = False  # what it was given is asked for
            held.append(layer.register_forward_hook(lambda _, given, gave, left=values: hook(left, given[0], gave)))
        yield heard
    finally:
        for each in held:
            each.remove()


def relus(graph: Graph, start: Value, end: Value) -> list[Call]:
    """The calls of a ReLU by which one tensor becomes another."""
    return [
        call
        for call in between(graph, start, end)
        if call.alone and len(call.given) == 1 and isinstance(layer_of(call, call.given[0]), nn.ReLU)
    ]


def relu_behind(graph: Graph, value: Value) -> Value | None:
    """What the ReLU gave to which a layer's output goes by norms with fixed statistics and sums alone; None without one.

    >>> from unbatch.network.tracing import trace
    >>> graph = trace(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2).eval(), nn.ReLU()).eval(), (2,))
    >>> relu_behind(graph, graph.calls[0].gave[0]) is graph.output
    True
    """
    while True:
        readers = [call for call in graph.calls if value in call.given]
        if len(readers) != 1 or not readers[0].alone:
            return None
        (call,) = readers
        layer = layer_of(call, value)
        if isinstance(layer, nn.ReLU):
            return call.gave[0]
        if call.ran not in ADDS and (not isinstance(layer, LINEAR) or layer.training):
            return None
        value = call.gave[0]


def contradicted(
    graph: Graph,
    above: Sequence[WindowLayer],
    heard: CallsHeard,
    backs: Mapping[Value, Tensor],
    update: Mapping[str, Tensor],
    error: float,
) -> tuple[Value, Tensor] | None:
    """A ReLU, and which entries [n, ...] of its mask are wrong, by the uppermost layer that tells; None where none does.

    A layer's weight gradient less the sum of delta patch^T is, in an output channel, the sum over the wrong entries of what
    their deltas change by times their patches. `backs` is what came back to the outputs of `above` and of the ReLUs.
    """
    for place in reversed(above):
        G, windows = place.flat(update[place.weight]), place.windows()
        n = len(heard.gave[place.gave])
        inputs = heard.given[place.gave].detach().reshape(n, *windows.shape)
        delta = backs[place.gave].reshape(n, len(G), -1)
        off = G - torch.einsum("nop,npd->od", delta, windows.rows(inputs))
        size = off.norm(dim=1)
        wrong = size > CONTRADICTS * size.median().clamp_min(LEAST * error * float(G.norm()) / len(G) ** 0.5)
        relu = relu_behind(graph, place.gave) if bool(wrong.any()) else None
        if relu not in heard.given or relu is None:
            continue
        z = heard.given[relu]
        change = backs[relu] * (1 - 2 * _passed(heard, relu))
        (change,) = torch.autograd.grad(z, heard.gave[place.gave], change, retain_graph=True)
        open_ = (z.abs() <= IN_QUESTION * error * z.square().mean().sqrt()).reshape(n, len(G), -1)
        found = torch.zeros_like(open_)
        found[:, wrong] = flipped(off[wrong], change.reshape(n, len(G), -1)[:, wrong], inputs, windows, open_[:, wrong])
        if bool(found.any()):
            return relu, found.view_as(z)
    return None


def _passed(heard: CallsHeard, relu: Value) -> Tensor:
    """The derivative of a ReLU as it ran, flips included."""
    z, gave = heard.given[relu], heard.gave[relu]
    (passed,) = torch.autograd.grad(gave, z, torch.ones_like(gave), retain_graph=True)
    return passed
