"""Stack: layers in a row, and the names that the report calls them by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from torch import nn

Shape = tuple[int, ...]


class NamedBlock(nn.Module):
    """A part of a network that runs several layers otherwise than in a row; the report calls it a block.

    >>> list(dict(stack([nn.Conv2d(1, 1, 3), NamedBlock()]).named_children()))
    ['conv1', 'block1']
    """


_KINDS = {nn.Conv2d: "conv", nn.Linear: "dense", nn.BatchNorm2d: "norm", nn.GroupNorm: "norm"}


def stack(layers: Iterable[nn.Module]) -> nn.Sequential:
    """The layers in a row, named for the report: conv1, dense2, ... and head for a dense layer that ends it.

    >>> list(dict(stack([nn.Flatten(), nn.Linear(2, 2), nn.Linear(2, 2)]).named_children()))
    ['flatten1', 'dense1', 'head']
    """
    layers = list(layers)
    row, count = nn.Sequential(), Counter[str]()
    for layer in layers:
        kind = "block" if isinstance(layer, NamedBlock) else _KINDS.get(type(layer), type(layer).__name__.lower())
        count[kind] += 1
        last = layer is layers[-1] and isinstance(layer, nn.Linear)
        row.add_module("head" if last else f"{kind}{count[kind]}", layer)
    return row
