"""Change: what came out otherwise than when the same configuration was run before."""

from __future__ import annotations

from dataclasses import dataclass

from unbatch.reporting.chart import score
from unbatch.reporting.html import best_score, primary
from unbatch.reporting.results import Audit
from unbatch.reporting.tiers import Tier
from unbatch.reporting.trial import FAILED, Trial
from unbatch.reporting.trials import Trials
from unbatch.reporting.verdict import amounts

SEEN = 0.5  # dB by which scores must differ to be told: searches end elsewhere on another machine


@dataclass(frozen=True, kw_only=True)
class Change:
    """One configuration's last run and the one before it."""

    before: Trial
    now: Trial

    @property
    def direction(self) -> tuple[str, str]:
        """Which way it went: a style, and the words that say the same."""
        if self.now.audit is None:
            return "open", "failed now"
        if self.before.audit is None:
            return "untested", "audited now"
        before, now = _weight(self.before.audit), _weight(self.now.audit)
        if before != now:
            return ("found", "more came back") if now > before else ("untested", "less came back")
        then, since = _best(self.before.audit), _best(self.now.audit)
        if then is None or since is None or then[1] != since[1]:
            return "open", "scored otherwise"
        sign = 1 if self.now.audit.metrics[since[1]].higher_is_better else -1
        return ("found", "nearer") if sign * (since[0] - then[0]) > 0 else ("untested", "farther")

    @property
    def differs(self) -> bool:
        """Whether another number of examples came back, in another way, or the best score moved by half a decibel."""
        if self.before.audit is None or self.now.audit is None:
            return self.before.failed != self.now.failed
        if self.before.audit.counts != self.now.audit.counts or self.before.audit.outcome != self.now.audit.outcome:
            return True
        then, since = _best(self.before.audit), _best(self.now.audit)
        if then is None or since is None or then[1] != since[1]:
            return then != since
        if then[1] != "psnr" or self.now.audit.counts.get(Tier.EXACT):
            return False  # beyond an exact recovery scores differ by rounding
        return abs(since[0] - then[0]) > SEEN

    @property
    def words(self) -> tuple[str, str]:
        """What came of it before, and now."""
        return _said(self.before), _said(self.now)


def changes(trials: Trials) -> list[Change]:
    """Every configuration that was run before, with its last run but one."""
    last = {trial.identity: trial for trial in trials.earlier}  # the oldest come first
    return [Change(before=last[now.identity], now=now) for now in trials.current if now.identity in last]


def _best(audit: Audit) -> tuple[float, str] | None:
    metric = primary(audit)
    found = best_score(audit, metric)
    return (found[0], metric) if found else None


def _weight(audit: Audit) -> int:
    return sum(tier.weight() for tier in audit.tiers().values())


def _said(trial: Trial) -> str:
    if trial.audit is None:
        return f"{FAILED}: {trial.words}"
    best = _best(trial.audit)
    told = amounts(trial.audit) or str(trial.audit.outcome)
    return told + (f", best {score(best[0], trial.audit.metrics[best[1]])}" if best else "")
