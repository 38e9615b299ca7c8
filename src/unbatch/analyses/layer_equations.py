"""layer-equations: layer by layer, how much of its input the weights and the gradients determine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor

from unbatch.analysis import Analysis, LayerRisk
from unbatch.chain import chain
from unbatch.constraints import Constraints, constraints
from unbatch.observation import Observation
from unbatch.probe import probe


@final
class LayerEquations(Analysis):
    """Unknowns of every layer's input against rank W, rank K and rank [W; K]: what an attacker must guess.

    W: forward equations (weight constraint) for the outputs that the activation lets through. K: equations of the
    weight's gradient (gradient constraint). One example alone: in a batch each example adds unknowns and forward
    equations, and all share one gradient. Ranks by the rank law where it holds, else by singular values.
    """

    paper: ClassVar[str] = "Chen, Campbell, 2021; Zhu, Blaschko, R-GAP, ICLR 2021"

    largest: Annotated[
        int, Field(ge=0, description="unknowns up to which ranks are measured where the law is silent")
    ] = 4096
    condition: Annotated[int, Field(ge=0, description="unknowns up to which the condition number is measured")] = 1024

    def run(
        self, obs: Observation, *, at: tuple[Tensor, Tensor] | None = None, rng: torch.Generator | None = None
    ) -> Sequence[LayerRisk]:
        if "input_shape" not in obs.knowledge:
            raise ValueError("layer-equations needs to know input_shape, to run the model once.")
        links = chain(obs.model, obs.knowledge.input_shape, obs.protocol.mode)
        x, y, whose = probe(obs, at, rng)
        n = obs.knowledge.get("batch_size", 1)
        return [self._risk(each, whose, n) for each in constraints(links, x, y, obs.loss)]

    def _risk(self, found: Constraints, whose: str, batch: int) -> LayerRisk:
        name, n, kind = found.link.name, found.unknowns, type(found.link.module).__name__
        if found.counted is None and n > self.largest:
            words = (
                f"{name}'s ranks cannot be counted, and {n:,} unknowns are more than largest={self.largest} to measure."
            )
            return LayerRisk(layer=name, kind=kind, unknowns=n, equations=0, rank=0, words=words, level="unknown")
        if found.deficit == 0:
            words = f"{name} determines all {n:,} numbers of its input: nothing is left to guess."
        else:
            words = f"{name} loses {found.deficit:,} of {n:,} unknowns: an attacker must guess them."
        words += f" Its weights give {found.weight:,} equations, its gradient {found.gradient:,}, both {found.both:,}"
        words += " (measured)." if found.counted is None else " (counted)."
        if n <= self.condition:
            words += f" Condition number {found.condition:.2g} at {whose}."
        if batch > 1:
            words += f" For one example alone: the batch has {batch}, and their gradients add up."
        share = found.both / n
        return LayerRisk(
            layer=name,
            kind=kind,
            unknowns=n,
            equations=found.weight + found.gradient,
            rank=found.both,
            words=words,
            level="exact" if share == 1 and batch == 1 else "partial" if share >= 0.5 else "low",
        )
