"""Labels: from what a file says to what a loss takes, with the rule in words.

Whole numbers from 0 on are class numbers and stay as they stand. Other numbers (-1, 3.25) are real targets and stay as they
stand. Words are classes: numbered in the order of the names that are given, else in alphabetical order.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from unbatch.errors import UnbatchError

Classes = int | Sequence[str] | None  # how many a model has, or their names in its order
WHOLE_NUMBER = re.compile(r"[+-]?\d+")
MOST_CLASSES = 2**31  # above, a whole number is an amount
_SHOWN = 12  # classes that a note names


@dataclass(frozen=True, kw_only=True)
class Labels:
    """Labels with the names of their classes, and what was done to get them."""

    values: Tensor  # [n, ...]
    classes: Sequence[str] = ()
    notes: list[str] = field(default_factory=list)


def word_labels(words: Sequence[str], classes: Classes, *, what: str) -> Labels:
    """Class numbers of `words`: their places among the names that are given, else in alphabetical order.

    Raises UnbatchError: a word is none of the given names, or only their number is given and not all of them are here.

    >>> found = word_labels(["dog", "cat", "dog"], None, what="labels")
    >>> found.values.tolist(), found.classes, found.notes
    ([1, 0, 1], ['cat', 'dog'], ['labels: classes are numbered in alphabetical order, 0 = cat, 1 = dog.'])
    >>> word_labels(["dog"], ["cat", "dog", "eel"], what="labels").values.tolist()
    [1]
    """
    present = sorted(set(words))
    if classes is None or isinstance(classes, int):
        if classes is not None and len(present) != classes:
            raise UnbatchError(
                f"{what}: {len(present)} classes ({_named(present)}) where there are {classes}, so their numbers are not "
                "known; give all names in the model's order (--classes cat,dog,...)."
            )
        names, order = present, "alphabetical order"
    else:
        names, order = named_classes(classes), "the given order"
        strange = [word for word in present if word not in names]
        if strange:
            raise UnbatchError(f"{what}: {_named(strange)} is none of the given classes {_named(names)}.")
    places = {name: number for number, name in enumerate(names)}
    note = f"{what}: classes are numbered in {order}, {_named([f'{i} = {name}' for i, name in enumerate(names)])}."
    notes = [note, *([f"{what}: {said}"] if (said := alike(present)) else [])]
    return Labels(values=torch.tensor([places[word] for word in words]), classes=names, notes=notes)


def alike(words: Sequence[str]) -> str:
    """Which words differ by case or spaces alone, in words; empty where none do.

    >>> alike(["Male", "female", "male"])
    'kept apart, though they differ by case or spaces alone: Male and male; write them alike if they are one.'
    """
    groups: dict[str, list[str]] = {}
    for word in words:
        groups.setdefault("".join(word.split()).casefold(), []).append(word)
    same = [" and ".join(group) for group in groups.values() if len(group) > 1]
    if not same:
        return ""
    return f"kept apart, though they differ by case or spaces alone: {_named(same)}; write them alike if they are one."


def class_labels(numbers: Tensor, classes: Classes, *, what: str) -> Labels:
    """Class numbers as they stand, with the names that are given. Raises UnbatchError: one of them is beyond them.

    >>> class_labels(torch.tensor([0, 11]), None, what="labels").values.tolist()
    [0, 11]
    """
    names = [] if classes is None or isinstance(classes, int) else named_classes(classes)
    count = classes if isinstance(classes, int) else len(names) or None
    low, high = (int(numbers.min()), int(numbers.max())) if numbers.numel() else (0, 0)
    if count is not None and (low < 0 or high >= count):
        raise UnbatchError(f"{what} run from {low} to {high}, but there are {count} classes, 0 to {count - 1}.")
    told = f", of the {count} that are given" if count is not None else ""
    note = f"{what}: class numbers as they stand, {low} to {high}{told}."
    return Labels(values=numbers.long(), classes=names, notes=[note])


def real_labels(numbers: Tensor, classes: Classes, *, what: str) -> Labels:
    """Real targets as they stand. Raises UnbatchError: some are not finite, or classes are asked for.

    >>> real_labels(torch.tensor([-1.0, 3.25]), None, what="targets").notes
    ['targets: real numbers as they stand, -1 to 3.25.']
    """
    if classes is not None:
        raise UnbatchError(f"{what} are real numbers and no class numbers; leave --classes out.")
    if not bool(numbers.isfinite().all()):
        raise UnbatchError(f"{what} hold NaN or infinite values; fill or drop those examples.")
    low, high = (float(numbers.min()), float(numbers.max())) if numbers.numel() else (0.0, 0.0)
    note = f"{what}: real numbers as they stand, {low:g} to {high:g}."
    if low >= 0 and bool((numbers == numbers.round()).all()):
        note += " All of them are whole; if they are class numbers, write them without a point."
    return Labels(values=numbers, notes=[note])


def text_labels(answers: Sequence[str], numbers: np.ndarray | None, classes: Classes, *, what: str) -> Labels:
    """Labels of a column of a table: `answers` as written, and their values where all of them are numbers.

    >>> signs = text_labels(["-1", "1"], np.array([-1.0, 1.0]), None, what="y")
    >>> signs.values.tolist(), signs.notes
    ([-1.0, 1.0], ['y: real numbers as they stand, -1 to 1. Class numbers would be whole and at least 0.'])
    """
    listed = classes is not None and not isinstance(classes, int)
    if numbers is None or (listed and set(answers) <= set(named_classes(classes))):
        return word_labels(answers, classes, what=what)
    whole = all(WHOLE_NUMBER.fullmatch(answer) for answer in answers)
    if (whole or (classes is not None and (numbers == numbers.round()).all())) and numbers.max() < MOST_CLASSES:
        if numbers.min() >= 0 or classes is not None:
            return class_labels(torch.from_numpy(numbers).long(), classes, what=what)
        found = real_labels(torch.from_numpy(numbers).float(), classes, what=what)
        return Labels(values=found.values, notes=[f"{found.notes[0]} Class numbers would be whole and at least 0."])
    return real_labels(torch.from_numpy(numbers).float(), classes, what=what)


def named_classes(classes: object) -> list[str]:
    """Names of classes in the model's order. Raises UnbatchError: none, or one of them twice."""
    names = [str(name).strip() for name in classes] if isinstance(classes, Sequence) else []
    if not names or len(set(names)) < len(names) or not all(names):
        raise UnbatchError(f"classes {', '.join(names) or 'none'}: give every class's name once (--classes cat,dog).")
    return names


def _named(names: Sequence[str]) -> str:
    more = f" ... ({len(names)} in all)" if len(names) > _SHOWN else ""
    return ", ".join(str(name) for name in names[:_SHOWN]) + more
