"""Recomputing: the update that claimed inputs send, beside the one that was seen, tensor by tensor."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from unbatch.inversion.other_tokens import unseen_changes
from unbatch.knowledge import Knowledge
from unbatch.likelihood import Likelihood
from unbatch.network.dense import forward
from unbatch.numerics.linear.span import rounding_noise
from unbatch.observation import Observation
from unbatch.protocol import fit, flatten

ROUNDINGS = 32.0  # of a tensor, relative, that need no further reason
FEW_ROUNDINGS = 4.0  # of entries that are added up in half precision
STEP_ROUNDINGS = 8.0  # of the parameters, a local step
PRECISION_SLACK = 10.0  # times what the client's precision is seen to do to the update
MOVE_SLACK = 3.0  # times what moves of the inputs by their bounds are seen to do to it
NOISE_SLACK = 1.25  # times the known noise's own size
LARGEST_FACTOR_ERROR = 0.05  # by which a factor that is 1 may seem another, however coarse the update
LARGEST_ALLOWANCE = 0.5  # of a tensor, and of the update, however wide the bounds: with more they explain nothing
SILENT_TIMES = 4.0  # the size of a tensor that is rounding alone, which another batch may well send
AS_WELL = 2.0  # times what is left by the inputs that are claimed
SCALE_ERROR = 0.1  # of the inputs, relative, that the update must be able to show
SCALE_MOVE = 1e-5  # relative, by which that is measured, within one piece of a kinked network
LEAST_TURN = 10.0  # times what is allowed by which it must show
MOVE_ERROR = 1e-8  # of what a move by SCALE_MOVE shows, relative
LEAST_STANDING = 3.0  # times what is off by which another size, or a tensor at twice its rate, must show
MOST_TARGETS = 1024  # of a batch that are moved one by one
MOST_NUMBERS = 10**7  # of what moving targets and inputs changes together
MOST_WORK = 3 * 10**8  # numbers that are simulated for it
MOST_SIZES = 16  # examples up to which each is made larger by itself
LEAST_SINGULAR = 1e-6  # of what targets change, relative, below which it is the arithmetic's


@dataclass(frozen=True)
class Recomputed:
    """How the update that inputs send compares with the one that was seen."""

    factor: float  # c of update = c simulated
    residual: float  # |update - c simulated| / |update|
    allowed: float  # of it, by rounding, known noise and the claimed bounds
    fits: bool  # every tensor does
    settled: bool  # the factor is 1, or leaves nothing open, nor is it open otherwise
    worst: str  # the tensor that is furthest beyond what is allowed
    beyond: bool  # it is
    pinned: bool = True  # at a factor of 1, sizes of inputs and factors of single tensors would have shown
    open_tokens: Mapping[int, str] = field(default_factory=dict)  # by sequence, a change that would not have shown

    @property
    def words(self) -> str:
        """What was compared, in words."""
        if not self.fits:
            if not self.beyond:
                return "the bounds are narrower than the known noise leaves them."
            return (
                f"what these inputs would send is {self.residual:.1e} of the update off it, where {self.allowed:.1e} is "
                f"allowed for, whatever the common factor; {self.worst!r} is the furthest."
            )
        if self.open_tokens:
            change = next(iter(self.open_tokens.values()))
            return (
                f"these tokens explain the update to {self.residual:.1e} of it, and so do others, with {change}: "
                "that does not show in it."
            )
        if not self.settled and not self.pinned:
            return (
                f"these inputs explain the update to {self.residual:.1e} of it, and so would others with other labels, or "
                "with a factor of its own on one of its tensors: nothing is left in it that must agree."
            )
        if not self.settled:
            return (
                f"only at {self.factor:.4g} times what these inputs would send do they explain the update, and at such a "
                "factor other inputs explain it as well."
            )
        said = f"these inputs explain the update to {self.residual:.1e} of it"
        exact = abs(self.factor - 1) <= max(1e-3, self.allowed)
        return f"{said}." if exact else f"{said}, which is {self.factor:.4g} times what they would send."


def recomputed(place: Observation, inputs: Tensor, labels: Tensor, far: Tensor) -> Recomputed:
    """The update of inputs [k, ...] and labels that are within `far` [k], l2, of the true ones, beside the one seen.

    One factor c = <u, s> / <s, s> is common to all tensors. A tensor fits if |u - c s| is within its rounding, its known
    noise, and what rounding and moves of the inputs by `far` are seen to do to it.

    >>> import unbatch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    >>> x, y = torch.rand(2, 4), torch.tensor([2, 0])
    >>> seen, truth = unbatch.observe(model, torch.nn.functional.cross_entropy, x, y)
    >>> twice = replace(seen, update={name: 2 * u for name, u in seen.update.items()})
    >>> found = recomputed(twice, x, y, torch.zeros(2))
    >>> found.fits, found.settled, round(found.factor, 4)
    (True, True, 2.0)
    >>> recomputed(replace(seen, update=seen.update | {"0.bias": 2 * seen.update["0.bias"]}), x, y, torch.zeros(2)).fits
    False
    """
    kind = next(place.model.parameters()).dtype
    x, y = _typed(inputs, place, kind), _typed(labels, place, kind)
    again = {name: s.detach().double() for name, s in place.simulate(x, y).items()}
    seen = {name: u.double() for name, u in place.update.items()}
    c, residual = fit(flatten(seen, seen), flatten(again, seen))
    off = {name: float((u - c * again[name]).norm()) for name, u in seen.items()}
    rounding = allowed = _rounding(place, kind)
    if any(off[name] > allowed[name] for name in seen):
        reach = _reach(place, inputs, labels, far)
        allowed = {name: a + abs(c) * reach[name] for name, a in allowed.items()}
    size = float(flatten(seen, seen).norm())
    most = {name: LARGEST_ALLOWANCE * float(u.norm()) for name, u in seen.items()}
    if not x.is_floating_point():  # a tensor of nothing but noise says nothing: other tokens are tried against the rest
        most = {name: max(most[name], drawn) for name, drawn in _noise_norms(place).items()}
    silent = dict[str, float]()
    if any(off[name] > min(allowed[name], most[name]) for name in seen):
        silent = _silent(place, x, y, again, c)
        most, allowed = most | silent, allowed | silent
    allowed = {name: min(a, most[name]) for name, a in allowed.items()}
    whole = math.hypot(*allowed.values()) / size if size else math.inf
    worst = max(seen, key=lambda name: off[name] / (allowed[name] or 1e-300))
    fits = bool(c) and all(off[name] <= allowed[name] for name in seen)
    near = _near(place, c, whole, size)
    beyond = off[worst] > allowed[worst]
    worst = worst.removeprefix("whole.")
    if not x.is_floating_point():
        if fits and not silent:  # a tensor of rounding alone may agree by chance: other tokens round it otherwise
            silent = _silent(place, x, y, again, c)
            allowed |= silent
        sent = {name: most for name, most in _rounding_as_sent(place, kind).items() if name not in silent}
        if fits and all(off[name] <= most for name, most in sent.items()):
            allowed |= {name: min(allowed[name], most) for name, most in sent.items()}
        others = unseen_changes(place, x, y, _explaining(place, allowed)) if fits else {}
        targets = _targets_told(place, y)
        settled = fits and targets and (near or "batch_size" in place.knowledge)
        return Recomputed(c, residual, whole, fits, settled, worst, beyond, targets or not near, others)
    fits = fits and _wide(place, x, y, far, again, c)
    pinned = not fits or _pinned(_without(place, silent), x, y, off, free=not near)
    if not pinned and not silent:  # a tensor of rounding alone may agree by chance, and pins nothing all the same
        silent = _silent(place, x, y, again, c)
        pinned = bool(silent) and _pinned(_without(place, silent), x, y, off, free=not near)
    settled = fits and pinned and (near or _told(place, x, y, rounding, c, residual))
    return Recomputed(c, residual, whole, fits, settled, worst, beyond, pinned or not near)


def _silent(place: Observation, x: Tensor, y: Tensor, again: Mapping[str, Tensor], c: float) -> dict[str, float]:
    """What is allowed of each tensor whose gradient is zero but for rounding, as seen and as simulated: it says nothing.

    Such is that of the bias of an attention's keys, which adds one number to all scores of a query. Rounding is what
    another precision changes: float64, or in units of its own float32 where the client computes in float64. Of a tensor
    that is no larger than the rounding of the whole update it is also what another rounding of the inputs changes.
    """
    kind = next(place.model.parameters()).dtype
    other = torch.float32 if kind == torch.float64 else torch.float64
    unit = torch.finfo(kind).eps / torch.finfo(other).eps if kind == torch.float64 else 1.0
    turned = replace(place, model=copy.deepcopy(place.model).to(other))
    try:
        there = turned.simulate(_typed(x, place, other), _typed(y, place, other))
    except (RuntimeError, ValueError, TypeError):  # a loss or model that takes its own precision alone
        return {}
    found, size = dict[str, float](), float(flatten(place.update, place.update).norm())
    moved = place.simulate(_rounded_otherwise(x), y) if x.is_floating_point() else {}
    for name, s in again.items():
        larger = max(float(place.update[name].double().norm()), abs(c) * float(s.norm()))
        noise = abs(c) * unit * float((there[name].detach().double() - s).norm())
        if larger <= PRECISION_SLACK * noise:
            found[name] = SILENT_TIMES * larger
        elif name in moved and larger <= ROUNDINGS * torch.finfo(kind).eps * size:
            turn = abs(c) * float((moved[name].detach().double() - s).norm())
            if larger <= PRECISION_SLACK * turn:
                found[name] = SILENT_TIMES * larger
    return found


def _rounded_otherwise(x: Tensor) -> Tensor:
    """Inputs with every number moved by its rounding, up or down."""
    signs = 2 * torch.randint(2, x.shape, generator=torch.Generator().manual_seed(0)).to(x) - 1
    return x * (1 + torch.finfo(x.dtype).eps * signs)


def _without(place: Observation, silent: Collection[str]) -> Observation:
    """The exchange without tensors that say nothing, of which no factor of their own can show."""
    if not silent or len(silent) == len(place.update):
        return place
    kept = {name: u for name, u in place.update.items() if name not in silent}
    return replace(place.only(*set(place.knowledge) - {"earlier"}), update=kept)


def _explaining(place: Observation, allowed: Mapping[str, float]) -> Callable[[Tensor, Tensor], bool]:
    """Whether other inputs and labels explain the update within twice what is allowed of each tensor, up to a factor."""
    seen = {name: u.double() for name, u in place.update.items()}

    def explains(x: Tensor, y: Tensor) -> bool:
        again = {name: s.detach().double() for name, s in place.simulate(x, y).items()}
        pairs = [(u.flatten(), again[name].flatten()) for name, u in seen.items()]
        size = sum(float(s @ s) for _, s in pairs)
        c = sum(float(u @ s) for u, s in pairs) / size if size else 0.0  # the factor that fits best
        return all(float((u - c * again[name]).norm()) <= AS_WELL * allowed[name] for name, u in seen.items())

    return explains


def _targets_told(place: Observation, y: Tensor) -> bool:
    """Whether targets are known, or of a few numbers, so that they leave nothing open."""
    return "labels" in place.knowledge or not y.is_floating_point() or bool(((y == 0) | (y.abs() == 1)).all())


def split_shows(place: Observation, inputs: Tensor, labels: Tensor, owner: Tensor, far: Tensor) -> bool:
    """Whether the update shows that inputs [k, ...] of the same `owner` [k] are copies up to their bounds `far` [k], l2.

    Moves that cancel within each group leave the sum of their gradients as it is to first order: what tells copies from
    examples that are alike is of second order, and lost in coarse rounding.

    >>> import unbatch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    >>> x, y = torch.rand(1, 4).repeat(2, 1), torch.tensor([2, 2])
    >>> seen, truth = unbatch.observe(model, torch.nn.functional.cross_entropy, x, y)
    >>> coarse = replace(seen, update={name: u.bfloat16() for name, u in seen.update.items()})
    >>> one, far = torch.tensor([0, 0]), 0.1 * x.norm(dim=1)
    >>> split_shows(seen, x, y, one, far), split_shows(coarse, x, y, one, far), split_shows(seen, x, y, one, 1e-6 * far)
    (True, False, False)
    """
    kind, owner = next(place.model.parameters()).dtype, owner.cpu()
    x, y = inputs.to(place.device).double(), _typed(labels, place, torch.float64)
    way = torch.randn(x.flatten(1).shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for one in set(owner.tolist()):
        way[owner == one] -= way[owner == one].mean(0)
    way = (way / way.norm(dim=1, keepdim=True).clamp_min(1e-300)).to(x) * far.to(x)[:, None]
    double = _in_double(place)
    together, apart = (double.simulate(at, y) for at in (x, x + way.view_as(x)))
    c = abs(fit(flatten(place.update, place.update), flatten(together, place.update))[0])
    allowed = _rounding(place, kind)
    return any(c * float((apart[name] - together[name]).norm()) > allowed[name] for name in place.update)


def _typed(values: Tensor, place: Observation, kind: torch.dtype) -> Tensor:
    """Inputs or labels where the exchange lies, in that precision; tokens and classes stay whole numbers."""
    return values.to(place.device, kind) if values.is_floating_point() else values.to(place.device)


def _rounding(place: Observation, kind: torch.dtype, *, sent: float = ROUNDINGS) -> dict[str, float]:
    """By how much each tensor may be off, l2, through the rounding of its entries and the noise that is known.

    `sent` are the roundings of entries that are coarser than the client's own arithmetic, `kind`.
    """
    drawn = _noise_norms(place)
    n = place.knowledge.get("batch_size", 1)
    steps = place.protocol.steps(n)
    found = {}
    for name, u in place.update.items():
        own, coarse = (torch.finfo(dtype).eps for dtype in (kind, u.dtype))
        eps = max(ROUNDINGS * own, (sent if coarse > own else ROUNDINGS) * coarse)
        least = 4 * rounding_noise(u.dtype) * u.numel() ** 0.5
        drift = (
            STEP_ROUNDINGS * max(own, coarse) * steps * float(place.model.get_parameter(name).detach().double().norm())
        )
        found[name] = math.hypot(eps * float(u.double().norm()) + least + drift, drawn[name])
    return found


def _rounding_as_sent(place: Observation, kind: torch.dtype) -> dict[str, float]:
    """The same where what the client computed was rounded once, or cut off, to the coarser type in which it was sent.

    Entries are off by a last place then, and not by the sums of many: an update that agrees with claimed tokens so well
    shows other tokens that it would not show beside the rounding of every sum. A client that computes in half precision
    keeps products in float32 and rounds their sums once; what it adds up by itself, biases for one, is rounded a few times.
    """
    if torch.finfo(kind).eps > torch.finfo(torch.float32).eps:
        return _rounding(place, torch.float32, sent=FEW_ROUNDINGS)
    return _rounding(place, kind, sent=1.0)


def _noise_norms(place: Observation) -> dict[str, float]:
    """The most that known noise may make of each tensor, l2."""
    sigma = _spread(place)
    return {n: float(sigma[n]) * (NOISE_SLACK * u.numel() ** 0.5 + 4) for n, u in place.update.items()}


def _wide(place: Observation, x: Tensor, y: Tensor, far: Tensor, again: Mapping[str, Tensor], c: float) -> bool:
    """Whether the bounds are as wide as known noise asks for: a move by a bound that holds shows beside it.

    Unbiased estimates spread by (J^T J)^-1 at least, J in units of the noise, so that |J b|^2 >= d for a bound b on d
    numbers.
    """
    sigma, sure = _spread(place), far > 0
    if not any(sigma.values()) or not bool(sure.any()):
        return True
    flat = x.double().flatten(1)
    way = torch.randn(flat.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(flat)
    moved = (flat + far.to(flat)[:, None] * torch.nn.functional.normalize(way, dim=1)).view_as(x).to(x)
    other = place.simulate(moved, y)
    shown = 0.0
    for name, s in again.items():
        step = abs(c) * float((other[name].detach().double() - s).norm())
        shown += (step / sigma[name]) ** 2 if sigma[name] else math.inf * (step > 0)
    return not shown < int(sure.sum()) * flat.shape[1]


def _spread(place: Observation) -> Mapping[str, float]:
    """The standard deviation of each entry of a tensor that is known, by its name."""
    law = Likelihood.of(place.knowledge)
    noise = float(place.knowledge.get("noise", 0.0))
    return law.spread(place.update) if law else dict.fromkeys(place.update, noise)


def _reach(place: Observation, inputs: Tensor, labels: Tensor, far: Tensor) -> dict[str, float]:
    """How far each tensor of the simulated update may be off, l2, by the client's precision and by moves of the inputs.

    The inputs as they are in the client's precision against float64, and the largest of a few moves: at random, along
    themselves, and along each other; and of targets that were solved for.
    """
    kind = next(place.model.parameters()).dtype
    x, rng = _typed(inputs, place, torch.float64), torch.Generator().manual_seed(0)
    flat = x.double().flatten(1)
    step = (far.double().to(flat) + torch.finfo(kind).eps * flat.norm(dim=1))[:, None]
    ways = [torch.zeros_like(flat)]
    if x.is_floating_point():  # tokens do not move
        random = torch.randn(flat.shape, generator=rng, dtype=torch.float64).to(flat)
        mixed = torch.randn(len(flat), len(flat), generator=rng, dtype=torch.float64).to(flat) @ flat
        ways += [random, flat, *([mixed] if len(flat) > 1 else [])]
    moved = [x + (step * torch.nn.functional.normalize(way, dim=1)).view_as(x).to(x) for way in ways]
    y = _typed(labels, place, kind)
    here, *drawn = (place.simulate(_typed(at, place, kind), y) for at in moved)
    if y.is_floating_point() and "labels" not in place.knowledge:  # targets that were solved for are off as inputs are
        at = _typed(x, place, kind)
        drawn.append(place.simulate(at, _moved_targets(place, at, y, step[:, 0] / flat.norm(dim=1))))
    try:
        exact = _in_double(place).simulate(x, _typed(labels, place, torch.float64))
    except (RuntimeError, ValueError, TypeError):  # a loss or model that takes its own precision alone
        exact = (drawn or [here])[0]

    def gap(one: Mapping[str, Tensor], other: Mapping[str, Tensor], name: str) -> float:
        return float((one[name].detach().double() - other[name].detach().double()).norm())

    return {
        name: PRECISION_SLACK * gap(here, exact, name)
        + MOVE_SLACK * max((gap(each, exact, name) for each in drawn), default=0.0)
        for name in exact
    }


def _moved_targets(place: Observation, x: Tensor, y: Tensor, share: Tensor) -> Tensor:
    """Real targets [k, ...] moved by that share [k] of their own size and the outputs'."""
    outputs = forward(copy.deepcopy(place.model), x, place.protocol.mode)
    size = y.abs() + (outputs.abs().view_as(y) if outputs.numel() == y.numel() else 0)
    return y + share.to(y).view(-1, *[1] * (y.ndim - 1)) * size


def _in_double(place: Observation) -> Observation:
    known = place.knowledge
    if "buffers" in known:
        double = {k: b.double() if b.is_floating_point() else b for k, b in known.buffers.items()}
        known = known | Knowledge(buffers=double)
    return replace(place, model=copy.deepcopy(place.model).double(), knowledge=known)


def _near(place: Observation, c: float, allowed: float, size: float) -> bool:
    """Whether the factor is the protocol's own: 1, or that of a clip of known norm."""
    near = min(10 * allowed + 1e-6, LARGEST_FACTOR_ERROR)
    clip = place.knowledge.get("clip")
    return abs(c - 1) <= near or (clip is not None and 0 < c < 1 and math.isclose(size, clip, rel_tol=1e-3))


def _told(place: Observation, x: Tensor, y: Tensor, rounding: Mapping[str, float], c: float, residual: float) -> bool:
    """Whether the update would have shown a wrong scale of the inputs, although its own is free.

    It would if some tensor of inputs a tenth larger has another direction, by what the first order says: a kink that is
    crossed would show that scale, but not all smaller ones. Nor may the inputs at another scale, the factor's own among
    them, explain the update as well as those that are claimed, which leave `residual` of it. Where the loss sends back one
    number an example, a mixture of several explains an update as well as one does, so that their number must be known.
    """
    double = _in_double(place)
    x, y = x.double(), y.double() if y.is_floating_point() else y
    try:
        here, larger = (double.simulate(t * x, y) for t in (1.0, 1 + SCALE_MOVE))
    except (RuntimeError, ValueError, TypeError):  # a loss or model that takes its own precision alone
        return False
    turned = False
    for name, s in here.items():
        turn = float((_direction(larger[name]) - _direction(s)).norm()) * SCALE_ERROR / SCALE_MOVE
        turned = turned or turn > LEAST_TURN * rounding[name] / (abs(c) * float(s.norm()) + 1e-300)
    rounded = math.hypot(*rounding.values()) / float(flatten(place.update, place.update).norm())
    scales = [t for t in (abs(c), 1 / abs(c), abs(c) ** 0.5, 0.5, 2.0) if abs(t - 1) > SCALE_ERROR]
    if not turned or any(double.fit(t * x, y)[1] <= max(AS_WELL * residual, rounded) for t in scales):
        return False
    return "batch_size" in place.knowledge or _answers(double, x, y) > 1


def _pinned(place: Observation, x: Tensor, y: Tensor, off: Mapping[str, float], *, free: bool) -> bool:
    """Whether the update would have shown another size of an input, and another factor of a part of its own tensors.

    With targets that were solved for many a size explains an update: without biases a network of linear pieces sends the
    same from t x as from x where the loss sends back 1 / t of it. And where nothing is left that must agree (one layer
    under real targets, or under a loss whose slope is one of a few numbers) two learning rates are another input. So what
    each input's size changes, and each tensor by itself, the vectors together and each layer, is to stand out from all that
    sizes, targets and, with `free`, the common factor change: in first order, in units of what the claim leaves `off` of
    each tensor, or of its rounding; in a sample of the entries where they are many. Beyond MOST_TARGETS targets nothing is
    said against the claim.
    """
    solved = 0 if _targets_told(place, y) else y.numel()
    seen = flatten(place.update, place.update)
    if solved > MOST_TARGETS or solved * len(seen) > MOST_WORK:
        return True
    double, kind = _in_double(place), next(place.model.parameters()).dtype
    unit = {
        n: max(off[n], float(u.double().norm()) * max(MOVE_ERROR, *(torch.finfo(k).eps for k in (u.dtype, kind))))
        or 1.0
        for n, u in place.update.items()
    }
    x, y = x.double(), y.double() if y.is_floating_point() else y
    each = solved + len(x) + 2 * len(place.update)
    some = torch.randperm(len(seen), generator=torch.Generator().manual_seed(0))[: MOST_NUMBERS // each].to(seen.device)

    def weighed(update: Mapping[str, Tensor]) -> Tensor:
        inside = {n: s.detach().double() / unit[n] for n, s in update.items()}
        found: Tensor = flatten(inside, place.update)[some] * (len(seen) / len(some)) ** 0.5
        return found

    try:
        here = weighed(double.simulate(x, y))
        units = list(torch.eye(solved).to(y).view(-1, *y.shape)) if solved else []
        targets = [(weighed(double.simulate(x, y + SCALE_MOVE * e)) - here) / SCALE_MOVE for e in units]
        rows = range(len(x)) if len(x) <= MOST_SIZES else [slice(None)]
        sizes = [
            weighed(double.simulate(_sized(x, i, 1), y)) - weighed(double.simulate(_sized(x, i, -1), y)) for i in rows
        ]
        sizes = [each / (2 * SCALE_MOVE) for each in sizes]
    except (RuntimeError, ValueError, TypeError):  # a loss or model that takes its own precision alone
        return True
    own = [here] if free else []
    if targets and not bool((_beside(sizes, targets + own) > LEAST_STANDING).all()):
        return False
    groups = [weighed({n: u if n in group else 0 * u for n, u in place.update.items()}) for group in _groups(place)]
    groups = [
        each for each in groups if bool(each.any())
    ]  # of a tensor that is zero, or in no sample, a factor is nothing
    return bool((_beside(groups, targets + sizes + own) > LEAST_STANDING).all())


def _beside(vectors: list[Tensor], others: list[Tensor]) -> Tensor:
    """How far each vector stands out from the span of the others."""
    if not vectors:
        return torch.full((1,), torch.inf)
    basis, size, _ = torch.linalg.svd(torch.nn.functional.normalize(torch.stack(others, 1), dim=0), full_matrices=False)
    basis, each = basis[:, size > LEAST_SINGULAR * size[:1]], torch.stack(vectors, 1)
    found: Tensor = (each - basis @ (basis.T @ each)).norm(dim=0)
    return found


def _groups(place: Observation) -> list[frozenset[str]]:
    """Tensors of the update that are likely to have a factor of their own: each, the vectors, and each layer."""
    names = list(place.update)
    layers = [frozenset(n for n in names if n.rpartition(".")[0] == m.rpartition(".")[0]) for m in names]
    found = [*(frozenset([n]) for n in names), frozenset(n for n in names if place.update[n].ndim < 2), *layers]
    return [group for group in dict.fromkeys(found) if 0 < len(group) < len(names)]


def _sized(x: Tensor, which: int | slice, sign: int) -> Tensor:
    found = x.clone()
    found[which] *= 1 + sign * SCALE_MOVE
    return found


def _direction(t: Tensor) -> Tensor:
    return torch.nn.functional.normalize(t.detach().double().flatten(), dim=0)


def _answers(place: Observation, x: Tensor, y: Tensor) -> int:
    """How many independent numbers an example's loss sends back from its outputs: one fewer if they add up to zero."""
    outputs = forward(copy.deepcopy(place.model), x, place.protocol.mode).detach().requires_grad_()
    with torch.enable_grad():
        (sent,) = torch.autograd.grad(place.loss(outputs, y), outputs)
    sent = sent.double().flatten(1)
    summed = sent.sum(1).abs() <= 1e-4 * sent.abs().sum(1)
    return sent.shape[1] - int(sent.shape[1] > 1 and bool(summed.all()))
