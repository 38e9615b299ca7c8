"""van-trees: how well any attacker who knows what inputs look like can do on average against Gaussian noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor

from unbatch.analysis import Analysis, Bound
from unbatch.errors import NotApplicable
from unbatch.inversion.fisher import (
    FEWEST_DRAWS,
    SAMPLING_CONFIDENCE,
    Imagined,
    Information,
    check_noise,
    deviation,
    joined,
    jumps,
    premise,
)
from unbatch.inversion.view import View
from unbatch.numerics.bounds.prior import GaussianPrior
from unbatch.numerics.bounds.rate_distortion import level, water_level
from unbatch.numerics.callables import Apply
from unbatch.numerics.linear.inverse_trace import dense_water_trace, inverse_trace, kronecker
from unbatch.numerics.search.least_squares import example_gram
from unbatch.observation import Observation
from unbatch.progress import tick, tick_or_leave


@final
class VanTrees(Analysis):
    """The least error of any attacker who knows what inputs look like, where noise of known size was added.

    E |x^ - x|^2 >= tr V, V = (E[J^T J] / sigma^2 + C^-1)^-1, for any attacker, over a Gaussian prior of covariance C.

    J is the Jacobian of the update as sent with respect to all inputs of the batch, whose labels count as known. Where the
    answers are matched to the truth afterwards, that tells up to log n! nats more: E |x^ - x|^2 >= the rate-distortion
    function of V's eigenvalues there (Efroimovich), beyond `exact` a trace below it. The expectation is over the prior,
    estimated from `draws` batches: three quarters of them choose a test, the others are put to it, in turn, so that few
    draws lower the bound and do not raise it; of the sampling error that is left the 97.5 % quantile is taken off.

    It says nothing where the update jumps as inputs move (relu), and its prior, amplitudes that fall as 1 / frequency, is
    wider than real pictures: an attacker who knows more about the private ones than that may do better.
    """

    paper: ClassVar[str] = (
        "van Trees, Detection, Estimation and Modulation Theory I, 1968; Efroimovich, Problems Inform. Transm. 1980; Gill "
        "and Levit, Bernoulli 1995"
    )

    draws: Annotated[int, Field(ge=8, description="batches drawn from the prior, a quarter of them beyond `exact`")] = (
        16
    )
    exact: Annotated[int, Field(ge=0, description="unknowns up to which the information matrix is formed")] = 256
    probes: Annotated[int, Field(ge=2, description="random probes of a larger one")] = 4
    steps: Annotated[int, Field(gt=0, description="conjugate-gradient steps for each probe")] = 20

    def run(self, view: View, at: tuple[Tensor, Tensor] | None, rng: torch.Generator) -> Sequence[Bound]:
        view.refuse_tokens()
        obs = view.obs
        check_noise(obs)
        n, unknowns = obs.knowledge.batch_size, obs.knowledge.batch_size * math.prod(obs.knowledge.input_shape)
        small = unknowns <= self.exact
        draws = self.draws if small else max(FEWEST_DRAWS, self.draws // 4)
        drawn, behind = Imagined.of(view, at, rng, draws), premise(obs)
        obs = joined(obs)
        if why := jumps(obs, *drawn.batches[0], rng):
            raise NotApplicable(why)
        prior, matched = drawn.prior, math.lgamma(n + 1)
        found = (self._formed if small else self._probed)(obs, drawn, matched, rng)
        least = found.total - found.off - (found.t * matched / 2 if matched else 0.0)
        if not least > 0:
            raise NotApplicable(
                f"{found.draws} prior draws differ too much to bound anything, or {n} answers matched to the truth fit it "
                f"by themselves; raise draws={self.draws}."
            )
        chance = -10 * math.log10(
            float(prior.variances.mean()) / prior.unit**2
        )  # of an answer that is the prior's mean
        how = f" and {found.probes} random probes" if found.probes else ""
        words = (
            f"{behind}; {drawn.words(found.draws)}{how} (standard error of the variance {found.error / found.total:.1%}, "
            f"taken off {found.off / max(found.error, 1e-300):.1f} times); {n} answers, matched to the truth afterwards. "
            f"The prior alone gives {chance:.1f} dB."
        )
        return [Bound.of("van Trees", math.sqrt(least / unknowns) / prior.unit, "any", words, self.paper)]

    def _formed(self, obs: Observation, drawn: Imagined, matched: float, rng: torch.Generator) -> _Trace:
        """By matrices: f(v) = v up to t / 4, t / 4 (1 + log(4 v / t)) beyond."""
        prior, n, sigma = drawn.prior, obs.knowledge.batch_size, deviation(obs)
        half = prior.variances.to(obs.device).repeat(n).sqrt()
        dense = list[Tensor]()  # V^-1
        for k, (x, y) in enumerate(drawn.batches):
            if k >= FEWEST_DRAWS and not tick(k / len(drawn.batches)):
                break
            try:
                F = Information(obs, x, y).matrix()
            except NotApplicable:  # cut short in the middle of one
                if k < FEWEST_DRAWS:
                    raise
                break
            dense.append(_whitened(F / sigma**2, prior, n) / torch.outer(half, half))
        spectrum = 1 / torch.linalg.eigvalsh(torch.stack(dense).mean(0))
        t = 4 * water_level(spectrum, matched) if matched else math.inf
        total, error = dense_water_trace([dense[i::4] for i in range(4)], t / 4)
        return _Trace(t, total, error, len(dense))

    def _probed(self, obs: Observation, drawn: Imagined, matched: float, rng: torch.Generator) -> _Trace:
        """By products: f(v) = v t / (v + t), the inverse of V^-1 + I / t."""
        prior, n, sigma = drawn.prior, obs.knowledge.batch_size, deviation(obs)
        like = torch.zeros(n, prior.d, dtype=torch.float64, device=obs.device)
        variances = prior.variances.to(obs.device)
        whole, grams = list[Information](), list[Tensor]()
        for k, (x, y) in enumerate(drawn.batches):
            if k >= FEWEST_DRAWS and not tick(k / len(drawn.batches)):
                break
            whole.append(Information(obs, x, y))
            grams.append(example_gram(whole[-1].push, like, len(whole[-1].sent), rng))
        gram = torch.stack(grams).mean(0) / sigma**2
        spectrum = variances / (1 + torch.linalg.eigvalsh(gram).clamp_min(0)[:, None] * variances)
        t = level(spectrum.flatten(), matched)
        tick_or_leave(0.0, "any random probe was answered")

        def told(each: Information) -> Apply:
            return lambda z: z + variances * z / t + prior.pull(each.fisher(prior.push(z))) / sigma**2

        found = inverse_trace(
            [[told(each) for each in whole[i::2]] for i in range(2)],
            like,
            rng,
            probes=self.probes,
            push=prior.push,
            pull=prior.pull,
            precondition=kronecker(gram + torch.eye(n).to(gram) / t, variances, 1.0),
            steps=self.steps,
            tick=tick,
        )
        return _Trace(t, found.value, found.error, len(whole), found.probes)


@dataclass(frozen=True)
class _Trace:
    """Below tr f(V), f(v) = v up to t / 4 and about a log beyond."""

    t: float
    total: float
    error: float  # its standard error
    draws: int
    probes: int = 0  # random ones; 0 where matrices are formed

    @property
    def off(self) -> float:
        """What is taken off for the sampling error."""
        from scipy.stats import t as student

        freedom = (min(self.draws, self.probes) if self.probes else self.draws) - 1
        return float(student.ppf(SAMPLING_CONFIDENCE, freedom)) * self.error


def _whitened(F: Tensor, prior: GaussianPrior, n: int) -> Tensor:
    """I + R^T F R [n d, n d]."""
    half = prior.pull(F.view(-1, n, prior.d)).reshape(len(F), -1)
    found = prior.pull(half.T.reshape(-1, n, prior.d)).reshape(len(F), -1)
    return (found + found.T) / 2 + torch.eye(len(F)).to(F)
