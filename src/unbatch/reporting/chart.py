"""Chart: every score of one metric against its chance level, placed on an axis; and how a number is written."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from unbatch.reporting.tiers import Tier

if TYPE_CHECKING:
    from unbatch.reporting.results import Audit, Example, MetricInfo, Run

VISIBLE = 60.0  # dB: rounding to 8 bits costs 58.9 dB, so beyond this the eye sees no difference
FURTHEST = 300.0  # dB, where float64 ends
SPREAD = 0.7  # of the axis, that what the eye sees takes; the rest, up to the best score, is drawn closer


def number(value: float | None) -> str:
    """Four significant digits for people.

    >>> number(12345.6), number(0.12345), number(1.23e-7), number(-1470.0), number(None)
    ('12,346', '0.1235', '1.2 × 10⁻⁷', '−1,470', 'none')
    """
    if value is None or math.isnan(value):
        return "not a number" if value is not None else "none"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    size = abs(value)
    if size >= 1e7 or 0 < size < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        text = f"{mantissa} × 10{str(int(exponent)).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}"
    else:
        text = f"{value:,.0f}" if size >= 1000 else f"{value:.4g}"
    return text.replace("-", "−")


def score(value: float, info: MetricInfo) -> str:
    """A score with its unit.

    >>> from unbatch.reporting.results import MetricInfo
    >>> score(131.04, MetricInfo(unit="dB", higher_is_better=True, best=300.0))
    '131.0 dB'
    """
    text = f"{value:.1f}".replace("-", "−") if info.unit == "dB" and math.isfinite(value) else number(value)
    return f"{text} {info.unit}" if info.unit else text


def title(metric: str) -> str:
    """A metric's name as people write it.

    >>> title("psnr"), title("l2-error")
    ('PSNR', 'l2-error')
    """
    return metric.upper() if metric in ("psnr", "ssim", "rouge") else metric


def by_attack(audit: Audit) -> dict[str, list[Run]]:
    """All runs by attack, in the order of the audit; knowing the defence is another attack."""
    names = dict.fromkeys([*audit.attacks, *(run.title for run in audit.runs)])
    return {name: held for name in names if (held := [run for run in audit.runs if run.title == name])}


def known(value: float | None) -> float | None:
    """None also where a score is no number."""
    return None if value is None or math.isnan(value) else value


@dataclass(frozen=True)
class Axis:
    """Scores on a line, in per cent of its width; its right end is nearest to the truth.

    >>> axis = Axis(low=0.0, high=60.0)
    >>> axis.at(0.0), axis.at(30.0), axis.at(999.0)
    (3.0, 50.0, 97.0)
    >>> [words for _, words in axis.ticks]
    ['0', '10', '20', '30', '40', '50', '60']
    >>> bent = Axis(low=0.0, high=300.0, bend=60.0)
    >>> bent.at(60.0), bent.at(180.0), [words for _, words in bent.ticks]
    (68.8, 82.9, ['0', '20', '40', '60', '180', '300'])
    """

    low: float
    high: float
    log: bool = False
    flip: bool = False  # lower is better
    bend: float | None = None  # the value from which on the axis is drawn closer

    @classmethod
    def of(cls, values: Iterable[float], info: MetricInfo) -> Axis:
        """An axis for all of `values`: logarithmic for errors that span decades, drawn closer from 60 on in dB."""
        seen = [value for value in values if math.isfinite(value)]
        positive = [value for value in seen if value > 0]
        flip = not info.higher_is_better
        if flip and info.best == 0 and positive and max(positive) > 100 * min(positive):
            return cls(math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive))), True, True)
        if info.unit == "dB":
            low, best = min(0.0, *seen, 0.0), max([*seen, 10.0])
            if best > VISIBLE:
                return cls(low, min(FURTHEST, VISIBLE * math.ceil(best / VISIBLE)), False, flip, VISIBLE)
            return cls(low, 10 * math.ceil(best / 10), False, flip)
        ends = [*seen, 0.0 if info.best is None else info.best]
        low, high = min(ends), max(ends)
        low, high = (min(low, 0.0), high) if low >= 0 else (low, high)
        return cls(low, high if high > low else low + 1, False, flip)

    def at(self, value: float) -> float:
        """Where a score stands; scores beyond an end stand at the end."""
        value = (math.log10(value) if value > 0 else self.low) if self.log else value
        value = min(max(value, self.low), self.high)
        if self.bend is None:
            share = (value - self.low) / (self.high - self.low)
        elif value <= self.bend:
            share = SPREAD * (value - self.low) / (self.bend - self.low)
        else:
            share = SPREAD + (1 - SPREAD) * (value - self.bend) / (self.high - self.bend)
        return round(3 + 94 * (1 - share if self.flip else share), 2)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Place and words of four to seven round values."""
        if self.bend is not None:
            near = [value for value in (0.0, 20.0, 40.0) if value >= self.low] + [self.bend]
            ends = [(self.bend + self.high) / 2] if self.high > 2 * self.bend else []
            return [(self.at(value), f"{value:g}") for value in (*near, *ends, self.high)]
        span = self.high - self.low
        if self.log:
            step: float = math.ceil(span / 6)
            values = [10.0 ** (self.low + step * i) for i in range(int(span / step) + 1)]
            return [(self.at(value), f"{value:g}") for value in values]
        rough = 10.0 ** math.floor(math.log10(span / 4))
        step = next(rough * f for f in (1, 2, 2.5, 5, 10) if span / (rough * f) <= 6)
        start = math.ceil(self.low / step - 1e-9)
        values = [step * i for i in range(start, math.floor(self.high / step + 1e-9) + 1)]
        return [(self.at(value), f"{value:g}".replace("-", "−")) for value in values]


@dataclass(frozen=True)
class Strip:
    """One attack's line of the chart."""

    attack: str
    points: Sequence[tuple[float, int, str, str]]  # place, height, tier, words
    chance: Sequence[tuple[float, str]]
    words: str


@dataclass(frozen=True)
class Chart:
    """Every score of one metric against its chance level, a line an attack."""

    axis: Axis
    metric: str
    info: MetricInfo
    strips: Sequence[Strip]
    cut: bool  # some score lies beyond the axis

    @classmethod
    def of(cls, audit: Audit, metric: str) -> Chart | None:
        """None where no run scored."""
        info = audit.metrics[metric]
        every = [e for run in audit.runs for e in run.examples]
        scores = [s for e in every if (s := known(e.scores.get(metric))) is not None]
        if not scores:
            return None
        axis = Axis.of([*scores, *(c for e in every if (c := known(e.chance.get(metric))) is not None)], info)
        lines = [(name, [(r, e) for r in runs for e in r.examples]) for name, runs in by_attack(audit).items()]
        strips = [_strip(name, pairs, axis, metric, info) for name, pairs in lines if pairs]
        return cls(axis, metric, info, strips, cut=not axis.log and max(scores) > axis.high)


def _strip(name: str, pairs: Sequence[tuple[Run, Example]], axis: Axis, metric: str, info: MetricInfo) -> Strip:
    points: list[tuple[float, int, str, str]] = []
    chance: list[tuple[float, str]] = []
    for run, e in pairs:
        value, level = known(e.scores.get(metric)), known(e.chance.get(metric))
        who = f"client {run.client}, example {e.index}"
        if value is not None:
            height = 7 + 5 * (len(points) % 3)  # equal scores stay countable
            tier = "guess" if run.layer or e.tier in (None, Tier.NONE) else str(e.tier)
            points.append((axis.at(value), height, tier, f"{who}: {score(value, info)}"))
        if level is not None:
            chance.append((axis.at(level), f"{who}, chance: {score(level, info)}"))
    places = {(run.client, e.index) for run, e in pairs}
    hit = {(run.client, e.index) for run, e in pairs if e.recovered}
    copies = {(run.client, e.index) for run, e in pairs if e.tier is Tier.COPY and not run.layer} - hit
    layers = sorted({run.layer for run, _ in pairs if run.layer})
    if layers:
        words = f"{len(hit)} of {len(places)} exact as features of {', '.join(layers)}"
    elif not any(metric in e.scores for _, e in pairs):
        words = f"labels only, not scored in {title(metric)}"
    else:
        lost = sum(metric in e.scores and known(e.scores[metric]) is None for _, e in pairs)
        words = f"{len(hit)} of {len(places)} exact"
        words += f", {len(copies)} {'copy' if len(copies) == 1 else 'copies'}" if copies else ""
        words += f", {lost} not recovered" if lost else ""
    return Strip(name, points, chance, words)
