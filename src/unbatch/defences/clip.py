"""clip: the update shortened to a largest norm."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, final

from pydantic import Field

from unbatch.defence import Defence, Round, Step
from unbatch.observation import Knowledge
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
        """Noise within is shortened with the update, by a factor that the server does not see."""
        return known if self.norm is None else known.only(*(set(known) - {"noise"}))
