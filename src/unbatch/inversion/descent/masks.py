"""Masks: entries behind a ReLU that were taken for zero and are not, or the reverse, found by the layers they lead to."""

from __future__ import annotations

import torch
from torch import Tensor

from unbatch.numerics.windows.geometry import Windows

WORTH = 0.1  # of the squared contradiction, by which one flipped entry must take it down
DETERMINED = 2.0  # numbers of a contradiction for each entry in question, at which least squares tells
GAIN = 50.0  # times the mean square of what is left, by which a flip must take down the sum of squares
MOST_FLIPS = 500
CLOSED = 0.1  # of a contradiction, which may be left of it
NEAR_ZERO = 100.0  # times an entry's noise, above which it is surely positive


def flipped(contradictions: Tensor, flips: Tensor, inputs: Tensor, windows: Windows, open_: Tensor) -> Tensor:
    """Which entries of a mask were decided wrongly, for output channels whose gradient contradicts what came back to them.

    `contradictions` [o, c_in k^2] is the channels' weight gradient less the sum of delta patch^T, `flips` [n, o, p] how
    much each entry's delta changes if its mask does, `inputs` [n, *shape] what the layer was given, looked at through
    `windows`; entries not `open_` [n, o, p] are sure. Returns [n, o, p].

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
        sure: Tensor = shares > 0.5
        if float((off - columns[sure].sum(0)).norm()) < CLOSED * float(off.norm()):
            return sure
    while not bool(taken.all()):
        gains = (2 * columns @ off - sizes).masked_fill(taken, -torch.inf)
        best = int(gains.argmax())
        if not float(gains[best]) > WORTH * float(off.square().sum()):
            break
        off, taken[best] = off - columns[best], True
    return taken


def pursued(
    left: Tensor, U: Tensor, rows: Tensor, flips: Tensor, inputs: Tensor, windows: Windows, open_: Tensor
) -> Tensor:
    """The same where no channel stands out, with hardly more equations than unknowns: what all of them leave is used.

    `left` [m, c_in] = B - U U^T B is what the equations A X = B of a tensor leave over, for all input channels, `U` [m, r]
    an orthonormal basis of A's columns, `rows` [o, k^2] those of this layer, `flips` and `open_` [n, o, p] as above for all
    output channels. A flip adds to B a known vector; the one after which least is left is made, as long as it gains more
    than noise would. A flip may be taken back. Returns [n, o, p].
    """
    left, (n, count, _), k = left.clone(), flips.shape, rows.shape[1]
    patches = windows.rows(inputs).flatten(0, 1)  # [n p, c k^2]
    each = patches.view(len(patches), -1, k)
    own = U[rows]  # [o, k^2, r]
    hold = torch.eye(k).to(U) - own @ own.transpose(1, 2)
    sizes = hold.flatten(1) @ (each.transpose(1, 2) @ each).flatten(1).T  # [o, n p], of a unit flip in what is left
    steps = flips.transpose(0, 1).flatten(1).clone()  # [o, n p]
    free = open_.transpose(0, 1).flatten(1)
    found = torch.zeros_like(free)
    freedom = (len(U) - U.shape[1]) * left.shape[1]
    for _ in range(MOST_FLIPS if freedom else 0):
        gains = 2 * steps * (left[rows].transpose(1, 2).flatten(1) @ patches.T) - steps.square() * sizes
        o, j = divmod(int(gains.masked_fill(~free, -torch.inf).argmax()), len(patches))
        if not float(gains[o, j]) > GAIN * float(left.square().sum()) / freedom:
            break
        step = steps[o, j] * each[j].T  # [k^2, c]
        left = left + U @ (own[o].T @ step)
        left[rows[o]] -= step
        steps[o, j], found[o, j] = -steps[o, j], ~found[o, j]
    return found.view(count, n, -1).transpose(0, 1)
