"""Sweeps: a grid of audits from Python, in the words of the command line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import typer

from unbatch.command.cli import app
from unbatch.command.plan import read_plan
from unbatch.command.sweeping import run_plan
from unbatch.reporting.trials import Trials

if TYPE_CHECKING:
    from unbatch.auditing.sweep import Announce


def sweep(
    plan: Mapping[str, Any] | str | Path,
    *,
    out: str | Path = "sweep",
    engine: str = "local",
    jobs: int | None = None,
    threads: int = 1,
    address: str = "",
    force: bool = False,
    announce: Announce | None = None,
) -> Trials:
    """Run a grid of audits, each once, on this machine or on a cluster, and return their results as one table.

    The grid has a point for every choice of one value from each key of `plan` (or of the TOML file that it names). Keys are
    the options of ``unbatch audit``: case, model, data, attack, defence, seed, budget ... A list is an axis; of what one
    audit takes several of, such as attacks, an inner list runs together, and defences may also be written as one text,
    ``"clip:norm=1,noise:sigma=0.01"``; an empty text is none.

    Each configuration is one JSON file in `out`, named by a hash of its options, of the files that it names and of
    unbatch's own code. What is there already is kept (not with `force`), so the same call goes on where it stopped; a
    configuration that fails is a row with the reason, and is tried again by the next call.
    `jobs` audits run at a time (None: as many as there are processors), with `threads` threads each. `engine`: "local",
    "ray" or "dask", the latter two on the cluster at `address` or on one that is started here. `announce` hears of each
    trial as soon as it is finished.
    Raises UnbatchError: an option or a value is refused, before anything is run; the message says which.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     found = sweep(
    ...         {"case": ["digits:width=8", "digits:batch=2,width=8"], "attack": "bias-ratio", "analysis": "gradient-rank"},
    ...         out=folder,
    ...         jobs=1,
    ...     )
    >>> [(row["setting"], row["example"], row["status"]) for row in found.rows()]  # doctest: +NORMALIZE_WHITESPACE
    [('digits:width=8', 0, 'done'), ('digits:batch=2,width=8', 0, 'not applicable'),
    ('digits:batch=2,width=8', 1, 'not applicable')]
    """
    group = typer.main.get_command(app)
    command = group.commands["audit"] if isinstance(group, click.Group) else group
    told = plan if isinstance(plan, Mapping) else read_plan(Path(plan))
    return run_plan(
        told,
        command,
        folder=Path(out),
        engine=engine,
        jobs=jobs,
        threads=threads,
        address=address,
        force=force,
        announce=announce,
    )
