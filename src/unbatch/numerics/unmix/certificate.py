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

from unbatch.numerics.bounds.first_order import ERROR_SIGMAS, LARGEST_RADIUS
from unbatch.numerics.unmix.equation import NOISE_SLACK, Equation
from unbatch.numerics.unmix.linearisation import Linearisation
from unbatch.numerics.unmix.mixture import MOST_CLASSES, Mixture
from unbatch.numerics.unmix.part import NO_DIRECTION, KnownPart

DeltaRounding = Callable[[Tensor, Tensor], Tensor]  # z [f, n], y -> errors of their deltas [f, m]

ERROR_DRAWS = 6  # of an error with many degrees of freedom, of which draws x n coordinates measure the spread
WEAK_DRAWS = 40  # of one with perhaps a single direction: six draws would miss its spread by six once in a thousand
BESIDE_DISTANCE = 1e-4  # relative distance at which rounding is another draw of the same law
NONLINEAR_CHANGE = 0.05  # relative change of F over the radius above which first order is not relied on


def mixture_radius(
    mixture: Mixture,
    z: Tensor,
    y: Tensor,
    rng: torch.Generator,
    *,
    rounding: DeltaRounding | None = None,
    jointly: bool = False,
) -> Tensor:
    """How far off the examples that were found can be, at most.

    Largest |z_i - z_i*| [f], l2 in R^d, of accepted examples z [f, n]; inf where first order does not reach.

    Assumes that the gradient is an honest one of n independent examples, of which z_i is near one: candidates are to
    have passed `accept`. Each is judged by its own equation, which takes a smooth F and a tenth of the time that all
    together take; `jointly` where none is determined alone (where some of the n are missing, those found are judged by
    their dual vectors and outputs, and are open unless two fewer are missing than there are classes). inf as
    well where an example has as many unknowns as equations, 2 n >= m: nothing then speaks against a wrong one; and where
    neither a bias nor a known weight of the examples fixes the size of what is found together.

    >>> from unbatch.numerics.unmix.made import made_mixture
    >>> mixture, z, y = made_mixture(4)
    >>> rng = torch.Generator().manual_seed(0)
    >>> bool((mixture_radius(mixture, z, y, rng) < 1e-6).all())
    True
    >>> mixture_radius(mixture, mixture.scaled(z + 1), y, rng)  # no examples: nothing is claimed
    tensor([inf, inf, inf, inf], dtype=torch.float64)
    """
    if not len(z) or 2 * mixture.n >= len(mixture.U):
        return z.new_full((len(z),), torch.inf)
    if not mixture.weighed and mixture.ones is None and (jointly or mixture.n == 1):
        return z.new_full((len(z),), torch.inf)
    way = _alone if not jointly and mixture.n > 1 else _jointly if len(z) == mixture.n else _in_part
    found = way(mixture, z, y, rng, rounding)
    turned = 2 * (mixture.outside or mixture.noise) * (z / mixture.S).norm(dim=1)  # the row space's own: |Delta^+ E|
    found = found + turned
    moved = z + found[:, None] * torch.nn.functional.normalize(_gaussian(z, rng), dim=1)
    F = mixture.F(z, y)
    bend = (mixture.F(moved, y) - F).norm(dim=1) / (F.norm(dim=1) + 1e-300)
    near = (bend < NONLINEAR_CHANGE) & (found < LARGEST_RADIUS * z.norm(dim=1))  # false for NaN too
    return torch.where(near, found, torch.inf)


def _jointly(mixture: Mixture, z: Tensor, y: Tensor, rng: torch.Generator, rounding: DeltaRounding | None) -> Tensor:
    """All examples of a mixture, which are to agree with their outputs as far as the law says: `_believed`."""
    at = Linearisation(mixture, z, y)
    n, scale, outputs, duals = mixture.n, _spread(mixture), _of_outputs(at), mixture.dual(at.F)

    def response(E: Tensor) -> tuple[Tensor, Tensor]:
        """By how much each example moves [n], and what of its delta then disagrees with its outputs [n]; squares."""
        v = at.solve(E, damping=1e-12, inner=1000, tolerance=1e-4)  # weak directions come last
        left = duals @ (E - at.push(v)).T  # [n, m]
        return v[:, :n].square().sum(1), (outputs @ left[:, :, None]).square().sum((1, 2))

    spread, law = z.new_zeros(len(z)), z.new_zeros(len(z))
    for _ in range(ERROR_DRAWS):
        E = scale * _gaussian(mixture.U, rng) + _wrong(mixture, z, y, at.F, rng, rounding).T @ z
        moved, disagreement = response(E)
        spread += moved / ERROR_DRAWS
        law += disagreement / ERROR_DRAWS
    moved, disagreement = response(at.left())
    found = ERROR_SIGMAS * _believed(disagreement, law) * spread.sqrt() + 2 * moved.sqrt()
    return found.masked_fill(at.left_open(), torch.inf)


def _of_outputs(at: Linearisation) -> Tensor:
    """Orthonormal directions [n, k + 1, m], or zeros, in which each delta moves with its residual and its outputs.

    An update of another loss, or at other rates, disagrees there, where the noise of all entries has a small share.
    """
    rng = torch.Generator().manual_seed(0)
    k = min(at.mixture.targets, MOST_CLASSES)  # of more a sample
    turn = torch.randn(k, at.mixture.n, generator=rng, dtype=torch.float64).to(at.z) @ at.mixture.W
    moved = torch.stack([at.F, *(at.bent(w.expand_as(at.F)) for w in turn)], 1)
    _, S, rows = torch.linalg.svd(torch.nn.functional.normalize(moved, dim=2), full_matrices=False)
    found: Tensor = rows * (S > NO_DIRECTION * S[:, :1])[:, :, None]
    return found


def _believed(seen: Tensor, law: Tensor) -> Tensor:
    """How many times as large as its law says the error is, by what disagrees, `seen` [f], and what may, both squared.

    inf beyond ERROR_SIGMAS times: an update with such an error is none of these examples'.
    """
    times = (seen / (law + 1e-300)).sqrt().clamp_min(1)
    return times.masked_fill(times > ERROR_SIGMAS, torch.inf)


def _in_part(mixture: Mixture, z: Tensor, y: Tensor, rng: torch.Generator, rounding: DeltaRounding | None) -> Tensor:
    """Some examples of a piecewise linear network, whose errors have few directions: the weakest of their outputs.

    What must agree disagrees by no more than the law says: `_believed`. And what the equations say that ask for no size of
    a delta, whatever factor each was sent with, is no further off than the bound.
    """
    part = KnownPart(mixture, z, y)
    outer, spread, law = _spread(mixture) * part.q.norm(dim=1, keepdim=True), z.new_zeros(len(z)), z.new_zeros(len(z))
    for _ in range(WEAK_DRAWS):
        wrong = part.wrong(outer * _gaussian(part.F, rng) + _wrong(mixture, z, y, part.F, rng, rounding))
        moved, disagreement = part.solve(*wrong)
        spread += moved.square().sum(1) / WEAK_DRAWS
        law += disagreement.square() / WEAK_DRAWS
    times = _believed(part.solve(*part.seen())[1].square(), law)
    found = ERROR_SIGMAS * times * spread.sqrt() + 2 * part.solve(*part.seen(), sized=False)[0].norm(dim=1)
    return torch.where(part.determined, found, torch.inf)


def _alone(mixture: Mixture, z: Tensor, y: Tensor, rng: torch.Generator, rounding: DeltaRounding | None) -> Tensor:
    """Each example by its own equation ((I - U U^T) F / |F|, q . z - 1) = 0, whose error is E q and that of F.

    What no move of the example takes from the equation is to be no more than the law leaves: `_believed`.
    """
    equation, F = Equation(mixture, z, y), mixture.sent(z, y)
    size, U = F.norm(dim=1, keepdim=True) + 1e-300, mixture.U
    outer = _spread(mixture) * mixture.dual(F).norm(dim=1, keepdim=True)
    draws = torch.stack(
        [outer * _gaussian(F, rng) + _wrong(mixture, z, y, F, rng, rounding) for _ in range(ERROR_DRAWS)], 1
    )
    inside = draws @ U  # [f, draws, n]
    last = ((inside / mixture.S) * z[:, None]).sum(2, keepdim=True) * mixture.weighed
    seen = torch.cat([(draws - inside @ U.T) / size[:, None], last], 2)  # as the equation sees the errors
    found, begin = [], equation.start()
    for which in torch.split(torch.arange(len(z), device=z.device), equation.chunk()):
        r, Jt = equation.linearise(begin[which], which)
        Q, R = torch.linalg.qr(Jt.mT)  # [q, m + 1, p]
        right = torch.cat([seen[which], r[:, None]], 1).mT
        met = Q.mT @ right
        moved = torch.linalg.solve_triangular(R, met, upper=True)[:, : equation.steps]
        off = moved.square().sum(1)  # [q, draws + 1]
        left = (right.square().sum(1) - met.square().sum(1)).clamp_min(0)  # of what no move takes
        times = _believed(left[:, ERROR_DRAWS], left[:, :ERROR_DRAWS].mean(1))
        found.append(ERROR_SIGMAS * times * off[:, :ERROR_DRAWS].mean(1).sqrt() + 2 * off[:, ERROR_DRAWS].sqrt())
    return torch.cat(found)


def _spread(mixture: Mixture) -> float:
    """Standard deviation of the error of an entry of A, at most: m of them add up to its spectral norm."""
    return (mixture.outside or mixture.noise) / math.sqrt(len(mixture.U))


def _wrong(
    mixture: Mixture, z: Tensor, y: Tensor, F: Tensor, rng: torch.Generator, rounding: DeltaRounding | None
) -> Tensor:
    """A draw of the errors of the deltas F [f, m].

    Precision can put a preactivation on the other side of a kink. Where that is rare it makes one entry wrong by all it
    is, more than `accept` allows, so it is no part of the law; where precision is coarse it is as common as rounding.
    """
    wrong: Tensor = mixture.rounding * F * (_gaussian(F, rng) + _gaussian(F[:, :1], rng))
    if rounding is None:
        return wrong
    beside = mixture.scaled(z + BESIDE_DISTANCE * z.square().mean(1, keepdim=True).sqrt() * _gaussian(z, rng))
    flaws, size = rounding(beside, y), F.norm(dim=1, keepdim=True)
    if not mixture.weighed:
        flaws = flaws * size / (mixture.F(z, y).norm(dim=1, keepdim=True) + 1e-300)
    most = NOISE_SLACK * (mixture.noise * mixture.dual(F).norm(dim=1, keepdim=True) + mixture.rounding * size)
    return wrong + flaws.masked_fill(flaws.abs() > most, 0.0)


def _gaussian(like: Tensor, rng: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=rng, dtype=torch.float64).to(like)
