"""Gate: whether an audit stays within limits, for continuous integration."""

from __future__ import annotations

import math
from collections.abc import Iterator

from unbatch.errors import UnbatchError
from unbatch.reporting.results import Audit, Status
from unbatch.reporting.tiers import Outcome, Tier
from unbatch.reporting.trials import Trials
from unbatch.reporting.verdict import how_explained


def breaches(
    audit: Audit,
    *,
    max_recovered: int | None = None,
    max_psnr: float | None = None,
    require_bound_psnr: float | None = None,
) -> list[str]:
    """The limits that the audit breaches, in words. An audit that proves nothing breaches every gate.

    `max_recovered` counts examples that came back exactly or as copies; without a truth, those that are certified, and
    those that explain the update to its rounding. `require_bound_psnr`: for every client some lower bound that holds for
    any attacker, on the update that was audited, allows no PSNR (of the mean squared error) above it.

    >>> import unbatch
    >>> audit = unbatch.audit(unbatch.cases.Digits(width=16), attacks="bias-ratio", analyses=())
    >>> breaches(audit, max_recovered=0)
    ['1 example recovered exactly, at most 0 allowed.']
    >>> breaches(audit, max_recovered=1)
    []

    Raises UnbatchError: no limit is given, or one that this audit cannot answer.
    """
    if max_recovered is None and max_psnr is None and require_bound_psnr is None:
        raise UnbatchError(
            "a gate needs a limit: --max-recovered N, --max-psnr DB, --require-bound-psnr DB, or several."
        )
    for name, limit in (("--max-psnr", max_psnr), ("--require-bound-psnr", require_bound_psnr)):
        if limit is not None and math.isnan(limit):
            raise UnbatchError(f"{name} is nan, which every audit would pass; give a number of dB.")
    found = []
    if audit.outcome is Outcome.NOT_AUDITED:
        found.append(f"the update is not audited: {audit.not_audited}")
    if not any(run.ran for run in audit.runs):
        found.append("no attack could run, so nothing is known; a gate does not pass on that.")
    elif not audit.tried() and (max_psnr is not None or (max_recovered or 0) < audit.size):
        found.append("no attack on the examples themselves could run, so nothing is known of them.")
    if not audit.complete:
        found.append("the audit was stopped before its end; resume it with --resume.")
    failed = [run.title for run in audit.runs if run.status == Status.FAILED]
    if failed:
        found.append(f"{', '.join(sorted(set(failed)))} failed; what it would have found is not known.")
    late = [run.title for run in audit.runs if run.status == Status.LEFT_OUT]
    if late:
        names = ", ".join(sorted(set(late)))
        found.append(f"{names} left out for want of time, so what it would have found is not known; give a --budget.")
    if max_recovered is not None:
        found += _too_many(audit, max_recovered)
    if require_bound_psnr is not None:
        found += _unbounded(audit, require_bound_psnr)
    if max_psnr is not None:
        if "psnr" not in audit.metrics:
            raise UnbatchError(
                "this audit has no psnr (a captured update has no truth to compare with); gate on others."
            )
        scores = {key: best[0] for key, best in audit.worst("psnr").items() if best and best[0] > max_psnr}
        for (client, index), score in scores.items():
            found.append(f"example {index} of client {client} at {score:.1f} dB, at most {max_psnr:g} dB allowed.")
    return found


def folder_breaches(
    trials: Trials,
    *,
    max_recovered: int | None = None,
    max_psnr: float | None = None,
    require_bound_psnr: float | None = None,
) -> list[str]:
    """The limits that each audit of a folder breaches, as `breaches` has them, with the configuration before the words.

    A configuration that failed, or that the sweep has not come to, breaches every gate: nothing is known of it.

    >>> from unbatch.reporting.trial import Trial
    >>> trials = Trials.of([Trial(key="0", configuration={"case": "digits"}, words="no memory was left.")])
    >>> folder_breaches(trials, max_recovered=0)
    ['digits: came to no audit: no memory was left.']

    Raises UnbatchError: no limit is given, or one that an audit cannot answer.
    """
    found = [f"{trial.title}: has not run, so nothing is known of it." for trial in trials.missing]
    found += [f"{trial.title}: came to no audit: {trial.words}" for trial in trials.failed]
    for trial, audit in trials.audits():
        try:
            words = breaches(
                audit, max_recovered=max_recovered, max_psnr=max_psnr, require_bound_psnr=require_bound_psnr
            )
        except UnbatchError as error:
            raise UnbatchError(f"{trial.title}: {error}") from None
        found += [f"{trial.title}: {each}" for each in words]
    return found


def _too_many(audit: Audit, most: int) -> Iterator[str]:
    """Examples that came back exactly or as copies, or that explain a captured update, where they are more than `most`."""
    exact, copies = audit.counts[Tier.EXACT], audit.counts[Tier.COPY]
    if exact + copies > most:
        both = f"{exact} exactly, {copies} as {'a copy' if copies == 1 else 'copies'}"
        how = both if exact and copies else "exactly" if exact else f"as {'a copy' if copies == 1 else 'copies'}"
        yield f"{_examples(exact + copies)} recovered {how}, at most {most} allowed."
    run = audit.explaining()
    if run and len(run.examples) > max(most, exact + copies):
        how = how_explained(run, "the update")
        yield f"{_examples(len(run.examples))} of {run.title} {how}, at most {most} allowed."


def _examples(n: int) -> str:
    return "1 example" if n == 1 else f"{n} examples"


def _unbounded(audit: Audit, most: float) -> Iterator[str]:
    """The clients whose best bound for any attacker allows more; bounds on the whole training do not count."""
    held = [b for b in audit.bounds if b.scope == "any" and b.covers == "update" and not math.isnan(b.value)]
    clients = [client.index for client in audit.clients] or [0]
    for client in clients:
        best = min((b for b in held if b.client == client), key=lambda b: b.psnr, default=None)
        of = f" of client {client}" if len(clients) > 1 else ""
        if best is None:
            yield f"no lower bound holds for any attacker{of}; a bound of at most {most:g} dB is required."
        elif best.psnr > most:
            yield (
                f"the best bound for any attacker{of}, {best.name}, allows {best.psnr:.1f} dB; a bound of at most "
                f"{most:g} dB is required."
            )
