"""Damped Gauss-Newton: the one loop behind every nonlinear least-squares search of this package.

Residuals r(x) of many independent problems are made small at once, each problem with a damping of its own. What differs
from search to search is handed in: the residuals, the linear solver that turns them into steps at a given damping, the
rule by which a step is taken and the damping moved, and where to stop. The loop itself is

    linearise at x;  try the step at this damping;  take it if the cost falls and lower the damping, else raise it.

Source: Levenberg 1944, Marquardt 1963; Nocedal and Wright, Numerical Optimization, 2006, ch. 10. Steps and rules as
objects beside one loop: Rader, Lyons and Kidger, Optimistix, 2024.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

Residuals = Callable[[Tensor, Tensor], Tensor]  # x [q, ...] of the problems numbered [q] -> r [q, ...]
Steps = Callable[
    [Tensor, Tensor], Iterator[Tensor]
]  # dampings [s] of rows [s] of what was linearised -> steps [s, ...]
LinearSolver = Callable[[Tensor, Tensor, Tensor], Steps]  # x [q, ...], r [q, ...], numbers [q] -> their steps
Costs = Callable[[Tensor], Tensor]  # r [q, ...] -> [q]


@dataclass(frozen=True)
class Damping:
    """Which steps are taken, and how the damping moves.

    It is multiplied by `rise` after a step that fails, and divided by `fall` after one that helps.
    A solver that divides its step by the damping turns the same rule into a line search: from 1, twofold, and back to 1
    with fall = inf.

    >>> rule = Damping(first=1e-2, rise=8.0, fall=10.0, least=1e-15)
    >>> rule.raised(torch.tensor([1.0])), rule.lowered(torch.tensor([1.0]))
    (tensor([8.]), tensor([0.1000]))
    """

    first: float  # at the start
    rise: float
    fall: float
    least: float = 0.0  # never below
    most: float = math.inf  # a problem whose damping rises above is given up
    ties: bool = False  # whether a step that leaves the cost exactly as it is counts as one that helps

    def accepts(self, new: Tensor, old: Tensor) -> Tensor:
        """Whether costs `new` [q] are taken for `old` [q]; NaN never is."""
        return new <= old if self.ties else new < old

    def raised(self, damping: Tensor) -> Tensor:
        """After a step that fails."""
        return damping * self.rise

    def lowered(self, damping: Tensor) -> Tensor:
        """After a step that helps."""
        return (damping / self.fall).clamp_min(self.least)


@dataclass(frozen=True)
class Stop:
    """Where a problem ends: at a cost of `target`, or once `patience` steps in a row take away less than the share `gain`.

    And after `steps` linearisations of at most `tries` steps each, or `solves` steps in all.

    >>> Stop(steps=20, target=1e-20).patience
    1
    """

    steps: int
    tries: int = 2**31
    solves: int = 2**31
    target: float = 0.0
    gain: float = 0.0
    patience: int = 1
    once: bool = False  # whether a problem that starts at its target takes a step all the same


@dataclass(frozen=True)
class Reached:
    """How far a search has come. `x` is a new tensor whenever some problem has moved, and the same one else.

    >>> Reached(torch.zeros(3, 2), torch.zeros(3), torch.ones(3)).x.shape  # three problems of two unknowns
    torch.Size([3, 2])
    """

    x: Tensor  # [q, ...]
    cost: Tensor  # [q]
    damping: Tensor  # [q]


def sum_of_squares(r: Tensor) -> Tensor:
    """|r|^2 [q] of residuals r [q, ...].

    >>> sum_of_squares(torch.tensor([[3.0, 4.0], [1.0, 0.0]]))
    tensor([25.,  1.])
    """
    return r.flatten(1).square().sum(1)


def damped_gauss_newton(
    residuals: Residuals,
    solver: LinearSolver,
    start: Tensor,
    *,
    damping: Damping,
    stop: Stop,
    cost_of: Costs = sum_of_squares,
    moved: Callable[[Tensor, Tensor], Tensor] = torch.add,
    numbers: Tensor | None = None,
) -> Iterator[Reached]:
    """Minimise the costs of `residuals` of every problem from `start` [q, ...]; says where it is after every product.

    `solver` linearises the problems that are still searching, and gives their steps at any damping: an iterator of ever
    better ones, so that whoever listens can end the search between two products of an iterative solver. The last is
    tried; none at all, or one that is not finite, is a step that fails. `moved` puts x and a step together. Problems go by
    their `numbers` [q], 0 ... q - 1 by default.

    The root of two, for two problems at once:

    >>> def solver(x, r, which):
    ...     return lambda damping, rows: iter([-(2 * x * r)[rows] / (4 * x.square()[rows] * (1 + damping[:, None]))])
    >>> start = torch.tensor([[1.0], [-3.0]], dtype=torch.float64)
    >>> rule, stop = Damping(first=1e-2, rise=8.0, fall=10.0), Stop(steps=20, target=1e-28)
    >>> *_, last = damped_gauss_newton(lambda x, which: x.square() - 2, solver, start, damping=rule, stop=stop)
    >>> last.x
    tensor([[ 1.4142],
            [-1.4142]], dtype=torch.float64)
    """
    numbers = torch.arange(len(start), device=start.device) if numbers is None else numbers
    at = _State(residuals, cost_of, moved, damping, numbers, start)
    yield at.reached()
    live, stalled, solves = ((at.cost > stop.target) | stop.once).nonzero()[:, 0], torch.zeros_like(numbers), 0
    for _ in range(stop.steps):
        if not len(live) or solves >= stop.solves:
            return
        before, helped = at.cost, torch.zeros_like(numbers, dtype=torch.bool)
        steps = solver(_rows(at.x, live), _rows(at.r, live), numbers[live])
        left = torch.arange(len(live), device=live.device)  # rows that no step has helped yet
        for _ in range(stop.tries):
            which, step = live[left], None
            for latest in steps(at.level[which], left):
                step = latest
                yield at.reached()
            good, solves = at.tried(which, step), solves + 1
            if bool(good.any()):
                helped[which[good]] = True
                yield at.reached()
            if bool(good.all()) or solves >= stop.solves:
                break
            left = left[~good & (at.level[which] <= damping.most)]
            if not len(left):
                break
        stalled = torch.where(at.cost > (1 - stop.gain) * before, stalled + 1, 0)
        live = live[(helped & (at.cost > stop.target) & (stalled < stop.patience))[live]]


@dataclass
class _State:
    """Where all problems are."""

    residuals: Residuals
    cost_of: Costs
    moved: Callable[[Tensor, Tensor], Tensor]
    rule: Damping
    numbers: Tensor  # [q]
    x: Tensor  # [q, ...]

    def __post_init__(self) -> None:
        self.r = self.residuals(self.x, self.numbers)
        self.cost = self.cost_of(self.r).nan_to_num(torch.inf)
        self.level = torch.full_like(self.cost, self.rule.first)

    def reached(self) -> Reached:
        return Reached(self.x, self.cost, self.level)

    def tried(self, which: Tensor, step: Tensor | None) -> Tensor:
        """Whether the step [s, ...] helps the problems [s], which are moved then; their dampings follow."""
        good = torch.zeros_like(which, dtype=torch.bool)
        if step is not None:
            usable = step.flatten(1).isfinite().all(1)
            x = self.moved(_rows(self.x, which), step if bool(usable.all()) else step.nan_to_num())
            r = self.residuals(x, self.numbers[which])
            cost = self.cost_of(r)
            good = usable & self.rule.accepts(cost, _rows(self.cost, which))
            if bool(good.any()):
                taken, rows = which[good], good.nonzero()[:, 0]
                self.x, self.r = _put(self.x, taken, _rows(x, rows)), _put(self.r, taken, _rows(r, rows))
                self.cost = _put(self.cost, taken, _rows(cost, rows))
        level = _rows(self.level, which)
        level = torch.where(good, self.rule.lowered(level), self.rule.raised(level))
        self.level = _put(self.level, which, level)
        return good


def end_of(search: Iterator[Reached]) -> Reached:
    """Where a search ends that nobody watches.

    >>> point = torch.zeros(1, 2)
    >>> end_of(iter([Reached(point, point[:, 0], point[:, 0])])).x.shape
    torch.Size([1, 2])
    """
    *_, last = search
    return last


def _rows(values: Tensor, which: Tensor) -> Tensor:
    """values[which], without a copy where that is all of them."""
    return values if len(which) == len(values) else values[which]


def _put(values: Tensor, which: Tensor, new: Tensor) -> Tensor:
    """`values` with `new` in the rows `which`; `new` itself where those are all."""
    return new if len(which) == len(values) else values.index_copy(0, which, new)
