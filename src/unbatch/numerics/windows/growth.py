"""A whole input map grown from one of its windows: neighbours share entries, and few vectors of the span fit those."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from unbatch.numerics.windows.geometry import Windows
from unbatch.numerics.windows.rays import exact_ray, least_nonnegative

ZERO = 1e-10  # of a window's largest entry, below which an entry is zero: a threshold of 1e-6 breaks the next layer
VANISHES = 1e-7  # singular value of the known entries, up to which they leave a vector of the span open
SLACK = 1e-9  # of the largest entry, by which a program may miss a bound
VANISHES_ERRORS, SLACK_ERRORS, ZERO_ERRORS = 30.0, 3.0, 30.0  # the same in units of the span's own error


def grown(
    rows: Tensor,
    windows: Windows,
    window: Tensor,
    place: int,
    *,
    error: float = 0.0,
    tick: Callable[[], bool] = lambda: True,
) -> tuple[Tensor, float]:
    """The input map [channels, height, width] of one example, from one of its windows and the span of the whole batch's.

    The next window is always one that shares most entries with what is known. The vectors of the span with these entries
    differ by the few that vanish there, windows of corners and edges. The nonnegative one with the least sum is taken
    (`least_nonnegative`), and made exact by its zeros (`exact_ray`), scaled by the entries that are shared.

    `rows` [r, channels k k] orthonormal, known up to `error`, relative, `windows` the convolution's, `window` [channels
    k k] the one at `place`. The other value is the largest relative misfit of a shared entry, 0 for a map that is
    right; infinite where no vector fits, or `tick` says that time is up. Entries that no window holds are nan.

    >>> rng = torch.Generator().manual_seed(0)
    >>> x = torch.randn(2, 24, 4, 4, generator=rng, dtype=torch.float64).relu()
    >>> windows = Windows.of((24, 4, 4), kernel=(3, 3), padding=(1, 1))
    >>> held = windows.rows(x)  # [2, 16, 216]
    >>> rows = torch.linalg.qr(held.flatten(0, 1).T).Q.T  # 32 directions of 216
    >>> map, misfit = grown(rows, windows, held[1, 0], 0)
    >>> torch.allclose(map, x[1]), misfit < 1e-9
    (True, True)
    """
    entries, padded = windows.entries.to(rows.device), windows.padded.to(rows.device)
    found = rows.new_full((torch.Size(windows.shape).numel(),), torch.nan)
    found[entries[place][~padded[place]]] = _zeroed(window, error)[~padded[place]]
    left, worst = set(range(len(windows))) - {place}, 0.0
    while left:
        known = ~padded & ~found[entries.clamp_min(0)].isnan()  # [p, channels k k]
        share = (known | padded).double().mean(1)
        at = max(left, key=lambda p: (float(share[p]), -p))
        left.discard(at)
        target = torch.where(known[at], found[entries[at].clamp_min(0)], 0.0)
        if not tick():
            return found.view(windows.shape), torch.inf
        next_window = _next(rows, target, known[at], padded[at], error)
        if next_window is None:
            return found.view(windows.shape), torch.inf
        size = float(target[known[at]].norm())
        worst = max(worst, float((next_window - target)[known[at]].norm()) / size if size else 0.0)
        fresh = ~padded[at] & ~known[at]
        found[entries[at][fresh]] = next_window[fresh]
    return found.view(windows.shape), worst


def _next(rows: Tensor, target: Tensor, known: Tensor, padded: Tensor, error: float) -> Tensor | None:
    """The window with these known entries."""
    fixed = known | padded
    Q, R = torch.linalg.qr(rows[:, fixed].T)  # [f, q], [q, r]
    U, S, V = torch.linalg.svd(R)
    held = int((S > max(VANISHES, VANISHES_ERRORS * error)).sum())
    z = ((U.T @ (Q.T @ target[fixed]))[:held] / S[:held]) @ V[:held]
    base, free = z @ rows, V[held:] @ rows
    rough = base
    if len(free):
        open_ = ~fixed
        least = least_nonnegative(base[open_], free[:, open_], slack=max(SLACK, SLACK_ERRORS * error))
        if least is None:
            return None
        rough = base.clone()
        rough[open_] = least
    sharp = exact_ray(rows, torch.where(padded, 0.0, rough), error=error)
    if sharp is None or not bool(target[known].any()):
        return _zeroed(rough, error)
    scale = float(sharp[known] @ target[known]) / float(sharp[known] @ sharp[known])
    return _zeroed(sharp * scale, error)


def _zeroed(window: Tensor, error: float) -> Tensor:
    return torch.where(window < max(ZERO, ZERO_ERRORS * error) * window.max(), 0.0, window)
