"""Blame: what is said of an error, and of whose making it is. Imports no torch."""

from __future__ import annotations

import sysconfig
import traceback
from pathlib import Path

import unbatch
from unbatch.errors import UnbatchError

LONGEST = 1200  # letters of a message
_PACKAGES = {"site-packages", "dist-packages"}  # folders that packages are installed to


def said(error: BaseException) -> str:
    """One message for an error that ended a command: what, why, what to do.

    Asked wrongly, it is said as it stands. Raised under code that belongs neither to unbatch nor to an installed package,
    it is the user's, and the message says where. What is left is a defect of unbatch.

    >>> said(UnbatchError("--batch 0 is no batch."))
    '--batch 0 is no batch.'
    >>> said(KeyError("rank"))
    "'rank' This is a defect of unbatch (KeyError); --debug shows where."
    """
    usage = getattr(error, "format_message", None)
    if isinstance(error, UnbatchError) or usage:
        return _short(str(usage() if usage else error))
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"out of memory ({text}); take a smaller batch or model, or another --device."
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}."
    where = lines_of(error)
    if where:
        return (
            f"{where[-1]}: {type(error).__name__}: {text} This is in code of yours, which unbatch calls; mend it there."
        )
    if isinstance(error, OSError):
        return text
    return f"{text} This is a defect of unbatch ({type(error).__name__}); --debug shows where."


def lines_of(error: BaseException) -> list[str]:
    """The lines under which an error was raised that are neither of unbatch nor of installed packages, outermost first."""
    return [
        f"{Path(frame.filename).name}, line {frame.lineno}, in {frame.name}"
        for frame in traceback.extract_tb(error.__traceback__)
        if _own(frame.filename)
    ]


def _short(text: str) -> str:
    """Without the middle of what a file may have put in it."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"


def _own(file: str) -> bool:
    path = Path(file).resolve()
    python = [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "scripts")]
    foreign = [Path(unbatch.__file__).resolve().parent, *python]
    installed = _PACKAGES & set(path.parts) or any(path.is_relative_to(folder) for folder in foreign)
    return not file.startswith("<") and not installed
