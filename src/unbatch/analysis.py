"""Analysis: what a gradient gives away whether or not an attack finds it; imports no torch at run time."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, Self, final

from pydantic import BaseModel, ConfigDict

from unbatch.errors import NotApplicable
from unbatch.plugin import Plugin

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from unbatch.inversion.view import View
    from unbatch.observation import Observation


TOKEN_TABLE = "token embedding"  # the kind of layer that looks a text's tokens up
TOKENS_PROVEN = "tokens proven"  # a verdict that names tokens which are in the batch


class _Finding(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    def __str__(self) -> str:
        return repr(self)


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

    def __repr__(self) -> str:
        where = self.layer or "the network"
        return f"<LayerRisk of {where} ({self.kind}): {self.level}, rank {self.rank} of {self.unknowns} unknowns>"

    @property
    def share(self) -> float | None:
        """How much of its input the layer determines: rank over unknowns; None where that is not known."""
        return None if self.level == "unknown" or not self.unknowns else self.rank / self.unknowns

    @property
    def percent(self) -> str:
        """The share in words, never rounded up to all of it, nor down to nothing."""
        if self.share is None:
            return "?"
        whole = 100 * self.rank // self.unknowns
        return f"{whole}%" if whole or not self.rank else "<1%"


class Bound(_Finding):
    """A lower bound on the error of every attacker in `scope`: its root mean square over entries, of the input's range."""

    name: str
    value: float
    scope: Literal["any", "unbiased"]
    assumptions: str
    source: str
    covers: Literal["update", "training"] = (
        "update"  # this update, its examples known to be in it; or all of the training
    )
    error: float = 0.0  # standard error of the value, where it is drawn and not yet taken off
    client: int = 0  # whose update it is on; the audit says so
    analysis: str = ""  # that found it; the audit says so
    picture: str = (
        ""  # the bound entry by entry, as a PNG data URI: white where the error must be largest, or has no limit
    )

    def __repr__(self) -> str:
        least = f"{self.name} >= {self.value:.4g}{self.spread}, PSNR <= {self.psnr:.1f} dB"
        return f"<Bound {least}, for {'any attacker' if self.scope == 'any' else 'unbiased attackers'}>"

    @classmethod
    def of(cls, name: str, value: float, scope: Literal["any", "unbiased"], words: str, source: str) -> Self:
        """With assumptions that end in the unit, and in whose PSNR it limits."""
        found = cls(name=name, value=value, scope=scope, assumptions="", source=source)
        whose = "any attacker's" if scope == "any" else "an unbiased attacker's"
        last = f"In units of the input's range; PSNR of {whose} mean squared error at most {found.psnr:.1f} dB."
        return found.model_copy(update={"assumptions": f"{words} {last}"})

    @property
    def spread(self) -> str:
        """The standard error, for after the value; empty where there is none."""
        return f" +- {self.error:.1g}" if self.error else ""

    @property
    def psnr(self) -> float:
        """PSNR in dB of the mean squared error, which no attacker in scope exceeds."""
        return -20 * math.log10(self.value) if 0 < self.value < math.inf else -math.copysign(math.inf, self.value - 1)


class Verdict(_Finding):
    """One number about the exchange, with its meaning."""

    name: str
    value: float
    words: str
    analysis: str = ""  # that found it; the audit says so
    tokens: list[int] = []  # that it names
    pieces: list[str] = []  # and these as they stand in a text; the audit says so

    def __repr__(self) -> str:
        return f"<Verdict {self.name} = {self.value:.4g}>"


Finding = LayerRisk | Bound | Verdict


class Analysis(Plugin, ABC):
    """Reads risks and bounds off an observation without attacking it."""

    kind: ClassVar[str] = "analysis"
    folder: ClassVar[str] = "analyses"

    paper: ClassVar[str]
    sees: ClassVar[frozenset[str]] = frozenset({"update"})  # what it reads: updates, released models ("release")

    @abstractmethod
    def run(self, view: View, at: tuple[Tensor, Tensor] | None, rng: torch.Generator) -> Sequence[Finding]:
        """The findings. Raises NotApplicable: it has nothing to say of this exchange; the message says why."""

    @final
    def __call__(
        self, obs: Observation | View, *, at: tuple[Tensor, Tensor] | None = None, rng: torch.Generator | None = None
    ) -> Sequence[Finding]:
        """What it says of an exchange.

        `obs`: the exchange, or a view of it that several analyses share. `at` = (inputs [n, ...], labels [n]): the audit
        passes the truth; without it prior draws stand in, and it says so. `rng`: of everything random; none: seed 0.
        Raises NotApplicable: it has nothing to say of this exchange; the message says why.

        >>> import unbatch
        >>> client = unbatch.Case.parse("digits:batch=4,width=16").setting()
        >>> seen, _ = unbatch.observe(client.model, client.loss, client.inputs, client.labels)
        >>> [(risk.layer, risk.rank) for risk in Analysis.parse("gradient-rank")(seen)]
        [('dense1', 4), ('head', 4)]
        """
        import torch

        from unbatch.inversion.view import View
        from unbatch.network.precision import in_our_words

        view = obs if isinstance(obs, View) else View.of(obs)
        if ("release" if view.obs.released else "update") not in self.sees:
            what = "nothing was sent: this is a released model" if view.obs.released else "this is an update"
            raise NotApplicable(f"{what}, and {self.name} reads {' and '.join(sorted(self.sees))}s.")
        try:
            return self.run(view, at, torch.Generator().manual_seed(0) if rng is None else rng)
        except (RuntimeError, ValueError) as error:
            raise in_our_words(error) or error from None
