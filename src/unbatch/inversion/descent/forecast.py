"""Forecast: what a descent can read of a batch of some size, by counting alone, before any gradient is looked at."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unbatch.errors import NotApplicable
from unbatch.inversion.descent.descent import AS_GOOD
from unbatch.inversion.descent.masks_above import ADDS
from unbatch.inversion.descent.places import WindowLayer, at_cuts, places, rectified
from unbatch.inversion.descent.separation import MOST_COEFFICIENTS
from unbatch.inversion.descent.walk import BENT, LINEAR
from unbatch.inversion.view import WHOLE_NUMBERS, View
from unbatch.network.chain import cuts, named_after
from unbatch.network.graph import Call, Graph, Value
from unbatch.network.operations import AffineOperation, Operation, Reshape, layer_of
from unbatch.network.sections import between, section
from unbatch.network.tracing import trace
from unbatch.numerics.windows.completion import largest_completed
from unbatch.numerics.windows.equation_count import EquationCount

PROBED = 8  # examples that are run once, to see what is zero
SMALLEST_SURPLUS = 1.5  # equations for each unknown of the inputs, below which no search for them is foretold
FORECAST = "forecast"  # under which a view keeps it
_NORMS = nn.BatchNorm1d | nn.BatchNorm2d


@dataclass(frozen=True, eq=False)
class Prospect:
    """What a layer's gradient can say of the batch that it is given, by shapes and by what is zero in its input.

    Its gradient's rank is at most min(n windows, c_out, c_in k^2). Zero padding tells a corner's windows from those of all
    other places, which takes as many padded entries as these have windows; of a corner's n windows each is the only one
    with its zeros, which takes n - 1 of them. Where windows overlap on all sides the span tells whole maps, too, and these
    need no zeros where what comes back tells them.
    """

    place: WindowLayer
    windows: int  # of one example
    limit: int  # min(c_out, c_in k^2); one less where what came back adds up to zero over the outputs
    padded: int  # entries of a corner's window that are padding
    zeros: int  # entries of a corner's window that are zero for one example and not for all, on average
    filled: float  # share of its input's entries that are not zero
    why_not: str = ""  # why it tells no batch apart by zeros, whatever its size; empty where it may
    overlapping: bool = (
        False  # whether its span may tell whole maps: every entry is in two windows, and they come alone
    )
    mixed: bool = False  # batch norm with the batch's own statistics lies behind it
    completed: int = 0  # the largest batch whose windows' span padding completes, where the rank has no room for all

    @property
    def name(self) -> str:
        """The layer's, by its weight."""
        return named_after(self.place.weight) or "the only layer"

    def rank(self, n: int) -> int:
        """The largest that its gradient can have, of n examples."""
        return min(n * self.windows - self.mixed, self.limit)

    @property
    def counted(self) -> int:
        """The largest batch whose windows its rank has room for, or the rank and what padding completes."""
        return max(self.room, self.completed)

    @property
    def room(self) -> int:
        """The largest batch whose windows its rank has room for."""
        return (self.limit + self.mixed) // self.windows

    @property
    def cornered(self) -> int | None:
        """The largest batch whose corners padding tells from all other windows; None where there are no others."""
        return self.padded // (self.windows - 1) if self.windows > 1 else None

    @property
    def up_to(self) -> int:
        """The largest batch that it tells apart, by zeros or by whole maps; 0 where none."""
        return max(self.by_zeros, self.by_maps)

    @property
    def by_zeros(self) -> int:
        """The largest batch whose windows are told by what is zero in them."""
        if self.why_not:
            return 0
        most = min(self.counted, self.zeros + 1)
        return most if self.cornered is None else min(most, self.cornered)

    @property
    def by_maps(self) -> int:
        """The largest batch whose whole maps are told: by coefficients few enough, in a span that leaves enough out.

        Every window is orthogonal to what the span of n windows' examples leaves of d: windows (d - rank) equations, which
        the maps' space of n dimensions is to be the only solution of.
        """
        if not self.overlapping or self.windows < 2:
            return 0
        d, size = self.place.layer.weight[0].numel(), torch.Size(self.place.given.shape[1:]).numel()
        size += d * self.mixed  # what is common to all windows is open behind batch norm in train mode
        most = min((self.limit + self.mixed) // self.windows, MOST_COEFFICIENTS // self.windows**2)
        ranks = {n: n * self.windows - self.mixed for n in range(1, most + 1)}
        told = [n for n, rank in ranks.items() if rank < d and self.windows * (d - rank) >= size - n]
        return max(told, default=0)


@dataclass(frozen=True, eq=False)
class Rung:
    """A tensor on the way down, and the equations of it that weights' gradients give once what came back is known."""

    value: Value
    readers: tuple[str, ...]  # the layers whose gradients speak of it; none: it is where the way begins
    independent: int  # equations of one channel at most
    unknowns: int  # of one channel
    channels: int
    largest: int  # examples up to which it is determined
    known: bool
    equations: int  # that say something of the inputs: of what is zero behind a ReLU none does


@dataclass(frozen=True, eq=False)
class Forecast:
    """What can be read of n examples."""

    n: int
    at: Prospect | None  # the shallowest layer that tells them apart
    rungs: tuple[Rung, ...] = ()  # from there towards the input
    stops: tuple[str, ...] = ()
    unknowns: int = 0  # of the inputs
    narrowest: int = 0  # numbers that say something of the inputs, at the narrowest tensor before the one searched by
    linear: bool = False  # whether the inputs themselves follow linearly

    @property
    def target(self) -> Rung | None:
        """The tensor that the inputs are searched by: the shallowest of those with the most equations."""
        return _target(self.rungs)

    @property
    def equations(self) -> int:
        """That it gives on the inputs: what went through a narrower tensor before it says no more than that one."""
        return 0 if self.target is None else min(self.target.equations, self.narrowest)

    @property
    def surplus(self) -> float:
        """Equations for each unknown of the inputs, of the tensor that they are searched by."""
        return self.equations / self.unknowns if self.unknowns else 0.0

    @property
    def readable(self) -> bool:
        """Whether there are equations enough for all of the batch."""
        return self.at is not None and (self.linear or self.surplus >= SMALLEST_SURPLUS)


def _target(rungs: Sequence[Rung]) -> Rung | None:
    most = max((rung.equations for rung in rungs), default=0)
    return next((rung for rung in reversed(rungs) if rung.equations >= AS_GOOD * most), None)


@dataclass(frozen=True, eq=False)
class Prospects:
    """Every layer of a network at which a batch may be told apart, in the order in which they run."""

    graph: Graph
    each: tuple[Prospect, ...]
    sent: frozenset[str]  # the parameters whose gradients there are
    mixing: str = ""  # a layer that mixes examples in train mode

    @property
    def up_to(self) -> int:
        """The largest batch that any layer tells apart."""
        return max((prospect.up_to for prospect in self.each), default=0)

    def forecast(self, n: int) -> Forecast:
        """What can be read of n examples."""
        at = next((prospect for prospect in self.each if prospect.up_to >= n), None)
        unknowns = n * torch.Size(self.graph.input.shape[1:]).numel()
        if at is None:
            return Forecast(n, None, unknowns=unknowns)
        ladder = _Ladder(self, n, at)
        narrowest = self._narrowest(n, _target(ladder.rungs))
        linear = self.graph.input in ladder.known
        return Forecast(n, at, tuple(ladder.rungs), tuple(ladder.stops), unknowns, narrowest, linear)

    def _narrowest(self, n: int, target: Rung | None) -> int:
        """Numbers that are not zero at the narrowest tensor that all goes through, up to the one searched by."""
        order = {value: k for k, call in enumerate(self.graph.calls) for value in call.gave}
        end = len(order) if target is None else order.get(target.value, -1)
        through = [p for p in self.each if p.place.given in at_cuts(self.graph) - _bare(self.graph)]
        before = [p for p in through if order[p.place.given] <= end]
        sizes = [n * torch.Size(p.place.given.shape[1:]).numel() * p.filled for p in before]
        return int(min(sizes, default=0 if target is None else target.equations))

    @property
    def readable(self) -> int:
        """The largest batch with equations enough, by counting; 0 where examples mix, or no layer tells one apart."""
        if self.mixing or not self.forecast(1).readable:
            return 0
        low, high = 1, self.up_to
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.forecast(middle).readable else (low, middle - 1)
        return low


def prospects(view: View, at: tuple[Tensor, Tensor] | None, rng: torch.Generator) -> Prospects:
    """The prospects of the network behind an exchange, found once.

    What is zero is seen in the inputs of `at` = (inputs [n, ...], labels), and in as many draws of the prior as these lack
    to `PROBED`. Raises NotApplicable: the network cannot be read as a graph, ends in no dense layer, or draws what nobody
    knows; the update is of several local steps; or noise was added to it.
    """
    given = () if at is None else (at[0],)
    return view.once(FORECAST, given, lambda: _prospects(view.gradient, given, rng))


def _prospects(view: View, at: tuple[Tensor, ...], rng: torch.Generator) -> Prospects:
    if view.steps:
        raise NotApplicable(view.no_gradient)
    if float(view.knowledge.get("noise", 0.0)) > 0 or "log_prob" in view.knowledge:
        raise NotApplicable(
            "a defence's noise fills the span of every layer's gradient, so that none counts its examples."
        )
    graph = _own_graph(view)
    every = list(places(graph))
    if not every or not every[-1].dense or every[-1].weight not in view.update:
        raise NotApplicable(
            "the network ends in no dense layer that sent its gradient, and no labels follow without one."
        )
    like = next(view.model.parameters())
    x = torch.cat([*(each.to(like) for each in at), view.stand_in(PROBED, rng).to(like)])[:PROBED]
    seen = _Seen(graph, x, view.protocol.mode)
    balanced = (
        view.form is not None and view.form.name == "cross-entropy"
    )  # what comes back to the outputs adds up to zero
    terms = view.form is not None and view.form.classes and view.form.weights is None
    found = tuple(
        _prospect(
            graph, place, seen, view.update.keys(), balanced=balanced and place.gave is graph.output, terms=bool(terms)
        )
        for place in every
    )
    layers = [(call, layer_of(call, call.given[0])) for call in graph.calls if call.fed]
    mixing = next((call.name for call, layer in layers if isinstance(layer, _NORMS) and mixes(layer)), "")
    return Prospects(graph, found, frozenset(view.update), mixing)


def mixes(layer: nn.BatchNorm1d | nn.BatchNorm2d) -> bool:
    """Whether a batch norm takes the batch's own statistics.

    >>> mixes(nn.BatchNorm2d(4)), mixes(nn.BatchNorm2d(4).eval())
    (True, False)
    """
    return layer.training or layer.running_var is None


def _own_graph(view: View) -> Graph:
    """A graph whose layers nobody else uses: running it in train mode writes statistics."""
    if "input_shape" not in view.knowledge:
        raise NotApplicable("input_shape must be known, to run the model once.")
    model, mode = copy.deepcopy(view.model), view.protocol.mode
    drawn = [name for name, m in model.named_modules() if isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0]
    if mode == "train" and drawn:
        raise NotApplicable(f"{drawn[0]!r} is dropout in train mode, which draws what nobody knows.")
    try:
        return trace(model, view.knowledge.input_shape, mode)
    except NotApplicable:
        raise
    except ValueError as error:
        raise NotApplicable(WHOLE_NUMBERS if view.network.takes_whole_numbers else str(error)) from error


class _Seen:
    """A few inputs as they go through a network, tensor by tensor."""

    def __init__(self, graph: Graph, x: Tensor, mode: str) -> None:
        self.graph, self.train = graph, mode == "train"
        self.order = {call: k for k, call in enumerate(graph.calls)}
        self.held: list[tuple[Value, Tensor]] = [(graph.input, x)]
        with torch.no_grad():
            for cut in cuts(graph):
                self.held.append((cut.gave, self._run(cut.gave)))

    def __call__(self, value: Value) -> Tensor:
        """What flows there [PROBED, *shape]."""
        for held, found in self.held:
            if held is value:
                return found
        with torch.no_grad():
            return self._run(value)

    def _run(self, value: Value) -> Tensor:
        place = self.order[value.call] if value.call is not None else -1
        before = [(v, x) for v, x in self.held if v.call is None or self.order[v.call] < place]
        given, x = before[-1]
        found: Tensor = section(self.graph, given, value).train(self.train)(x)
        return found


def _prospect(
    graph: Graph, place: WindowLayer, seen: _Seen, sent: Collection[str], *, balanced: bool, terms: bool
) -> Prospect:
    """What a layer says; `balanced` outputs are sent what adds up to zero, `terms` of the loss are one an example."""
    x = seen(place.given)
    padded, zeros, why = 0, 0, _elsewhere(graph, place) or _averaged(graph, place)
    alone = not why and place.weight in sent
    why = why or _no_zeros(place, x)
    limit = min(place.limit, len(place.layer.weight) - balanced)
    if place.weight not in sent:
        why = "its gradient was not sent"
    if not why:
        try:
            windows = place.windows()
        except ValueError as error:
            why = str(error)
        else:
            padded = int(windows.padded.sum(1).max())
            zeros, why = _zeros(windows.padded, windows.rows(x.reshape(len(x), *windows.shape)))
    behind = [layer for layer in _behind(graph, place.gave) if isinstance(layer, _NORMS)]
    filled, mixed = float((x != 0).double().mean()), any(mixes(layer) for layer in behind[:1])
    more = largest_completed(place.windows(), limit) if padded and place.positions <= limit and not mixed else 0
    # rays of the maps behind a ReLU take zeros, others their own equations, which batch norm in train mode mixes
    alone = alone and (bool((x == 0).any()) if rectified(place.given) else terms and not mixed)
    overlapping = alone and place.plain and place.windows(1).overlapping
    return Prospect(place, place.positions, limit, padded, zeros, filled, why, overlapping, mixed, more)


def _zeros(padded: Tensor, windows: Tensor) -> tuple[int, str]:
    """Entries of a corner's window that are zero, and why no window is told from the others."""
    corner = int(padded.sum(1).argmax())
    if len(padded) > 1 and not bool(padded[corner].any()):
        return 0, "it pads with no zeros, so that its corners look like all other windows"
    zero = windows[:, corner, ~padded[corner].to(windows.device)] == 0
    return int((zero & ~zero.all(0)).double().sum(1).mean()), ""  # what is zero for everybody tells nobody apart


def _elsewhere(graph: Graph, place: WindowLayer) -> str:
    """Why a layer tells no batch apart, by where it stands; empty where nothing stands in the way."""
    if place.given in _bare(graph):
        return "it reads the network's inputs, which no ReLU made zero anywhere"
    if place.given not in at_cuts(graph):
        return "another branch leads around its input, from which alone nothing above can be computed"
    if place.groups != 1:
        return f"its channels are in {place.groups} groups, each with a matrix of its own"
    return ""


def _no_zeros(place: WindowLayer, x: Tensor) -> str:
    """Why no zeros of its input tell windows apart."""
    call = place.given.call
    made = f"{call.where} ({type(layer_of(call, call.given[0])).__name__})" if call is not None else "the input"
    if bool((x < 0).any()):
        return f"its input has negative entries: it comes from {made}, not from a ReLU"
    if not bool((x == 0).any()):
        return f"its input is nowhere exactly zero: it comes from {made}, not from a ReLU"
    return ""


def _averaged(graph: Graph, place: WindowLayer) -> str:
    """Whether what comes back to several windows is the same."""
    for layer in _behind(graph, place.gave):
        if isinstance(layer, nn.AvgPool2d | nn.AdaptiveAvgPool2d):
            return "average pooling right behind it sends the same back to several of its windows"
        if not isinstance(layer, _NORMS | nn.Identity):
            break
    return ""


def _bare(graph: Graph) -> set[Value]:
    """The network's input, and the same in other shapes."""
    found = {graph.input}
    for call in graph.calls:
        fed = {value for value in call.given if value.fed}
        if len(fed) == 1 and fed <= found and call.alone:
            (given,) = fed
            if isinstance(layer_of(call, given), Reshape | nn.Flatten | nn.Unflatten | nn.Identity):
                found.add(call.gave[0])
    return found


def _behind(graph: Graph, value: Value) -> Iterator[nn.Module]:
    """The layers behind a tensor, as long as each is the only one that reads the one before."""
    while len(readers := [call for call in graph.calls if value in call.given]) == 1:
        (call,) = readers
        if not call.alone or len({each for each in call.given if each.fed}) != 1:
            return
        yield layer_of(call, value)
        value = call.gave[0]


class _Ladder:
    """The way down of a walk from a layer's input to the network's, with what is known in place of the numbers."""

    def __init__(self, of: Prospects, n: int, at: Prospect) -> None:
        self.of, self.n = of, n
        self.filled = {prospect.place.given: prospect.filled for prospect in of.each}
        self.readers: dict[Value, list[WindowLayer]] = {}
        for prospect in of.each:
            self.readers.setdefault(prospect.place.given, []).append(prospect.place)
        graph, start = of.graph, at.place.given
        self.known, self.back, self.blocked = {start}, {start}, set[Value]()
        self.rungs, self.stops = list[Rung](), list[str]()
        size = torch.Size(start.shape[1:]).numel()
        self._add(start, (), size // start.shape[1], True, at.up_to)
        for call in reversed(between(graph, graph.input, start)):
            for value in call.gave:
                self._count(value)
            self._pass(call)
        self._count(graph.input)

    def _count(self, value: Value) -> None:
        """The equations of a tensor by the gradients of all layers that read it."""
        readers = [p for p in self.readers.get(value, []) if p.gave in self.back and p.weight in self.of.sent]
        readers = [p for p in readers if p.groups == 1]
        if value in self.known or not readers:
            return
        try:
            count = EquationCount.of([(len(p.layer.weight), p.windows(1)) for p in readers])
        except ValueError as error:
            self.stops.append(f"{readers[0].call.where}: {error}")
            return
        independent, most = count.most(self.n), count.largest
        self._add(value, tuple(named_after(p.weight) for p in readers), independent, most >= self.n, most)

    def _add(self, value: Value, readers: tuple[str, ...], independent: int, known: bool, most: int) -> None:
        channels = value.shape[1]
        unknowns = self.n * torch.Size(value.shape[2:]).numel()
        equations = channels * (unknowns if known else independent)
        if known:
            self.known.add(value)
            equations = int(self.filled.get(value, 1.0) * equations)
        self.rungs.append(
            Rung(value, readers, unknowns if known else independent, unknowns, channels, most, known, equations)
        )

    def _pass(self, call: Call) -> None:
        """Whether what came back to a call's output is known at what it was given."""
        fed, gave = [value for value in call.given if value.fed], call.gave[0]
        ready = gave in self.back and gave not in self.blocked and call.alone
        passes = ready and self._passes(call, fed)
        if ready and not passes:
            self.stops.append(f"the derivative of {call.where} is not known")
        for value in fed:
            if not passes or value in self.blocked:
                self.blocked.add(value)
                self.back.discard(value)
            else:
                self.back.add(value)

    def _passes(self, call: Call, fed: Sequence[Value]) -> bool:
        gave = call.gave[0]
        if len(fed) == 2 and len(call.given) == 2 and call.ran in ADDS:
            return all(value.shape == gave.shape for value in fed)
        if len(fed) != 1:
            return False
        layer = layer_of(call, fed[0])
        if isinstance(layer, Reshape | nn.Flatten | nn.Identity | nn.Unflatten | nn.Dropout):
            if gave in self.known:
                self.known.add(fed[0])
            return True
        if isinstance(layer, (nn.ReLU, *BENT)):
            return gave in self.known
        if isinstance(layer, _NORMS):
            return not mixes(layer)
        linear = isinstance(layer, (*LINEAR, AffineOperation))
        return linear and not (isinstance(layer, Operation) and not isinstance(layer, AffineOperation))
