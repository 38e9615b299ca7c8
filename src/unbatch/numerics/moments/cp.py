"""Simultaneous diagonalisation: the columns V that several noisy symmetric matrices E_q = V diag(d_q) V^T have in common.

This is the CP decomposition of the three-way tensor E [q, n, n] with factors (d, V, V), and of a symmetric tensor of any
order when its slices are stacked. It is unique (columns of V up to order and scale) where the columns d_:i are pairwise
non-parallel.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from unbatch.numerics.search.damped_gauss_newton import Damping, Steps, Stop, damped_gauss_newton, end_of

CONTRACTIONS = 32  # pairs of random contractions tried for a start
REFINED_STARTS = 4  # starts that are refined


def compress(slices: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """As many matrices as there are components, in place of many noisy ones.

    E [n, n, n] and C [n, q] with E = C slices: the n leading combinations of slices [q, n, n].

    Noise-free slices of n components span at most n dimensions, so the rest is noise. C has orthonormal rows.

    >>> slices = torch.stack([torch.eye(2), 2 * torch.eye(2), torch.diag(torch.tensor([1.0, -1.0]))]).double()
    >>> E, C = compress(slices, 2)
    >>> E.shape, C.shape
    (torch.Size([2, 2, 2]), torch.Size([2, 3]))
    """
    flat = slices.flatten(1)  # [q, n^2]
    if len(flat) < n:
        flat = torch.cat([flat, flat.new_zeros(n - len(flat), flat.shape[1])])
    left = torch.linalg.svd(flat, full_matrices=False).U
    C = left[:, :n].T
    return (C @ flat).reshape(-1, n, n), C[:, : len(slices)]


def diagonalise(E: Tensor, rng: torch.Generator) -> Tensor:
    """The columns that diagonalise several symmetric matrices at once, from random starts.

    V [n, n], columns of unit norm, that fits E_q = V diag(d_q) V^T best in least squares among the starts tried.

    Starts are eigenvectors of A B^-1 for random contractions A, B of E [q, n, n] (Jennrich; many draws, since one draw's
    eigenvalues may cluster: Kuleshov, Chaganty, Liang 2015); those that fit best are refined.

    >>> V = torch.tensor([[1.0, 0.6], [0.0, 0.8]]).double()
    >>> E = torch.stack([V @ V.T, V @ torch.diag(torch.tensor([1.0, 3.0]).double()) @ V.T])
    >>> found = diagonalise(E, torch.Generator().manual_seed(0))
    >>> (found.T @ V).abs().amax(1).round(decimals=6)  # the same columns, up to order and sign
    tensor([1., 1.], dtype=torch.float64)
    """
    n = E.shape[1]
    if n == 1:
        return torch.ones(1, 1, dtype=E.dtype, device=E.device)
    starts = sorted((_eigenvectors(E, rng) for _ in range(CONTRACTIONS)), key=lambda V: misfit(E, V))
    ends = [refine_factors(E, V) for V in starts[:REFINED_STARTS]]
    return min(ends, key=lambda V: misfit(E, V))


def refine_factors(E: Tensor, V: Tensor, *, steps: int = 50) -> Tensor:
    """The columns near a start that diagonalise several symmetric matrices best.

    V [n, n] of least `misfit` near V, by damped Gauss-Newton with d eliminated; columns are kept at unit norm.

    >>> V = torch.tensor([[1.0, 0.6], [0.0, 0.8]]).double()
    >>> E = torch.stack([V @ V.T, V @ torch.diag(torch.tensor([1.0, 3.0]).double()) @ V.T])
    >>> round(misfit(E, refine_factors(E, V + 0.1)), 12)
    0.0
    """
    at = damped_gauss_newton(
        lambda V, which: _remove(V[0], E)[None],
        partial(_marquardt, E),
        V[None],
        damping=Damping(first=1e-3, rise=10.0, fall=10.0, least=1e-12, most=1e7, ties=True),
        stop=Stop(steps=steps, gain=1e-12),
        moved=lambda V, step: _unit(V[0] + step[0])[None],
    )
    return end_of(at).x[0]


def _marquardt(E: Tensor, V: Tensor, left: Tensor, which: Tensor) -> Steps:
    """Steps [1, n, n] of (H + damping diag H) vec(dV) = J^T vec(left), which do not depend on the columns' scale."""
    d, _ = _best(E, V[0])
    H = _gauss_newton_matrix(V[0], d)
    right, scale = _slope(V[0], d, left[0]), torch.diag(H.diagonal() + H.diagonal().max() * 1e-12)

    def steps(damping: Tensor, rows: Tensor) -> Iterator[Tensor]:
        yield torch.linalg.solve(H + damping * scale, right).view(V[0].T.shape).T[None]

    return steps


def response(E: Tensor, V: Tensor, change: Tensor) -> Tensor:
    """How the columns found move when the matrices change a little.

    First-order change [..., n, n] of the least-squares V where E changes by `change` [..., q, n, n].

    Gauss-Newton: H vec(dV) = J^T vec(change), H by `_gauss_newton_matrix`, by pseudo-inverse, since the scale of a column
    is free.

    >>> V, E = torch.eye(2).double(), torch.stack([torch.eye(2), torch.diag(torch.tensor([1.0, 2.0]))]).double()
    >>> response(E, V, torch.zeros_like(E))
    tensor([[0., 0.],
            [0., 0.]], dtype=torch.float64)
    """
    n = len(V)
    d, _ = _best(E, V)
    values, vectors = torch.linalg.eigh(_gauss_newton_matrix(V, d))
    kept = values > 1e-11 * values[-1]
    inverse = (vectors[:, kept] / values[kept]) @ vectors[:, kept].T
    flat = change.reshape(-1, *E.shape)
    moves = [inverse @ _slope(V, d, _remove(V, one)) for one in flat]
    return torch.stack(moves).view(*change.shape[:-3], n, n).mT


def misfit(E: Tensor, V: Tensor) -> float:
    """What columns V leave of the matrices, squared.

    sum_q |E_q - V diag(d_q) V^T|^2 at the best d.

    >>> E = torch.tensor([[[1.0, 2.0], [2.0, 1.0]]]).double()
    >>> misfit(E, torch.eye(2).double())  # the entries off the diagonal
    8.0
    """
    return float(_remove(V, E).square().sum())


def tangent_misfit(E: Tensor, V: Tensor, change: Tensor) -> float:
    """What no small change of the columns explains of a change of the matrices, squared.

    What `response` and a change of d leave of a `change` of E [q, n, n], squared: pure noise leaves noise.

    >>> E = torch.stack([torch.eye(2), torch.diag(torch.tensor([1.0, 2.0]))]).double()
    >>> round(tangent_misfit(E, torch.eye(2).double(), 0.1 * E), 12)  # a change of d
    0.0
    """
    d, _ = _best(E, V)
    half = (response(E, V, change) * d[:, None, :]) @ V.T
    return misfit(change - half - half.mT, V)


def _best(E: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """The best d [q, n] for V, and what it leaves of E."""
    M = (V.T @ V).square()
    inner = torch.einsum("ai,qab,bi->iq", V, E, V)
    d = (torch.linalg.pinv(M, hermitian=True, rtol=1e-14) @ inner).T
    return d, E - (V * d[:, None, :]) @ V.T


def _remove(V: Tensor, E: Tensor) -> Tensor:
    return _best(E, V)[1]


def _gauss_newton_matrix(V: Tensor, d: Tensor) -> Tensor:
    """The Gauss-Newton matrix [n n, n n] of vec(V) by columns, d eliminated; G = V^T V, S = d^T d, B_i = V diag(G_i).

    H_ij = 2 S_ij (G_ij I + v_j v_i^T - 2 B_i (G o G)^-1 B_j^T)
    """
    n = len(V)
    G, S = V.T @ V, d.T @ d
    B = torch.einsum("ij,aj->iaj", G, V)  # [i, a, j]
    inverse = torch.linalg.pinv(G.square(), hermitian=True, rtol=1e-14)
    H = -2 * torch.einsum("iaj,jk,lbk->ialb", B, inverse, B) + torch.einsum("al,bi->ialb", V, V)
    H += torch.einsum("il,ab->ialb", G, torch.eye(n, dtype=V.dtype, device=V.device))
    return (2 * S[:, None, :, None] * H).reshape(n * n, n * n)


def _slope(V: Tensor, d: Tensor, left: Tensor) -> Tensor:
    """J^T vec(left) [n n] for residuals that no change of d explains: 2 sum_q d_qi left_q v_i."""
    both = (left + left.mT) / 2
    return 2 * torch.einsum("qi,qab,bi->ia", d, both, V).flatten()


def _eigenvectors(E: Tensor, rng: torch.Generator) -> Tensor:
    """Real vectors [n, n] spanning the eigenspaces of A B^-1 for two random contractions of E."""
    mix = torch.randn(2, len(E), generator=rng, dtype=E.dtype).to(E.device)
    A, B = torch.einsum("cq,qij->cij", mix, E)
    size = torch.linalg.matrix_norm(B) * torch.finfo(E.dtype).eps
    values, vectors = torch.linalg.eig(torch.linalg.solve(B + size * _jitter(B, rng), A, left=False))
    V = torch.where(values.imag >= 0, vectors.real, vectors.imag)  # a complex pair gives its two real directions
    return _unit(V + 1e-9 * _jitter(V, rng))


def _jitter(like: Tensor, rng: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=rng, dtype=like.dtype).to(like.device)


def _unit(V: Tensor) -> Tensor:
    size: Tensor = torch.linalg.vector_norm(V, dim=0, keepdim=True)
    return V / size
