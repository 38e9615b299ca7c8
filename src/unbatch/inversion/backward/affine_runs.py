"""Affine runs: what is known of a run's output as linear equations on its input, through one layer after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unbatch.inversion.backward.reading import KnownEquations, KnownOutput, Reading, Unreadable
from unbatch.inversion.backward.runs import ActivationRun, AffineRun, Ruled, refusal
from unbatch.layer import LayerRule
from unbatch.layers.activation import Activation
from unbatch.network.chain import Link
from unbatch.numerics.linear.linsys import LinearSystem, Solution


def everything(x: Tensor) -> LinearSystem:
    """The equations of a tensor that is known entry by entry: the identity.

    >>> everything(torch.tensor([1.0, 2.0], dtype=torch.float64)).matrix().tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    return LinearSystem.some(torch.arange(x.numel(), device=x.device), x.flatten(), x.numel())


def held(rule: LayerRule, link: Link, system: LinearSystem, n: int = 1) -> LinearSystem:
    """A layer's own map F x + c of its input, as equations that hold its output to 0: F x = -c.

    Of n inputs, one after the other; on the device of `system`, which can then go `through` them.
    Raises UnbatchError: the layer's rule refuses.

    >>> from torch import nn
    >>> from unbatch.layers.affine import Affine
    >>> layer = nn.Linear(1, 1).double()
    >>> _ = layer.weight.data.fill_(2.0), layer.bias.data.fill_(3.0)
    >>> system = held(Affine(), Link("dense", layer, (1,), (1,)), everything(torch.zeros(1, dtype=torch.float64)))
    >>> system.matrix().tolist(), system.b.tolist()
    ([[2.0]], [-3.0])
    """
    zero = torch.zeros(link.after, dtype=torch.float64, device=system.b.device)
    one = rule.forward_equations(link.module, link.before, zero)
    return LinearSystem.beside([one] * n)


@dataclass(frozen=True)
class Place:
    """One tensor inside a run, read backward: what is known of the run's output, as equations on this tensor."""

    known: KnownOutput  # of the run's output
    grad: Tensor  # [n, *shape] dL/d of the tensor
    systems: tuple[LinearSystem, ...]  # of each example's tensor: what its output tells
    gradients: tuple[
        LinearSystem, ...
    ] = ()  # of all examples' tensors: what the weights' gradients tell, layer by layer
    behind: tuple[Ruled, Tensor, Tensor] | None = (
        None  # the activation, its output but for its range's ends, dL/d of it
    )
    inner: bool = False  # affine layers lie between the tensor and what is known entry by entry

    @classmethod
    def at(cls, known: KnownOutput, shape: tuple[int, ...]) -> Place:
        """The run's output itself, of that shape."""
        n = len(known.output)
        known = replace(known, output=known.output.double().reshape(n, *shape), grad=known.grad.double())
        return cls(known, known.grad.reshape(n, *shape), tuple(everything(x) for x in known.output))

    @property
    def n(self) -> int:
        """How many examples there are."""
        return len(self.systems)

    @property
    def equations(self) -> KnownEquations:
        """What is known of the first example's tensor."""
        return KnownEquations(self.systems[0], self.grad, self.known.update)

    def reshaped(self, shape: tuple[int, ...]) -> Place:
        """Before a layer that only reshapes its input from that shape."""
        known = self.known
        if self.behind is None and not self.inner:
            known = replace(known, output=known.output.reshape(self.n, *shape))
        return replace(self, known=known, grad=self.grad.reshape(self.n, *shape))

    def whole(self) -> tuple[Tensor, Tensor]:
        """The tensor [n, ...], NaN where it is not known, and dL/d of it taken there, not where it was settled."""
        if self.inner:
            return torch.full_like(self.grad, torch.nan), self.grad
        if self.behind is None:
            return self.known.output, self.grad
        layer, output, grad = self.behind
        grad = _grad_input(layer.rule, layer.link, output, grad)
        systems = [layer.rule.forward_equations(layer.link.module, layer.link.before, z) for z in output]
        pairs = [system.pull(torch.stack([system.b, torch.ones_like(system.b)])) for system in systems]
        return torch.stack([torch.where(seen > 0, x, torch.nan) for x, seen in pairs]), grad

    def before(self, layer: Ruled, *, forward: bool) -> Place:
        """Before an affine layer; without `forward`, its weight's gradient, where it was sent, is all that counts.

        Raises UnbatchError: the layer's rule refuses.
        """
        link, rule = replace(layer.link, module=self.known.layers.get(layer.link.name, layer.link.module)), layer.rule
        output, ahead = self.whole() if rule.reads_output else (self.grad, self.grad)
        grad = _grad_input(rule, link, output, ahead)
        systems = tuple(system.through(held(rule, link, system)) for system in self.systems)
        gradients = tuple(system.through(held(rule, link, system, self.n)) for system in self.gradients)
        own = _weight_equations(layer, link, ahead.reshape(self.n, *link.after), self.known.update)
        if own is not None:
            gradients = (*gradients, own)
            if not forward:
                systems = tuple(LinearSystem.none(system.unknowns, system.b) for system in systems)
        return replace(self, grad=grad, systems=systems, gradients=gradients, inner=True)


def entered(layers: Sequence[Ruled], known: Sequence[KnownOutput], shape: tuple[int, ...]) -> tuple[Place, ...]:
    """What stands behind a run undone: reshapes, and at most one activation, whose input is told entry by entry.

    `known` is of the last one's output, of that shape: of one update and of nearly the same ones, whose spread tells which
    outputs of the activation cannot be told from a flat end of its range.
    Raises Unreadable: an output has two inputs.
    """
    places = tuple(Place.at(each, shape) for each in known)
    for layer in reversed(layers):
        if isinstance(layer.rule, Activation):
            places = _inverted(layer, layer.rule, places)
        else:
            places = tuple(place.reshaped(layer.link.before) for place in places)
    return places


def solved(run: AffineRun | ActivationRun, places: Sequence[Place], *, forward: bool = True) -> Reading:
    """The run's input from the places before what stands behind it, by one linear system: see `Place.before`.

    The first place's system is solved; the others are followed along its factors, x' = x + A^+ (b' - A' x).
    Raises Unreadable: a layer's rule refuses.
    """
    for layer in reversed(run.layers if isinstance(run, AffineRun) else ()):
        if layer.reshapes:
            places = [place.reshaped(layer.link.before) for place in places]
            continue
        try:
            places = [place.before(layer, forward=forward) for place in places]
        except ValueError as error:
            raise Unreadable(refusal(layer.link, str(error))) from error
    first, shape = places[0], run.links[0].before
    systems = [LinearSystem.beside(place.systems) for place in places]
    solution = _apart(first.systems) if first.n > 1 else None
    if solution is None:
        systems = [_joined(system, place.gradients) for system, place in zip(systems, places, strict=True)]
        solution = systems[0].solve()
    moved = [solution.x + solution.inverse(system.residual(solution.x)) for system in systems[1:]]
    others = tuple((x.view(-1, *shape), place.grad) for x, place in zip(moved, places[1:], strict=True))
    return Reading(run.links, solution.x.view(-1, *shape), first.grad, systems[0], solution, others)


def _inverted(layer: Ruled, rule: Activation, places: Sequence[Place]) -> tuple[Place, ...]:
    """The places before an activation."""
    link, outputs = layer.link, [place.known.output for place in places]
    spread = max((float((output - outputs[0]).abs().max()) for output in outputs[1:]), default=0.0)
    error = max(2 * spread, float(torch.finfo(torch.float64).eps))
    same = [rule.settled(link.module, examples, error) for examples in zip(*outputs, strict=True)]  # one example in all
    found = list[Place]()
    for place, examples in zip(places, zip(*same, strict=True), strict=True):
        output, settled = place.known.output, torch.stack(examples)
        raw = torch.where((output - settled).abs() > 2 * error, output, settled)
        try:
            grad = _grad_input(rule, link, settled, place.grad)
            systems = tuple(rule.forward_equations(link.module, link.before, z) for z in settled)
        except ValueError as error_:
            raise Unreadable(refusal(link, str(error_))) from error_
        found.append(Place(place.known, grad, systems, behind=(layer, raw, place.grad)))
    return tuple(found)


def _grad_input(rule: LayerRule, link: Link, output: Tensor, grad: Tensor) -> Tensor:
    """dL/d of a layer's inputs [n, *before]."""
    pairs = zip(*(t.reshape(len(t), *link.after) for t in (output, grad)), strict=True)
    return torch.stack([rule.grad_input(link.module, link.before, z, dz) for z, dz in pairs])


def _weight_equations(layer: Ruled, link: Link, grad: Tensor, update: Mapping[str, Tensor]) -> LinearSystem | None:
    """What the gradient of a layer's weight tells of all examples' inputs; None where it was not sent, or tells nothing."""
    weight, n = _sent(layer.rule, link, update), len(grad)
    if weight is None:
        return None
    own = [layer.rule.gradient_equations(link.module, link.before, part, weight) for part in grad]
    if not own[0].equations:
        return None
    b = torch.stack([system.b for system in own]).sum(0) - (n - 1) * weight.double().flatten()
    sent = b.isfinite()  # NaN stands for an entry that was not sent
    system = LinearSystem.summed(own, b)
    return system if bool(sent.all()) else system.among(sent.nonzero()[:, 0])


def _sent(rule: LayerRule, link: Link, update: Mapping[str, Tensor]) -> Tensor | None:
    """The gradients of a layer's weights: of one as it is, of several flat, in a row; NaN for what was not sent."""
    own = rule.weights(link.module)
    found = {name: update.get(link.called(name)) for name in own}
    if all(tensor is None for tensor in found.values()):
        return None
    if len(own) == 1 and own[0] == "weight":
        return found["weight"]
    parts = dict(link.module.named_parameters())
    flat = [torch.full_like(parts[k], torch.nan) if t is None else t for k, t in found.items()]
    return torch.cat([tensor.flatten().double() for tensor in flat])


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
