"""Trunk: the layers below a network's first dense layer, read backward by the equations that each of them obeys."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from unbatch.chain import Link
from unbatch.layer import LayerRule, rule_for
from unbatch.layers.activation import Activation
from unbatch.numerics.linsys import ENTRIES, LinearSystem, Solution
from unbatch.progress import tick
from unbatch.pullback import FLOOR, Fit, Pullback

SPREAD, DRAWN = 0.25, 2  # of the starts drawn around the middle, and how many
FITS = 10.0  # times what nearly the same updates change in a residual: no more than rounding
NEAR = 1e-8  # where there are none
Smooth = Callable[[Pullback], Tensor]  # equations on a picture -> a picture [d]
RESHAPES = (nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d)  # the last in eval mode


class Unreadable(ValueError):  # noqa: N818 (a layer that has no way back, named for it)
    """A layer that cannot be read backward; the message names it."""


@dataclass(frozen=True)
class Start:
    """What is known of the last link: its output [n, *shape], dL/d(output) and the update below it, NaN where it is not."""

    output: Tensor
    grad: Tensor
    update: Mapping[str, Tensor]
    layers: Mapping[str, nn.Module] = field(default_factory=dict)  # by link's name, where it has another than the link


@dataclass(frozen=True)
class Reading:
    """What a run of affine layers, or a lone activation, tells of its input; or a run that is not linear, near a root."""

    links: tuple[Link, ...]  # the run, first to last
    x: Tensor  # [n, *shape] its input: the least-squares solution of least norm
    grad: Tensor  # [n, *shape] dL/dx, which the later layers give whether or not x is determined
    system: LinearSystem
    solution: Solution
    others: tuple[tuple[Tensor, Tensor], ...] = ()  # x and dL/dx of the other starts, to first order
    pullback: Pullback | None = None  # the equations of a run that is not linear: `system` is theirs at x
    fits: bool = True  # x solves them, up to rounding

    @property
    def deficit(self) -> int | None:
        """Unknowns that the equations leave open; None where they were too many to count, or x solves none of them."""
        return None if self.solution.rank is None or not self.fits else self.system.unknowns - self.solution.rank

    @property
    def layers(self) -> str:
        """The names of the run's layers."""
        return ", ".join(link.name for link in self.links)


def read(
    links: Sequence[Link],
    start: Start,
    others: Sequence[Start] = (),
    *,
    forward: bool = True,
    grey: float | None = None,
    smooth: Smooth | None = None,
) -> Generator[Reading, Tensor | None, None]:
    """From the last link's output to the network's input, a reading before each activation.

    A run of affine layers between two activations is one linear system: what is known of the run's output, through all of
    them, and for each layer with a weight its gradient equations sum_i K_i x_i = dL/dW; without `forward` those alone
    where there are any (R-CONV). The caller may send a better x than a deficient system's: the layers before are read
    from it. `others` are starts of nearly the same update: they are followed along the first one's factors, x' = x +
    A^+ (b' - A' x), and their spread tells which outputs of an activation cannot be told from a flat end of its range.

    With `grey`, a value in the middle of the network's inputs, and for one example: what a deficient system leaves open,
    and a layer that has no linear way back (a residual block, max pooling, a layer norm, GELU), is read together with the
    layers before it by Gauss and Newton (`Pullback`), with as many of them as give enough equations. Then only the last
    reading may be deficient. `smooth` finds a root of the equations on the network's input by what pictures look like:
    where Gauss and Newton find none from grey, they start there, and it is what is read where they find none at all.

    Raises Unreadable.
    """
    states = [_State(each) for each in (start, *others)]
    grey = grey if states[0].n == 1 else None
    run: list[Link] = []
    lone: list[Link] = []  # an activation, until an affine layer comes before it
    curve: _Curve | None = None
    for i, link in reversed(list(enumerate(links))):
        kind, rule = type(link.module).__name__, rule_for(link.module)
        if curve is not None and isinstance(rule, Activation) and (found := curve.determined(link, states)) is not None:
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
            if grey is not None and reading.deficit:
                for state in states:
                    state.top = reading.solution.held(state.x.flatten()), state.grad
                if not (wanted := _Curve([link], states)).too_large(links[:i]):
                    curve = wanted
                    continue
                grey = None
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
                raise ValueError("it has no rule to read it backward by.")
            for state in states:
                if isinstance(rule, Activation):
                    state.invert(rule, link)
                else:
                    state.extend(rule, link, forward=forward)
        except ValueError as error_:
            why = str(error_)
            if grey is not None:
                curve = _Curve([link, *(run or lone[:-1])], states)
                if not (large := curve.too_large(links[:i])):
                    run, lone = [], []
                    continue
                why = f"{why[:-1]}, and {large}."
            raise Unreadable(f"layer {link.name!r} ({kind}) cannot be read backward: {why}") from error_
        if isinstance(rule, Activation):
            lone = [link]
        else:
            run.insert(0, link)
    if curve is not None and grey is not None:
        yield curve.solved(states, grey, smooth)
    elif run or lone:
        yield _solved(run or lone, states)


class _Curve:
    """A run that is not linear, first to last, below what is known of its output; one example."""

    def __init__(self, links: list[Link], states: Sequence[_State]) -> None:
        self.links = links
        self.known = [(*state.top, state.update) for state in states]

    def equations(self, before: Sequence[Link] = ()) -> int:
        """Those of the run and the links `before` it."""
        names = tuple(f"{link.name}." for link in (*before, *self.links))
        system, _, update = self.known[0]
        return system.equations + sum(t.numel() for name, t in update.items() if name.startswith(names))

    def too_large(self, before: Sequence[Link]) -> str:
        """Why the run cannot be followed down to the network's input, in words."""
        equations, unknowns = self.equations(before), [*before, *self.links][0].unknowns
        if equations * unknowns <= ENTRIES:
            return ""
        return f"the {equations:,} equations from there on for {unknowns:,} numbers are too many for Gauss and Newton"

    def determined(self, last: Link, states: Sequence[_State]) -> Reading | None:
        """The reading of the run's input, the output of `last`, which the states then know; None: it stays open."""
        unknowns = self.links[0].unknowns
        if not unknowns <= self.equations() <= ENTRIES / unknowns:
            return None
        zero = torch.zeros(1, *last.before, dtype=torch.float64, device=states[0].x.device)
        middle = float(last.module(zero).mean())
        at = middle + SPREAD * torch.randn(unknowns, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        system = self._pullbacks()[0].system(at.to(zero))
        if bool(system.b.isfinite().all()) and system.rank() < unknowns:  # and so nearly everywhere
            return None
        reading = self.solved(states, middle)
        if reading.deficit != 0:
            return None
        for state, (x, grad) in zip(states, ((reading.x, reading.grad), *reading.others), strict=True):
            state.grad = grad.reshape(1, *last.after)
            state.know(x.reshape(1, *last.after))
        return reading

    def solved(self, states: Sequence[_State], middle: float, smooth: Smooth | None = None) -> Reading:
        """The root of least residual, by Gauss and Newton from a few starts: the first that fits is taken.

        The run's own output, if it has the input's shape, as in a residual block; grey; and noise, since a norm of what is
        flat has no derivative.
        """
        pullbacks = self._pullbacks()
        shape, known = self.links[0].before, self.known[0][0]
        flat = torch.full(shape, middle, dtype=torch.float64, device=known.b.device)
        rng = torch.Generator().manual_seed(0)
        noise = SPREAD * torch.randn(DRAWN, *shape, generator=rng, dtype=torch.float64)
        same = known.unknowns == known.equations == flat.numel()
        own = [known.pull(known.b[None]).view(shape)] if same else []
        tries: list[Callable[[], Tensor]] = [partial(self._near, pullbacks[0], start) for start in [*own, flat]]
        tries += [lambda: smooth(pullbacks[0]).view(shape)] if smooth is not None else []
        tries += [partial(pullbacks[0].descend, flat + each.to(flat), tick) for each in noise]
        found: list[Reading] = []
        for begin in tries:
            fit = pullbacks[0].solve(begin(), tick)
            found.append(self._reading(fit, pullbacks))
            if found[-1].fits or not tick(0.0):
                break
        if smooth is not None and not found[-1].fits and len(found) > len(own) + 1:
            return found[len(own) + 1]
        return found[-1] if found[-1].fits else min(found, key=_residual)

    def _pullbacks(self) -> list[Pullback]:
        try:
            return [Pullback(self.links, *known) for known in self.known]
        except ValueError as error:
            raise Unreadable(str(error)) from error

    def _reading(self, fit: Fit, pullbacks: Sequence[Pullback]) -> Reading:
        shape, x = fit.x.shape, fit.x.flatten()
        moved = [x - fit.solution.inverse(each(x).detach()) for each in pullbacks[1:]]
        r = pullbacks[0](x).detach()
        rounding = max((float((each(x).detach() - r).norm()) for each in pullbacks[1:]), default=NEAR)
        others = [
            (at.view(1, *shape), own.grad_input(at).view(1, *shape))
            for at, own in zip(moved, pullbacks[1:], strict=True)
        ]
        return Reading(
            tuple(self.links),
            fit.x[None],
            pullbacks[0].grad_input(x).view(1, *shape),
            pullbacks[0].system(x),
            fit.solution,
            tuple(others),
            pullbacks[0],
            fit.residual <= FITS * max(rounding, FLOOR),
        )

    def _near(self, pullback: Pullback, start: Tensor) -> Tensor:
        """Without the gradients first: what is left is continuous in x, while those jump at kinks."""
        return pullback.without_gradients().solve(start, tick).x


def _residual(reading: Reading) -> float:
    return float(reading.system.b.norm())


class _State:
    """One start's way back: x [n, *shape], if it is known as a whole, dL/dx, and what is known of the current tensor."""

    def __init__(self, start: Start) -> None:
        self.update, self.grad, self.layers = start.update, start.grad.double(), start.layers
        self.know(start.output.double())

    def know(self, x: Tensor) -> None:
        self.x, self.n = x, len(x)
        self.raw: tuple[Link, Tensor, Tensor] | None = None  # the activation after, its output but for ends, dL/d of it
        self.hidden = False  # affine layers lie between the current tensor and what is known entry by entry
        self.known = [_all(part) for part in x]
        self.extra: list[LinearSystem] = []
        self.top = self.known[0], self.grad  # of the run that begins here

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
        self.known = [system.through(_held(rule, link, system)) for system in self.known]
        self.extra = [system.through(_held(rule, link, system, self.n)) for system in self.extra]
        weight = self.update.get(f"{link.name}.weight" if link.name else "weight")
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


def _all(x: Tensor) -> LinearSystem:
    return LinearSystem.some(torch.arange(x.numel(), device=x.device), x.flatten(), x.numel())


def _held(rule: LayerRule, link: Link, system: LinearSystem, n: int = 1) -> LinearSystem:
    """The layer's own map of its input, of n inputs one after the other, as equations that hold its output to 0."""
    zero = torch.zeros(link.after, dtype=torch.float64, device=system.b.device)
    one = rule.forward_equations(link.module, link.before, zero)
    return LinearSystem.beside([one] * n)


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
    return Solution(torch.cat([each.x for each in found]), ranks, None, None, inverse)
