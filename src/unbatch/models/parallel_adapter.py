"""Parallel adapters: what parameter-efficient fine-tuning trains beside the frozen dense layers of a model."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbatch.errors import UnbatchError


class ParallelAdapter(nn.Module):
    """A frozen dense layer W x + b beside a bottleneck of relu units that is trained.

    W x + b + U relu(D x + c) + e, with D [m, d], c [m] the way down and U [k, m], e [k] the way up.
    Source: He, Zhou, Ma, Berg-Kirkpatrick, Neubig, Towards a Unified View of Parameter-Efficient Transfer Learning,
    ICLR 2022.

    >>> beside = ParallelAdapter(nn.Linear(4, 3), 2)
    >>> [name for name, weight in beside.named_parameters() if weight.requires_grad]
    ['down.weight', 'down.bias', 'up.weight', 'up.bias']
    """

    def __init__(self, layer: nn.Linear, units: int) -> None:
        super().__init__()
        like = layer.weight
        with torch.device("meta"):
            self.down, self.up = nn.Linear(layer.in_features, units), nn.Linear(units, layer.out_features)
        self.down.to_empty(device=like.device).to(like.dtype)
        self.up.to_empty(device=like.device).to(like.dtype)
        self.layer = layer.requires_grad_(False)
        with torch.no_grad():
            for held in (*self.down.parameters(), *self.up.parameters()):
                held.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """[n, ..., d] -> [n, ..., k]."""
        beside = self.up(F.relu(self.down(x)))
        out: Tensor = self.layer(x) + beside
        return out


def adapted(model: nn.Module, units: int, rng: torch.Generator) -> nn.Module:
    """A copy of `model` that is frozen but for its head, with an adapter of `units` units beside every other dense layer.

    Ways down are drawn by PyTorch's law for dense layers from `rng`; ways up are zero, so that the outputs are those of the
    model at first. The head is the last dense layer.
    Raises UnbatchError: the model has no dense layer besides its head.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> made, x = adapted(net, 2, torch.Generator().manual_seed(0)), torch.ones(1, 4)
    >>> torch.equal(made(x), net(x)), [name for name, w in made.named_parameters() if w.requires_grad][-2:]
    (True, ['2.weight', '2.bias'])
    """
    made = copy.deepcopy(model).requires_grad_(False)
    found = [
        (module, name, layer)
        for module in made.modules()
        for name, layer in module.named_children()
        if isinstance(layer, nn.Linear)
    ]
    if len(found) < 2:
        raise UnbatchError("the model has no dense layer besides its head, beside which an adapter could stand.")
    *hidden, (_, _, head) = found
    head.requires_grad_(True)
    for module, name, layer in hidden:
        beside = ParallelAdapter(layer, units)
        with torch.no_grad():
            for held in beside.down.parameters():
                held.uniform_(-1 / math.sqrt(layer.in_features), 1 / math.sqrt(layer.in_features), generator=rng)
        setattr(module, name, beside)
    return made
