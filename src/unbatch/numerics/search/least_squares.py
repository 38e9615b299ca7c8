"""Nonlinear least squares without matrices: Levenberg-Marquardt, its steps by preconditioned conjugate gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

Apply = Callable[[Tensor], Tensor]
LARGEST_GRAM = 2**28  # entries of the probe matrix: 1 GiB in float32


class Residual(Protocol):
    """Residuals [e] at a point [n, p]; with `create_graph` they can be differentiated."""

    def __call__(self, point: Tensor, /, *, create_graph: bool = False) -> Tensor: ...


Cost = Callable[
    [Tensor], tuple[float, Tensor, Tensor]
]  # r [e] -> its cost, half the cost's derivative, and curvature [e]


def squares(r: Tensor) -> tuple[float, Tensor, Tensor]:
    """|r|^2."""
    return float(r @ r), r, torch.ones_like(r)


def levenberg_marquardt(
    residual: Residual,
    start: Tensor,  # [n, p] float64: row i is example i's unknowns
    rng: torch.Generator,
    *,
    steps: int,
    inner: int = 50,
    damping: float = 0.1,
    tolerance: float = 0.1,
    gain: float = 1e-3,
    surrogate: Residual | None = None,
    cost_of: Cost = squares,
) -> Iterator[tuple[float, Tensor]]:
    """Minimise |r(x)|^2: solve (J^T J + damping s I) d = -J^T r, take d if it helps; yields (|r|^2, x) at every product.

    J v is a forward difference, J^T u reverse mode. The preconditioner is G (x) I_p, G [n, n] the Gram matrix of the
    examples' influence, G_ij = <J (e_i u^T), J (e_j u^T)> at a random unit u: examples of one class weigh on a gradient
    almost alike, and that near dependence is most of the ill-conditioning. s is the mean of G's diagonal. The linear
    solve ends at a relative residual of `tolerance` in the preconditioner's norm; the search ends after `steps` solves,
    two steps in a row that help by less than the share `gain`, or where no damping helps.

    `cost_of` puts another convex sum over the entries of r in the place of |r|^2: J^T D J with its curvature D is then the
    generalised Gauss-Newton matrix (Schraudolph, Neural Computation 2002).

    With `surrogate` J is its Jacobian instead: a smooth neighbour of residuals that jump. |r| is still what falls, so a
    solution r = 0 stays one.
    """
    x = start.detach().clone()
    system: System | None = None
    gram = downhill = bend = x
    cost = math.inf
    stalled = taken = 0
    for _ in range(steps):
        if system is None:
            system = System(surrogate or residual, x)
            cost, slope, bend = cost_of(residual(x).detach() if surrogate else system.r)
            if taken % 3 == 0:
                gram = example_gram(system.push, x, system.r.numel(), rng, bend)
            downhill = -system.pull(slope)
        scale = float(gram.diagonal().mean())
        if not scale > 0 or damping > 1e8:
            return
        shift = damping * scale
        solve = torch.linalg.inv(gram + shift * torch.eye(len(x), dtype=x.dtype, device=x.device))
        moved = x
        for move in conjugate_gradients(partial(system.damped, shift, bend), downhill, solve.matmul, inner, tolerance):
            moved = x + move
            yield cost, x
        new = cost_of(residual(moved).detach())[0]
        if not new < cost:
            damping *= 4
            continue
        x, system, damping, taken = moved, None, damping / 4, taken + 1
        yield new, x
        stalled = stalled + 1 if new > (1 - gain) * cost else 0
        if stalled == 2:
            return


class System:
    """The residuals at a point and the products with their Jacobian J there."""

    def __init__(self, residual: Residual, x: Tensor) -> None:
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
    """Iterates of the solution of A x = b for a symmetric positive definite A; b may have any shape."""
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


def resized(residual: Residual, x: Tensor) -> Tensor:
    """x with examples halved or doubled, one after the other, where that lowers |r|^2.

    An example grown to half its size can be a local minimum: what it lacks in size its share of the gradient makes up.
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
    """G_ij = <J (e_i u^T), J (e_j u^T)> [n, n] at a random unit vector u; its mean diagonal times I where too large.

    `weight` [e] weighs the entries.
    """
    n = len(x)
    u = torch.randn(x.shape[1:], generator=rng, dtype=torch.float64).to(x)
    u /= u.norm()
    whole = n * entries <= LARGEST_GRAM
    rows = []
    for i in range(n if whole else 1):
        direction = torch.zeros_like(x)
        direction[i] = u
        rows.append(push(direction).float())
    influence = torch.stack(rows)  # [n, e]
    influence = influence if weight is None else influence * weight.sqrt().float()
    gram = (influence @ influence.T).to(x)
    return gram if whole else gram[0, 0] * torch.eye(n, dtype=x.dtype, device=x.device)
