"""security-metric: a number for how much of an image a network keeps to itself, before anyone trains it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor

from unbatch.analysis import Analysis, Verdict
from unbatch.errors import NotApplicable
from unbatch.inversion.backward.c_metric import solvability
from unbatch.inversion.backward.rank_count import EACH_LAYER, RANKED_UNKNOWNS, constraints
from unbatch.inversion.descent.forecast import prospects
from unbatch.inversion.determined_share import SHARE_NAME, share, work
from unbatch.inversion.probe import probe
from unbatch.inversion.view import View
from unbatch.progress import tick


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

    formerly: ClassVar[dict[str, str]] = {"largest": "exact"}

    exact: Annotated[
        int, Field(gt=0, description="unknowns up to which a matrix is formed, to measure ranks where counting fails")
    ] = RANKED_UNKNOWNS
    work: Annotated[float, Field(ge=0, description="operations up to which the share is computed")] = 3e11

    def run(self, view: View, at: tuple[Tensor, Tensor] | None, rng: torch.Generator) -> Sequence[Verdict]:
        view.refuse_tokens()
        x, y, whose = probe(view, at, rng)
        found, refused = list[Verdict](), list[str]()
        for k, number in enumerate((self._published, self._share)):
            tick(k / 2)
            try:
                found.append(number(view, x, y, whose))
            except NotApplicable as why:
                refused.append(str(why))
        if not found:
            raise NotApplicable(" ".join(refused))
        more = [*refused[:1], *_apart(view, at, rng)]
        if more:
            found[0] = found[0].model_copy(update={"words": " ".join([found[0].words, *more])})
        return found

    def _published(self, view: View, x: Tensor, y: Tensor, whose: str) -> Verdict:
        try:
            links = view.links
        except NotApplicable as why:
            raise NotApplicable(f"c(M) does not know this network: {why}") from why
        value, words = solvability(
            links,
            x,
            y,
            view.loss,
            most=self.exact,
            read=lambda: view.once(EACH_LAYER, (x, y), lambda: constraints(links, x, y, view.loss)),
        )
        return Verdict(name="c(M)", value=float(value), words=f"{words} (0: none; the more negative, the safer).")

    def _share(self, view: View, x: Tensor, y: Tensor, whose: str) -> Verdict:
        needed = work(view.model, view.loss, x, y)
        if needed > self.work:
            raise NotApplicable(
                f"The determined share takes about {needed:.1e} operations, more than work={self.work:.1e}: a product with "
                f"the Jacobian for each of {x.numel():,} unknowns."
            )
        try:
            found = view.once(SHARE_NAME, (x, y), lambda: share(view.obs, x, y))
        except NotApplicable as why:
            raise NotApplicable(f"The determined share was {why}") from why
        words = (
            f"of one input, by the whole gradient of it alone, to first order around {whose}: an attacker who finds the "
            f"place can expect about {found.psnr:.0f} dB of PSNR (1: all of it; 0: nothing beyond what inputs look like)."
        )
        return Verdict(name="determined share", value=found.share, words=words)


def _apart(view: View, at: tuple[Tensor, Tensor] | None, rng: torch.Generator) -> list[str]:
    """That a network is not safe for a number of its first layers, where an inner one tells a batch apart."""
    try:
        found = prospects(view, at, rng)
    except NotApplicable:
        return []
    layer = found.forecast(found.readable).at if found.readable else None
    if layer is None:
        return []
    return [
        f"It does not know the way by an inner layer: by counting, a batch of up to {found.readable:,} can be told apart "
        f"at {layer.name!r}, with equations enough below it (separable-layer)."
    ]
