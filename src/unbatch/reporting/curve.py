"""Curve: how near the best attack came, against the strength of a defence, with chance and the bound on any attacker."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from unbatch.reporting.chart import Axis, number, score
from unbatch.reporting.results import MetricInfo
from unbatch.reporting.spot import Spot
from unbatch.reporting.tiers import Tier

NUMBER = re.compile(r"(?<==)[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?(?=[,\s]|$)")
HEIGHT = 168  # pixels of a curve's field
UNDEFENDED = "none"


@dataclass(frozen=True)
class Dot:
    """One strength on a curve: places in per cent of the width and in pixels from the top; None: nothing to draw."""

    x: float
    strength: str
    tier: str
    score: float | None
    chance: float | None
    bound: float | None
    words: str


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The best score against one number of a defence, at one batch size."""

    setting: str
    batch: int | None
    name: str  # of the defence, with a dot in place of the number
    metric: str
    info: MetricInfo
    axis: Axis
    dots: Sequence[Dot]
    ticks: Sequence[tuple[float, str]]  # pixels from the top, and words
    cut: bool  # something lies beyond the axis

    def lines(self, kind: str) -> list[tuple[float, float, float, float]]:
        """Pieces between neighbours of which both are known: x and y of either end. The undefended one stands alone."""
        held = [(dot.x, getattr(dot, kind), dot.strength) for dot in self.dots]
        return [
            (x, y, right, below)
            for (x, y, strength), (right, below, _) in pairwise(held)
            if y is not None and below is not None and strength != UNDEFENDED
        ]


def strength_curves(held: Sequence[Spot]) -> list[Curve]:
    """A curve for every setting, batch size and defence of which one number takes several values.

    Of several numbers that vary, the one with most values is the strength, and the others are part of the name.

    >>> sigmas = ["noise:sigma=0.1", "noise:sigma=0.01", "clip:norm=1"]
    >>> [name for name, _ in of_one_number([Spot(setting="digits", defence=name, batch=4, trials=[]) for name in sigmas])]
    ['noise:sigma=·']
    """
    axes, found = _axes(held), list[Curve]()
    for setting, batch in dict.fromkeys((spot.setting, spot.batch) for spot in held):
        own = [spot for spot in held if (spot.setting, spot.batch) == (setting, batch)]
        base = next((spot for spot in own if spot.defence == UNDEFENDED), None)
        for name, along in of_one_number(own):
            drawn = _curve(setting, batch, name, [*([(UNDEFENDED, base)] if base else []), *along], axes)
            found += [drawn] if drawn else []
    settings = list(dict.fromkeys(curve.setting for curve in found))
    names = list(dict.fromkeys(curve.name for curve in found))
    return sorted(found, key=lambda each: (settings.index(each.setting), names.index(each.name), each.batch or 0))


def of_one_number(held: Sequence[Spot]) -> list[tuple[str, list[tuple[str, Spot]]]]:
    """Defences that differ in one number: their name, and each one's strength and spot, the weakest number first."""
    alike: dict[str, list[tuple[list[str], Spot]]] = {}
    for spot in held:
        alike.setdefault(NUMBER.sub("·", spot.defence), []).append((NUMBER.findall(spot.defence), spot))
    found: dict[str, dict[str, Spot]] = {}
    for members in alike.values():
        columns = list(zip(*(numbers for numbers, _ in members), strict=True))
        if not columns or max(len(set(column)) for column in columns) < 2:
            continue
        at = max(range(len(columns)), key=lambda i: len(set(columns[i])))
        for numbers, spot in members:
            found.setdefault(_with_a_dot(spot.defence, at), {})[numbers[at]] = spot
    several = {name: along for name, along in found.items() if len(along) > 1}
    return [(name, sorted(along.items(), key=lambda each: float(each[0]))) for name, along in several.items()]


def _with_a_dot(defence: str, at: int) -> str:
    """The defence with a dot in place of its number `at`."""
    match = list(NUMBER.finditer(defence))[at]
    return f"{defence[: match.start()]}·{defence[match.end() :]}"


def _axes(held: Sequence[Spot]) -> dict[str, Axis]:
    """One axis for all curves of a metric, so that they can be compared at a glance."""
    scored = [(spot.metric, spot.info, spot.best) for spot in held]
    infos = {metric: info for metric, info, _ in scored if info}
    return {
        metric: Axis.of(
            [value for name, _, pair in scored if name == metric for value in pair or () if value is not None], info
        )
        for metric, info in infos.items()
    }


def _curve(
    setting: str, batch: int | None, name: str, along: Sequence[tuple[str, Spot]], axes: Mapping[str, Axis]
) -> Curve | None:
    metric = next((spot.metric for strength, spot in along if spot.best and strength != UNDEFENDED), "")
    info = next((spot.info for _, spot in along if spot.info and spot.metric == metric), None)
    if info is None:
        return None
    same = [(strength, spot, spot.best if spot.metric == metric else None) for strength, spot in along]
    values = [value for _, _, pair in same if pair for value in pair if value is not None]
    bounded, axis = metric == "psnr", axes[metric]

    def down(value: float | None) -> float | None:
        return None if value is None else round(HEIGHT * (1 - axis.at(value) / 100), 1)

    dots = []
    for i, (strength, spot, pair) in enumerate(same):
        limit = spot.bound if bounded else None
        said = [f"best {score(pair[0], info)}" if pair else "no attack returned anything"]
        said += [f"chance {score(pair[1], info)}"] if pair and pair[1] is not None else []
        said += [f"no attacker above {score(limit, info)}"] if limit is not None else []
        words = f"{strength if strength == UNDEFENDED else number(float(strength))}: {', '.join(said)}"
        tier = "guess" if spot.worst is Tier.NONE else str(spot.worst)
        x = round(100 * (i + 0.5) / len(same), 2)
        place = (down(pair[0]), down(pair[1])) if pair else (None, None)
        dots.append(Dot(x, strength, tier, *place, down(limit), words))
    beyond = [*values, *(spot.bound for _, spot, _ in same if bounded and spot.bound is not None)]
    return Curve(
        setting=setting,
        batch=batch,
        name=name,
        metric=metric,
        info=info,
        axis=axis,
        dots=dots,
        ticks=[(round(HEIGHT * (1 - at / 100), 1), words) for at, words in axis.ticks],
        cut=not axis.log and max(beyond, default=0.0) > axis.high,
    )
