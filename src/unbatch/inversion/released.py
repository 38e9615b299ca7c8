"""Claims on a released model, computed again by what no attack on it uses."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from unbatch.errors import NotApplicable
from unbatch.inversion.retraining import trained_with
from unbatch.inversion.stationarity import ROUNDINGS, own_gradient, remainder
from unbatch.inversion.trained_span import trained_span
from unbatch.inversion.view import View
from unbatch.reconstruction import Reconstruction

LARGEST_LEFT = 1e-6  # of the unknown example's gradient, that may be left beside the one that is claimed
LEAST_OUTSIDE = (
    1e-2  # of its length, by which a direction drawn at random must be outside of a span that tells anything
)


def claims_on_a_release(view: View, found: Reconstruction, sure: Tensor) -> tuple[Tensor, str]:
    """Which claims [k] on a released model stand, and why in words.

    Candidates for membership are solved for anew as combinations of the rows of the change, by least squares. An example
    that an informed adversary claims must make the objective stationary again: what is left of its gradient must be
    rounding, and a move by the bound must show beside that. Or the client's own training with it, run anew from the start,
    must end at the released parameters.

    >>> import unbatch
    >>> spec = "trained:known=9,threat=informed,task=classes,depth=0,start=1,weight_decay=0.1"
    >>> client = unbatch.Case.parse(spec).setting()
    >>> told = {"knowledge": client.knowledge, "training": client.training}
    >>> seen, truth = unbatch.observe(client.model, client.loss, client.inputs, client.labels, **told)
    >>> claim = Reconstruction(inputs=truth.inputs, labels=truth.labels, bound=torch.tensor([1e-9]))
    >>> other = Reconstruction(inputs=0.99 * truth.inputs, labels=truth.labels, bound=torch.tensor([1e-9]))
    >>> [bool(claims_on_a_release(View.of(seen), each, torch.tensor([True]))[0]) for each in (claim, other)]
    [True, False]
    """
    none = torch.zeros_like(sure)
    if found.layer or found.inputs is None or found.bound is None:
        return none, "features of a released model are not computed again."
    if _among(view, found):
        return _members(view, found, sure)
    if told_from_others(view, found):
        kept, words = _stationary(view, found, sure)
        return (kept, words) if bool(kept.any()) else _trained_again(view, found, sure, words)
    return none, "nothing that was claimed of a released model can be computed again with what is known."


def told_from_others(view: View, found: Reconstruction) -> bool:
    """Whether a claim is of members among candidates, or of the one example beside those that are known.

    >>> import unbatch
    >>> client = unbatch.Case.parse("trained:batch=2,outsiders=2,width=8,steps=5,threat=start").setting()
    >>> told = {"knowledge": client.knowledge, "training": client.training}
    >>> seen, truth = unbatch.observe(client.model, client.loss, client.inputs, client.labels, **told)
    >>> [told_from_others(View.of(seen), Reconstruction(inputs=c * truth.inputs)) for c in (1.0, 0.5)]
    [True, False]
    """
    return _among(view, found) or ("known_inputs" in view.knowledge and found.labels is not None)


def _among(view: View, found: Reconstruction) -> bool:
    inputs, candidates = found.inputs, view.knowledge.get("candidates")
    if candidates is None or inputs is None or found.layer:
        return False
    flat, asked = inputs.double().flatten(1), candidates.to(inputs.device).double().flatten(1)
    return flat.shape[1] == asked.shape[1] and bool((flat[:, None] == asked[None]).all(2).any(1).all())


def _members(view: View, found: Reconstruction, sure: Tensor) -> tuple[Tensor, str]:
    """Whether candidates are combinations of the change's rows, where a direction at random is none."""
    span = trained_span(view)
    if found.inputs is None or found.bound is None or not span.exact:
        return torch.zeros_like(sure), "without the starting weights a span is a guess."
    z = torch.nn.functional.normalize(span.entering(found.inputs.to(span.rows.device)), dim=1)
    rng = torch.Generator().manual_seed(0)
    drawn = torch.randn(8, z.shape[1], generator=rng, dtype=torch.float64).to(z)
    both = torch.cat([z, torch.nn.functional.normalize(drawn, dim=1)])
    spanned = torch.linalg.qr(span.change.T @ span.change @ span.rows.T).Q  # the leading rows, by one power step
    left = (both - (both @ spanned) @ spanned.T).norm(dim=1)
    inside, outside = left[: len(z)], float(left[len(z) :].min())
    if outside < LEAST_OUTSIDE:
        return torch.zeros_like(
            sure
        ), f"a direction at random is {outside:.1e} outside of the span, which tells nothing."
    kept = inside.to(sure.device) <= found.bound.to(sure.device) + span.tolerance
    words = f"claimed inputs are at most {float(inside.max()):.1e} outside of the span of what was trained on"
    return kept, f"{words}, others {outside:.2f}."


def _stationary(view: View, found: Reconstruction, sure: Tensor) -> tuple[Tensor, str]:
    """Whether the objective is stationary with the claimed example in it, to the rounding of its sums."""
    none = torch.zeros_like(sure)
    if len(found) != 1 or found.inputs is None or found.labels is None or found.bound is None:
        return none, "an informed adversary's claim is one example with its label."
    try:
        left = remainder(view)
    except NotApplicable as why:
        return none, str(why)
    own = own_gradient(view, found.inputs, found.labels)
    rng = torch.Generator().manual_seed(0)
    way = torch.randn(found.inputs.shape, generator=rng, dtype=torch.float64).to(found.inputs)
    far = float(found.bound[0]) * found.inputs.double().norm()
    moved = own_gradient(view, found.inputs + (far * way / way.norm()).to(found.inputs), found.labels)
    gap = torch.stack([(own[name] - g).square().sum() for name, g in left.gradient.items()]).sum().sqrt()
    shown = torch.stack([(own[name] - moved[name]).square().sum() for name in own]).sum().sqrt()
    rounding = ROUNDINGS * sum(left.off[name] ** 2 * g.numel() for name, g in left.gradient.items()) ** 0.5
    relative = float(gap) / max(left.norm(), 1e-300)
    if relative > LARGEST_LEFT or float(gap) > max(rounding, float(shown)):
        return (
            none,
            f"with the claimed example the objective is not stationary: {relative:.1e} of its gradient is left.",
        )
    words = f"with the claimed example the objective is stationary again, to {relative:.1e} of that example's gradient."
    return sure, words


def _trained_again(view: View, found: Reconstruction, sure: Tensor, why: str) -> tuple[Tensor, str]:
    """Whether training with the claimed example ends at the released parameters; `why` is said where none can be run."""
    if len(found) != 1 or found.inputs is None or found.labels is None or found.bound is None:
        return torch.zeros_like(sure), why
    try:
        here = trained_with(view, found.inputs, found.labels)
    except NotApplicable:
        return torch.zeros_like(sure), why
    rng = torch.Generator().manual_seed(0)
    way = torch.randn(found.inputs.shape, generator=rng, dtype=torch.float64).to(found.inputs)
    far = float(found.bound[0]) * found.inputs.double().norm()
    beside = trained_with(view, found.inputs + (far * way / way.norm()).to(found.inputs), found.labels)
    released = {name: p.detach() for name, p in view.model.named_parameters()}
    gap, shown, travelled = _apart(here, released), _apart(here, beside), _apart(released, view.knowledge.initial)
    eps = max(torch.finfo(p.dtype).eps for p in released.values())
    rounding = ROUNDINGS * eps * float(torch.stack([p.double().square().sum() for p in released.values()]).sum().sqrt())
    relative = gap / max(travelled, 1e-300)
    if gap > max(rounding, min(shown, LARGEST_LEFT * travelled)):
        words = f"trained again with the claimed example, the model ends {relative:.1e} of its way elsewhere."
        return torch.zeros_like(sure), words
    return sure, f"trained again with the claimed example, the model ends where it did, to {relative:.1e} of its way."


def _apart(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    parts = [(one[name].double() - other[name].to(one[name]).double()).square().sum() for name in one]
    return float(torch.stack(parts).sum().sqrt())
