"""Comparing: `unbatch compare`, the page of many audits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

place = Console(emoji=False)


def compare_command(
    audits: Annotated[
        list[Path],
        typer.Argument(metavar="FOLDER|AUDIT.JSON...", help="A sweep's folder, folders of audits, or files."),
    ],
    to: Annotated[Path, typer.Option("--out", help="The page.")] = Path("compare.html"),
) -> None:
    """Write one HTML page of many audits: shares by batch and defence, scores against strength, what changed.

    Of the same configuration in several places the newest stands, and the one before it is what it is compared with.
    """
    from unbatch.reporting.comparison import headline, write_comparison
    from unbatch.reporting.spot import spots
    from unbatch.reporting.trials import Trials

    trials = Trials.at(*audits, pictures=False)
    write_comparison(trials, to)
    place.print(headline(spots(trials)), style="bold", markup=False, soft_wrap=True)
    place.print(f"wrote {to}", markup=False, soft_wrap=True)
