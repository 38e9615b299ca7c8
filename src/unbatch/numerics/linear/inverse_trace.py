"""Inverse trace: a lower bound of the summed variances that a large information matrix allows.

tr R A^-1 R^T, from below, of a matrix A that is known by its products.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unbatch.numerics.callables import Apply, Tick
from unbatch.numerics.linear.inverse_diagonal import FEWEST_PROBES
from unbatch.numerics.search.least_squares import conjugate_gradients


@dataclass(frozen=True)
class InverseTrace:
    """What is known of the trace of an inverse: it is at least `value`, but for the probes' error.

    A trace from below, its standard error, and the diagonal [n, d] it is the sum of.

    >>> InverseTrace(1.5, 0.0, torch.ones(1, 2), 4).value
    1.5
    """

    value: float
    error: float
    diagonal: Tensor
    probes: int  # random ones that it was estimated from


def inverse_trace(
    folds: Sequence[Sequence[Apply]],
    like: Tensor,  # [n, d]
    rng: torch.Generator,
    *,
    probes: int,
    push: Apply = lambda z: z,
    pull: Apply = lambda x: x,
    precondition: Apply = lambda v: v,
    steps: int = 50,
    tolerance: float = 1e-3,
    tick: Tick = lambda share: True,
) -> InverseTrace:
    """The trace of the inverse of a large matrix, never too large by more than the probes' error.

    tr R (E A)^-1 R^T for symmetric positive definite draws A of one law in `folds`, R by `push` and R^T by `pull`.

    For any vectors b and w, 2 b . w - w . A w <= b . A^-1 b, with equality at w = A^-1 b. So with b = R^T v, v a random
    sign vector, and w from some of the draws, the left side on other draws is on average no larger than the trace:
    neither early ends of conjugate gradients nor too few draws can raise it. Each fold is measured at the solution on the
    other folds; a single fold at its own, which is Gauss quadrature of the trace (Lanczos).

    Source: Hutchinson, Comm. Stat. 1990; Golub and Meurant, Matrices, Moments and Quadrature, 2010.

    >>> scale = torch.tensor([[1.0, 2.0, 4.0]]).double()
    >>> found = inverse_trace([[lambda v: scale * v]], scale, torch.Generator().manual_seed(0), probes=2)
    >>> round(found.value, 6)
    1.75
    """
    values = like.new_zeros(probes, sum(map(len, folds)))
    diagonal = torch.zeros_like(like)
    done = 0
    for row in values:
        if done >= FEWEST_PROBES and not tick(done / probes):
            break
        v = (2.0 * torch.randint(2, like.shape, generator=rng) - 1).to(like)
        b, found = pull(v), list[Tensor]()
        for held, others in _split(folds):
            *_, w = torch.zeros_like(b), *conjugate_gradients(_mean(others), b, precondition, steps, tolerance)
            found += [2 * (b * w).sum() - (w * draw(w)).sum() for draw in held]
            diagonal += v * push(w) / len(folds)
        row.copy_(torch.stack(found))
        done += 1
    values = values[:done]
    error = (_error(values.mean(0)) ** 2 + _error(values.mean(1)) ** 2) ** 0.5
    return InverseTrace(float(values.mean()), error, diagonal / done, done)


def dense_inverse_trace(folds: Sequence[Sequence[Tensor]], weights: Tensor) -> tuple[float, float, Tensor]:
    """The trace of the inverse of a matrix that is held.

    The same for matrices A [p, p] and R^T R = diag(weights [p]), by every vector: value, error and (E A)^-1 about.

    Eigenvalues below p roundings of the largest are raised to them, which lowers the trace.

    >>> dense_inverse_trace([[torch.diag(torch.tensor([1.0, 2.0]).double())]], torch.ones(2).double())[0]
    1.5
    """
    values, inverses = list[Tensor](), list[Tensor]()
    for held, others in _split(folds):
        eigenvalues, V = torch.linalg.eigh(torch.stack([*others]).mean(0))
        least = len(V) * torch.finfo(V.dtype).eps * eigenvalues[-1]
        W = (V / eigenvalues.clamp_min(least.clamp_min(1e-300))) @ V.T
        alone = len(folds) == len(others) == 1
        values += (
            [(weights * W.diagonal()).sum()]
            if alone
            else [(weights * (2 * W.diagonal() - ((W @ A) * W).sum(1))).sum() for A in held]
        )
        inverses.append(W)
    found = torch.stack(values)
    return float(found.mean()), _error(found), torch.stack(inverses).mean(0)


def dense_water_trace(folds: Sequence[Sequence[Tensor]], level: float) -> tuple[float, float]:
    """The trace of an inverse whose large eigenvalues count by their logarithm alone.

    tr f((E M)^-1) from below for draws M [p, p] in `folds`, f(v) = v up to `level`, level (1 + log(v / level)) beyond;
    and its standard error.

    g(m) = f(1 / m) is convex, so tr g(E M) >= tr g(W) + tr g'(W) (E M - W) for any W (Klein): the mean of the other folds.

    >>> M = torch.diag(torch.tensor([1.0, 0.5]).double())
    >>> round(dense_water_trace([[M]], math.inf)[0], 6), round(dense_water_trace([[M]], 1.0)[0], 6)
    (3.0, 2.693147)
    """
    values = list[Tensor]()
    for held, others in _split(folds):
        m, V = torch.linalg.eigh(torch.stack([*others]).mean(0))
        m = m.clamp_min(float(len(m) * torch.finfo(m.dtype).eps * m[-1].clamp_min(1e-300)))
        high = m * level < 1
        g = torch.where(high, level * (1 - (m * level).log()), 1 / m) if level < math.inf else 1 / m
        slope = torch.where(high, -level / m, -1 / m.square()) if level < math.inf else -1 / m.square()
        values += [g.sum() + (slope * ((V * (M @ V)).sum(0) - m)).sum() for M in held]
    found = torch.stack(values)
    return float(found.mean()), _error(found)


def kronecker(gram: Tensor, variances: Tensor, shift: float) -> Apply:
    """The inverse of a matrix that is one over the examples times one over the entries.

    The inverse of gram [n, n] (x) diag(variances [d]) + shift, on [n, d].

    >>> apply = kronecker(torch.eye(2).double(), torch.tensor([1.0, 3.0]).double(), 1.0)
    >>> apply(torch.ones(2, 2).double())
    tensor([[0.5000, 0.2500],
            [0.5000, 0.2500]], dtype=torch.float64)
    """
    values, vectors = torch.linalg.eigh(gram)
    least = 1e-9 * float(values[-1]) + 1e-300
    scale = values.clamp_min(least)[:, None] * variances + shift
    return lambda v: vectors @ ((vectors.T @ v) / scale)


def _split(folds: Sequence[Sequence[Any]]) -> Iterator[tuple[Sequence[Any], Sequence[Any]]]:
    """Each fold, and the draws of all others; a single fold with itself."""
    for i, held in enumerate(folds):
        yield held, held if len(folds) == 1 else [draw for j, fold in enumerate(folds) if j != i for draw in fold]


def _mean(draws: Sequence[Apply]) -> Apply:
    return lambda v: torch.stack([draw(v) for draw in draws]).mean(0)


def _error(values: Tensor) -> float:
    """Standard error of the mean of [k]; 0 for one value, which has no spread."""
    return float(values.std() / len(values) ** 0.5) if len(values) > 1 else 0.0
