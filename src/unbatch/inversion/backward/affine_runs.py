"""Trunk: the layers below a network's first dense layer, read backward by the equations that each of them obeys."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from unbatch.errors import UnbatchError
from unbatch.inversion.backward.nonlinear_runs import Box, Curve
from unbatch.inversion.backward.reading import Known, Reading, Start, Unreadable
from unbatch.layer import LayerRule, rule_for
from unbatch.layers.activation import Activation
from unbatch.layers.residual import bend
from unbatch.network.chain import Link
from unbatch.numerics.linear.linsys import LinearSystem, Solution

DROPOUTS = nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d  # in eval mode
RESHAPES = nn.Flatten, nn.Unflatten, nn.Identity, *DROPOUTS


def read(
    links: Sequence[Link],
    start: Start,
    others: Sequence[Start] = (),
    *,
    forward: bool = True,
    box: Box | None = None,
) -> Generator[Reading, Tensor | None, None]:
    """From the last link's output to the network's input, a reading before each activation.

    A run of affine layers between two activations is one linear system: what is known of the run's output, through all of
    them, and for each layer with a weight its gradient equations sum_i K_i x_i = dL/dW; without `forward` those alone
    where there are any (R-CONV). The caller may send a better x than a deficient system's: the layers before are read
    from it. `others` are starts of nearly the same update: they are followed along the first one's factors, x' = x +
    A^+ (b' - A' x), and their spread tells which outputs of an activation cannot be told from a flat end of its range.

    With `box`, the range of the network's inputs, and for one example: what a deficient system leaves open, and a layer
    that has no linear way back (a residual block, max pooling, a layer norm, GELU), is read together with the layers before
    it (`Curve`), with as many of them as give enough equations. Then only the last reading may be deficient.

    Raises Unreadable.
    """
    states = [_State(each) for each in (start, *others)]
    box = box if states[0].n == 1 else None
    run: list[Link] = []
    lone: list[Link] = []  # an activation, until an affine layer comes before it
    curve: Curve | None = None
    for i, link in reversed(list(enumerate(links))):
        kind, rule = type(link.module).__name__, rule_for(link.module)
        if curve is not None and isinstance(rule, Activation) and (found := curve.determined(link)) is not None:
            for state, (x, grad) in zip(states, ((found.x, found.grad), *found.others), strict=True):
                state.grad = grad.reshape(1, *link.after)
                state.know(x.reshape(1, *link.after))
            yield found
            curve = None
        if curve is not None:
            curve.links.insert(0, link)
            continue
        if isinstance(link.module, RESHAPES) and rule is not None:
            for state in states:
                state.reshape(link.before, within=bool(run or lone))
            run, lone = ([link, *run] if run else run), ([link, *lone] if lone else lone)
            continue
        if isinstance(rule, Activation) and (run or lone):
            reading = _solved(run or lone, states)
            better = yield reading
            for state, (x, _) in zip(states, ((reading.x, reading.grad), *reading.others), strict=True):
                state.know((x if better is None else better).reshape(len(x), *link.after))
            run, lone = [], []
            if box is not None and reading.deficit:
                for state in states:
                    state.top = reading.solution.held(state.x.flatten()), state.grad
                if not (wanted := Curve([link], [state.seen for state in states])).too_large(links[:i]):
                    curve = wanted
                    continue
                box = None
        if isinstance(rule, Activation):
            spread = max((float((state.x - states[0].x).abs().max()) for state in states[1:]), default=0.0)
            error = max(2 * spread, float(torch.finfo(torch.float64).eps))
            same = zip(*(state.x for state in states), strict=True)  # one example in all states
            settled = [rule.settled(link.module, outputs, error) for outputs in same]
            for state, examples in zip(states, zip(*settled, strict=True), strict=True):
                x, state.x = state.x, torch.stack(examples)
                state.raw = link, torch.where((x - state.x).abs() > 2 * error, x, state.x), state.grad
        try:
            if rule is None:
                raise UnbatchError(bend(link.module) or "it has no rule to read it backward by.")
            for state in states:
                if isinstance(rule, Activation):
                    state.invert(rule, link)
                else:
                    state.extend(rule, link, forward=forward)
        except ValueError as error_:
            why = str(error_)
            if box is not None:
                curve = Curve([link, *(run or lone[:-1])], [state.seen for state in states])
                if not (large := curve.too_large(links[:i])):
                    run, lone = [], []
                    continue
                why = f"{why[:-1]}, and {large}."
            raise Unreadable(f"layer {link.name!r} ({kind}) cannot be read backward: {why}") from error_
        if isinstance(rule, Activation):
            lone = [link]
        else:
            run.insert(0, link)
    if curve is not None and box is not None:
        yield curve.solved(sum(box) / 2, box)
    elif run or lone:
        yield _solved(run or lone, states)


def everything(x: Tensor) -> LinearSystem:
    """Every entry of x, known."""
    return LinearSystem.some(torch.arange(x.numel(), device=x.device), x.flatten(), x.numel())


def held(rule: LayerRule, link: Link, system: LinearSystem, n: int = 1) -> LinearSystem:
    """The layer's own map of its input, of n inputs one after the other, as equations that hold its output to 0."""
    zero = torch.zeros(link.after, dtype=torch.float64, device=system.b.device)
    one = rule.forward_equations(link.module, link.before, zero)
    return LinearSystem.beside([one] * n)


class _State:
    """One start's way back: x [n, *shape], if it is known as a whole, dL/dx, and what is known of the current tensor."""

    def __init__(self, start: Start) -> None:
        self.update, self.grad, self.layers = start.update, start.grad.double(), start.layers
        self.know(start.output.double())

    def know(self, x: Tensor) -> None:
        self.x, self.n = x, len(x)
        self.raw: tuple[Link, Tensor, Tensor] | None = None  # the activation after, its output but for ends, dL/d of it
        self.hidden = False  # affine layers lie between the current tensor and what is known entry by entry
        self.known = [everything(part) for part in x]
        self.extra: list[LinearSystem] = []
        self.top = self.known[0], self.grad  # of the run that begins here

    @property
    def seen(self) -> Known:
        """What is known of the run's output, or of an activation's."""
        return *self.top, self.update

    def reshape(self, shape: tuple[int, ...], *, within: bool) -> None:
        self.grad = self.grad.reshape(self.n, *shape)
        if not within:
            self.x = self.x.reshape(self.n, *shape)

    def invert(self, rule: LayerRule, link: Link) -> None:
        """An activation's input, entry by entry."""
        self.grad = self._back(rule, link, self.x)
        self.known = [rule.forward_equations(link.module, link.before, part) for part in self.x]
        self.top = self.known[0], self.grad

    def extend(self, rule: LayerRule, link: Link, *, forward: bool) -> None:
        """One affine layer more in the run."""
        link = replace(link, module=self.layers.get(link.name, link.module))
        grad = self._back(rule, link, self._whole() if rule.reads_output else self.grad)
        self.known = [system.through(held(rule, link, system)) for system in self.known]
        self.extra = [system.through(held(rule, link, system, self.n)) for system in self.extra]
        weight = _sent(rule, link, self.update)
        if weight is not None:
            own = [rule.gradient_equations(link.module, link.before, part, weight) for part in self.grad]
            if own[0].equations:
                b = torch.stack([system.b for system in own]).sum(0) - (self.n - 1) * weight.double().flatten()
                sent = b.isfinite()  # NaN stands for an entry that was not sent
                system = LinearSystem.summed(own, b)
                self.extra.append(system if bool(sent.all()) else system.among(sent.nonzero()[:, 0]))
                if not forward:
                    self.known = [LinearSystem.none(system.unknowns, weight) for system in self.known]
        self.grad, self.hidden = grad, True

    def _whole(self) -> Tensor:
        """The current tensor [n, ...], NaN where it is not known; dL/d of it is taken there, not where it was settled."""
        if self.hidden:
            return torch.full_like(self.grad, torch.nan)
        if self.raw is None:
            return self.x
        link, x, self.grad = self.raw
        rule = Activation()
        self.grad = self._back(rule, link, x)
        known = [rule.forward_equations(link.module, link.before, part) for part in x]
        pairs = [system.pull(torch.stack([system.b, torch.ones_like(system.b)])) for system in known]
        return torch.stack([torch.where(seen > 0, z, torch.nan) for z, seen in pairs])

    def _back(self, rule: LayerRule, link: Link, output: Tensor) -> Tensor:
        pairs = zip(*(t.reshape(self.n, *link.after) for t in (output, self.grad)), strict=True)
        return torch.stack([rule.grad_input(link.module, link.before, z, dz) for z, dz in pairs])


def _sent(rule: LayerRule, link: Link, update: Mapping[str, Tensor]) -> Tensor | None:
    """The gradients of a layer's weights: of one as it is, of several flat, in a row; NaN for what was not sent."""
    own = rule.weights(link.module)
    found = {name: update.get(f"{link.name}.{name}" if link.name else name) for name in own}
    if all(tensor is None for tensor in found.values()):
        return None
    if len(own) == 1 and own[0] == "weight":
        return found["weight"]
    parts = dict(link.module.named_parameters())
    flat = [torch.full_like(parts[k], torch.nan) if t is None else t for k, t in found.items()]
    return torch.cat([tensor.flatten().double() for tensor in flat])


def _solved(run: Sequence[Link], states: Sequence[_State]) -> Reading:
    shape = run[0].before
    systems = [LinearSystem.beside(state.known) for state in states]
    solution = _apart(states[0].known) if states[0].n > 1 else None
    if solution is None:
        systems = [_joined(system, state.extra) for system, state in zip(systems, states, strict=True)]
        solution = systems[0].solve()
    moved = [solution.x + solution.inverse(system.residual(solution.x)) for system in systems[1:]]
    others = tuple((x.view(-1, *shape), state.grad) for x, state in zip(moved, states[1:], strict=True))
    return Reading(tuple(run), solution.x.view(-1, *shape), states[0].grad, systems[0], solution, others)


def _joined(system: LinearSystem, extra: Sequence[LinearSystem]) -> LinearSystem:
    """All equations, equally heavy."""
    weight = system.size
    for own in extra:
        size = own.size
        system = system + own * (weight / size if weight > 0 and size > 0 else 1.0)
    return system


def _apart(systems: Sequence[LinearSystem]) -> Solution | None:
    """The solution of several examples' own equations, one by one; None unless they determine every example."""
    found = []
    for system in systems:
        if system.equations < system.unknowns:
            return None
        found.append(system.solve())
        if found[-1].rank != system.unknowns:
            return None

    def inverse(r: Tensor) -> Tensor:
        parts = torch.split(r, [system.equations for system in systems])
        return torch.cat([each.inverse(part) for each, part in zip(found, parts, strict=True)])

    ranks = sum(system.unknowns for system in systems)
    return Solution(torch.cat([each.x for each in found]), ranks, inverse)
