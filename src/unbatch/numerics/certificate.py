"""Certificate: how far examples read out of a mixture can be from the true ones.

The honest gradient is A = sum_i F(z_i*, y_i) z_i*^T + E, E the rounding and noise that its sender and its reader added. To
first order, examples z that solve the equation best are off by z - z* = J^+ E: the error is E's own, seen through the
pseudoinverse of the equation's Jacobian at z. E is not known but its law is: independent entries of spectral norm
`mixture.noise`, deltas that are wrong by `mixture.rounding` of themselves, independently and by a common factor an example,
and what the sender's own precision does to the deltas of examples beside z, which is computed. Drawing E a few times
measures |J^+ E| example by example, without a worst case over directions that no rounding takes. A candidate that does not
solve the equation is off by its Newton step as well, which is added.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from unbatch.numerics.linearisation import Linearisation
from unbatch.numerics.mixture import Mixture

Rounding = Callable[[Tensor, Tensor], Tensor]  # z [f, n], y -> errors of their deltas [f, m]

DRAWS = 6
SIGMAS = 6.0  # of an error with many degrees of freedom, of which DRAWS x n coordinates measure the spread
BESIDE = 1e-4  # relative distance at which rounding is another draw of the same law
LARGEST = 0.05  # relative radius beyond which nothing is claimed: first order is then no proof of anything
NONLINEAR = 0.05  # relative change of F over the radius above which first order is not relied on


def radius(mixture: Mixture, z: Tensor, y: Tensor, rng: torch.Generator, *, rounding: Rounding | None = None) -> Tensor:
    """Largest |z_i - z_i*| [f], l2 in R^d, of accepted examples z [f, n]; inf where first order does not reach.

    Assumes that the gradient is an honest one of n independent examples, of which z_i is near one: candidates are to
    have passed `accept`. Jointly where all n examples are there; else each by its own equation, which takes a smooth F.
    inf as well where an example has as many unknowns as equations, 2 n >= m: nothing then speaks against a wrong one.
    """
    if not len(z) or 2 * mixture.n >= len(mixture.U):
        return z.new_full((len(z),), torch.inf)
    found = (_jointly if len(z) == mixture.n else _alone)(mixture, z, y, rng, rounding)
    turned = 2 * (mixture.outside or mixture.noise) * (z / mixture.S).norm(dim=1)  # the row space's own: |Delta^+ E|
    found = found + turned
    moved = z + found[:, None] * torch.nn.functional.normalize(_normal(z, rng), dim=1)
    F = mixture.F(z, y)
    bend = (mixture.F(moved, y) - F).norm(dim=1) / (F.norm(dim=1) + 1e-300)
    near = (bend < NONLINEAR) & (found < LARGEST * z.norm(dim=1))  # false for NaN too
    return torch.where(near, found, torch.inf)


def _jointly(mixture: Mixture, z: Tensor, y: Tensor, rng: torch.Generator, rounding: Rounding | None) -> Tensor:
    at = Linearisation(mixture, z, y)
    n, scale = mixture.n, _spread(mixture)

    def response(E: Tensor) -> Tensor:
        v = at.solve(E, damping=1e-12, inner=1000, tolerance=1e-4)  # weak directions come last
        return v[:, :n].square().sum(1)

    spread = z.new_zeros(len(z))
    for _ in range(DRAWS):
        E = scale * _normal(mixture.U, rng) + _wrong(at, rng, rounding).T @ z
        spread += response(E) / DRAWS
    return SIGMAS * spread.sqrt() + 2 * response(at.left()).sqrt()


def _alone(mixture: Mixture, z: Tensor, y: Tensor, rng: torch.Generator, rounding: Rounding | None) -> Tensor:
    """Each example by ((I - U U^T) F, |F| (q . z - 1)) = 0, whose error is E q and that of F."""
    U, n = mixture.U, mixture.n
    at = Linearisation(mixture, z, y)
    free = torch.eye(n).to(z)
    if at.ones is not None:
        free = torch.linalg.svd(at.ones[None], full_matrices=True)[2][1:]  # [n - 1, n] orthogonal to ones
    rows = [at.bent(w.expand_as(at.F)) for w in free @ mixture.W] + list(at.columns.movedim(2, 0))
    H = torch.stack(rows, 1)  # [f, p, m] derivatives of F
    q, size = mixture.dual(at.F), at.F.norm(dim=1)

    def equation(F: Tensor) -> Tensor:  # [..., m] -> [..., m + 1]; the last weighs |F| dq . z
        inside = F @ U
        last = ((inside / mixture.S) * z.view(len(z), *[1] * (F.ndim - 2), n)).sum(-1)
        return torch.cat([F - inside @ U.T, (last * size.view(len(z), *[1] * (F.ndim - 2)))[..., None]], -1)

    J = equation(H)
    J[:, : len(free), -1] += (q @ free.T) * size[:, None]  # q . dz
    right = equation(at.F)
    right[:, -1] -= size
    left = torch.linalg.pinv(J.mT)  # [f, p, m + 1]

    def response(E: Tensor) -> Tensor:
        moved: Tensor = (left @ E[:, :, None])[:, : len(free), 0]
        return moved.square().sum(1)

    spread = z.new_zeros(len(z))
    for _ in range(DRAWS):
        outer = _spread(mixture) * q.norm(dim=1, keepdim=True) * _normal(at.F, rng)
        spread += response(equation(outer + _wrong(at, rng, rounding))) / DRAWS
    return SIGMAS * spread.sqrt() + 2 * response(right).sqrt()


def _spread(mixture: Mixture) -> float:
    """Standard deviation of the error of an entry of A, at most: m of them add up to its spectral norm."""
    return (mixture.outside or mixture.noise) / math.sqrt(len(mixture.U))


def _wrong(at: Linearisation, rng: torch.Generator, rounding: Rounding | None) -> Tensor:
    """A draw of the errors of the deltas [f, m]."""
    F, z = at.F, at.z
    wrong: Tensor = at.mixture.rounding * F * (_normal(F, rng) + _normal(F[:, :1], rng))
    if rounding is None:
        return wrong
    beside = at.mixture.scaled(z + BESIDE * z.square().mean(1, keepdim=True).sqrt() * _normal(z, rng))
    return wrong + rounding(beside, at.y)


def _normal(like: Tensor, rng: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=rng, dtype=torch.float64).to(like)
