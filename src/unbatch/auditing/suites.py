"""Suites: fixed, citable sets of attacks. A published suite is never edited, only succeeded by a new one."""

from __future__ import annotations

from unbatch.attack import ActiveAttack, Attack, Guarantee
from unbatch.errors import UnbatchError
from unbatch.threat_model import Sees, sees

SUITES: dict[str, tuple[str, ...]] = {
    "first": ("bias-ratio", "label-count", "gradient-matching"),
}
LATEST = "first"


def suite(name: str = LATEST) -> tuple[str, ...]:
    """The attacks of a suite, as spelt. Raises UnbatchError: no such suite.

    >>> suite("first")
    ('bias-ratio', 'label-count', 'gradient-matching')
    """
    if name not in SUITES:
        raise UnbatchError(f"unknown suite {name!r}; known: {', '.join(SUITES)}.")
    return SUITES[name]


def passive(seen: Sees = "update") -> tuple[str, ...]:
    """All attacks installed that only look, at what is `seen`, cheapest first; of equal cost those that promise most.

    It is what an audit runs where no attack is named. A server that also chooses the parameters is another threat model,
    so its attacks are only run by name.

    >>> passive()  # doctest: +NORMALIZE_WHITESPACE
    ('bias-ratio', 'label-count', 'descend', 'layer-by-layer', 'patch-span', 'token-span', 'unmix', 'tensor-moment',
    'feature-inversion', 'gradient-matching')
    """
    promises = list(Guarantee)
    every = [attack for attack in Attack.find().values() if not issubclass(attack, ActiveAttack)]
    found = [attack for attack in every if sees(attack.threat_model) == seen]
    found.sort(key=lambda attack: (attack.cost, promises.index(attack.guarantee), attack.name))
    return tuple(attack.name for attack in found)
