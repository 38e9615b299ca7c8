"""clip: the update shortened to a largest norm."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor

from unbatch.defence import Defence, Step
from unbatch.knowledge import Knowledge
from unbatch.likelihood import Likelihood
from unbatch.protocol import Update, shortened


@final
class Clip(Defence):
    """Shortens an update that is longer than `norm`, and changes nothing else of it.

    u -> u min(1, norm / |u|), with |u| the l2 norm over all entries of the update.

    Only the length changes, so the examples behind the direction stay as they were.

    >>> import torch, unbatch
    >>> unbatch.defences.Clip(norm=1.0).expected({"weight": torch.tensor([3.0, 4.0])})
    {'weight': tensor([0.6000, 0.8000])}
    """

    paper: ClassVar[str] = "Abadi et al., CCS 2016; McMahan et al., ICLR 2018 (per client)"
    identity: ClassVar[str] = "clip:norm=none"

    norm: Annotated[float | None, Field(gt=0, description="largest l2 norm of the update; none does not clip")] = 1.0

    def wrap(self, step: Step) -> Step:
        return lambda round_: self.expected(step(round_))

    def public(self, known: Knowledge) -> Knowledge:
        """The norm. Noise within is shortened with the update, by a factor that the server does not see."""
        if self.norm is None:
            return known
        if {"noise", "privacy", "altered"} & set(known):
            return known.after(str(self), alone=True).without("noise")
        return known | Knowledge(clip=min(self.norm, known.get("clip", self.norm)))

    def expected(self, clean: Update) -> Update:
        return clean if self.norm is None else shortened(clean, self.norm)

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
