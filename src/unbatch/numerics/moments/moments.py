"""Moment tensors of a layer's gradient, estimated over its neurons, with their measured errors.

Neuron j has Gaussian weights u_j [n] and sends, of a batch v_1 ... v_n in R^n with residuals r_i [k],

    head:  g_j = sum_i r_i s(u_j . v_i)  [k]          first:  G_j = sum_i (a_j . r_i) s'(u_j . v_i) v_i  [n]

where a_j [k] are its outgoing weights. By Stein's identity their Hermite coefficients are the symmetric tensors
T_p = sum_i r_i E s^(p) v_i^{x p}: of degree p in g, and of degree p - 1 in G.

They are read by least squares on the Hermite polynomials of degree <= most, or by plain averages (Stein). Both have an
error of order 1 / sqrt(m); least squares removes what low degrees add to the noise of high ones, is exact for polynomial
s, and needs Gaussian weights only as far as s is no polynomial of that degree.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from unbatch.numerics.moments.hermite import entries, second, third_along, unpack, variances

GROUPS = 20  # of neurons, whose spread gives the error
UNKNOWNS = 2000  # most of a least squares: it costs 3 m UNKNOWNS^2 operations


@dataclass(frozen=True)
class Moment:
    """A symmetric tensor estimated over the neurons of a layer, with its measured error.

    One tensor a multiplier, T [k, n, ..., n], as coefficients of orthonormal Hermite polynomials, and their errors.

    >>> rng = torch.Generator().manual_seed(0)
    >>> U = torch.randn(2000, 2, generator=rng, dtype=torch.float64)
    >>> first, second_order = head_moments((U[:, :1] ** 2), U, 2)
    >>> second_order.tensor(second_order.value).round(decimals=6) + 0.0  # the second derivative of u_0^2
    tensor([[[2., 0.],
             [0., 0.]]], dtype=torch.float64)
    """

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


def head_moments(g: Tensor, U: Tensor, most: int, *, fit: bool = True) -> list[Moment]:
    """The moment tensors of a batch, from the gradient of a last layer.

    Tensors of order 1 ... most from dL/da: g [m, k], U [m, n] -> T_p [k, n, ..., n].

    >>> rng = torch.Generator().manual_seed(0)
    >>> U = torch.randn(2000, 2, generator=rng, dtype=torch.float64)
    >>> [moment.order for moment in head_moments(torch.tanh(U[:, :1]), U, 3)]
    [1, 2, 3]
    """
    ones = torch.ones(len(U), 1, dtype=U.dtype, device=U.device)
    found = _coefficients(g, ones, U, most, fit)
    n = U.shape[1]
    return [Moment("head", p, n, c[0].T, e[:, 0].transpose(1, 2)) for p, (c, e) in enumerate(found) if p >= 1]


def first_moments(G: Tensor, a: Tensor, U: Tensor, most: int, *, fit: bool = True) -> list[Moment]:
    """The moment tensors of a batch, from the gradient of a first layer.

    Tensors of order 1 ... most from dL/dW: G [m, n], a [m, k], U [m, n] -> T_p [k, n, ..., n].

    a is whitened first, so the k tensors are those of k independent combinations of the outputs.

    >>> rng = torch.Generator().manual_seed(0)
    >>> U, a = (torch.randn(2000, k, generator=rng, dtype=torch.float64) for k in (2, 1))
    >>> v = torch.tensor([1.0, 0.0]).double()
    >>> moments = first_moments(a * (U @ v)[:, None] * v, a, U, 2)  # of s(t) = t^2 / 2
    >>> moments[1].tensor(moments[1].value).abs().argmax()  # along v v^T
    tensor(0)
    """
    found = _coefficients(G, whitened(a), U, most - 1, fit)
    return [Moment("first", p, U.shape[1], c, e) for p, (c, e) in enumerate(found)]


def whitened(a: Tensor) -> Tensor:
    """Columns made orthogonal and of one size.

    a [m, r] with a^T a = m I: as many combinations of the columns [m, k] as are independent.

    >>> white = whitened(torch.tensor([[3.0, 3.0], [0.0, 1.0]]))
    >>> (white.T @ white).round(decimals=4)
    tensor([[2., 0.],
            [0., 2.]])
    """
    U, S, _ = torch.linalg.svd(a, full_matrices=False)
    kept = S > S[:1] * max(a.shape) * torch.finfo(a.dtype).eps
    white: Tensor = U[:, kept] * len(a) ** 0.5
    return white


def non_gaussianity(U: Tensor, rng: torch.Generator) -> float:
    """How far a layer's weights are from Gaussian.

    Root mean square of E H_p(u) / sqrt(alpha!), p = 3 and 4, beyond what m Gaussian rows [m, n] show by chance.

    U is at mean 0 and covariance I. The larger of the two degrees; along 8 random directions where n is larger.

    >>> rng = torch.Generator().manual_seed(0)
    >>> non_gaussianity(torch.randn(20000, 2, generator=rng), rng) < 0.02
    True
    >>> non_gaussianity(torch.randn(20000, 2, generator=rng).sign(), rng) > 0.2
    True
    """
    m, n = U.shape
    if n > 8:
        U = U @ torch.linalg.qr(torch.randn(n, 8, generator=rng, dtype=U.dtype).to(U.device)).Q
    squares = [float((entries(U, p).mean(0).square() / variances(min(n, 8), p).to(U)).mean()) for p in (3, 4)]
    return math.sqrt(max(0.0, max(squares) - 1 / m))


def fitted_degree(m: int, n: int, k: int, most: int) -> int:
    """The highest degree that so many neurons suffice to fit.

    The highest degree <= most whose least squares has at least three neurons an unknown, and not too many unknowns.

    -1 if none has. What averages over the rest then lose is little, since high degrees add little to each other's noise.

    >>> fitted_degree(1000, 4, 1, 4), fitted_degree(60, 4, 1, 4)
    (4, 2)
    """
    sizes = [math.comb(n + p - 1, p) * k for p in range(most + 1)]
    return max((p for p in range(most + 1) if sum(sizes[: p + 1]) <= min(m / 3, UNKNOWNS)), default=-1)


def _coefficients(Y: Tensor, a: Tensor, U: Tensor, most: int, fit: bool) -> list[tuple[Tensor, Tensor]]:
    """Coefficients [k, C_p, c] and shares [groups, k, C_p, c] of Y_j = sum_kp a_jk <T_kp, H_p(u_j)>, p = 0 ... most.

    Degrees up to `fitted_degree` by least squares, the others by averages over what that leaves.
    """
    m, n = U.shape
    k, c = a.shape[1], Y.shape[1]
    sizes = [math.comb(n + p - 1, p) * k for p in range(most + 1)]
    low = sum(sizes[: fitted_degree(m, n, k, most) + 1]) if fit else 0
    normal = torch.zeros(low, low, dtype=U.dtype, device=U.device)
    right = torch.zeros(low, c, dtype=U.dtype, device=U.device)
    for X, y in _chunks(Y, a, U, most if low == sum(sizes) else fitted_degree(m, n, k, most)) if low else ():
        normal += X.T @ X
        right += X.T @ y
    factor = torch.linalg.cholesky(normal) if low else normal
    solved = torch.cholesky_solve(right, factor) if low else right
    counts, inside, outside = [], [], []
    for X, y in _chunks(Y, a, U, most):
        left = y - X[:, :low] @ solved
        weight = 1 - torch.linalg.solve_triangular(factor, X[:, :low].T, upper=False).square().sum(0)  # 1 - leverage
        inside.append(X[:, :low].T @ (left / weight.clamp_min(0.05)[:, None]))  # a fit hides errors where it is pulled
        outside.append(X[:, low:].T @ left)
        counts.append(len(y))
    mean = torch.stack(outside).sum(0) / m
    share = torch.tensor(counts, dtype=U.dtype, device=U.device)[:, None, None]
    averaged = (torch.stack(outside) - share * mean) / m
    value = torch.cat([solved, mean])
    fitted = averaged[:, :0]
    if low:  # side by side: a batch of right-hand sides would copy the factor
        fitted = torch.stack(torch.split(torch.cholesky_solve(torch.cat(inside, 1), factor), c, 1))
    shares = torch.cat([fitted, averaged], 1)
    parts = zip(torch.split(value, sizes), torch.split(shares, sizes, 1), strict=True)
    return [(v.reshape(k, -1, c), e.reshape(len(e), k, -1, c)) for v, e in parts]


def _chunks(Y: Tensor, a: Tensor, U: Tensor, most: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Orthonormal polynomials times multipliers [rows, sum_p k C_p], and Y's rows, one group of neurons after another."""
    n = U.shape[1]
    scales = [variances(n, p).to(U).sqrt() for p in range(most + 1)]
    for y, b, u in zip(Y.tensor_split(GROUPS), a.tensor_split(GROUPS), U.tensor_split(GROUPS), strict=True):
        degrees = [entries(u, p) / scale for p, scale in enumerate(scales)]
        yield torch.cat([(b[:, :, None] * H[:, None, :]).flatten(1) for H in degrees], 1), y


def moment_subspace(
    Y: Tensor, a: Tensor, W: Tensor, n: int, orders: Sequence[int], rng: torch.Generator, *, route: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The directions in which a batch's inputs lie, from the moments of a layer's gradient.

    Leading directions V [n, d] of second- and third-order moments in R^d, their strengths, and errors [groups, n, d].

    head: A = mean_j g_j H_p(w_j); first: A = sym mean_j (a_j G_j) x H_{p-1}(w_j); W [m, d] whitened, Y = g [m, k] or
    G [m, d]; `orders` are those of 2 and 3 that the activation has. Order 3 is contracted once: T(I, I, b), first with
    the first-order moment, which lies in the span as well, and random unit vectors b, then along the directions found,
    where no 1 / sqrt(d) of the signal is lost. What lower orders, and the other order along the directions found, say of
    Y is taken off first: it has no mean here and adds to the noise. The n leading eigenvectors of sum A^2, each A at unit
    noise, are V. Errors are of the directions, to first order; they mean little where the next eigenvalue, which is
    noise, comes near the last of the n: all are returned, descending.

    >>> rng = torch.Generator().manual_seed(0)
    >>> W = torch.randn(4000, 6, generator=rng, dtype=torch.float64)
    >>> V, strengths, errors = moment_subspace((W[:, :1] ** 2), torch.ones(4000, 1), W, 1, [2], rng, route="head")
    >>> round(float(V[0, 0].abs()), 1)
    1.0
    """
    m, d = W.shape
    head = route == "head"
    outputs = torch.ones(m, 1).to(W) if head else whitened(a)  # what multiplies the polynomials
    k = Y.shape[1] if head else outputs.shape[1]
    if head:
        constant, line = _line(Y, W)
        Y, lines = Y - constant - W @ line, line.T  # [k, d]
    else:
        lines = outputs.T @ Y / m
        Y = Y - outputs @ lines

    moment, noise = partial(_moment, W, None if head else outputs), partial(_noise, W, None if head else outputs)
    slices: list[_Slice] = [(Y, i, None) for i in range(k)]
    if 2 not in orders:
        B = torch.randn(3, d, generator=rng, dtype=torch.float64).to(W)
        starts = [torch.cat([line[None], B]) for line in lines]
        slices = [(Y, i, b / torch.linalg.vector_norm(b)) for i in range(k) for b in starts[i]]
    V, values, kept = _leading([(1.0, moment(slice(None), one) / m) for one in slices], n)
    for turn in range(2 if 3 in orders else 0):  # more turns fit the noise
        second_left, third_left = (Y - _part(Y, outputs, W @ V, p - (not head)) for p in (3, 2))
        slices = [(second_left, i, None) for i in range(k)] if 2 in orders else []
        if turn or 2 not in orders:
            slices += [(third_left if 2 in orders else Y, i, v) for i in range(k) for v in V.T]
        V, values, kept = _leading([(1 / noise(one, V), moment(slice(None), one) / m) for one in slices], n)
    errors = []
    edges = [round(i * m / GROUPS) for i in range(GROUPS + 1)]
    for start, stop in pairwise(edges):
        change = torch.zeros_like(V)
        for (c, inner, outer), one in zip(kept, slices, strict=True):
            off = c * moment(slice(start, stop), one) @ V / m - outer * ((stop - start) / m)
            change += off @ inner / values[:n].square()
        errors.append((change - V @ (V.T @ change)).T)
    return V.T, values, torch.stack(errors)


_Slice = tuple[
    Tensor, int, Tensor | None
]  # Y [m, .] less other orders, the output, and what order 3 is contracted with


def _moment(W: Tensor, outputs: Tensor | None, rows: slice, of: _Slice) -> Tensor:
    """m A [d, d] over some of the neurons W [m, d]; `outputs` [m, k] on the first route alone."""
    y, i, b = of
    w = W[rows]
    if outputs is None:
        return second(y[rows, i], w) if b is None else third_along(y[rows, i], w, b)
    G = y[rows] * outputs[rows, i, None]
    P = G.T @ w if b is None else G.T @ (w * (w @ b)[:, None]) - torch.outer(G.sum(0), b)
    return (P + P.T) / 2


def _noise(W: Tensor, outputs: Tensor | None, of: _Slice, V: Tensor) -> float:
    """Root mean square entry of m^(1/2) A V outside the span V [d, n], by the neurons' own spread."""
    y, i, b = of
    q = y[:, i, None] * (W @ V) if outputs is None else outputs[:, i, None] * (y @ V) / 2  # [m, n]
    if b is not None:
        q = q * (W @ b)[:, None] - (torch.outer(y[:, i], V.T @ b) if outputs is None else 0.0)
    return max(float(q.square().mean().sqrt()), torch.finfo(W.dtype).tiny)


def _line(Y: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
    """The constant [k] and linear part [d, k] of Y [m, k] in W [m, d]: by least squares, or averages where m < 3 d."""
    m, d = W.shape
    if m < 3 * d:
        return Y.mean(0), W.T @ (Y - Y.mean(0)) / m
    solved = torch.linalg.lstsq(torch.cat([torch.ones(m, 1).to(W), W], 1), Y).solution
    return solved[0], solved[1:]


def _part(Y: Tensor, a: Tensor, U: Tensor, p: int) -> Tensor:
    """The part sum_k a_jk <T_k, H_p(u_j)> [m, c] of Y [m, c], by least squares; 0 where m is too small for that."""
    if 3 * a.shape[1] * math.comb(U.shape[1] + p - 1, p) > len(Y):
        return torch.zeros_like(Y)
    X = (a[:, :, None] * entries(U, p)[:, None, :]).flatten(1)
    part: Tensor = X @ torch.linalg.lstsq(X, Y).solution
    return part


def _leading(slices: list[tuple[float, Tensor]], n: int) -> tuple[Tensor, Tensor, list[tuple[float, Tensor, Tensor]]]:
    """V [d, n] and all eigenvalues of (sum (c A)^2)^(1/2), descending, and of each pair c, V^T c A V and c A V."""
    if len(slices) == 1:
        values, vectors = torch.linalg.eigh(slices[0][0] * slices[0][1])
        size = values.abs()
    else:
        values, vectors = torch.linalg.eigh(torch.stack([c**2 * A @ A for c, A in slices]).sum(0))
        size = values.clamp_min(0).sqrt()
    lead = size.argsort(descending=True)
    V = vectors[:, lead[:n]]
    return V, size[lead], [(c, V.T @ (c * A @ V), c * A @ V) for c, A in slices]
