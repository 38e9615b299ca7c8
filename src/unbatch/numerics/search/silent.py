"""Silent: which combinations of a layer's change are one example's, by the units that never fired on it.

The change of a first layer of rectified units is D = sum_i c_i z_i^T, where c_i [m] is zero on every unit that never fired
on example i, exactly, however long training went on and whatever lies above. Of c = U q, U an orthonormal basis of D's
columns, few q have so many zeros: fewer than n of m rows vanish by chance. Whether a unit fires on z is a matter of the
weights, known at both ends of training; so a guess of z says which rows to make vanish, and what then vanishes says more
of z.

A mixture of examples I vanishes where all of them are silent, and so does each of them: it is not alone in that. By chance
it vanishes on |I| - 1 rows more and is alone then, but for any of these rows left out is not. So a combination counts as
one example's if it is alone in vanishing on its rows, and stays so with any one left out. With numbers in general position
where units fire no mixture passes; that they are so is taken for granted.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

SILENT = 1e-8  # of a unit's largest change, below which it is none
LIVE = 1e-6  # of the largest unit's change, below which a unit did not move at all
SAME = 1e-7  # one minus the cosine of two combinations, up to sign, below which they are one
ROUNDS = 30  # of guessing which units are silent, and solving for it
SHARES = (0.15, 0.1, 0.2, 0.25, 0.07, 0.3)  # of the units, surest to be silent, that are made to vanish
QUIET = 1.5, 0.5  # times that share, and of all units: so many of the least change are taken for silent, by turns
HINGES = 25  # steps towards the half space of the units that changed
VANISHING = 1e-6  # of the vanishing rows' largest singular value, below which one more combination vanishes there
NEEDED = 1e-6  # one minus the leverage of a row, below which the others do not leave a combination alone


def silent_combinations(
    columns: Tensor, before: tuple[Tensor, ...], rng: torch.Generator, *, starts: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Different unit vectors q [f, n], alone in where columns q vanishes, and how far each is an example's.

    `columns` [m, n] are an orthonormal basis of the change's columns, `before` the preactivations [m, n] of coordinates
    z [n], at the start and at the end of training. Each yield is of one share of the units from `starts` random z. The
    second number is the share of the units that moved if and only if some z makes them fire.

    >>> rng = torch.Generator().manual_seed(0)
    >>> w, z = torch.randn(60, 3, generator=rng).double(), torch.randn(3, 3, generator=rng).double()
    >>> c = (w @ z.T).clamp_min(0) * torch.rand(60, 3, generator=rng).double()  # zero where a unit is silent
    >>> U = torch.linalg.qr(c).Q
    >>> q, agreeing = next(silent_combinations(U, (w,), rng, starts=20))
    >>> zeros = [tuple(each) for each in (c.T == 0).tolist()]
    >>> len(q) > 0 and all(tuple(each) in zeros for each in ((q @ U.T).abs() < 1e-8).tolist()), bool((agreeing > 0.9).all())
    (True, True)
    """
    n = columns.shape[1]
    rows, maps = _live(columns, before)
    mean = torch.stack(maps).mean(0)
    back = torch.linalg.pinv(mean)
    for share in SHARES:
        count = max(n + 1, int(share * len(rows)))
        for quiet in (int(QUIET[0] * count), int(QUIET[1] * len(rows))):
            z = torch.randn(starts, n, generator=rng, dtype=torch.float64).to(columns)
            for _ in range(ROUNDS):
                q = _vanishing(rows, maps, z, count)
                change = (q @ rows.T).abs()
                limit = change.kthvalue(min(quiet, len(rows)), dim=1, keepdim=True).values
                z = torch.where(change > limit, 1.0, -1.0).to(z) @ back.T
            found = different(alone_in_zeros(rows, different(q[(change < SILENT).sum(1) > n + 1])))
            if len(found):
                moved = (found @ rows.T).abs() >= SILENT
                fires = torch.stack([_half_space(moved, mean) @ each.T for each in maps]).amax(0) > 0
                yield found, (fires == moved).double().mean(1)


def silent_on(columns: Tensor, before: tuple[Tensor, ...], z: Tensor) -> Tensor:
    """Different unit vectors q [f, n], alone in where columns q vanishes, on the units surest to be silent on z [s, n].

    >>> rng = torch.Generator().manual_seed(0)
    >>> w, z = torch.randn(60, 3, generator=rng).double(), torch.randn(3, 3, generator=rng).double()
    >>> U = torch.linalg.qr((w @ z.T).clamp_min(0) * torch.rand(60, 3, generator=rng).double()).Q
    >>> len(silent_on(U, (w,), z))
    3
    """
    rows, maps = _live(columns, before)
    counts = sorted({max(columns.shape[1], int(share * len(rows))) for share in SHARES})
    return different(alone_in_zeros(rows, different(torch.cat([_vanishing(rows, maps, z, count) for count in counts]))))


def _live(columns: Tensor, before: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor]]:
    """The rows of the units that moved, of unit length, and their preactivations likewise."""
    size = columns.norm(dim=1)
    live = size > LIVE * size.max()
    maps = [each[live] / each[live].norm(dim=1, keepdim=True).clamp_min(1e-300) for each in before]
    return columns[live] / size[live, None], maps


def _vanishing(rows: Tensor, maps: list[Tensor], z: Tensor, count: int) -> Tensor:
    """Unit vectors q [s, n], smallest on the `count` rows surest to be silent on z [s, n]."""
    fires = torch.stack([z @ each.T for each in maps]).amax(0)  # [s, m]
    surest = rows[fires.argsort(1)[:, :count]]
    smallest: Tensor = torch.linalg.eigh(surest.transpose(1, 2) @ surest)[1][:, :, 0]
    return smallest


def different(vectors: Tensor) -> Tensor:
    """Unit vectors [s, n] without those that are the same as an earlier one, up to sign.

    >>> different(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]))
    tensor([[1., 0.],
            [0., 1.]])
    """
    kept = list[int]()
    for i in range(len(vectors)):
        if not kept or float((vectors[kept] @ vectors[i]).abs().max()) < 1 - SAME:
            kept.append(i)
    return vectors[kept]


def alone_in_zeros(rows: Tensor, found: Tensor) -> Tensor:
    """Those of the combinations q [f, n] that no other shares its zeros with, any one zero left out; pairs are parted.

    Where two combinations vanish on the same rows [m, n], those of the plane between them that vanish on two rows more are
    tried in their place.

    >>> rows = torch.tensor([[0.0, 1.0], [0.0, 2.0], [1.0, 0.0], [1.0, 0.0], [1.0, 2.0]]).double()
    >>> unit, mixed = torch.tensor([[1.0, 0.0], [2.0, -1.0]]).double()
    >>> different(alone_in_zeros(rows, torch.stack([unit, mixed / mixed.norm()]))).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    kept = list[Tensor]()
    for q in found:
        plane = _sharing(rows, q)
        parts = q[None] if plane.shape[1] == 1 else _parted(rows, plane)
        kept += [each for each in parts if _sharing(rows, each).shape[1] == 1]
    return torch.stack(kept) if kept else found[:0]


def _sharing(rows: Tensor, q: Tensor) -> Tensor:
    """A basis [n, r] of the combinations that vanish wherever q [n] does, but for a row that q's being alone hangs on."""
    zeros = rows[(rows @ q).abs() < SILENT]
    left, values, right = torch.linalg.svd(zeros, full_matrices=True)
    rank = int((values > VANISHING * values.max()).sum()) if len(values) else 0
    needed = 1 - left[:, :rank].square().sum(1) < NEEDED
    if bool(needed.any()):
        _, values, right = torch.linalg.svd(zeros[~needed], full_matrices=True)
        rank = int((values > VANISHING * values.max()).sum()) if len(values) else 0
    basis: Tensor = right[rank:].T
    return basis


def _parted(rows: Tensor, plane: Tensor) -> Tensor:
    """Unit vectors q [f, n] in a plane [n, 2] on which two rows or more vanish that do not vanish on all of it."""
    if plane.shape[1] != 2:
        return plane.T[:0]
    in_plane = rows @ plane
    in_plane = in_plane[in_plane.norm(dim=1) > VANISHING]
    angles = torch.atan2(in_plane[:, 1], in_plane[:, 0]).remainder(torch.pi).sort().values
    twice = angles[1:][angles.diff() < SILENT]
    return different(torch.stack([-twice.sin(), twice.cos()], 1) @ plane.T)


def _half_space(moved: Tensor, maps: Tensor) -> Tensor:
    """Coordinates z [s, n] that make the units fire that moved [s, m], and no others, by least squares on a hinge."""
    sign = torch.where(moved, 1.0, -1.0).to(maps)
    weight = torch.where(
        moved, 1 / moved.sum(1, keepdim=True).clamp_min(1), 1 / (~moved).sum(1, keepdim=True).clamp_min(1)
    )
    z, wrong = maps.new_zeros(len(moved), maps.shape[1]), torch.ones_like(sign)
    for _ in range(HINGES):
        w = wrong * weight.to(maps)
        normal = (maps.T[None] * w[:, None]) @ maps
        ridge = 1e-9 * normal.diagonal(dim1=1, dim2=2).sum(1)[:, None, None] * torch.eye(maps.shape[1]).to(maps)
        z = torch.linalg.solve(normal + ridge, ((w * sign) @ maps)[:, :, None])[:, :, 0]
        wrong = ((sign * (z @ maps.T)) < 1).to(maps).clamp_min(1e-3)
    return z
