"""weight-span: which candidates a model was trained on, by the span of its first layer's change."""

from __future__ import annotations

from typing import ClassVar, final

import torch

from unbatch.attack import Attack, Cost, Demo, Guarantee
from unbatch.errors import NotApplicable
from unbatch.inversion.trained_span import LARGEST_GUESSED, LEAST_MARGIN, WHY_FULL, strangers, trained_span
from unbatch.inversion.view import View
from unbatch.knowledge import DOMAIN_FIELDS
from unbatch.reconstruction import Reconstruction
from unbatch.threat_model import ThreatModel


@final
class WeightSpan(Attack):
    """Tells which of the candidates that the attacker holds a released model was trained on, exactly.

    SGD leaves [W, b] - c [W0, b0] = sum_i delta_i (x_i, 1)^T in the first dense layer, with any loss, momentum and weight
    decay (c = 1 without it, else the one eigenvalue that most of W W0^+ has). A candidate z = (x, 1) was trained on where
    |z - P z| / |z| is rounding, P the projection on the rows of that change. The margin is two-sided: members are within
    the tolerance of rounding, everybody else ten times outside, which is held for strangers before anything is claimed.

    Without the starting weights they are taken for zero, and the answer is a guess. Adam breaks it, which rescales each
    entry; so do a norm in front, augmentation (which adds its pictures to the span), and as many examples as the layer has
    neurons or inputs. An example whose gradient vanished is missed, and a blend of members is taken for one.

    >>> import unbatch
    >>> client = unbatch.Case.parse("trained:batch=4,outsiders=8,width=16,steps=30,threat=start").setting()
    >>> told = {"knowledge": client.knowledge, "training": client.training}
    >>> seen, truth = unbatch.observe(client.model, client.loss, client.inputs, client.labels, **told)
    >>> found = unbatch.attacks.WeightSpan()(seen)
    >>> len(found), found.trace["candidates"], found.trace["nearest other"] > 0.1
    (4, 12, True)
    """

    family: ClassVar[str] = "span"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT
    paper: ClassVar[str] = "the span of first-layer changes; used in part by Tansley et al., 2026"
    needs: ClassVar[frozenset[str]] = frozenset({"input_shape", "candidates"})
    uses: ClassVar[frozenset[str]] = frozenset({"initial", "recipe", "public", "batch_size"}) | DOMAIN_FIELDS
    demo: ClassVar[Demo] = Demo(
        case="trained:batch=4,outsiders=8,width=16,steps=60,threat=start", floors={"psnr": 100.0}
    )
    cost: ClassVar[Cost] = Cost.READS
    threat_model: ClassVar[str] = ThreatModel.START

    def run(self, view: View, rng: torch.Generator) -> Reconstruction:
        span = trained_span(view)
        asked, n = view.knowledge.candidates, view.knowledge.get("batch_size")
        if span.exact and n is not None and len(span.rows) > n:
            raise NotApplicable(f"{len(span.rows)} directions are spanned by {n} examples: {WHY_FULL}")
        away = span.distances(asked)
        outside = float(strangers(view, span, rng).min())
        limit = span.tolerance if span.exact else LARGEST_GUESSED * outside
        if limit * LEAST_MARGIN > outside and span.exact:
            raise NotApplicable(
                f"strangers are {outside:.1e} outside of the span, and rounding leaves {limit:.1e} of members: no margin."
            )
        inside = away <= limit
        between = ~inside & (away < LEAST_MARGIN * limit)
        if not bool(inside.any()):
            raise NotApplicable(
                f"none of {len(asked)} candidates is in the span of the {len(span.rows)} directions trained on; the "
                f"nearest is {float(away.min()):.1e} away."
            )
        claimed = (away.clamp_min(torch.finfo(view.obs.dtype).eps) + span.tolerance)[inside]
        return Reconstruction(
            inputs=asked[inside.to(asked.device)],
            bound=claimed if span.exact else torch.full_like(claimed, torch.inf),
            trace={
                "candidates": len(asked),
                "rank": len(span.rows),
                "tolerance": limit,
                "farthest member": float(away[inside].max()),
                "nearest other": float(away[~inside].min()) if bool((~inside).any()) else None,
                "strangers": outside,
                "undecided": int(between.sum()),
                "kept of the start": span.kept,
            },
        )
