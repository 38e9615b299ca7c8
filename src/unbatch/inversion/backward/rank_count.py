"""Rank count: how many independent equations each layer's output and gradient give on its input, at one example."""

from __future__ import annotations

import operator
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial, reduce

import torch
from torch import Tensor, nn

from unbatch.errors import NotApplicable
from unbatch.inversion.backward.affine_runs import everything, held
from unbatch.inversion.backward.pullback import EQUATIONS_AN_UNKNOWN, Pullback, standing_still
from unbatch.inversion.backward.runs import RESHAPES
from unbatch.layer import LayerRule, rule_for
from unbatch.layers.activation import Activation
from unbatch.layers.affine import Affine
from unbatch.layers.residual import bend, split
from unbatch.loss import Loss
from unbatch.network.chain import Link
from unbatch.network.precision import loss_value, outputs_of
from unbatch.numerics.linear.linsys import LinearSystem
from unbatch.numerics.linear.rank_law import ConvRanks, conv_ranks

EACH_LAYER = "constraints of each layer"  # by what name views keep them (`View.once`)
EFFORT = 20.0  # operations for each cubed unknown, in whose time a layer's three ranks are measured
ENTRY_EFFORT = 6e3  # for each unknown and each entry of the gradients, in whose time that is differentiated

# Unknowns up to which a layer's ranks are measured, and its condition number is, where nobody says otherwise.
RANKED_UNKNOWNS, CONDITIONED_UNKNOWNS = 4096, 1024


@dataclass(frozen=True)
class Constraints:
    """What W x = z (weight constraint) and K x = dL/dW (gradient constraint) say of a layer's input x, of one example.

    Both hold the later layers of its run, up to the next activation. Ranks are counted by the rank law where it answers,
    else measured from the systems when they are asked for.
    """

    link: Link
    weights: LinearSystem  # W x = z, for what the activation after the run lets through
    gradients: LinearSystem  # K x = dL/dW, and those of later layers where W does not hold them
    counted: ConvRanks | None
    curved: str = ""  # why the equations are not linear; both systems are their derivatives at the example then
    entries: int = 0  # of the gradients that such derivatives go through

    @property
    def unknowns(self) -> int:
        """Numbers in the layer's input."""
        return self.weights.unknowns

    @cached_property
    def weight(self) -> int:
        """rank W."""
        counted = None if self.counted is None else self.counted.weight
        return self.weights.rank() if counted is None else counted

    @cached_property
    def gradient(self) -> int:
        """rank K."""
        return self.gradients.rank() if self.counted is None else self.counted.gradient

    @cached_property
    def both(self) -> int:
        """rank [W; K]."""
        return self._both.rank() if self.counted is None else self.counted.both

    @cached_property
    def condition(self) -> float:
        """Largest over least singular value of [W; K], both blocks equally heavy; those at rounding are left out."""
        S = self._both.singular_values()
        return float(S[0] / S[-1]) if len(S) else float("inf")

    @property
    def effort(self) -> float:
        """Floating-point operations in which its ranks are measured, about; 0 where they are known."""
        known = self.counted is not None or {"gradient", "both"} <= set(self.__dict__)
        return 0.0 if known else self.unknowns * (EFFORT * float(self.unknowns) ** 2 + ENTRY_EFFORT * self.entries)

    @property
    def deficit(self) -> int:
        """Unknowns that both leave open."""
        return self.unknowns - self.both

    @property
    def _both(self) -> LinearSystem:
        heavy, light = self.weights.size, self.gradients.size
        return self.weights + self.gradients * (heavy / light if heavy > 0 and light > 0 else 1.0)


@dataclass(frozen=True)
class Unread:
    """A layer whose equations are not known, and why."""

    link: Link
    why: str


def constraints(
    links: Sequence[Link], x: Tensor, y: Tensor, loss: Loss, *, only: Container[str] | None = None
) -> list[Constraints | Unread]:
    """How many independent equations each layer's output and gradient give on its input, at one example.

    Of every layer of a chain that has parameters or begins a run of affine layers, or of those named `only`, first to last.
    As the attack reads them (`fold.readings`): a run's equations are what the activation after it lets through and its
    layers' gradients, all taken through the layers before; their derivatives where one of those has no rule, as a residual
    block. What follows the activation is held to be known, and so is the input of a dense layer, whose gradient dL/dz x^T
    gives it whatever W is where dL/dz is known, as behind a bias.
    links: a chain, moved to float64 in place; x [1, *shape], y [1].

    >>> from unbatch.network.chain import chain
    >>> model = nn.Sequential(nn.Conv2d(1, 1, 2, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(4, 2))
    >>> x, y = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0])
    >>> for each in constraints(chain(model, (1, 4, 4)), x, y, nn.functional.cross_entropy):
    ...     print(each.link.name, each.unknowns, each.weight, each.gradient, each.both)
    0 16 4 4 7
    3 4 2 4 4
    """
    inputs, links = list[Tensor](), split(links)
    with torch.enable_grad():
        z = x.detach().double().requires_grad_()
        for link in links:
            z = z.reshape(len(z), *link.before)
            inputs.append(z)
            # the chain's modules are copies; an activation may write in place, and a function may cast
            z = outputs_of(link.module.double(), z.clone()).double()
            if not z.requires_grad:
                raise NotApplicable(
                    f"no gradient passes {link.name!r} (a detached tensor, say), so there are none before it."
                )
        outputs = [*inputs[1:], z]
        grads = torch.autograd.grad(loss_value(loss, z, y), outputs)
    found: list[Constraints | Unread] = []
    after = _After(everything(z.detach()[0]))
    for i, link in reversed(list(enumerate(links))):
        rule = rule_for(link.module)
        here, output, grad = inputs[i].detach()[0], *(t.detach().reshape(link.after) for t in (outputs[i], grads[i]))
        if isinstance(link.module, RESHAPES) and rule is not None:
            continue
        if isinstance(rule, Activation):
            after = _After(rule.forward_equations(link.module, link.before, output))
            continue
        each, after = after.read(link, rule, here, output, grad)
        if isinstance(link.module, nn.Linear) and isinstance(each, Constraints) and each.counted is not None:
            after = _After(everything(here))
        named = any(True for _ in link.module.parameters()) or _begins(links[:i])
        if named if only is None else link.name in only:
            found.append(each)
    return found[::-1]


def c_of(layers: Sequence[tuple[int, int]]) -> int:
    """The published number c(M) of convolutions before one dense layer, by their (unknowns, rank), first to last.

    sum_i round[(D - 1 - i) / (D - 1) (rank_i - unknowns_i)] for D - 1 convolutions. Source: Chen and Campbell, 2021.

    >>> c_of([(100, 90), (50, 50)]), c_of([(100, 100), (50, 40)])
    (-10, -5)
    """
    D = len(layers) + 1
    return sum(round((D - 1 - i) / (D - 1) * (rank - unknowns)) for i, (unknowns, rank) in enumerate(layers))


def elementwise(link: Link) -> bool:
    """Whether a layer maps every entry by itself, one to one or as an activation does, or only reshapes.

    >>> pool, act = nn.AvgPool1d(2), nn.ReLU()
    >>> elementwise(Link("act", act, (1, 4), (1, 4))), elementwise(Link("pool", pool, (1, 4), (1, 2)))
    (True, False)
    """
    rule = rule_for(link.module)
    return isinstance(rule, Activation) or (rule is not None and (isinstance(link.module, RESHAPES) or _single(link)))


@dataclass(frozen=True)
class _After:
    """What is known behind a layer of its output: equations, and those of later layers' gradients."""

    known: LinearSystem
    extra: tuple[LinearSystem, ...] = ()
    single: bool = True  # every equation is one on one entry
    hidden: str = ""  # why it is not known by linear equations
    curve: tuple[Link, ...] = ()  # the layers between it and what is, where their equations can be followed
    grad: Tensor | None = None  # dL/d(the output of the last of them)

    @property
    def whole(self) -> bool:
        """Whether every entry is known by itself."""
        return not self.hidden and self.single and self.known.equations == self.known.unknowns

    def read(
        self, link: Link, rule: LayerRule | None, x: Tensor, output: Tensor, grad: Tensor
    ) -> tuple[Constraints | Unread, _After]:
        """The equations on a layer's input x, and what is known of that."""
        if _dense(link) and bool(grad.any()):
            W, n = _none(link, grad) if self.hidden else self.known.through(held(Affine(), link, self.known)), x.numel()
            return Constraints(link, W, _gradients(link, Affine(), grad), ConvRanks(n, min(n, W.equations), n, n)), self
        why, follow = self.hidden, not self.hidden or bool(self.curve)
        if not why and rule is None:
            bent = bend(link.module).rstrip(".")
            why = (
                f"{link.name!r} ({type(link.module).__name__}) has no rule to read it backward by{bent and ': ' + bent}"
            )
        if rule is not None:
            try:
                rule.grad_input(link.module, link.before, output, grad)
            except ValueError as error:
                why = why or f"{link.name!r} ({type(link.module).__name__}) has no linear way back: {error}".rstrip(".")
                follow = False
        if why or rule is None:
            if follow:
                try:
                    standing_still(link, grad.device)
                except ValueError as error:
                    why, follow = f"{why}; {error}", False
            known = self.known if self.hidden else _joined((self.known, *self.extra))
            curve = (link, *self.curve) if follow else ()
            after = _After(known, hidden=why, curve=curve, grad=self.grad if self.hidden else grad)
            return _curved(link, after, x), after
        K, W = _gradients(link, rule, grad), self.known.through(held(rule, link, self.known))
        later = () if self.whole else tuple(each.through(held(rule, link, each)) for each in self.extra)
        gradients = tuple(each for each in (K, *later) if each.equations)
        found = Constraints(link, W, _joined(gradients or (K,)), _counted(link) if self.whole else None)
        return found, _After(W, gradients, self.single and _single(link))


def _curved(link: Link, after: _After, x: Tensor) -> Constraints | Unread:
    """The derivatives at x of the equations that follow from there to what is known, computed when they are asked for."""
    if not after.curve or after.grad is None:
        return Unread(link, after.hidden)
    own = {each.called(name): p for each in after.curve for name, p in each.module.named_parameters()}
    most = EQUATIONS_AN_UNKNOWN * link.unknowns
    entries = sum(p.numel() for p in own.values())
    cut, e = after.known.equations, after.known.equations + sum(min(p.numel(), most) for p in own.values())
    kept = _Kept(partial(_derivatives, after.curve, after.known, after.grad, own, x))
    whole = LinearSystem(kept.push, kept.pull, torch.zeros(e).to(after.grad.double()), link.unknowns)
    rows = torch.arange(e, device=x.device)
    return Constraints(link, whole.among(rows[:cut]), whole.among(rows[cut:]), None, after.hidden, entries)


def _derivatives(
    curve: Sequence[Link], known: LinearSystem, grad: Tensor, own: Mapping[str, Tensor], x: Tensor
) -> LinearSystem:
    update = {name: torch.zeros_like(p) for name, p in own.items()}
    return Pullback(curve, known, grad, update).system(x.flatten())


@dataclass(frozen=True)
class _Kept:
    """A linear system that is made when it is first multiplied with, and kept."""

    make: Callable[[], LinearSystem]

    @cached_property
    def made(self) -> LinearSystem:
        return self.make()

    def push(self, v: Tensor) -> Tensor:
        return self.made.push(v)

    def pull(self, u: Tensor) -> Tensor:
        return self.made.pull(u)


def _joined(systems: Sequence[LinearSystem]) -> LinearSystem:
    """All equations, equally heavy."""
    heavy = [(each, size) for each in systems if (size := each.size) > 0]
    return reduce(operator.add, (each * (1 / size) for each, size in heavy)) if len(heavy) > 1 else systems[0]


def _begins(before: Sequence[Link]) -> bool:
    """Whether no affine layer comes before: an activation, one without a rule, or the input."""
    link = next((link for link in reversed(before) if not isinstance(link.module, RESHAPES)), None)
    rule = None if link is None else rule_for(link.module)
    return rule is None or isinstance(rule, Activation)


def _single(link: Link) -> bool:
    """Whether a layer is affine, and maps every entry by itself, and one to one."""
    norm = link.module
    if not isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d) or not isinstance(rule_for(norm), Affine):
        return False
    return not norm.affine or bool(norm.weight.all())


def _none(link: Link, like: Tensor) -> LinearSystem:
    return LinearSystem.none(link.unknowns, like)


def _gradients(link: Link, rule: LayerRule, grad: Tensor) -> LinearSystem:
    parts = dict(link.module.named_parameters())
    weights = [parts[name] for name in rule.weights(link.module)]
    if not weights:
        return _none(link, grad)
    only = weights[0] if "weight" in parts else torch.cat([w.flatten() for w in weights])
    return rule.gradient_equations(link.module, link.before, grad, torch.zeros_like(only))


def _dense(link: Link) -> bool:
    """Whether a layer has one input vector, which dL/dW = dL/dz x^T gives where dL/dz is not zero."""
    return isinstance(link.module, nn.Linear) and isinstance(rule_for(link.module), Affine) and len(link.before) == 1


def _counted(link: Link) -> ConvRanks | None:
    layer = link.module
    if not isinstance(layer, nn.Conv1d | nn.Conv2d) or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return None
    return conv_ranks(
        layer.in_channels,
        layer.out_channels,
        link.before[1:],
        layer.kernel_size,
        stride=layer.stride,
        dilation=layer.dilation,
        padding=layer.padding,
        groups=layer.groups,
    )
