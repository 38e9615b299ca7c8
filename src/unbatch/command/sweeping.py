"""Sweeping: `unbatch sweep`, a plan's audits at a terminal, with one bar for all of them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from unbatch.auditing.sweep import Announce
    from unbatch.reporting.results import Audit
    from unbatch.reporting.trial import Trial
    from unbatch.reporting.trials import Trials

screen = Console(emoji=False)


def audit_given(given: Mapping[str, Any]) -> Audit:
    """The audit that these options of `unbatch audit` ask for, by the names of its parameters; nothing is written."""
    from unbatch.auditing.run import audit
    from unbatch.command.settings import Asked, Ways, target_of

    asked, ways = Asked.of(given), Ways.of(given)
    target = target_of(asked)
    return audit(target.what, truth=target.truth, **ways.of_use_to(asked).arguments())


def run_plan(
    plan: Mapping[str, Any],
    audit: click.Command,
    *,
    folder: Path,
    engine: str = "local",
    jobs: int | None = None,
    threads: int = 1,
    address: str = "",
    force: bool = False,
    announce: Announce | None = None,
    count: Any = None,
) -> Trials:
    """Run the audits of a plan that are not yet in `folder`, and return all that stands there of it.

    `audit` is the command whose options the plan's keys are; `count` hears how many configurations there are.
    Raises UnbatchError: the plan is refused, or the folder is held by another process or cannot be written to.
    """
    from unbatch.adapters.engines import check_engine
    from unbatch.auditing.sweep import run_jobs
    from unbatch.command.plan import jobs_of
    from unbatch.files import claimed
    from unbatch.reporting.trials import Trials

    todo = jobs_of(plan, audit, engine=engine, threads=threads)
    if count:
        count(len(todo))
    at_once = max((os.cpu_count() or 1) // threads, 1) if jobs is None else jobs
    check_engine(engine, at_once, threads=threads, address=address)
    with claimed(folder, *(f"{job.key}.json" for job in todo)):
        run_jobs(
            todo,
            audit_given,
            folder,
            name=engine,
            count=at_once,
            threads=threads,
            address=address,
            force=force,
            announce=announce,
        )
    return Trials.at(folder)


def sweep_command(
    context: typer.Context,
    plan: Annotated[Path, typer.Argument(metavar="PLAN.TOML", help="Its keys are options of `unbatch audit`.")],
    engine: Annotated[str, typer.Option(help="local, ray or dask.")] = "local",
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Audits at a time; default: as many as there are processors for.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Of each audit.")] = 1,
    address: Annotated[str, typer.Option(help="Of a Ray or Dask cluster that runs already.")] = "",
    folder: Annotated[Path, typer.Option("--out", help="Where each run's JSON goes; what is there is kept.")] = Path(
        "sweep"
    ),
    force: Annotated[bool, typer.Option("--force", help="Run anew what is there already.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command of each audit; run none.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, no summary.")] = False,
) -> None:
    """Run a grid of audits, each once, here or on a cluster; the same command goes on where it stopped.

    Every key of the plan is an option of `unbatch audit`, and a list is an axis of the grid.
    """
    from unbatch.command.plan import jobs_of, read_plan

    root = context.find_root().command
    audit = root.get_command(context, "audit") if isinstance(root, click.Group) else None
    if audit is None:
        raise RuntimeError("there is no command called audit; this is a defect of unbatch.")
    told = read_plan(plan)
    if dry_run:
        for job in jobs_of(told, audit):
            typer.echo(job.trial().command)
        return
    with _bar(quiet) as (count, announce):
        try:
            found = run_plan(
                told,
                audit,
                folder=folder,
                engine=engine,
                jobs=jobs,
                threads=threads,
                address=address,
                force=force,
                announce=announce,
                count=count,
            )
        except KeyboardInterrupt:
            Console(stderr=True).print("stopped; what was finished is kept, and the same command goes on from there.")
            raise typer.Exit(130) from None
    if not quiet:
        summarise(found, folder)


def summarise(found: Trials, folder: Path) -> None:
    """Print how many configurations came to what, what failed and why, and what to look at next."""
    for trial in found.failed:
        screen.print(f"failed: {trial.title}: {trial.words}", markup=False, style="red", soft_wrap=True)
    outcomes = found.outcomes()
    audits = len(found.current) - len(found.failed)
    screen.print(
        f"{audits} of {len(found.current) + len(found.missing)} configurations audited, {len(found.failed)} failed; "
        f"private examples: {', '.join(f'{n} {tier}' for tier, n in outcomes.items()) or 'none'}.",
        style="bold",
        markup=False,
        soft_wrap=True,
    )
    screen.print(f"unbatch table {folder}   unbatch compare {folder}", markup=False, soft_wrap=True)


@contextmanager
def _bar(quiet: bool) -> Iterator[tuple[Any, Any]]:
    """One bar for all configurations, with the number of those that failed and the last one that ended."""
    if quiet:
        yield None, None
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[failed]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("{task.fields[last]}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("configurations", total=None, failed="", last="")
        failed = 0

        def announce(trial: Trial) -> None:
            nonlocal failed
            failed += trial.failed
            progress.update(task, advance=1, failed=f"{failed} failed" if failed else "", last=trial.title[:60])

        yield lambda total: progress.update(task, total=total), announce
