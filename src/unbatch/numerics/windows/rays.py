"""Extreme rays of a cone in a subspace: the nonnegative vectors of a span that no others add up to."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

SMALLEST_ENTRY = 3e-5  # of the largest, below which an entry of a ray begins as a zero
NULL = 1e-11  # least singular value over the next, at which a vector is the only one with its zeros
SMALLEST_ERRORS, NULL_ERRORS = 10.0, 30.0  # both in units of the span's own error, where that is larger
LEAST_NEGATIVE = 1e-8  # of the largest entry, by which one may lie below zero
NEGATIVE_ERRORS = 100.0  # the same in units of the span's own error


def vanishing(rows: Tensor, where: Tensor, *, tolerance: float = 1e-8) -> Tensor:
    """The part of a span whose vectors are zero at the entries `where` [d], as orthonormal rows [r', d].

    `rows` [r, d] are orthonormal; singular values of rows[:, where] up to `tolerance` count as zero.

    >>> rows = torch.eye(3, dtype=torch.float64)
    >>> vanishing(rows, torch.tensor([True, False, False])).shape
    torch.Size([2, 3])
    """
    turn, values, _ = torch.linalg.svd(_narrow(rows[:, where]), full_matrices=True)
    found: Tensor = turn[:, int((values > tolerance).sum()) :].T @ rows
    return found


def _narrow(rows: Tensor) -> Tensor:
    """A matrix [r, r at most] with the same left singular vectors and values as `rows` [r, k]."""
    return rows if rows.shape[1] <= len(rows) else torch.linalg.qr(rows.T, mode="r").R.T


def least_nonnegative(base: Tensor, rows: Tensor, *, slack: float = 0.0) -> Tensor | None:
    """The vector base + z rows that has no negative entry and the least sum; None where there is none, or no least one.

    A linear program in z [r], solved by the simplex method of HiGHS, whose answer is a vertex: `base` [d], `rows` [r, d];
    entries may lie `slack` times the largest of `base` below zero.

    >>> least_nonnegative(torch.tensor([2.0, 3.0]), torch.tensor([[1.0, 1.0]]))
    tensor([0., 1.])
    """
    from scipy.optimize import linprog

    room = base + slack * float(base.abs().max())
    if not bool(room.isfinite().all() and rows.isfinite().all()):
        return None
    held = linprog(
        rows.sum(1).cpu().numpy(),
        A_ub=-rows.T.cpu().numpy(),
        b_ub=room.cpu().numpy(),
        bounds=(None, None),
        method="highs-ds",
    )
    return None if held.x is None else base + torch.as_tensor(held.x).to(base) @ rows


def extreme_ray(rows: Tensor, entry: int, *, slack: float = 0.0) -> Tensor | None:
    """An extreme ray of the nonnegative vectors in a span, by one linear program: min sum(u), u >= 0, u[entry] = 1.

    What stood behind a ReLU is such a ray wherever enough of its entries are zero, whatever the vectors that it is
    mixed with: no other vectors of the cone add up to it. `rows` [r, d] need not be orthonormal. None where no vector
    of the cone has that entry. Entries may lie `slack` below zero. A program may end on the edge between two rays that
    share the least sum: `exact_ray` tells.

    >>> rows = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]])
    >>> extreme_ray(rows, 0)
    tensor([1., 1., 0.])
    """
    from scipy.optimize import linprog

    held = linprog(
        rows.sum(1).cpu().numpy(),
        A_ub=-rows.T.cpu().numpy(),
        b_ub=torch.full((rows.shape[1],), slack, dtype=torch.float64).numpy(),
        A_eq=rows[:, entry][None].cpu().numpy(),
        b_eq=[1.0],
        bounds=(None, None),
        method="highs-ds",
    )
    return None if held.x is None else torch.as_tensor(held.x).to(rows) @ rows


def exact_ray(rows: Tensor, ray: Tensor, *, error: float = 0.0) -> Tensor | None:
    """The one unit vector of a span with the zeros of a rough ray, to rounding; None where its zeros do not determine one.

    It is the null vector of rows[:, zeros]. Tiny positive entries that were taken for zeros stand in the way: while the
    least singular value is not next to nothing beside the next, those of the set on which the vector is largest are
    dropped. `rows` [r, d] orthonormal, each vector of their span known up to `error`, relative; `ray` [d] good to a few
    digits.

    >>> rows = torch.tensor([[0.6, 0.8, 0.0, 0.0], [0.0, 0.0, 0.8, 0.6]], dtype=torch.float64)
    >>> exact_ray(rows, torch.tensor([3.0, 4.0, 1e-9, 1e-8]).double()).abs()
    tensor([0.6000, 0.8000, 0.0000, 0.0000], dtype=torch.float64)
    """
    if len(rows) == 1:
        return rows[0] * torch.sign(rows[0].sum())
    zeros = ray.abs() < max(SMALLEST_ENTRY, SMALLEST_ERRORS * error) * ray.abs().max()
    null = max(NULL, NULL_ERRORS * error)
    while int(zeros.sum()) >= len(rows):  # fewer zeros leave a vector whatever they are
        turn, values, _ = torch.linalg.svd(_narrow(rows[:, zeros]))
        found: Tensor = turn[:, -1] @ rows
        if values[-1] <= null * values[-2]:
            return found * torch.sign(found.sum())
        size = found.abs() * zeros
        zeros &= size < 0.5 * size.max()
    return None


def rays(rows: Tensor, rng: torch.Generator, *, most: int, error: float = 0.0) -> Iterator[Tensor]:
    """Different extreme rays of the nonnegative vectors in a span, as unit vectors, from up to `most` programs.

    Programs begin at random entries, those first that the rays found so far leave small. There may be more rays than
    dimensions: whoever looks for particular ones stops when these are found. `rows` [r, d] orthonormal, with their `error`
    as in `exact_ray`.

    >>> x = torch.rand(3, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64).sub(0.5).relu()
    >>> rows = torch.linalg.qr(x.T).Q.T
    >>> found = torch.stack(list(rays(rows, torch.Generator().manual_seed(0), most=30)))
    >>> torch.allclose((found @ torch.nn.functional.normalize(x).T).amax(0), torch.ones(3, dtype=torch.float64))
    True
    """
    if not len(rows):
        return
    found = list[Tensor]()
    reached = rows.norm(dim=0)
    inside = (reached > 1e-9 * reached.max()).nonzero()[:, 0]  # elsewhere every vector of the span is zero
    held = rows[:, inside]
    for _ in range(most):
        taken = torch.stack(found)[:, inside].amax(0).clamp_min(0) if found else torch.zeros_like(held[0])
        odds = (reached[inside] / (1e-3 * reached.max() + taken)).cpu()
        entry = int(torch.multinomial(odds, 1, generator=rng))
        rough = extreme_ray(held, entry, slack=error)
        sharp = None if rough is None else exact_ray(held, rough, error=error)
        if sharp is None or float(sharp.min()) < -max(LEAST_NEGATIVE, NEGATIVE_ERRORS * error) * float(sharp.max()):
            continue
        ray = torch.zeros_like(rows[0])
        ray[inside] = sharp
        if all(float((ray - other).norm()) > max(1e-5, NEGATIVE_ERRORS * error) for other in found):
            found.append(ray)
            yield ray
