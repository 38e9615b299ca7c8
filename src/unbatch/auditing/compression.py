"""Compression: what was done to an update so that less had to be sent, seen in its numbers: half precision, top-k."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from unbatch.protocol import Update
from unbatch.update import SAMPLE, as_rounded

ENOUGH = 64  # entries of a tensor, from which on a pattern in it is no chance
MOST_LEVELS = 257  # different numbers in a tensor that was rounded to 8 bits
OFF_GRID = 0.01  # of a level's distance to the next, by which it may be off
FEW = 3  # entries for each different number, at least, on a grid
SPARSE = 0.3  # share of zeros, besides whole rows and columns of them, from which on entries were dropped
THRESHOLD = 0.1  # of the median, that the least entry of a normal law that was cut stays above


def compression(update: Update) -> list[str]:
    """What was done to an update so that less had to be sent, in sentences; empty where its numbers show nothing.

    Numbers that all fit a coarser type were rounded to it. A tensor of few numbers at equal distances was put on a
    grid. Zeros that make no whole rows or columns, as units and inputs that are silent leave them, are entries that were
    dropped: the smallest ones (top-k), if those that are left keep a distance from zero.

    >>> sent = {"weight": torch.randn(40, 50, generator=torch.Generator().manual_seed(0))}
    >>> compression(sent)
    []
    >>> from unbatch.defences import Prune
    >>> print(compression(Prune(share=0.9).expected(sent))[0].partition(":")[0])
    90% of its entries are exactly zero and all others far from it
    """
    grid = [name for name, tensor in update.items() if _on_a_grid(tensor)]
    large = [name for name, tensor in update.items() if tensor.numel() >= FEW * ENOUGH and bool(tensor.any())]
    if grid and len(grid) == len(large):
        levels = max(len(torch.unique(update[name])) for name in grid)
        bits = max(2, math.ceil(math.log2(levels)))
        return [
            f"each of its larger tensors holds {levels} different numbers at most: it was quantised to {bits} bits. If the "
            f"client did so, declare --defence quantise:bits={bits}, so that attacks reckon with it."
        ]
    return [*_precision(update), *_dropped(update)]


def _precision(update: Update) -> Iterator[str]:
    kinds = {tensor.dtype for tensor in as_rounded(update).values()}
    kind = kinds.pop()
    if not kinds and kind.itemsize < 4:
        yield f"its numbers are those of {str(kind).removeprefix('torch.')}: it was sent in half precision."


def _dropped(update: Update) -> Iterator[str]:
    parts = [_lively(tensor) for tensor in update.values()]
    entries = sum(part.numel() for part in parts)
    zeros = sum(int((part == 0).sum()) for part in parts)
    if not entries or zeros / entries < SPARSE or entries - zeros < ENOUGH:
        return
    share = 1 - sum(int((tensor != 0).sum()) for tensor in update.values()) / sum(t.numel() for t in update.values())
    kept = [part[part != 0].abs().double() for part in parts]
    whole = torch.cat(kept)
    least = [float(each.min() / each.median()) for each in (whole, *(k for k in kept if len(k) >= ENOUGH))]
    if least[0] > THRESHOLD or (len(least) > 1 and min(least[1:]) > THRESHOLD):
        yield (
            f"{share:.0%} of its entries are exactly zero and all others far from it: the largest alone were sent (top-k). "
            f"If the client did so, declare --defence prune:share={share:.2g}, so that attacks reckon with it."
        )
    else:
        yield f"{share:.0%} of its entries are exactly zero, in no whole rows or columns: entries were masked or dropped."


def _on_a_grid(tensor: Tensor) -> bool:
    """Whether a tensor has so few different numbers for its size that they are levels."""
    if tensor.numel() < FEW * ENOUGH or len(torch.unique(tensor.flatten()[:SAMPLE])) > MOST_LEVELS:
        return False
    if not bool(tensor.any()):
        return False
    lively = _lively(tensor).double()
    levels = torch.unique(lively)
    if not 1 < len(levels) <= MOST_LEVELS or lively.numel() < FEW * len(levels):
        return False
    steps = levels / (levels[1:] - levels[:-1]).min()
    return bool(((steps - steps.round()).abs() < OFF_GRID).all())


def _lively(tensor: Tensor) -> Tensor:
    """A tensor [p, q] without the rows and columns that are zero throughout."""
    matrix = tensor.detach().reshape(len(tensor), -1) if tensor.ndim else tensor.detach().reshape(1, 1)
    return matrix[(matrix != 0).any(1)][:, (matrix != 0).any(0)]
