"""The whole training set of one hidden layer under one logit, by the facets of the cone that its units lie in.

On a loss of the margin every step moves unit k by v_k g_i y_i (x_i, 1), g_i > 0, for each example i on which it fires, and
not for the others. As no v_k changes its sign, (w_k, b_k) / v_k = sum_i c_ki y_i (x_i, 1) with c_ki >= 0 at the end, beside
what is left of the start: in the cone of the n vectors y_i (x_i, 1), and on its facet i if it never fired on x_i.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from unbatch.numerics.search.facets import ON, SURE, facets

MANY = 3  # times as many rows as directions, from which on a facet counts as one that was found
PATIENCE = 100, 3  # so many programmes, and as many times more than it took until then, without another such facet
EXACT = 1e-9  # of a typical row's length, below which noise would be less than what a programme ends within
LEAST_LAST = 1e-6  # of the largest last entry of a vector, below which it has no scale


@dataclass(frozen=True, eq=False)
class ConeAnswer:
    """Examples by the facets with the most units: inputs [n, d], classes [n] (0 or 1), units on each facet [n].

    `agreeing` is the share of pairs of a unit and an example whose facet it is on, in which the unit does not fire on
    the example as it must not: where a facet is wrong, it is well below 1.

    >>> answer = ConeAnswer(torch.zeros(1, 3), torch.ones(1), torch.ones(1), torch.ones(1, 4), agreeing=1.0)
    >>> answer.agreeing
    1.0
    """

    inputs: Tensor
    classes: Tensor
    on: Tensor
    normals: Tensor  # [n, d + 1] of unit length, in the units' span
    agreeing: float


def cone_answers(
    rows: Tensor, ends: Tensor, basis: Tensor, noise: float, rng: torch.Generator, *, programmes: int
) -> Iterator[ConeAnswer | None]:
    """The best answer after each linear programme, None as long as there are too few facets: as many as basis vectors.

    `rows` [m, d + 1] are the units' (w, b), or what training added to them, times the sign of what leaves the unit;
    `ends` [m, d + 1] their (w, b) after training; `basis` [n, d + 1] spans the rows up to `noise`, which is what the start
    left in each entry.

    >>> rng = torch.Generator().manual_seed(0)
    >>> z = torch.cat([torch.randn(3, 6, generator=rng), torch.ones(3, 1)], 1).double()
    >>> w = torch.randn(80, 7, generator=rng).double()
    >>> c = (w @ z.T).clamp_min(0) * torch.rand(80, 3, generator=rng).double()
    >>> *_, last = cone_answers(c @ z, w, torch.linalg.svd(z, full_matrices=False)[2], 1e-12, rng, programmes=20)
    >>> bool((torch.cdist(last.inputs, z[:, :6]).amin(0) < 1e-6).all()), last.agreeing
    (True, 1.0)
    """
    near = rows @ basis.T
    noise = max(noise, EXACT * float(near.norm(dim=1).median()))
    answer: ConeAnswer | None = None
    tried, many, last = torch.zeros(0), 0, 0
    for number, found in enumerate(facets(near, noise, rng, programmes=programmes)):
        if int((found.on > MANY * len(basis)).sum()) > many:
            many, last = int((found.on > MANY * len(basis)).sum()), number
        if number > PATIENCE[0] + PATIENCE[1] * last:
            return
        if len(found.normals) >= len(basis) and not torch.equal(found.on, tried):
            tried = found.on
            better = _answer(near, ends, basis, found.independent(near, len(basis)), noise)
            if better is not None and (answer is None or better.agreeing >= answer.agreeing):
                answer = better
        yield answer


def _answer(near: Tensor, ends: Tensor, basis: Tensor, normals: Tensor, noise: float) -> ConeAnswer | None:
    """What the inverse of as many normals as there are directions says, and how the units agree with it."""
    if len(normals) < len(basis):
        return None
    z = torch.linalg.inv(normals).T @ basis
    last = z[:, -1]
    if float(last.abs().min()) < LEAST_LAST * float(last.abs().max()):
        return None
    away = near @ normals.T
    heard = near.norm(dim=1, keepdim=True) > SURE * noise * len(basis) ** 0.5
    on = (away.abs() < ON * noise) & heard
    inputs = z / last[:, None]
    silent = (ends @ inputs.T <= 0)[on]
    return ConeAnswer(
        inputs=inputs[:, :-1],
        classes=(last * away.sum(0) > 0).long(),
        on=on.sum(0),
        normals=normals @ basis,
        agreeing=float(silent.double().mean()) if len(silent) else 0.0,
    )
