"""Runs: the layers of a chain, cut behind every activation into what is read backward at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import final

from torch import nn

from unbatch.layer import LayerRule, rule_for
from unbatch.layers.activation import Activation
from unbatch.layers.residual import bend
from unbatch.network.chain import Link
from unbatch.network.operations import Reshape

DROPOUTS = nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d  # in eval mode
RESHAPES = nn.Flatten, nn.Unflatten, nn.Identity, Reshape, *DROPOUTS


@dataclass(frozen=True)
class Ruled:
    """A layer, and the rule by which it is read backward."""

    link: Link
    rule: LayerRule

    @property
    def reshapes(self) -> bool:
        """Whether it gives the numbers that it is given, in another shape at most."""
        return isinstance(self.link.module, RESHAPES)


class Stretch(ABC):
    """Layers that are read backward at once, and what stands behind them and is undone entry by entry first."""

    behind: tuple[Ruled, ...]

    @property
    @abstractmethod
    def links(self) -> tuple[Link, ...]:
        """The layers whose first one's input is read, first to last."""

    @property
    def whole(self) -> tuple[Link, ...]:
        """Those, and what stands behind them."""
        return self.links + tuple(layer.link for layer in self.behind)

    @property
    def working(self) -> tuple[Link, ...]:
        """All of them up to the last that does more than reshape."""
        ends = [i + 1 for i, layer in enumerate(self.behind) if not layer.reshapes]
        return self.links + tuple(layer.link for layer in self.behind[: ends[-1] if ends else 0])

    @property
    def undone(self) -> tuple[Ruled, ...]:
        """Reshapes, and one activation at most, that are undone entry by entry."""
        return self.behind


@final
@dataclass(frozen=True)
class AffineRun(Stretch):
    """Layers that are affine in their input one after the other: together one linear system on the first one's input."""

    layers: tuple[Ruled, ...]  # first to last
    behind: tuple[Ruled, ...] = ()  # the activation whose input is their output, if there is one, and reshapes

    @property
    def links(self) -> tuple[Link, ...]:
        """The affine layers, and reshapes before and between them."""
        return tuple(layer.link for layer in self.layers)


@final
@dataclass(frozen=True)
class ActivationRun(Stretch):
    """One activation without an affine layer before it: at the network's input, or right after another activation."""

    layers: tuple[Ruled, ...]  # reshapes, and the activation
    behind: tuple[Ruled, ...] = ()  # reshapes

    @property
    def links(self) -> tuple[Link, ...]:
        """The activation, and the reshapes before it."""
        return tuple(layer.link for layer in self.layers)

    @property
    def undone(self) -> tuple[Ruled, ...]:
        """All of it."""
        return self.layers + self.behind


@final
@dataclass(frozen=True)
class NonlinearRun(Stretch):
    """Layers of which one has no linear way back, such as a block of branches, max pooling or a layer norm."""

    layers: tuple[Link, ...]  # first to last
    why: str  # the last of them that has no linear way back, and why, in words
    behind: tuple[Ruled, ...] = ()  # the activation whose input is their output, if there is one, and reshapes

    @property
    def links(self) -> tuple[Link, ...]:
        """The layers, as they are."""
        return self.layers


LayerRun = AffineRun | ActivationRun | NonlinearRun


def runs(links: Sequence[Link]) -> tuple[LayerRun, ...]:
    """The runs that make up a chain of layers, first to last, told from the layers' rules alone.

    A run ends behind an activation; only reshapes may follow the last one's. Its kind is what its layers have before
    that: none, affine ones, or one that has no linear way back. A chain of reshapes alone has no run.
    Whether a run's equations suffice, and whether an activation's output has one input, is not known here: a run may then
    be read together with those before it (`fold.readings`).

    >>> from unbatch.network.chain import chain
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Tanh(), nn.LayerNorm([8, 6, 6]), nn.ReLU())
    >>> [(type(run).__name__, [link.name for link in run.whole]) for run in runs(chain(model, (3, 8, 8)))]
    [('AffineRun', ['0', '1', '2']), ('NonlinearRun', ['3', '4'])]
    """
    pairs = [(link, rule_for(link.module)) for link in links]
    ends = [i + 1 for i, (_, rule) in enumerate(pairs) if isinstance(rule, Activation)]
    if all(_reshapes(link, rule) for link, rule in pairs[ends[-1] if ends else 0 :]):
        ends = ends[:-1]
    cuts = [0, *ends, len(pairs)]
    found = (_run(pairs[start:end]) for start, end in pairwise(cuts))
    return tuple(run for run in found if run is not None)


def refusal(link: Link, why: str) -> str:
    """The words for a layer that cannot be read backward, and why.

    >>> refusal(Link("pool", nn.MaxPool2d(2), (1, 4, 4), (1, 2, 2)), "its windows overlap.")
    "layer 'pool' (MaxPool2d) cannot be read backward: its windows overlap."
    """
    where = f", {link.line}" if link.line else ""
    return f"layer {link.name!r} ({type(link.module).__name__}{where}) cannot be read backward: {why}"


def _run(pairs: Sequence[tuple[Link, LayerRule | None]]) -> LayerRun | None:
    """The run of the layers between two cuts; None of reshapes alone."""
    body = [
        i + 1 for i, (link, rule) in enumerate(pairs) if not (isinstance(rule, Activation) or _reshapes(link, rule))
    ]
    end = body[-1] if body else 0
    behind = tuple(Ruled(link, rule) for link, rule in pairs[end:] if rule is not None)
    if not body:
        place = [i + 1 for i, layer in enumerate(behind) if not layer.reshapes]
        return ActivationRun(behind[: place[-1]], behind[place[-1] :]) if place else None
    ruled = list[Ruled]()
    for link, rule in reversed(pairs[:end]):
        why = "it has no rule to read it backward by." if rule is None else rule.no_way_back(link.module, link.before)
        if rule is None or why:
            return NonlinearRun(tuple(link for link, _ in pairs[:end]), refusal(link, bend(link.module) or why), behind)
        ruled.insert(0, Ruled(link, rule))
    return AffineRun(tuple(ruled), behind)


def _reshapes(link: Link, rule: LayerRule | None) -> bool:
    return isinstance(link.module, RESHAPES) and rule is not None
