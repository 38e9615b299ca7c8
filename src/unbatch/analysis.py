"""Analysis: what a gradient gives away whether or not an attack finds it; imports no torch at run time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

from unbatch.plugin import Plugin

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from unbatch.observation import Observation


class _Finding(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class LayerRisk(_Finding):
    """What one layer's gradient says of that layer's input."""

    layer: str
    kind: str  # the layer's type
    unknowns: int  # numbers in the layer's input, all examples together
    equations: int  # independent ones that its gradient gives
    rank: int
    words: str
    level: Literal["exact", "partial", "low", "unknown"]
    analysis: str = ""  # that found it; the audit says so


class Bound(_Finding):
    """A lower bound on the error of every attacker in `scope`."""

    name: str
    value: float
    scope: Literal["any", "unbiased"]
    assumptions: str
    source: str


class Verdict(_Finding):
    """One number about the exchange, with its meaning."""

    name: str
    value: float
    words: str


Finding = LayerRisk | Bound | Verdict


class Analysis(Plugin, ABC):
    """Reads risks and bounds off an observation without attacking it."""

    kind: ClassVar[str] = "analysis"
    folder: ClassVar[str] = "analyses"

    paper: ClassVar[str]

    @abstractmethod
    def run(
        self, obs: Observation, *, at: tuple[Tensor, Tensor] | None = None, rng: torch.Generator | None = None
    ) -> Sequence[Finding]:
        """The findings. `at` = (inputs, labels): the audit passes the truth; without it, prior draws, and it says so."""
