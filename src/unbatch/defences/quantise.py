"""quantise: the update on a grid of few levels."""

from __future__ import annotations

from typing import Annotated, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor

from unbatch.defence import Defence, Round, Step
from unbatch.protocol import Update


@final
class Quantise(Defence):
    """u -> s round(u / s) in every tensor, with s = max|u| / (2^(bits - 1) - 1): a symmetric grid through zero.

    Stochastic rounding goes up with the probability of the fraction, so that the mean is right (and draws differ);
    without it the nearest level is taken.
    """

    paper: ClassVar[str] = "Alistarh et al., QSGD, NeurIPS 2017"
    random: ClassVar[bool] = True
    identity: ClassVar[str] = "quantise:bits=none"

    bits: Annotated[int | None, Field(ge=2, le=16, description="bits an entry, usually 8 or 4; none sends all")] = 8
    stochastic: Annotated[bool, Field(description="unbiased random rounding, else to the nearest level")] = True

    def wrap(self, step: Step) -> Step:
        def quantised(round_: Round) -> Update:
            update = step(round_)
            if self.bits is None:
                return update
            return {name: self._rounded(u, self.bits, round_.rng) for name, u in update.items()}

        return quantised

    def _rounded(self, u: Tensor, bits: int, rng: torch.Generator) -> Tensor:
        top = float(u.abs().max()) if u.numel() else 0.0
        if not top:
            return u
        scale = top / (2 ** (bits - 1) - 1)
        levels: Tensor = u.double() / scale
        if self.stochastic:
            levels = levels + torch.rand(u.shape, generator=rng, dtype=torch.float64).to(u.device)
        whole = levels.floor() if self.stochastic else levels.round()
        sent: Tensor = whole * scale
        return sent.to(u)
