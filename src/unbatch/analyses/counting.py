"""counting: whether the update is large enough to hold the inputs at all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, final

import torch
from torch import Tensor

from unbatch.analysis import Analysis, Bound, Verdict
from unbatch.errors import NotApplicable
from unbatch.inversion.fisher import statistics, uncounted
from unbatch.inversion.view import View
from unbatch.numerics.bounds.prior import GaussianPrior
from unbatch.numerics.bounds.rate_distortion import distortion
from unbatch.observation import Observation

EIGHT_BIT_ROUNDING = 1 / (255 * math.sqrt(12))  # of the range: the rounding of 8-bit inputs
SAMPLED_ENTRIES = 4096  # entries by which a tensor of few distinct values is told


@final
class Counting(Analysis):
    """The least error of any attacker, by the bits that the update is written in.

    The bits that an update is written in, and its numbers that are not zero, against the inputs of the batch.

    All updates of several rounds are one message.

    A message of B bits tells at most B bits: any attacker's mean squared error, on average over a Gaussian prior, is at
    least the prior's distortion at (B + log2 n!) / n bits an example (its rate-distortion function; log2 n! for matching n
    answers to the truth). A tensor of few distinct values (pruned, quantised) is counted at their empirical entropy and a
    table of them. To first order, e numbers determine at most e unknowns.
    """

    paper: ClassVar[str] = "Shannon, 1959 (rate distortion)"

    def run(self, view: View, at: tuple[Tensor, Tensor] | None, rng: torch.Generator) -> Sequence[Bound | Verdict]:
        view.refuse_tokens()
        obs = view.obs
        if why := uncounted(obs):
            raise NotApplicable(why)
        missing = [name for name in ("input_shape", "batch_size") if name not in obs.knowledge]
        if missing:
            raise NotApplicable(f"{' and '.join(missing)} must be known, to count unknowns.")
        found = list[Bound | Verdict]()
        bits, numbers, unknowns, n = _bits(obs), _numbers(obs), _unknowns(obs), obs.knowledge.batch_size
        value = _error(obs, bits)
        if value < EIGHT_BIT_ROUNDING and numbers >= unknowns:
            raise NotApplicable("the update has numbers and bits enough to hold its inputs to 8 bits an entry.")
        if value >= EIGHT_BIT_ROUNDING:
            words = (
                f"{bits:,.0f} bits for {unknowns:,} unknowns: this update's entries at their entropy, others like it no "
                f"longer; on average over inputs of a Gaussian prior, without the truth; {n} answers, matched to the truth "
                "afterwards."
            )
            found.append(Bound.of("counting", value, "any", words, self.paper))
        if numbers < unknowns:
            words = (
                f"{numbers:,} numbers that are not zero were sent for {unknowns:,} unknowns: to first order at least "
                f"{unknowns - numbers:,} of them stay open."
            )
            found.append(Verdict(name="numbers sent for each unknown", value=numbers / unknowns, words=words))
        return found


def _unknowns(obs: Observation) -> int:
    return int(obs.knowledge.batch_size) * math.prod(obs.knowledge.input_shape)


def _numbers(obs: Observation) -> int:
    return sum(int(tensor.count_nonzero()) for tensor in _sent(obs))


def _sent(obs: Observation) -> list[Tensor]:
    """Every tensor of the message: the updates' of all rounds, and batch norm statistics."""
    updates = [tensor for one in obs.exchanges for tensor in one.update.values()]
    held = [*obs.knowledge.get("buffers", {}).values(), *statistics(obs)]
    return [*updates, *(b for b in held if b.is_floating_point())]


def _error(obs: Observation, bits: float) -> float:
    """Root mean squared error an entry, of the range."""
    prior = GaussianPrior(obs.knowledge.input_shape)
    n = int(obs.knowledge.batch_size)
    return math.sqrt(distortion(prior.variances, (bits * math.log(2) + math.lgamma(n + 1)) / n) / prior.d)


def _bits(obs: Observation) -> float:
    """Length of a code for the update, in bits."""
    whole = 0.0
    for tensor in _sent(obs):
        values = tensor.detach().flatten()
        width = torch.finfo(tensor.dtype).bits
        plain = float(width * len(values))
        sample = values[:: -(-len(values) // SAMPLED_ENTRIES)]
        if len(torch.unique(sample)) <= len(sample) / 2:
            counts = torch.unique(values, return_counts=True)[1].double()
            share = counts / counts.sum()
            table = len(counts) * (width + math.log2(len(values) + 1))  # each value, and how often it stands
            plain = min(plain, float(-(counts * share.log2()).sum()) + table + 1)
        whole += plain
    return whole
