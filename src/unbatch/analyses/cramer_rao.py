"""cramer-rao: how well an unbiased attacker can do at most against Gaussian noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor

from unbatch.analysis import Analysis, Bound
from unbatch.domain import Images
from unbatch.errors import NotApplicable
from unbatch.inversion.fisher import Information, check_noise, deviation, fitted, joined, jumps, premise
from unbatch.inversion.probe import probe
from unbatch.inversion.view import View
from unbatch.numerics.linear.inverse_diagonal import InverseDiagonal, dense_inverse_diagonal, inverse_diagonal
from unbatch.numerics.linear.inverse_trace import kronecker
from unbatch.numerics.search.least_squares import example_gram
from unbatch.progress import tick, tick_or_leave

FORMED_UNKNOWNS, CHEAPLY_FORMED_UNKNOWNS = 512, 4096  # unknowns up to which the matrix is formed, the latter within
CHEAP_PRODUCTS = 2**26  # unknowns times entries: about ten seconds of one core
LARGEST_GREY = 0.75  # of white, the largest standard deviation in a picture where some entries have none


@final
class CramerRao(Analysis):
    """The least error of any unbiased attacker, where noise of known size was added.

    Covariance of every unbiased attacker's answer >= sigma^2 (J^T J)^-1, J the Jacobian of the update as sent.

    J is with respect to all entries of all inputs of the batch; labels count as known, which only helps the attacker. The
    value is the root mean square over all entries, infinite where the update does not determine them all; for pictures the
    standard deviation of every pixel comes as a picture, white where nothing determines it. Up to `exact` unknowns J^T J is
    formed; beyond, the diagonal of its inverse is estimated from random probes and conjugate gradients, with the standard
    error of the value and of an entry; too few steps only lower it. It does not hold for attackers who know what inputs
    look like (see `van-trees`), and not where the update jumps as inputs move (relu). The information of several rounds
    adds up, at the parameters that each had: T rounds at the same ones divide the variance by T.
    """

    paper: ClassVar[str] = "Rao, 1945; Cramer, 1946"

    exact: Annotated[
        int | None,
        Field(ge=0, description="unknowns up to which the matrix is formed; none: 512, or 4,096 for a small update"),
    ] = None
    probes: Annotated[int, Field(ge=2, description="random probes of a larger one")] = 8
    steps: Annotated[int, Field(gt=0, description="conjugate-gradient steps for each probe")] = 60

    def run(self, view: View, at: tuple[Tensor, Tensor] | None, rng: torch.Generator) -> Sequence[Bound]:
        view.refuse_tokens()
        obs = view.obs
        check_noise(obs, follows=True)
        x, y, whose = probe(view, at, rng, whole=True)
        if at is not None:
            fitted(obs, x, y)
        if why := jumps(obs, x, y, rng):
            raise NotApplicable(why)
        tick_or_leave(0.0, "the information was looked at")
        told = joined(obs)
        info, sigma = Information(told, x, y), deviation(told)
        low, high = obs.knowledge.get("input_range", (0.0, 1.0))
        unknowns, entries = x.numel(), len(info.sent)
        found, how = self._inverse(info, rng)
        variance = (sigma / (high - low)) ** 2 * found.diagonal.view(len(x), -1)
        mean = (sigma / (high - low)) ** 2 * found.total / unknowns
        words = f"{premise(obs)}. At {whose}, {how}."
        if entries < unknowns or found.lost:
            mean, determined = math.inf, variance[variance.isfinite()]
            if len(determined):
                rest = -10 * math.log10(max(float(determined.mean()), 1e-300))
                words += f" The {len(determined):,} entries that it does determine: {rest:.1f} dB."
        elif len(x) > 1:
            each = (-10 * variance.mean(1).clamp_min(1e-300).log10()).sort().values
            words += f" Example by example {each[0]:.1f} to {each[-1]:.1f} dB."
        bound = Bound.of("Cramer-Rao", math.sqrt(max(mean, 0.0)), "unbiased", words, self.paper)
        error = found.spread / (2 * found.total) * bound.value if math.isfinite(mean) and found.total > 0 else 0.0
        return [bound.model_copy(update={"picture": _map(variance, tuple(x.shape[1:])), "error": error})]

    def _inverse(self, at: Information, rng: torch.Generator) -> tuple[InverseDiagonal, str]:
        """diag (J^T J)^-1 [n, d], and how it was computed, in words."""
        like, entries = at.x.detach().flatten(1), len(at.sent)
        unknowns = like.numel()
        most = CHEAPLY_FORMED_UNKNOWNS if unknowns * entries <= CHEAP_PRODUCTS else FORMED_UNKNOWNS
        none = "no unbiased attacker exists"
        few = f"{entries:,} entries are sent for {unknowns:,} unknowns, and {none}" if entries < unknowns else ""
        if unknowns <= (most if self.exact is None else self.exact):
            found = dense_inverse_diagonal(at.matrix(), at.push)
            lost = f"the update does not determine {found.lost} of the {unknowns:,} unknowns: {none}"
            return found, few or (lost if found.lost else "exact")
        solve = kronecker(example_gram(at.push, like, entries, rng), torch.ones(1).to(like), 0.0)
        start = solve(torch.eye(len(like)).to(like)).diagonal()[:, None].expand_as(like)
        found = inverse_diagonal(
            at.fisher, like, rng, probes=self.probes, precondition=solve, start=start, steps=self.steps, tick=tick
        )
        if found.lost:
            moved = int(found.diagonal.isinf().sum())
            lost = f"the update leaves {moved:,} of the {unknowns:,} unknowns open (about {found.lost:,} directions)"
            return found, few or f"{lost}: {none}"
        one = float((found.error / found.diagonal.abs().clamp_min(1e-300)).median())
        how = f"from {found.probes} random probes (standard error of the variance {found.spread / found.total:.1%}, of "
        how += f"one entry's {one:.0%} in the median)"
        if found.open:
            how += (
                f"; {self.steps} conjugate-gradient steps leave {found.open:.2%} of a random direction open, and what "
                "hides there makes the least variance larger"
            )
        return found, few or how


def _map(variance: Tensor, shape: tuple[int, ...]) -> str:
    """The least standard deviation of every pixel, examples side by side; white where nothing determines it."""
    if len(shape) != 3 or shape[0] not in (1, 3):
        return ""
    pixels = torch.cat(list(variance.clamp_min(0).sqrt().view(-1, *shape)[:8]), 2)
    finite = pixels[pixels.isfinite()]
    top = float(finite.max()) if len(finite) else 0.0
    high = top if len(finite) == pixels.numel() else top / LARGEST_GREY
    return Images(shape=tuple(pixels.shape), low=0.0, high=high or 1.0).render(
        pixels.nan_to_num(posinf=2 * high or 1.0)
    )
