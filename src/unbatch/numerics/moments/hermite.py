"""Hermite tensors and Hermite coefficients, in the probabilists' convention: He_0 = 1, He_1 = t, He_2 = t^2 - 1.

The Hermite tensor H_p(u) [n, ..., n] of a vector u [n] is the p-th derivative of the standard normal density at u, divided
by (-1)^p times the density. Stein's identity: E f(u) H_p(u) = E of the p-th derivative of f, for u ~ N(0, I). Its entry
at an index tuple in which i occurs alpha_i times is prod_i He_{alpha_i}(u_i), so only C(n + p - 1, p) entries differ;
they are uncorrelated, with variance alpha! = prod_i alpha_i!.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import combinations_with_replacement, product

import numpy as np
import torch
from torch import Tensor


def polynomials(t: Tensor, most: int) -> Tensor:
    """The Hermite polynomials of a number.

    He_0(t) ... He_most(t) [most + 1, *t.shape], by He_{p+1} = t He_p - p He_{p-1}.

    >>> polynomials(torch.tensor(2.0), 3)  # 1, t, t^2 - 1, t^3 - 3 t
    tensor([1., 2., 3., 2.])
    """
    values = [torch.ones_like(t), t]
    for p in range(1, most):
        values.append(t * values[p] - p * values[p - 1])
    return torch.stack(values[: most + 1])


def coefficients(
    s: Callable[[Tensor], Tensor], *, most: int = 4, scale: float = 1.0, mean: float = 0.0, nodes: int = 64
) -> Tensor:
    """The mean derivatives of an activation under normal inputs.

    E s^(p)(mean + scale Z), Z ~ N(0, 1), for p = 0 ... most, as E s(mean + scale Z) He_p(Z) / scale^p.

    Gauss-Hermite quadrature is exact for smooth s but errs by 1 / nodes at a kink, so the line is cut at s's likely
    kinks (multiples of 1/2) into panels, with `nodes` Gauss-Legendre points each against the normal density.

    >>> coefficients(lambda t: t**2, most=3).round(decimals=6) + 0.0  # E t^2, E 2 t, 2, 0
    tensor([1., 0., 2., 0.], dtype=torch.float64)
    """
    reach = 9.0  # the density times He_4 beyond it is below 1e-15
    steps = np.arange(np.ceil(2 * (mean - reach * scale)), np.floor(2 * (mean + reach * scale)) + 1) / 2
    cuts = np.unique(np.clip((steps - mean) / scale, -reach, reach))
    if len(cuts) > 4 * reach:  # a large scale: one panel a half unit of Z, one at the commonest kink
        cuts = np.append(np.arange(-2 * reach, 2 * reach + 1) / 2, np.clip(-mean / scale, -reach, reach))
    edges = np.unique(np.concatenate([[-reach, reach], cuts]))
    points, weights = np.polynomial.legendre.leggauss(nodes)
    half = np.diff(edges)[:, None] / 2
    t = torch.as_tensor((edges[:-1, None] + half + half * points).ravel())
    density = torch.exp(-t.square() / 2) / (2 * torch.pi) ** 0.5
    values = s(mean + scale * t).detach().double().cpu() * density * torch.as_tensor((half * weights).ravel())
    moments: Tensor = polynomials(t, most) @ values
    return moments / scale ** torch.arange(most + 1, dtype=torch.float64)


@cache
def indices(n: int, p: int) -> Tensor:
    """Which entries of a symmetric tensor differ.

    The sorted index tuples [C(n + p - 1, p), p] of the distinct entries of a symmetric tensor of order p on R^n.

    >>> indices(2, 2)
    tensor([[0, 0],
            [0, 1],
            [1, 1]])
    """
    return torch.tensor(list(combinations_with_replacement(range(n), p)), dtype=torch.long)


@cache
def _runs(n: int, p: int) -> Tensor:
    """Where a run of equal indices ends in a sorted tuple its length, elsewhere 0: [C, p]."""
    table = indices(n, p)
    runs = torch.zeros_like(table)
    for slot in range(p):
        length = (table == table[:, slot : slot + 1]).sum(1)
        last = table[:, slot + 1] != table[:, slot] if slot + 1 < p else torch.ones(len(table), dtype=torch.bool)
        runs[:, slot] = torch.where(last, length, 0)
    return runs


@cache
def variances(n: int, p: int) -> Tensor:
    """How much each entry of a Hermite tensor varies.

    alpha! [C], the variance of each distinct entry of H_p(u) under u ~ N(0, I).

    >>> variances(2, 2)  # of u_0^2 - 1, u_0 u_1, u_1^2 - 1
    tensor([2., 1., 2.], dtype=torch.float64)
    """
    factorials: Tensor = torch.special.gammaln(_runs(n, p).double() + 1)
    return factorials.sum(1).exp().round()


@cache
def _places(n: int, p: int) -> Tensor:
    """For every index tuple of the full tensor [n^p], the place of its sorted form among `indices`."""
    where = {tuple(row): place for place, row in enumerate(indices(n, p).tolist())}
    return torch.tensor([where[tuple(sorted(t))] for t in product(range(n), repeat=p)], dtype=torch.long)


def entries(U: Tensor, p: int) -> Tensor:
    """The entries that differ of the Hermite tensors of some vectors.

    The distinct entries [m, C(n + p - 1, p)] of H_p at each row of U [m, n], ordered as `indices`.

    >>> entries(torch.tensor([[2.0, 3.0]]), 2)  # u_0^2 - 1, u_0 u_1, u_1^2 - 1
    tensor([[3., 6., 8.]])
    """
    m, n = U.shape
    table, runs = indices(n, p).to(U.device), _runs(n, p).to(U.device)
    flat = polynomials(U.T, max(p, 1)).reshape(-1, m)  # [(p + 1) n, m]: rows are copied faster than columns
    out = torch.ones(len(table), m, dtype=U.dtype, device=U.device)
    for slot in range(p):
        out *= flat[runs[:, slot] * n + table[:, slot]]
    return out.T


def unpack(packed: Tensor, n: int, p: int) -> Tensor:
    """A symmetric tensor written out.

    The symmetric tensors [..., n, ..., n] of order p with these distinct entries [..., C].

    >>> unpack(torch.tensor([3.0, 6.0, 8.0]), 2, 2)
    tensor([[3., 6.],
            [6., 8.]])
    """
    return packed[..., _places(n, p).to(packed.device)].reshape(*packed.shape[:-1], *[n] * p)


def hermite(U: Tensor, p: int) -> Tensor:
    """The Hermite tensors of some vectors, written out.

    H_p at each row of U [m, n], in full: [m, n, ..., n].

    >>> hermite(torch.tensor([[2.0, 3.0]]), 2)
    tensor([[[3., 6.],
             [6., 8.]]])
    """
    return unpack(entries(U, p), U.shape[1], p)


def second(g: Tensor, U: Tensor) -> Tensor:
    """A weighted sum of second Hermite tensors.

    sum_j g_j H_2(u_j) = U^T diag(g) U - (sum g) I: [n, n] from g [m], U [m, n].

    >>> second(torch.tensor([1.0]), torch.tensor([[2.0, 3.0]]))
    tensor([[3., 6.],
            [6., 8.]])
    """
    return (U.T * g) @ U - g.sum() * _eye(U)


def third(g: Tensor, U: Tensor, V: Tensor) -> Tensor:
    """A weighted sum of third Hermite tensors, seen along a few directions.

    sum_j g_j H_3(u_j)(V, V, V) [r, r, r] for V [n, r], which need not be orthonormal; no n x n x n is built.

    >>> third(torch.tensor([1.0]), torch.tensor([[2.0, 3.0]]), torch.tensor([[1.0], [0.0]]))  # u_0^3 - 3 u_0
    tensor([[[2.]]])
    """
    Y, mean = U @ V, V.T @ (U.T @ g)  # [m, r], [r]
    cube = torch.einsum("ja,jb,jc->abc", Y * g[:, None], Y, Y)
    return cube - _three(V.T @ V, mean)


def third_along(g: Tensor, U: Tensor, a: Tensor) -> Tensor:
    """A weighted sum of third Hermite tensors, contracted with one direction.

    sum_j g_j H_3(u_j)(I, I, a) [n, n]: the weights g_j (u_j . a) give the second-order form, and -(w a^T + a w^T).

    >>> third_along(torch.tensor([1.0]), torch.tensor([[2.0]]), torch.tensor([1.0]))
    tensor([[2.]])
    """
    w = U.T @ g
    return (U.T * (g * (U @ a))) @ U - (w @ a) * _eye(U) - torch.outer(w, a) - torch.outer(a, w)


def _three(M: Tensor, a: Tensor) -> Tensor:
    """M_ij a_k + M_ik a_j + M_jk a_i for symmetric M [n, n] and a [n]."""
    out = torch.einsum("ij,k->ijk", M, a)
    return out + out.transpose(1, 2) + out.transpose(0, 2)


def _eye(U: Tensor) -> Tensor:
    return torch.eye(U.shape[1], dtype=U.dtype, device=U.device)
