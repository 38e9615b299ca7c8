"""noise: Gaussian noise on every entry of the update."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor

from unbatch.defence import Defence, Round, Step
from unbatch.knowledge import Knowledge
from unbatch.protocol import Update


@final
class Noise(Defence):
    """Adds normal noise to every entry of the update.

    u -> u + s z, z standard normal in every entry; s = sigma, or sigma rms(u) where `relative`.

    rms is over all entries of the update. The absolute sigma is part of the protocol and made known.

    >>> import torch, unbatch
    >>> model, loss = torch.nn.Linear(2, 2), torch.nn.functional.cross_entropy
    >>> x, y = torch.ones(4, 2), torch.tensor([0, 1, 1, 0])
    >>> seen, truth = unbatch.observe(model, loss, x, y, defences="noise:sigma=0.1")
    >>> seen.knowledge.noise
    0.1
    """

    paper: ClassVar[str] = "Abadi et al., CCS 2016; Zhu, Liu and Han, NeurIPS 2019 (against inversion)"
    random: ClassVar[bool] = True
    identity: ClassVar[str] = "noise:sigma=0"

    sigma: Annotated[float, Field(ge=0, allow_inf_nan=False, description="standard deviation of every entry")] = 0.01
    relative: Annotated[bool, Field(description="sigma in units of the update's root mean square")] = False

    @property
    def adds_noise(self) -> bool:
        """Also where its size is relative, and not told."""
        return self.sigma > 0

    def wrap(self, step: Step) -> Step:
        def noised(round_: Round) -> Update:
            update = step(round_)
            if not self.sigma:
                return update
            s = float(self._deviation(update))
            return {
                name: u + s * torch.randn(u.shape, generator=round_.rng, dtype=torch.float64).to(u)
                for name, u in update.items()
            }

        return noised

    def public(self, known: Knowledge) -> Knowledge:
        if not self.sigma:
            return known
        if self.relative:  # the server does not know the update's size, so not the whole noise either
            return known.after(str(self), alone=True).without("noise")
        return known | Knowledge(noise=math.hypot(known.get("noise", 0.0), self.sigma))

    def log_prob(self, seen: Update, clean: Update) -> Tensor | None:
        """-|seen - clean|^2 / (2 s^2) - N log s over the N entries; None without noise."""
        if not self.sigma:
            return None
        s = self._deviation(clean)
        off = torch.stack([(seen[name] - u).double().square().sum() for name, u in clean.items()]).sum()
        return -off / (2 * s.square()) - sum(u.numel() for u in clean.values()) * s.log()

    def spread(self, seen: Update) -> Mapping[str, float]:
        """A relative sigma is a share of the clean update, and |seen|^2 is 1 + sigma^2 times that of the clean one."""
        return dict.fromkeys(
            seen, float(self._deviation(seen)) / (math.hypot(1.0, self.sigma) if self.relative else 1.0)
        )

    def _deviation(self, clean: Update) -> Tensor:
        square = torch.stack([u.double().square().sum() for u in clean.values()]).sum()
        rms = (square / sum(u.numel() for u in clean.values())).sqrt()
        return self.sigma * rms if self.relative else torch.full_like(rms, self.sigma)
