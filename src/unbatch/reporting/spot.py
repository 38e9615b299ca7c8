"""Spot: all trials of one setting, defence and batch size, as one place of a comparison."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from unbatch.reporting.chart import FURTHEST, known
from unbatch.reporting.html import best_score, primary
from unbatch.reporting.results import MetricInfo
from unbatch.reporting.tiers import Tier
from unbatch.reporting.trial import Trial, bound_psnrs
from unbatch.reporting.trials import Trials, worst_tiers

_BATCH = re.compile(r"(?<=[:,])batch=(\d+)(?:,|$)")
_NOT_A_SETTING = {
    "case",
    "model",
    "data",
    "batch",
    "defence",
    "attack",
    "suite",
    "seed",
    "metric",
    "analysis",
    "budget",
}


@dataclass(frozen=True, kw_only=True)
class Spot:
    """One place of a comparison: what all attacks and seeds together made of the same setting, defence and batch size.

    >>> trial = Trial(key="0", configuration={"case": "digits:batch=4,width=16", "defence": ["clip"]}, words="no memory.")
    >>> spot = spots(Trials.of([trial]))[0]
    >>> spot.setting, spot.defence, spot.batch, spot.words
    ('digits:width=16', 'clip', 4, 'failed')
    """

    setting: str
    defence: str
    batch: int | None
    trials: Sequence[Trial]  # an empty one stands for trials that have not run
    missing: int = 0  # how many more were asked for

    @cached_property
    def counts(self) -> Counter[Tier]:
        """How many private examples, by the worst that happened to each."""
        return Counter(worst_tiers(self.trials).values())

    @property
    def size(self) -> int:
        """Private examples in all."""
        return self.counts.total()

    @property
    def hit(self) -> int:
        """Those that came back exactly or as copies."""
        return self.counts[Tier.EXACT] + self.counts[Tier.COPY]

    @property
    def tested(self) -> bool:
        """Whether any attack on the examples themselves came to an answer."""
        return any(trial.audit is not None and trial.audit.tried() for trial in self.trials)

    @property
    def share(self) -> float | None:
        """The share of private examples that came back; None where nothing was tested."""
        return self.hit / self.size if self.size and (self.tested or self.hit) else None

    @property
    def words(self) -> str:
        """What is known of the place, in a few words."""
        if self.share is not None:
            return f"{self.hit} of {self.size}"
        if self.trials and all(trial.failed for trial in self.trials):
            return "failed"
        return "not tested" if self.trials else "not run"

    @property
    def more(self) -> list[str]:
        """What a number alone would hide."""
        alike, failed = self.counts[Tier.RECOGNISABLE], sum(trial.failed for trial in self.trials)
        said = [f"{alike} recognisable"] * bool(alike)
        said += [f"{failed} failed"] * bool(failed and failed < len(self.trials))
        return said + [f"{self.missing} not run"] * bool(self.missing and self.trials)

    @cached_property
    def metric(self) -> str:
        """What its scores are told in; empty where nothing was scored."""
        return next((primary(trial.audit) for trial in self.trials if trial.audit and trial.audit.metrics), "")

    @property
    def info(self) -> MetricInfo | None:
        """What is to be known of the metric."""
        held = [trial.audit.metrics for trial in self.trials if trial.audit]
        return next((metrics[self.metric] for metrics in held if self.metric in metrics), None)

    @cached_property
    def best(self) -> tuple[float, float | None] | None:
        """The score nearest to the truth, and what chance comes to there; None where nothing was matched."""
        info = self.info
        if info is None:
            return None
        audits = [trial.audit for trial in self.trials if trial.audit and self.metric in trial.audit.metrics]
        found = [pair for audit in audits if (pair := best_score(audit, self.metric))]
        return max(found, key=lambda pair: pair[0] * (1 if info.higher_is_better else -1), default=None)

    @property
    def worst(self) -> Tier:
        """The worst that happened to an example."""
        return max(self.counts, key=Tier.weight, default=Tier.NONE)

    @cached_property
    def bound(self) -> float | None:
        """PSNR in dB that no attacker exceeds, for the client that it protects least; None where none holds for all.

        None as well where float64's rounding keeps it anyway: such a bound says nothing.
        """
        limits = [bound_psnrs(trial.audit) for trial in self.trials if trial.audit]
        sizes = [{client.index for client in trial.audit.clients} for trial in self.trials if trial.audit]
        whole = [
            max(held.values()) for held, clients in zip(limits, sizes, strict=True) if held and clients <= set(held)
        ]
        least = known(min(whole, default=None))
        return least if least is not None and least <= FURTHEST else None


def spots(trials: Trials) -> list[Spot]:
    """Every place of the grid, in the order in which the sweep was asked for."""
    held: dict[tuple[str, str, int | None], tuple[list[Trial], list[Trial]]] = {}
    sizes = _sizes(trials)
    for which, group in enumerate((trials.current, trials.missing)):
        for trial in group:
            place = setting_of(trial), trial.defence, trial.batch or sizes.get(_sized(trial)) or _asked_size(trial)
            held.setdefault(place, ([], []))[which].append(trial)
    return [
        Spot(setting=setting, defence=defence, batch=batch, trials=run, missing=len(lacking))
        for (setting, defence, batch), (run, lacking) in held.items()
    ]


def setting_of(trial: Trial) -> str:
    """What is attacked, without its batch size and its defence, and what is not usual about how.

    >>> setting_of(Trial(key="0", configuration={"case": "digits:width=16,batch=4", "protocol": "local_steps=2"}))
    'digits:width=16, protocol local_steps=2'
    """
    asked = trial.configuration
    case = _BATCH.sub("", str(asked.get("case", ""))).rstrip(",:")
    own = [str(asked[name]) for name in ("model", "data", "observation") if name in asked]
    named = " on ".join([*own, *([case] if case else [])])
    more = [
        f"{name} {value if isinstance(value, str) else ' '.join(value)}"
        for name, value in asked.items()
        if name not in _NOT_A_SETTING and name != "observation" and not (name == "protocol" and value == USUAL)
    ]
    return ", ".join([named, *more])


USUAL = "one gradient, model in train mode"  # the protocol that goes without saying


def _sized(trial: Trial) -> tuple[str, str]:
    """What the batch size of a trial that came to nothing is told by: others of the same case, or of the same option."""
    return str(trial.configuration.get("case", "")), str(trial.configuration.get("batch", ""))


def _asked_size(trial: Trial) -> int | None:
    """The batch size that its words ask for, if they do."""
    case, own = _BATCH.search(str(trial.configuration.get("case", ""))), str(trial.configuration.get("batch", ""))
    return int(case[1]) if case else int(own) if own.isdecimal() else None


def _sizes(trials: Trials) -> dict[tuple[str, str], int]:
    return {_sized(trial): trial.batch for trial in trials.current if trial.batch}
