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

from unbatch.numerics.search.facets import ON, SURE, FacetSearch, unknown_directions

MANY = 3  # times as many rows as directions, from which on a facet counts as one that was found
HALF = 0.55  # of the middle one of such facets' rows, below which it does not count
PATIENCE = 400, 4  # so many programmes, and as many times more than it took until then, without another such facet
SURELY_SILENT = (0.1, 0.2, 0.3, 0.4)  # of the units, with the least preactivations
DOUBTED = 2  # facets at most, taken for false in one programme
EXACT = 1e-9  # of a typical row's length, below which noise would be less than what a programme ends within
WHOLE = 0.9995  # of the units on the facets of examples, that are silent on these: such an answer is whole
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
    search, r = FacetSearch(near, noise), len(basis)
    before = torch.nn.functional.normalize(ends @ basis.T, dim=1)[search.kept]
    answer: ConeAnswer | None = None
    found, known, tried, many, last = search.found, near[:0], torch.zeros(0), 0, 0
    for number in range(programmes):
        trusted = min(r - 1, len(known) - int(torch.randint(1 + DOUBTED, (1,), generator=rng)))
        some = known[torch.randperm(len(known), generator=rng)[: max(0, trusted)].to(known.device)]
        if number % 2:
            search.nearest(*_guess(before, basis[:, -1], some, rng))
        else:
            search.programme(some, rng)
        if search.found is not found:
            found, known = search.found, search.many(MANY * r, HALF)
        if len(known) > many:
            many, last = len(known), number
        if number > PATIENCE[0] + PATIENCE[1] * last:
            return
        if len(search.found.normals) >= r and not torch.equal(search.found.on, tried):
            tried = search.found.on
            better = _answer(near, ends, basis, search.found.independent(search.rows, r), noise)
            if better is not None and (answer is None or better.agreeing >= answer.agreeing):
                answer = better
        yield answer


def _guess(before: Tensor, ones: Tensor, known: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Which units [m] are surest to be silent on a guess of a vector that is missing, and the guess [r].

    What is missing is in all facets that are known, so that few directions are left where many are. `ones` [r] gives a
    vector's last entry, whose sign is its class; the units' preactivations are those of `before` [m, r].
    """
    free = unknown_directions(known)
    guess = torch.randn(len(free), generator=rng, dtype=torch.float64).to(free) @ free
    heard = before @ guess * (guess @ ones).sign()
    share = SURELY_SILENT[int(torch.randint(len(SURELY_SILENT), (1,), generator=rng))]
    return heard <= heard.quantile(share), guess


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
