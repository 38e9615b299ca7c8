"""dp-reconstruction: what differential privacy leaves of one example for any attacker."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor

from unbatch.analysis import Analysis, Bound, Verdict
from unbatch.numerics.prior import GaussianPrior
from unbatch.numerics.rate_distortion import distortion, guessing_radius
from unbatch.numerics.subsampled_gaussian import Robustness, information, replacement_divergence
from unbatch.observation import Observation

CHANCES = (0.5, 0.1, 1e-2, 1e-4, 1e-8, 1e-16, 1e-32, 1e-64, 1e-128)


@final
class DpReconstruction(Analysis):
    """Bounds on the reconstruction of one example from DP-SGD: noise z times the clipping norm, rate q, T steps.

    - information (any attacker): the releases tell at most T KL(q) nats of an example, T / (2 z^2) = rho at q = 1; the
      rate-distortion function of a Gaussian prior turns them into an error. Sharp about rho = d.
    - robustness (any attacker): an event of chance k has probability at most Phi(Phi^-1(k) + sqrt(T) / z) at q = 1, by
      Monte Carlo below; the error follows from the radius that no guess reaches with that chance.
    - Renyi (unbiased attackers): mean squared error >= range^2 / (4 (exp(eps) - 1)), eps the divergence of order 2 between
      releases with one example and with another.

    All hold for one example when all others are known, and assume that the client does what `privacy` says.
    """

    paper: ClassVar[str] = (
        "Bun and Steinke, TCC 2016; Guo, Karrer, Chaudhuri and van der Maaten, ICML 2022; Hayes, Mahloujifar and Balle, "
        "NeurIPS 2023"
    )

    candidates: Annotated[
        int, Field(ge=2, description="examples, one of them private, among which success is told")
    ] = 100

    def obstacle(self, obs: Observation) -> str | None:
        privacy = obs.knowledge.get("privacy")
        if privacy is None:
            return "no differential privacy is known of this update: clipping, noise multiplier, rate and steps."
        if not privacy.noise_multiplier > 0:
            return "the noise multiplier is 0: clipping without noise is no differential privacy."
        if "input_shape" not in obs.knowledge:
            return "input_shape must be known, for the prior."
        return None

    def run(
        self, obs: Observation, *, at: tuple[Tensor, Tensor] | None = None, rng: torch.Generator | None = None
    ) -> Sequence[Bound | Verdict]:
        if why := self.obstacle(obs):
            raise ValueError(why)
        privacy, rng = obs.knowledge.privacy, rng or torch.Generator().manual_seed(0)
        z, q, steps = privacy.noise_multiplier, privacy.sampling_rate, privacy.steps
        prior = GaussianPrior(obs.knowledge.input_shape)
        nats = information(z, q, steps)
        how = f"noise multiplier {z:g}, sampling rate {q:g}, {steps} steps as declared"
        if q < 1:
            how += ", which examples a step takes secret"
        average = f"{how}; all other examples known; on average over a Gaussian prior, without the truth"
        known = math.sqrt(distortion(prior.variances, nats) / prior.d)
        bounds = [
            _bound("zCDP information", known, "any", f"at most {nats:.4g} nats; {average}", "Bun and Steinke 2016")
        ]
        robustness = Robustness(z, q, steps, rng)
        best, where, error = 0.0, CHANCES[0], 0.0
        for chance in CHANCES:
            reached, spread = robustness.success(math.log(chance))
            radius = guessing_radius(prior.variances, math.log(chance))
            value = math.sqrt(max(1 - reached - 3 * spread, 0.0) / prior.d) * radius
            if value > best:
                best, where, error = value, chance, spread
        if best:
            drawn = f", Monte Carlo error {error:.2g} thrice on the safe side" if error else ""
            words = f"at a chance of {where:g}{drawn}; {average}"
            bounds.append(_bound("reconstruction robustness", best, "any", words, "Hayes et al. 2023"))
        eps = replacement_divergence(z, q, steps)
        least = 0.5 / math.sqrt(math.expm1(eps)) if eps < 700 else math.exp(-eps / 2) / 2
        words = f"order-2 Renyi divergence {eps:.4g} (replacing one example); {how}; all other examples known"
        bounds.append(_bound("Renyi", least, "unbiased", words, "Guo et al. 2022"))
        reached, spread = robustness.success(-math.log(self.candidates))
        told = f" (Monte Carlo error {spread:.2g})" if spread else ""
        words = (
            f"probability with which an attacker can at most tell the private example among {self.candidates} equally "
            f"likely ones{told}; chance is {1 / self.candidates:g}; {how}."
        )
        return [*bounds, Verdict(name="reconstruction success", value=reached, words=words)]


def _bound(name: str, value: float, scope: str, words: str, source: str) -> Bound:
    found = Bound.model_validate({"name": name, "value": value, "scope": scope, "assumptions": words, "source": source})
    last = f"in units of the input's range; PSNR of the mean squared error at most {found.psnr:.1f} dB."
    return found.model_copy(update={"assumptions": f"{words}; {last}"})
