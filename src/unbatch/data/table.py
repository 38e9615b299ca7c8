"""Tables of a csv file: numeric columns standardised, words one-hot, the target as it stands; missing cells are refused."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from unbatch.data.arrays import LABEL_NAMES
from unbatch.data.examples import Data
from unbatch.data.labels import Classes, alike, text_labels
from unbatch.domain import Table
from unbatch.errors import UnbatchError
from unbatch.files import check_unpacked

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
CODE = re.compile(r"[+-]?0\d+")  # 02139, which would lose its zero as a number
DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+")
MISSING = {"", "na", "n/a", "#n/a", "nan", "+nan", "-nan", "null", "none", "?", "-", "inf", "-inf", "+inf"}
MOST_CATEGORIES = 1000
LARGEST = 1e38  # that float32 holds, nearly
STANDARDISED_RANGE = 10.0  # standard deviations
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_SHOWN = 8  # columns that a note names


@dataclass(frozen=True)
class _Column:
    """One column of the file as it becomes columns of inputs."""

    titles: Sequence[str]
    values: np.ndarray  # [n, len(titles)]
    kind: Literal["standardised", "kept", "category"]
    centre: float = 0.0  # in words a value is centre + spread * entry
    spread: float = 1.0
    mixed: bool = False  # a category some of whose words are numbers
    coded: bool = False  # a category of codes, whose leading zeros a number would lose


@dataclass(frozen=True)
class _Cells:
    """The file's cells, with the line that each row ends on."""

    path: Path
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    lines: Sequence[int]
    notes: Sequence[str]


def read_table(path: Path, classes: Classes) -> Data:
    """Rows of a csv file. Raises UnbatchError, with line and column: not a table, cells missing, or no clear labels."""
    cells = _cells(path)
    header = cells.header
    target = next((i for i, name in enumerate(header) if name.lower() in LABEL_NAMES), len(header) - 1)
    columns = [_column(cells, i) for i in range(len(header)) if i != target]
    if not columns:
        raise UnbatchError(f"{path} has only the label column {header[target]!r}; it needs at least one more.")
    answers, numbers = _values(cells, target, codes=False)  # a class 007 is number 7
    try:
        labels = text_labels(answers, numbers, classes, what=f"labels, column {header[target]!r}")
    except UnbatchError as error:
        raise UnbatchError(f"{path}: {error}") from None
    inputs = torch.from_numpy(np.concatenate([column.values for column in columns], 1)).float()  # [n, d]
    titles = tuple(title for column in columns for title in column.titles)
    starts = np.cumsum([0, *(len(column.titles) for column in columns)]).tolist()
    categories = tuple(
        tuple(range(start, end))
        for column, start, end in zip(columns, starts, starts[1:], strict=False)
        if column.kind == "category"
    )
    domain = Table(
        shape=(len(titles),),
        low=min(-STANDARDISED_RANGE, float(inputs.min())),
        high=max(STANDARDISED_RANGE, float(inputs.max())),
        columns=titles,
        categories=categories,
        units=tuple((column.centre, column.spread) for column in columns for _ in column.titles),
    )
    notes = [*cells.notes, *_done(columns, len(inputs)), *labels.notes]
    return Data(inputs=inputs, labels=labels.values, domain=domain, classes=labels.classes, notes=notes)


def _cells(path: Path) -> _Cells:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            first = file.readline()
            separator = max(_SEPARATORS, key=lambda mark: len(next(csv.reader([first], delimiter=mark), [])))
            file.seek(0)
            reader = csv.reader(file, delimiter=separator, strict=True)
            numbered = [(reader.line_num, row) for row in reader if row]
    except UnicodeDecodeError as error:
        raise UnbatchError(
            f"cannot read {path}: it is not UTF-8 text (byte {error.start}); save it as UTF-8."
        ) from None
    except (OSError, csv.Error) as error:
        raise UnbatchError(f"cannot read {path} as a csv table: {error}.") from None
    if len(numbered) < 2:
        raise UnbatchError(f"{path} holds no rows below its header; it needs a header row and one row an example.")
    header = [name.strip() for name in numbered[0][1]]
    lines, rows = [line for line, _ in numbered[1:]], [[cell.strip() for cell in row] for _, row in numbered[1:]]
    for line, row in zip(lines, rows, strict=True):
        if len(row) != len(header):
            raise UnbatchError(f"{path}, line {line}: {len(row)} fields where the header has {len(header)}.")
    _check_header(path, header)
    notes = [] if separator == "," else [f"the file's columns are separated by {_SEPARATORS[separator]}."]
    return _Cells(path, header, rows, lines, notes)


def _check_header(path: Path, header: Sequence[str]) -> None:
    if all(NUMBER.fullmatch(name) for name in header):
        raise UnbatchError(f"{path}: the first line holds numbers ({', '.join(header[:4])}); it must name the columns.")
    for i, name in enumerate(header):
        if not name:
            raise UnbatchError(f"{path}: column {i + 1} has no name; name it, or drop it if it counts the rows.")
        if name in header[:i]:
            raise UnbatchError(f"{path}: two columns are named {name!r}; rename or drop one.")


def _values(cells: _Cells, i: int, *, codes: bool) -> tuple[list[str], np.ndarray | None]:
    """A column as written, and as numbers where it is numeric: where most of what is not missing reads as a number.

    With `codes` a column that holds one, digits behind a zero such as 02139, is one of words.

    Raises UnbatchError: a cell is missing, or a numeric column holds something else.
    """
    name, written = cells.header[i], [row[i] for row in cells.rows]

    def place(k: int) -> str:
        return f"{cells.path}, line {cells.lines[k]}: column {name!r} holds"

    held = [cell for cell in written if cell.lower() not in MISSING]
    read = sum(NUMBER.fullmatch(cell) is not None for cell in held)
    numeric = read > 0 and 2 * read >= len(held) and not (codes and any(map(CODE.fullmatch, held)))
    for k, cell in enumerate(written):
        if not cell or (numeric and cell.lower() in MISSING):
            what = "NaN or an infinite value" if cell.lower().strip("+-") in ("nan", "inf") else f"no value ({cell!r})"
            raise UnbatchError(f"{place(k)} {what}; fill it in or drop the row.")
        if DECIMAL_COMMA.fullmatch(cell):
            raise UnbatchError(f"{place(k)} {cell!r}; write numbers with a decimal point, without separators.")
        if numeric and not NUMBER.fullmatch(cell):
            raise UnbatchError(
                f"{place(k)} {cell!r} among numbers; fill in a number or drop the row. If the column names categories, "
                "write each of them as a word."
            )
    if not numeric:
        return written, None
    numbers = np.array([float(cell) for cell in written])
    beyond = np.abs(numbers) > LARGEST
    if beyond.any():
        raise UnbatchError(f"{place(int(beyond.argmax()))} {written[int(beyond.argmax())]}, which is beyond any range.")
    return written, numbers


def _column(cells: _Cells, i: int) -> _Column:
    """A numeric column standardised, one whose values are all the same as it stands, words as one column a category."""
    name = cells.header[i]
    written, numbers = _values(cells, i, codes=True)
    if numbers is None:
        present = sorted(set(written))
        if len(present) > MOST_CATEGORIES:
            raise UnbatchError(
                f"{cells.path}: column {name!r} holds {len(present):,} different words, more than {MOST_CATEGORIES:,}; "
                "drop it (a name or a number of a row is no category), or group its values."
            )
        check_unpacked(cells.path, len(present) * len(written) * 8, f"column {name!r}, one-hot,")
        places = {word: place for place, word in enumerate(present)}
        values = np.eye(len(present))[[places[word] for word in written]]
        coded = any(map(CODE.fullmatch, present))
        mixed = not coded and any(map(NUMBER.fullmatch, present))
        return _Column([f"{name}={word}" for word in present], values, "category", mixed=mixed, coded=coded)
    centre, spread = float(numbers.mean()), float(numbers.std())
    if (numbers == numbers[0]).all() or not spread:  # rounding alone gives equal values a spread
        return _Column([name], numbers[:, None], "kept")
    return _Column([name], ((numbers - centre) / spread)[:, None], "standardised", centre, spread)


def _done(columns: Sequence[_Column], n: int) -> list[str]:
    """What was done to the columns, a sentence each."""
    moved, kept, words = ([c for c in columns if c.kind == kind] for kind in ("standardised", "kept", "category"))
    notes = []
    if moved:
        told = [f"{c.titles[0]} {c.centre:.4g} and {c.spread:.4g}" for c in moved]
        notes.append(
            f"numeric columns were standardised by mean and standard deviation of these {n} rows: {_first(told)}. An .npz "
            "file's values are taken as they stand."
        )
    if kept:
        why = "one row has no spread" if n == 1 else "all their values are the same"
        notes.append(f"numeric columns kept as they stand, since {why}: {_first([c.titles[0] for c in kept])}.")
    if words:
        told = [f"{c.titles[0].partition('=')[0]} ({len(c.titles)})" for c in words]
        notes.append(f"columns of words were one-hot encoded, a column a category: {_first(told)}.")
        odd = sorted({t for c in words for t in c.titles if t.partition("=")[2].lower() in MISSING})
        coded = [c.titles[0].partition("=")[0] for c in words if c.coded]
        if coded:
            notes.append(
                f"digits behind a zero are codes and no numbers, so that these are categories: {_first(coded)}."
            )
        mixed = [c.titles[0].partition("=")[0] for c in words if c.mixed]
        if mixed:
            notes.append(f"some of these categories are numbers, but most are words: {_first(mixed)}.")
        for c in words:
            if said := alike([title.partition("=")[2] for title in c.titles]):
                notes.append(f"column {c.titles[0].partition('=')[0]!r}: {said}")
        if odd:
            notes.append(f"taken as categories of their own: {_first(odd)}.")
    return notes


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" ... ({len(names)} in all)" if len(names) > _SHOWN else "")
