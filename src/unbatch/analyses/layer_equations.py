"""layer-equations: layer by layer, how much of its input the weights and the gradients determine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor, nn

from unbatch.analysis import Analysis, LayerRisk
from unbatch.inversion.backward.rank_count import (
    CONDITIONED_UNKNOWNS,
    EACH_LAYER,
    EFFORT,
    RANKED_UNKNOWNS,
    Constraints,
    Unread,
    constraints,
)
from unbatch.inversion.probe import probe
from unbatch.inversion.view import View
from unbatch.progress import affords, tick


@final
class LayerEquations(Analysis):
    """How much of each layer's input an attacker can solve for on his way back to the network's input.

    Unknowns of every layer's input against rank W, rank K and rank [W; K]: what an attacker must guess.

    W: forward equations (weight constraint) for what the activation after the layer, or after the run of affine layers
    that it begins, lets through. K: equations of the weights' gradients (gradient constraint). A layer without parameters
    counts where it begins a run; one with no linear way back (max pooling, a residual block) is named, and so are those
    before it in its run. One example alone: in a batch each example adds unknowns and forward
    equations, and all share one gradient. Ranks by the rank law where it holds, else by singular values.
    """

    paper: ClassVar[str] = "Chen, Campbell, 2021; Zhu, Blaschko, R-GAP, ICLR 2021"

    formerly: ClassVar[dict[str, str]] = {"largest": "exact", "condition": "exact"}

    exact: Annotated[
        int | None,
        Field(
            ge=0,
            description="unknowns up to which a matrix is formed; none: 4,096 for ranks where the law is silent, 1,024 for "
            "condition numbers and for what no rule counts",
        ),
    ] = None

    def run(self, view: View, at: tuple[Tensor, Tensor] | None, rng: torch.Generator) -> Sequence[LayerRisk]:
        view.refuse_tokens()
        x, y, whose = probe(view, at, rng)
        n = view.knowledge.get("batch_size", 1)
        found, open_ = list[LayerRisk](), ""
        layers = view.once(EACH_LAYER, (x, y), lambda: constraints(view.links, x, y, view.loss))
        for k, each in enumerate(reversed(layers)):  # what lies behind a layer first
            if isinstance(each, Constraints) and each.effort:  # what is counted takes no time
                tick(k / len(layers))
            found.append(self._risk(each, whose, n, open_))
            if found[-1].share != 1 or (isinstance(each, Constraints) and each.curved):
                open_ = each.link.name
            elif isinstance(each.link.module, nn.Linear):
                open_ = ""
        return found[::-1]

    def _risk(self, found: Constraints | Unread, whose: str, batch: int, open_: str) -> LayerRisk:
        """Of a layer whose output `open_`, a later one, may leave open."""
        name, n, kind = found.link.name, found.link.unknowns, type(found.link.module).__name__
        why = self._unmeasured(found)
        if isinstance(found, Unread) or why:
            words = f"What {name} determines of its input is not known: {why}"
            return LayerRisk(layer=name, kind=kind, unknowns=n, equations=0, rank=0, words=words, level="unknown")
        share = found.both / n
        given = isinstance(found.link.module, nn.Linear) and found.counted is not None  # whatever its output is
        exact = share == 1 and batch == 1 and (given or not open_) and not found.curved
        weight = self._weight(found)
        return LayerRisk(
            layer=name,
            kind=kind,
            unknowns=n,
            equations=max(found.both, (weight or 0) + found.gradient),
            rank=found.both,
            words=self._words(found, weight, whose, batch, "" if given else open_),
            level="exact" if exact else "partial" if share >= 0.5 else "low",
        )

    def _unmeasured(self, found: Constraints | Unread) -> str:
        """Why nothing is said of a layer; empty where it is."""
        if isinstance(found, Unread):
            return f"{found.why}."
        if found.counted is not None:
            return ""
        n = found.link.unknowns
        most = (CONDITIONED_UNKNOWNS if found.curved else RANKED_UNKNOWNS) if self.exact is None else self.exact
        why = found.curved or "its ranks cannot be counted"
        if (n if found.curved else min(n, found.weights.equations + found.gradients.equations)) > most:
            return f"{why}, and {n:,} unknowns are more than exact={most} to measure."
        if not affords(found.effort):
            return f"{why}, and there was no time to measure {n:,} unknowns."
        return ""

    def _conditioned(self, n: int) -> bool:
        """Whether the condition number of n unknowns is measured."""
        return n <= (CONDITIONED_UNKNOWNS if self.exact is None else self.exact)

    def _weight(self, found: Constraints) -> int | None:
        """rank W, where it is counted or small enough to be measured."""
        counted = found.counted is None or found.counted.weight is not None
        return found.weight if counted or self._conditioned(found.link.unknowns) else None

    def _words(self, found: Constraints, weight: int | None, whose: str, batch: int, open_: str) -> str:
        """What a layer determines, and how that was found."""
        name, n = found.link.name, found.link.unknowns
        if found.deficit:
            words = f"{name} loses {found.deficit:,} of {n:,} unknowns: an attacker must guess them."
        elif found.curved:
            words = f"{name} determines all {n:,} numbers of its input to first order, if its output is known."
        elif open_:
            words = f"{name} determines all {n:,} numbers of its input from its output, which {open_} may leave open."
        else:
            words = f"{name} determines all {n:,} numbers of its input: nothing is left to guess."
        counted = found.counted is not None and found.counted.weight is not None
        words += " Its " if weight is None else f" Its weights give {weight:,} equations, its "
        words += f"gradient gives {found.gradient:,}, both give {found.both:,}"
        if found.counted is not None and not counted and weight is not None:
            words += " (counted, the weights' measured)."
        else:
            words += " (measured)." if found.counted is None else " (counted)."
        if found.curved:
            words += f" To first order at {whose}: {found.curved}."
        if self._conditioned(n) and affords(EFFORT * float(n) ** 3):
            words += f" Condition number {found.condition:.2g} at {whose}."
        if batch > 1:
            words += f" For one example alone: the batch has {batch}, and their gradients add up."
        return words
