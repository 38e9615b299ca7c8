"""Redaction: an audit without its private examples, which keeps every score, bound and verdict; imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unbatch.reporting.results import Audit, Client, Example, Run

WITHHELD = "withheld"  # in place of an example, or of a label
ANOTHER = "another"  # in place of a recovered label that is not the private one


def redacted(audit: Audit) -> Audit:
    """The audit for a reader who may not see the data: no picture, text, row, label or token, private or recovered.

    Scores, chance, errors, bounds, tiers, reasons and hashes stay. Attacks' traces, which may hold tokens or labels, are
    left out whole; whether a recovered label was right still shows. It cannot be undone, and it is no anonymisation: names
    of files, classes and columns in the command line, the model and the notes on reading stay as they are.

    >>> import unbatch
    >>> audit = unbatch.audit(unbatch.cases.Digits(width=16), attacks="bias-ratio", analyses=())
    >>> shown = redacted(audit)
    >>> shown.verdict() == audit.verdict(), shown.runs[0].examples[0].picture, shown.clients[0].labels
    (True, 'withheld', ['withheld'])
    """
    clients = {client.index: client for client in audit.clients}
    return audit.model_copy(
        update={
            "private": False,
            "clients": [_client(client) for client in audit.clients],
            "runs": [_run(run, clients.get(run.client)) for run in audit.runs],
            "verdicts": [verdict.model_copy(update={"tokens": [], "pieces": []}) for verdict in audit.verdicts],
            "knowledge": {name: WITHHELD if name == "labels" else words for name, words in audit.knowledge.items()},
        }
    )


def _client(client: Client) -> Client:
    hidden: dict[str, list[str]] = {
        "pictures": [WITHHELD] * len(client.pictures),
        "labels": [WITHHELD] * len(client.labels),
        "pieces": [],
    }
    return client.model_copy(update=hidden)


def _run(run: Run, client: Client | None) -> Run:
    return run.model_copy(update={"examples": [_example(e, client) for e in run.examples], "trace": {}})


def _example(example: Example, client: Client | None) -> Example:
    hidden: dict[str, str | list[str] | None] = {
        "picture": None if example.picture is None else WITHHELD,
        "difference": None,
        "pieces": [],
        "label": _label(example, client),
    }
    return example.model_copy(update=hidden)


def _label(example: Example, client: Client | None) -> str | None:
    if example.label in (None, WITHHELD, ANOTHER):
        return example.label
    own = client.labels[example.index : example.index + 1] if client else []
    return WITHHELD if own in ([], [example.label]) else ANOTHER
