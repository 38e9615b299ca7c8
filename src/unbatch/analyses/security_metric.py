"""security-metric: a number for how much of an image a network keeps to itself, before anyone trains it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor

from unbatch.analysis import Analysis, Verdict
from unbatch.errors import NotApplicable, UnbatchError
from unbatch.inversion.backward.c_metric import solvability
from unbatch.inversion.determined_share import share, work
from unbatch.inversion.probe import probe
from unbatch.inversion.view import View
from unbatch.network.chain import chain
from unbatch.observation import Observation


@final
class SecurityMetric(Analysis):
    """How much of one example this network's gradient determines, before anyone attacks it.

    c(M) as published, and the share of one image that the gradient determines, for any differentiable model.

    c(M) = sum over convolutions i of round[(D - 1 - i) / (D - 1) (rank [W_i; K_i] - n_i)]: D layers with the dense one, i
    counted from 0 at the input, n_i unknowns. 0: every layer is uniquely solvable; the more negative, the safer. W_i goes
    through what follows before the activation. It knows convolutions and elementwise layers before the first dense one:
    with another layer with parameters there, or max pooling before an activation, it is not said.

    Determined share = 1 - tr(posterior) / tr(prior covariance), to first order around an example of a Gaussian prior, with
    the whole update known up to its rounding. 1: all of it; 0: nothing beyond the prior. It takes a product with the
    Jacobian for each unknown: fewer, at random, cannot tell what they leave open.
    """

    paper: ClassVar[str] = "Chen, Campbell, 2021 (c(M)); van Trees, 1968 (determined share)"

    largest: Annotated[int, Field(gt=0, description="unknowns up to which ranks are measured where counting fails")] = (
        4096
    )
    work: Annotated[float, Field(ge=0, description="operations up to which the share is computed")] = 3e11

    def run(self, view: View, at: tuple[Tensor, Tensor] | None, rng: torch.Generator) -> Sequence[Verdict]:
        obs = view.obs
        if "input_shape" not in obs.knowledge:
            raise NotApplicable("input_shape must be known, to run the model once.")
        x, y, whose = probe(obs, at, rng)
        found, refused = list[Verdict](), list[str]()
        for number in (self._published, self._share):
            try:
                found.append(number(obs, x, y, whose))
            except ValueError as error:
                refused.append(str(error))
        if not found:
            raise UnbatchError(" ".join(refused))
        if refused:
            found[0] = found[0].model_copy(update={"words": f"{found[0].words} {refused[0]}"})
        return found

    def _published(self, obs: Observation, x: Tensor, y: Tensor, whose: str) -> Verdict:
        try:
            links = chain(obs.model, obs.knowledge.input_shape, obs.protocol.mode)
        except ValueError as error:
            raise UnbatchError(f"c(M) does not know this network: {error}") from error
        value, words = solvability(links, x, y, obs.loss, most=self.largest)
        return Verdict(name="c(M)", value=float(value), words=f"{words} (0: none; the more negative, the safer).")

    def _share(self, obs: Observation, x: Tensor, y: Tensor, whose: str) -> Verdict:
        needed = work(obs.model, obs.loss, x, y)
        if needed > self.work:
            raise UnbatchError(
                f"The determined share takes about {needed:.1e} operations, more than work={self.work:.1e}: a product with "
                f"the Jacobian for each of {x.numel():,} unknowns."
            )
        found = share(obs, x, y)
        words = (
            f"of one input, by the whole gradient of it alone, to first order around {whose}: an attacker who finds the "
            f"place can expect about {found.psnr:.0f} dB of PSNR (1: all of it; 0: nothing beyond what inputs look like)."
        )
        return Verdict(name="determined share", value=found.share, words=words)
