"""Pullback: what equations on an inner layer's input, and earlier layers' gradients, say of the network's own input."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call, grad, jvp, vjp, vmap

from unbatch.chain import Link
from unbatch.numerics.linsys import CHUNK, LinearSystem, Solution

Tick = Callable[[float], bool]  # share done -> whether to go on
STEPS = 30  # of Gauss and Newton
HALVINGS = 12  # of one step
CHORD = 0.3  # of |r| left: a step along the last one's factors that does as well or better is taken
FLOOR = 64 * torch.finfo(torch.float64).eps  # |r|, relative to the data, that is rounding


@dataclass(frozen=True)
class Fit:
    """Where Gauss and Newton ended."""

    x: Tensor  # [*shape]
    residual: float  # |r|
    solution: Solution  # of the last linear system, whose rank is that of all equations together


class Pullback:
    """r(x) = [A (t(x) - t*); dL/dW_l(x) - dL/dW_l ...], t(x) the input of an inner layer as a function of the network's.

    `solution` is what that layer's own system A says of t (with an orthonormal A), and dL/dt does not depend on x: it is
    `gradient`. The weights l are those of the layers before. Blocks are relative to their data. One example.
    Source: the pull-back constraint of Chen and Campbell, 2021, with the earlier layers' gradients beside it.
    """

    def __init__(
        self, links: Sequence[Link], t: Tensor, solution: Solution, gradient: Tensor, update: Mapping[str, Tensor]
    ) -> None:
        self.links = [Link(link.name, copy.deepcopy(link.module).double(), link.before, link.after) for link in links]
        self.gradient, self.solution = gradient.double(), solution
        self.known = self._seen(t.double())
        self.state = {
            f"{link.name}.{name}": tensor.detach()
            for link in self.links
            for name, tensor in (*link.module.named_parameters(), *link.module.named_buffers())
        }
        self.sent = {name: update[name].double() for name in self.state if name in update}
        self.sizes = {name: float(tensor.norm()) for name, tensor in self.sent.items()}
        self.size = float(self.known.norm())

    def _seen(self, t: Tensor) -> Tensor:
        return self.solution.seen(t.reshape(1, -1))[0]

    def _features(self, state: Mapping[str, Tensor], x: Tensor) -> Tensor:
        for link in self.links:
            own = {k.removeprefix(f"{link.name}."): v for k, v in state.items() if k.startswith(f"{link.name}.")}
            x = functional_call(link.module, own, (x.reshape(1, *link.before),))
        return x

    def __call__(self, x: Tensor) -> Tensor:
        """The residuals [e] at x [d]."""

        def weighed(weights: Mapping[str, Tensor]) -> Tensor:
            out: Tensor = (self._features({**self.state, **weights}, x).flatten() * self.gradient.flatten()).sum()
            return out

        parts = [(self._seen(self._features(self.state, x)) - self.known) / (self.size or 1.0)]
        if self.sent:
            found = grad(weighed)({name: self.state[name] for name in self.sent})
            parts += [(found[k] - self.sent[k]).flatten() / (self.sizes[k] or 1.0) for k in self.sent]
        return torch.cat(parts)

    def system(self, x: Tensor) -> LinearSystem:
        """J d = -r at x [d]."""
        r, back = vjp(self, x)[:2]
        chunk = max(1, CHUNK // (4 * max(len(x), len(r))))

        def push(v: Tensor) -> Tensor:
            moved: Tensor = vmap(lambda d: jvp(self, (x,), (d,))[1], chunk_size=chunk)(v)
            return moved.detach()

        def pull(u: Tensor) -> Tensor:
            moved: Tensor = vmap(lambda e: back(e)[0], chunk_size=chunk)(u)
            return moved.detach()

        return LinearSystem(push, pull, -r.detach(), len(x))

    def without_gradients(self) -> Pullback:
        """The first block alone, which is continuous in x."""
        other = copy.copy(self)
        other.sent = {}
        return other

    def solve(self, start: Tensor, tick: Tick = lambda share: True) -> Fit:
        """Gauss-Newton from `start` [*shape], by the steps of least norm, halved until |r| falls."""
        x, size, solution = start.double().flatten(), torch.inf, None
        for step in range(STEPS):
            system = self.system(x)
            solution, before = system.solve(), float(system.b.norm())
            moved, size = self._along(x, solution.x, before)
            if not size < before:
                break
            x, ahead = moved, before
            while size < CHORD * ahead and size > FLOOR:  # along the same factors as long as it pays
                ahead, moved = size, x - solution.inverse(self(x).detach())
                left = float(self(moved).norm())
                if left < size:
                    x, size = moved, left
            if size <= FLOOR or not tick(step / STEPS):
                break
        assert solution is not None  # STEPS is positive
        return Fit(x.view(start.shape), size, solution)

    def _along(self, x: Tensor, step: Tensor, size: float) -> tuple[Tensor, float]:
        """The first of step, step / 2, ... that lowers |r|, or x itself."""
        for k in range(HALVINGS):
            moved = x + step / 2**k
            left = float(self(moved).norm())
            if left < size:
                return moved, left
        return x, size
