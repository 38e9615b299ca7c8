"""van-trees: how well any attacker who knows what inputs look like can do on average against Gaussian noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor

from unbatch.analysis import Analysis, Bound
from unbatch.information import Information, deviation, imagined, jumps, obstacle
from unbatch.numerics.inverse_trace import Apply, dense_inverse_trace, inverse_trace, kronecker
from unbatch.numerics.least_squares import example_gram
from unbatch.numerics.prior import GaussianPrior
from unbatch.observation import Observation


@final
class VanTrees(Analysis):
    """E |x^ - x|^2 >= tr (E[J^T J] / sigma^2 + C^-1)^-1 for any attacker, on average over a Gaussian prior of covariance C.

    J is the Jacobian of the update as sent with respect to all inputs of the batch, whose labels count as known. The
    expectation of J^T J is over the prior, estimated from `draws` batches: three quarters of them choose a test, the others
    are put to it, in turn, so that few draws lower the bound and do not raise it; two standard errors are taken off.

    It says nothing where the update jumps as inputs move (relu), and its prior, amplitudes that fall as 1 / frequency, is
    wider than real pictures: an attacker who knows more about the private ones than that may do better.
    """

    paper: ClassVar[str] = (
        "van Trees, Detection, Estimation and Modulation Theory I, 1968; Gill and Levit, Bernoulli 1995"
    )

    draws: Annotated[int, Field(ge=8, description="batches drawn from the prior, a quarter of them beyond `exact`")] = (
        16
    )
    exact: Annotated[int, Field(ge=0, description="unknowns up to which the information matrix is formed")] = 256
    probes: Annotated[int, Field(ge=2, description="random probes of a larger one")] = 4
    steps: Annotated[int, Field(gt=0, description="conjugate-gradient steps for each probe")] = 20

    def obstacle(self, obs: Observation) -> str | None:
        return obstacle(obs)

    def run(
        self, obs: Observation, *, at: tuple[Tensor, Tensor] | None = None, rng: torch.Generator | None = None
    ) -> Sequence[Bound]:
        if why := self.obstacle(obs):
            raise ValueError(why)
        rng, sigma = rng or torch.Generator().manual_seed(0), deviation(obs)
        n, unknowns = obs.knowledge.batch_size, obs.knowledge.batch_size * math.prod(obs.knowledge.input_shape)
        small = unknowns <= self.exact
        draws = self.draws if small else self.draws // 4
        prior, inputs, y = imagined(obs, at, rng, draws)
        if why := jumps(obs, inputs[0], y, rng):
            raise ValueError(why)
        variances = prior.variances.to(obs.device)
        like = torch.zeros(n, prior.d, dtype=torch.float64, device=obs.device)
        whole = [Information(obs, x, y) for x in inputs]

        def told(each: Information) -> Apply:
            return lambda z: z + prior.pull(each.fisher(prior.push(z))) / sigma**2

        if small:
            dense = [_whitened(each.matrix() / sigma**2, prior, n) for each in whole]
            total, error, _ = dense_inverse_trace([dense[i::4] for i in range(4)], variances.repeat(n))
            how = ""
        else:
            grams = [example_gram(each.push, like, len(each.sent), rng) for each in whole]
            solve = kronecker(torch.stack(grams).mean(0) / sigma**2, variances, 1.0)
            found = inverse_trace(
                [[told(each) for each in whole[i::2]] for i in range(2)],
                like,
                rng,
                probes=self.probes,
                push=prior.push,
                pull=prior.pull,
                precondition=solve,
                steps=self.steps,
            )
            total, error, how = found.value, found.error, f" and {self.probes} random probes"
        least = total - 2 * error
        if not least > 0:
            raise ValueError(f"{draws} prior draws differ too much to bound anything; raise draws={self.draws}.")
        value = math.sqrt(least / like.numel()) / prior.unit
        chance = -10 * math.log10(float(variances.mean()) / prior.unit**2)  # of an answer that is the prior's mean
        bound = Bound(name="van Trees", value=value, scope="any", assumptions="", source=self.paper)
        words = (
            f"Gaussian noise of standard deviation {sigma:.3g} in every entry sent, nothing but noise between the batch "
            f"and the update; labels and protocol known to the attacker; on average over {prior}, "
            f"whatever the labels. From {draws} prior draws{how}, without "
            f"the truth (standard error of the variance {error / total:.1%}, taken off twice). In units of the input's "
            f"range; PSNR of any attacker's mean squared error at most {bound.psnr:.1f} dB, of the prior alone "
            f"{chance:.1f} dB."
        )
        return [bound.model_copy(update={"assumptions": words})]


def _whitened(F: Tensor, prior: GaussianPrior, n: int) -> Tensor:
    """I + R^T F R [n d, n d]."""
    half = prior.pull(F.view(-1, n, prior.d)).reshape(len(F), -1)
    found = prior.pull(half.T.reshape(-1, n, prior.d)).reshape(len(F), -1)
    return (found + found.T) / 2 + torch.eye(len(F)).to(F)
