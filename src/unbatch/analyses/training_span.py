"""training-span: how much of its training inputs a released model's first layer spans, and how far off others are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, final

from unbatch.analysis import Analysis, LayerRisk, Verdict
from unbatch.inversion.trained_span import strangers, trained_span
from unbatch.inversion.view import View

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@final
class TrainingSpan(Analysis):
    """How far training inputs and strangers are from the span of the first layer's change: membership, if it is told.

    The change of the first dense layer under SGD has its rows in the span of the training inputs, of which it tells the
    dimension and, for any candidate, whether it lies in it. Members are at rounding, strangers (public examples, or draws
    of the prior) elsewhere; the area under the curve is that of the distance as a test. Needs the starting weights, or a
    start at zero.
    """

    paper: ClassVar[str] = "the span of first-layer changes; used in part by Tansley et al., 2026"
    sees: ClassVar[frozenset[str]] = frozenset({"release"})

    def run(self, view: View, at: tuple[Tensor, Tensor] | None, rng: torch.Generator) -> Sequence[LayerRisk | Verdict]:
        span = trained_span(view)
        outside = strangers(view, span, rng)
        rank, wide = span.rows.shape
        how = "with the starting weights" if span.exact else "with a start taken for zero, which makes it a guess"
        words = (
            f"its change in training spans {rank} of {wide} dimensions ({how}): every training input lies in them, and a "
            f"candidate that does not was not trained on."
        )
        n = view.knowledge.get("batch_size", rank)
        layer = LayerRisk(
            layer=span.layer.name,
            kind="Linear",
            unknowns=n * wide,
            equations=min(rank, n) * wide,
            rank=rank,
            words=words,
            level="partial",
        )
        least = float(outside.min())
        who = f"relative distance of the nearest of {len(outside)} strangers from the span"
        told = f"{who}; rounding leaves {span.tolerance:.1e}."
        found: list[LayerRisk | Verdict] = [layer, Verdict(name="strangers' distance", value=least, words=told)]
        if at is not None:
            inside = span.distances(at[0])
            auc = float((inside[:, None] < outside[None]).double().mean())
            words = f"relative distance of the farthest of {len(inside)} private examples from the span."
            found.append(Verdict(name="members' distance", value=float(inside.max()), words=words))
            words = "area under the curve of the distance as a test of membership, private examples against strangers."
            found.append(Verdict(name="membership AUC", value=auc, words=words))
        return found
