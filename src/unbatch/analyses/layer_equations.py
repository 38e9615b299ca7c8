"""layer-equations: layer by layer, how much of its input the weights and the gradients determine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor, nn

from unbatch.analysis import Analysis, LayerRisk
from unbatch.errors import NotApplicable
from unbatch.inversion.backward.rank_count import Constraints, Unread, constraints
from unbatch.inversion.probe import probe
from unbatch.inversion.view import View
from unbatch.network.chain import chain


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

    largest: Annotated[
        int, Field(ge=0, description="unknowns up to which ranks are measured where the law is silent")
    ] = 4096
    condition: Annotated[
        int,
        Field(
            ge=0,
            description="unknowns up to which the condition number is measured, and what no rule counts",
        ),
    ] = 1024

    def run(self, view: View, at: tuple[Tensor, Tensor] | None, rng: torch.Generator) -> Sequence[LayerRisk]:
        obs = view.obs
        if "input_shape" not in obs.knowledge:
            raise NotApplicable("input_shape must be known, to run the model once.")
        links = chain(obs.model, obs.knowledge.input_shape, obs.protocol.mode)
        x, y, whose = probe(obs, at, rng)
        n = obs.knowledge.get("batch_size", 1)
        found, open_ = list[LayerRisk](), ""
        for each in reversed(constraints(links, x, y, obs.loss)):  # what lies behind a layer first
            found.append(self._risk(each, whose, n, open_))
            if found[-1].share != 1 or (isinstance(each, Constraints) and each.curved):
                open_ = each.link.name
            elif isinstance(each.link.module, nn.Linear):
                open_ = ""
        return found[::-1]

    def _risk(self, found: Constraints | Unread, whose: str, batch: int, open_: str) -> LayerRisk:
        """Of a layer whose output `open_`, a later one, may leave open."""
        name, n, kind = found.link.name, found.link.unknowns, type(found.link.module).__name__
        why = f"{found.why}." if isinstance(found, Unread) else ""
        if isinstance(found, Constraints) and found.counted is None:
            option, most = ("condition", self.condition) if found.curved else ("largest", self.largest)
            if (n if found.curved else min(n, found.weights.equations + found.gradients.equations)) > most:
                why = found.curved or "its ranks cannot be counted"
                why += f", and {n:,} unknowns are more than {option}={most} to measure."
        if isinstance(found, Unread) or why:
            words = f"What {name} determines of its input is not known: {why}"
            return LayerRisk(layer=name, kind=kind, unknowns=n, equations=0, rank=0, words=words, level="unknown")
        given = isinstance(found.link.module, nn.Linear) and found.counted is not None  # whatever its output is
        if found.deficit:
            words = f"{name} loses {found.deficit:,} of {n:,} unknowns: an attacker must guess them."
        elif found.curved:
            words = f"{name} determines all {n:,} numbers of its input to first order, if its output is known."
        elif open_ and not given:
            words = f"{name} determines all {n:,} numbers of its input from its output, which {open_} may leave open."
        else:
            words = f"{name} determines all {n:,} numbers of its input: nothing is left to guess."
        counted = found.counted is not None and found.counted.weight is not None
        weight = found.weight if counted or found.counted is None or n <= self.condition else None
        words += " Its " if weight is None else f" Its weights give {weight:,} equations, its "
        words += f"gradient gives {found.gradient:,}, both give {found.both:,}"
        if found.counted is not None and not counted and weight is not None:
            words += " (counted, the weights' measured)."
        else:
            words += " (measured)." if found.counted is None else " (counted)."
        if found.curved:
            words += f" To first order at {whose}: {found.curved}."
        if n <= self.condition:
            words += f" Condition number {found.condition:.2g} at {whose}."
        if batch > 1:
            words += f" For one example alone: the batch has {batch}, and their gradients add up."
        share = found.both / n
        exact = share == 1 and batch == 1 and (given or not open_) and not found.curved
        return LayerRisk(
            layer=name,
            kind=kind,
            unknowns=n,
            equations=max(found.both, (weight or 0) + found.gradient),
            rank=found.both,
            words=words,
            level="exact" if exact else "partial" if share >= 0.5 else "low",
        )
