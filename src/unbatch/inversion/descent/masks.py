"""Masks: entries behind a ReLU that were taken for zero and are not, or the reverse, found by the layers they lead to."""

from __future__ import annotations

import torch
from torch import Tensor

from unbatch.numerics.windows.geometry import Windows

WORTH = 0.1  # of the squared contradiction, by which one flipped entry must take it down
DETERMINED = 2.0  # numbers of a contradiction for each entry in question, at which least squares tells
CLOSED = 0.1  # of a contradiction, which may be left of it
NEAR_ZERO = 100.0  # times an entry's noise, above which it is surely positive


def flipped(contradictions: Tensor, flips: Tensor, inputs: Tensor, windows: Windows, open_: Tensor) -> Tensor:
    """Which entries of a mask were decided wrongly, for output channels whose gradient contradicts what came back to them.

    `contradictions` [o, c_in k^2] is the channels' weight gradient less the sum of delta patch^T, `flips` [n, o, p] how much
    each entry's delta changes if its mask does, `inputs` [n, *shape] what the layer was given, looked at through `windows`;
    entries not `open_` [n, o, p] are sure.
    Returns [n, o, p].

    >>> rng = torch.Generator().manual_seed(0)
    >>> windows = Windows.of((2, 4, 4), kernel=(3, 3))
    >>> x, change = (torch.randn(2, *shape, generator=rng, dtype=torch.float64) for shape in [(2, 4, 4), (1, 4)])
    >>> off = (change[1, 0, 2] * windows.rows(x)[1, 2])[None]
    >>> flipped(off, change, x, windows, torch.ones(2, 1, 4, dtype=torch.bool)).nonzero().tolist()
    [[1, 0, 2]]
    """
    patches = windows.rows(inputs).flatten(0, 1)  # [n p, d]
    steps = flips.transpose(0, 1).flatten(1)  # [o, n p]
    found = torch.zeros_like(steps, dtype=torch.bool)
    for o, off in enumerate(contradictions):
        free = (open_[:, o].flatten() & (steps[o] != 0)).nonzero().flatten()
        columns = steps[o, free, None] * patches[free]
        found[o, free] = _chosen(columns, off)
    return found.view(flips.shape[1], len(flips), -1).transpose(0, 1)


def _chosen(columns: Tensor, off: Tensor) -> Tensor:
    """Which of the vectors [j, d] add up to `off` [d]: by least squares where they determine it, else one by one."""
    taken = torch.zeros(len(columns), dtype=torch.bool, device=columns.device)
    sizes = columns.square().sum(1)
    if DETERMINED * len(columns) <= len(off):
        units = sizes.sqrt().clamp_min(torch.finfo(sizes.dtype).tiny)
        shares = torch.linalg.lstsq((columns / units[:, None]).T, off[:, None]).solution[:, 0] / units
        taken = shares > 0.5
        if float((off - columns[taken].sum(0)).norm()) < CLOSED * float(off.norm()):
            return taken
        taken.fill_(False)
    while not bool(taken.all()):
        gains = (2 * columns @ off - sizes).masked_fill(taken, -torch.inf)
        best = int(gains.argmax())
        if not float(gains[best]) > WORTH * float(off.square().sum()):
            break
        off, taken[best] = off - columns[best], True
    return taken
