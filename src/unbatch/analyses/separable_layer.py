"""separable-layer: at which inner layer a batch's examples can be told apart, and how far down the way leads from there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from unbatch.analysis import Analysis, LayerRisk, Verdict
from unbatch.inversion.descent.forecast import Forecast, Prospect, Prospects, Rung, prospects
from unbatch.inversion.view import View
from unbatch.network.chain import named_after

APART = "examples told apart"


@final
class SeparableLayer(Analysis):
    """Which inner layer tells a batch's examples apart, up to how many, and how far down towards the inputs that leads.

    A convolution's gradient is a dense layer's with n P windows as examples, P those of one example: its rank is at most
    min(n P, c_out, c_in k^2), and while n P is no more than the others its row space is the windows' span. Behind a ReLU a
    corner's window is the only vector there with its zeros, so up to min(c_out, c_in k^2) / P examples are told apart.
    Where windows overlap on all sides the span tells whole maps, which needs no zeros: as many, behind any activation.

    From the shallowest layer that does so, everything above follows by running the network. Below, each weight's gradient
    gives c_out k^2 equations for the n h w unknowns of every channel of its input; layers that read the same tensor add up,
    and what can be independent is counted as a largest flow. Where they do not suffice, they are still equations on the
    inputs: a verdict says how many for each unknown. All this is counted, from shapes and from what is zero in a few
    inputs: a count excludes, and promises nothing. It foretells the attack `descend`.
    """

    paper: ClassVar[str] = "this library; equations a layer after Zhu, Blaschko, R-GAP, ICLR 2021"

    def run(self, view: View, at: tuple[Tensor, Tensor] | None, rng: torch.Generator) -> Sequence[LayerRisk | Verdict]:
        view.refuse_tokens()
        found = prospects(view, at, rng)
        n = int(view.knowledge.get("batch_size", 1))
        forecast = found.forecast(n)
        told = "" if "batch_size" in view.knowledge else " The batch size is not known: counted for one example."
        risks = [_risk(found, forecast, prospect) for prospect in found.each]
        apart = Verdict(name=APART, value=float(found.up_to), words=_apart(found, forecast) + told)
        if forecast.at is None or forecast.target is None or found.mixing:
            return [*risks, apart]
        words = _down(found, forecast, forecast.at, forecast.target)
        return [*risks, apart, Verdict(name="equations for each unknown", value=forecast.surplus, words=words)]


def _risk(found: Prospects, forecast: Forecast, prospect: Prospect) -> LayerRisk:
    place, n = prospect.place, forecast.n
    rung = next((rung for rung in forecast.rungs if rung.value is place.given), None)
    return LayerRisk(
        layer=prospect.name,
        kind=type(place.layer).__name__,
        unknowns=n * int(torch.Size(place.given.shape[1:]).numel()),
        equations=place.layer.weight.numel(),
        rank=prospect.rank(n),
        words=f"{_own(prospect, n)} {_from(found, forecast, prospect, rung)}".rstrip(),
        level=_level(found, forecast, prospect, rung),
    )


def _own(prospect: Prospect, n: int) -> str:
    """What the layer's gradient says by itself."""
    p, place = prospect.windows, prospect.place
    windows = f"{p:,} windows an example" if p > 1 else "one window an example"
    less = " - 1" if prospect.mixed else ""
    words = f"{windows}, rank at most min({n:,} x {p:,}{less}, {prospect.limit:,}) = {prospect.rank(n):,}:"
    if prospect.by_maps > prospect.by_zeros:
        size = "one example" if prospect.by_maps == 1 else f"a batch of up to {prospect.by_maps:,}"
        though = f", though {prospect.why_not}" if prospect.why_not else ""
        return f"{words} {size} can be told apart here by whole maps, which its windows' overlaps tell{though}."
    if prospect.why_not:
        return f"{words} it tells no batch apart, since {prospect.why_not}."
    if not prospect.up_to:
        return f"{words} it tells no batch apart, since one example alone has more windows than that."
    where, least = "its input" if p == 1 else "a corner's window", ""
    if prospect.up_to < prospect.counted:
        cornered = prospect.up_to == prospect.cornered
        what = f"{prospect.padded:,} entries of {where} are padding"
        zero = f"{prospect.zeros:,} entries of {where} are zero for one example and not for all"
        least = f", since only {what if cornered else zero}"
    size = "one example" if place.dense and prospect.up_to == 1 else f"a batch of up to {prospect.up_to:,}"
    if prospect.up_to > prospect.room:
        least += ", since padding completes a span that lacks a few directions"
    return f"{words} {size} can be told apart here{least}."


def _from(found: Prospects, forecast: Forecast, prospect: Prospect, rung: Rung | None) -> str:
    """What follows for the layer's input from the layer at which the batch is told apart."""
    at = forecast.at
    if at is None or found.mixing:
        return ""
    if prospect is at:
        return "The shallowest that does so for this batch."
    order = {each: k for k, each in enumerate(found.each)}
    if order[prospect] > order[at]:
        return f"Its input follows from that of {at.name!r}, by running the network."
    if rung is None:
        return "Its input's equations need what came back to its output, which is not known."
    if rung.known:
        return (
            f"Its input follows linearly from what lies above, of up to {rung.largest:,} examples: "
            f"{_equations(rung)} for {rung.unknowns:,} unknowns of each channel."
        )
    most = (
        f"of up to {rung.largest:,} examples it would follow" if rung.largest else "not even one example's would follow"
    )
    return f"Its input stays open: {_equations(rung)} for {rung.unknowns:,} unknowns of each channel; {most}."


def _equations(rung: Rung) -> str:
    several = f", by {' and '.join(map(repr, rung.readers))} together" if len(rung.readers) > 1 else ""
    return f"{rung.independent:,} equations{several}"


def _level(
    found: Prospects, forecast: Forecast, prospect: Prospect, rung: Rung | None
) -> Literal["exact", "partial", "low", "unknown"]:
    at = forecast.at
    if at is None:
        return "low"
    if found.mixing:
        return "unknown"
    order = {each: k for k, each in enumerate(found.each)}
    if order[prospect] >= order[at] or (rung is not None and rung.known):
        return "exact"
    return "low" if rung is None else "partial"


def _apart(found: Prospects, forecast: Forecast) -> str:
    """At which layer the batch is told apart."""
    n, at = forecast.n, forecast.at
    batch = "one example" if n == 1 else f"a batch of {n:,}"
    if at is None:
        best = max(found.each, key=lambda prospect: prospect.up_to)
        if best.up_to:
            return f"no layer tells {batch} apart; up to {best.up_to:,} can be told apart at {best.name!r}."
        return (
            f"no layer tells {batch} apart: each has more windows than its rank has room for, or lies behind no ReLU."
        )
    words = (
        f"by counting, a batch of up to {at.up_to:,} can be told apart at {at.name!r}, the shallowest layer that does so "
        f"for {batch}"
    )
    best = max(found.each, key=lambda prospect: prospect.up_to)
    words += f"; of up to {best.up_to:,} at {best.name!r}." if best.up_to > at.up_to else "."
    if found.mixing:
        words += (
            f" But {found.mixing!r} is batch norm in train mode: examples mix there, the span behind it holds their "
            "differences alone, and this is not read exactly yet."
        )
    return words


def _down(found: Prospects, forecast: Forecast, at: Prospect, target: Rung) -> str:
    """How far the way leads down from the layer that tells the batch apart."""
    if forecast.linear:
        return f"from {at.name!r} down every layer's input follows linearly, to the network's own."
    known = [rung for rung in forecast.rungs if rung.known and rung.readers]
    words = f"below {at.name!r} "
    words += f"the inputs of {_several(known)} follow linearly" if known else "no layer's input follows linearly"
    opened = next((rung for rung in forecast.rungs if not rung.known), None)
    if opened is not None:
        words += f"; that of {_several([opened])} is the first to stay open"
    elif forecast.stops:
        words += f", since {forecast.stops[0]}"
    what = _several([target]) if target.readers else repr(at.name)
    words += (
        f". The input of {what} gives {forecast.equations:,} equations for the {forecast.unknowns:,} unknowns of the "
    )
    if not forecast.readable:
        return f"{words}inputs: too few to determine them."
    return (
        f"{words}inputs: enough, as they are up to a batch of {found.readable:,}, for a search through "
        f"{_above(found, target)}, of which no count can tell how it ends."
    )


def _several(rungs: Sequence[Rung]) -> str:
    names = [repr(rung.readers[0]) for rung in rungs]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _above(found: Prospects, target: Rung) -> str:
    """The layers between the network's input and a tensor, counted."""
    names = [named_after(prospect.place.weight) for prospect in found.each]
    first = target.readers or tuple(p.name for p in found.each if p.place.given is target.value)
    count = min(names.index(name) for name in first)
    return "one layer" if count == 1 else f"{count} layers"
