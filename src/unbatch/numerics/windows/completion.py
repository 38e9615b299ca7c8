"""A span that lacks a few directions of its windows, completed: padding shows them where other windows are zero."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from unbatch.numerics.windows.geometry import Windows

CLOSED = 1e-12  # eigenvalue of the squared misfit, below which a vector is one of the completed span
CLOSED_ERRORS = 100.0  # the same, its root, in units of the span's own error
NEXT = 1e-6  # eigenvalue that the next vector must exceed


def bordering(windows: Windows) -> Windows:
    """The same windows without the entries that are padding in no place, such as the middle of a 3 x 3 kernel.

    >>> bordering(Windows.of((1, 3, 3), kernel=(3, 3), padding=(1, 1))).entries.shape
    torch.Size([9, 8])
    """
    return replace(windows, entries=windows.entries[:, windows.padded.any(0)])


def largest_completed(windows: Windows, rank: int) -> int:
    """The largest batch whose windows' span is `completed` from so many of its dimensions, by counting; 0 where none.

    Each border place that has enough windows gives |Q_p| equations less the dimension of the others' windows, and on the
    entries of `bordering` all but n P dimensions must go. What a place of an edge says a corner of that edge says again.

    >>> windows = Windows.of((512, 4, 4), kernel=(3, 3), padding=(1, 1))
    >>> 512 // 16, largest_completed(windows, 512)
    (32, 42)
    """
    entries, most = _entries(windows), 0
    borders = [(int(padded.sum()), covered, padded) for padded, covered in _borders(windows)]
    for n in range(1, rank + 1):
        count = n * len(windows)
        used = [border for border in borders if count - rank <= n * border[1] and count - n * border[1] < border[0]]
        held = [b for b in used if not any(b is not o and bool((o[2] | ~b[2]).all()) for o in used)]
        if count >= entries or sum(size - (count - n * covered) for size, covered, _ in held) < entries - count:
            break
        most = n
    return most


def _entries(windows: Windows) -> int:
    """The number of entries of `bordering`; 0 where they are all padding in some place, whose windows they do not show."""
    seen = windows.padded.any(0)
    return 0 if bool(windows.padded[:, seen].all(1).any()) else int(seen.sum())


def _borders(windows: Windows) -> Iterator[tuple[Tensor, int]]:
    """What is padding in a place of the border [d], and the number of places whose padding is no less."""
    for padded in torch.unique(windows.padded, dim=0):
        if bool(padded.any()):
            yield padded, int((windows.padded | ~padded).all(1).sum())


def completed_span(rows: Tensor, windows: Windows, n: int, *, error: float = 0.0) -> Tensor | None:
    """The span of all n P windows on the entries of `bordering`, from a part of their span; None where that fails.

    A layer with fewer outputs than windows, or one of whose units is off for the whole batch, gives S = {sum z_ip w_ip :
    c . z = 0} for some m vectors c: it lacks m directions. Vectors of S that are zero on the padded entries Q_p of a border
    place are combinations of windows there. If m is not above the number of those, S restricted to Q_p is still the span of
    all the windows restricted to Q_p. So every window v obeys: v on Q_p is in S on Q_p, for every border place p, which
    are linear equations whose only solutions are windows once they are enough.

    `rows` [r, d] orthonormal and known up to `error`, n examples. Returns [n P, entries] orthonormal rows.

    >>> rng = torch.Generator().manual_seed(0)
    >>> x = torch.randn(2, 24, 4, 4, generator=rng, dtype=torch.float64).relu()
    >>> windows = Windows.of((24, 4, 4), kernel=(3, 3), padding=(1, 1))
    >>> held = windows.rows(x).flatten(0, 1)  # [32, 216]
    >>> short = torch.randn(30, 32, generator=rng, dtype=torch.float64) @ held  # two outputs too few
    >>> rows = completed_span(torch.linalg.qr(short.T).Q.T, windows, 2)
    >>> own = bordering(windows).rows(x).flatten(0, 1)
    >>> rows.shape, torch.allclose(own @ rows.T @ rows, own)
    (torch.Size([32, 192]), True)
    """
    count, short = n * len(windows), n * len(windows) - len(rows)
    seen = windows.padded.any(0)
    if count >= _entries(windows):
        return None
    misfit = rows.new_zeros(windows.entries.shape[1], windows.entries.shape[1])
    for padded, covered in _borders(windows):
        rank = count - n * covered
        if short > n * covered or rank >= int(padded.sum()):
            continue
        where = padded.nonzero()[:, 0].to(rows.device)
        Q = torch.linalg.svd(rows[:, where], full_matrices=False)[2][:rank]  # [rank, |Q|]
        misfit[where[:, None], where] += torch.eye(len(where)).to(Q) - Q.T @ Q
    seen = seen.to(rows.device)
    values, vectors = torch.linalg.eigh(misfit[seen][:, seen])
    if not (float(values[count - 1]) < max(CLOSED, (CLOSED_ERRORS * error) ** 2) and float(values[count]) > NEXT):
        return None
    found: Tensor = vectors[:, :count].T
    return found
