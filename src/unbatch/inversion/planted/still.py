"""Still: local training behind a planted block that it does not move, read as the gradient that its steps add up to."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from unbatch.errors import NotApplicable
from unbatch.inversion.planted.front import FrontedStill
from unbatch.inversion.planted.quiet import REACH
from unbatch.inversion.view import View
from unbatch.numerics.half_spaces import COUNT_SLACK, MOST_COUNTED, Sums

STILLNESS = 1e-9  # the most by which training moves a unit's threshold or gain, relative
TRAINING = frozenset(
    {"local_steps", "epochs", "local_batch_size", "optimiser", "learning_rate", "momentum", "weight_decay"}
)


def as_one_pass(view: View) -> tuple[View, int]:
    """The exchange as one of a gradient, where training moved nothing that is heard; and how often it took each example.

    Every step of SGD adds -lr times the gradient of its batch at one and the same function. Steps that take all examples
    equally often, in batches of one size B, add up to

        -lr passes (n / B) dL/dw,    dL/dw of the mean over the n examples of a client.

    Other models than `FrontedStill` come back as they are, with 1.
    Raises NotApplicable: the steps weigh examples differently, or what they weigh is not known; or they may move the block.
    """
    model = view.model
    if not isinstance(model, FrontedStill):
        return view, 1
    known, protocol = view.knowledge, view.protocol
    own = ("bins.weight", "bins.bias", "total.weight")
    if not set(own) <= set(view.update) or "batch_size" not in known or "earlier" in known:
        raise NotApplicable(
            "the planted block did not send all of its gradients in one round, of a batch of known size."
        )
    if any(bool(model.get_parameter(name).any()) for name in own):
        raise NotApplicable(
            "the parameters beside the planted numbers are not 0, so that rounding drowns what is sent."
        )
    each, left = divmod(int(known.batch_size), int(known.get("clients", 1)))
    if left:
        raise NotApplicable(f"{known.batch_size} examples are not dealt evenly to {known.clients} clients.")
    passes, factor = _steps_weigh(view, each)
    _refuse_moved(model, protocol.learning_rate if factor != 1.0 else 0.0, protocol.steps(each), each)
    sent = {name: view.update[name] / factor for name in own}
    sent["total.weight"] = sent["total.weight"] / model.gain
    told = known.without(*(TRAINING & set(known)))
    return view.on(replace(view.obs, model=model.moving(), update=sent, knowledge=told, grain={})), passes


def _steps_weigh(view: View, each: int) -> tuple[int, float]:
    """How often a client's steps take each of its examples, and by which factor they add up to more than one gradient."""
    protocol, form = view.protocol, view.form
    steps = protocol.steps(each)
    if not steps:
        return 1, 1.0
    size = min(protocol.local_batch_size or each, each)
    plain = protocol.optimiser == "sgd" and not protocol.momentum and "learning_rate" in view.knowledge
    if not plain or form is None or form.weights is not None:
        raise NotApplicable(
            "local steps add up to one gradient under plain SGD of a known rate and an even loss alone."
        )
    if each % size or steps % (each // size):
        raise NotApplicable(f"{steps} local steps on {size} of {each} examples take some more often than others.")
    passes = steps // (each // size)
    batches = each // size if form.reduction == "mean" else 1
    return passes, -protocol.learning_rate * passes * batches


def _refuse_moved(model: FrontedStill, rate: float, steps: int, each: int) -> None:
    """Raises NotApplicable where training might move thresholds or gains, for inputs of up to REACH typical norms."""
    rows, cuts = (p.detach().double() for p in (model.planted.weight, model.planted.bias))
    x, size = REACH * math.sqrt(rows.shape[1]), rows.norm(dim=1)
    sent = rate * steps * each * model.gain  # the most that all steps can send back to a unit
    far = sent * (x * x + 1) / float((size * x).min())
    risen = sent * (float(size.max()) * x + float(cuts.abs().max()))
    if not max(far, risen) <= STILLNESS:
        raise NotApplicable(
            f"{steps} local steps at rate {rate:g} may move the planted block by {max(far, risen):.0e}."
        )


def whole_sets(sums: Sums, weights: Tensor, passes: int, each: int) -> Tensor:
    """Which sets [q] hold every one of their examples in all of the passes that a client's steps made, or in none.

    An example that rounding puts now above and now below a threshold is in two neighbouring slabs, each for a part of the
    passes. A set's weight, times passes, is a sum of whole numbers of the two weights that an example may have, and tells
    both numbers. Where in all sets of a direction both are multiples of `passes`, and they add up to the `each` examples
    of the client, the parts at every threshold add up to multiples of it too (by going up from the lowest one): a set
    of one is one example, or parts of several which all lie at one of its thresholds.

    >>> golden, zero = torch.tensor([0.618034, -0.381966]).double(), torch.zeros(2)
    >>> about = {"error": torch.full((2, 2), 1e-6), "directions": torch.ones(2, 1), "thresholds": torch.zeros(2, 2)}
    >>> told = [torch.tensor([[9.0, 0.618034], [9.0, other]]).double() for other in (-0.381966, 0.309017)]
    >>> sets = [Sums(values=values, **about, group=zero, owner=zero) for values in told]
    >>> [whole_sets(one, golden, passes=2, each=2).tolist() for one in sets]
    [[True, True], [False, False]]
    """
    most = passes * each
    if passes == 1 or most > MOST_COUNTED or len(weights) != 2:
        return torch.full((len(sums.values),), passes == 1)
    high, low = float(weights.max()), float(weights.min())
    total = torch.arange(most + 1, dtype=torch.float64)
    seen = sums.values[:, -1:] * passes  # [q, 1]
    lower = ((total * high - seen) / (high - low)).round().clamp_min(0).minimum(total)  # [q, a]
    off = (total * high - lower * (high - low) - seen).abs()
    near = off <= COUNT_SLACK * passes * sums.error[:, 1:]
    told = near.sum(1) == 1
    at = near.double().argmax(1)
    whole = told & (at % passes == 0) & (lower.gather(1, at[:, None])[:, 0] % passes == 0)
    kept = torch.zeros_like(whole)
    for group in set(sums.group.tolist()):
        own = sums.group == group
        kept[own] = bool(whole[own].all()) and int(at[own].sum()) == most
    return kept
