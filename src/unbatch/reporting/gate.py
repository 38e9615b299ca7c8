"""Gate: whether an audit stays within limits, for continuous integration."""

from __future__ import annotations

import math
from collections.abc import Iterator

from unbatch.errors import UnbatchError
from unbatch.reporting.results import Audit, Status


def breaches(
    audit: Audit,
    *,
    max_recovered: int | None = None,
    max_psnr: float | None = None,
    require_bound_psnr: float | None = None,
) -> list[str]:
    """The limits that the audit breaches, in words. An audit that proves nothing breaches every gate.

    `require_bound_psnr`: for every client some lower bound that holds for any attacker, on the update that was audited,
    allows no PSNR (of the mean squared error) above it.

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
    if not any(run.ran for run in audit.runs):
        found.append("no attack could run, so nothing is known; a gate does not pass on that.")
    if not audit.complete:
        found.append("the audit was stopped before its end; resume it with --resume.")
    failed = [run.title for run in audit.runs if run.status == Status.FAILED]
    if failed:
        found.append(f"{', '.join(sorted(set(failed)))} failed; what it would have found is not known.")
    if max_recovered is not None and len(audit.recovered()) > max_recovered:
        recovered = "1 example" if len(audit.recovered()) == 1 else f"{len(audit.recovered())} examples"
        found.append(f"{recovered} recovered exactly, at most {max_recovered} allowed.")
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
