"""noise-information: how well any attacker can do against Gaussian noise, on any network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor

from unbatch.analysis import Analysis, Bound
from unbatch.inversion.fisher import (
    FEWEST_DRAWS,
    SAMPLING_CONFIDENCE,
    Imagined,
    check_noise,
    deviation,
    doubled,
    joined,
    premise,
    sent,
)
from unbatch.inversion.view import View
from unbatch.numerics.bounds.rate_distortion import distortion
from unbatch.observation import Observation
from unbatch.progress import tick


@final
class NoiseInformation(Analysis):
    """The least error of any attacker, by how much a noisy update can tell of the batch at most.

    A noisy update tells at most sum_t e_t log(1 + v_t / sigma^2) / 2 nats of the batch; from them a least error.

    v_t is the variance over the prior, labels given, of an entry of tensor t, of e_t entries, before its noise: a Gaussian
    of that variance is the reference Q in I(x; u) <= E KL(P(u | x) | Q), whatever the map from x to u. Matching n answers
    to the truth tells up to log n! nats more. The rate-distortion function of the prior turns nats into an error. It holds
    where updates jump (relu), unlike `van-trees`, which is sharper where it holds; at little noise it excludes next to
    nothing.
    """

    paper: ClassVar[str] = "Shannon, 1948 and 1959; Cover and Thomas, Elements of Information Theory, 2006"

    draws: Annotated[int, Field(ge=4, description="batches drawn from the prior")] = 16

    def run(self, view: View, at: tuple[Tensor, Tensor] | None, rng: torch.Generator) -> Sequence[Bound]:
        view.refuse_tokens()
        obs = view.obs
        check_noise(obs)
        n, drawn = obs.knowledge.batch_size, Imagined.of(view, at, rng, self.draws, alike=2)
        behind, obs = premise(obs), joined(obs)
        told = at is not None or "labels" in obs.knowledge
        groups = [drawn.batches] if told else [drawn.batches[k : k + 2] for k in range(0, self.draws - 1, 2)]
        variance, count, draws = self._variance(obs, groups)
        nats = float((count * torch.log1p(variance / deviation(obs) ** 2)).sum()) / 2
        prior = drawn.prior
        value = math.sqrt(distortion(prior.variances, (nats + math.lgamma(n + 1)) / n) / prior.d) / prior.unit
        words = (
            f"At most {nats:.4g} nats behind {behind}; {drawn.words(draws)} (of the variance's sampling error the "
            f"97.5 % quantile added); {n} answers, matched to the truth afterwards."
        )
        return [Bound.of("noise information", value, "any", words, self.paper)]

    def _variance(
        self, obs: Observation, groups: Sequence[Sequence[tuple[Tensor, Tensor]]]
    ) -> tuple[Tensor, Tensor, int]:
        """Of an entry of each tensor [t] about the mean of its group, its sampling error above the estimate; how many
        entries each has; and from how many draws: those that there was time for, and `FEWEST_DRAWS` at least.

        Groups are independent; in one alone the draws nearly are.
        """
        from scipy.stats import t as student

        double = doubled(obs)
        count = [tensor.numel() for tensor in obs.update.values()]

        def clean(x: Tensor, y: Tensor) -> Tensor:
            return sent(double, x, y.double() if y.is_floating_point() else y).detach()

        rows, draws = list[Tensor](), 0
        for group in groups:
            if draws >= FEWEST_DRAWS and not tick(draws / self.draws):
                break
            group, mean = [*group], clean(*group[0])
            for k, batch in enumerate(group[1:], 2):
                if len(groups) == 1 and k > FEWEST_DRAWS and not tick(k / self.draws):
                    del group[k - 1 :]
                    break
                mean = mean + (clean(*batch) - mean) / k
            draws += len(group)
            off = [[p.square().mean() for p in torch.split(clean(*batch) - mean, count)] for batch in group]
            each = torch.stack([torch.stack(row) for row in off]) * len(group) / (len(group) - 1)  # [draws, t]
            rows.append(each if len(groups) == 1 else each.mean(0, keepdim=True))
        found = torch.cat(rows)
        error = found.std(0) / len(found) ** 0.5
        above = float(student.ppf(SAMPLING_CONFIDENCE, len(found) - 1)) * error
        return found.mean(0) + above, torch.tensor(count).to(found), draws
