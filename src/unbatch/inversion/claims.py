"""Claims: what the bounds of a reconstruction imply, recomputed from the claim and the exchange alone.

An attack says that its examples lie within their bounds of private ones. If so, an honest client who holds them sends this
update, to the rounding of its numbers and up to one common factor. That is computed again here, by nothing that the attack
used on its way, and a claim that fails is withdrawn.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unbatch.errors import NotApplicable
from unbatch.inversion.above_exchange import exchange_above
from unbatch.inversion.closed_units import closed_by
from unbatch.inversion.linearised import as_one_step, targets_of
from unbatch.inversion.peeling import directions_hold, peeled, sent_back
from unbatch.inversion.planted.caught import caught, cuts_of
from unbatch.inversion.planted.proof import alone_in_sums
from unbatch.inversion.recomputing import Recomputed, recomputed, split_shows
from unbatch.inversion.refine import BatchLikelihood
from unbatch.inversion.released import LARGEST_LEFT, claims_on_a_release, told_from_others
from unbatch.inversion.rounds import averaged
from unbatch.inversion.view import View
from unbatch.likelihood import Likelihood
from unbatch.network.dense import Dense
from unbatch.reconstruction import Reconstruction

LEAST_SUM = 1e-3  # of a head's gradient over the classes, relative: under cross entropy it is zero
SUM_ROUNDINGS = 64  # of the addends of a sum over the batch, which may cancel each other
LARGEST_BOUND = 0.5  # of an example: beyond it nothing is told of it
NOISE_SIGMAS = 7.0  # of a sum of known noise: what label-count allows for as well


@dataclass(frozen=True)
class Ruling:
    """Which claims stand, and why in words."""

    kept: Tensor  # [k], bool
    words: str
    factor: float | None = None  # by which the update is what these inputs send
    condition: str = ""  # what the kept claims rest on, beside the exchange


def judged(view: View, found: Reconstruction) -> Reconstruction:
    """A reconstruction without the claims that its own examples contradict: their bounds become inf, the trace says why.

    Every finite bound is held to what it implies: `trace["second judge"]` says what was compared, `trace["claims"]` how
    many were made and kept, `trace["recomputed factor"]` by which factor the update is what these inputs send, and
    `trace["withdrawn"]` why claims were withdrawn, and `trace["condition"]` what kept ones rest on besides.

    the whole batch with labels: the simulated update, tensor by tensor, up to one factor; under a defence whose law is
    known, as that law allows;
    a part of a batch, or examples whose labels are open: the gradient of their dense layer, from which each example's own
    contribution is to be separable; after local steps the units that one of them moved alone;
    labels alone: that nothing altered the update, and that the head's gradient adds up as cross entropy's does.

    What cannot be recomputed is not certified.

    >>> import unbatch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    >>> x, y = torch.rand(1, 4), torch.tensor([2])
    >>> seen, truth = unbatch.observe(model, torch.nn.functional.cross_entropy, x, y)
    >>> claim = Reconstruction(inputs=x, labels=y, bound=torch.tensor([1e-6]))
    >>> judged(View.of(seen), claim).bound.isfinite()
    tensor([True])
    >>> judged(View.of(seen), replace(claim, inputs=x / 2)).bound.isfinite()
    tensor([False])
    """
    if found.bound is None or not bool(found.bound.isfinite().any()):
        return found
    sure = found.bound.isfinite()
    try:
        if found.inputs is None:
            ruling = _labels_alone(view, sure)
        else:
            ruling = (_released if view.obs.released else _ruling)(view, found, sure)
    except Exception as why:  # the model and its loss are the user's: anything may go wrong in them
        ruling = Ruling(torch.zeros_like(sure), f"it could not be recomputed, and is not certified: {why}")
    lost = int((sure & ~ruling.kept).sum())
    counts = {"made": int(sure.sum()), "kept": int((sure & ruling.kept).sum())}
    trace = {**found.trace, "second judge": ruling.words, "claims": counts}
    if ruling.factor is not None:
        trace["recomputed factor"] = ruling.factor
    if ruling.condition:
        trace["condition"] = ruling.condition
    if lost:
        noun = "claim was" if lost == 1 else "claims were"
        trace["withdrawn"] = f"{lost} {noun} withdrawn by the second judge: {ruling.words}"
        trace["bounds before"] = found.bound.tolist()
    return replace(found, bound=found.bound.masked_fill(sure & ~ruling.kept, torch.inf), trace=trace)


def _ruling(view: View, found: Reconstruction, sure: Tensor) -> Ruling:
    known, x, y = view.knowledge, found.inputs, found.labels
    if x is None or found.bound is None:
        raise NotApplicable("there are no inputs.")
    none = torch.zeros_like(sure)
    if known.get("mixup") and known.get("batch_size") != 1:
        return Ruling(none, "the client blends its examples, so what explains its update is a blend of them.")
    sure = sure & (found.bound < LARGEST_BOUND)
    if not bool(sure.any()):
        return Ruling(none, "bounds of half an example and more say nothing of it.")
    sure, repeated = _once(view, found, sure)
    if not bool(sure.any()):
        words = f"more different examples are claimed than the {known.batch_size} of the batch."
        return Ruling(none, words)
    far = torch.where(sure, found.bound, 0.0).double() * x.double().flatten(1).norm(dim=1).cpu()
    if "planted layer" in found.trace:
        return _planted(view, found, sure, far)
    if "caught" in found.trace:
        return _caught(view, found, sure)
    layer = _layer(view, found.layer)
    real = x.is_floating_point() and not found.layer  # tokens are recomputed under a defence as well
    if real and y is not None and Likelihood.of(known) is not None and found.up_to <= {"permutation"}:
        law = _by_law(view, x, y, sure, far)
        if law is not None:
            return law
    if not found.up_to <= {"permutation"}:
        return _directions(view, layer, found, sure, far)
    own = y
    if y is None and len(x) == 1 and layer is not None:
        own = sent_back(view.gradient, layer, x, bool(found.layer)).label
    whole: Recomputed | None = None
    if own is not None:
        seen = (view if view.protocol.optimiser == "sgd" else view.gradient).obs  # a first step of Adam is its gradient
        place = exchange_above(seen, layer) if found.layer and layer is not None else seen
        if view.steps > 1 and found.layer and len(place.update) < len(view.update):
            words = f"the layers below {found.layer!r} move within the local steps, and its inputs with them."
            return Ruling(none, words)
        chosen = sure if repeated else torch.ones_like(sure)  # guesses of the same answer may complete the batch
        whole = recomputed(place, _of(x, chosen), _of(own, chosen), far[chosen])
        if whole.fits and whole.settled:
            return _told_apart(view, found, own, far, Ruling(sure & ~_open(whole, chosen), whole.words, whole.factor))
    if "altered" in known:
        why = whole.words if whole is not None else "their labels are not known."
        return Ruling(none, f"the update was altered by {known.altered}, and the whole of it must explain it: {why}")
    if whole is not None and whole.fits:
        return Ruling(none, whole.words, whole.factor)
    if layer is None or view.gradient.steps:
        return _moved_alone(view, layer, found, sure, far, whole)
    part = peeled(view.gradient, layer, found, sure, far, doubted=_all_there(view, found, sure))
    kept = sure & part.kept
    words = part.words if whole is None or bool(kept.any()) else f"{whole.words} {part.words}"
    return _told_apart(view, found, own, far, Ruling(kept, words, part.factor if bool(kept.any()) else None))


def _told_apart(view: View, found: Reconstruction, labels: Tensor | None, far: Tensor, ruling: Ruling) -> Ruling:
    """A ruling without those that are claimed several times and may as well be several that are alike."""
    blurred = torch.zeros_like(ruling.kept) if labels is None else _blurred(view, found, labels, ruling.kept, far)
    if not bool(blurred.any()):
        return ruling
    words = "the update is too coarse to tell examples that occur twice from two that are alike."
    kept = ruling.kept & ~blurred
    return replace(ruling, kept=kept) if bool(kept.any()) else Ruling(kept, words)


def _released(view: View, found: Reconstruction, sure: Tensor) -> Ruling:
    """The ruling on claims of a released model: of members and of a last example, else of what moved all of its weights."""
    if told_from_others(view, found) or "initial" not in view.knowledge or found.inputs is None:
        kept, words = claims_on_a_release(view, found, sure)
        return Ruling(sure & kept, words)
    step = as_one_step(view)
    targets, left = targets_of(step, found.inputs)
    if left > LARGEST_LEFT:
        words = f"gradients of these inputs at the starting weights leave {left:.1e} of the change of the weights."
        return Ruling(torch.zeros_like(sure), words)
    return _ruling(step, replace(found, labels=targets), sure)


def _planted(view: View, found: Reconstruction, sure: Tensor, far: Tensor) -> Ruling:
    """The ruling on examples that are said to be alone in sums over a planted layer's slabs or half spaces."""
    name = str(found.trace["planted layer"])
    layer = next((layer for layer in view.layers if layer.name == name), None)
    if layer is None or layer.bias is None:
        raise NotApplicable(f"no dense layer called {name!r} with a bias runs on one vector an example.")
    kept = sure & alone_in_sums(view, layer, found, sure, far)
    words = (
        f"{int(kept.sum())} of {int(sure.sum())} are each alone in a sum that {name!r} sent, beside others that are."
    )
    return Ruling(kept, words)


def _caught(view: View, found: Reconstruction, sure: Tensor) -> Ruling:
    """The ruling on examples each of which is said to have sent alone what planted last layers let through."""
    held, which = caught(cuts_of(view)), list(found.trace["caught"])
    if found.inputs is None or found.bound is None or len(which) != len(found):
        raise NotApplicable("it is not said which example is which that sent alone.")
    kept = torch.zeros_like(sure)
    for i in sure.nonzero().flatten().tolist():
        one = held[which[i]]
        told = one.label is None or found.labels is None or int(found.labels[i]) == one.label
        if told and (one.label is not None or found.labels is None):
            part = slice(i, i + 1)
            claim = Reconstruction(inputs=found.inputs[part], labels=one.obs.knowledge.labels, bound=found.bound[part])
            again = judged(View.of(one.obs), claim).bound
            kept[i] = again is not None and bool(again.isfinite().all())
    words = f"{int(kept.sum())} of {int(sure.sum())} explain what a planted last layer let one example send alone."
    head = view.head
    below = [name for name, u in view.update.items() if u.ndim < 2 and (head is None or name != head.bias)]
    condition = ""
    if bool(kept.any()) and not below and any(one.label is not None for one in held):
        condition = (
            "no bias below the last layer was sent, so that an example's size rests on the client's having sent all "
            "parameters at one rate: with all weights at half of it, half the example explains the same."
        )
    return Ruling(kept, words, condition=condition)


def _moved_alone(
    view: View, layer: Dense | None, found: Reconstruction, sure: Tensor, far: Tensor, whole: Recomputed | None
) -> Ruling:
    """The ruling on a part of a batch after local steps: units that one example moved alone."""
    if layer is not None:
        shut = closed_by(view, layer, found, sure, far)
        if bool(shut.kept.any()):
            return Ruling(sure & shut.kept, shut.words, condition=shut.condition)
    words = whole.words if whole is not None else "their labels are not known."
    return Ruling(torch.zeros_like(sure), words)


def _by_law(view: View, x: Tensor, y: Tensor, sure: Tensor, far: Tensor) -> Ruling | None:
    """The ruling by the law of a defence; None where the law does not explain the update by these inputs.

    A bound below what the draws leave open is none, even of inputs that explain the update: unbiased estimates spread by
    (J^T J)^-1 at least, J in units of the draws, so that a move by a bound b that holds shows by |J b|^2 >= d.
    """
    search, flat = BatchLikelihood(averaged(view.obs), y), x.to(view.obs.device).double().flatten(1)
    if not search.explains(flat):
        return None
    way = torch.randn(flat.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(flat)
    moved = flat + far.to(flat)[:, None] * torch.nn.functional.normalize(way, dim=1)
    shown = float((search.off(moved) - search.off(flat)).square().sum())
    if shown < int(sure.sum()) * flat.shape[1]:
        return Ruling(torch.zeros_like(sure), "what the defence draws leaves more open than these bounds say.")
    return Ruling(sure, "these inputs explain the update as the law of the defence allows.")


def _once(view: View, found: Reconstruction, sure: Tensor) -> tuple[Tensor, bool]:
    """The claims without copies, where there are more of them than the batch has examples; and whether there were any."""
    n, x = view.knowledge.get("batch_size"), found.inputs
    if n is None or int(sure.sum()) <= n or x is None or found.bound is None:
        return sure, False
    flat = x.double().flatten(1).cpu()
    far = found.bound.double() * flat.norm(dim=1)
    kept = torch.zeros_like(sure)
    for i in sure.nonzero().flatten().tolist():
        gaps = (flat[kept] - flat[i]).norm(dim=1)
        kept[i] = bool((gaps > far[kept] + far[i]).all())
    return (kept, True) if int(kept.sum()) <= n else (torch.zeros_like(sure), True)


def _blurred(view: View, found: Reconstruction, labels: Tensor, sure: Tensor, far: Tensor) -> Tensor:
    """Which claims [k] are of the same example several times, where two that differ would send the same to its rounding."""
    none = torch.zeros_like(sure)
    if found.inputs is None or found.layer or len(labels) != len(sure) or not found.inputs.is_floating_point():
        return none
    flat, y = found.inputs.double().flatten(1).cpu(), labels.cpu()
    chosen, owner = sure.nonzero().flatten().tolist(), torch.arange(len(sure))
    for i in chosen:
        same = (j for j in chosen if (flat[i] - flat[j]).norm() <= far[i] + far[j] and torch.equal(y[i], y[j]))
        owner[i] = next(same, i)
    alike = sure.cpu() & (torch.bincount(owner[chosen], minlength=len(sure))[owner] > 1)
    groups = [alike & (owner == one) for one in set(owner[alike].tolist())]
    blurred = [
        group
        for group in groups
        if not split_shows(view.obs, _of(found.inputs, group), _of(labels, group), owner[group], far[group])
    ]
    return torch.stack(blurred).any(0).to(sure.device) if blurred else none


def _open(whole: Recomputed, chosen: Tensor) -> Tensor:
    """Which examples [k] are sequences that could be others, by their place among the chosen ones."""
    found = torch.zeros_like(chosen)
    found[chosen.nonzero().flatten()[list(whole.open_tokens)]] = True
    return found


def _of(values: Tensor, chosen: Tensor) -> Tensor:
    return values[chosen.to(values.device)]


def _all_there(view: View, found: Reconstruction, sure: Tensor) -> bool:
    """Whether the whole batch is claimed, so that the update should be explained as well."""
    return bool(sure.all()) and view.knowledge.get("batch_size", len(found)) == len(found)


def _directions(view: View, layer: Dense | None, found: Reconstruction, sure: Tensor, far: Tensor) -> Ruling:
    """The ruling on inputs whose scale or sign nothing tells."""
    known = view.knowledge
    if layer is None or view.gradient.steps or "altered" in known:
        words = "inputs up to their scale are held to their dense layer's gradient alone, which is not one here."
        return Ruling(torch.zeros_like(sure), words)
    part = directions_hold(view.gradient, layer, found, sure, far)
    return Ruling(sure & part.kept, part.words)


def _layer(view: View, name: str) -> Dense | None:
    """The dense layer whose inputs are claimed; of the network's own inputs the first one that reads them."""
    if name:
        layer = next((layer for layer in view.layers if layer.name == name), None)
        if layer is None:
            raise NotApplicable(f"no dense layer called {name!r} runs on one vector an example.")
        return layer
    try:
        return next((each for each in view.layers if each.feeds is not None and each.weight in view.update), None)
    except NotApplicable:
        return None


def _labels_alone(view: View, sure: Tensor) -> Ruling:
    """Whether the head's gradient is one that labels can be counted in."""
    known, head, form = view.knowledge, view.head, view.form
    none = torch.zeros_like(sure)
    if "altered" in known:
        words = f"the update was altered by {known.altered}, so that its head's gradient proves nothing of the labels."
        return Ruling(none, words)
    sums = form is not None and form.name == "cross-entropy" and form.classes
    protocol = view.protocol
    if (
        form is None
        or not sums
        or head is None
        or (view.steps and (protocol.optimiser != "sgd" or protocol.weight_decay))
    ):
        return Ruling(sure, "nothing but the head's gradient was looked at.")
    parameters = dict(view.model.named_parameters(remove_duplicate=False))
    for name in (head.weight, head.bias):
        if name is None or name not in view.update:
            continue
        u = view.update[name]
        eps = max(torch.finfo(t.dtype).eps for t in (u, parameters[name]))
        drift = view.steps * parameters[name].detach().double().abs().sum(0).max()
        noise = NOISE_SIGMAS * float(known.get("noise", 0.0)) * len(u) ** 0.5
        allowed = LEAST_SUM * u.double().abs().sum(0).max() + SUM_ROUNDINGS * eps * (abs(form.scale) + drift) + noise
        if bool((u.double().sum(0).abs() > allowed).any()):
            words = (
                f"the gradient {name!r} of the head does not add up to zero over the classes, as cross entropy's does."
            )
            return Ruling(none, words)
    return Ruling(sure, "the head's gradient adds up to zero over the classes, as cross entropy's does.")
