"""Descent: the inputs of a batch, by way of an inner layer at which its examples can be told apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unbatch.errors import NotApplicable, UnbatchError
from unbatch.inversion.descent.above import Above, at_own_scale, known_above, labels_sent
from unbatch.inversion.descent.pictures import Answers, Back, Misfit, newton, searched
from unbatch.inversion.descent.places import WindowLayer, at_cuts, places, rectified
from unbatch.inversion.descent.separation import ToldApart, separated, span
from unbatch.inversion.descent.walk import Told, Walk, told_by, walk
from unbatch.inversion.view import View
from unbatch.network.graph import Graph
from unbatch.network.precision import in_double
from unbatch.network.sections import section
from unbatch.network.tracing import trace
from unbatch.numerics.bounds.first_order import ERROR_SIGMAS, LARGEST_RADIUS
from unbatch.progress import tick
from unbatch.reconstruction import Reconstruction

LARGEST_HEAD_MISFIT = 1e-3  # relative, of the head's gradient: beyond it the maps or their scales are wrong
POLISHES = 10  # of the separated maps
SURELY = 10.0  # times the error, above which an entry is positive that was zero in the span's cone
SLOWEST = 0.85  # share of their error that a turn may leave
CLIENT_ROUNDINGS = 4  # of the update's type, by which the client's own arithmetic is off
ENOUGH = 2.0  # equations an unknown, at which no other layer is tried
AS_GOOD = 0.4  # share of the most equations that a shallower tensor may have
FOUND = 2e-2  # misfit, relative, of absolute values, below which a search has found its valley
NOISES = 10.0  # times the equations' own noise that may be left over
DRAWS = 2  # of the equations' noise, which show how far it moves the inputs
RESPONSE_TOLERANCES = 1e-3, 1e-5, 1e-6  # of the linear systems that show it, relative: the next where a probe is lost
RESPONSE_PRODUCTS = 640  # with the Jacobian, at most
COARSEST = 1e-6  # rounding of an update, relative, from which something is claimed
LOST_SHARE = 0.05  # of a random direction that the equations may fail to give back
SHARES = 0.3, 0.4, 0.8  # of the work that is done after separation, walk and search


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
        raise NotApplicable("the update is of local steps, which mix the gradients of several weights.")
    if float(view.knowledge.get("noise", 0.0)) > 0:
        raise NotApplicable(
            "a defence's noise fills the span of every layer's gradient, so that none counts its examples."
        )
    shape, trace_ = view.knowledge.input_shape, dict[str, Any]()
    found = _descent(view, rng, trace_)
    if found is None:
        return Reconstruction(inputs=torch.zeros(0, *shape), bound=torch.zeros(0), trace=trace_)
    labels = labels_sent(view, found.graph, found.head, found.above)
    trace_["labels"] = "not told" if labels is None else "told by the head"
    inputs, bound = _pictures(view, found, rng, trace_, steps=steps, attempts=attempts)
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
        found = separated(place, place.flat(update[place.weight]), eps, rng, lambda: tick(SHARES[0] / 2), mixed=mixed)
        if found is None:
            continue
        if found.missed:
            tried.append(f"{place.call.name}: {len(found)} of {len(found) + found.missed} examples")
            continue
        readers = [each for each in every if each.given is place.given]
        maps = at_own_scale(graph, found, head, update, mixed=mixed)
        up, error = _polished(graph, readers, maps, head, update, eps, found.error)
        if not up.misfit < LARGEST_HEAD_MISFIT:
            tried.append(f"{place.call.name}: the head's gradient is {up.misfit:.1e} off")
            continue
        tick(SHARES[0])
        down = walk(graph, every, place.given, up.maps, up.delta, update, eps, error)
        told, unknowns = target(down), len(found) * torch.Size(view.knowledge.input_shape).numel()
        if best is None or told.equations > target(best.walk).equations:
            best = WayDown(graph, head, found, up, down)
        if told.equations >= ENOUGH * unknowns:
            break
    if best is None:
        trace_["stopped"] = "; ".join(tried) or "no layer's gradient has the rank of a few examples times its windows."
        return None
    trace_ |= {
        "layer": best.separation.place.call.name,
        "examples": len(best.separation),
        "head misfit": best.above.misfit,
    }
    trace_["equations"] = [_row(told) for told in best.walk.told]
    trace_["stops"] = best.walk.stops
    return best


def _polished(
    graph: Graph,
    readers: list[WindowLayer],
    maps: Tensor,
    head: WindowLayer,
    update: Mapping[str, Tensor],
    eps: float,
    error: float,
) -> tuple[Above, float]:
    """What is known above the maps, and their relative error, once they are solved for again by the layers that read them.

    With what came back to these layers known, their gradients are linear in the maps, with more equations than unknowns:
    the rounding that the span's weakest directions suffered averages out. What is zero in the span's cone stays zero. What
    came back is only as good as the maps: each turn leaves a share of their error, and the moves tell which.
    """
    up, moved, share = known_above(graph, readers, maps, head, update), error, 0.5
    for turn in range(POLISHES):
        told = told_by(readers[0].given, readers, up.deltas, update, eps, 0.0)
        if told is None or told.rows is not None:
            break
        held = told.seen.view_as(up.maps)
        positive = (maps > 0) | (held > SURELY * error * held.square().mean().sqrt())
        held = torch.where(positive, torch.where(held > 0, held, maps), 0.0)
        other = known_above(graph, readers, held, head, update)
        if not other.misfit < up.misfit:
            break
        before, moved = moved, float((held - up.maps).norm() / held.norm())
        share = min(max(share, moved / before), SLOWEST) if turn else share
        up, error = other, float(told.noise.norm() / told.seen.norm()) + moved * share / (1 - share)
    return up, max(error, CLIENT_ROUNDINGS * eps)


def candidates(graph: Graph, every: list[WindowLayer], update: Mapping[str, Tensor], eps: float) -> list[WindowLayer]:
    """The layers at which a batch may be told apart, those of least rank first, of equal ones that nearest the input.

    Everything goes through their inputs, and their gradient's rank is below what it can be, or just that. A dense layer
    whose rank is all that it can be comes last: its batch may be larger, and mixtures of examples pass for them.
    """
    whole, ranks = {value for value in at_cuts(graph) if rectified(value)}, list[tuple[bool, int, WindowLayer]]()
    for place in every:
        if place.given not in whole or not place.plain or place.given is graph.input or place.weight not in update:
            continue
        if place.positions <= place.limit:
            rank = len(span(place.flat(update[place.weight]), eps))
            full = place.dense and rank >= place.limit - (
                place is every[-1]
            )  # what is sent to classes may add up to zero
            ranks.append((full, rank, place))
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
    n, shape = len(found.separation), view.knowledge.input_shape
    nothing = torch.full((n,), torch.inf, dtype=torch.float64)
    told = target(found.walk)
    if told.value is found.graph.input:
        return _bounded_input(told, shape)
    trace_["searched by"] = told.value.call.name if told.value.call is not None else "the input"
    misfit = Misfit(section(found.graph, found.graph.input, told.value), told)
    back = _back(found, told, misfit.below, view.update)
    low, high = view.knowledge.get("input_range", (-2.0, 2.0))
    middle, scale = (low + high) / 2, (high - low) / 4
    single, best, x = misfit.single(), torch.inf, torch.zeros(n, *shape)
    for attempt in range(attempts):
        start = middle + 0.1 * scale * torch.randn(n, *shape, generator=rng)
        count = steps * 2**attempt
        helped = back if attempt else None  # it takes three times as long
        value, point = torch.inf, start.to(told.seen.device)
        search = searched(single, point, scale, steps=count, back=helped)
        for step, (value, point) in enumerate(search):  # noqa: B007
            if not tick(SHARES[1] + (SHARES[2] - SHARES[1]) * step / count, value):
                break
        if value < best:
            best, x = value, point.clone()
        if not value < FOUND:
            continue
        noise = float(told.noise.norm() / told.seen.norm())
        steps_left = newton(misfit, point.double())
        size, point = torch.inf, point.double()
        for size, point in steps_left:  # noqa: B007
            if not tick(SHARES[2], size) or size <= noise:
                break
        trace_["misfit"], trace_["noise"] = size, noise
        if size <= NOISES * noise:
            return point, _bound(misfit, told, point, size / noise, rng)
        if not tick(SHARES[2], size):
            break
    return x.double(), nothing


def _back(found: WayDown, told: Told, below: nn.Module, update: Mapping[str, Tensor]) -> Back | None:
    """The gradients of the weights below a tensor, where what came back to it is known."""
    if told.value not in found.walk.deltas:
        return None
    names = {id(place.layer.weight): place.weight for place in places(found.graph) if place.weight in update}
    own = {name: update[names[id(weight)]] for name, weight in below.named_parameters() if id(weight) in names}
    own = {name: gradient for name, gradient in own.items() if bool(gradient.any())}
    delta = found.walk.deltas[told.value].detach().reshape(told.shape[0], *told.value.shape[1:])
    return Back(below, delta, own) if own else None


def target(down: Walk) -> Told:
    """Which tensor's equations the inputs are searched by: that with most of them, of the shallower if they are as good.

    Equations that nothing checks may follow from a mask that was decided wrongly.
    """
    sure = [told for told in down.told if told.checked]
    most = max(told.equations for told in sure)
    return [told for told in sure if told.equations >= AS_GOOD * most][-1]


def _bound(misfit: Misfit, told: Told, x: Tensor, excess: float, rng: torch.Generator) -> Tensor:
    """The largest relative error of each input [n], from how far the equations' noise moves it; inf where that is open."""
    answers = Answers(misfit, x)

    def drawn(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=rng, dtype=torch.float64).to(like)

    probe, moves = drawn(x), list[Tensor]()
    seen, lost, tolerance = answers.exact(probe), torch.ones(len(x)), RESPONSE_TOLERANCES[0]
    for tolerance in RESPONSE_TOLERANCES:
        back = answers(seen, products=RESPONSE_PRODUCTS, tolerance=tolerance) - probe
        lost = back.flatten(1).norm(dim=1) / probe.flatten(1).norm(dim=1)
        if bool((lost < LOST_SHARE).all()):
            break

    def answer(r: Tensor) -> Tensor:
        return answers(r, products=RESPONSE_PRODUCTS, tolerance=tolerance).flatten(1)

    unit = float(told.noise.norm())
    for _ in range(DRAWS):
        moves.append(answer((drawn(told.noise) * told.noise / unit).flatten()) * unit / misfit.size)
    off = misfit(x).detach()
    left = answer(off / off.norm()) * float(off.norm())
    spread = torch.stack(moves).square().sum(2).mean(0).sqrt()
    far = (
        ERROR_SIGMAS * max(1.0, excess) * spread
        + 2 * left.norm(dim=1)
        + torch.finfo(torch.float64).eps * x.flatten(1).norm(dim=1)
    )
    relative = far / x.flatten(1).norm(dim=1).clamp_min(1e-300)
    return torch.where((lost < LOST_SHARE) & (relative < LARGEST_RADIUS), relative, torch.inf).cpu()


def _bounded_input(told: Told, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Inputs that the way down reached itself."""
    n = told.shape[0]
    if told.rows is not None:
        return torch.zeros(n, *shape, dtype=torch.float64), torch.full((n,), torch.inf, dtype=torch.float64)
    x = told.seen.reshape(n, *shape)
    far = ERROR_SIGMAS * told.noise.reshape(n, -1).norm(dim=1) / x.flatten(1).norm(dim=1).clamp_min(1e-300)
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
