"""Above: the scales of told-apart maps, the labels, and what came back to their layer, from the layers above it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from unbatch.errors import NotApplicable
from unbatch.inversion.descent.masks_above import ROUNDS, contradicted, listening, relus
from unbatch.inversion.descent.places import WindowLayer
from unbatch.inversion.descent.separation import ToldApart
from unbatch.inversion.view import View
from unbatch.network.graph import Graph, Value
from unbatch.network.operations import layer_of
from unbatch.network.precision import loss_value
from unbatch.network.sections import between, section
from unbatch.numerics.bounds.first_order import ERROR_SIGMAS

GRID = -2.0, 5.0, 36  # of scales, exponents of 10 and number
FINEST = 1e-3  # spacing of the grid, relative, at which the search ends
SECANTS = 8
TOLD = 1e-9  # of a share that may be left at the right scale
POLISHES = 4
NUDGE = 1e-6  # of a scale, relative, that shows how the head's gradient depends on it
NUDGES = 1e-3  # the same for what came back to a layer, which norms make less of
SWAMPED = 2.0  # times what is left over, below which a difference says nothing
# One sigma of an example's scale, in units of the largest error that the norm of what is left over allows: roundings do not
# average out over the equations, since a norm's statistic is rounded once for all that it divides.
ALONG = 2.0 / ERROR_SIGMAS
SCALE_ROUNDINGS = 4.0  # of the update's type, the least sigma of a scale
FELT = 1e-3  # singular value of that dependence, above which it is used
SILENT = 1e-10  # singular value of the head's gradient over the largest, below which a direction was sent nothing
SHIFTED = 100.0  # times the maps' error, by which a scale may be mended
IMPOSSIBLE = 1e-3  # by which a probability may leave [0, 1]
WHOLE = 0.05  # by which an example's count may differ from a whole number, relative
SURE_COSINE = 1e-4  # by which the gradient of a label may be turned from what was sent back


@dataclass(frozen=True, eq=False)
class Above:
    """What is known at a layer's input for every example of the batch.

    maps [n, *shape] are the inputs, delta [n, *shape] the gradient that came back to them, deltas that to the outputs
    of the layers that read them, sent [n, k] that to the network's last dense layer's outputs; misfit says how well its
    weight's gradient agrees, relative.
    """

    maps: Tensor
    delta: Tensor
    deltas: dict[Value, Tensor]
    sent: Tensor
    last: Tensor  # those outputs
    misfit: float


def known_above(
    graph: Graph,
    readers: Sequence[WindowLayer],
    maps: Tensor,
    head: WindowLayer,
    update: Mapping[str, Tensor],
    flips: Mapping[Value, Tensor] | None = None,
) -> Above:
    """Runs the network from what some layers read to its head, and back with what the head's gradient says was sent.

    dL/dW = sum_i sent_i f_i^T and dL/db = sum_i sent_i are linear in what was sent, once the features f are known. No label
    enters. `readers` are the layers that read `maps`; `flips` says of what ReLUs gave where their masks are the other way.
    """
    given = readers[0].given
    features = maps if head in readers else section(graph, given, head.given)(maps).detach()
    sides, seen = [features], [update[head.weight].T]
    if head.bias in update:
        sides.append(torch.ones_like(features[:, :1]))
        seen.append(update[head.bias][None])  # type: ignore[index]
    sent = torch.linalg.lstsq(torch.cat(sides, 1).T, torch.cat(seen)).solution  # [n, k]
    off = update[head.weight] - sent.T @ features
    misfit = float(off.norm() / update[head.weight].norm().clamp_min(1e-300))
    at, whole = maps.detach().requires_grad_(), section(graph, given, head.gave)
    every = [reader.call for reader in readers]
    turned = relus(graph, given, head.gave) if flips else []
    with torch.enable_grad(), listening(whole, every) as heard, listening(whole, turned, flips):
        last = whole(at)
        delta, *deltas = torch.autograd.grad(last, [at, *heard.gave.values()], sent)
    return Above(maps, delta, dict(zip(heard.gave, deltas, strict=True)), sent, last.detach(), misfit)


def flips_above(
    graph: Graph,
    every: Sequence[WindowLayer],
    up: Above,
    given: Value,
    head: WindowLayer,
    update: Mapping[str, Tensor],
    error: float,
) -> dict[Value, Tensor]:
    """Of what ReLUs above a tensor gave, the entries [n, ...] whose masks its relative `error` decides wrongly.

    An entry next to zero is on either side of it, and a wrong one turns what comes back to all layers below by the root of
    one over their entries. The gradients of the layers above contradict it, in one channel each: from the head downwards.
    """
    calls, flips = between(graph, given, head.gave), dict[Value, Tensor]()
    above = [p for p in every if p.call in calls and p is not head and p.plain and p.weight in update]
    own = relus(graph, given, head.gave)
    for _ in range(ROUNDS if above and own else 0):
        whole = section(graph, given, head.gave)
        listened = [*(place.call for place in above), *own]
        with torch.enable_grad(), listening(whole, listened, flips) as heard:
            last = whole(up.maps.detach().requires_grad_())
            found = torch.autograd.grad(last, list(heard.gave.values()), up.sent, retain_graph=True)
        wrong = contradicted(graph, above, heard, dict(zip(heard.gave, found, strict=True)), update, error)
        if wrong is None:
            break
        relu, mask = wrong
        flips[relu] = flips[relu] ^ mask if relu in flips else mask
    return flips


def at_own_scale(
    graph: Graph, found: ToldApart, head: WindowLayer, update: Mapping[str, Tensor], *, mixed: bool = False
) -> Tensor:
    """The maps [n, *shape] at their own scale, from the gradient of a shift behind the layer or else what it was sent back.

    A shift that every window of a channel gets has the gradient sum over examples and windows of delta, and delta is share
    over scale, which is linear in one over the scales. Behind the layer such a shift is its own bias, or that of batch norm
    with fixed statistics. Where there is none, or with `mixed`, see `scales_by_share`.
    """
    want = None if mixed else _shift(graph, found.place, update)
    if want is None:
        scales = scales_by_share(graph, found, head, update, mixed=mixed)
    else:
        scales = 1 / torch.linalg.lstsq(found.shares.sum(2).T, want[:, None]).solution[:, 0]
    return _at(found, scales)


def _at(found: ToldApart, scales: Tensor) -> Tensor:
    maps = found.maps * scales.view(-1, *[1] * (found.maps.ndim - 1))
    return maps.reshape(-1, *found.place.given.shape[1:])


def rescaled(
    graph: Graph, readers: Sequence[WindowLayer], up: Above, update: Mapping[str, Tensor], error: float
) -> Tensor:
    """The maps [n, *shape] with the scales that the shifts behind the layers that read them tell, as `at_own_scale` has it.

    Weight gradients do not tell scales: with maps s times as large and deltas as much smaller they are the same. A scale is
    left as it is where it would move by more than a hundred times the maps' `error`.
    """
    told = [(reader, want) for reader in readers if (want := _shift(graph, reader, update)) is not None]
    if not told:
        return up.maps
    sums = [up.deltas[reader.gave].reshape(len(up.maps), len(want), -1).sum(2).T for reader, want in told]
    found = torch.linalg.lstsq(torch.cat(sums), torch.cat([want for _, want in told])[:, None]).solution[:, 0]
    sure = (found - 1).abs() < SHIFTED * error
    return up.maps / torch.where(sure, found, 1.0).view(-1, *[1] * (up.maps.ndim - 1))


def scales_by_share(
    graph: Graph, found: ToldApart, head: WindowLayer, update: Mapping[str, Tensor], *, mixed: bool = False
) -> Tensor:
    """The factor of each example's map [n], by what the layers above would send back to it.

    Example i sent back delta = share / s. Run with s times its map, the layers above send back a sum over the directions
    that the head's gradient spans, with coefficients that least squares find: one unknown s an example is left, searched
    for on a grid and then by secants. Layers blind to scales but for the eps of a norm tell it in float64 all the same.

    `mixed`: the layer's outputs go into batch norm in train mode. What came back sums to zero over the batch then, which
    tells the scales but for one factor; that is searched for in the same way, with all examples at once.
    Raises NotApplicable: the layer is the head itself.
    """
    if found.place is head:
        raise NotApplicable(
            f"the head {head.call.where} has no bias, whose gradient would tell the scales of the examples."
        )
    directions = _spoken(update[head.weight])
    made = section(graph, found.place.given, head.gave)
    ratios = torch.ones(len(found)).to(found.maps)
    if mixed:
        silent = torch.linalg.svd(found.shares.sum(2).T)[2][-1]  # what times the shares sums to zero in every channel
        ratios = 1 / silent.abs().clamp_min(1e-300) if len(found) > 1 else ratios
        ratios = ratios / ratios.mean()

    def left(s: Tensor) -> Tensor:
        return _left(made, found, directions, s * ratios, mixed)

    grid = torch.logspace(*GRID, dtype=torch.float64).to(found.maps)
    sizes = torch.stack([left(s.expand(1 if mixed else len(found))).norm(dim=1) for s in grid])
    best, low = grid[sizes.argmin(0)], sizes.amin(0)
    width = float(grid[1] / grid[0])
    while width > 1 + FINEST:
        for power in (-1.0, -0.5, 0.5, 1.0):
            other = best * width**power
            size = left(other).norm(dim=1)
            best, low = torch.where(size < low, other, best), torch.minimum(size, low)
        best, low = _secants(left, best, low, width - 1)
        width = width**0.5
        if bool((low < TOLD).all()):
            break
    return _by_head(graph, found, head, update, _secants(left, best, low, FINEST)[0] * ratios)


def scale_blur(
    graph: Graph,
    found: ToldApart,
    maps: Tensor,
    head: WindowLayer,
    update: Mapping[str, Tensor],
    eps: float,
    *,
    mixed: bool = False,
) -> float:
    """By how much the scales of the maps [n, *shape] may be off, relative: the largest over the examples, one sigma.

    0 where a shift tells them (`at_own_scale`): they are as good as the maps then. Else what the equations leave over, by
    how much the scales move them: norms are blind to scales but for their eps. Of what came back to the layer and of the
    head's gradient the better counts. All that is left over may lie along the scale (`ALONG`), and no scale is known
    better than the update's rounding `eps`.
    """
    if found.place is head or (not mixed and _shift(graph, found.place, update) is not None):
        return 0.0
    windows = found.place.windows()
    patches = windows.rows(maps.reshape(len(maps), *windows.shape)).flatten(0, 1)
    G = found.place.flat(update[found.place.weight])
    shares = torch.linalg.lstsq(patches.T, G.T).solution.view(len(maps), len(windows), -1).transpose(1, 2)
    own = replace(found, maps=maps.reshape(found.maps.shape), shares=shares)
    made, directions = section(graph, found.place.given, head.gave), _spoken(update[head.weight])
    ones = torch.ones(len(maps)).to(maps)
    rest, *moved = (_left(made, own, directions, ones * (1 + step), mixed) for step in (0.0, NUDGES, -NUDGES))
    sizes = rest.norm(dim=1)
    felt = ((moved[0] - moved[1]).norm(dim=1) / 2 - SWAMPED * sizes).clamp_min(0.0) / NUDGES
    blur = float((sizes / felt).max())
    left, J = _head_slope(graph, own, head, update, ones)
    least = float(torch.linalg.svdvals(J)[-1])
    by_head = float(left.norm()) / least if least > FELT else torch.inf
    return max(ALONG * min(blur, by_head), SCALE_ROUNDINGS * eps)


def _spoken(G: Tensor) -> Tensor:
    """The directions of outputs [k, outputs] in which the head was sent something."""
    U, S, _ = torch.linalg.svd(G, full_matrices=False)
    found: Tensor = U[:, S > SILENT * S[0]].T
    return found


def _head_slope(
    graph: Graph, found: ToldApart, head: WindowLayer, update: Mapping[str, Tensor], scales: Tensor
) -> tuple[Tensor, Tensor]:
    """What the features leave of the head's gradient [e], relative, and its derivatives by log scales [e, n]."""
    made, G = section(graph, found.place.given, head.given), update[head.weight]

    def left(s: Tensor) -> Tensor:
        Q: Tensor = torch.linalg.qr(made(_at(found, s)).detach().T).Q
        rest: Tensor = (G - (G @ Q) @ Q.T) / G.norm()
        return rest.flatten()

    rest = left(scales)
    moved = (left(scales * (1 + NUDGE * row)) for row in torch.eye(len(scales)).to(scales))
    return rest, torch.stack([(other - rest) / NUDGE for other in moved], 1)


def _by_head(graph: Graph, found: ToldApart, head: WindowLayer, update: Mapping[str, Tensor], scales: Tensor) -> Tensor:
    """Scales [n] to the last digit by Gauss and Newton on the head's gradient, where its features depend on them."""
    for _ in range(POLISHES):
        rest, J = _head_slope(graph, found, head, update, scales)
        if not float(torch.linalg.svdvals(J)[-1]) > FELT:
            break
        new = scales * (1 - torch.linalg.lstsq(J, rest[:, None]).solution[:, 0])
        if not float(_head_slope(graph, found, head, update, new)[0].norm()) < float(rest.norm()):
            break
        scales = new
    return scales


def _secants(left: Callable[[Tensor], Tensor], best: Tensor, low: Tensor, gap: float) -> tuple[Tensor, Tensor]:
    """Steps to where what is left vanishes, along the line through the last two points."""
    before, at = best * (1 + 0.1 * gap), best
    rest = left(before), left(at)
    for _ in range(SECANTS):
        slope = (rest[1] - rest[0]) / (at - before)[:, None]
        move = -(rest[1] * slope).sum(1) / slope.square().sum(1).clamp_min(1e-300)
        before, at = at, at + torch.minimum(torch.maximum(move, -0.3 * at), 0.3 * at)
        at = torch.where(at == before, at * (1 + torch.finfo(at.dtype).eps), at)
        rest = rest[1], left(at)
        size = rest[1].norm(dim=1)
        best, low = torch.where(size < low, at, best), torch.minimum(size, low)
    return best, low


def _left(made: nn.Module, found: ToldApart, directions: Tensor, s: Tensor, mixed: bool) -> Tensor:
    """What no sum of the directions explains of each example's share [n, e], relative, with its map s times as large.

    With `mixed` of all shares together [1, n e].
    """
    place, n = found.place, len(found)
    maps = _at(found, s)
    nothing = maps.new_zeros(n, *place.gave.shape[1:]).requires_grad_()
    listening = made.get_submodule(place.call.name).register_forward_hook(lambda _, __, output: output + nothing)
    with torch.enable_grad():
        last = made(maps)
    listening.remove()
    sent = [d.expand_as(last) for d in directions]
    if mixed:
        sent = [e[:, None] * d for d in directions for e in torch.eye(n).to(d)]
    backs = [torch.autograd.grad(last, nothing, cotangent, retain_graph=True)[0].flatten(1) for cotangent in sent]
    A = torch.stack(backs, 2) * s.view(-1, 1, 1)  # [n, e, k]
    want = found.shares.flatten(1)[..., None]
    if mixed:
        A, want = A.flatten(0, 1)[None], want.flatten(0, 1)[None]
    Q: Tensor = torch.linalg.qr(A).Q
    rest: Tensor = (want - Q @ (Q.transpose(1, 2) @ want)) / want.norm(dim=1, keepdim=True)
    return rest[..., 0]


def _shift(graph: Graph, place: WindowLayer, update: Mapping[str, Tensor]) -> Tensor | None:
    """The sum of what came back to the layer's outputs [c_out]."""
    if place.bias in update:
        return update[place.bias]  # type: ignore[index]
    for call in graph.calls:
        if place.gave not in call.given or not isinstance(
            norm := layer_of(call, place.gave), nn.BatchNorm2d | nn.BatchNorm1d
        ):
            continue
        name = f"{call.name}.bias" if isinstance(call.ran, nn.Module) else graph.names().get(id(norm.bias), "")
        if norm.training or norm.running_var is None or name not in update:
            continue
        slope = (norm.running_var + norm.eps).rsqrt()
        slope = slope if norm.weight is None else slope * norm.weight
        return update[name] * slope.detach()
    return None


def labels_sent(view: View, graph: Graph, head: WindowLayer, found: Above) -> Tensor | None:
    """The labels [n, ...] with which the loss sends this back to the head's outputs; None where none does.

    Each class is tried for all examples, then rows of probabilities, then real numbers that enter one by one.
    """
    sent = _sender(view, graph, head, found)
    for labels in _candidates(view, found, sent):
        if float((sent(labels) - found.sent).norm()) <= SURE_COSINE * float(found.sent.norm()):
            return labels
    return None


def most_times(view: View, graph: Graph, head: WindowLayer, found: Above) -> Tensor:
    """How many examples of the batch each of those found can stand for [n], at most.

    What was sent for one, over what the loss sends for it under its label, is how much it counts. In a batch of known size
    these are shares of it; of a size that is not known as few examples are taken to be behind the gradient as explain it.
    Real targets do not tell it, nor do counts that are no whole numbers; where rows that are no probabilities would take
    the place of classes, near copies may have had different ones.
    """
    n, sent = view.knowledge.get("batch_size"), _sender(view, graph, head, found)
    once = torch.ones(len(found.last), dtype=torch.int64)
    rest = once if n is None else once * max(n - len(once) + 1, 1)
    every = view.labels.every(found.last.new_zeros(()))
    if not every:
        return rest
    tried = torch.stack([sent(y.expand(len(once), *y.shape[1:])) for y in every])  # [k, n, c]
    turned, which = torch.cosine_similarity(tried, found.sent[None], dim=2).nan_to_num(-1.0).max(0)
    if not bool((turned > 1 - SURE_COSINE**2).all()):
        return rest.clamp_min(2) if _impossible(view, found) else rest
    own = tried[which, torch.arange(len(once))]
    counts = ((own * found.sent).sum(1) / own.square().sum(1)).cpu()
    counts = counts / counts.min() if n is None else counts * n / counts.sum()
    whole = counts.round().clamp_min(1)
    return whole.long() if bool(((counts - whole).abs() < WHOLE * whole).all()) else rest.clamp_min(2)


def _impossible(view: View, found: Above) -> bool:
    """Whether what was sent takes rows of class probabilities of which some are outside [0, 1]."""
    if view.labels.kind != "class" or not view.labels.rows or not view.labels.sloped:
        return False
    rows = _rows(view, found)
    return bool((rows < -IMPOSSIBLE).any() or (rows > 1 + IMPOSSIBLE).any())


def _rows(view: View, found: Above) -> Tensor:
    """The rows of class probabilities [n, k] under which the loss sends what was sent."""
    scale = view.form.scale if view.form is not None and view.form.reduction != "mean" else 1 / len(found.last)
    return found.last.softmax(1) - found.sent / scale


def _sender(view: View, graph: Graph, head: WindowLayer, found: Above) -> Callable[[Tensor], Tensor]:
    """What the loss sends back to the head's outputs [n, k] under labels [n, ...]."""
    tail = None if head.gave is graph.output else section(graph, head.gave, graph.output)

    def sent(labels: Tensor) -> Tensor:
        at = found.last.detach().requires_grad_()
        with torch.enable_grad():
            outputs = at if tail is None else tail(at)
            (back,) = torch.autograd.grad(loss_value(view.loss, outputs, labels), at)
        return back

    return sent


def _candidates(view: View, found: Above, sent: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
    last, n, form = found.last, len(found.last), view.labels
    every = form.every(last.new_zeros(()))
    if every:
        turned = [torch.cosine_similarity(sent(y.expand(n, *y.shape[1:])), found.sent) for y in every]
        yield torch.cat([every[int(k)] for k in torch.stack(turned).nan_to_num(-1.0).argmax(0)])
    if form.kind == "class" and form.rows and form.sloped:
        yield _rows(view, found)
    if form.kind != "class" and not form.whole and form.sloped:
        zero, one = (sent(last.new_full((n, *form.shape), value)) for value in (0.0, 1.0))
        yield ((found.sent - zero) / (one - zero)).reshape(n, *form.shape)
