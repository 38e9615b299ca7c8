"""Refine: the inputs that make the updates likeliest under what is known of the defence, and how far off they can be."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from unbatch.errors import NotApplicable
from unbatch.knowledge import Knowledge
from unbatch.likelihood import Likelihood
from unbatch.network.precision import in_double
from unbatch.numerics.bounds.first_order import ERROR_SIGMAS, LARGEST_RADIUS
from unbatch.numerics.search.least_squares import (
    Cost,
    PointResidual,
    System,
    conjugate_gradients,
    example_gram,
    minimise_by_products,
    squares,
)
from unbatch.observation import Observation
from unbatch.progress import tick
from unbatch.protocol import Update

UPDATE_DRAWS = 4  # of the update's error, which show how far it moves the inputs
SUM_ROUNDINGS = 4  # relative error of a sum over a batch, in units of rounding
# Relative error of computing an update again in float64, in roundings: convolutions are sums of many terms.
ARITHMETIC_ROUNDINGS = 100
LOST_SHARE = 0.05  # share of a random direction that the seen entries may fail to give back
UNEXPLAINED_SPREAD = 1.25  # times the draws' own size that may be left unexplained: their spread is known
UNEXPLAINED_ROUNDING = 2.0  # the same of rounding's


class BatchLikelihood:
    """The model's updates as a function of a whole batch's inputs [n, d] in float64, under what is known of the defence.

    Over all rounds that are known, one after the other: N = T e entries for T rounds of e, whose log-likelihoods add up.
    """

    def __init__(self, obs: Observation, labels: Tensor) -> None:
        law = Likelihood.of(obs.knowledge)
        if law is None:
            raise NotApplicable(
                "nothing is known of the defence's noise: tell `log_prob`, or `noise` without clipping."
            )
        known, self.law = obs.knowledge, law
        if "buffers" in known:
            known = known | Knowledge(buffers={k: _double(b) for k, b in known.buffers.items()})
        self.rounds = replace(obs, model=in_double(obs.model), knowledge=known).exchanges
        self.updates = [{name: tensor.double() for name, tensor in one.update.items()} for one in self.rounds]
        self.labels, self.shape = _double(labels.to(obs.device)), obs.knowledge.input_shape
        eps = SUM_ROUNDINGS * torch.finfo(obs.dtype).eps + ARITHMETIC_ROUNDINGS * torch.finfo(torch.float64).eps
        errors, allowed = list[Update](), list[Update]()
        for seen in self.updates:
            spread, rms = law.spread(seen), {k: float(t.square().mean().sqrt()) for k, t in seen.items()}
            filled = partial(_filled, seen)
            errors.append(filled({k: math.hypot(spread[k], eps * rms[k]) for k in seen}))
            allowed.append(
                filled(
                    {k: math.hypot(UNEXPLAINED_SPREAD * spread[k], UNEXPLAINED_ROUNDING * eps * rms[k]) for k in seen}
                )
            )
        self.seen, self.errors, self.allowed = self.flat(self.updates), self.flat(errors), self.flat(allowed)
        self.bend = self.cost(self.seen)[2]
        self.weights = self.bend / self.bend.max() if bool(self.bend.any()) else torch.ones_like(self.bend)
        self.told = (self.weights > 0) & (self.errors > 0)

    def __call__(self, point: Tensor, /, *, create_graph: bool = False) -> Tensor:
        """What is expected of the updates of inputs [n, d], flat [N]; computed once for rounds at the same parameters."""
        inputs = point.reshape(len(point), *self.shape)
        made = dict[nn.Module, Update]()
        for one in self.rounds:
            if one.model not in made:
                clean = one.simulate(inputs, self.labels, create_graph=create_graph)
                made[one.model] = self.law.expected(clean)
        return self.flat([made[one.model] for one in self.rounds])

    def off(self, point: Tensor, /, *, create_graph: bool = False) -> Tensor:
        """How far that is from what was seen, in units of an entry's spread; 0 where nothing was seen."""
        off = (self(point, create_graph=create_graph) - self.seen) / self.errors.clamp_min(1e-300)
        return torch.where(self.told, off, 0.0)

    def even(self, point: Tensor) -> bool:
        """Whether the likelihood is as curved at inputs [n, d] as at what was seen: it is that of Gaussian noise."""
        return torch.allclose(self.cost(self(point).detach())[2], self.bend, rtol=1e-3)

    def explains(self, point: Tensor) -> bool:
        """Whether inputs [n, d] explain what was seen to within what its errors allow."""
        off = self.seen - self(point).detach()
        return bool(off.isfinite().all()) and bool(
            (self.weights * off.square()).sum() <= (self.weights * self.allowed.square()).sum()
        )

    def flat(self, updates: Sequence[Update]) -> Tensor:
        """Updates of all rounds as one vector [N], parameter after parameter."""
        found: Tensor = torch.cat([update[name].flatten() for update in updates for name in self.updates[0]])
        return found

    def cost(self, flat: Tensor) -> tuple[float, Tensor, Tensor]:
        """2 (log p(seen | seen) - log p(seen | this)), and its derivative, halved, and curvature."""
        values, slopes, bends = list[float](), list[Update](), list[Update]()
        for seen, own in zip(self.updates, flat.chunk(len(self.updates)), strict=True):
            parts = torch.split(own, [t.numel() for t in seen.values()])
            at = {name: part.view_as(t) for part, (name, t) in zip(parts, seen.items(), strict=True)}
            value, slope, bend = self.law.slope(seen, at)
            values, slopes, bends = [*values, float(value)], [*slopes, slope], [*bends, bend]
        return sum(values), self.flat(slopes), self.flat(bends)

    def alike(self, off: Tensor, unknowns: int) -> Tensor:
        """L [T, T], L L^T >= the correlation of errors between rounds, as far as the residuals `off` [N] of a fit show it.

        Fresh draws have none. Rounding that saw almost the same update twice erred in the same way, and counts once. A fit
        of p unknowns takes p / T of each round's entries out of the residuals' products: they are put back. Correlations
        are not taken to be negative, and are made a covariance by leaving out negative eigenvalues, which only adds to it.
        """
        T = len(self.rounds)
        z = torch.where(self.told, off / self.errors.clamp_min(1e-300), 0.0).view(T, -1)
        power = float(z.square().sum()) / max(int(self.told.sum()) - unknowns, 1)
        gram = z @ z.T + power * unknowns / T
        size = gram.diagonal().clamp_min(1e-300).sqrt()
        values, V = torch.linalg.eigh((gram / torch.outer(size, size)).clamp(0.0, 1.0))
        mixed: Tensor = V * values.clamp_min(0.0).sqrt()
        return mixed


def refine(obs: Observation, inputs: Tensor, labels: Tensor, rng: torch.Generator, *, steps: int = 20) -> Tensor:
    """`inputs` [n, *shape], all of the batch, moved to where the updates are likeliest; as they are, if they are already.

    Levenberg-Marquardt with the likelihood's own curvature; where that is not the same everywhere, as under rounding, whose
    law is flat within and steep beyond a level, after least squares in units of the spread. Under small Gaussian noise it
    meets the Cramer-Rao bound.
    """
    search, best = BatchLikelihood(obs, labels), inputs.to(obs.device).double().flatten(1)
    stages: list[tuple[PointResidual, Cost]] = [(search, search.cost)]
    for residual, cost_of in stages if search.even(best) else [(search.off, squares), *stages]:
        found = minimise_by_products(
            residual, best, rng, steps=steps, inner=60, damping=1e-3, tolerance=1e-3, gain=1e-6, cost_of=cost_of
        )
        for _, point in found:
            best = point
            if not tick(0.0):
                return best.reshape(inputs.shape)
    return best.reshape(inputs.shape)


def batch_radius(obs: Observation, inputs: Tensor, labels: Tensor, rng: torch.Generator) -> Tensor:
    """Largest |x_i - x_i*| / |x_i| [n], l2, of a whole batch near the true one; inf where first order does not reach.

    The least-squares response (J^T D J)^-1 J^T D e to the updates' error e, D the likelihood's curvature and e drawn from
    its spread and the updates' rounding, `ERROR_SIGMAS` times, and twice the Newton step that is left. inf as well where
    the seen entries do not give back a random direction, or are not explained to within what their errors allow.
    """
    search, x = BatchLikelihood(obs, labels), inputs.to(obs.device).double().flatten(1)
    nothing = torch.full((len(x),), torch.inf, dtype=torch.float64)
    if not search.explains(x):
        return nothing
    D, here = search.weights, search(x).detach()
    off = search.seen - here
    system = System(search, x)
    gram = example_gram(system.push, x, len(off), rng, D)
    shift = 1e-10 * float(gram.diagonal().mean())
    inverse = torch.linalg.inv(gram + max(shift, 1e-300) * torch.eye(len(x)).to(gram))

    def response(e: Tensor) -> Tensor:
        moved = torch.zeros_like(x)
        apply = partial(system.damped, shift, D)
        for moved in conjugate_gradients(apply, system.pull(D * e), inverse.matmul, 400, 1e-4):  # noqa: B007
            if not tick(0.0):
                break
        return moved

    def draw(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=rng, dtype=torch.float64).to(like)

    mixed = search.alike(off, x.numel())

    def error() -> Tensor:
        fresh = draw(off).view(len(mixed), -1)
        return search.errors * (mixed @ fresh).flatten()

    probe = draw(x)
    lost = (response(system.push(probe)) - probe).norm(dim=1) / probe.norm(dim=1)
    moves = torch.stack([response(error()) for _ in range(UPDATE_DRAWS)])  # [UPDATE_DRAWS, n, d]
    left = response(off)
    if not tick(0.0):  # stopped: no response is whole
        return nothing
    found = ERROR_SIGMAS * moves.square().sum(2).mean(0).sqrt() + 2 * left.norm(dim=1)
    found = found + 4 * torch.finfo(torch.float64).eps * x.norm(dim=1)
    far = found[:, None] * torch.nn.functional.normalize(moves[0] + left, dim=1)
    straight = system.push(far)
    bent = float((search(x + far).detach() - here - straight).norm() / straight.norm().clamp_min(1e-300))
    relative = found / x.norm(dim=1).clamp_min(1e-300)
    sure = (lost < LOST_SHARE) & (relative < LARGEST_RADIUS) & (bent < 2 * LOST_SHARE)
    return torch.where(sure, relative, torch.inf).cpu()


def _filled(like: Update, values: Mapping[str, float]) -> dict[str, Tensor]:
    return {name: torch.full_like(tensor, values[name]) for name, tensor in like.items()}


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor
