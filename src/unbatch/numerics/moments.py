"""Moment tensors of a layer's gradient, estimated over its neurons, with their measured errors.

Neuron j has Gaussian weights u_j [n] and sends, of a batch v_1 ... v_n in R^n with residuals r_i [k],

    head:  g_j = sum_i r_i s(u_j . v_i)  [k]          first:  G_j = sum_i (a_j . r_i) s'(u_j . v_i) v_i  [n]

where a_j [k] are its outgoing weights. By Stein's identity their Hermite coefficients are the symmetric tensors
T_p = sum_i r_i E s^(p) v_i^{x p}: of degree p in g, and of degree p - 1 in G.

They are read by least squares on the Hermite polynomials of degree <= top, or by plain averages (Stein). Both have an
error of order 1 / sqrt(m); least squares removes what low degrees add to the noise of high ones, is exact for polynomial
s, and needs Gaussian weights only as far as s is no polynomial of that degree.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from unbatch.numerics.hermite import entries, second, third_along, unpack, variances

GROUPS = 20  # of neurons, whose spread gives the error


@dataclass(frozen=True)
class Moment:
    """One tensor a multiplier, T [k, n, ..., n], as coefficients of orthonormal Hermite polynomials, and their errors."""

    route: str  # "head" or "first"
    degree: int  # of the polynomials
    n: int
    value: Tensor  # [k, C(n + degree - 1, degree)] or, for "first", [k, C, n]
    shares: Tensor  # [groups, *value.shape] what each group of neurons adds to the error; they add up in squares

    @property
    def order(self) -> int:
        """Order of the tensor."""
        return self.degree + (self.route == "first")

    @property
    def noise(self) -> float:
        """Root mean square error of one coefficient."""
        return float(self.shares.square().sum(0).mean().sqrt())

    def tensor(self, value: Tensor) -> Tensor:
        """The symmetric tensors [k, n, ..., n] of a `value` or of one of the `shares`."""
        scale = variances(self.n, self.degree).to(value).sqrt()
        if self.route == "head":
            return unpack(value * scale, self.n, self.degree)
        T = unpack((value * scale[:, None]).transpose(1, 2), self.n, self.degree)  # [k, n, n, ..., n]
        return torch.stack([T.movedim(1, 1 + i) for i in range(self.order)]).mean(0)

    def slices(self, value: Tensor) -> Tensor:
        """The tensor's matrices [q, n, n] at unit noise: the Frobenius norm then weighs coefficients by precision."""
        T = self.tensor(value).reshape(-1, self.n, self.n)
        unit: Tensor = T / (math.factorial(self.degree) ** 0.5 * max(self.noise, torch.finfo(T.dtype).tiny))
        return unit


def head_moments(g: Tensor, U: Tensor, top: int, *, fit: bool = True) -> list[Moment]:
    """Tensors of order 1 ... top from dL/da: g [m, k], U [m, n] -> T_p [k, n, ..., n]."""
    ones = torch.ones(len(U), 1, dtype=U.dtype, device=U.device)
    found = _coefficients(g, ones, U, top, fit)
    n = U.shape[1]
    return [Moment("head", p, n, c[0].T, e[:, 0].transpose(1, 2)) for p, (c, e) in enumerate(found) if p >= 1]


def first_moments(G: Tensor, a: Tensor, U: Tensor, top: int, *, fit: bool = True) -> list[Moment]:
    """Tensors of order 1 ... top from dL/dW: G [m, n], a [m, k], U [m, n] -> T_p [k, n, ..., n].

    a is whitened first, so the k tensors are those of k independent combinations of the outputs.
    """
    found = _coefficients(G, whitened(a), U, top - 1, fit)
    return [Moment("first", p, U.shape[1], c, e) for p, (c, e) in enumerate(found)]


def whitened(a: Tensor) -> Tensor:
    """a [m, r] with a^T a = m I: as many combinations of the columns [m, k] as are independent."""
    U, S, _ = torch.linalg.svd(a, full_matrices=False)
    kept = S > S[:1] * max(a.shape) * torch.finfo(a.dtype).eps
    white: Tensor = U[:, kept] * len(a) ** 0.5
    return white


def non_gaussianity(U: Tensor, rng: torch.Generator) -> float:
    """Root mean square of E H_p(u) / sqrt(alpha!), p = 3 and 4, beyond what m Gaussian rows [m, n] show by chance.

    U is at mean 0 and covariance I. The larger of the two degrees; along 8 random directions where n is larger.
    """
    m, n = U.shape
    if n > 8:
        U = U @ torch.linalg.qr(torch.randn(n, 8, generator=rng, dtype=U.dtype).to(U.device)).Q
    squares = [float((entries(U, p).mean(0).square() / variances(min(n, 8), p).to(U)).mean()) for p in (3, 4)]
    return math.sqrt(max(0.0, max(squares) - 1 / m))


def fitted_degree(m: int, n: int, k: int, top: int) -> int:
    """The highest degree <= top whose least squares has at least three neurons an unknown; -1 if none has."""
    sizes = [math.comb(n + p - 1, p) * k for p in range(top + 1)]
    return max((p for p in range(top + 1) if 3 * sum(sizes[: p + 1]) <= m), default=-1)


def _coefficients(Y: Tensor, a: Tensor, U: Tensor, top: int, fit: bool) -> list[tuple[Tensor, Tensor]]:
    """Coefficients [k, C_p, c] and shares [groups, k, C_p, c] of Y_j = sum_kp a_jk <T_kp, H_p(u_j)>, p = 0 ... top.

    Degrees up to `fitted_degree` by least squares, the others by averages over what that leaves.
    """
    m, n = U.shape
    k, c = a.shape[1], Y.shape[1]
    sizes = [math.comb(n + p - 1, p) * k for p in range(top + 1)]
    low = sum(sizes[: fitted_degree(m, n, k, top) + 1]) if fit else 0
    normal = torch.zeros(low, low, dtype=U.dtype, device=U.device)
    right = torch.zeros(low, c, dtype=U.dtype, device=U.device)
    for X, y in _chunks(Y, a, U, top if low == sum(sizes) else fitted_degree(m, n, k, top)) if low else ():
        normal += X.T @ X
        right += X.T @ y
    factor = torch.linalg.cholesky(normal) if low else normal
    solved = torch.cholesky_solve(right, factor) if low else right
    counts, inside, outside = [], [], []
    for X, y in _chunks(Y, a, U, top):
        left = y - X[:, :low] @ solved
        weight = 1 - torch.linalg.solve_triangular(factor, X[:, :low].T, upper=False).square().sum(0)  # 1 - leverage
        inside.append(X[:, :low].T @ (left / weight.clamp_min(0.05)[:, None]))  # a fit hides errors where it is pulled
        outside.append(X[:, low:].T @ left)
        counts.append(len(y))
    mean = torch.stack(outside).sum(0) / m
    share = torch.tensor(counts, dtype=U.dtype, device=U.device)[:, None, None]
    averaged = (torch.stack(outside) - share * mean) / m
    value = torch.cat([solved, mean])
    shares = torch.cat([torch.cholesky_solve(torch.stack(inside), factor) if low else averaged[:, :0], averaged], 1)
    parts = zip(torch.split(value, sizes), torch.split(shares, sizes, 1), strict=True)
    return [(v.reshape(k, -1, c), e.reshape(len(e), k, -1, c)) for v, e in parts]


def _chunks(Y: Tensor, a: Tensor, U: Tensor, top: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Orthonormal polynomials times multipliers [rows, sum_p k C_p], and Y's rows, one group of neurons after another."""
    n = U.shape[1]
    scales = [variances(n, p).to(U).sqrt() for p in range(top + 1)]
    for y, b, u in zip(Y.tensor_split(GROUPS), a.tensor_split(GROUPS), U.tensor_split(GROUPS), strict=True):
        degrees = [entries(u, p) / scale for p, scale in enumerate(scales)]
        yield torch.cat([(b[:, :, None] * H[:, None, :]).flatten(1) for H in degrees], 1), y


def moment_subspace(
    Y: Tensor, a: Tensor, W: Tensor, n: int, order: int, rng: torch.Generator, *, route: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Leading directions [n, d] of the second-order moment in R^d, its eigenvalues, and errors [groups, n, d].

    head: P = mean_j g_j H_2(w_j); first: P = sym mean_j a_j G_j w_j^T; W [m, d] whitened, Y = g [m, k] or G [m, d].
    With order 3 the third-order tensor contracted with a random unit vector takes the place of P, for activations whose
    second order vanishes. Several outputs are combined as sum_k P_k^2. Errors are of the directions, to first order; they
    mean little where the next eigenvalue, which is noise, comes near the last of the n: all are returned, descending.
    """
    m, d = W.shape
    b = torch.randn(d, generator=rng, dtype=torch.float64).to(W)
    b /= torch.linalg.vector_norm(b)
    outputs = Y.T if route == "head" else whitened(a).T  # [k, m] weights of the neurons

    def moment(rows: slice, weights: Tensor) -> Tensor:
        if route == "head":
            return second(weights, W[rows]) if order == 2 else third_along(weights, W[rows], b)
        G, w = Y[rows] * weights[:, None], W[rows]
        P = G.T @ w if order == 2 else G.T @ (w * (w @ b)[:, None]) - torch.outer(G.sum(0), b)
        return (P + P.T) / 2

    whole = [moment(slice(None), g) / m for g in outputs]
    square = whole[0] if len(whole) == 1 else torch.stack([P @ P for P in whole]).sum(0)
    values, vectors = torch.linalg.eigh(square)
    size = values.abs() if len(whole) == 1 else values.clamp_min(0).sqrt()
    lead = size.argsort(descending=True)
    V, strength = vectors[:, lead[:n]], size[lead[:n]]
    errors = []
    edges = [round(i * m / GROUPS) for i in range(GROUPS + 1)]
    for start, stop in pairwise(edges):
        rows = slice(start, stop)
        change = torch.zeros_like(V)
        for P, g in zip(whole, outputs, strict=True):
            off = moment(rows, g[rows]) @ V / m - P @ V * ((stop - start) / m)
            change += off @ (V.T @ P @ V) / strength.square()
        errors.append((change - V @ (V.T @ change)).T)
    return V.T, size[lead], torch.stack(errors)
