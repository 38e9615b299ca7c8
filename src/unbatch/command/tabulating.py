"""Tabulating: `unbatch table`, the runs of a folder at a terminal, in a file, or as SQL asks for them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

SHORT = "setting, defence, attack, seed, client, example, tier, status"  # the columns of a table without SQL
WIDE_PIPE = 200  # columns of a table in a file or a pipe
MOST_ROWS = 200  # that are printed

printer = Console(emoji=False)


def table_command(
    folder: Annotated[
        list[Path], typer.Argument(metavar="FOLDER", help="Of a sweep, or of audits; several are joined.")
    ],
    sql: Annotated[
        str, typer.Option(help='A question to the table `runs`, e.g. "select setting, avg(psnr) from runs group by 1".')
    ] = "",
    csv: Annotated[Path | None, typer.Option(help="Write the answer there.")] = None,
    parquet: Annotated[Path | None, typer.Option(help="Write the answer there.")] = None,
) -> None:
    """Show all runs of a folder as one table: a row per run and example, failed configurations too."""
    from unbatch.reporting.query import RUNS, Query
    from unbatch.reporting.trials import Trials

    trials = Trials.at(*folder, pictures=False)
    query = Query(trials)
    for path in (csv, parquet):
        if path is not None:
            query.write(path, sql or f"from {RUNS}")
            printer.print(f"wrote {path}", markup=False, soft_wrap=True)
    if csv is None and parquet is None:
        _show(query.columns(asked := sql or _short(query)), query.rows(asked))
    if trials.missing:
        n = len(trials.missing)
        words = f"{n} configuration{'s have' if n > 1 else ' has'} not run: the sweep's own command goes on with it."
        Console(stderr=True).print(words, markup=False)


def _short(query: Any) -> str:
    """A question that gives what fits a screen: who was attacked how, how much came back, and the score beside chance."""
    held = query.columns()
    names = [name for name in SHORT.split(", ") if name in held]
    score = next((name for name in ("psnr", "token_accuracy", "l2_error") if name in held), None)
    if score:
        names += [score, *(name for name in (f"chance_{score}",) if name in held)]
    return f"select {', '.join(names)} from runs"


def _show(columns: list[str], rows: list[tuple[Any, ...]]) -> None:
    table = Table(*columns, box=None, pad_edge=False)
    for row in rows[:MOST_ROWS]:
        table.add_row(*(_cell(value) for value in row))
    (printer if printer.is_terminal else Console(width=WIDE_PIPE)).print(table, markup=False)
    if len(rows) > MOST_ROWS:
        printer.print(f"{len(rows) - MOST_ROWS} rows more: --csv FILE writes all.", markup=False)


def _cell(value: Any) -> str:
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.4g}"
    return "" if value is None else str(value)
