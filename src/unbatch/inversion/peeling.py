"""Peeling: whether claimed examples can be taken out of a dense layer's gradient, each with what the model sends back."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from unbatch.errors import NotApplicable
from unbatch.inversion.above_exchange import FromLayer
from unbatch.inversion.above_layer import Tail
from unbatch.inversion.label_fit import DIGITS_OF_A_FIT, possible_labels
from unbatch.inversion.unmixing import layer_span
from unbatch.inversion.view import View
from unbatch.network.dense import Dense, in_mode, layer_inputs
from unbatch.network.precision import in_double, loss_value, outputs_of
from unbatch.numerics.linear.span import Span
from unbatch.protocol import fit
from unbatch.reconstruction import Reconstruction

SLACK = 10.0  # times what rounding, noise and the claimed bound do
ERROR_SLACK = 4.0  # times the gradient's own error, which is a worst case already
NOISE_SHARE = (
    0.1  # of what known noise does to what the layer alone tells of an example: the least bound that is believed
)
LARGEST_SHARE = 0.2  # of what is compared: beyond it the comparison says nothing
SCALE_ERROR = 0.1  # of an example, relative, that its delta must be able to show
SCALE_MOVE = 1e-5  # relative, by which that is measured, within one piece of a kinked network
SCALES = 81  # of an input, within four decades, that are tried where nothing tells it
LEAST_SINGULAR = 1e-6  # of what targets change, relative, below which it is the arithmetic's
LARGEST_TURN = 0.5  # of a delta, however wide the bounds: with more it explains nothing
SCALE_STEP = 0.05  # of a delta, relative, which lies between two of them
DIRECTION_SLACK = 3.0  # times what the claimed bounds do to a delta
MOST_OUTPUTS = 4096  # an example, whose derivatives are taken one by one


@dataclass(frozen=True)
class Peeling:
    """Which examples come out of the gradient, and why in words."""

    kept: Tensor  # [k], bool
    words: str
    factor: float | None = None


@dataclass(frozen=True)
class SentBack:
    """What the model can have sent back to a dense layer from one example."""

    basis: Tensor  # [K, m], the derivatives of the outputs
    label: Tensor | None  # [1], the candidate that fits the update best; None where there are no candidates
    misfit: float  # what the basis leaves of the layer's delta, relative


def sent_back(view: View, layer: Dense, inputs: Tensor, of_layer: bool) -> SentBack:
    """What the model above a dense layer can send back from one example, and the label with which that is the update's.

    dL/dz = J^T r with J [K, m] the derivatives of the outputs with respect to the layer's, whatever the loss and the
    label; of a loss of known form, r is one of a few. `inputs` [1, ...] are the network's, or with `of_layer` the layer's.
    """
    z = _received(view, layer, inputs, of_layer)
    W, b = _parameters(view, layer)
    before = torch.nn.functional.linear(z, W, b).detach().requires_grad_()
    outputs = _outputs(view, layer, before)
    flat = outputs.flatten()
    if len(flat) > MOST_OUTPUTS:
        raise NotApplicable(f"an example has {len(flat)} outputs, too many to ask each for what it sends back.")
    with torch.enable_grad():
        rows = [torch.autograd.grad(o, before, retain_graph=True)[0].flatten() for o in flat]
    J, seen = torch.stack(rows).detach(), _delta(view, layer, z)
    r = torch.linalg.pinv(J.T) @ seen
    misfit = float((seen - J.T @ r).norm() / seen.norm().clamp_min(1e-300))
    best: tuple[float, float, Tensor | None] = (-1.0, 0.0, None)
    for y in possible_labels(view):
        live = outputs.detach().requires_grad_()
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(
                loss_value(view.loss, live, y.double() if y.is_floating_point() else y), live
            )
        made = J.T @ slope.flatten()
        factor, left = fit(seen, made)  # two classes may send the same up to sign: then the factor nearest to 1 decides
        best = max(best, (round(1 - min(left, 1.0), DIGITS_OF_A_FIT), -abs(factor - 1), y), key=lambda held: held[:2])
    return SentBack(J, best[2], misfit)


def peeled(
    view: View, layer: Dense, found: Reconstruction, sure: Tensor, far: Tensor, *, doubted: bool = False
) -> Peeling:
    """Which of the claimed examples can be taken out of the gradient A = [dL/dW, dL/db] of a dense layer.

    Example i with input x~ = (x, 1) of the layer and the model's own delta takes rank from A if x~ lies in its row space,
    delta in its column space, and x~^T A^+ delta = 1 / c (Wedderburn), c how often it counts; several do together if
    x~_i^T A^+ delta_j = 0 for i != j. Each is held to that within what rounding, known noise and the claimed bounds `far`
    [k] (l2) do to it. Examples that are the same count as one that occurs so often. Where c is not 1, and with `doubted`
    anyway, delta must show the scale of x, and with `doubted` its sign.

    Raises NotApplicable: what the model above the layer sends back cannot be computed.
    """
    inputs = _claimed(found.inputs, sure)
    x = _received(view, layer, inputs, bool(found.layer))
    if not found.layer:
        _reached(view, layer, inputs, x)
    kept = torch.zeros_like(sure)
    if found.labels is None and (view.form is None or view.form.name == "additive"):
        return _whatever_the_label(view, layer, found, sure)
    n = view.knowledge.get("batch_size", len(found))
    tail = _tail(view, layer, n)
    near = far[sure].to(x)
    span = layer_span(view, layer, torch.Generator().manual_seed(0))
    send = _Sender(view, layer, tail)
    y = _claimed(found.labels, sure) if found.labels is not None else _best_labels(view, send, span, x)
    if _solved(view, y) and 2 * tail.targets > tail.m:
        words = f"labels were solved for, and {tail.targets} numbers may send back to {tail.m} neurons nearly anything."
        return Peeling(kept, words)
    which, times, owner = _distinct(x, y, near)
    one = torch.ones_like(times)
    held = _compared(view, layer, span, send, x[which], y[which], times, near[which], doubted)
    copies = held.factor is not None and abs(held.factor - 1) < 1e-3  # at another factor copies cannot be counted
    if not copies and bool((times > 1).any()):
        held = _compared(view, layer, span, send, x[which], y[which], one, near[which], doubted)
    told = held.kept[owner] & (torch.ones_like(owner, dtype=torch.bool) if copies else _first_of_each(owner))
    kept[sure] = told.to(kept.device)
    return Peeling(kept, held.words, held.factor)


def directions_hold(view: View, layer: Dense, found: Reconstruction, sure: Tensor, far: Tensor) -> Peeling:
    """Whether inputs of a dense layer that are known up to their scale and sign can have sent its gradient A = dL/dW.

    All of a batch together: A X^+ are then the deltas up to a factor each, and each is to be J(t x_i)^T r, J [K, m] the
    derivatives of the outputs, for some scale t and whatever comes back from the loss, r; within what the claimed bounds
    `far` [k] (l2) do to it. Raises NotApplicable: what the model above the layer sends back cannot be computed.
    """
    nothing = torch.zeros_like(sure)
    if found.inputs is None or not bool(sure.all()):
        return Peeling(nothing, "without a scale only all examples of a batch together can be held to the gradient.")
    x = _received(view, layer, found.inputs, bool(found.layer))
    A, (W, b) = view.update[layer.weight].double(), _parameters(view, layer)
    if 2 * math.prod(view.outputs) > len(A):
        words = f"{math.prod(view.outputs)} outputs may send back to {len(A)} neurons nearly anything."
        return Peeling(nothing, words)
    mixed = torch.randn(len(x), len(x), generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(x) @ x
    other = x + far.to(x)[:, None] * torch.nn.functional.normalize(mixed, dim=1)
    deltas, moved = (A @ torch.linalg.pinv(each) for each in (x, other))  # [m, k]
    left = float((A - deltas @ x).norm() / A.norm())
    reach = (moved - deltas).norm(dim=0) / deltas.norm(dim=0) + 1e-6  # [k]
    least = torch.full_like(reach, torch.inf)
    for t in torch.logspace(-2, 2, SCALES, dtype=torch.float64).to(x):
        for sign in (1.0, -1.0):
            before = torch.nn.functional.linear(sign * t * x, W, b).requires_grad_()
            outputs = _outputs(view, layer, before).flatten(1)
            with torch.enable_grad():
                rows = [torch.autograd.grad(o, before, retain_graph=True)[0] for o in outputs.sum(0)]
            J = torch.stack(rows, 2).detach()  # [k, m, K]
            r = torch.linalg.pinv(J) @ deltas.T[:, :, None]
            gap = (deltas.T - (J @ r)[:, :, 0]).norm(dim=1) / deltas.norm(dim=0)
            least = torch.minimum(least, gap)
    kinks = (far.to(x) / x.norm(dim=1)).sqrt()  # a share e of all neurons that change sides turns a delta by sqrt(e)
    allowed = (DIRECTION_SLACK * reach + kinks + SCALE_STEP).clamp_max(LARGEST_TURN)
    good = (least <= allowed) & (left <= LARGEST_TURN)
    words = f"at the best scale of each the model sends back what was seen to {float(least.max()):.1e}"
    return Peeling(
        good.to(sure.device),
        words + ("." if bool(good.all()) else f", where {float(allowed.min()):.1e} is allowed for."),
    )


class _Sender:
    """The deltas of examples with inputs x [k, d] of the layer and labels y, in float64."""

    def __init__(self, view: View, layer: Dense, tail: Tail) -> None:
        self.W, self.b = _parameters(view, layer)
        self.tail = tail

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        y = y[:, :-1] if self.tail.form.labels.kind == "probabilities" else y  # which the tail completes
        return self.tail(torch.nn.functional.linear(x, self.W, self.b), y).detach().double()


def _compared(
    view: View,
    layer: Dense,
    span: Span,
    send: _Sender,
    x: Tensor,
    y: Tensor,
    times: Tensor,
    near: Tensor,
    doubted: bool,
) -> Peeling:
    """The test of `peeled` for distinct examples x [k, d] with labels y that occur `times` [k] each."""
    bias = layer.bias is not None and layer.bias in view.update
    wide = torch.cat([x, torch.ones(len(x), 1).to(x)], 1) if bias else x
    delta = send(x, y) * times[:, None]
    eps = max(torch.finfo(p.dtype).eps for p in (view.update[layer.weight], next(view.model.parameters())))
    wrong = _wrong(send, x, y, times, delta, near) + 8 * eps * delta.norm(dim=1)  # [k], of the deltas
    off = near + 4 * eps * wide.norm(dim=1)  # of the examples
    error = max(span.noise, span.beyond)  # of A, spectral
    rows, columns = wide @ span.rows.T, delta @ span.columns  # [k, r] each
    p, q = rows / span.values, columns / span.values
    outside = (wide - rows @ span.rows).norm(dim=1), (delta - columns @ span.columns.T).norm(dim=1)
    allowed = (
        ERROR_SLACK * error * p.norm(dim=1) + SLACK * off,
        ERROR_SLACK * error * q.norm(dim=1) + SLACK * wrong,
    )
    noise = float(view.knowledge.get("noise", 0.0))  # which moves what is read of an example by this much at least
    inside = (
        (near >= NOISE_SHARE * noise * x.shape[1] ** 0.5 * p.norm(dim=1))
        & (outside[0] <= allowed[0])
        & (outside[1] <= allowed[1])
    )
    told = (allowed[0] < LARGEST_SHARE * wide.norm(dim=1)) & (allowed[1] < LARGEST_SHARE * delta.norm(dim=1))
    M = rows @ (columns / span.values).T  # [k, k], x~_i A^+ delta_j
    slack = SLACK * (p.norm(dim=1)[:, None] * wrong + off[:, None] * q.norm(dim=1))
    slack += ERROR_SLACK * error * p.norm(dim=1)[:, None] * q.norm(dim=1)
    own = M.diagonal()
    good = inside & told & (own.abs() > 1e-300)
    weights = 1 / own.masked_fill(~good, torch.inf)  # c of each example
    limit = (slack * weights.abs()[None]).clamp_min(1e-9)
    fits = ((M * weights[None] - torch.eye(len(x)).to(M)).abs() <= limit) | ~good[:, None] | ~good[None]
    good &= fits.all(1) & (limit.diagonal() < LARGEST_SHARE)
    if not bool(good.any()):
        return Peeling(good, _refusal(inside, told))
    near = limit.diagonal() + 1e-6
    open_ = (weights - 1).abs() > near  # its factor leaves the scale of an example to its delta's direction
    shown = _shows_scale(send, x, y) > 10 * allowed[1] / delta.norm(dim=1)
    good &= shown if doubted else shown | ~open_
    if _solved(view, y):
        good &= _pinned(send, x, y, delta) > 10 * allowed[1] / delta.norm(dim=1)
    if doubted:
        good &= _shows_sign(view, send, x, delta) > 10 * allowed[1] / delta.norm(dim=1)
    if not bool(good.any()):
        words = "other inputs explain this layer's gradient as well, each at a factor of its own."
        return Peeling(good, words)
    c = float(weights[good].median())
    common = bool(((weights[good] / c - 1).abs() <= near[good] + 1e-3).all())
    return Peeling(good, _approval(layer, int(good.sum()), c, common), c if common else None)


def _shows_scale(send: _Sender, x: Tensor, y: Tensor) -> Tensor:
    """By how much the directions [k] of the deltas turn for examples a tenth larger, by what the first order says."""
    here, larger = (torch.nn.functional.normalize(send(t * x, y), dim=1) for t in (1.0, 1 + SCALE_MOVE))
    turn: Tensor = (larger - here).norm(dim=1) * SCALE_ERROR / SCALE_MOVE
    return turn


def _solved(view: View, y: Tensor) -> bool:
    """Whether labels y [k, ...] are real numbers that were solved for, and not class numbers or bits that were tried."""
    return "labels" not in view.knowledge and y.is_floating_point() and not bool(((y == 0) | (y.abs() == 1)).all())


def _pinned(send: _Sender, x: Tensor, y: Tensor, delta: Tensor) -> Tensor:
    """By how much, relative, the deltas [k] of examples a tenth larger leave all that real targets y [k, ...] make of them.

    Without a bias t x and a delta of 1 / t send the same gradient, a bias at another rate is another size as well, and
    where nothing above bends some target makes it so.
    """
    flat = y.flatten(1)
    units = torch.eye(flat.shape[1]).to(flat)
    columns = torch.stack([send(x, (flat + SCALE_MOVE * e).view_as(y)) - delta for e in units], 2)  # [k, m, targets]
    moved = (send((1 + SCALE_MOVE) * x, y) - delta)[:, :, None]
    beside = (moved - columns @ (torch.linalg.pinv(columns, rtol=LEAST_SINGULAR) @ moved))[:, :, 0]
    found: Tensor = beside.norm(dim=1) / delta.norm(dim=1) * SCALE_ERROR / SCALE_MOVE
    return found


def _shows_sign(view: View, send: _Sender, x: Tensor, delta: Tensor) -> Tensor:
    """How far the deltas [k] are, relative, from any that the mirrored examples send back, under any label, to a factor."""
    own = torch.nn.functional.normalize(delta, dim=1)
    least = torch.full_like(own[:, 0], torch.inf)
    for label in possible_labels(view):
        other = torch.nn.functional.normalize(send(-x, label.expand(len(x), *label.shape[1:])), dim=1)
        along = (own * other).sum(1, keepdim=True)
        least = torch.minimum(least, (own - along * other).norm(dim=1))
    return least


def _approval(layer: Dense, count: int, c: float, common: bool) -> str:
    noun = "example comes" if count == 1 else "examples come"
    at = "" if abs(c - 1) < 1e-3 else f", at {c:.4g} times what the model sends back"
    at = at if common else ", each at a factor of its own"
    return f"{count} {noun} out of the gradient of {layer.name!r}, which loses as much rank{at}."


def _refusal(inside: Tensor, told: Tensor) -> str:
    if bool(inside.any()) and not bool((inside & told).any()):
        return "the bounds or the gradient's error are so wide that any such inputs would come out of it."
    return "what these inputs send back is no part of the layer's gradient."


def _wrong(send: _Sender, x: Tensor, y: Tensor, times: Tensor, delta: Tensor, near: Tensor) -> Tensor:
    """How far the deltas [k] are moved by moves of the examples within their bounds `near`."""
    rng = torch.Generator().manual_seed(0)
    random = torch.randn(x.shape, generator=rng, dtype=torch.float64).to(x)
    mixed = torch.randn(len(x), len(x), generator=rng, dtype=torch.float64).to(x) @ x
    moved = [
        (send(x + near[:, None] * torch.nn.functional.normalize(way, dim=1), y) * times[:, None] - delta).norm(dim=1)
        for way in (random, x, mixed)
    ]
    return torch.stack(moved).amax(0)


def _whatever_the_label(view: View, layer: Dense, found: Reconstruction, sure: Tensor) -> Peeling:
    """One example under a loss whose labels are of no known form: its delta is to be one that outputs can send back."""
    nothing = torch.zeros_like(sure)
    if len(found) > 1 or found.inputs is None:
        return Peeling(
            nothing, "labels of this loss are of no known form, so what these inputs send back is not known."
        )
    of_layer = bool(found.layer)
    here = sent_back(view, layer, found.inputs, of_layer)
    K, m = here.basis.shape
    if 2 * K > m:
        return Peeling(
            nothing, f"the label is not known, and {K} outputs may send back to {m} neurons nearly anything."
        )
    allowed = SLACK * 16 * torch.finfo(view.obs.dtype).eps
    if here.misfit > allowed:
        words = f"no label makes the model send back to {layer.name!r} what was seen there: {here.misfit:.1e} is left."
        return Peeling(nothing, words)
    larger = sent_back(view, layer, (1 + SCALE_MOVE) * found.inputs.double(), of_layer)
    if (larger.misfit - here.misfit) * SCALE_ERROR / SCALE_MOVE <= 10 * allowed:
        return Peeling(nothing, "under some label inputs of any scale explain this gradient.")
    return Peeling(sure.clone(), f"under some label the model sends back to {layer.name!r} what was seen there.")


def _best_labels(view: View, send: _Sender, span: Span, x: Tensor) -> Tensor:
    """Of each example the label whose delta lies best in the gradient's column space. Raises NotApplicable: none may."""
    candidates = possible_labels(view)
    if not candidates or len(candidates[0]) > 1:
        raise NotApplicable("the labels of these examples are not known.")
    lost = []
    for y in candidates:
        delta = torch.nn.functional.normalize(send(x, y.expand(len(x), *y.shape[1:])), dim=1)
        lost.append((delta - delta @ span.columns @ span.columns.T).norm(dim=1))
    best = torch.stack(lost).argmin(0)
    return torch.cat([candidates[int(i)] for i in best])


def _distinct(x: Tensor, y: Tensor, near: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The examples that are not the same as one before, to their bounds and labels; how often each; of all, which it is."""
    first, times, owner = list[int](), list[int](), list[int]()
    for i in range(len(x)):
        same = [
            at
            for at, j in enumerate(first)
            if bool((x[i] - x[j]).norm() <= near[i] + near[j] + 1e-12 * x[i].norm()) and bool((y[i] == y[j]).all())
        ]
        if not same:
            first, times, same = [*first, i], [*times, 0], [len(first)]
        times[same[0]] += 1
        owner.append(same[0])
    return tuple(torch.tensor(held, device=x.device) for held in (first, times, owner))  # type: ignore[return-value]


def _first_of_each(owner: Tensor) -> Tensor:
    seen = set[int]()
    return torch.tensor([not (at in seen or seen.add(at)) for at in owner.tolist()], device=owner.device)  # type: ignore[func-returns-value]


def _claimed(values: Tensor | None, sure: Tensor) -> Tensor:
    assert values is not None
    return values[sure.to(values.device)]


def _received(view: View, layer: Dense, inputs: Tensor, of_layer: bool) -> Tensor:
    """What the layer receives of inputs of the network, or of itself, in float64 [k, d]."""
    flat = inputs.to(view.obs.device).double().flatten(1)
    if of_layer or layer.feeds is None:
        return flat
    return flat * layer.feeds.scale.to(flat) + layer.feeds.shift.to(flat)


def _reached(view: View, layer: Dense, inputs: Tensor, x: Tensor) -> None:
    """Raises NotApplicable unless the layer receives x [k, d] of inputs [k, ...] in the client's mode as well."""
    kind = next(view.model.parameters()).dtype
    with torch.random.fork_rng(devices=[]):
        seen = layer_inputs(view.model, layer.name, inputs.to(view.obs.device, kind), view.protocol.mode).double()
    if not torch.allclose(seen, x, rtol=1e-3, atol=1e-3 * float(x.abs().max())):
        raise NotApplicable(f"what {layer.name!r} receives of these inputs is another in the client's mode, or random.")


def _parameters(view: View, layer: Dense) -> tuple[Tensor, Tensor | None]:
    parameters = dict(view.model.named_parameters(remove_duplicate=False))
    b = parameters[layer.bias].detach().double() if layer.bias else None
    return parameters[layer.weight].detach().double(), b


def _delta(view: View, layer: Dense, z: Tensor) -> Tensor:
    """What the update says was sent back to the layer [m], if one example that it received as z [1, d] is behind it."""
    if layer.bias is not None and layer.bias in view.update:
        return view.update[layer.bias].double()
    found: Tensor = view.update[layer.weight].double() @ z[0] / z[0].square().sum()
    return found


def _tail(view: View, layer: Dense, n: int) -> Tail:
    """The model above the layer. Raises NotApplicable: what an example sends back depends on more than itself."""
    if view.form is None:
        raise NotApplicable("the loss is of no known form.")
    tail = Tail(view.obs, layer, view.form, n)
    tail.check_apart()
    return tail


def _outputs(view: View, layer: Dense, before: Tensor) -> Tensor:
    """The model's outputs [k, K], flat, where the layer gives `before` [k, m]; in float64."""
    obs = view.obs
    above = FromLayer(in_double(obs.model), layer.weight, obs.knowledge.input_shape, output=True)
    buffers = {
        f"whole.{k}": b.double() if b.is_floating_point() else b for k, b in obs.knowledge.get("buffers", {}).items()
    }
    held = {**dict(above.named_parameters()), **buffers}
    with torch.enable_grad(), in_mode(above, obs.protocol.mode), torch.random.fork_rng(devices=[]):
        found: Tensor = outputs_of(above, before, held)
        again: Tensor = outputs_of(above, before, held)
    if not torch.allclose(found, again):
        raise NotApplicable("the model is random in the client's mode (dropout), so what it sends back is not known.")
    return found
