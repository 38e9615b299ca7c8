"""dp-reconstruction: what differential privacy leaves of one example for any attacker."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor

from unbatch.analysis import Analysis, Bound, Verdict
from unbatch.errors import NotApplicable
from unbatch.inversion.fisher import statistics, uncounted
from unbatch.inversion.view import View
from unbatch.knowledge import Knowledge, shares
from unbatch.numerics.bounds.prior import GaussianPrior
from unbatch.numerics.bounds.rate_distortion import distortion, guessing_radius
from unbatch.numerics.bounds.subsampled_gaussian import Robustness, information, replacement_divergence
from unbatch.observation import Observation

CHANCES = (0.5, 0.1, 1e-2, 1e-4, 1e-8, 1e-16, 1e-32, 1e-64, 1e-128)


@final
class DpReconstruction(Analysis):
    """The least error of any attacker that differentially private training (DP-SGD) leaves him.

    Bounds on the reconstruction of examples from DP-SGD: noise z times the clipping norm, rate q, T steps.

    - information (any attacker): the releases tell at most T KL(q) nats of each example, T / (2 z^2) = rho at q = 1, and
      matching n answers to the truth log n! of all n; the rate-distortion function of a Gaussian prior turns them into an
      error. Sharp about rho = d.
    - robustness (any attacker): an event of chance n k has probability at most Phi(Phi^-1(n k) + sqrt(T) / z) at q = 1, by
      Monte Carlo below; the error follows from the radius that no one guess reaches with a chance above k.
    - Renyi (unbiased attackers): mean squared error >= range^2 / (4 (exp(eps) - 1)), eps the divergence of order 2 between
      releases with one example and with another.

    Each is told twice: of this update, or these of several rounds, whose examples are in it for sure (q = 1, its own
    steps), and of the whole training, where nobody knows which steps drew the example. Of a released model there is the
    latter alone. All hold even where all other
    examples are known, and assume that the client does what `privacy` says.
    """

    paper: ClassVar[str] = (
        "Bun and Steinke, TCC 2016; Guo, Karrer, Chaudhuri and van der Maaten, ICML 2022; Hayes, Mahloujifar and Balle, "
        "NeurIPS 2023"
    )

    sees: ClassVar[frozenset[str]] = frozenset({"update", "release"})

    candidates: Annotated[
        int, Field(ge=2, description="examples, one of them private, among which success is told")
    ] = 100

    def run(self, view: View, at: tuple[Tensor, Tensor] | None, rng: torch.Generator) -> Sequence[Bound | Verdict]:
        view.refuse_tokens()
        obs, known = view.obs, view.knowledge
        _check(obs)
        privacy = known.privacy
        z, q, steps = privacy.noise_multiplier, privacy.sampling_rate, privacy.steps
        rounds = len(obs.exchanges)
        own = rounds * max(1, *(obs.protocol.steps(size) for size in shares(known.batch_size, known.get("clients", 1))))
        these = "this update" if rounds == 1 else f"these {rounds} updates"
        if own > steps:
            raise NotApplicable(
                f"{these} take{'s' * (rounds == 1)} {own} private steps, and {steps} are declared: nothing accounts for it."
            )
        told = f"noise multiplier {z:g}; all other examples known"
        once = f"{these} of {own} private step{'s' * (own > 1)}, known to hold the example; {told}"
        sampled = f", each step's examples a secret Poisson sample at rate {q:g}" if q < 1 else ""
        always = f"the whole training of {steps} steps as declared{sampled}; {told}"
        robustness = Robustness(z, q, steps, rng)
        one_round = [] if obs.released else [(information(z, 1.0, own), Robustness(z, 1.0, own))]
        bounds = [
            *(bound for each in one_round for bound in self._sure(known, *each, once, ", this update")),
            *(
                bound.model_copy(update={"covers": "training"})
                for bound in self._sure(known, information(z, q, steps), robustness, always, "")
            ),
        ]
        eps = replacement_divergence(z, q, steps)
        least = 0.5 / math.sqrt(math.expm1(eps)) if eps < 700 else math.exp(-eps / 2) / 2
        words = f"Order-2 Renyi divergence {eps:.4g} (replacing one example); {always}."
        renyi = Bound.of("Renyi", least, "unbiased", words, "Guo et al. 2022")
        reached, spread = robustness.success(-math.log(self.candidates))
        error = f" (Monte Carlo error {spread:.2g})" if spread else ""
        words = (
            f"probability with which an attacker can at most tell the private example among {self.candidates} equally "
            f"likely ones{error}; chance is {1 / self.candidates:g}; {always}."
        )
        success = Verdict(name="reconstruction success", value=reached, words=words)
        return [*bounds, renyi.model_copy(update={"covers": "training"}), success]

    def _sure(self, known: Knowledge, nats: float, robustness: Robustness, how: str, which: str) -> Sequence[Bound]:
        """From nats, and from the largest radius that counts."""
        prior, n = GaussianPrior(known.input_shape), int(known.batch_size)
        average = (
            f"{how}; on average over a Gaussian prior, without the truth; {n} answers, matched to the truth afterwards"
        )
        value = math.sqrt(distortion(prior.variances, nats + math.lgamma(n + 1) / n) / prior.d)
        words = f"At most {nats:.4g} nats an example from {average}."
        found = [Bound.of(f"zCDP information{which}", value, "any", words, "Bun and Steinke 2016")]
        best, where, error = 0.0, CHANCES[0], 0.0
        for chance in CHANCES:
            reached, spread = robustness.success(min(0.0, math.log(n * chance)))
            radius = guessing_radius(prior.variances, math.log(chance))
            value = math.sqrt(max(1 - reached - 3 * spread, 0.0) / prior.d) * radius
            if value > best:
                best, where, error = value, chance, spread
        if best:
            drawn = f" (Monte Carlo error {error:.2g} thrice on the safe side)" if error else ""
            words = f"At a chance of {where:g} an answer{drawn}; {average}."
            found.append(Bound.of(f"reconstruction robustness{which}", best, "any", words, "Hayes et al. 2023"))
        return found


def _check(obs: Observation) -> None:
    """Raise NotApplicable unless what the protocol declares is differential privacy of all that is sent."""
    known = obs.knowledge
    if "privacy" not in known:
        raise NotApplicable(
            "no differential privacy is known of this update: clipping, noise multiplier, rate and steps."
        )
    if not known.privacy.noise_multiplier > 0:
        raise NotApplicable("the noise multiplier is 0: clipping without noise is no differential privacy.")
    missing = [name for name in ("input_shape", "batch_size") if name not in known]
    if missing:
        raise NotApplicable(f"{' and '.join(missing)} must be known, for the prior and the answers to be matched.")
    if why := uncounted(obs):
        raise NotApplicable(why)
    if known.get("buffers") or statistics(obs):
        raise NotApplicable("batch norm statistics are sent without noise, and nothing bounds what they tell.")
    if "mixup" in known:
        raise NotApplicable(
            "mixup puts every example into two gradients, each clipped by itself: the noise covers one of them."
        )
