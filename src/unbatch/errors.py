"""Errors: what unbatch raises, all under one root."""

from __future__ import annotations


class UnbatchError(ValueError):
    """Something asked of unbatch cannot be done; the message says what, why and what to do. Root of all its errors.

    >>> import unbatch
    >>> try:
    ...     unbatch.Attack.parse("unmx")
    ... except unbatch.UnbatchError as error:
    ...     print(str(error).partition(" Known")[0])
    unknown attack 'unmx'. Did you mean 'unmix'?
    """


class NotApplicable(UnbatchError):  # noqa: N818 (not an error of the user's: it cannot run here)
    """An attack or an analysis cannot run on this exchange; the message says why, in words for the report."""


class Unknown(UnbatchError, AttributeError):  # noqa: N818 (a question that has no answer, named for it)
    """Read something of Knowledge that the attacker does not know."""
