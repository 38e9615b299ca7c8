"""Inspecting: `unbatch inspect`, a client's look at a model before it trains on it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from unbatch.command.options import (
    AsJson,
    ClassNames,
    DataPath,
    LossName,
    Model,
    NoPrivate,
    Reduction,
    Size,
)
from unbatch.errors import UnbatchError

if TYPE_CHECKING:
    from unbatch.reporting.inspection import Inspection

out = Console(emoji=False)


def inspect_command(
    model: Model = None,
    received: Annotated[
        Path | None,
        typer.Option(
            "--received", "--weights", help="The parameters that were received: .safetensors, or a saved state_dict."
        ),
    ] = None,
    before: Annotated[Path | None, typer.Option(help="Those of the round before, in the same form.")] = None,
    data: DataPath = None,
    loss: LossName = None,
    reduction: Reduction = None,
    size: Size = None,
    classes: ClassNames = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Examples of one update; 8 by default.")] = None,
    shape: Annotated[str | None, typer.Option(metavar="3,32,32", help="Of one input, where no data are given.")] = None,
    folder: Annotated[
        Path | None, typer.Option("--out", help="Where inspection.json and inspection.html go; none are written else.")
    ] = None,
    no_private: NoPrivate = False,
    as_json: AsJson = False,
) -> None:
    """Look at a model that was received, before training on it. Exits with 1 where it has signs of being planted.

    Give 32 examples of your own or more, and the model of the round before where you have it.
    """
    from unbatch.auditing.inspection import inspect
    from unbatch.command.named import load_model, load_weights
    from unbatch.command.settings import Asked, target_of

    if model is None:
        raise UnbatchError("give --model package.module:factory, the function that makes a model of the received form.")
    asked = Asked.of(locals() | {"weights": received, "before": None, "batch": None, "may_draw": True})
    target = target_of(asked).what
    if not isinstance(target, list):
        raise UnbatchError("give the received model's parameters by --received, and examples of your own by --data.")
    found = inspect(
        target[0].model,
        None if before is None else load_weights(load_model(model), before),
        None if data is None else target[0],
        loss=target[0].loss,
        batch=batch,
        shape=tuple(target[0].inputs.shape[1:]),
    )
    found = found.without_private() if no_private else found
    if folder is not None:
        found.save(folder / "inspection.json")
        found.to_html(folder / "inspection.html")
    if as_json:
        typer.echo(found.model_dump_json(indent=1))
    else:
        _show(found, folder)
    raise typer.Exit(found.exit_code)


def _show(found: Inspection, folder: Path | None) -> None:
    table = Table("sign", "layer", "value", "limit", "what was seen there", box=None, pad_edge=False)
    for sign in found.signs:
        style = "bold red" if sign.raised else ""
        table.add_row(sign.sign, sign.layer, f"{sign.value:.3g}", f"{sign.limit:g}", sign.words, style=style)
    out.print(table)
    if found.unread:
        out.print(f"Nothing to read here: {', '.join(found.unread)}.", markup=False)
    for risk in found.leaks:
        if risk.level in ("exact", "partial"):
            out.print(f"{risk.analysis}: {risk.layer}: {risk.words}", markup=False)
    for note in found.notes:
        out.print(note, markup=False)
    out.print(found.verdict(), style="bold", markup=False)
    if folder is not None:
        out.print(f"{folder / 'inspection.html'}  {folder / 'inspection.json'}", soft_wrap=True, markup=False)
