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
from unbatch.determined import determined
from unbatch.layer import rule_for
from unbatch.observation import Observation
from unbatch.probe import probe
from unbatch.trunk import RESHAPES


@final
class SecurityMetric(Analysis):
    """c(M) as published, and the share of one image that the gradient determines, for any differentiable model.

    c(M) = sum over convolutions i of round[(D - 1 - i) / (D - 1) (rank [W_i; K_i] - n_i)]: D layers with the dense one, i
    counted from 0 at the input, n_i unknowns. 0: every layer is uniquely solvable; the more negative, the safer. It knows
    convolutions and elementwise layers before the first dense one, and nothing else.

    Determined share = 1 - tr(posterior) / tr(prior covariance), to first order around an example of a Gaussian prior, with
    the whole update known up to its rounding (`unbatch.determined`). 1: all of it; 0: nothing beyond the prior.
    """

    paper: ClassVar[str] = "Chen, Campbell, 2021 (c(M)); van Trees, 1968 (determined share)"

    largest: Annotated[int, Field(gt=0, description="unknowns up to which ranks are measured where counting fails")] = (
        4096
    )
    pixels: Annotated[int, Field(ge=0, description="numbers of an input up to which the share is computed")] = 256

    def run(
        self, obs: Observation, *, at: tuple[Tensor, Tensor] | None = None, rng: torch.Generator | None = None
    ) -> Sequence[Verdict]:
        if "input_shape" not in obs.knowledge:
            raise ValueError("security-metric needs to know input_shape, to run the model once.")
        x, y, whose = probe(obs, at, rng)
        found, refused = list[Verdict](), list[str]()
        for number in (self._published, self._share):
            try:
                found.append(number(obs, x, y, whose))
            except ValueError as error:
                refused.append(str(error))
        if not found:
            raise ValueError(" ".join(refused))
        if refused:
            found[0] = found[0].model_copy(update={"words": f"{found[0].words} {refused[0]}"})
        return found

    def _published(self, obs: Observation, x: Tensor, y: Tensor, whose: str) -> Verdict:
        try:
            links = chain(obs.model, obs.knowledge.input_shape, obs.protocol.mode)
        except ValueError as error:
            raise ValueError(f"c(M) does not know this network: {error}") from error
        dense = next((i for i, link in enumerate(links) if isinstance(link.module, nn.Linear)), len(links))
        names = {link.name for link in links[:dense] if isinstance(link.module, nn.Conv1d | nn.Conv2d)}
        convolutions = constraints(links, x, y, obs.loss, only=names)
        large = [each.link.name for each in convolutions if each.counted is None and each.unknowns > self.largest]
        if large:
            raise ValueError(
                f"c(M): the ranks of {', '.join(large)} cannot be counted, and their unknowns are more than "
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
        return Verdict(name="c(M)", value=float(value), words=words + " (0: none; the more negative, the safer).")

    def _share(self, obs: Observation, x: Tensor, y: Tensor, whose: str) -> Verdict:
        if x.numel() > self.pixels:
            raise ValueError(f"Determined share: an input has {x.numel():,} numbers, more than pixels={self.pixels}.")
        found = determined(
            obs.model,
            obs.loss,
            x,
            y,
            box=obs.knowledge.get("input_range", (0.0, 1.0)),
            mode=obs.protocol.mode,
            eps=torch.finfo(obs.dtype).eps,
            noise=float(obs.knowledge.get("noise", 0.0)),
            sent=obs.update,
        )
        words = (
            f"of one input, by the whole gradient of it alone, to first order around {whose}: an attacker who finds the "
            f"place can expect about {found.psnr:.0f} dB of PSNR (1: all of it; 0: nothing beyond what inputs look like)."
        )
        return Verdict(name="determined share", value=found.share, words=words)


def _counts(link: Link) -> bool:
    """Whether a layer hides nothing that the metric would have to count."""
    rule = rule_for(link.module)
    return isinstance(link.module, RESHAPES) or (rule is not None and rule.name == "activation")
