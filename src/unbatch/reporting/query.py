"""Query: the trials of a folder as one table that SQL asks, in DuckDB; imports no torch."""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unbatch.errors import MissingExtra, UnbatchError
from unbatch.files import write_atomically
from unbatch.reporting.trials import Trials

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

RUNS = "runs"  # the table's name in SQL
KINDS = {bool: "BOOLEAN", int: "BIGINT", float: "DOUBLE", str: "VARCHAR"}  # of Python in DuckDB


class Query:
    """The trials as the table `runs`: one row per run of an attack and private example, what was asked in columns beside.

    Columns are the keys of `Trials.rows` in letters that SQL takes bare: `chance psnr` is `chance_psnr`. A configuration
    that failed or has not run is one row with that status. DuckDB stays within this process and asks no network.

    >>> from unbatch.reporting.trial import Trial
    >>> trials = Trials.of([Trial(key="0", configuration={"case": "digits"}, words="no memory was left.")])
    >>> Query(trials).rows("select key, status, words from runs")
    [('0', 'failed', 'no memory was left.')]

    Raises MissingExtra (an UnbatchError): duckdb is not installed.
    """

    def __init__(self, trials: Trials) -> None:
        try:
            import duckdb
        except ImportError:
            raise MissingExtra.of("a table of runs", "duckdb", "sweep") from None
        offline: dict[str, str | bool | int | float | list[str]] = {
            "autoinstall_known_extensions": "false",
            "autoload_known_extensions": "false",
        }
        self.connection: DuckDBPyConnection = duckdb.connect(config=offline)
        self._broken: type[Exception] = duckdb.Error
        self._fill([{bare(name): value for name, value in row.items()} for row in trials.rows()])

    def _fill(self, rows: Sequence[dict[str, Any]]) -> None:
        columns = {name: _kind([row.get(name) for row in rows]) for row in rows for name in row} or {"key": "VARCHAR"}
        drawn = ", ".join(f'"{name}" {kind}' for name, kind in columns.items())
        self.connection.execute(f"create table {RUNS} ({drawn})")
        if not rows:
            return
        with tempfile.TemporaryDirectory() as folder:  # DuckDB reads JSON a thousand times faster than it takes rows
            path = Path(folder) / "rows.json"
            path.write_text("".join(json.dumps({k: _plain(v) for k, v in row.items()}) + "\n" for row in rows))
            typed = ", ".join(f"'{name}': '{kind}'" for name, kind in columns.items())
            self.connection.execute(
                f"insert into {RUNS} select * from read_json(?, format='newline_delimited', columns={{{typed}}})",
                [str(path)],
            )

    def columns(self, sql: str = f"from {RUNS}") -> list[str]:
        """The names of what a question gives."""
        return [str(column[0]) for column in self._asked(sql).description or ()]

    def rows(self, sql: str = f"from {RUNS}") -> list[tuple[Any, ...]]:
        """The answer to a question. Raises UnbatchError: it is no SQL, or names a column that is not there."""
        return self._asked(sql).fetchall()

    def write(self, path: Path, sql: str = f"from {RUNS}") -> None:
        """Write the answer to a .csv or a .parquet file, whole or not at all.

        Raises UnbatchError: neither of the two, no SQL, or what the disk said.
        """
        form = {".csv": "csv, header", ".parquet": "parquet"}.get(path.suffix)
        if form is None:
            raise UnbatchError(f"{path} is to be a .csv or a .parquet file; name it so.")
        with tempfile.TemporaryDirectory() as folder:
            part = Path(folder) / path.name
            quoted = str(part).replace("'", "''")
            self._asked(f"copy ({sql.strip().rstrip(';')}) to '{quoted}' (format {form})")
            write_atomically(path, part.read_bytes())

    def _asked(self, sql: str) -> DuckDBPyConnection:
        try:
            return self.connection.execute(sql)
        except self._broken as error:
            raise UnbatchError(f"the table cannot answer {sql!r}: {error}") from None


def bare(name: str) -> str:
    """A column's name in letters that SQL takes without quotes.

    >>> bare("chance l2-error")
    'chance_l2_error'
    """
    return re.sub(r"\W", "_", name)


def _kind(values: Sequence[Any]) -> str:
    """The narrowest type that holds all of them."""
    kinds = {type(value) for value in values if value is not None}
    if kinds == {int, float}:
        return KINDS[float]
    return KINDS.get(kinds.pop(), KINDS[str]) if len(kinds) == 1 else KINDS[str]


def _plain(value: Any) -> Any:
    """As JSON has it: numbers that JSON lacks are words, which DuckDB reads as numbers again."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
