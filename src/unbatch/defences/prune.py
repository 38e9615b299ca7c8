"""prune: only the largest entries of the update are sent."""

from __future__ import annotations

from typing import Annotated, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor

from unbatch.defence import Defence, Step
from unbatch.knowledge import Knowledge
from unbatch.protocol import Update


@final
class Prune(Defence):
    """Sends only the largest entries of the update; all others become zero.

    The floor(share N) entries of least magnitude among all N of the update become zero (top-k sparsification).

    >>> import torch, unbatch
    >>> unbatch.defences.Prune(share=0.5).expected({"weight": torch.tensor([3.0, -0.1, 0.2, -4.0])})
    {'weight': tensor([ 3.,  0.,  0., -4.])}
    """

    paper: ClassVar[str] = "Lin et al., Deep Gradient Compression, ICLR 2018; Zhu, Liu and Han, NeurIPS 2019"
    identity: ClassVar[str] = "prune:share=0"

    share: Annotated[float, Field(ge=0, lt=1, description="of the entries dropped")] = 0.9

    def wrap(self, step: Step) -> Step:
        return lambda round_: self.expected(step(round_))

    def public(self, known: Knowledge) -> Knowledge:
        return known.after(str(self), alone=True) if self.share else known

    def expected(self, clean: Update) -> Update:
        sizes = torch.cat([u.detach().abs().flatten() for u in clean.values()])
        dropped = int(self.share * len(sizes))
        if not dropped:
            return clean
        keep = torch.ones_like(sizes, dtype=torch.bool)
        keep[sizes.argsort(stable=True)[:dropped]] = False
        masks = torch.split(keep, [u.numel() for u in clean.values()])
        return {
            name: torch.where(mask.view_as(u), u, torch.zeros_like(u))
            for (name, u), mask in zip(clean.items(), masks, strict=True)
        }

    def log_prob(self, seen: Update, clean: Update) -> Tensor | None:
        """-|seen - clean|^2 / 2 over the entries that were kept: the limit of small Gaussian noise, in its own unit.

        None where nothing is dropped.
        """
        if not self.share:
            return None
        off = [((seen[name] - u) * (seen[name] != 0)).double().square().sum() for name, u in clean.items()]
        return -torch.stack(off).sum() / 2
