"""Facets: the vectors of which all rows of a matrix are sums with weights of zero or more, by the facets of their cone.

Let every row be r_k = sum_i c_ki g_i with n independent vectors g_i and c_ki >= 0, many of them zero. The rows then lie in
the cone of the g_i, and on its i-th facet all those with c_ki = 0. If n - 1 of these are independent, that facet of the
cone is one of the rows' convex hull too: it has the normal q with q . r_k >= 0 for all k and q . r_k = 0 on the facet. The
hull has other facets, but in general position n - 1 rows lie on each of those and no more: the n with the most rows are
the cone's, and the g_i are the columns of the inverse of their normals.

min p . q over q . r_k >= 0 and q . m = 1 is a linear programme, with no minima to get stuck in. It ends on the facet that
a ray from m along -p leaves the hull by. With m the mean of rows that are alike and p at right angles to all normals that
are known, the ray comes no nearer to those facets and leaves by another. With m a guess of g_i and p the mean of rows that
are taken to hold none of it, the end is facet i, if both are nearly so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

ON = 4.0  # times the noise of a row along a normal, up to which the row is on its facet
STRAYS = 1  # rows that may be further than that on the wrong side
LEEWAY = 5.0  # times the noise, by which a row may be outside once a programme is loosened
LOOSENED = 2  # programmes towards one guess, of which the second is loosened
SURE = 30.0  # times the noise of a direction, from which on a row says where it points
FITS_FROM = (1000.0, 300.0, 100.0, 30.0, 10.0)  # times the noise, within which rows are fitted at first
ENDS_WITHIN = 1e-6  # of a typical row's length, within which a programme's end is known: noise, where that is less
NARROWER = 1.7  # from one fit to the next
MOST_FITS = 80  # to settle on which rows are on a facet
ALIKE = (0.02, 0.06, 0.3)  # of all rows, the nearest ones to one, from whose mean a ray goes
ALONE = 5.0  # times the noise, by which rows of a facet stray from it along any other normal, root mean square
SHARED = 0.95  # of the rows on the smaller of two facets, that are on both if these are one
DEPENDENT = 1e-7  # of the largest singular value of unit distances, below which a facet depends on others


@dataclass(frozen=True, eq=False)
class Facets:
    """Facets of a cone, those with the most rows first: unit normals [f, r], and how many rows are on each [f].

    >>> Facets(torch.eye(2), torch.tensor([3, 2])).normals.shape
    torch.Size([2, 2])
    """

    normals: Tensor
    on: Tensor

    def independent(self, rows: Tensor, count: int) -> Tensor:
        """As many normals [c, r], c at most `count`, as are independent in their distances from `rows` [m, r].

        >>> facets = Facets(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), torch.tensor([3, 2, 1]))
        >>> facets.independent(torch.eye(2), 2).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
        """
        chosen = self.normals[:0]
        for each in self.normals:
            if len(chosen) == count:
                break
            more = torch.cat([chosen, each[None]])
            sizes = torch.linalg.svdvals(torch.nn.functional.normalize(more @ rows.T, dim=1))
            if float(sizes[-1]) > DEPENDENT * float(sizes[0]):
                chosen = more
        return chosen


class FacetSearch:
    """A search for the facets of the cone of rows [m, r], float64: by linear programmes, and from normals that are offered.

    `noise` is the standard deviation of each entry of a row; rows that are no more than that are left out (`kept` [m]).

    >>> rng = torch.Generator().manual_seed(0)
    >>> c = torch.rand(60, 3, generator=rng).double() * (torch.rand(60, 3, generator=rng) < 0.6)
    >>> g = torch.randn(3, 3, generator=rng).double()
    >>> search = FacetSearch(c @ g, 1e-12)
    >>> for _ in range(12):
    ...     search.programme(search.found.normals[:2], rng)
    >>> found = torch.nn.functional.normalize(torch.linalg.inv(search.found.normals[:3]).T, dim=1)
    >>> bool((found @ torch.nn.functional.normalize(g, dim=1).T).abs().amax(0).min() > 1 - 1e-9)
    True
    """

    def __init__(self, rows: Tensor, noise: float) -> None:
        self.kept = rows.norm(dim=1) > SURE * noise * math.sqrt(rows.shape[1])
        self.rows, self.noise = rows[self.kept], noise
        self.found = Facets(self.rows[:0], torch.zeros(0, dtype=torch.long))
        self._cone = _Cone.of(self.rows) if len(self.rows) > rows.shape[1] else None

    def programme(self, known: Tensor, rng: torch.Generator) -> None:
        """One linear programme, which ends on no facet with a normal in `known` [c, r], and what its end is fitted to."""
        if self._cone is not None:
            self._end(*self._cone.ray(known, rng), 1)

    def nearest(self, chosen: Tensor, vector: Tensor) -> None:
        """One for the normal q with q . vector = 1 from which the rows `chosen` [m] are least away, and its fit.

        If the vector is one of the g_i and most of the chosen rows hold none of it, that is its facet's normal.
        """
        if self._cone is not None and bool(chosen.any()):
            p = torch.nn.functional.normalize(self._cone.even[chosen], dim=1).mean(0)
            self._end(p / p.norm(), torch.nn.functional.normalize(vector @ self._cone.back, dim=0), LOOSENED)

    def _end(self, p: Tensor, m: Tensor, turns: int) -> None:
        """Programmes until the end of one can be fitted: rows may be outside by their noise times the last end's length."""
        length = 0.0
        for _ in range(turns):
            normal = self._cone.lowest(p, m, LEEWAY * self.noise * length) if self._cone is not None else None
            length = float(normal.norm()) if normal is not None else 0.0
            if normal is None or self.offer(normal / length):
                return

    def offer(self, normal: Tensor) -> bool:
        """Whether a unit normal [r] is near a facet's, which then is among those found."""
        fitted = _fitted_facet(self.rows, normal, self.noise)
        self.found = _with(self.rows, self.noise, self.found, fitted)
        return fitted is not None

    def many(self, count: int, share: float) -> Tensor:
        """Independent normals [c, r] of the facets that more than `count` rows are on, and `share` of those' median."""
        more = self.found.on[self.found.on > count]
        most = int((more > share * more.median()).sum()) if len(more) else 0
        return Facets(self.found.normals[:most], self.found.on[:most]).independent(self.rows, self.rows.shape[1])


@dataclass(frozen=True, eq=False)
class _Cone:
    """Rows, of unit length, and in coordinates in which they are equally large in every direction."""

    unit: Tensor  # [m, r]
    sizes: Tensor  # [m], the rows' lengths before
    even: Tensor  # [m, r] = unit back
    back: Tensor  # [r, r]; back q is the normal that q is in these coordinates

    @classmethod
    def of(cls, rows: Tensor) -> _Cone:
        size = rows.norm(dim=1, keepdim=True)
        _, sizes, axes = torch.linalg.svd(rows / size, full_matrices=False)
        back = axes.T / sizes * math.sqrt(len(rows))
        return cls(rows / size, size[:, 0], rows / size @ back, back)

    def ray(self, known: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """p and m [r]: a direction in which no row comes nearer to facets that are known, and the mean of alike rows."""
        m = len(self.unit)
        one = int(torch.randint(m, (1,), generator=rng))
        share = ALIKE[int(torch.randint(len(ALIKE), (1,), generator=rng))]
        alike = (self.unit @ self.unit[one]).argsort(descending=True)[: max(2, int(share * m))]
        even = torch.nn.functional.normalize(self.even[alike], dim=1)
        free = unknown_directions(known)
        drawn = torch.randn(len(free), generator=rng, dtype=torch.float64).to(free)
        return torch.nn.functional.normalize(drawn @ free @ self.back, dim=0), even.mean(0)

    def lowest(self, p: Tensor, m: Tensor, outside: float) -> Tensor | None:
        """The normal [r] with the least p . q of those with m . q = 1 that no row is further than that outside of."""
        from scipy.optimize import linprog

        done = linprog(
            p.cpu().numpy(),
            A_ub=-self.even.cpu().numpy(),
            b_ub=(outside / self.sizes).cpu().numpy(),
            A_eq=m[None].cpu().numpy(),
            b_eq=[1.0],
            bounds=(None, None),
            method="highs",
        )
        return self.back @ torch.as_tensor(done.x).to(self.back) if done.status == 0 else None


def unknown_directions(normals: Tensor) -> Tensor:
    """Orthonormal directions [r - c, r] at right angles to c independent normals [c, r].

    >>> unknown_directions(torch.tensor([[0.0, 2.0]])).abs().tolist()
    [[1.0, 0.0]]
    """
    found: Tensor = torch.linalg.qr(normals.T, mode="complete")[0].T[len(normals) :]
    return found


def _fitted_facet(rows: Tensor, normal: Tensor, noise: float) -> tuple[Tensor, int] | None:
    """Of fits to the rows ever nearer to a normal [r], the one that most rows end up on, with how many; none is outside.

    >>> rows = torch.tensor([[1.0, 0.0], [2.0, 1e-9], [1.0, 0.0], [3.0, 0.0], [1.0, 1.0]]).double()
    >>> q, on = _fitted_facet(rows, torch.tensor([1e-6, 1.0]).double(), 1e-9)
    >>> on, bool((rows @ q)[:4].abs().max() < 4e-9)
    (4, True)
    """
    best: tuple[Tensor, int] | None = None
    coarse = max(1.0, ENDS_WITHIN * float(rows.norm(dim=1).median()) / noise)
    for first in FITS_FROM:
        q, within, before = normal, first * coarse, None
        for _ in range(MOST_FITS):
            near = (rows @ q).abs() < within * noise
            if int(near.sum()) < rows.shape[1] + 2 or (before is not None and bool((near == before).all())):
                break
            sizes, axes = torch.linalg.eigh(rows[near].T @ rows[near])
            q = axes[:, 0]
            before = near if within <= ON else None
            within = max(ON, within / NARROWER)
        q = q * (rows @ q).sum().sign()
        away = rows @ q
        on, outside = int((away.abs() < ON * noise).sum()), int((away < -ON * noise).sum())
        if before is None or (rows.shape[1] > 1 and float(sizes[1]) < on * (ALONE * noise) ** 2):
            continue
        if outside <= STRAYS and on > rows.shape[1] and (best is None or on > best[1]):
            best = q, on
    return best


def _with(rows: Tensor, noise: float, found: Facets, more: tuple[Tensor, int] | None) -> Facets:
    """The facets with one more, that with the most rows first; of two that share their rows the one with more."""
    if more is None:
        return found
    q, on = more
    both = ((rows @ found.normals.T).abs() < ON * noise) & ((rows @ q).abs() < ON * noise)[:, None]
    same = both.sum(0).cpu() > SHARED * found.on.clamp_max(on)
    if bool((found.on[same] >= on).any()):
        return found
    normals = torch.cat([found.normals[(~same).to(q.device)], q[None]])
    counts = torch.cat([found.on[~same], torch.tensor([on])])
    order = counts.argsort(descending=True, stable=True)
    return Facets(normals[order.to(q.device)], counts[order])
