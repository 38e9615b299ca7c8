"""Recomputing: the update that claimed inputs send, beside the one that was seen, tensor by tensor."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unbatch.knowledge import Knowledge
from unbatch.likelihood import Likelihood
from unbatch.network.dense import forward
from unbatch.numerics.linear.span import rounding_noise
from unbatch.observation import Observation
from unbatch.protocol import fit, flatten

ROUNDINGS = 32.0  # of a tensor, relative, that need no further reason
STEP_ROUNDINGS = 8.0  # of the parameters, a local step
PRECISION_SLACK = 10.0  # times what the client's precision is seen to do to the update
MOVE_SLACK = 3.0  # times what moves of the inputs by their bounds are seen to do to it
NOISE_SLACK = 1.25  # times the known noise's own size
LARGEST_FACTOR_ERROR = 0.05  # by which a factor that is 1 may seem another, however coarse the update
LARGEST_ALLOWANCE = 0.5  # of a tensor, and of the update, however wide the bounds: with more they explain nothing
AS_WELL = 2.0  # times what is left by the inputs that are claimed
SCALE_ERROR = 0.1  # of the inputs, relative, that the update must be able to show
SCALE_MOVE = 1e-5  # relative, by which that is measured, within one piece of a kinked network
LEAST_TURN = 10.0  # times what is allowed by which it must show


@dataclass(frozen=True)
class Recomputed:
    """How the update that inputs send compares with the one that was seen."""

    factor: float  # c of update = c simulated
    residual: float  # |update - c simulated| / |update|
    allowed: float  # of it, by rounding, known noise and the claimed bounds
    fits: bool  # every tensor does
    settled: bool  # the factor is 1, or leaves nothing open
    worst: str  # the tensor that is furthest beyond what is allowed
    beyond: bool  # it is

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
    x, y = inputs.to(place.device, kind), _labels(labels, place, kind)
    again = {name: s.detach().double() for name, s in place.simulate(x, y).items()}
    seen = {name: u.double() for name, u in place.update.items()}
    c, residual = fit(flatten(seen, seen), flatten(again, seen))
    off = {name: float((u - c * again[name]).norm()) for name, u in seen.items()}
    rounding = allowed = _rounding(place, kind)
    if any(off[name] > allowed[name] for name in seen):
        reach = _reach(place, inputs, labels, far)
        allowed = {name: a + abs(c) * reach[name] for name, a in allowed.items()}
    size = float(flatten(seen, seen).norm())
    allowed = {name: min(a, LARGEST_ALLOWANCE * float(seen[name].norm())) for name, a in allowed.items()}
    whole = math.hypot(*allowed.values()) / size if size else math.inf
    worst = max(seen, key=lambda name: off[name] / (allowed[name] or 1e-300))
    fits = bool(c) and all(off[name] <= allowed[name] for name in seen) and _wide(place, x, y, far, again, c)
    settled = fits and (_near(place, c, whole, size) or _told(place, x, y, rounding, c, residual))
    return Recomputed(c, residual, whole, fits, settled, worst.removeprefix("whole."), off[worst] > allowed[worst])


def _labels(labels: Tensor, place: Observation, kind: torch.dtype) -> Tensor:
    return labels.to(place.device, kind) if labels.is_floating_point() else labels.to(place.device)


def _rounding(place: Observation, kind: torch.dtype) -> dict[str, float]:
    """By how much each tensor may be off, l2, through the rounding of its entries and the noise that is known."""
    sigma = _spread(place)
    n = place.knowledge.get("batch_size", 1)
    steps = place.protocol.steps(n)
    found = {}
    for name, u in place.update.items():
        eps = max(torch.finfo(dtype).eps for dtype in (u.dtype, kind))
        least = 4 * rounding_noise(u.dtype) * u.numel() ** 0.5
        drift = STEP_ROUNDINGS * eps * steps * float(place.model.get_parameter(name).detach().double().norm())
        noise = float(sigma[name]) * (NOISE_SLACK * u.numel() ** 0.5 + 4)
        found[name] = math.hypot(ROUNDINGS * eps * float(u.double().norm()) + least + drift, noise)
    return found


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
    x, rng = inputs.to(place.device).double(), torch.Generator().manual_seed(0)
    flat = x.flatten(1)
    random = torch.randn(flat.shape, generator=rng, dtype=torch.float64).to(flat)
    mixed = torch.randn(len(flat), len(flat), generator=rng, dtype=torch.float64).to(flat) @ flat
    step = (far.double().to(flat) + torch.finfo(kind).eps * flat.norm(dim=1))[:, None]
    ways = [torch.zeros_like(flat), random, flat, *([mixed] if len(flat) > 1 else [])]
    moved = [(flat + step * torch.nn.functional.normalize(way, dim=1)).view_as(x) for way in ways]
    y = _labels(labels, place, kind)
    here, *drawn = (place.simulate(at.to(kind), y) for at in moved)
    if y.is_floating_point() and "labels" not in place.knowledge:  # targets that were solved for are off as inputs are
        drawn.append(place.simulate(x.to(kind), _moved_targets(place, x.to(kind), y, step[:, 0] / flat.norm(dim=1))))
    try:
        exact = _in_double(place).simulate(x, _labels(labels, place, torch.float64))
    except (RuntimeError, ValueError, TypeError):  # a loss or model that takes its own precision alone
        exact = drawn[0]

    def gap(one: Mapping[str, Tensor], other: Mapping[str, Tensor], name: str) -> float:
        return float((one[name].detach().double() - other[name].detach().double()).norm())

    return {
        name: PRECISION_SLACK * gap(here, exact, name) + MOVE_SLACK * max(gap(each, exact, name) for each in drawn)
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
