"""security-metric: a number for how much of an image a network keeps to itself, before anyone trains it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor, nn

from unbatch.analysis import Analysis, Verdict
from unbatch.chain import Link, chain
from unbatch.constraints import c_of, constraints
from unbatch.layer import rule_for
from unbatch.observation import Observation
from unbatch.probe import probe
from unbatch.trunk import RESHAPES


@final
class SecurityMetric(Analysis):
    """c(M) = sum over convolutions i of round[(D - 1 - i) / (D - 1) (rank [W_i; K_i] - n_i)].

    D layers with the dense one, i counted from 0 at the input, n_i unknowns. 0: every layer is uniquely solvable; the more
    negative, the safer. For one image and networks of convolutions and elementwise layers before the first dense one, which
    is all that the published metric knows.
    """

    paper: ClassVar[str] = "Chen, Campbell, 2021 (c(M))"

    largest: Annotated[int, Field(gt=0, description="unknowns up to which ranks are measured where counting fails")] = (
        4096
    )

    def run(
        self, obs: Observation, *, at: tuple[Tensor, Tensor] | None = None, rng: torch.Generator | None = None
    ) -> Sequence[Verdict]:
        if "input_shape" not in obs.knowledge:
            raise ValueError("security-metric needs to know input_shape, to run the model once.")
        links = chain(obs.model, obs.knowledge.input_shape, obs.protocol.mode)
        x, y, _ = probe(obs, at, rng)
        dense = next((i for i, link in enumerate(links) if isinstance(link.module, nn.Linear)), len(links))
        names = {link.name for link in links[:dense] if isinstance(link.module, nn.Conv1d | nn.Conv2d)}
        convolutions = [each for each in constraints(links, x, y, obs.loss) if each.link.name in names]
        large = [each.link.name for each in convolutions if each.counted is None and each.unknowns > self.largest]
        if large:
            raise ValueError(
                f"the ranks of {', '.join(large)} cannot be counted, and their unknowns are more than "
                f"largest={self.largest} to measure."
            )
        value = c_of([(each.unknowns, each.both) for each in convolutions])
        open_ = sum(each.deficit for each in convolutions)
        words = f"{open_:,} unknowns in all are left open, weighed by their depth"
        if value == 0:
            words = "every convolution is uniquely solvable: none protects one image"
        if not convolutions:
            words = "no convolution lies before the first dense layer, which gives one example away"
        other = [link.name for link in links[:dense] if link.name not in names and not _counts(link)]
        if other:
            words += f"; what {', '.join(other)} may hide is not counted"
        return [Verdict(name="c(M)", value=float(value), words=words + " (0: none; the more negative, the safer).")]


def _counts(link: Link) -> bool:
    """Whether a layer hides nothing that the metric would have to count."""
    rule = rule_for(link.module)
    return isinstance(link.module, RESHAPES) or (rule is not None and rule.name == "activation")
