"""Controls: which standards ask for such a test, and what of an audit answers each; imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from unbatch.reporting.tiers import Outcome
from unbatch.reporting.verdict import amounts

if TYPE_CHECKING:
    from unbatch.reporting.results import Audit


class Control(NamedTuple):
    """One requirement in our words, and what this audit says to it."""

    source: str
    number: str
    asks: str
    answer: str


def controls(audit: Audit) -> list[Control]:
    """The requirements that an audit of a shared update speaks to, each with what this one found.

    It is a map, not a judgement: whether a requirement is met is for its reviewer to say. Numbers of the OWASP standard
    are of its draft of version 1.0 with a chapter on privacy, and move between drafts.

    >>> import unbatch
    >>> audit = unbatch.audit(unbatch.cases.Digits(width=16), attacks="bias-ratio", analyses=())
    >>> [control.number for control in controls(audit)][:3]
    ['C12.6.1', 'C12.6.2', 'C12.6.3']
    >>> controls(audit)[0].answer
    'Defences of this client: none. No differential privacy was declared.'
    """
    answers = _answers(audit)
    return [
        Control(source, number, asks, " ".join(answers[name] for name in names))
        for source, number, asks, names in REQUIREMENTS
    ]


AISVS = "OWASP AI Security Verification Standard, draft of 1.0"
AITG = "OWASP AI Testing Guide"
NIST = "NIST AI Risk Management Framework 1.0"
GDPR = "GDPR"
REQUIREMENTS = (  # source, number, what it asks in our words, and which answers an audit has to it
    (AISVS, "C12.6.1", "client updates carry noise of differential privacy, locally or at the server", ("defended",)),
    (AISVS, "C12.6.2", "nothing that is shared shows the gradient or loss of one client", ("found",)),
    (
        AISVS,
        "C12.6.3",
        "leakage of federated training is bounded by tests, on record for each cycle",
        ("tried", "found"),
    ),
    (AISVS, "C12.3.2", "the leakage that tests find agrees with the declared privacy budget", ("private", "bounded")),
    (AITG, "AITG-MOD-05", "inversion is tried, from gradients too, on each kind of data", ("tried", "found")),
    (NIST, "MEASURE 2.7", "security and resilience are evaluated and documented", ("written",)),
    (NIST, "MEASURE 2.10", "privacy risks are examined and documented", ("found", "bounded")),
    (GDPR, "Art. 32(1)(d)", "the effect of technical measures is tested at intervals", ("defended", "remedies")),
    (
        GDPR,
        "Art. 35(7)(c), (d)",
        "an impact assessment names the risks, and the measures against them",
        ("found", "defended"),
    ),
    (GDPR, "Recital 26", "data are anonymous only where no means likely to be used single a person out", ("means",)),
)


def _answers(audit: Audit) -> dict[str, str]:
    """What an audit says to requirements, in sentences."""
    spent = audit.privacy.words() if audit.privacy is not None else "No differential privacy was declared."
    bounds, remedies = len(audit.bounds), len(audit.remedies)
    return {
        "found": audit.verdict(),
        "private": spent,
        "defended": f"Defences of this client: {', '.join(audit.defences) or 'none'}. {spent}",
        "tried": f"{sum(run.ran for run in audit.runs)} runs of attacks.",
        "bounded": f"{bounds} lower bounds on the error of attackers, each with its assumptions."
        if bounds
        else "No bound that holds for every attacker was found: what attacks failed to do is no proof.",
        "remedies": f"{remedies} more defences were measured beside." if remedies else "No other was measured.",
        "written": "This page and its JSON: model, protocol, attackers' knowledge, seeds, versions, hashes and failures.",
        "means": _means(audit),
    }


def _means(audit: Audit) -> str:
    if audit.outcome in (Outcome.EXACT, Outcome.COPY, Outcome.RECOGNISABLE, Outcome.EXPLAINED):
        return "This update gives private examples away by computing alone: it is to be handled as they are."
    return "What these attacks did not find, others may: that they failed shows no anonymity."


def assessment(audit: Audit) -> str:
    """A paragraph for a data protection impact assessment: risk, its likelihood as measured, measures, what is left open.

    >>> import unbatch
    >>> audit = unbatch.audit(unbatch.cases.Digits(width=16), attacks="bias-ratio", analyses=())
    >>> assessment(audit).split(". ")[0]
    'Risk: whoever receives a model update computes training examples back from it'
    """
    ran = list(dict.fromkeys(run.title for run in audit.runs if run.ran))
    known = ", ".join(name.replace("_", " ") for name in audit.knowledge)
    share = amounts(audit)
    likelihood = f" ({share})" if share else ""
    tried = f"{', '.join(ran[:12])}{' and others' if len(ran) > 12 else ''}" if ran else "none could run"
    return (
        "Risk: whoever receives a model update computes training examples back from it. "
        f"Likelihood, as measured on {audit.created[:10]}: {audit.verdict()}{likelihood} "
        f"The attacker was taken to know the model, the loss, the update and: {known or 'nothing more'}. "
        f"Attacks that ran: {tried}. Measures in force: {', '.join(audit.defences) or 'none'}. "
        "Left open: other rounds, other states of the model, and attacks that are not among these."
    )
