"""Console: an audit run at a terminal: progress bars, Ctrl-C that keeps what was found, files written as runs finish."""

from __future__ import annotations

import base64
import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from unbatch.auditing.run import Target, audit
from unbatch.errors import UnbatchError
from unbatch.files import write_atomically
from unbatch.progress import Watch
from unbatch.reporting.html import write as write_report
from unbatch.reporting.results import Audit


def run_audit(
    target: Target, *, folder: Path, command: str = "", quiet: bool = False, resume: bool = False, **options: Any
) -> Audit:
    """Audit `target`, keeping `folder`/audit.json up to date after every run, and write `folder`/report.html.

    `command` is noted as what was run. With `resume` the finished runs of that audit.json are kept; without
    it an audit.json that stands there is renamed.
    The first Ctrl-C ends the running attack with the best it has and stops the audit; the second stops at once.
    Raises UnbatchError: a file cannot be written; the results are then saved in the temporary folder, and it says where.
    """
    path = folder / "audit.json"
    before = Audit.load(path) if resume and path.exists() else None
    if before is None and path.exists():
        os.replace(path, folder / "audit.previous.json")
    watch = Watch()

    def sink(record: Audit) -> None:
        record.environment["command"] = command
        _save(record, path)

    with _interruptible(watch), _bars(watch, quiet) as announce:
        record = audit(target, sink=sink, resume=before, watch=watch, announce=announce, **options)
    write_report(record, folder / "report.html")
    return record


def save_pictures(record: Audit, folder: Path) -> int:
    """Write every recovered picture as a PNG named by client, example, attack and seed; the number written."""
    count = 0
    for run in record.runs:
        for example in run.examples:
            header, _, data = (example.picture or "").partition(",")
            if header == "data:image/png;base64":
                attack = "".join(c if c.isalnum() or c in "-=." else "_" for c in run.title)
                name = f"client{run.client}-example{example.index}-{attack}-seed{run.seed}.png"
                write_atomically(folder / name, base64.b64decode(data), private=True)
                count += 1
    return count


def _save(record: Audit, path: Path) -> None:
    try:
        record.save(path)
    except ValueError as error:
        rescue = Path(tempfile.gettempdir()) / f"unbatch-{os.getpid()}-audit.json"
        try:
            record.save(rescue)
        except ValueError:
            raise error from None
        raise UnbatchError(f"{error} Finished runs are safe in {rescue}.") from error


@contextmanager
def _interruptible(watch: Watch) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        if watch.stop:
            raise KeyboardInterrupt
        watch.stop = True

    try:
        previous = signal.signal(signal.SIGINT, stop)
    except ValueError:  # not in the main thread: leave Ctrl-C as it is
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


@contextmanager
def _bars(watch: Watch, quiet: bool) -> Iterator[Any]:
    if quiet:
        yield None
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[best]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("observing the clients", total=1.0, best="")

        def announce(words: str) -> None:
            progress.reset(task, description=words, best="")

        def listen(share: float, best: float | None) -> None:
            progress.update(task, completed=share, best="" if best is None else f"best loss {best:.3g}")

        watch.listener = listen
        yield announce
