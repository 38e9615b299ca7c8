"""Sweeping: `unbatch sweep`, a plan's audits at a terminal, with one bar for all of them."""

from __future__ import annotations

import os
import time
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
    from unbatch.reporting.trials import MANIFEST, Trials

    todo = jobs_of(plan, audit, engine=engine, threads=threads)
    if count:
        count(len(todo))
    at_once = max((os.cpu_count() or 1) // threads, 1) if jobs is None else jobs
    check_engine(engine, at_once, threads=threads, address=address)
    with claimed(folder, MANIFEST, *(f"{job.key}.json" for job in todo)):
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
    mlflow: Annotated[
        str | None, typer.Option(metavar="EXPERIMENT", help="Log each run's options and numbers to MLflow, no example.")
    ] = None,
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
    log = None if mlflow is None else logger(mlflow)
    begun = time.monotonic()
    with _bar(quiet, log) as (count, announce):
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
        summarise(found, folder, time.monotonic() - begun)


def logger(experiment: str) -> Announce:
    """What writes a trial's options and numbers to an experiment of MLflow: once, or whenever it fails.

    Counts and scores are logged, and no private example. Raises MissingExtra, UnbatchError: see `Experiment`.
    """
    from unbatch.adapters.mlflow import Experiment
    from unbatch.reporting.spot import spots
    from unbatch.reporting.trials import Trials

    store = Experiment(experiment)

    def log(trial: Trial) -> None:
        (spot,) = spots(Trials.of([trial]))
        numbers = {tier.value.replace(" ", "_"): float(n) for tier, n in spot.counts.items()} | {
            "seconds": trial.seconds
        }
        numbers |= {"examples": float(spot.size)} if spot.size else {}
        if spot.best:
            numbers |= {spot.metric: spot.best[0]}
            numbers |= {} if spot.best[1] is None else {f"chance {spot.metric}": spot.best[1]}
        numbers |= {} if spot.bound is None else {"bound psnr": spot.bound}
        store.log(
            trial.key if not trial.failed else f"{trial.key} {trial.created}",
            title=trial.title,
            params={
                name: value if isinstance(value, str) else " ".join(value)
                for name, value in trial.configuration.items()
            },
            metrics=numbers,
            tags={
                "unbatch.command": trial.command,
                "unbatch.code": trial.code,
                "unbatch.engine": trial.engine,
                "unbatch.finding": trial.audit.verdict() if trial.audit else trial.words,
            },
            failed=trial.failed,
        )

    return log


def summarise(found: Trials, folder: Path, seconds: float) -> None:
    """Print how many configurations came to what in which time, what failed and why, and what to look at next."""
    for trial in found.failed:
        screen.print(f"failed: {trial.title}: {trial.words}", markup=False, style="red", soft_wrap=True)
    outcomes = found.outcomes()
    audits = len(found.current) - len(found.failed)
    screen.print(
        f"{audits} of {len(found.current) + len(found.missing)} configurations audited, {len(found.failed)} failed, "
        f"in {seconds:.1f} s; "
        f"private examples: {', '.join(f'{n} {tier}' for tier, n in outcomes.items()) or 'none'}.",
        style="bold",
        markup=False,
        soft_wrap=True,
    )
    screen.print(f"unbatch table {folder}   unbatch compare {folder}", markup=False, soft_wrap=True)


@contextmanager
def _bar(quiet: bool, log: Announce | None) -> Iterator[tuple[Any, Any]]:
    """One bar for all configurations, with those that failed and the last that ended; `log` hears, too."""
    if quiet:
        yield None, log
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
            if log:
                log(trial)
            failed += trial.failed
            progress.update(task, advance=1, failed=f"{failed} failed" if failed else "", last=trial.title[:60])

        yield lambda total: progress.update(task, total=total), announce
