"""Suites: fixed, citable sets of attacks. A published suite is never edited, only succeeded by a new one."""

from __future__ import annotations

from unbatch.errors import UnbatchError

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
