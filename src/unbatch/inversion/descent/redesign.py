"""Redesign: how many examples a network would tell apart if one of its habits were another, by counting."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from torch import nn

from unbatch.inversion.descent.forecast import Prospect, Prospects
from unbatch.network.operations import layer_of

_STRIDING = nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d


@dataclass(frozen=True)
class Redesign:
    """One change to the whole network, and the largest batch that any layer still tells apart."""

    words: str
    up_to: int
    breaks: str  # which step of the attack, and how far


def redesigns(found: Prospects) -> Iterator[Redesign]:
    """The changes that break a step of telling a batch apart; each alone, and only where it lowers the number.

    They are counted on the network's own shapes: nothing is trained or run.
    """
    for words, change, breaks in _changes(found):
        up_to = max(change(prospect).up_to for prospect in found.each)
        if up_to < found.up_to:
            yield Redesign(words, up_to, breaks)


def _changes(found: Prospects) -> Iterator[tuple[str, Callable[[Prospect], Prospect], str]]:
    yield (
        "padding by reflection in place of zeros",
        lambda p: replace(p, why_not=p.why_not or ("no corner" if p.windows > 1 else ""), overlapping=False),
        "corners look like all other windows. Linear programs on all windows together can still tell small batches apart.",
    )
    yield (
        "half the channels in every layer",
        lambda prospect: replace(
            prospect,
            limit=_halved(prospect),
            padded=prospect.padded // 2,
            zeros=prospect.zeros // 2,
            completed=prospect.completed // 2,
        ),
        "the rank has room for half as many windows.",
    )
    if last := _last_stride(found):
        name, step, behind = last
        yield (
            f"stride 1 in place of {step} in {name}",
            lambda p: (
                replace(p, windows=p.windows * step**2, completed=p.completed // step**2)
                if p in behind and p.windows > 1
                else p
            ),
            f"every example has {step**2} times as many windows in the layers behind it, at as much more work.",
        )


def _halved(prospect: Prospect) -> int:
    """The rank's limit with half the channels; the network's own inputs and outputs stay."""
    weight = prospect.place.layer.weight
    return max(1, min(prospect.limit, len(weight) // 2, weight[0].numel() // 2))


def _last_stride(found: Prospects) -> tuple[str, int, list[Prospect]] | None:
    """The last layer with a stride that a layer with windows which tells a batch apart lies at or behind, and what does."""
    each, calls = found.each, found.graph.calls
    able = [prospect for prospect in each if prospect.up_to and prospect.windows > 1]
    if not able:
        return None
    order = {call: k for k, call in enumerate(calls)}
    end = order[max(able, key=lambda prospect: prospect.up_to).place.call]
    for call in reversed(calls[: end + 1]):
        layer = layer_of(call, call.given[0]) if call.fed else None
        stride = layer.stride if isinstance(layer, _STRIDING) else 1
        step = stride if isinstance(stride, int) else stride[0]
        if step > 1:
            return repr(call.name), step, [p for p in each if order[p.place.call] >= order[call]]
    return None
