"""van-trees: how well any attacker who knows what inputs look like can do on average against Gaussian noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor

from unbatch.analysis import Analysis, Bound
from unbatch.errors import UnbatchError
from unbatch.inversion.fisher import Imagined, Information, check_noise, deviation, joined, jumps, premise
from unbatch.inversion.view import View
from unbatch.numerics.bounds.prior import GaussianPrior
from unbatch.numerics.bounds.rate_distortion import level, water_level
from unbatch.numerics.callables import Apply
from unbatch.numerics.linear.inverse_trace import dense_water_trace, inverse_trace, kronecker
from unbatch.numerics.search.least_squares import example_gram
from unbatch.observation import Observation

SURE = 0.975  # with which the sampling error that is taken off suffices
LEAST = 4  # draws: their spread has three degrees of freedom

Trace = Callable[
    [float], tuple[float, float]
]  # by t, below tr f(V), f(v) = v up to t / 4 and about a log beyond; its error


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
        from scipy.stats import t as student

        obs = view.obs
        check_noise(obs)
        n, unknowns = obs.knowledge.batch_size, obs.knowledge.batch_size * math.prod(obs.knowledge.input_shape)
        small = unknowns <= self.exact
        draws = self.draws if small else max(LEAST, self.draws // 4)
        drawn, behind = Imagined.of(obs, at, rng, draws), premise(obs)
        obs = joined(obs)
        if why := jumps(obs, *drawn.batches[0], rng):
            raise UnbatchError(why)
        whole = [Information(obs, x, y) for x, y in drawn.batches]
        matched = math.lgamma(n + 1)
        t, trace = (
            self._formed(obs, whole, drawn.prior, matched)
            if small
            else self._probed(obs, whole, drawn.prior, matched, rng)
        )
        total, error = trace(t)
        off = float(student.ppf(SURE, (draws if small else min(draws, self.probes)) - 1)) * error
        least = total - off - (t * matched / 2 if matched else 0.0)
        if not least > 0:
            raise UnbatchError(
                f"{draws} prior draws differ too much to bound anything, or {n} answers matched to the truth fit it by "
                f"themselves; raise draws={self.draws}."
            )
        unit = drawn.prior.unit
        chance = -10 * math.log10(
            float(drawn.prior.variances.mean()) / unit**2
        )  # of an answer that is the prior's mean
        how = "" if small else f" and {self.probes} random probes"
        words = (
            f"{behind}; {drawn.words}{how} (standard error of the variance {error / total:.1%}, taken off "
            f"{off / max(error, 1e-300):.1f} times); {n} answers, matched to the truth afterwards. The prior alone gives "
            f"{chance:.1f} dB."
        )
        return [Bound.of("van Trees", math.sqrt(least / unknowns) / unit, "any", words, self.paper)]

    def _formed(
        self, obs: Observation, whole: list[Information], prior: GaussianPrior, matched: float
    ) -> tuple[float, Trace]:
        """t, and the trace by matrices: f(v) = v up to t / 4, t / 4 (1 + log(4 v / t)) beyond."""
        n, sigma = obs.knowledge.batch_size, deviation(obs)
        half = prior.variances.to(obs.device).repeat(n).sqrt()
        dense = [_whitened(each.matrix() / sigma**2, prior, n) / torch.outer(half, half) for each in whole]  # V^-1
        spectrum = 1 / torch.linalg.eigvalsh(torch.stack(dense).mean(0))
        t = 4 * water_level(spectrum, matched) if matched else math.inf
        return t, lambda t: dense_water_trace([dense[i::4] for i in range(4)], t / 4)

    def _probed(
        self,
        obs: Observation,
        whole: list[Information],
        prior: GaussianPrior,
        matched: float,
        rng: torch.Generator,
    ) -> tuple[float, Trace]:
        """The same by products: f(v) = v t / (v + t), the inverse of V^-1 + I / t."""
        n, sigma = obs.knowledge.batch_size, deviation(obs)
        like = torch.zeros(n, prior.d, dtype=torch.float64, device=obs.device)
        variances = prior.variances.to(obs.device)
        grams = [example_gram(each.push, like, len(each.sent), rng) for each in whole]
        gram = torch.stack(grams).mean(0) / sigma**2
        spectrum = variances / (1 + torch.linalg.eigvalsh(gram).clamp_min(0)[:, None] * variances)

        def trace(t: float) -> tuple[float, float]:
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
            )
            return found.value, found.error

        return level(spectrum.flatten(), matched), trace


def _whitened(F: Tensor, prior: GaussianPrior, n: int) -> Tensor:
    """I + R^T F R [n d, n d]."""
    half = prior.pull(F.view(-1, n, prior.d)).reshape(len(F), -1)
    found = prior.pull(half.T.reshape(-1, n, prior.d)).reshape(len(F), -1)
    return (found + found.T) / 2 + torch.eye(len(F)).to(F)
