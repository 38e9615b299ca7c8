"""Threat models: who the attacker is, what he sees and what he may know, as data."""

from __future__ import annotations

from collections.abc import Set
from enum import StrEnum
from typing import Literal

Sees = Literal["update", "release"]  # what a client sends in a round, or the parameters at the end of training


class ThreatModel(StrEnum):
    """Who an attacker is: its value is what lists, reports and the matrix call him.

    `sees` says whether he reads updates or a model whose training has ended, `grants` which fields of Knowledge make him
    the one that he is, and `means` puts both into a sentence.

    >>> ThreatModel.RELEASE.sees, sorted(ThreatModel.INFORMED.grants)
    ('release', ['known_inputs', 'known_labels', 'recipe'])
    >>> print(ThreatModel.RELEASE)
    holder of a released model
    """

    CURIOUS = "honest but curious server"
    MALICIOUS = "malicious server (chooses the parameters)"
    BUFFERS = "honest but curious server that is sent batch norm's buffers"
    RELEASE = "holder of a released model"
    START = "holder of a released model and its starting weights"
    INFORMED = "informed adversary (a released model, all examples but one, the recipe)"

    @property
    def sees(self) -> Sees:
        """What he reads."""
        return "release" if self in _RELEASES else "update"

    @property
    def grants(self) -> Set[str]:
        """Fields of Knowledge that he has, and a weaker one has not."""
        return _GRANTS.get(self, frozenset())

    @property
    def means(self) -> str:
        """Who he is, in a sentence."""
        return _MEANS[self]


def sees(threat_model: str) -> Sees:
    """What an attacker of that threat model reads; one of an unknown name reads updates.

    >>> sees("holder of a released model"), sees("my own")
    ('release', 'update')
    """
    return ThreatModel(threat_model).sees if threat_model in set(ThreatModel) else "update"


def of_a_release(known: Set[str]) -> ThreatModel:
    """The threat model of who holds a released model and knows those fields.

    >>> print(of_a_release({"initial"}))
    holder of a released model and its starting weights
    """
    strongest = (ThreatModel.INFORMED, ThreatModel.START)
    return next((each for each in strongest if each.grants <= known), ThreatModel.RELEASE)


_RELEASES = frozenset({ThreatModel.RELEASE, ThreatModel.START, ThreatModel.INFORMED})
_GRANTS: dict[ThreatModel, frozenset[str]] = {
    ThreatModel.BUFFERS: frozenset({"buffers"}),
    ThreatModel.START: frozenset({"initial"}),
    ThreatModel.INFORMED: frozenset({"known_inputs", "known_labels", "recipe"}),
}
_MEANS: dict[ThreatModel, str] = {
    ThreatModel.CURIOUS: "He holds the global model and one client's update, and changes nothing.",
    ThreatModel.MALICIOUS: "He sends out parameters of his own choice, and reads the update that comes back.",
    ThreatModel.BUFFERS: (
        "He holds the global model, one client's update and the running statistics of batch norm after the client's step."
    ),
    ThreatModel.RELEASE: "He holds the parameters at the end of training, and nothing that was sent on the way there.",
    ThreatModel.START: "He holds the parameters at the end of training and at its start.",
    ThreatModel.INFORMED: (
        "He holds the parameters at the end of training, every training example but one, and how the training was done."
    ),
}
