"""Descent: the inputs of a batch, by way of an inner layer at which its examples can be told apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from unbatch.errors import NotApplicable, UnbatchError
from unbatch.inversion.descent.above import (
    Above,
    at_own_scale,
    flips_above,
    known_above,
    labels_sent,
    most_times,
    rescaled,
    scale_blur,
)
from unbatch.inversion.descent.back import Back
from unbatch.inversion.descent.mixed_maps import mixed_maps
from unbatch.inversion.descent.pictures import MOST_SKETCHED, blurred, noisy, normed
from unbatch.inversion.descent.places import WindowLayer, at_cuts, places, rectified
from unbatch.inversion.descent.sent_norms import FixedNorms, fixed_norms
from unbatch.inversion.descent.separation import CLIENT_ROUNDINGS, ToldApart, counted, lone, separated, spectrum
from unbatch.inversion.descent.sought import Search
from unbatch.inversion.descent.walk import SURE, Told, Walk, told_by, walk
from unbatch.inversion.view import View
from unbatch.network.graph import Call, Graph
from unbatch.network.precision import in_double
from unbatch.network.sections import between, section
from unbatch.network.tracing import trace
from unbatch.numerics.bounds.first_order import ERROR_SIGMAS, LARGEST_RADIUS
from unbatch.progress import tick
from unbatch.reconstruction import Reconstruction

LARGEST_HEAD_MISFIT = 1e-3  # relative, of the head's gradient: beyond it the maps or their scales are wrong
POLISHES = 10  # of the separated maps
SURELY = 10.0  # times the error, above which an entry is positive that was zero in the span's cone
SLOWEST = 0.95  # share of their error that a turn may leave
ENOUGH = 2.0  # equations an unknown, at which no other layer is tried
ALONE = 2.5  # equations an unknown of a known tensor, at which each example is searched for by itself
AS_GOOD = 0.4  # share of the most equations that a shallower tensor may have
CLEAR = 1e-4  # noise of a known tensor, relative, up to which a search goes by it before others
LONGER = 4  # times the steps of a search through norms
COARSEST = 1e-6  # rounding of an update, relative, from which something is claimed
SHARES = 0.3, 0.4, 1.0  # of the work that is done after separation, walk and search


@dataclass(frozen=True, eq=False)
class WayDown:
    """A batch told apart and led down: what is known of its inner tensors."""

    graph: Graph
    head: WindowLayer
    separation: ToldApart
    above: Above
    walk: Walk


def descended(view: View, rng: torch.Generator, *, steps: int, attempts: int, partial: bool) -> Reconstruction:
    """The inputs of the batch behind a gradient, each with its bound; none where no layer tells the examples apart."""
    view = view.gradient
    if view.steps:
        raise NotApplicable(view.no_gradient)
    if float(view.knowledge.get("noise", 0.0)) > 0:
        raise NotApplicable(
            "a defence's noise fills the span of every layer's gradient, so that none counts its examples."
        )
    if "altered" in view.knowledge:
        raise NotApplicable(
            f"the update was altered by {view.knowledge.altered}, after which no gradient has the rank of its batch."
        )
    shape, trace_ = view.knowledge.input_shape, dict[str, Any]()
    found = _descent(view, rng, trace_)
    if found is None:
        return Reconstruction(inputs=torch.zeros(0, *shape), bound=torch.zeros(0), trace=trace_)
    labels = labels_sent(view, found.graph, found.head, found.above)
    trace_["labels"] = "not told" if labels is None else "told by the head"
    inputs, bound = _pictures(view, found, rng, trace_, steps=steps, attempts=attempts)
    several = most_times(view, found.graph, found.head, found.above).to(bound.device) > 1
    if bool(several.any()):  # what was found is the mean of copies, or of examples that are near each other
        bound = bound.masked_fill(several, torch.inf)
        trace_["not certified"] = f"{int(several.sum())} may stand for several examples that are near each other."
    if torch.finfo(view.obs.dtype).eps > COARSEST:
        bound = torch.full_like(bound, torch.inf)
        trace_["not certified"] = "the update was rounded more coarsely than float32, so that zeros cannot be told."
    kept = torch.ones(len(inputs), dtype=torch.bool) if partial else bound.isfinite()
    told = None if labels is None else labels[kept.to(labels.device)]
    return Reconstruction(inputs=inputs[kept.to(inputs.device)], labels=told, bound=bound[kept], trace=trace_)


def _descent(view: View, rng: torch.Generator, trace_: dict[str, Any]) -> WayDown | None:
    graph = _graph(view)
    update = {name: tensor.double() for name, tensor in view.update.items()}
    every = list(places(graph))
    head = every[-1] if every else None
    if head is None or not head.dense:
        raise NotApplicable("the network ends in no dense layer, from whose gradient the labels would follow.")
    if head.weight not in update:
        raise NotApplicable(
            f"the last dense layer {head.call.name!r} sent no gradient, from which the labels would follow."
        )
    eps = float(torch.finfo(view.obs.dtype).eps)
    mixed = any(isinstance(m := call.ran, nn.modules.batchnorm._BatchNorm) and m.training for call in graph.calls)
    tried, best = list[str](), None
    for place in candidates(graph, every, update, eps):
        found, cone = _apart(view, graph, place, update, eps, rng, mixed=mixed), rectified(place.given)
        if found is None:
            continue
        if found.missed:
            tried.append(f"{place.call.name}: {len(found)} of {len(found) + found.missed} examples")
            continue
        readers = [each for each in every if each.given is place.given]
        try:
            own = cone or place.dense
            maps = at_own_scale(graph, found, head, update, mixed=mixed and cone) if own else place.shaped(found.maps)
        except NotApplicable as why:
            tried.append(str(why).rstrip("."))
            continue
        up, error = _polished(graph, every, readers, maps, update, eps, found.error, mixed=mixed)
        if not up.misfit < LARGEST_HEAD_MISFIT:
            tried.append(f"{place.call.name}: the head's gradient is {up.misfit:.1e} off")
            continue
        tick(SHARES[0])
        unknowns = len(found) * torch.Size(view.knowledge.input_shape).numel()
        blur = scale_blur(graph, found, up.maps, head, update, eps, mixed=mixed) if cone else 0.0
        down = walk(graph, every, place.given, up.maps, up.delta, update, eps, error, ALONE * unknowns, blur)
        told = target(down, unknowns)
        if best is None or told.equations > target(best.walk, unknowns).equations:
            best = WayDown(graph, head, found, up, down)
        if told.equations >= ENOUGH * unknowns:
            break
    if best is None:
        trace_["stopped"] = _stopped(every, head, tried, update, eps)
        return None
    trace_ |= {
        "layer": best.separation.place.call.name,
        "examples": len(best.separation),
        "head misfit": best.above.misfit,
    }
    trace_["equations"] = [_row(told) for told in best.walk.told]
    trace_["stops"] = best.walk.stops
    return best


def _stopped(
    every: list[WindowLayer], head: WindowLayer, tried: list[str], update: Mapping[str, Tensor], eps: float
) -> str:
    """Why no layer told the batch apart, in words."""
    rank = counted(spectrum(head.flat(update[head.weight])), eps)
    mixes = f"{head.call.name}: its gradient mixes {rank} examples, whose features may have any sign"
    tried = [*tried, mixes] if rank > 1 and not rectified(head.given) else tried
    why = "; ".join(tried) or (
        "no layer's gradient has the rank of a few examples times its windows; the analysis separable-layer says why "
        "of each layer."
    )
    silent = [place.call.name for place in every if place.weight not in update]
    return f"{why} No gradient was sent by {', '.join(map(repr, silent))}." if silent else why


def _apart(
    view: View,
    graph: Graph,
    place: WindowLayer,
    update: Mapping[str, Tensor],
    eps: float,
    rng: torch.Generator,
    *,
    mixed: bool,
) -> ToldApart | None:
    """The maps behind a layer: by the cone of what is nonnegative, or without one by what the network sends back."""
    G = place.flat(update[place.weight])
    if place.dense and not rectified(place.given):
        return None if view.knowledge.get("batch_size", 1) != 1 else lone(place, G, eps)
    if rectified(place.given):
        return separated(place, G, eps, rng, lambda: tick(SHARES[0] / 2), mixed=mixed)
    return None if mixed else mixed_maps(view, graph, place, G, eps, rng)


def _polished(
    graph: Graph,
    every: list[WindowLayer],
    readers: list[WindowLayer],
    maps: Tensor,
    update: Mapping[str, Tensor],
    eps: float,
    error: float,
    *,
    mixed: bool,
) -> tuple[Above, float]:
    """What is known above the maps, and their relative error, once they are solved for again by the layers that read them.

    With what came back to these layers known, their gradients are linear in the maps, with more equations than unknowns:
    the rounding that the span's weakest directions suffered averages out. What is zero in the span's cone stays zero. What
    came back is only as good as the maps, but for masks and scales, which are mended: each turn leaves a share of their
    error, and the moves tell which. The maps are known no better than the turn that was not taken would have moved them.
    """
    head, given, first = every[-1], readers[0].given, error
    if not rectified(given):  # the batch's own equations gave them, and no zero is to be kept
        return known_above(graph, readers, maps, head, update), error

    def above(maps: Tensor) -> Above:
        found = known_above(graph, readers, maps, head, update)
        if first < SURE or mixed:
            return found
        flips = flips_above(graph, every, found, given, head, update, first)
        found = known_above(graph, readers, maps, head, update, flips)
        return known_above(graph, readers, rescaled(graph, readers, found, update, first), head, update, flips)

    up, moved, share = above(maps), error, 0.5
    for turn in range(POLISHES):
        told = told_by(given, readers, up.deltas, update, eps, 0.0)
        if told is None or told.rows is not None:
            break
        held = told.seen.view_as(up.maps)
        positive = (maps > 0) | (held > SURELY * first * held.square().mean().sqrt())
        held = torch.where(positive, torch.where(held > 0, held, maps), 0.0)
        other = above(held)
        before, moved = moved, float((held - up.maps).norm() / held.norm())
        if not other.misfit < up.misfit:
            error = max(error, moved)
            break
        share = min(max(share, moved / before), SLOWEST) if turn else share
        up, error = other, float(told.noise.norm() / told.seen.norm()) + moved * share / (1 - share)
    return up, max(error, CLIENT_ROUNDINGS * eps)


def candidates(graph: Graph, every: list[WindowLayer], update: Mapping[str, Tensor], eps: float) -> list[WindowLayer]:
    """The layers at which a batch may be told apart, those of least rank first, of equal ones that nearest the input.

    Everything goes through their inputs, and their gradient's rank is below what it can be, or just that. A dense layer
    whose rank is all that it can be comes last: its batch may be larger, and mixtures of examples pass for them. So does a
    head whose input has any sign, of which a single example is read.
    """
    whole, ranks = at_cuts(graph), list[tuple[bool, int, WindowLayer]]()
    for place in every:
        if place.given not in whole or not place.plain or place.given is graph.input or place.weight not in update:
            continue
        dense = place.dense and not rectified(place.given)
        if dense and (place is not every[-1] or all(other.dense for other in every)):  # `unmix` reads dense layers
            continue
        if place.positions <= place.limit:
            rank = counted(spectrum(place.flat(update[place.weight])), eps)
            if dense and rank > 1:
                continue
            full = place.dense and rank >= place.limit - (
                place is every[-1]
            )  # what is sent to classes may add up to zero
            ranks.append((full or dense, rank, place))
    return [place for *_, place in sorted(ranks, key=lambda each: each[:2])]


def _graph(view: View) -> Graph:
    """What the network runs, in float64 and in the client's mode."""
    mode = view.protocol.mode
    model = in_double(view.model).train(mode == "train").requires_grad_(False)
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training:
            m.running_mean = m.running_var = m.num_batches_tracked = (
                None  # nobody reads them, nothing is to write to them
            )
            m.track_running_stats = False
    if mode == "train" and any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in model.modules()):
        raise NotApplicable("dropout in train mode draws what nobody knows.")
    try:
        return trace(model, view.knowledge.input_shape, mode)
    except (ValueError, UnbatchError) as error:
        raise NotApplicable(str(error)) from error


def _pictures(
    view: View, found: WayDown, rng: torch.Generator, trace_: dict[str, Any], *, steps: int, attempts: int
) -> tuple[Tensor, Tensor]:
    """The inputs [n, *shape] and their bounds [n]."""
    shape = view.knowledge.input_shape
    unknowns = len(found.separation) * torch.Size(shape).numel()
    told = target(found.walk, unknowns)
    if told.value is found.graph.input:
        return _bounded_input(told, shape)
    trace_["searched by"] = told.value.call.name if told.value.call is not None else "the input"
    low, high = view.knowledge.get("input_range", (-2.0, 2.0))
    middle, scale = (low + high) / 2, (high - low) / 4
    below = section(found.graph, found.graph.input, told.value)
    smooth = normed(below)

    def begin(count: int) -> Tensor:
        drawn: Tensor = middle + scale * (blurred if smooth else noisy)((count, *shape), rng)
        return drawn

    search = Search(below, told, scale, begin, SHARES[1:], rng, few=told.equations < unknowns <= MOST_SKETCHED)
    steps = LONGER * steps if smooth and not search.few else steps
    fixed = _fixed_norms(view, found, told)
    answer = None
    if fixed is not None:
        trace_["batch statistics"] = "by the running averages that were sent"
        own = replace(search, below=fixed.below, shaken=fixed.shaken)
        answer = own.sought(steps, attempts, None)
    if answer is None or not bool(answer.done.any()):
        back = _back(found, told, below, view.update, float(torch.finfo(view.obs.dtype).eps))
        answer = search.sought(steps, attempts, back)
    if bool(answer.done.any()):
        trace_["misfit"], trace_["noise"] = answer.left_over, answer.noise
    return answer.inputs, answer.bounds


def _fixed_norms(view: View, found: WayDown, told: Told) -> FixedNorms | None:
    """The network below a known tensor with the batch's own statistics, if running averages after the step were sent."""
    sent = view.knowledge.get("buffers")
    if not sent or told.rows is not None or view.protocol.mode != "train":
        return None
    return fixed_norms(found.graph, told.value, dict(view.model.named_buffers()), sent, len(found.separation))


def _back(found: WayDown, told: Told, below: nn.Module, update: Mapping[str, Tensor], eps: float) -> Back | None:
    """The gradients of the parameters below a tensor and nowhere else, where what came back to it is known."""
    if told.value not in found.walk.deltas:
        return None
    graph = found.graph
    above = {
        name for call in graph.calls if call not in between(graph, graph.input, told.value) for name in call.parameters
    }
    named = {**graph.names(), **{id(p): name for call in graph.calls for name, p in _own(call)}}
    own = {name: named.get(id(parameter), "") for name, parameter in below.named_parameters()}
    seen = {name: update[sent].double() for name, sent in own.items() if sent in update and sent not in above}
    seen = {name: gradient for name, gradient in seen.items() if bool(gradient.any())}
    delta = found.walk.deltas[told.value].detach().reshape(told.shape[0], *told.value.shape[1:])
    anywhere = torch.randn(len(delta), *graph.input.shape[1:], generator=torch.Generator().manual_seed(0))
    back = Back(below, delta, seen, eps).weighed(anywhere.to(delta))
    return back if back.seen else None


def _own(call: Call) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of a module that ran, by the network's names."""
    if isinstance(call.ran, nn.Module):
        yield from call.ran.named_parameters(prefix=call.name)


def target(down: Walk, unknowns: int) -> Told:
    """Which tensor's equations the inputs are searched by: that with most of them, of the shallower if they are as good.

    Known tensors go before equations that mix the examples, if they have enough for all unknowns: then each example is
    searched for by itself; of these, tensors that are known to four digits before others. Equations that nothing checks
    may follow from a mask that was decided wrongly.
    """
    sure = [told for told in down.told if told.checked and told.blur < LARGEST_RADIUS] or down.told[:1]
    known = [told for told in sure if told.rows is None and told.equations >= ALONE * unknowns]
    known = [told for told in known if float(told.noise.norm()) < CLEAR * float(told.seen.norm())] or known
    most = max(told.equations for told in known or sure)
    return [told for told in known or sure if told.equations >= AS_GOOD * most][-1]


def _bounded_input(told: Told, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Inputs that the way down reached itself."""
    n = told.shape[0]
    if told.rows is not None:
        return torch.zeros(n, *shape, dtype=torch.float64), torch.full((n,), torch.inf, dtype=torch.float64)
    x = told.seen.reshape(n, *shape)
    far = ERROR_SIGMAS * (
        told.noise.reshape(n, -1).norm(dim=1) / x.flatten(1).norm(dim=1).clamp_min(1e-300) + told.blur
    )
    far = torch.where(far < LARGEST_RADIUS, far, torch.inf)
    return x, far.cpu()


def _row(told: Told) -> dict[str, Any]:
    call = told.value.call
    return {
        "tensor": call.name if call is not None else "the input",
        "known": told.rows is None,
        "equations": told.equations,
        "unknowns": int(torch.Size(told.shape).numel()),
        "condition": told.condition,
        "misfit": told.misfit,
    }
