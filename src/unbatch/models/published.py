"""The convolutional networks of the papers that read gradients layer by layer."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import nn

PublishedName = Literal[
    "cnn2-c1",
    "cnn2-c2",
    "cnn2-c4",
    "cnn2-c6",
    "cnn3-c1",
    "cnn3-c2",
    "cnn3-c3",
    "cnn3-c4",
    "cnn4-c1",
    "cnn4-c2",
    "cnn4-c3",
    "cnn6",
    "cnn6-narrow",
    "cnn6-wide",
]


class Convolution(NamedTuple):
    """One convolution of a published network; kernels are square.

    >>> Convolution(6, kernel=4, stride=2)
    Convolution(channels=6, kernel=4, stride=2, padding=0)
    """

    channels: int  # that it gives
    kernel: int
    stride: int = 1
    padding: int = 0


class Network(NamedTuple):
    """A published network: convolutions, each followed by the activation, and a dense head.

    >>> NETWORKS["cnn2-c2"]
    Network(activation='tanh', convolutions=(Convolution(channels=6, kernel=4, stride=2, padding=0),))
    """

    activation: Literal["tanh", "leaky-relu"]
    convolutions: tuple[Convolution, ...]


def _tanh(*convolutions: tuple[int, ...]) -> Network:
    return Network("tanh", tuple(Convolution(*each) for each in convolutions))


def _six(first: int, second: int, third: int, fourth: int, fifth: int, sixth: int) -> Network:
    channels = (first, second, third, fourth, fifth, sixth)
    shapes = ((4, 2, 2), (3, 2, 1), (3, 1, 1), (3, 1, 1), (3, 2, 1), (3, 1, 1))
    return Network("leaky-relu", tuple(Convolution(c, *s) for c, s in zip(channels, shapes, strict=True)))


LEAKY_RELU_SLOPE = 0.2  # of the six-layer networks' leaky relu

# cnn2 to cnn4: Chen and Campbell, 2021, variants by their numbers (a dense layer counts as the second, third or fourth).
# cnn6 and cnn6-narrow: Zhu and Blaschko, R-GAP, ICLR 2021, there CNN6 and CNN6d; cnn6-wide, ours, has twice the channels.
NETWORKS: dict[str, Network] = {
    "cnn2-c1": _tanh((6, 3)),
    "cnn2-c2": _tanh((6, 4, 2)),
    "cnn2-c4": _tanh((1, 3)),
    "cnn2-c6": _tanh((12, 5, 2)),
    "cnn3-c1": _tanh((6, 3), (3, 4, 2)),
    "cnn3-c2": _tanh((6, 4, 2), (3, 3, 2)),
    "cnn3-c3": _tanh((6, 3), (9, 3)),
    "cnn3-c4": _tanh((1, 3), (6, 3)),
    "cnn4-c1": _tanh((6, 3), (5, 4, 2), (3, 4)),
    "cnn4-c2": _tanh((16, 5), (6, 5, 2), (32, 5, 1, 2)),
    "cnn4-c3": _tanh((6, 5), (16, 5, 2), (16, 5, 1, 2)),
    "cnn6": _six(12, 36, 36, 36, 64, 128),
    "cnn6-narrow": _six(12, 20, 36, 36, 64, 128),
    "cnn6-wide": _six(24, 72, 72, 72, 128, 256),
}


def published_layers(name: str, channels: int, act: type[nn.Module] | None, bias: bool) -> list[nn.Module]:
    """The layers of the published network called `name`, without its head, for pictures of so many channels.

    `act` None takes the network's own activation.

    >>> [type(layer).__name__ for layer in published_layers("cnn3-c1", 1, None, True)]
    ['Conv2d', 'Tanh', 'Conv2d', 'Tanh', 'Flatten']
    """
    network = NETWORKS[name]
    stack: list[nn.Module] = []
    for each in network.convolutions:
        own = nn.Tanh() if network.activation == "tanh" else nn.LeakyReLU(LEAKY_RELU_SLOPE)
        conv = nn.Conv2d(channels, each.channels, each.kernel, each.stride, each.padding, bias=bias)
        stack += [conv, own if act is None else act()]
        channels = each.channels
    return [*stack, nn.Flatten()]
