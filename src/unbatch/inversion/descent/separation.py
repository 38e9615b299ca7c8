"""Separation: the input maps of a batch's examples at one layer, told apart in the span of their windows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from unbatch.inversion.descent.places import Place
from unbatch.numerics.windows.geometry import Windows
from unbatch.numerics.windows.growth import ZERO, grown
from unbatch.numerics.windows.maps import maps_in
from unbatch.numerics.windows.rays import rays, vanishing

GAP = 1e3  # least ratio of neighbouring singular values at which a rank ends
ROUNDINGS = 1e2  # of the largest singular value, below which nothing is counted
LARGEST_MISFIT = 1e-6  # of shared entries, relative, up to which a map is right
MOST_COEFFICIENTS = 5000  # of the space of whole maps, whose cube is its cost
PROGRAMS = 12, 40  # linear programs: so many an example, and so many besides


@dataclass(frozen=True, eq=False)
class Separation:
    """What a layer received from every example, each up to a factor of its own.

    maps [n, *shape]: its inputs, as unit vectors of windows; shares [n, c_out, p]: what came back to its outputs, in units
    of these maps: the gradient is the sum over examples and windows of share patch^T.
    """

    place: Place
    maps: Tensor
    shares: Tensor
    missed: int  # examples that were counted and not found

    def __len__(self) -> int:
        return len(self.maps)


def span(G: Tensor, eps: float) -> Tensor:
    """The row space of a gradient [c_out, d], as orthonormal rows; its rank is where the singular values fall most.

    >>> span(torch.outer(torch.ones(3), torch.tensor([3.0, 4.0])).double(), 1e-16).abs()
    tensor([[0.6000, 0.8000]], dtype=torch.float64)
    """
    _, S, V = torch.linalg.svd(G, full_matrices=False)
    floor = max(ROUNDINGS * eps * float(S[0]), torch.finfo(S.dtype).tiny)
    ends = torch.cat([S, S.new_zeros(1)]).clamp_min(floor / GAP**2)
    drops = ends[:-1] / ends[1:]
    drops[S <= floor] = 0.0
    last = int(drops.argmax())
    return V[: last + 1] if float(drops[last]) > GAP else V


def separated(
    place: Place, G: Tensor, eps: float, rng: torch.Generator, tick: Callable[[], bool], *, mixed: bool = False
) -> Separation | None:
    """The maps behind a layer's weight gradient [c_out, c_in k^2]; None where the layer does not tell them apart.

    With `mixed` its outputs go into batch norm in train mode, which takes one direction from the span. Where the span tells
    the space of whole maps (`maps_in`), the maps are the extreme rays of what is nonnegative in it; where windows overlap too
    little for that, those of the windows in a corner are grown to maps.
    """
    windows, rows = place.windows(), span(G, eps)
    maps, n = _whole(windows, rows, rng, tick, mixed), round((len(rows) + mixed) / len(windows))
    if maps is None and not mixed:
        maps, n = _grown(place, windows, rows, rng, tick)
    if not maps or n * len(windows) > place.limit:
        return None
    held = torch.stack(maps)
    patches = windows.rows(held).flatten(0, 1)  # [n p, d]
    shares = torch.linalg.lstsq(patches.T, G.T).solution  # [n p, c_out]
    shares = shares.view(len(held), len(windows), -1).transpose(1, 2)
    return Separation(place, held, shares, n - len(held))


def _whole(
    windows: Windows, rows: Tensor, rng: torch.Generator, tick: Callable[[], bool], mixed: bool
) -> list[Tensor] | None:
    """The maps as extreme rays of the space of whole maps; None where that has not one dimension an example."""
    n, rest = divmod(len(rows) + mixed, len(windows))
    if len(windows) == 1 or rest or not n or len(windows) * len(rows) > MOST_COEFFICIENTS:
        return None
    basis = maps_in(rows, windows, differences=mixed).flatten(1)
    if len(basis) != n:
        return None
    found = list[Tensor]()
    for ray in rays(basis, rng, most=PROGRAMS[0] * n + PROGRAMS[1]):
        if not tick():
            break
        found.append(torch.where(ray < ZERO * ray.max(), 0.0, ray).view(windows.shape))
    return found


def _grown(
    place: Place, windows: Windows, rows: Tensor, rng: torch.Generator, tick: Callable[[], bool]
) -> tuple[list[Tensor], int]:
    """The maps grown from windows in a corner, and the number of examples."""
    corner = int(windows.padded.sum(1).argmax())
    own = rows
    if len(windows) > 1:
        if not bool(windows.padded[corner].any()):
            return [], 0
        own = vanishing(rows, windows.padded[corner].to(rows.device))
    n, shape, maps = len(own), torch.Size(windows.shape), list[Tensor]()
    if n * len(windows) > place.limit:
        return [], n
    for ray in rays(own, rng, most=PROGRAMS[0] * n + PROGRAMS[1]):
        if not tick():
            break
        if len(windows) == 1:
            maps.append(ray.view(shape))
            continue
        found, misfit = grown(rows, windows, ray, corner, tick=tick)
        if misfit < LARGEST_MISFIT:
            maps.append(found.nan_to_num(0.0))
    return maps, n
