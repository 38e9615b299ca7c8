"""ToldApart: the input maps of a batch's examples at one layer, told apart in the span of their windows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from unbatch.inversion.descent.places import WindowLayer
from unbatch.numerics.windows.completion import bordering, completed_span, largest_completed
from unbatch.numerics.windows.geometry import Windows
from unbatch.numerics.windows.growth import ZERO, grown
from unbatch.numerics.windows.maps import maps_in
from unbatch.numerics.windows.rays import rays, vanishing

GAP = 1e3  # least ratio of neighbouring singular values at which a rank ends
ROUNDINGS = 1e2  # of the largest singular value, below which nothing is counted
LARGEST_MISFIT = 1e-6  # of shared entries, relative, up to which a map is right
MISFIT_ERRORS = 300.0  # the same in units of the span's own error
LARGEST_ERROR = 1e-3  # of the span, at which nothing can be told from a zero
CLIENT_ROUNDINGS = 4  # of the update's type, by which the client's own arithmetic is off
MOST_COEFFICIENTS = 5000  # of the space of whole maps, whose cube is its cost
PROGRAMS = 12, 40  # linear programs: so many an example, and so many besides


@dataclass(frozen=True, eq=False)
class ToldApart:
    """What a layer received from every example, each up to a factor of its own.

    maps [n, *shape]: its inputs, as unit vectors of windows; shares [n, c_out, p]: what came back to its outputs, in units
    of these maps: the gradient is the sum over examples and windows of share patch^T.
    """

    place: WindowLayer
    maps: Tensor
    shares: Tensor
    missed: int  # examples that were counted and not found
    error: float  # of the maps, relative, as far as rounding goes

    def __len__(self) -> int:
        return len(self.maps)


def span(G: Tensor, eps: float) -> Tensor:
    """The row space of a gradient [c_out, d], as orthonormal rows; its rank is `counted`.

    >>> span(torch.outer(torch.ones(3), torch.tensor([3.0, 4.0])).double(), 1e-16).abs()
    tensor([[0.6000, 0.8000]], dtype=torch.float64)
    """
    Q, R = torch.linalg.qr(G.T) if _wide(G) else (None, G.T)
    _, S, V = torch.linalg.svd(R.T, full_matrices=False)
    rows: Tensor = V[: counted(S, eps)]
    return rows if Q is None else rows @ Q.T


def spectrum(G: Tensor) -> Tensor:
    """The singular values of a gradient [c_out, d], the largest first.

    >>> spectrum(torch.tensor([[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]]))
    tensor([4., 3.])
    """
    S: Tensor = torch.linalg.svdvals(torch.linalg.qr(G.T, mode="r").R if _wide(G) else G)
    return S


def span_error(G: Tensor, rank: int, eps: float) -> float:
    """How far a vector of the row space of the first singular vectors is known, relative: eps S_1 / S_rank."""
    S = spectrum(G)
    return eps * float(S[0] / S[rank - 1])


def counted(S: Tensor, eps: float) -> int:
    """The rank behind singular values: where they fall most; all of them where they fall nowhere.

    >>> counted(torch.tensor([3.0, 1.0, 1e-16], dtype=torch.float64), 1e-16)
    2
    """
    floor = max(ROUNDINGS * eps * float(S[0]), torch.finfo(S.dtype).tiny)
    ends = torch.cat([S, S.new_zeros(1)]).clamp_min(floor / GAP**2)
    drops = ends[:-1] / ends[1:]
    drops[S <= floor] = 0.0
    last = int(drops.argmax())
    return last + 1 if float(drops[last]) > GAP else len(S)


def _wide(G: Tensor) -> bool:
    """Whether a gradient is brought down to a square first, which then takes a fifth of the time."""
    return G.shape[1] > 2 * G.shape[0]


def separated(
    place: WindowLayer, G: Tensor, eps: float, rng: torch.Generator, tick: Callable[[], bool], *, mixed: bool = False
) -> ToldApart | None:
    """The maps behind a layer's weight gradient [c_out, c_in k^2]; None where the layer does not tell them apart.

    Where the span tells the space of whole maps (`maps_in`), the maps are the extreme rays of what is nonnegative in it;
    where windows overlap too little for that, those of the windows in a corner are grown to maps. A span that is a few
    directions short, since outputs are few or off for the whole batch, is completed first (`completed_span`). With `mixed`
    the outputs go into batch norm in train mode, whose gradients sum to zero, and the span is that of the windows'
    differences.
    """
    windows, rows = place.windows(), span(G, eps)
    error = span_error(G, len(rows), eps)
    if error > LARGEST_ERROR or len(rows) == G.shape[1]:  # a span of everything says nothing
        return None
    n, maps = _whole(windows, rows, rng, tick, error, mixed)
    if not n and not mixed:
        n, maps = _completed(windows, rows, rng, tick, error)
    if not n and not mixed:
        n, maps = _grown(windows, rows, rng, tick, error, most=place.limit)
    if not n or n * len(windows) > G.shape[1]:
        return None
    held = torch.stack(maps) if maps else G.new_zeros(0, *windows.shape)
    patches = windows.rows(held).flatten(0, 1)  # [n p, d]
    shares = torch.linalg.lstsq(patches.T, G.T).solution if maps else G.new_zeros(0, len(G))  # [n p, c_out]
    shares = shares.view(len(held), len(windows), len(G)).transpose(1, 2)
    return ToldApart(place, held, shares, n - len(held), error)


def lone(place: WindowLayer, G: Tensor, eps: float) -> ToldApart:
    """What a dense layer was given of the only example behind its gradient [c_out, d], which has rank one.

    It is the row space, up to a factor.
    """
    row = span(G, eps)[:1]
    return ToldApart(place, row.view(1, *place.windows().shape), (G @ row.T).view(1, -1, 1), 0, CLIENT_ROUNDINGS * eps)


def _whole(
    windows: Windows, rows: Tensor, rng: torch.Generator, tick: Callable[[], bool], error: float, mixed: bool
) -> tuple[int, list[Tensor]]:
    """The number of examples, and maps as extreme rays of the space of whole maps; 0 where that is not their space."""
    n, rest = divmod(len(rows) + mixed, len(windows))
    if rest or not n or len(windows) * len(rows) > MOST_COEFFICIENTS or not windows.overlapping:
        return 0, []
    basis = maps_in(rows, windows, differences=mixed, error=error, most=n).flatten(1)
    if len(basis) != n:
        return 0, []
    found = list[Tensor]()
    for ray in rays(basis, rng, most=PROGRAMS[0] * n + PROGRAMS[1], error=error):
        if not tick():
            break
        found.append(torch.where(ray < max(ZERO, error) * ray.max(), 0.0, ray).view(windows.shape))
        if len(found) == n:
            break
    return n, found


def _completed(
    windows: Windows, rows: Tensor, rng: torch.Generator, tick: Callable[[], bool], error: float
) -> tuple[int, list[Tensor]]:
    """The number of examples, and maps grown in the completed span, if fewer than all windows' directions are there."""
    for n in range(len(rows) // len(windows) + 1, largest_completed(windows, len(rows)) + 1):
        whole = completed_span(rows, windows, n, error=error)
        if whole is not None:
            return _grown(bordering(windows), whole, rng, tick, error, most=len(whole))
    return 0, []


def _grown(
    windows: Windows, rows: Tensor, rng: torch.Generator, tick: Callable[[], bool], error: float, *, most: int
) -> tuple[int, list[Tensor]]:
    """The number of examples, of no more than `most` windows, and maps grown from windows in a corner."""
    corner = int(windows.padded.sum(1).argmax())
    own = rows
    if len(windows) > 1:
        if not bool(windows.padded[corner].any()):
            return 0, []
        own = vanishing(rows, windows.padded[corner].to(rows.device), tolerance=max(1e-8, 30 * error))
    n, maps = len(own), list[Tensor]()
    if n * len(windows) > most:
        return 0, []
    for ray in rays(own, rng, most=PROGRAMS[0] * n + PROGRAMS[1], error=error):
        if not tick():
            break
        if windows.whole:
            found, misfit = ray.view(windows.shape), 0.0
        else:
            found, misfit = grown(rows, windows, ray, corner, error=error, tick=tick)
        if misfit < max(LARGEST_MISFIT, MISFIT_ERRORS * error):
            maps.append(found.nan_to_num(0.0))
        if len(maps) == n:
            break
    return n, maps
