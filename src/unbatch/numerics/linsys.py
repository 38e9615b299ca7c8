"""Linear systems A x = b in float64, known by their products with A and its transpose; a matrix is held where it helps."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Apply = Callable[[Tensor], Tensor]

ENTRIES = 2**26  # of a matrix that is held at all: 512 MiB
CHUNK = 2**22  # entries of the columns that are computed at once
SMALL = 2**19  # entries of a matrix whose singular values are computed without squaring them
ROUNDS = 10  # of refinement: each solves for what the last one left


@dataclass(frozen=True)
class Solution:
    """What a linear system says of its unknowns."""

    x: Tensor  # [unknowns] least squares, of least norm
    rank: int | None  # of A; None where it was solved by iteration alone
    free: Apply | None  # v [k, unknowns] -> the part of it that A does not see


@dataclass(frozen=True)
class LinearSystem:
    """A x = b. `push` and `pull` work on rows, so that several vectors share one call."""

    push: Apply  # v [k, unknowns] -> A v [k, equations]
    pull: Apply  # u [k, equations] -> A^T u [k, unknowns]
    b: Tensor  # [equations]
    unknowns: int

    @classmethod
    def of(cls, A: Tensor, b: Tensor) -> LinearSystem:
        """The system of a matrix A [equations, unknowns]. Raises ValueError: the shapes do not fit."""
        if A.ndim != 2 or b.shape != A.shape[:1]:
            raise ValueError(f"A {tuple(A.shape)} and b {tuple(b.shape)} are no linear system.")
        A, b = A.double(), b.double()
        return cls(lambda v: v @ A.T, lambda u: u @ A, b, A.shape[1])

    @classmethod
    def some(cls, which: Tensor, b: Tensor, unknowns: int) -> LinearSystem:
        """x[which] = b for the numbers `which` [equations] of the unknowns."""

        def pull(u: Tensor) -> Tensor:
            return u.new_zeros(len(u), unknowns).index_add_(1, which, u)

        return cls(lambda v: v[:, which], pull, b, unknowns)

    @classmethod
    def none(cls, unknowns: int, like: Tensor) -> LinearSystem:
        """No equations on so many unknowns, in float64 beside the tensor `like`."""
        nothing = torch.zeros(0, dtype=torch.float64, device=like.device)
        return cls.some(nothing.long(), nothing, unknowns)

    @property
    def equations(self) -> int:
        return len(self.b)

    def __add__(self, other: LinearSystem) -> LinearSystem:
        """Both sets of equations on the same unknowns. Raises ValueError: they are not the same."""
        if self.unknowns != other.unknowns:
            raise ValueError(f"equations on {self.unknowns} and on {other.unknowns} unknowns are no one system.")
        cut = self.equations

        def pull(u: Tensor) -> Tensor:
            return self.pull(u[:, :cut]) + other.pull(u[:, cut:])

        both = torch.cat([self.b, other.b])
        push = lambda v: torch.cat([self.push(v), other.push(v)], 1)  # noqa: E731
        return _Stacked(push, pull, both, self.unknowns, self, other)

    def matrix(self) -> Tensor:
        """A [equations, unknowns]. Raises ValueError: it would be too large."""
        if self.equations * self.unknowns > ENTRIES:
            raise ValueError(f"a matrix of {self.equations} x {self.unknowns} is not held; use the products.")
        few = min(self.equations, self.unknowns)
        eye = torch.eye(few, dtype=self.b.dtype, device=self.b.device)
        parts = torch.split(eye, max(1, CHUNK // max(self.equations, self.unknowns, 1)))
        if self.unknowns <= self.equations:
            return torch.cat([self.push(part) for part in parts] or [eye.new_zeros(0, self.equations)]).T
        return torch.cat([self.pull(part) for part in parts] or [eye.new_zeros(0, self.unknowns)])

    def rank(self) -> int:
        """The numerical rank of A. Raises ValueError: A is too large to be held."""
        if not 0 < self.equations * self.unknowns <= SMALL:
            return self._factored()[1]
        A = self.matrix()
        S = torch.linalg.svdvals(A)
        return int((S > S[0] * max(A.shape) * torch.finfo(A.dtype).eps).sum())

    def residual(self, x: Tensor) -> Tensor:
        """b - A x [equations]."""
        return self.b - self.push(x[None])[0]

    def solve(self) -> Solution:
        """The least-squares solution of least norm, refined until |A^T (b - A x)| stops falling.

        By singular values; by the eigenvalues of A^T A or A A^T, of side s, where A is large (what lies below
        sqrt(2 s eps) of the largest singular value then counts as 0); by LSMR (Fong and Saunders, 2011; SciPy's) where A
        cannot be held. Raises ValueError: b is not finite.
        """
        if not bool(self.b.isfinite().all()):
            raise ValueError("the right side of the equations is not finite.")
        inverse, rank, free = self._factored() if self._held() else (self._lsmr, None, None)
        x, least = self.b.new_zeros(self.unknowns), float(self.pull(self.b[None]).norm())
        for _ in range(ROUNDS):
            tried = x + inverse(self.residual(x))
            left = float(self.pull(self.residual(tried)[None]).norm())
            if left < least:
                x = tried
            if not left < least / 2:
                break
            least = left
        return Solution(x, rank, free)

    def _held(self) -> bool:
        return self.equations * self.unknowns <= ENTRIES

    def _factored(self) -> tuple[Apply, int, Apply]:
        """The pseudo-inverse b [equations] -> x, the rank, and v [k, unknowns] -> its part in the null space."""
        A = self.matrix()
        p, q = A.shape
        eps = torch.finfo(A.dtype).eps
        if not p * q:
            return lambda b: A.new_zeros(q), 0, lambda v: v
        if p * q <= SMALL:
            with suppress(torch.linalg.LinAlgError):  # type: ignore[attr-defined]  # many equal singular values can keep LAPACK from an end
                U, S, Vh = torch.linalg.svd(A, full_matrices=False)
                kept = S > S[0] * max(p, q) * eps
                U, S, V = U[:, kept], S[kept], Vh[kept].T
                return lambda b: V @ ((U.T @ b) / S), len(S), lambda v: v - (v @ V) @ V.T
        gram = A.T @ A if q <= p else A @ A.T
        size, floor = _largest(gram), 2 * len(gram) * eps
        if q <= p:
            above = torch.linalg.cholesky_ex(gram - floor * size * torch.eye(q).to(A)).info == 0
            if bool(above):  # every eigenvalue of A^T A lies above the shift
                root = torch.linalg.cholesky(gram)
                return lambda b: torch.cholesky_solve((A.T @ b)[:, None], root)[:, 0], q, torch.zeros_like
        values, vectors = torch.linalg.eigh(gram)
        kept = values > floor * size
        values, vectors = values[kept], vectors[:, kept]
        V = vectors if q <= p else A.T @ vectors / values.sqrt()
        Q = V if q <= p else torch.linalg.qr(V).Q
        return lambda b: V @ ((V.T @ (A.T @ b)) / values), len(values), lambda v: v - (v @ Q) @ Q.T

    def _lsmr(self, b: Tensor) -> Tensor:
        from scipy.sparse.linalg import LinearOperator, lsmr

        def product(apply: Apply) -> Callable[[np.ndarray], np.ndarray]:
            return lambda v: apply(torch.as_tensor(v).to(b).reshape(1, -1))[0].cpu().numpy()

        shape = (self.equations, self.unknowns)
        A = LinearOperator(shape, matvec=product(self.push), rmatvec=product(self.pull), dtype=np.float64)
        found = lsmr(A, b.cpu().numpy(), atol=1e-15, btol=1e-15, conlim=1e15, maxiter=4 * self.unknowns)[0]
        return torch.as_tensor(found).to(b)


def _largest(gram: Tensor) -> Tensor:
    """The largest eigenvalue of a positive semidefinite matrix, from below to within a hundredth or so, by powers."""
    v = torch.nn.functional.normalize(gram @ gram.sum(1), dim=0)
    for _ in range(20):
        v = torch.nn.functional.normalize(gram @ v, dim=0)
    return v @ gram @ v


@dataclass(frozen=True)
class _Stacked(LinearSystem):
    """Two systems, each with its own shorter way to its matrix."""

    upper: LinearSystem
    lower: LinearSystem

    def matrix(self) -> Tensor:
        if not self._held():
            return super().matrix()  # which says so
        return torch.cat([self.upper.matrix(), self.lower.matrix()])


def affine(f: Apply, shape: tuple[int, ...], output: Tensor) -> LinearSystem:
    """f(x) = output for an f affine in x [k, *shape], example by example; products by f itself and by reverse mode."""
    zero = torch.zeros(1, *shape, dtype=output.dtype, device=output.device)
    offset = f(zero).detach()

    def push(v: Tensor) -> Tensor:
        return (f(v.view(-1, *shape)) - offset).detach().flatten(1)

    def pull(u: Tensor) -> Tensor:
        x = zero.expand(len(u), *shape).clone().requires_grad_()
        with torch.enable_grad():
            y = f(x)
        (back,) = torch.autograd.grad(y, x, u.view_as(y))
        return back.flatten(1)

    return LinearSystem(push, pull, (output.reshape(offset.shape) - offset).flatten(), zero.numel())
