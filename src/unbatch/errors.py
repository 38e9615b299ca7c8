"""Errors: what unbatch raises, all under one root."""

from __future__ import annotations

from typing import Self


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
    """An attack or an analysis cannot run on this exchange; the message says why, in words for the report.

    >>> import torch, unbatch
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2, bias=False))
    >>> seen, _ = unbatch.observe(model, torch.nn.functional.cross_entropy, torch.ones(1, 3), torch.tensor([0]))
    >>> try:
    ...     unbatch.attacks.BiasRatio()(seen)
    ... except unbatch.NotApplicable:
    ...     print("cannot run here")
    cannot run here
    """


class Unknown(UnbatchError, AttributeError):  # noqa: N818 (a question that has no answer, named for it)
    """Something of Knowledge was read that the attacker does not know.

    >>> import unbatch
    >>> try:
    ...     unbatch.Knowledge(batch_size=4).labels
    ... except unbatch.errors.Unknown as error:
    ...     print(error)
    the attacker does not know 'labels'; known: batch_size.
    """


class MissingExtra(UnbatchError, ImportError):  # noqa: N818 (what is missing, named for it)
    """A package is not installed that comes with an extra of unbatch; the message gives the command that installs it."""

    @classmethod
    def of(cls, what: str, package: str, extra: str) -> Self:
        """`what` needs `package`, which `extra` brings.

        >>> print(MissingExtra.of("the case photos", "scikit-image", "cases"))
        the case photos needs scikit-image, which is not installed: pip install 'unbatch[cases]'
        """
        return cls(f"{what} needs {package}, which is not installed: pip install 'unbatch[{extra}]'")
