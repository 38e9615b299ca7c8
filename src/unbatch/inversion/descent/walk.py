"""Walk: from an inner tensor that is known for the whole batch down towards the input, one linear system a layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from unbatch.inversion.descent.implicit import Reader, Seen, solved
from unbatch.inversion.descent.places import Place
from unbatch.network.graph import Call, Graph, Value
from unbatch.network.operations import AffineOperation, Operation, Reshape, layer_of
from unbatch.network.sections import between, section
from unbatch.numerics.windows.weight_equations import weight_equations

LOST = 1e6  # roundings, of the largest singular value: equations below it say nothing
ZERO_ROUNDINGS = 1e4  # of the largest entry, times the condition number's root: behind a ReLU smaller ones are zero
LINEAR = (nn.Conv2d, nn.Linear, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Unflatten, nn.Identity, nn.ZeroPad2d)
NORMS = (nn.GroupNorm, nn.LayerNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.BatchNorm1d, nn.BatchNorm2d)


@dataclass(frozen=True, eq=False)
class Late:
    """Of a tensor whose gradient depends on the tensor itself: a deeper tensor and what came back to that one."""

    value: Value
    cotangent: Tensor


@dataclass(frozen=True, eq=False)
class Told:
    """Equations that hold of one tensor [n, c, h, w] of the batch: rows . x[:, c] = seen[c], the same rows for all channels."""

    value: Value
    rows: Tensor | None  # [r, n h w], orthonormal; None: it is known
    seen: Tensor  # [c, r], or the tensor itself
    shape: tuple[int, ...]  # [n, c, h, w]
    noise: Tensor  # of `seen`, the standard deviation of what its rounding adds, as far as the equations show it
    condition: float = 1.0
    misfit: float = 0.0  # of the equations of its layers, relative

    @property
    def equations(self) -> int:
        """How many say something: of what is zero behind a ReLU none does."""
        return int((self.seen != 0).sum()) if self.rows is None else self.seen.numel()


@dataclass(eq=False)
class Walk:
    """What is found on the way down; `told` holds the equations of ever shallower tensors."""

    values: dict[Value, Tensor] = field(default_factory=dict)
    deltas: dict[Value, Tensor] = field(default_factory=dict)
    late: dict[Value, Late] = field(default_factory=dict)
    scaled: dict[Value, Value | None] = field(default_factory=dict)  # whose scale that of a gradient goes with, if any
    told: list[Told] = field(default_factory=list)
    stops: list[str] = field(default_factory=list)  # where the way down ends, in words


def walk(
    graph: Graph,
    all_places: Sequence[Place],
    start: Value,
    maps: Tensor,
    delta: Tensor,
    update: Mapping[str, Tensor],
    eps: float,
) -> Walk:
    """The walk from the tensor `start`, whose values `maps` and gradient `delta` are known, both [n, ...].

    Going through the calls backward, what came back to a call's output goes on to its inputs wherever the call's derivative
    is known: of linear layers always, of a ReLU where its output is. A layer's weight gradient then gives equations for its
    input (`weight_equations`), those of all layers that read the same tensor together.
    """
    found = Walk({start: maps}, {start: delta}, scaled={start: start})
    noise = eps * maps.square().mean().sqrt().expand_as(maps)
    found.told.append(Told(start, None, maps, tuple(maps.shape), noise))
    blocked = set[Value]()
    readers: dict[Value, list[Place]] = {}
    for place in all_places:
        readers.setdefault(place.given, []).append(place)
    for call in reversed(between(graph, graph.input, start)):
        fed = [value for value in call.given if value.fed]
        for value in call.gave:
            _tell(graph, found, value, readers.get(value, []), blocked, update, eps)
        _back(found, call, fed, blocked)
    _tell(graph, found, graph.input, readers.get(graph.input, []), blocked, update, eps)
    return found


def _tell(
    graph: Graph,
    found: Walk,
    value: Value,
    readers: list[Place],
    blocked: set[Value],
    update: Mapping[str, Tensor],
    eps: float,
) -> None:
    """Finds a tensor if it is not known yet, and what came back to it through the layers that waited for it."""
    if any(place.gave in found.late for place in readers):
        if value in found.values or not _solve_late(graph, found, value, readers, update, eps):
            blocked.add(value)
            found.deltas.pop(value, None)
    elif value not in found.values:
        _solve(found, value, readers, update, eps)


def _back(found: Walk, call: Call, fed: list[Value], blocked: set[Value]) -> None:
    """What came back to a call's output, sent on to what it was given."""
    gave = call.gave[0]
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
        return [delta.reshape(shape)]
    if isinstance(layer, nn.ReLU):
        if gave not in found.values:
            return [None]
        return [delta * (found.values[gave] > 0)]
    linear = isinstance(layer, (*LINEAR, AffineOperation)) or (
        isinstance(layer, nn.BatchNorm2d | nn.BatchNorm1d) and not layer.training and layer.running_var is not None
    )
    if not linear or (isinstance(layer, Operation) and not isinstance(layer, AffineOperation)):
        return [None]
    zero = delta.new_zeros(shape).requires_grad_()
    with torch.enable_grad():
        (back,) = torch.autograd.grad(layer(zero), zero, delta.reshape(n, *gave.shape[1:]))
    return [back]


def _solve(found: Walk, value: Value, readers: Sequence[Place], update: Mapping[str, Tensor], eps: float) -> None:
    """The equations of a tensor by the weights of all layers that read it."""
    own = [p for p in readers if p.weight in update and p.gave in found.deltas and p.groups == 1]
    if not own:
        return
    n = len(found.deltas[own[0].gave])
    systems, sides = [], []
    for place in own:
        windows = place.windows(1)
        systems.append(weight_equations(found.deltas[place.gave].reshape(n, len(place.layer.weight), -1), windows))
        G = update[place.weight]
        sides.append(G.reshape(len(G), G.shape[1], -1).transpose(1, 2).reshape(-1, G.shape[1]))  # [c_out k^2, c]
    A, B = torch.cat(systems), torch.cat(sides)
    U, S, V = torch.linalg.svd(A, full_matrices=False)
    kept = S > LOST * eps * S[0]
    rank = int(kept.sum())
    seen = (U[:, kept].T @ B).T  # [c, r]
    off, free = float((B - U[:, kept] @ seen.T).norm()), max(1, len(A) - rank) * B.shape[1]
    misfit = off / max(float(B.norm()), 1e-300)
    noise = max(off / free**0.5, eps * float(B.square().mean().sqrt())) / S[kept]  # [r]
    seen = seen / S[kept]
    condition = float(S[0] / S[kept][-1])
    c, sides_ = B.shape[1], value.shape[2:] if len(value.shape) == 4 else (1, 1)
    shape = (n, c, *sides_)
    if rank < A.shape[1]:
        found.told.append(Told(value, V[kept], seen, shape, noise.expand_as(seen), condition, misfit))
        return
    x = (seen @ V[kept]).view(c, n, *sides_).transpose(0, 1).reshape(n, *value.shape[1:])
    if value.call is not None and isinstance(layer_of(value.call, value.call.given[0]), nn.ReLU):
        x = torch.where(x < ZERO_ROUNDINGS * eps * condition * x.max(), 0.0, x)
    found.values[value] = x
    even = noise.square().mean().sqrt().expand_as(x)
    found.told.append(Told(value, None, x, shape, even, condition, misfit))


def _solve_late(
    graph: Graph, found: Walk, value: Value, places: list[Place], update: Mapping[str, Tensor], eps: float
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
    n, seen = len(readers[0].cotangent), _seen(graph, found, value)
    shape = (n, *value.shape[1:])
    size = float(found.told[-1].seen.square().mean().sqrt())
    rectified = value.call is not None and _is_relu(value.call)
    answer = solved(readers, shape, seen, size, rectified=rectified)
    if answer is None or not answer.misfit < LARGEST_MISFIT:
        found.stops.append(f"the input of {places[0].call.where} is not determined")
        return False
    x = answer.x
    if rectified:
        x = torch.where(x < ZERO_ROUNDINGS * eps * answer.condition * x.max(), 0.0, x)
    found.values[value] = x
    factors = iter(answer.factors)
    for place, reader in zip(places, readers, strict=True):
        if reader.loose:
            _rescale(found, found.scaled[place.gave], next(factors))
    own = None if seen is not None else value
    for place, reader in zip(places, readers, strict=True):
        z = reader.output(x)
        if reader.behind is not None:
            found.values[place.gave] = z
            found.values[found.late.pop(place.gave).value] = reader.behind(z)
            _add(found, value, reader.back(x, reader.delta(z)), own)
    noise = max(eps * answer.condition, answer.blur) * x.square().mean().sqrt().expand_as(x)
    found.told.append(Told(value, None, x, shape, noise, answer.condition, answer.misfit))
    return True


def _rescale(found: Walk, owner: Value | None, factors: Tensor) -> None:
    """Corrects the scales [n] of a tensor and of all that came back and goes with them."""
    for value, scaled in found.scaled.items():
        if owner is None or scaled is not owner:
            continue
        if value in found.deltas:
            found.deltas[value] = found.deltas[value] * _sides(factors, found.deltas[value])
        if value in found.late:
            late = found.late[value]
            found.late[value] = Late(late.value, late.cotangent * _sides(factors, late.cotangent))
    if owner is not None:
        found.values[owner] = found.values[owner] / _sides(factors, found.values[owner])


def _sides(factors: Tensor, like: Tensor) -> Tensor:
    return factors.view(-1, *[1] * (like.ndim - 1))


def _seen(graph: Graph, found: Walk, value: Value) -> Seen | None:
    """The entries of a tensor that are known since it was added to a known one, and a ReLU let the sum pass."""
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
            return Seen(where, (found.values[passed] - found.values[other])[where])
    return None


def _is_relu(call: Call) -> bool:
    return isinstance(layer_of(call, call.given[0]), nn.ReLU)


LARGEST_MISFIT = 1e-6  # relative, of the weights' gradients, up to which a tensor is right
ADDS = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__iadd__}
