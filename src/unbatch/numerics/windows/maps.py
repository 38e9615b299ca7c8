"""Whole maps out of the span of their windows: shared entries agree and padding is zero, which is linear in the maps."""

from __future__ import annotations

import torch
from torch import Tensor

from unbatch.numerics.linear.null_space import null_space
from unbatch.numerics.windows.geometry import PADDED, Windows

FITS = 1e-10  # eigenvalue of the squared misfit of shared entries, below which windows fit
FITS_ERRORS = 30.0  # the same, its root, in units of the span's error
VANISHED = 1e-8  # singular value over the largest, or norm of a map, below which it is zero


def maps_in(
    rows: Tensor, windows: Windows, *, differences: bool = False, error: float = 0.0, most: int | None = None
) -> Tensor:
    """The maps all of whose windows lie in a span, as an orthonormal basis [m, channels, height, width].

    Windows a_p rows are those of one map if shared entries agree and padding is zero: linear equations for the P r
    coefficients a, whose solutions are the null vectors of the sum of squared misfits [P r, P r]. Where every window
    overlaps others on all sides these are the batch's own maps and no more, whatever activation made them. With
    `differences` it is the differences of a map's windows that lie in the span, as behind batch norm in train mode.

    `rows` [r, channels k k] orthonormal and known up to `error`, `windows` the convolution's. With `most` no more than that
    many are looked for, which is faster: where there are more, some more come back, and not all.

    >>> rng = torch.Generator().manual_seed(0)
    >>> x = torch.randn(2, 24, 4, 4, generator=rng, dtype=torch.float64)
    >>> windows = Windows.of((24, 4, 4), kernel=(3, 3), padding=(1, 1))
    >>> held = windows.rows(x).flatten(0, 1)  # [32, 216]
    >>> basis = maps_in(torch.linalg.qr(held.T).Q.T, windows).flatten(1)
    >>> basis.shape, torch.allclose(x.flatten(1) @ basis.T @ basis, x.flatten(1))
    (torch.Size([2, 384]), True)
    >>> apart = torch.linalg.qr((held[1:] - held[0]).T).Q.T  # 31 directions
    >>> len(maps_in(apart, windows, differences=True))
    2
    """
    channels, height, width = windows.shape
    taps, places, r = windows.entries.shape[1] // channels, len(windows), len(rows)
    seen = windows.entries[:, :taps].flatten().to(rows.device)  # of the first channel, in every place
    made = rows.new_zeros(places * taps, height * width + (taps if differences else 0))
    inside = seen != PADDED
    made[inside.nonzero()[:, 0], seen[inside]] = 1.0
    if differences:  # what is common to all places, which the span leaves open
        made[torch.arange(places * taps), height * width + torch.arange(taps).repeat(places)] = -1.0
    U, S, _ = torch.linalg.svd(made, full_matrices=False)
    fit = U[:, S > VANISHED * S[0]]
    off = (torch.eye(len(made)).to(rows) - fit @ fit.T).view(places, taps, places, taps)
    apart = rows.view(r, channels, taps)
    products = torch.einsum("bca,dce->aebd", apart, apart)
    squares = torch.einsum("jakx,axbd->jbkd", off, products).reshape(places * r, places * r)
    held = null_space(squares, max(FITS, (FITS_ERRORS * error) ** 2), most=most).view(-1, places, r)
    entries = torch.einsum("mjb,bca->mcja", held, apart).reshape(len(held), channels, places * taps)
    found: Tensor = (entries @ torch.linalg.pinv(made).T)[..., : height * width].flatten(1)
    if not len(found):
        return found.view(0, channels, height, width)
    _, S, V = torch.linalg.svd(found, full_matrices=False)
    kept: Tensor = V[S > max(VANISHED, FITS_ERRORS * error) * max(1.0, float(S[0]))]
    return kept.view(-1, channels, height, width)
