"""noise-information: how well any attacker can do against Gaussian noise, on any network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor

from unbatch.analysis import Analysis, Bound
from unbatch.information import deviation, doubled, imagined, obstacle, sent
from unbatch.numerics.rate_distortion import distortion
from unbatch.observation import Observation


@final
class NoiseInformation(Analysis):
    """A noisy update tells at most sum_t e_t log(1 + v_t / sigma^2) / 2 nats of the batch; from them a least error.

    v_t is the variance over the prior of an entry of tensor t, of e_t entries, before its noise: a Gaussian of that
    variance is the reference Q in I(x; u) <= E KL(P(u | x) | Q), whatever the map from x to u. The rate-distortion function
    of the prior turns nats into an error. It holds where updates jump (relu), unlike `van-trees`, which is sharper where
    it holds; at little noise it excludes next to nothing.
    """

    paper: ClassVar[str] = "Shannon, 1948 and 1959; Cover and Thomas, Elements of Information Theory, 2006"

    draws: Annotated[int, Field(ge=4, description="batches drawn from the prior")] = 16

    def obstacle(self, obs: Observation) -> str | None:
        return obstacle(obs)

    def run(
        self, obs: Observation, *, at: tuple[Tensor, Tensor] | None = None, rng: torch.Generator | None = None
    ) -> Sequence[Bound]:
        if why := self.obstacle(obs):
            raise ValueError(why)
        sigma = deviation(obs)
        prior, inputs, y = imagined(obs, at, rng or torch.Generator().manual_seed(0), self.draws)
        variance, count = self._variance(obs, inputs, y)
        nats = float((count * torch.log1p(variance / sigma**2)).sum()) / 2
        value = math.sqrt(distortion(prior.variances, nats / len(y)) / prior.d) / prior.unit
        bound = Bound(name="noise information", value=value, scope="any", assumptions="", source=self.paper)
        words = (
            f"at most {nats:.4g} nats behind Gaussian noise of standard deviation {sigma:.3g} in every entry sent, nothing "
            f"but noise between the batch and the update; on average over {prior}, whatever the labels, which count as "
            f"known. From {self.draws} prior draws, without the truth (two standard errors of the variance added). In "
            f"units of the input's range; PSNR of any attacker's mean squared error at most {bound.psnr:.1f} dB."
        )
        return [bound.model_copy(update={"assumptions": words})]

    def _variance(self, obs: Observation, inputs: Sequence[Tensor], y: Tensor) -> tuple[Tensor, Tensor]:
        """Of an entry of each tensor [t], two standard errors above its estimate, and how many entries each has."""
        double, y = doubled(obs), y.double() if y.is_floating_point() else y
        count = [tensor.numel() for tensor in obs.update.values()]

        def clean(x: Tensor) -> Tensor:
            return sent(double, x, y).detach()

        mean = clean(inputs[0])
        for k, x in enumerate(inputs[1:], 2):
            mean = mean + (clean(x) - mean) / k
        each = torch.stack(
            [torch.stack([p.square().mean() for p in torch.split(clean(x) - mean, count)]) for x in inputs]
        )
        each = each * len(inputs) / (len(inputs) - 1)  # [draws, t]
        return each.mean(0) + 2 * each.std(0) / len(inputs) ** 0.5, torch.tensor(count).to(each)
