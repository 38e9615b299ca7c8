"""quantise: the update on a grid of few levels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from unbatch.defence import Defence, Round, Step
from unbatch.knowledge import Knowledge
from unbatch.protocol import Update

# Parts of a level, over one of which the likelihood's edges are rounded, so that searches see them from afar.
BLUR = 6.0


@final
class Quantise(Defence):
    """Rounds every entry of the update to a grid of few bits.

    u -> s round(u / s) in every tensor, with s = max|u| / (2^(bits - 1) - 1): a symmetric grid through zero.

    Stochastic rounding goes up with the probability of the fraction, so that the mean is right (and draws differ);
    without it the nearest level is taken.

    >>> import torch, unbatch
    >>> model, loss = torch.nn.Linear(2, 2), torch.nn.functional.cross_entropy
    >>> x, y = torch.ones(4, 2), torch.tensor([0, 1, 1, 0])
    >>> seen, truth = unbatch.observe(model, loss, x, y, defences="quantise:bits=2")
    >>> len(seen.update["weight"].unique()) <= 3, seen.knowledge.altered
    (True, 'quantise:bits=2,stochastic=true')
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

    def public(self, known: Knowledge) -> Knowledge:
        return known if self.bits is None else known.after(str(self), alone=True)

    def log_prob(self, seen: Update, clean: Update) -> Tensor | None:
        """log P(clean + e is rounded to seen), entry by entry, with e logistic and of scale s / BLUR.

        To the nearest level P is 1 within s / 2 of seen; at random it is 1 - |clean - seen| / s within s. The server reads
        s off the largest entry, which is always a level of its own. None without rounding.
        """
        if self.bits is None:
            return None
        found = []
        for name, u in clean.items():
            step = self._step(seen[name], self.bits)
            off = (u - seen[name]).double() * (BLUR / step if step else 1.0)
            law = _triangle(off) if self.stochastic else logsigmoid(BLUR / 2 + off) + logsigmoid(BLUR / 2 - off)
            found.append(law.sum() if step else -off.square().sum())
        return torch.stack(found).sum()

    def spread(self, seen: Update) -> Mapping[str, float]:
        """s / sqrt(12), or s / sqrt(6) where rounding is random: over values that fall anywhere between two levels."""
        part = (6 if self.stochastic else 12) ** -0.5
        return {name: part * self._step(u, self.bits) if self.bits else 0.0 for name, u in seen.items()}

    @staticmethod
    def _step(u: Tensor, bits: int) -> float:
        return float(u.abs().max()) / (2 ** (bits - 1) - 1) if u.numel() else 0.0

    def _rounded(self, u: Tensor, bits: int, rng: torch.Generator) -> Tensor:
        scale = self._step(u, bits)
        if not scale:
            return u
        levels: Tensor = u.double() / scale
        if self.stochastic:
            levels = levels + torch.rand(u.shape, generator=rng, dtype=torch.float64).to(u.device)
        whole = levels.floor() if self.stochastic else levels.round()
        sent: Tensor = whole * scale
        return sent.to(u)


def _triangle(off: Tensor) -> Tensor:
    """log of softplus(x + b) - 2 softplus(x) + softplus(x - b), b = BLUR: a triangle blurred, up to a constant."""
    x = -off.abs()
    near = softplus(x + BLUR) - 2 * softplus(x) + softplus(x - BLUR)
    far = x + 2 * math.log(2 * math.sinh(BLUR / 2))  # where all three are exponentials
    return torch.where(x > -30, near.clamp_min(1e-300).log(), far)
