"""Nonlinear least squares without matrices: damped Gauss-Newton, its steps by preconditioned conjugate gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from unbatch.numerics.callables import Apply
from unbatch.numerics.search.damped_gauss_newton import Damping, Steps, Stop, damped_gauss_newton

GRAM_ENTRIES = 2**28  # entries of the probe matrix: 1 GiB in float32
GRAM_STEPS = 3  # steps between two preconditioners
MOST_DAMPING = 1e8  # damping that no step is worth trying at


class PointResidual(Protocol):
    """What a search by products makes small: residuals [e] at a point [n, p], differentiable with `create_graph`."""

    def __call__(self, point: Tensor, /, *, create_graph: bool = False) -> Tensor: ...


Cost = Callable[
    [Tensor], tuple[float, Tensor, Tensor]
]  # r [e] -> its cost, half the cost's derivative, and curvature [e]


def squares(r: Tensor) -> tuple[float, Tensor, Tensor]:
    """The sum of squares, as a cost.

    |r|^2.

    >>> squares(torch.tensor([3.0, 4.0]))
    (25.0, tensor([3., 4.]), tensor([1., 1.]))
    """
    return float(r @ r), r, torch.ones_like(r)


def minimise_by_products(
    residual: PointResidual,
    start: Tensor,  # [n, p] float64: row i is example i's unknowns
    rng: torch.Generator,
    *,
    steps: int,
    inner: int = 50,
    damping: float = 0.1,
    tolerance: float = 0.1,
    gain: float = 1e-3,
    surrogate: PointResidual | None = None,
    cost_of: Cost = squares,
) -> Iterator[tuple[float, Tensor]]:
    """Nonlinear least squares of a large problem, whose Jacobian is never formed.

    Minimise |r(x)|^2: take the step of `ByProducts` if it helps; yields (|r|^2, x) at every product.

    The search ends after `steps` linear solves, two steps in a row that help by less than the share `gain`, or where no
    damping helps. x is the same tensor until a step is taken.

    >>> def residual(x, /, *, create_graph=False):
    ...     return (x.square() - 2).flatten()
    >>> start = torch.tensor([[1.0], [3.0]], dtype=torch.float64)
    >>> *_, (cost, x) = minimise_by_products(residual, start, torch.Generator().manual_seed(0), steps=20)
    >>> x.round(decimals=4).flatten()
    tensor([1.4142, 1.4142], dtype=torch.float64)
    """
    solver = ByProducts(residual, rng, inner=inner, tolerance=tolerance, surrogate=surrogate, cost_of=cost_of)
    search = damped_gauss_newton(
        lambda x, which: residual(x[0]).detach()[None],
        solver,
        start.detach().clone()[None],
        damping=Damping(first=damping, rise=4.0, fall=4.0, most=MOST_DAMPING),
        stop=Stop(steps=steps, solves=steps, gain=gain, patience=2),
        cost_of=lambda r: torch.tensor([cost_of(r[0])[0]], dtype=torch.float64, device=r.device),
    )
    batch = next(search).x
    point = batch[0]
    for at in search:
        if at.x is not batch:
            batch, point = at.x, at.x[0]
        yield float(at.cost), point


class ByProducts:
    """Steps of a large problem, by multiplying with its Jacobian alone.

    The linear solver of one large problem: (J^T D J + damping s I) d = -J^T r without matrices, D the curvature.

    J v is a forward difference, J^T u reverse mode. The preconditioner is G (x) I_p, G [n, n] the Gram matrix of the
    examples' influence, G_ij = <J (e_i u^T), J (e_j u^T)> at a random unit u: examples of one class weigh on a gradient
    almost alike, and that near dependence is most of the ill-conditioning. s is the mean of G's diagonal. Conjugate
    gradients end at a relative residual of `tolerance` in the preconditioner's norm, or after `inner` products.

    `cost_of` puts another convex sum over the entries of r in the place of |r|^2: J^T D J with its curvature D is then the
    generalised Gauss-Newton matrix (Schraudolph, Neural Computation 2002).

    With `surrogate` J is its Jacobian instead: a smooth neighbour of residuals that jump. |r| is still what falls, so a
    solution r = 0 stays one.

    >>> def residual(x, /, *, create_graph=False):
    ...     return (x - 4).flatten()
    >>> x = torch.tensor([[[1.0], [2.0]]], dtype=torch.float64)
    >>> steps = ByProducts(residual, torch.Generator().manual_seed(0))(x, x.flatten(1) - 4, torch.tensor([0]))
    >>> *_, step = steps(torch.tensor([1e-9]), torch.tensor([0]))
    >>> step.round(decimals=4).flatten()
    tensor([3., 2.], dtype=torch.float64)
    """

    def __init__(
        self,
        residual: PointResidual,
        rng: torch.Generator,
        *,
        inner: int = 50,
        tolerance: float = 0.1,
        surrogate: PointResidual | None = None,
        cost_of: Cost = squares,
    ) -> None:
        self.residual, self.rng, self.cost_of = surrogate or residual, rng, cost_of
        self.inner, self.tolerance = inner, tolerance
        self.gram = torch.zeros(0, 0)
        self.taken = 0  # points linearised at

    def __call__(self, x: Tensor, r: Tensor, which: Tensor) -> Steps:
        """Steps [1, n, p] from x [1, n, p], where the residuals are r [1, e]."""
        point = x[0]
        system = System(self.residual, point)
        _, slope, bend = self.cost_of(r[0])
        if self.taken % GRAM_STEPS == 0:
            self.gram = example_gram(system.push, point, system.r.numel(), self.rng, bend)
        self.taken += 1
        downhill, scale = -system.pull(slope), float(self.gram.diagonal().mean())

        def steps(damping: Tensor, rows: Tensor) -> Iterator[Tensor]:
            if not scale > 0:  # nothing depends on the point
                return
            shift = float(damping) * scale
            eye = torch.eye(len(point), dtype=point.dtype, device=point.device)
            inverse = torch.linalg.inv(self.gram + shift * eye)
            apply = partial(system.damped, shift, bend)
            for move in conjugate_gradients(apply, downhill, inverse.matmul, self.inner, self.tolerance):
                yield move[None]

        return steps


class System:
    """A problem made linear at a point.

    The residuals there and the products with their Jacobian J there.

    >>> system = System(lambda x, create_graph=False: x.square().flatten(), torch.tensor([[1.0, 2.0]]).double())
    >>> system.push(torch.tensor([[1.0, 1.0]])).round(decimals=4), system.pull(torch.tensor([1.0, 1.0]))
    (tensor([2., 4.], dtype=torch.float64), tensor([[2., 4.]], dtype=torch.float64))
    """

    def __init__(self, residual: PointResidual, x: Tensor) -> None:
        self.residual, self.x = residual, x.clone().requires_grad_()
        self.graph = residual(self.x, create_graph=True)
        self.r = self.graph.detach()
        self.reach = torch.finfo(x.dtype).eps ** 0.5 * (x.norm() + x.numel() ** 0.5)

    def push(self, v: Tensor) -> Tensor:
        """J v by a forward difference whose step balances rounding against curvature."""
        step = self.reach / v.norm()
        change: Tensor = self.residual(self.x.detach() + step * v).detach() - self.r
        return change.div(step)

    def pull(self, u: Tensor) -> Tensor:
        """J^T u."""
        (product,) = torch.autograd.grad(self.graph, self.x, u, retain_graph=True)
        return product

    def damped(self, shift: float, bend: Tensor, v: Tensor) -> Tensor:
        """(J^T D J + shift) v, D the diagonal `bend`."""
        return self.pull(bend * self.push(v)) + shift * v


def conjugate_gradients(apply: Apply, b: Tensor, precondition: Apply, steps: int, tolerance: float) -> Iterator[Tensor]:
    """The solution of A x = b from products with A alone, better with every one.

    Iterates of the solution of A x = b for a symmetric positive definite A; b may have any shape.

    >>> A, b = torch.diag(torch.tensor([1.0, 2.0])), torch.tensor([1.0, 1.0])
    >>> *_, x = conjugate_gradients(A.matmul, b, lambda v: v, 5, 1e-6)
    >>> x.round(decimals=4)
    tensor([1.0000, 0.5000])
    """
    x, residual = torch.zeros_like(b), b.clone()
    z = precondition(residual)
    direction, size = z, float((residual * z).sum())
    goal = tolerance**2 * size
    for _ in range(steps):
        image = apply(direction)
        curvature = float((direction * image).sum())
        if not curvature > 0:  # rounding, or a difference across a kink
            return
        x = x + size / curvature * direction
        yield x
        residual = residual - size / curvature * image
        z = precondition(residual)
        new = float((residual * z).sum())
        if not new > goal:
            return
        direction, size = z + new / size * direction, new


def resized(residual: PointResidual, x: Tensor) -> Tensor:
    """Examples doubled or halved where that fits better.

    x with examples halved or doubled, one after the other, where that lowers |r|^2.

    An example grown to half its size can be a local minimum: what it lacks in size its share of the gradient makes up.

    >>> resized(lambda x, create_graph=False: (x - 4).flatten(), torch.tensor([[2.0], [4.0]]))
    tensor([[4.],
            [4.]])
    """
    least = float(residual(x).detach().square().sum())
    for i in range(len(x)):
        for factor in (2.0, 0.5):
            tried = x.clone()
            tried[i] *= factor
            cost = float(residual(tried).detach().square().sum())
            if cost < least:
                x, least = tried, cost
    return x


def example_gram(push: Apply, x: Tensor, entries: int, rng: torch.Generator, weight: Tensor | None = None) -> Tensor:
    """How much the examples of a batch get in each other's way.

    G_ij = <J (e_i u^T), J (e_j u^T)> [n, n] at a random unit vector u; its mean diagonal times I where too large.

    `weight` [e] weighs the entries.

    >>> example_gram(lambda v: v.sum(0), torch.zeros(2, 1), 1, torch.Generator().manual_seed(0))  # of one effect
    tensor([[1., 1.],
            [1., 1.]])
    """
    n = len(x)
    u = torch.randn(x.shape[1:], generator=rng, dtype=torch.float64).to(x)
    u /= u.norm()
    whole = n * entries <= GRAM_ENTRIES
    rows = []
    for i in range(n if whole else 1):
        direction = torch.zeros_like(x)
        direction[i] = u
        rows.append(push(direction).float())
    influence = torch.stack(rows)  # [n, e]
    influence = influence if weight is None else influence * weight.sqrt().float()
    gram = (influence @ influence.T).to(x)
    return gram if whole else gram[0, 0] * torch.eye(n, dtype=x.dtype, device=x.device)
