"""VGG: convolutions in a row with max pooling between them, and the ConvNet of gradient inversion."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import nn

from unbatch.models.channel_norm import NormName, channel_norm
from unbatch.models.stack import Shape, stack


class Plan(NamedTuple):
    """A network of 3x3 convolutions: for every stage the channels of its convolutions, as multiples of the width.

    >>> PLANS["convnet8"].stages
    ((1, 2, 2, 4, 4, 4), (4, 4))
    """

    stages: tuple[tuple[int, ...], ...]  # max pooling stands behind each
    pooling: int = 2  # pixels a side of its windows, which is its stride, too
    mean: bool = True  # whether the head sees every channel's mean, or all pixels that are left


# vgg11 and vgg16: configurations A and D of Simonyan and Zisserman, Very Deep Convolutional Networks for Large-Scale Image
# Recognition (ICLR 2015), in the form that is usual on CIFAR, one dense layer for the three published ones.
# convnet8: the ConvNet of Geiping, Bauermeister, Dröge and Moeller, Inverting Gradients (NeurIPS 2020), by their code
# (JonasGeiping/invertinggradients, inversefed/nn/models.py): pooling in windows of 3 behind the sixth and the eighth
# convolution. It lists its seventh convolution twice under one name, which makes one layer.
PLANS: dict[str, Plan] = {
    "vgg11": Plan(((1,), (2,), (4, 4), (8, 8), (8, 8))),
    "vgg16": Plan(((1, 1), (2, 2), (4, 4, 4), (8, 8, 8), (8, 8, 8))),
    "convnet8": Plan(((1, 2, 2, 4, 4, 4), (4, 4)), pooling=3, mean=False),
}


def vgg(
    plan: Plan, shape: Shape, outputs: int, act: type[nn.Module], bias: bool, *, width: int, norm: NormName | None
) -> nn.Module:
    """A plan's convolutions, each with its norm and activation, its max poolings, and a dense head.

    `width` (published: 64) scales all channels. Convolutions keep their bias beside a norm, as published. A pooling whose
    windows are larger than what is left of the picture is left out, so that small pictures can be taken, too.

    >>> model = vgg(PLANS["vgg11"], (3, 32, 32), 10, nn.ReLU, True, width=4, norm=None)
    >>> model.conv8, model.maxpool2d5.kernel_size, model.head.in_features
    (Conv2d(32, 32, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1)), 2, 32)
    """
    layers: list[nn.Module] = []
    channels, sides = shape[0], shape[1:]
    for stage in plan.stages:
        for multiple in stage:
            layers.append(nn.Conv2d(channels, multiple * width, 3, padding=1, bias=bias))
            channels = multiple * width
            layers += [] if norm is None else [channel_norm(norm, channels)]
            layers.append(act())
        if min(sides) >= plan.pooling:
            layers.append(nn.MaxPool2d(plan.pooling))
            sides = tuple(side // plan.pooling for side in sides)
    pixels = math.prod(sides)
    if plan.mean and pixels > 1:
        layers.append(nn.AdaptiveAvgPool2d(1))
        pixels = 1
    return stack([*layers, nn.Flatten(), nn.Linear(channels * pixels, outputs, bias)])
