"""Fold: the runs of a chain read one after the other, from the last one's output to the first one's input."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from unbatch.inversion.backward.affine_runs import Place, entered, solved
from unbatch.inversion.backward.nonlinear_runs import Box, OpenRun
from unbatch.inversion.backward.reading import KnownEquations, KnownOutput, Reading, Unreadable
from unbatch.inversion.backward.runs import LayerRun, NonlinearRun
from unbatch.network.chain import Link

Improve = Callable[[Reading], Tensor | None]  # a reading -> a better x [n, *shape] than its own, or None


@dataclass(frozen=True)
class State:
    """What is known between two runs: of the output of the run before, or an open run that is read together with it."""

    known: tuple[KnownOutput, ...]  # of one update, and of nearly the same ones
    box: Box | None  # range of the network's inputs; None: every run is read by itself
    open: OpenRun | None = None

    def below(self, reading: Reading, better: Tensor | None = None) -> State:
        """What is known of a reading's x, or of a better one."""
        pairs = ((reading.x, reading.grad), *reading.others)
        known = tuple(
            replace(each, output=x if better is None else better, grad=grad)
            for each, (x, grad) in zip(self.known, pairs, strict=True)
        )
        return State(known, self.box)


def readings(
    runs: Sequence[LayerRun],
    known: KnownOutput,
    others: Sequence[KnownOutput] = (),
    *,
    forward: bool = True,
    box: Box | None = None,
    improve: Improve = lambda reading: None,
) -> Iterator[Reading]:
    """What every run of a chain tells of its input, from the last run to the first: a fold of `step` over the runs.

    An affine run is one linear system: what is known of its output, through all of its layers, and for each layer with a
    weight its gradient equations sum_i K_i x_i = dL/dW; without `forward` those alone where there are any (R-CONV). Where
    they leave x open, `improve` may give a better one than that of least norm, from which the runs before are read.
    `others` are of nearly the same update: they are followed along the first one's factors.

    With `box`, the range of the network's inputs, and for one example, runs are merged that cannot be told apart before:
    what a deficient run leaves open, and a run that has no linear way back, is read together with the runs before it
    (`OpenRun`), with as many of them as give enough equations. Then only the last reading may be deficient.

    known, others: of the last run's output, [n, *shape]. Raises Unreadable: a layer that cannot be read backward.

    >>> import torch
    >>> from torch import nn
    >>> from unbatch.inversion.backward.runs import runs
    >>> from unbatch.network.chain import chain
    >>> model = nn.Sequential(nn.Linear(4, 6), nn.Tanh()).double()
    >>> x = torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
    >>> known = KnownOutput(model(x).detach(), torch.ones(1, 6), update={})
    >>> [reading] = readings(runs(chain(model, (4,))), known)
    >>> reading.layers, reading.deficit, bool(torch.allclose(reading.x, x))
    ('0', 0, True)
    """
    state = State((known, *others), box if len(known.output) == 1 else None)
    for i in reversed(range(len(runs))):
        reading, state = step(state, runs[i], runs[:i], forward=forward, improve=improve)
        if reading is not None:
            yield reading


def step(
    state: State,
    run: LayerRun,
    before: Sequence[LayerRun],
    *,
    forward: bool = True,
    improve: Improve = lambda reading: None,
) -> tuple[Reading | None, State]:
    """The reading of a run, and what is known before it; no reading where it is left open, for the runs `before` it.

    Raises Unreadable: a layer that cannot be read backward, and runs are not merged or are too large for it.
    """
    if state.open is not None:
        return _closed(replace(state, open=state.open.after(run.whole)), before)
    shape = run.whole[-1].after
    try:
        places = entered(run.undone, state.known, shape)
    except Unreadable as error:
        equations = tuple(Place.at(known, shape).equations for known in state.known)
        return _merged(state, run.working, equations, before, error)
    equations = tuple(place.equations for place in places)
    if isinstance(run, NonlinearRun):
        return _merged(state, run.links, equations, before, Unreadable(run.why))
    try:
        reading = solved(run, places, forward=forward)
    except Unreadable as error:
        return _merged(state, run.links, equations, before, error)
    better = improve(reading)
    reading = reading if better is None else replace(reading, x=better)
    below = state.below(reading, better)
    return reading, _left_open(below, reading, before) if before and reading.deficit else below


def _merged(
    state: State,
    links: tuple[Link, ...],
    known: tuple[KnownEquations, ...],
    before: Sequence[LayerRun],
    why: Unreadable,
) -> tuple[Reading | None, State]:
    """A run that is not linear, opened: below `known` equations on its output. Raises `why`: it cannot be."""
    if state.box is None:
        raise why
    opened = OpenRun(links, known, state.box)
    if large := opened.too_large(_links(before)):
        raise Unreadable(f"{str(why)[:-1]}, and {large}.") from why
    return _closed(replace(state, open=opened), before)


def _left_open(state: State, reading: Reading, before: Sequence[LayerRun]) -> State:
    """After a deficient reading: the run before is read by what it sees of its x; or none is merged any more."""
    if state.box is None:
        return state
    seen = (reading.solution.held(each.output.flatten()) for each in state.known)
    known = tuple(
        KnownEquations(system, each.grad, each.update) for system, each in zip(seen, state.known, strict=True)
    )
    opened = OpenRun((), known, state.box)
    return replace(state, box=None) if opened.too_large(_links(before)) else replace(state, open=opened)


def _closed(state: State, before: Sequence[LayerRun]) -> tuple[Reading | None, State]:
    """The reading of the open run where it determines its input, or is the network's first; else it stays open."""
    if state.open is None:
        return None, state
    reading = state.open.determined(before[-1].whole[-1]) if before else state.open.likeliest()
    return reading, state if reading is None else state.below(reading)


def _links(before: Sequence[LayerRun]) -> list[Link]:
    return [link for run in before for link in run.whole]
