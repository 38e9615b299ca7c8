"""clip: the update shortened to a largest norm."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor

from unbatch.defence import Defence, Round, Step
from unbatch.knowledge import Knowledge
from unbatch.likelihood import Likelihood
from unbatch.protocol import Update


@final
class Clip(Defence):
    """u -> u min(1, norm / |u|), with |u| the l2 norm over all entries of the update.

    Only the length changes, so the examples behind the direction stay as they were.
    """

    paper: ClassVar[str] = "Abadi et al., CCS 2016; McMahan et al., ICLR 2018 (per client)"
    identity: ClassVar[str] = "clip:norm=none"

    norm: Annotated[float | None, Field(gt=0, description="largest l2 norm of the update; none does not clip")] = 1.0

    def wrap(self, step: Step) -> Step:
        def clipped(round_: Round) -> Update:
            update = step(round_)
            size = math.sqrt(sum(float(u.double().square().sum()) for u in update.values()))
            if self.norm is None or size <= self.norm:
                return update
            return {name: u * (self.norm / size) for name, u in update.items()}

        return clipped

    def public(self, known: Knowledge) -> Knowledge:
        """The norm. Noise within is shortened with the update, by a factor that the server does not see."""
        if self.norm is None:
            return known
        if {"noise", "privacy", "altered"} & set(known):
            return known.after(str(self), alone=True).without("noise")
        return known | Knowledge(clip=min(self.norm, known.get("clip", self.norm)))

    def expected(self, clean: Update) -> Update:
        if self.norm is None:
            return clean
        size = torch.stack([u.square().sum() for u in clean.values()]).sum().sqrt()
        factor = torch.where(size > self.norm, self.norm / size.clamp_min(torch.finfo(size.dtype).tiny), 1.0)
        return {name: u * factor for name, u in clean.items()}

    def log_prob(self, seen: Update, clean: Update) -> Tensor | None:
        """-|seen - clipped clean|^2 / 2: the limit of small Gaussian noise, in its own unit. None without a norm."""
        return None if self.norm is None else _squares(seen, self.expected(clean))

    def likelihood(self, inner: Likelihood | None, seen: Update) -> Likelihood | None:
        """The factor is the clean update's own, so it belongs to what is expected; of noise within, which it shortens as
        well, no law is known."""
        if self.norm is None:
            return inner
        if inner is not None and any(inner.spread(seen).values()):
            return None
        within = inner or Likelihood(_squares)
        return replace(within, expected=lambda clean: self.expected(within.expected(clean)))


def _squares(seen: Update, clean: Update) -> Tensor:
    return -torch.stack([(seen[name] - u).double().square().sum() for name, u in clean.items()]).sum() / 2
