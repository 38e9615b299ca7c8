"""Verdict: what an audit found, in a sentence or a few, always of the worst that happened to an example."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from unbatch.analysis import TOKEN_TABLE
from unbatch.reporting.thresholds import SETTLED_FREEDOM
from unbatch.reporting.tiers import Outcome, Tier

if TYPE_CHECKING:
    from unbatch.reporting.results import Audit, Run


def words(audit: Audit) -> str:
    """The finding, and what keeps it from being the whole truth: attacks that were cut short, failed or were left out.

    >>> import unbatch
    >>> words(unbatch.audit(unbatch.cases.Digits(batch=2, width=16), attacks="label-count", analyses=()))
    'No attack on 2 private images could run; that is not safety. Labels alone were read, by label-count.'
    """
    finding = {
        Outcome.EXPLAINED: _explained,
        Outcome.NOT_AUDITED: _not_audited,
        Outcome.FEATURES: _features,
        Outcome.NONE: _none,
        Outcome.NOTHING_RAN: _nothing,
    }.get(audit.outcome, _recovered if audit.truth else _certified)(audit)
    everything = audit.truth and len(audit.recovered()) == audit.size
    return " ".join([finding, *([] if everything else unfinished(audit))])


def unfinished(audit: Audit) -> list[str]:
    """A sentence each on the attacks that were cut short, that failed, and that there was no time for.

    >>> import unbatch
    >>> spent = unbatch.audit(
    ...     unbatch.cases.Digits(batch=2, width=16), attacks="gradient-matching", analyses=(), budget=1e-9
    ... )
    >>> unfinished(spent)
    ['Cut short: gradient-matching.']
    """
    said = {"cut short": "Cut short", "failed": "Failed", "left out": "Left out for want of time"}
    found = {}
    for status, start in said.items():
        titles = dict.fromkeys(run.title for run in audit.runs if run.status == status)
        if titles:
            found[status] = f"{start}: {', '.join(titles)}."
    return list(found.values())


def amounts(audit: Audit) -> str:
    """How many examples came back in which way: "1 exactly, 2 as copies"; empty where none did.

    >>> import unbatch
    >>> amounts(unbatch.audit(unbatch.cases.Digits(width=16), attacks="bias-ratio", analyses=()))
    '1 exactly'
    """
    counts = audit.counts
    exact, copies, alike = (counts.get(tier, 0) for tier in (Tier.EXACT, Tier.COPY, Tier.RECOGNISABLE))
    said = [
        f"{exact} exactly" if exact else "",
        f"{copies} as {'a copy' if copies == 1 else 'copies'}" if copies else "",
        f"{alike} recognisably" if alike else "",
    ]
    return ", ".join(part for part in said if part)


def how_explained(run: Run, what: str = "it") -> str:
    """How well a run's examples explain a captured update, and whether something else nearby does as well."""
    one = len(run.examples) == 1
    verb, them = ("explains", "it") if one else ("explain", "them")
    said = f"{verb} {what} to {run.residual:.0e}" if run.residual else f"{verb} {what} to the last digit"
    if run.freedom is not None and run.freedom <= SETTLED_FREEDOM:
        return f"{said}, and nothing else near {them} does"
    return f"{said}; whether other batches do as well was not settled"


def _the(audit: Audit, run: Run) -> str:
    """The examples that a run returned, in words."""
    return f"The {audit.noun}" if len(run.examples) == 1 else f"The {audit.named(len(run.examples))}"


def _things(audit: Audit) -> str:
    private = f"{audit.size} private {audit.noun}" + "s" * (audit.size != 1)
    return private if audit.truth else f"the examples behind this {audit.seen}"


def _has(audit: Audit, n: int) -> str:
    them = "it" if n == 1 else "them"
    if "candidates" in audit.knowledge:  # of which it was told which are members: nobody got what he did not have
        return (
            f"anyone who holds {them} sees by this {audit.seen} that {'it was' if n == 1 else 'they were'} trained on"
        )
    if "known_inputs" in audit.knowledge:
        return f"anyone who holds this {audit.seen} and all other training examples has {them}"
    more = " and the weights before training" if "initial" in audit.knowledge else ""
    return f"anyone who sees this {audit.seen}{more} has {them}"


def _recovered(audit: Audit) -> str:
    counts, of = audit.counts, _things(audit)
    exact, copies, alike = (counts[tier] for tier in (Tier.EXACT, Tier.COPY, Tier.RECOGNISABLE))
    if exact:
        more = amounts(audit).partition(", ")[2]
        how = "told from other candidates" if "candidates" in audit.knowledge else "recovered exactly"
        return f"{exact} of {of} {how}{f' ({more})' * bool(more)}; {_has(audit, exact + copies)}."
    if copies:
        how = "a copy" if copies == 1 else "copies"
        more = f" ({alike} more recognisably)" * bool(alike)
        return f"{copies} of {of} recovered as {how}{_near(audit)}{more}; {_has(audit, copies)}."
    return f"{alike} of {of} recovered recognisably{_near(audit)}: none exactly, but far nearer than chance."


def _near(audit: Audit) -> str:
    """The nearest score with its chance, for what is not exact."""
    metric = next((m for m in ("psnr", "l2-error", "token-accuracy") if m in audit.metrics), None)
    best = [hit for hit in audit.worst(metric).values() if hit] if metric else []
    if metric is None or not best:
        return ""
    info = audit.metrics[metric]
    place, (value, _) = max(
        ((place, hit) for place, hit in audit.worst(metric).items() if hit),
        key=lambda item: item[1][0] * (1 if info.higher_is_better else -1),
    )
    chance = _chance(audit, metric, place)
    beside = "" if chance is None else f", where chance is {_said(chance, metric)}"
    return f" (the nearest {_said(value, metric)}{beside})"


def _said(value: float, metric: str) -> str:
    if metric == "token-accuracy":
        return f"with {value:.0%} of its tokens"
    return f"at {value:.1f} dB" if metric == "psnr" else f"{value:.2g} off"


def _chance(audit: Audit, metric: str, place: tuple[int, int]) -> float | None:
    levels = [e.chance.get(metric) for run in audit.runs for e in run.examples if (run.client, e.index) == place]
    held = [level for level in levels if level is not None]
    return (max if audit.metrics[metric].higher_is_better else min)(held, default=None)


def _certified(audit: Audit) -> str:
    exact, copies = audit.counts[Tier.EXACT], audit.counts[Tier.COPY]
    hit = exact or copies
    how = "" if exact else ", to a hundredth of their size at least,"
    whose = _has(audit, hit).replace(f"this {audit.seen}", "it")
    said = f"{audit.named(hit)} certified{how} to be behind this {audit.seen}; {whose}."
    run = audit.explaining()
    if run and len(run.examples) > exact:
        said += f" {_the(audit, run)} of {run.title} {how_explained(run)}."
    return said


def _explained(audit: Audit) -> str:
    run = audit.explaining()
    if run is None:
        raise RuntimeError("nothing explains this update; this is a defect of unbatch.")
    return f"{_the(audit, run)} that {run.title} read out of this update {how_explained(run)}."


def _not_audited(audit: Audit) -> str:
    return f"This update is not audited, and that is not safety. {audit.not_audited[:1].upper()}{audit.not_audited[1:]}"


def _features(audit: Audit) -> str:
    layer, examples = max(audit.features().items(), key=lambda item: len(item[1]))
    return (
        f"None of {_things(audit)} recovered, but the exact features of {len(examples)} at the layer {layer!r}: all that "
        "the network sees of them there is public."
    )


def _none(audit: Audit) -> str:
    tried = len(audit.tried())
    by = "1 run" if tried == 1 else f"{tried} runs"
    left = [run.residual for run in audit.tried() if run.residual is not None]
    open_ = [run for run in audit.tried() if run.explains]
    if open_:
        return (
            f"None of {_things(audit)} recovered by {by}, though what {_list(open_)} returned explains the update to "
            f"{min(run.residual or 0.0 for run in open_):.0e}: the update does not determine them."
        )
    if audit.truth:
        guessed = any(s is not None for run in audit.tried() for e in run.examples for s in e.scores.values())
        beside = "the nearest guesses stand beside their chance level" if guessed else "no guess was returned"
        said = f"None of {_things(audit)} recovered by {by}; {beside}."
        return " ".join([said, *_named_tokens(audit)])
    misfit = f"; the nearest guess leaves {min(left):.2g} of it unexplained" if left else ""
    return f"None of {_things(audit)} recovered by {by}{misfit}."


def _nothing(audit: Audit) -> str:
    labels = [run for run in audit.runs if run.ran]
    if labels:
        said = (
            f"No attack on {_things(audit)} could run; that is not safety. Labels alone were read, by {_list(labels)}."
        )
    else:
        said = f"No attack could run on {_things(audit)}; that is not safety. The reasons are listed."
    return " ".join([said, *_named_tokens(audit)])


def _named_tokens(audit: Audit) -> list[str]:
    """Of texts of which none was recovered, that their tokens stand in the update all the same, where they do."""
    found = next((risk for risk in audit.risks if risk.kind == TOKEN_TABLE and risk.level == "partial"), None)
    if found is None:
        return []
    return [f"Which tokens occur is public all the same, by the gradient of {found.layer!r}: {found.words}"]


def _list(runs: Iterable[Run]) -> str:
    return ", ".join(dict.fromkeys(run.title for run in runs))
