"""Silent: which combinations of a layer's change are one example's, by the units that never fired on it.

The change of a first layer of rectified units is D = sum_i c_i z_i^T, where c_i [m] is zero on every unit that never fired
on example i, exactly, however long training went on and whatever lies above. Of c = U q, U an orthonormal basis of D's
columns, few q have so many zeros: fewer than n of m rows vanish by chance. Whether a unit fires on z is a matter of the
weights, known at both ends of training; so a guess of z says which rows to make vanish, and what then vanishes says more
of z.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

SILENT = 1e-8  # of a unit's largest change, below which it is none
LIVE = 1e-6  # of the largest unit's change, below which a unit did not move at all
SAME = 1e-7  # one minus the cosine of two combinations, up to sign, below which they are one
STEPS = 30  # of guessing which units are silent, and solving for it
SHARES = (0.15, 0.1, 0.2, 0.25, 0.07, 0.3)  # of the units, surest to be silent, that are made to vanish
QUIET = 1.5, 0.5  # times that share, and of all units: so many of the least change are taken for silent, by turns
HINGES = 25  # steps towards the half space of the units that changed


def silent_combinations(
    columns: Tensor, before: tuple[Tensor, ...], rng: torch.Generator, *, starts: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Different unit vectors q [f, n] with columns q zero on more units than by chance, and how far each is an example's.

    `columns` [m, n] are an orthonormal basis of the change's columns, `before` the preactivations [m, n] of coordinates
    z [n], at the start and at the end of training. Each yield is of one share of the units from `starts` random z. The
    second number is the share of the units that moved if and only if some z makes them fire.

    >>> rng = torch.Generator().manual_seed(0)
    >>> w, z = torch.randn(60, 3, generator=rng).double(), torch.randn(3, 3, generator=rng).double()
    >>> c = (w @ z.T).clamp_min(0) * torch.rand(60, 3, generator=rng).double()  # zero where a unit is silent
    >>> U = torch.linalg.qr(c).Q
    >>> q, agreeing = next(silent_combinations(U, (w,), rng, starts=20))
    >>> int(((U @ q.T).abs() < 1e-8).sum()) == int((c == 0).sum()), bool((agreeing > 0.9).all())
    (True, True)
    """
    n, size = columns.shape[1], columns.norm(dim=1)
    live = size > LIVE * size.max()
    rows = columns[live] / size[live, None]
    maps = [each[live] / each[live].norm(dim=1, keepdim=True).clamp_min(1e-300) for each in before]
    mean = torch.stack(maps).mean(0)
    back = torch.linalg.pinv(mean)
    for share in SHARES:
        count = max(n + 1, int(share * len(rows)))
        for quiet in (int(QUIET[0] * count), int(QUIET[1] * len(rows))):
            z = torch.randn(starts, n, generator=rng, dtype=torch.float64).to(columns)
            for _ in range(STEPS):
                fires = torch.stack([z @ each.T for each in maps]).amax(0)  # [s, m]
                surest = rows[fires.argsort(1)[:, :count]]
                q = torch.linalg.eigh(surest.transpose(1, 2) @ surest)[1][:, :, 0]
                change = (q @ rows.T).abs()
                limit = change.kthvalue(min(quiet, len(rows)), dim=1, keepdim=True).values
                z = torch.where(change > limit, 1.0, -1.0).to(z) @ back.T
            found = different(q[(change < SILENT).sum(1) > n + 1])
            if len(found):
                moved = (found @ rows.T).abs() >= SILENT
                fires = torch.stack([_half_space(moved, mean) @ each.T for each in maps]).amax(0) > 0
                yield found, (fires == moved).double().mean(1)


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
