"""Places: the layers of a network that look at windows of what they are given, and at which a batch can be told apart."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unbatch.errors import NotApplicable
from unbatch.network.chain import cuts
from unbatch.network.graph import Call, Graph, Value
from unbatch.network.operations import Reshape, layer_of
from unbatch.numerics.windows.geometry import Windows

# layers behind which nothing is negative if nothing is before
KEEPS_SIGNS = (
    Reshape,
    nn.Flatten,
    nn.Unflatten,
    nn.Identity,
    nn.Dropout,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
)


@dataclass(frozen=True, eq=False)
class WindowLayer:
    """A layer that applies one matrix to every window of its input: a convolution, or a dense layer with one window.

    Its weight's gradient is the sum over examples and windows of delta patch^T, a dense layer's with windows as examples.
    """

    call: Call
    layer: nn.Conv2d | nn.Linear
    given: Value
    weight: str  # the network's name of the parameter
    bias: str | None

    @property
    def gave(self) -> Value:
        """Its output."""
        return self.call.gave[0]

    @property
    def dense(self) -> bool:
        """Whether it looks at the whole of its input at once."""
        return isinstance(self.layer, nn.Linear)

    @property
    def groups(self) -> int:
        """The number of groups that channels are split into; each has a matrix of its own."""
        return 1 if isinstance(self.layer, nn.Linear) else self.layer.groups

    def windows(self, channels: int | None = None) -> Windows:
        """What it looks at, of all input channels or of so many.

        A dense layer is a convolution of one pixel with an input channel a number.
        """
        if isinstance(self.layer, nn.Linear):
            d = channels or self.layer.in_features
            return Windows.of((d, 1, 1), kernel=(1, 1))
        c, h, w = self.given.shape[1:]
        own = self.layer
        return Windows.of(
            (channels or c, h, w),
            kernel=_pair(own.kernel_size),
            stride=_pair(own.stride),
            padding=padding(own),
            dilation=_pair(own.dilation),
        )

    @property
    def plain(self) -> bool:
        """Whether its windows have one matrix for all channels, and zeros where they reach over the edge."""
        try:
            return self.groups == 1 and (isinstance(self.layer, nn.Linear) or bool(padding(self.layer)))
        except NotApplicable:
            return False

    @property
    def positions(self) -> int:
        """The number of windows of one example."""
        return 1 if self.dense else int(torch.Size(self.gave.shape[2:]).numel())

    @property
    def limit(self) -> int:
        """The largest rank that its gradient can have, min(c_out, c_in k^2)."""
        weight = self.layer.weight
        return min(len(weight), weight[0].numel())

    def shaped(self, maps: Tensor) -> Tensor:
        """Maps as its windows see them, in the shape in which it is given them."""
        return maps.reshape(-1, *self.given.shape[1:])

    def flat(self, gradient: Tensor) -> Tensor:
        """Its weight's gradient as a matrix [c_out, c_in k^2]."""
        return gradient.flatten(1)


def padding(layer: nn.Conv2d) -> tuple[int, int]:
    """The zero padding of a convolution on both sides, rows and columns. Raises NotApplicable: it differs, or is not zero.

    >>> padding(nn.Conv2d(1, 1, 3, padding="same"))
    (1, 1)
    """
    left, right, top, bottom = layer._reversed_padding_repeated_twice
    if layer.padding_mode != "zeros" and any((left, right, top, bottom)):
        raise NotApplicable(f"it pads with {layer.padding_mode!r} in place of zeros.")
    if isinstance(layer.padding, str) and (left != right or top != bottom):
        raise NotApplicable("it pads one side more than the other.")
    return (top, left) if isinstance(layer.padding, str) else _pair(layer.padding)


def places(graph: Graph) -> Iterator[WindowLayer]:
    """The convolutions and dense layers of a network in the order in which they ran.

    >>> from unbatch.network.tracing import trace
    >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    >>> [(place.weight, place.positions, place.limit) for place in places(trace(net, (1, 4, 4)))]
    [('0.weight', 4, 2), ('3.weight', 1, 2)]
    """
    for call in graph.calls:
        fed = {value for value in call.given if value.fed}
        if len(fed) != 1 or not call.alone:
            continue
        (given,) = fed
        layer = layer_of(call, given)
        plain = type(layer) is nn.Conv2d or (type(layer) is nn.Linear and len(given.shape) == 2)
        if not plain or not given.each:
            continue
        names = _names(call, graph, layer)
        if names is not None:
            yield WindowLayer(call, layer, given, *names)  # type: ignore[arg-type]


def rectified(value: Value) -> bool:
    """Whether a tensor comes from a ReLU, as it is, reshaped, or pooled: no entry is negative, and many are zero.

    >>> from unbatch.network.tracing import trace
    >>> graph = trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Unflatten(1, (2, 2)), nn.Tanh()), (4,))
    >>> [rectified(call.gave[0]) for call in graph.calls]
    [False, True, True, False]
    """
    while value.call is not None and value.call.alone and value.call.given:
        layer = layer_of(value.call, value.call.given[0])
        if isinstance(layer, nn.ReLU | nn.ReLU6):
            return True
        if not isinstance(layer, KEEPS_SIGNS):
            return False
        value = value.call.given[0]
    return False


def at_cuts(graph: Graph) -> set[Value]:
    """The tensors through which all goes, each of one example.

    >>> from unbatch.network.tracing import trace
    >>> len(at_cuts(trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), (2,))))
    3
    """
    return {graph.input, *(cut.gave for cut in cuts(graph))}


def _names(call: Call, graph: Graph, layer: nn.Module) -> tuple[str, str | None] | None:
    """The network's names of the weight and the bias."""
    if isinstance(call.ran, nn.Module):
        prefix = f"{call.name}." if call.name else ""
        return f"{prefix}weight", f"{prefix}bias" if layer.bias is not None else None
    names = graph.names()
    weight = names.get(id(layer.weight))
    return None if weight is None else (weight, None if layer.bias is None else names.get(id(layer.bias)))


def _pair(sides: int | tuple[int, ...]) -> tuple[int, int]:
    return (sides, sides) if isinstance(sides, int) else (sides[0], sides[1])
