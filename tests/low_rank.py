"""A low-rank adapter, written by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Adapted(nn.Module):
    """A dense layer with a low-rank adapter beside it."""

    def __init__(self, layer: nn.Linear, rank: int, *, started: bool) -> None:
        super().__init__()
        self.layer, self.down = layer, nn.Linear(layer.in_features, rank, bias=False)
        self.up = nn.Linear(rank, layer.out_features, bias=False)
        for weight, size in ((self.down.weight, 0.1), (self.up.weight, 0.1 * started)):
            nn.init.normal_(weight, std=size, generator=torch.Generator().manual_seed(3))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x) + self.up(self.down(x))
        return found
