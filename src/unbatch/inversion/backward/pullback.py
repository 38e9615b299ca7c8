"""Pullback: what equations on an inner tensor, and the gradients of layers before it, say of an earlier one."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.func import grad, jvp, vjp, vmap

from unbatch.errors import UnbatchError
from unbatch.network.chain import Link
from unbatch.network.precision import outputs_of
from unbatch.numerics.callables import Tick
from unbatch.numerics.linear.linsys import COLUMN_ENTRIES, LinearSystem, Solution
from unbatch.numerics.search.damped_gauss_newton import Damping, Steps, Stop, damped_gauss_newton

LINEARISATIONS = 30  # of Gauss and Newton
EQUATIONS_AN_UNKNOWN = 4  # entries of a gradient for each unknown: more say nothing new
STEP_HALVINGS = 12  # of one step
JACOBIAN_HELD = 2**24  # entries of a Jacobian that is formed once, not multiplied again and again
CHORD_SHARE = 0.3  # of |r| left: a step along the last one's factors that does as well or better is taken
ROUNDING_FLOOR = 64 * torch.finfo(torch.float64).eps  # |r|, relative to the data, that is rounding


@dataclass(frozen=True)
class Fit:
    """Where Gauss and Newton ended."""

    x: Tensor  # [*shape]
    residual: float  # |r|
    solution: Solution  # of the last linear system, whose rank is that of all equations together


class Pullback:
    """How far an input of a run of layers is from explaining what is known of its output, and its weights' gradients.

    r(x) = [A t(x) - b; dL/dW_l(x) - dL/dW_l ...], t(x) the output of the links as a function of their input x.
    `known` is A t = b, where A may have fewer rows than t has entries, and dL/dt, which does not depend on x, is
    `gradient`. The weights l are those of the links. Blocks are relative to their data; of a gradient with more than four
    entries an unknown, so many are drawn; NaN stands for one that was not sent. One example.
    Source: the pull-back constraint of Chen and Campbell, 2021, with the layers' own gradients beside it.
    Raises UnbatchError: a link gives two outputs for one input, as dropout does in train mode.

    >>> link = Link("0", nn.Softplus(), (2,), (2,))
    >>> x = torch.tensor([0.5, -0.5], dtype=torch.float64)
    >>> known = LinearSystem.of(torch.eye(2), link.module(x))
    >>> fit = Pullback([link], known, torch.zeros(2), {}).solve(torch.zeros(2))
    >>> [round(value, 9) for value in fit.x.tolist()], fit.solution.rank
    ([0.5, -0.5], 2)
    """

    def __init__(
        self, links: Sequence[Link], known: LinearSystem, gradient: Tensor, update: Mapping[str, Tensor]
    ) -> None:
        self.links = [standing_still(link, known.b.device) for link in links]
        self.gradient, self.known = gradient.double(), known
        self.state = {
            link.called(name): tensor.detach()
            for link in self.links
            for name, tensor in (*link.module.named_parameters(), *link.module.named_buffers())
        }
        self.sent = {name: update[name].double() for name in self.state if name in update}
        most = EQUATIONS_AN_UNKNOWN * self.links[0].unknowns
        rng = torch.Generator().manual_seed(0)
        self.entries = sum(tensor.numel() for tensor in self.sent.values())  # of whole gradients, drawn from
        self.which = {name: _which(tensor, most, rng) for name, tensor in self.sent.items()}
        self.sent = {name: _some(tensor, self.which[name]) for name, tensor in self.sent.items()}
        self.sizes = {name: float(tensor.norm()) for name, tensor in self.sent.items()}
        self.size = float(known.b.norm())

    @property
    def equations(self) -> int:
        """How many residuals there are."""
        return self.known.equations + sum(tensor.numel() for tensor in self.sent.values())

    def output(self, x: Tensor) -> Tensor:
        """t [1, *shape] at x [d]."""
        return self._features(self.state, x)

    def _features(self, state: Mapping[str, Tensor], x: Tensor) -> Tensor:
        for link in self.links:
            held = (*link.module.named_parameters(), *link.module.named_buffers())
            own = {name: state[link.called(name)] for name, _ in held}
            x = outputs_of(link.module, x.reshape(1, *link.before), own, twice=True)
        return x

    def __call__(self, x: Tensor) -> Tensor:
        """The residuals [e] at x [d]."""
        t = self.output(x).reshape(1, -1)
        parts = [(self.known.push(t)[0] - self.known.b) / (self.size or 1.0)]
        if self.sent:
            found = grad(lambda own: self._weighed(own, x))({name: self.state[name] for name in self.sent})
            parts += [(_some(found[k], self.which[k]) - self.sent[k]) / (self.sizes[k] or 1.0) for k in self.sent]
        return torch.cat(parts)

    def _weighed(self, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """<t(x), dL/dt> at some of the weights."""
        return (self._features({**self.state, **weights}, x).flatten() * self.gradient.flatten()).sum()

    def grad_input(self, x: Tensor) -> Tensor:
        """dL/dx [d] at x [d]."""
        found: Tensor = grad(lambda at: self._weighed({}, at))(x)
        return found.detach()

    def system(self, x: Tensor) -> LinearSystem:
        """J d = -r at x [d]."""
        r, back = vjp(self, x)[:2]
        chunk = max(1, COLUMN_ENTRIES // max(4 * len(x), 4 * len(r), self.entries))

        def push(v: Tensor) -> Tensor:
            moved: Tensor = vmap(lambda d: jvp(self, (x,), (d,))[1], chunk_size=chunk)(v)
            return moved.detach()

        def pull(u: Tensor) -> Tensor:
            moved: Tensor = vmap(lambda e: back(e)[0], chunk_size=chunk)(u) if len(u) else u.new_zeros(0, len(x))
            return moved.detach()

        found = LinearSystem(push, pull, -r.detach(), len(x))
        return LinearSystem.of(found.matrix(), found.b) if len(x) * len(r) <= JACOBIAN_HELD else found

    def without_gradients(self) -> Pullback:
        """The first block alone, which is continuous in x."""
        other = copy.copy(self)
        other.sent = {}
        return other

    def solve(self, start: Tensor, tick: Tick = lambda share: True) -> Fit:
        """Gauss-Newton from `start` [*shape], by the steps of `LeastNorm`, halved until |r| falls."""
        solver = LeastNorm(self)
        search = damped_gauss_newton(
            lambda x, which: self(x[0]).detach()[None],
            solver,
            start.double().flatten()[None],
            damping=Damping(first=1.0, rise=2.0, fall=torch.inf, least=1.0),  # a step's divisor, 1 again after each
            stop=Stop(steps=2 * LINEARISATIONS, tries=STEP_HALVINGS + 1, target=ROUNDING_FLOOR, once=True),
            cost_of=lambda r: r.norm(dim=1),
        )
        last = next(search)
        for at in search:
            stepped, last = at.x is not last.x, at
            if stepped and not tick(solver.systems / LINEARISATIONS):
                break
        x = last.x[0]
        return Fit(x.view(start.shape), float(last.cost), solver.solution or self.system(x).solve())


class LeastNorm:
    """The linear solver of a pullback: the step of least norm with J d = -r, over the damping.

    After a step that leaves a small share of |r| the next one is tried along the same factors (a chord), and J is formed
    anew only where that does not help. At most LINEARISATIONS times.
    """

    def __init__(self, pullback: Pullback) -> None:
        self.pullback, self.size = pullback, 0.0
        self.systems = 0  # solved so far
        self.solution: Solution | None = None  # of the last one

    def __call__(self, x: Tensor, r: Tensor, which: Tensor) -> Steps:
        """Steps [1, d] from x [1, d], where the residuals are r [1, e]."""
        size = float(r.norm())
        chord = self.solution if size < CHORD_SHARE * self.size else None
        self.size = size
        found = list[Tensor]()

        def steps(damping: Tensor, rows: Tensor) -> Iterator[Tensor]:
            share = 1 / float(damping)
            if chord is not None and share == 1:
                yield -chord.inverse(r[0])[None]
                return
            if not found and self.systems < LINEARISATIONS:
                self.solution, self.systems = self.pullback.system(x[0]).solve(), self.systems + 1
                found.append(self.solution.x)
            for step in found:
                yield (step * share if chord is None else 2 * step * share)[None]

        return steps


def standing_still(link: Link, device: torch.device) -> Link:
    """The link with a copy of its module, on that device, in float64, that writes no statistics and draws nothing.

    Batch norm in train mode takes the statistics of what it is given alone. Raises UnbatchError: it draws at random, as
    dropout does in train mode.

    >>> standing_still(Link("0", nn.Linear(2, 2), (2,), (2,)), torch.device("cpu")).module.weight.dtype
    torch.float64
    """
    module: nn.Module = copy.deepcopy(link.module).double()
    for norm in module.modules():
        if norm.training and getattr(norm, "track_running_stats", False):
            norm.track_running_stats = False  # type: ignore[assignment]
            norm.running_mean = norm.running_var = norm.num_batches_tracked = None  # type: ignore[assignment]
    at = torch.ones(1, *link.before, dtype=torch.float64, device=device)
    with torch.no_grad():
        if not torch.equal(module(at), module(at)):
            raise UnbatchError(f"layer {link.name!r} draws at random: it gives two outputs for one input.")
    return replace(link, module=module)


def _which(tensor: Tensor, most: int, rng: torch.Generator) -> Tensor | None:
    """The entries that count: at most so many of those that were sent; None for all."""
    known = tensor.flatten().isfinite().nonzero()[:, 0]
    if len(known) > most:
        known = known[torch.randperm(len(known), generator=rng)[:most].sort().values.to(known.device)]
    return None if len(known) == tensor.numel() else known


def _some(tensor: Tensor, which: Tensor | None) -> Tensor:
    return tensor.flatten() if which is None else tensor.flatten()[which]
