"""Linear systems A x = b as layers give them: combined, solved by least squares, and asked what they leave open.

In float64; A is known by its products and those of its transpose, and held as a matrix where that is faster.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from unbatch.numerics.callables import Apply
from unbatch.numerics.linear.factored import Bases, Factored, above, broad, regular, tall, whole, wide

MATRIX_ENTRIES = 2**26  # of a matrix that is held at all: 512 MiB
COLUMN_ENTRIES = 2**22  # entries of the columns that are computed at once
SVD_ENTRIES = (
    2**19
)  # entries of a matrix whose singular values are computed without squaring them where they tell the rank
CHEAP_ENTRIES = 2**13  # of one that costs nothing
REFINEMENTS = 10  # of refinement: each solves for what the last one left


@dataclass(frozen=True)
class Solution:
    """What a linear system says of its unknowns, and what it leaves open.

    What a linear system says of its unknowns.

    >>> found = LinearSystem.of(torch.tensor([[1.0, 1.0]]), torch.tensor([2.0])).solve()
    >>> found.x.round(decimals=6), found.rank
    (tensor([1., 1.], dtype=torch.float64), 1)
    >>> found.free(torch.tensor([[1.0, 0.0]]).double()).round(decimals=6)  # what it does not tell
    tensor([[ 0.5000, -0.5000]], dtype=torch.float64)
    """

    x: Tensor  # [unknowns] least squares, of least norm
    rank: int | None  # of A; None where it was solved by iteration alone
    inverse: Apply  # r [equations] -> the x of least norm with the least |A x - r|
    bases: Callable[[], Bases] = whole  # the smaller of the two where A is deficient, computed when it is asked for

    @property
    def rows(self) -> Tensor | None:
        """[rank, unknowns] orthonormal basis of A's rows, where A is deficient and `null` is not the smaller."""
        return self._bases[0]

    @property
    def null(self) -> Tensor | None:
        """[unknowns - rank, unknowns] of its null space, where that is the smaller."""
        return self._bases[1]

    @cached_property
    def _bases(self) -> Bases:
        return self.bases()

    @cached_property
    def _single(self) -> Bases:
        rows, null = (None if basis is None else basis.float() for basis in self._bases)
        return rows, null

    def free(self, v: Tensor) -> Tensor:
        """The part of v [k, unknowns] that A does not see, in v's precision. Raises ValueError: A's rank is not known."""
        if self.rank is None:
            raise ValueError("the system was solved by iteration, so its null space is not known.")
        rows, null = self._bases if v.dtype == self.x.dtype else self._single
        if null is not None:
            return (v @ null.T) @ null
        return torch.zeros_like(v) if rows is None else v - (v @ rows.T) @ rows

    def seen(self, v: Tensor) -> Tensor:
        """What A sees of v [k, unknowns], as coordinates [k, ...] of the same length. Raises ValueError: as `free`."""
        return v - self.free(v) if self.rows is None else v @ self.rows.T

    def held(self, x: Tensor) -> LinearSystem:
        """What A sees held to what it sees of x [unknowns], by an orthonormal matrix. Raises ValueError: as `free`."""
        push = self.seen
        pull = push if self.rows is None else lambda u: u @ self.rows
        return LinearSystem(push, pull, push(x[None])[0], len(x))


@dataclass(frozen=True)
class LinearSystem:
    """A set of linear equations, known by what multiplying with its matrix and its transpose gives.

    A x = b. `push` and `pull` work on rows, so that several vectors share one call.

    >>> three = LinearSystem.some(torch.tensor([1]), torch.tensor([5.0]).double(), 2)  # x[1] = 5
    >>> both = three + LinearSystem.of(torch.tensor([[1.0, 1.0]]), torch.tensor([7.0]))
    >>> both.solve().x.round(decimals=6)
    tensor([2., 5.], dtype=torch.float64)
    """

    push: Apply  # v [k, unknowns] -> A v [k, equations]
    pull: Apply  # u [k, equations] -> A^T u [k, unknowns]
    b: Tensor  # [equations]
    unknowns: int
    alike: int = 1  # so many groups of unknowns in a row, with equations of their own and the same coefficients

    @classmethod
    def of(cls, A: Tensor, b: Tensor) -> LinearSystem:
        """The system of a matrix A [equations, unknowns]. Raises ValueError: the shapes do not fit."""
        if A.ndim != 2 or b.shape != A.shape[:1]:
            raise ValueError(f"A {tuple(A.shape)} and b {tuple(b.shape)} are no linear system.")
        A, b = A.double(), b.double()
        return _Dense(lambda v: v @ A.T, lambda u: u @ A, b, A.shape[1], own=A)

    @classmethod
    def some(cls, which: Tensor, b: Tensor, unknowns: int) -> LinearSystem:
        """x[which] = b for the numbers `which` [equations] of the unknowns."""

        def pull(u: Tensor) -> Tensor:
            return u.new_zeros(len(u), unknowns).index_add_(1, which, u)

        return cls(lambda v: v[:, which], pull, b, unknowns)

    @classmethod
    def beside(cls, systems: Sequence[LinearSystem]) -> LinearSystem:
        """Systems on unknowns of their own, one after the other."""
        if len(systems) == 1:
            return systems[0]
        unknowns, equations = [s.unknowns for s in systems], [s.equations for s in systems]

        def push(v: Tensor) -> Tensor:
            return torch.cat([s.push(part) for s, part in zip(systems, torch.split(v, unknowns, 1), strict=True)], 1)

        def pull(u: Tensor) -> Tensor:
            return torch.cat([s.pull(part) for s, part in zip(systems, torch.split(u, equations, 1), strict=True)], 1)

        return cls(push, pull, torch.cat([s.b for s in systems]), sum(unknowns))

    @classmethod
    def summed(cls, systems: Sequence[LinearSystem], b: Tensor) -> LinearSystem:
        """sum_i A_i x_i = b, the x_i [unknowns] one after the other; their own right sides are not read."""
        if len(systems) == 1:
            return replace(systems[0], b=b)
        unknowns = [s.unknowns for s in systems]

        def push(v: Tensor) -> Tensor:
            parts = [s.push(part) for s, part in zip(systems, torch.split(v, unknowns, 1), strict=True)]
            return torch.stack(parts).sum(0)

        return cls(push, lambda u: torch.cat([s.pull(u) for s in systems], 1), b, sum(unknowns))

    @classmethod
    def none(cls, unknowns: int, like: Tensor) -> LinearSystem:
        """No equations on so many unknowns, in float64 beside the tensor `like`."""
        nothing = torch.zeros(0, dtype=torch.float64, device=like.device)
        return cls.some(nothing.long(), nothing, unknowns)

    @property
    def equations(self) -> int:
        """How many equations there are."""
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
        return _Stacked(push, pull, both, self.unknowns, upper=self, lower=other)

    def __mul__(self, factor: float) -> LinearSystem:
        """The same equations, each times `factor`: what weighs in least squares, not what is solved."""
        return LinearSystem(
            lambda v: factor * self.push(v),
            lambda u: factor * self.pull(u),
            factor * self.b,
            self.unknowns,
            self.alike,
        )

    def among(self, which: Tensor) -> LinearSystem:
        """The equations of those numbers only."""

        def pull(u: Tensor) -> Tensor:
            return self.pull(u.new_zeros(len(u), self.equations).index_copy_(1, which, u))

        return LinearSystem(lambda v: self.push(v)[:, which], pull, self.b[which], self.unknowns)

    def through(self, f: LinearSystem) -> LinearSystem:
        """The equations on y = F x + c as equations on x; `f` holds y to 0: F x = -c. Raises ValueError: y does not fit."""
        if self.unknowns != f.equations:
            raise ValueError(f"equations on {self.unknowns} unknowns do not fit the {f.equations} outputs.")
        b = self.b + self.push(f.b[None])[0]
        return LinearSystem(lambda v: self.push(f.push(v)), lambda u: f.pull(self.pull(u)), b, f.unknowns)

    @property
    def size(self) -> float:
        """The root mean square of A v over the equations, for one v of independent signs: how heavy they are."""
        rng = torch.Generator().manual_seed(0)
        signs = 2.0 * torch.randint(2, (1, self.unknowns), generator=rng).to(self.b) - 1
        return float(self.push(signs).square().mean().sqrt()) if self.equations else 0.0

    def matrix(self) -> Tensor:
        """A [equations, unknowns]. Raises ValueError: it would be too large."""
        self._check()
        few = min(self.equations, self.unknowns)
        eye = torch.eye(few, dtype=self.b.dtype, device=self.b.device)
        parts = torch.split(eye, max(1, COLUMN_ENTRIES // max(self.equations, self.unknowns, 1)))
        if self.unknowns <= self.equations:
            return torch.cat([self.push(part) for part in parts] or [eye.new_zeros(0, self.equations)]).T
        return torch.cat([self.pull(part) for part in parts] or [eye.new_zeros(0, self.unknowns)])

    def _check(self) -> None:
        if self.equations * self.unknowns > MATRIX_ENTRIES:
            raise ValueError(f"a matrix of {self.equations} x {self.unknowns} is not held; use the products.")

    def gram(self) -> Tensor:
        """A^T A [unknowns, unknowns], by products alone. Raises ValueError: it would be too large."""
        if self.unknowns**2 > MATRIX_ENTRIES:
            raise ValueError(f"a matrix of {self.unknowns} x {self.unknowns} is not held; use the products.")
        block = self._block()
        whole = block.new_zeros(self.alike, len(block), self.alike, len(block))
        whole.diagonal(dim1=0, dim2=2).copy_(block[..., None])
        return whole.view(self.unknowns, self.unknowns)

    def _block(self) -> Tensor:
        """A^T A of the first of the groups that are alike."""
        part = self.unknowns // self.alike
        eye = torch.eye(part, self.unknowns, dtype=self.b.dtype, device=self.b.device)
        rows = torch.split(eye, max(1, COLUMN_ENTRIES // max(self.equations, self.unknowns, 1)))
        block = torch.cat([self.pull(self.push(row))[:, :part] for row in rows] or [eye])
        return (block + block.T) / 2

    def rank(self) -> int:
        """The numerical rank of A. Raises ValueError: A is too large to be held."""
        large = 0 < self.unknowns <= self.equations and self.equations * self.unknowns > SVD_ENTRIES and self.alike == 1
        return self.unknowns if large and above(self.gram()) else len(self.singular_values())

    def singular_values(self) -> Tensor:
        """Those of A above rounding [rank], largest first; by the eigenvalues of a Gram matrix where A is large.

        Raises ValueError: A is too large to be held.
        """
        p, q = self.equations, self.unknowns
        if not p * q:
            return self.b.new_zeros(0)
        if p * q <= SVD_ENTRIES:
            S: Tensor = torch.linalg.svdvals(self.matrix())
            return S[S[0] * max(p, q) * torch.finfo(S.dtype).eps < S]
        if self.alike > 1:  # the groups have equations of their own
            values: Tensor = torch.linalg.eigvalsh(self._block()).flip(0).repeat_interleave(self.alike)
        else:
            values = torch.linalg.eigvalsh(self.gram() if q <= p else self.transposed.gram()).flip(0)
        return values[values > 2 * min(p, q) * torch.finfo(values.dtype).eps * values[0]].sqrt()

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
        inverse, rank, bases = self._factored() if self._held() else (self._lsmr, None, whole)
        x, least = self.b.new_zeros(self.unknowns), float(self.pull(self.b[None]).norm())
        for _ in range(REFINEMENTS):
            tried = x + inverse(self.residual(x))
            left = float(self.pull(self.residual(tried)[None]).norm())
            if left < least:
                x = tried
            if not left < least / 2:
                break
            least = left
        return Solution(x, rank, inverse, bases)

    def _held(self) -> bool:
        return min(self.equations, self.unknowns) ** 2 <= MATRIX_ENTRIES

    def _factored(self) -> Factored:
        """The pseudo-inverse b [equations] -> x, the rank, and where that is deficient a basis of rows or null space."""
        p, q = self.equations, self.unknowns
        if not p * q:
            return lambda b: b.new_zeros(q), 0, lambda: (self.b.new_zeros(0, q), None)
        if p * q <= SVD_ENTRIES:
            A = self.matrix()
            if p * q > CHEAP_ENTRIES and (found := regular(A)) is not None:
                return found
            with suppress(torch.linalg.LinAlgError):  # type: ignore[attr-defined]  # many equal singular values can keep LAPACK from an end
                U, S, Vh = torch.linalg.svd(A, full_matrices=False)
                kept = S > S[0] * max(p, q) * torch.finfo(S.dtype).eps
                U, S, V = U[:, kept], S[kept], Vh[kept].T
                return lambda b: V @ ((U.T @ b) / S), len(S), lambda: (None if len(S) == q else V.T, None)
        if q <= p:
            return tall(self.gram(), self.push, self.pull)
        return wide(self.matrix()) if p * q <= MATRIX_ENTRIES else broad(self.transposed.gram(), self.pull)

    @property
    def transposed(self) -> LinearSystem:
        """A^T, with nothing on its right side."""
        return LinearSystem(self.pull, self.push, self.b.new_zeros(self.unknowns), self.equations)

    def _lsmr(self, b: Tensor) -> Tensor:
        from scipy.sparse.linalg import LinearOperator, lsmr

        def product(apply: Apply) -> Callable[[np.ndarray], np.ndarray]:
            return lambda v: apply(torch.as_tensor(v).to(b).reshape(1, -1))[0].cpu().numpy()

        shape = (self.equations, self.unknowns)
        A = LinearOperator(shape, matvec=product(self.push), rmatvec=product(self.pull), dtype=np.float64)
        found = lsmr(A, b.cpu().numpy(), atol=1e-15, btol=1e-15, conlim=1e15, maxiter=4 * self.unknowns)[0]
        return torch.as_tensor(found).to(b)


@dataclass(frozen=True)
class _Dense(LinearSystem):
    """Of a matrix that is held."""

    own: Tensor = field(kw_only=True)

    def matrix(self) -> Tensor:
        self._check()
        return self.own

    def gram(self) -> Tensor:
        return self.own.T @ self.own


@dataclass(frozen=True)
class _Stacked(LinearSystem):
    """Two systems, each with its own shorter way to its matrix."""

    upper: LinearSystem = field(kw_only=True)
    lower: LinearSystem = field(kw_only=True)

    def matrix(self) -> Tensor:
        return torch.cat([self.upper.matrix(), self.lower.matrix()])

    def gram(self) -> Tensor:
        return self.upper.gram() + self.lower.gram()


def affine(f: Apply, shape: tuple[int, ...], output: Tensor) -> LinearSystem:
    """The equations on the input of a layer that is affine in it, from its output.

    f(x) = output for an f affine in x [k, *shape], example by example; products by f itself and by reverse mode.

    >>> layer = torch.nn.Linear(2, 3).double()
    >>> x = torch.tensor([[1.0, -1.0]]).double()
    >>> affine(layer, (2,), layer(x).detach()).solve().x.round(decimals=6)
    tensor([ 1., -1.], dtype=torch.float64)
    """
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
