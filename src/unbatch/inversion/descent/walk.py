"""Walk: from an inner tensor that is known for the whole batch down towards the input, one linear system a layer."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor, nn

from unbatch.errors import NotApplicable
from unbatch.inversion.descent.above import ALONG
from unbatch.inversion.descent.hidden import alone_at_zero, least_is_positive, shift_before
from unbatch.inversion.descent.implicit import Reader, Seen, sides, solved_around
from unbatch.inversion.descent.masks import NEAR_ZERO, flipped, pursued
from unbatch.inversion.descent.masks_above import ADDS
from unbatch.inversion.descent.places import WindowLayer
from unbatch.network.graph import Call, Graph, Value
from unbatch.network.operations import AffineOperation, Operation, Reshape, layer_of
from unbatch.network.sections import between, section
from unbatch.numerics.elementwise import inverted, slope
from unbatch.numerics.trimming import trimmed
from unbatch.numerics.windows.weight_equations import weight_equations

CONTRADICTS = 100.0  # roundings of a system's right side, beyond which some mask is wrong
LOST, LOST_ERRORS = 2e-10, 30.0  # of the largest singular value, or of the start's error: equations below say nothing
ZERO, ZERO_SIGMAS = 1e-11, 6.0  # of the largest entry, or of its spread: behind a ReLU smaller ones are zero
CHECKED = 0.05  # of the equations, which must be more than are needed, so that a wrong one shows
SURE = 1e-10  # error of what is known, at which no mask is in doubt
RETURNS = 5  # to a ReLU, to mend its masks
LINEAR = (nn.Conv2d, nn.Linear, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Unflatten, nn.Identity, nn.ZeroPad2d)
BENT = (
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Tanh,
    nn.Sigmoid,
    nn.Softplus,
    nn.Softsign,
    nn.ELU,
    nn.CELU,
    nn.SELU,
    nn.LeakyReLU,
)
NORMS = (nn.GroupNorm, nn.LayerNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.BatchNorm1d, nn.BatchNorm2d)


@dataclass(frozen=True, eq=False)
class Late:
    """Of a tensor whose gradient depends on the tensor itself: a deeper tensor and what came back to that one."""

    value: Value
    cotangent: Tensor


@dataclass(frozen=True, eq=False)
class Left:
    """What the equations A X = B of some layers leave over."""

    U: Tensor  # [m, r], an orthonormal basis of A's columns
    B: Tensor  # [m, c]
    off: Tensor  # [m, c], by how much each equation contradicts those that are not left out
    out: Tensor  # [m], whether an equation is left out, with its output channel
    rows: dict[WindowLayer, Tensor]  # of every layer [c_out, k^2]
    units: dict[WindowLayer, float]  # of a layer's equations

    def flipped(self, place: WindowLayer, change: Tensor, inputs: Tensor, open_: Tensor) -> Tensor:
        """Which entries of the mask before a layer were decided wrongly; all [n, c_out, p] (`masks`)."""
        rows, windows, change = self.rows[place], place.windows(), change / self.units[place]
        found, wrong = torch.zeros_like(open_), self.out[rows[:, 0]]
        if bool(wrong.any()):
            off = self.off[rows[wrong]].transpose(1, 2).flatten(1)
            found[:, wrong] = flipped(off, change[:, wrong], inputs, windows, open_[:, wrong])
        if bool(found.any()):
            return found
        left = self.B - self.U @ (self.U.T @ self.B)
        return pursued(left, self.U, rows, change, inputs, windows, open_)


@dataclass(frozen=True, eq=False)
class Told:
    """Equations of one tensor [n, c, h, w] of the batch: rows . x[:, c] = seen[c], the same rows for all channels."""

    value: Value
    rows: Tensor | None  # [r, n h w], orthonormal; None: it is known
    seen: Tensor  # [c, r], or the tensor itself
    shape: tuple[int, ...]  # [n, c, h, w]
    noise: Tensor  # of `seen`, the standard deviation of what its rounding adds, as far as the equations show it
    condition: float = 1.0
    misfit: float = 0.0  # of the equations of its layers, relative
    left: Left | None = None  # of the equations of its layers, where it is known
    blur: float = 0.0  # by which the scale of a whole example may be off besides, relative, one sigma
    checked: bool = True  # there are equations enough to show a wrong one

    @property
    def equations(self) -> int:
        """How many say something: of what is zero behind a ReLU none does."""
        return int((self.seen != 0).sum()) if self.rows is None else self.seen.numel()

    def of(self, examples: list[int]) -> Told:
        """The same of some examples of a known tensor alone."""
        shape = (len(examples), *self.shape[1:])
        return replace(self, seen=self.seen[examples], noise=self.noise[examples], shape=shape, left=None)


@dataclass(eq=False)
class Walk:
    """What is found on the way down; `told` holds the equations of ever shallower tensors."""

    values: dict[Value, Tensor] = field(default_factory=dict)
    noises: dict[Value, Tensor] = field(default_factory=dict)  # of `values`
    deltas: dict[Value, Tensor] = field(default_factory=dict)
    late: dict[Value, Late] = field(default_factory=dict)
    scaled: dict[Value, Value | None] = field(default_factory=dict)  # whose scale that of a gradient goes with, if any
    told: list[Told] = field(default_factory=list)
    enough: float = float("inf")  # equations of a known tensor, with which no tensor is asked that is not determined
    stops: list[str] = field(default_factory=list)  # where the way down ends, in words
    blocked: set[Value] = field(default_factory=set)  # to which something came back that is not known
    hidden: dict[Value, Tensor] = field(default_factory=dict)  # of a ReLU's output, what is known but for a constant
    flips: dict[Value, tuple[Value, Tensor]] = field(
        default_factory=dict
    )  # a ReLU, and what its flipped masks would change

    def kept(self) -> Walk:
        """The same, to come back to."""
        held = {each.name: copy.copy(getattr(self, each.name)) for each in fields(self)}
        return Walk(**held)


def walk(
    graph: Graph,
    all_places: Sequence[WindowLayer],
    start: Value,
    maps: Tensor,
    delta: Tensor,
    update: Mapping[str, Tensor],
    eps: float,
    error: float,
    enough: float = float("inf"),
    blur: float = 0.0,
) -> Walk:
    """The walk from the tensor `start`, whose values `maps` and gradient `delta` are known up to a relative `error`.

    The scale of each example may be off by `blur` besides.

    Going through the calls backward, what came back to a call's output goes on to its inputs wherever the call's derivative
    is known: of linear layers always, of a ReLU where its output is. A layer's weight gradient then gives equations for its
    input (`weight_equations`), those of all layers that read the same tensor together. Where these are fewer than its
    unknowns, and a known tensor has `enough` equations, the way down ends: their singular values cost more than they tell.
    """
    noise = error * maps.square().mean().sqrt().expand_as(maps)
    found = Walk({start: maps}, {start: noise}, {start: delta}, scaled={start: start}, enough=enough)
    found.told.append(Told(start, None, maps, (len(maps), *start.shape[1:]), noise, blur=blur))
    readers: dict[Value, list[WindowLayer]] = {}
    for place in all_places:
        readers.setdefault(place.given, []).append(place)
    calls = [*reversed(between(graph, graph.input, start)), None]
    before: dict[Value, tuple[int, Walk]] = {}  # each ReLU's output: where the walk stood there
    left, at = dict[Value, int](), 0
    while at < len(calls):
        call, told = calls[at], len(found.told)
        for value in call.gave if call is not None else [graph.input]:
            _tell(graph, found, value, readers.get(value, []), update, eps, error)
        for relu, mended in _mended(found, eps).items() if len(found.told) > told else ():
            if left.setdefault(relu, RETURNS) > 0:
                left[relu] -= 1
                at, found = before[relu][0], before[relu][1].kept()
                found.values[relu] = mended
                found.told = [replace(each, seen=mended) if each.value is relu else each for each in found.told]
                call = calls[at]
                break
        if call is not None:
            if call.gave[0] in found.values:
                before[call.gave[0]] = at, found.kept()
                _decided(graph, found, call, update)
            _back(found, call, [value for value in call.given if value.fed])
        at += 1
    found.told = [replace(told, checked=told.checked and told.value not in found.hidden) for told in found.told]
    return found


def _tell(
    graph: Graph,
    found: Walk,
    value: Value,
    readers: list[WindowLayer],
    update: Mapping[str, Tensor],
    eps: float,
    error: float,
) -> None:
    """Finds a tensor if it is not known yet, and what came back to it through the layers that waited for it."""
    if any(place.gave in found.late for place in readers):
        if value in found.values or not _solve_late(graph, found, value, readers, update, eps):
            found.blocked.add(value)
            found.deltas.pop(value, None)
    elif value not in found.values:
        _solve(found, value, readers, update, eps, error)


def _mended(found: Walk, eps: float) -> dict[Value, Tensor]:
    """The outputs of ReLUs some of whose masks were decided wrongly, by what contradicts the tensor found last."""
    told, mended = found.told[-1], dict[Value, Tensor]()
    if told.left is None or not float(told.left.off.norm()) > CONTRADICTS * eps * float(told.left.B.norm()):
        return mended
    for place, rows in told.left.rows.items():
        if place.gave not in found.flips:
            continue
        relu, change = found.flips[place.gave]
        x, noise = found.values[relu], found.noises[relu]
        flat = len(x), rows.shape[0], -1
        change, open_ = change.reshape(flat), (x <= NEAR_ZERO * noise).reshape(flat)
        inputs = told.seen.reshape(len(x), *place.windows().shape)
        flip = told.left.flipped(place, change, inputs, open_).view_as(x)
        if bool(flip.any()):
            x = mended.get(relu, x)
            mended[relu] = torch.where(flip, torch.where(x > 0, 0.0, noise), x)
    return mended


def _decided(graph: Graph, found: Walk, call: Call, update: Mapping[str, Tensor]) -> None:
    """Says of a ReLU's output that is known but for a constant a channel whether its least entry is zero (`hidden`)."""
    gave = call.gave[0]
    if gave not in found.hidden or gave not in found.deltas:
        return
    want = shift_before(graph, gave, update)
    if want is not None:
        positive = least_is_positive(found.values[gave], found.deltas[gave], found.hidden[gave], want)
        entries = found.hidden[gave] & (found.values[gave] == 0) & positive
        found.values[gave] = torch.where(entries, found.noises[gave], found.values[gave])
        found.hidden[gave] = found.hidden[gave] & positive
    if not bool(found.hidden[gave].any()):
        found.hidden.pop(gave)


def _back(found: Walk, call: Call, fed: list[Value]) -> None:
    """What came back to a call's output, sent on to what it was given."""
    gave, blocked = call.gave[0], found.blocked
    if call.alone and gave not in blocked and _waits(found, call, fed):
        return
    sent: list[Tensor | None]
    if gave in blocked or gave not in found.deltas or not call.alone:
        sent = [None] * len(fed)
    else:
        sent = _sent(found, call, fed, found.deltas[gave])
        if None in sent:
            found.stops.append(f"the derivative of {call.where} is not known")
    for value, part in zip(fed, sent, strict=True):
        if part is None or value in blocked:
            blocked.add(value)
            found.deltas.pop(value, None)
        else:
            _add(found, value, part, found.scaled.get(gave))
    layer = layer_of(call, fed[0])
    if isinstance(layer, nn.ReLU) and gave in found.values and gave in found.deltas:
        found.flips[fed[0]] = gave, found.deltas[gave] * (1 - 2 * (found.values[gave] > 0).double())
    elif gave in found.flips and (
        call.ran in ADDS or isinstance(layer, nn.BatchNorm2d | nn.BatchNorm1d | AffineOperation)
    ):
        relu, change = found.flips[gave]
        for value, part in zip(fed, _sent(found, call, fed, change), strict=True):
            if part is not None:
                found.flips[value] = relu, part


def _add(found: Walk, value: Value, part: Tensor, scaled: Value | None) -> None:
    """One more part of what came back to a tensor."""
    alike = value not in found.deltas or found.scaled.get(value) is scaled
    found.deltas[value] = found.deltas[value] + part if value in found.deltas else part
    found.scaled[value] = scaled if alike else None


def _waits(found: Walk, call: Call, fed: list[Value]) -> bool:
    """Whether a call's derivative depends on a tensor that is not known yet, but will be; then it is kept for later."""
    gave = call.gave[0]
    if len(fed) != 1:
        return False
    layer = layer_of(call, fed[0])
    if gave in found.late:
        return type(layer) in (nn.Conv2d, nn.Linear)
    fixed = isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d) and not layer.training and layer.running_var is not None
    if fixed or not isinstance(layer, NORMS) or gave not in found.deltas or fed[0] in found.deltas:
        return False
    made_by = None if fed[0].call is None else layer_of(fed[0].call, fed[0].call.given[0])
    if type(made_by) not in (nn.Conv2d, nn.Linear):
        return False
    found.late[fed[0]] = Late(gave, found.deltas[gave])
    found.scaled[fed[0]] = found.scaled.get(gave)
    return True


def _sent(found: Walk, call: Call, fed: list[Value], delta: Tensor) -> list[Tensor | None]:
    n, gave = len(delta), call.gave[0]
    if len(fed) == 2 and len(call.given) == 2 and call.ran in ADDS:
        return [delta.reshape(n, *value.shape[1:]) if value.shape == gave.shape else None for value in fed]
    if len(fed) != 1:
        return [None] * len(fed)
    layer, shape = layer_of(call, fed[0]), (n, *fed[0].shape[1:])
    if isinstance(layer, Reshape | nn.Flatten | nn.Identity | nn.Unflatten) or (
        isinstance(layer, nn.Dropout) and not layer.training
    ):
        if gave in found.values and fed[0] not in found.values:
            found.values[fed[0]] = found.values[gave].reshape(shape)
            found.noises[fed[0]] = found.noises[gave].reshape(shape)
        return [delta.reshape(shape)]
    if isinstance(layer, nn.ReLU):
        if gave not in found.values:
            return [None]
        return [delta * (found.values[gave] > 0)]
    if isinstance(layer, BENT):
        if gave not in found.values:
            return [None]
        z = inverted(layer, found.values[gave].reshape(shape))
        return [None if z is None else delta.reshape(shape) * slope(layer, z)]
    linear = isinstance(layer, (*LINEAR, AffineOperation)) or (
        isinstance(layer, nn.BatchNorm2d | nn.BatchNorm1d) and not layer.training and layer.running_var is not None
    )
    if not linear or (isinstance(layer, Operation) and not isinstance(layer, AffineOperation)):
        return [None]
    zero = delta.new_zeros(shape).requires_grad_()
    with torch.enable_grad():
        (back,) = torch.autograd.grad(layer(zero), zero, delta.reshape(n, *gave.shape[1:]))
    return [back]


def _solve(
    found: Walk, value: Value, readers: Sequence[WindowLayer], update: Mapping[str, Tensor], eps: float, error: float
) -> None:
    """The equations of a tensor by the weights of all layers that read it."""
    rows = sum(len(place.layer.weight) * place.layer.weight[0, 0].numel() for place in readers)
    columns = len(found.told[0].seen) * torch.Size(value.shape[2:]).numel()
    if 0 < rows < columns and any(
        told.rows is None and told.checked and told.equations >= found.enough for told in found.told
    ):
        found.stops.append(f"{rows} equations for the {columns} entries of a channel of {_name(value)}")
        return
    error = max(error, *(told.misfit for told in found.told))  # what came back is known no better than that
    told = told_by(value, readers, found.deltas, update, eps, error)
    if told is None or told.rows is not None:
        silent = [place.call.where for place in readers if place.weight not in update and place.gave in found.deltas]
        found.stops += [f"{where} sent no gradient, from which its input would follow" for where in silent]
    if told is not None:
        told = replace(told, blur=max(other.blur for other in found.told))
        found.told.append(told)
        if told.rows is None:
            found.values[value], found.noises[value] = told.seen, told.noise


def _name(value: Value) -> str:
    return "the input" if value.call is None else f"what {value.call.where} gave"


def told_by(
    value: Value,
    readers: Sequence[WindowLayer],
    deltas: Mapping[Value, Tensor],
    update: Mapping[str, Tensor],
    eps: float,
    error: float,
) -> Told | None:
    """What the weight gradients of the layers that read a tensor say of it, where it is known what came back to them.

    The noise of their equations is measured by what no input explains of them. None where no layer says anything.
    """
    own = [p for p in readers if p.weight in update and p.gave in deltas and p.plain]
    if not own:
        return None
    n, systems, sides = len(deltas[own[0].gave]), list[Tensor](), list[Tensor]()
    rows, units, count, blocks = dict[WindowLayer, Tensor](), dict[WindowLayer, float](), 0, list[Tensor]()
    for place in own:
        G = update[place.weight].flatten(2) if place.layer.weight.dim() > 2 else update[place.weight][..., None]
        sent, k = deltas[place.gave].reshape(n, len(G), -1), G.shape[2]
        units[place] = float(G.square().mean().sqrt().clamp_min(torch.finfo(G.dtype).tiny))
        systems.append(weight_equations(sent, place.windows(1)) / units[place])
        sides.append(G.transpose(1, 2).reshape(-1, G.shape[1]) / units[place])  # [c_out k^2, c]
        rows[place] = count + torch.arange(len(G) * k, device=G.device).view(len(G), k)
        blocks.append(
            (len(blocks) and int(blocks[-1][-1]) + 1) + torch.arange(len(G), device=G.device).repeat_interleave(k)
        )
        count += len(G) * k
    A, B = torch.cat(systems), torch.cat(sides)
    U, S, V = torch.linalg.svd(A, full_matrices=False)
    kept = S > max(LOST, LOST_ERRORS * error) * S[0]
    rank = int(kept.sum())
    if not rank:
        return None
    U = U[:, kept]
    out, E = trimmed(U, B, torch.cat(blocks))
    D = out[torch.cat(blocks)]
    left = Left(U, B, E, D, rows, units)
    B = torch.where(D[:, None], B - E, B)
    seen = (U.T @ B).T  # [c, r]
    off = E[~D].square().sum(0)  # [c]
    misfit = float(off.sum().sqrt() / B.norm().clamp_min(1e-300))
    free = max(1, int((~D).sum()) - rank)
    checked = free > CHECKED * len(A) or error < SURE
    noise = torch.maximum(off / free, max(eps, error) ** 2 * B.square().mean(0)).sqrt()[:, None] / S[kept]  # [c, r]
    seen, condition = seen / S[kept], float(S[0] / S[kept][-1])
    c, grid = B.shape[1], value.shape[2:] if len(value.shape) == 4 else (1, 1)
    shape = (n, c, *grid)
    if rank < A.shape[1]:
        return Told(value, V[kept], seen, shape, noise, condition, misfit, None, checked)
    V = V[kept]

    def batched(per_channel: Tensor) -> Tensor:
        return per_channel.view(c, n, *grid).transpose(0, 1).reshape(n, *value.shape[1:])

    x, spread = batched(seen @ V), batched((noise.square() @ V.square()).sqrt())
    if value.call is not None and isinstance(layer_of(value.call, value.call.given[0]), nn.ReLU):
        x = torch.where(x < torch.maximum(ZERO * x.max(), ZERO_SIGMAS * spread), 0.0, x)
    spread = torch.hypot(spread, error * x)  # what came back may be wrong by a factor
    return Told(value, None, x, shape, spread, condition, misfit, left, checked)


def _solve_late(
    graph: Graph, found: Walk, value: Value, places: list[WindowLayer], update: Mapping[str, Tensor], eps: float
) -> bool:
    """A tensor by the weights of all layers that read it, where what came back to some depends on their outputs."""
    if not all(
        p.weight in update and p.groups == 1 and (p.gave in found.late or p.gave in found.deltas) for p in places
    ):
        return False
    readers = []
    for place in places:
        late = found.late.get(place.gave)
        behind = None if late is None else section(graph, place.gave, late.value)
        cotangent = found.deltas[place.gave] if late is None else late.cotangent
        loose = found.scaled.get(place.gave) is not None
        readers.append(Reader(place, update[place.weight], cotangent, behind, loose))
    shape = (len(readers[0].cotangent), *value.shape[1:])
    passed, seen = _seen(graph, found, value)
    size = float(found.told[-1].seen.square().mean().sqrt())
    rectified = value.call is not None and _is_relu(value.call)
    answer = solved_around(readers, shape, seen, size, eps, rectified=rectified)
    if answer is None or not answer.misfit < LARGEST_MISFIT:
        found.stops.append(f"the input of {places[0].call.where} is not determined")
        return False
    x = answer.x
    noise = max(eps, answer.misfit) * answer.condition * x.square().mean().sqrt().expand_as(x)
    if rectified:
        x = torch.where(x < torch.maximum(ZERO * x.max(), ZERO_SIGMAS * noise), 0.0, x)
    found.values[value], found.noises[value] = x, noise
    own = None if seen is not None else value
    blur, *blurs = (ALONG * blur * max(1.0, answer.misfit / eps) for blur in answer.blurs)
    owners = [found.scaled[place.gave] for place, reader in zip(places, readers, strict=True) if reader.loose]
    owners += [passed] if seen is not None else []
    for owner, factor, blurred in zip(owners, answer.factors, blurs, strict=True):
        _rescale(found, owner, factor, blurred)
    for place, reader in zip(places, readers, strict=True):
        z = reader.output(x)
        if reader.behind is not None:
            found.values[place.gave] = z
            found.values[found.late.pop(place.gave).value] = reader.behind(z)
            _add(found, value, reader.back(x, reader.delta(z)), own)
    found.told.append(Told(value, None, x, shape, noise, answer.condition, answer.misfit, blur=blur))
    _uncovered(graph, found, value)
    if answer.moved is not None:
        found.hidden[value] = alone_at_zero(x, answer.moved)
    return True


def _uncovered(graph: Graph, found: Walk, value: Value) -> None:
    """The constants of deeper tensors that were hidden, once a tensor is known from which those follow."""
    for deeper, entries in list(found.hidden.items()):
        try:
            own = section(graph, value, deeper)(found.values[value])
        except NotApplicable:
            continue
        found.values[deeper] = torch.where(entries, own, found.values[deeper])
        found.told = [replace(told, seen=found.values[deeper]) if told.value is deeper else told for told in found.told]
        found.hidden.pop(deeper)


def _rescale(found: Walk, owner: Value | None, factors: Tensor, blur: float) -> None:
    """Corrects the scales [n] of a tensor and of all that came back and goes with them, if they are known no better yet."""
    if any(told.value is owner and told.blur <= blur for told in found.told):
        return
    for value, scaled in found.scaled.items():
        if owner is None or scaled is not owner:
            continue
        if value in found.deltas:
            found.deltas[value] = found.deltas[value] * sides(factors, found.deltas[value])
        if value in found.late:
            late = found.late[value]
            found.late[value] = Late(late.value, late.cotangent * sides(factors, late.cotangent))
    if owner is not None:
        right = found.values[owner] / sides(factors, found.values[owner])
        found.told = [replace(told, seen=right, blur=blur) if told.value is owner else told for told in found.told]
        found.values[owner] = right


def _seen(graph: Graph, found: Walk, value: Value) -> tuple[Value, Seen] | tuple[None, None]:
    """What a ReLU gave of a sum, and the entries of a summand that this tells where it passed and the other is known."""
    same = {value}
    for call in graph.calls:
        fed = [other for other in call.given if other.fed]
        if len(fed) == 1 and fed[0] in same and isinstance(call.ran, nn.Identity):
            same.add(call.gave[0])
        if call.ran not in ADDS or len(fed) != 2 or len(same.intersection(fed)) != 1:
            continue
        (other,) = set(fed) - same
        passed = next((c.gave[0] for c in graph.calls if call.gave[0] in c.given and _is_relu(c)), None)
        if other in found.values and passed in found.values:
            where = found.values[passed] > 0
            where = where & ~found.hidden[passed] if passed in found.hidden else where
            return passed, Seen(where, found.values[passed], found.values[other])
    return None, None


def _is_relu(call: Call) -> bool:
    return isinstance(layer_of(call, call.given[0]), nn.ReLU)


LARGEST_MISFIT = 1e-6  # relative, of the weights' gradients, up to which a tensor is right
