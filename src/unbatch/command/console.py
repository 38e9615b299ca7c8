"""Console: an audit run at a terminal: progress bars, Ctrl-C that keeps what was found, files written as runs finish."""

from __future__ import annotations

import base64
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from unbatch.auditing.run import Target, audit
from unbatch.errors import UnbatchError
from unbatch.files import claimed, write_atomically
from unbatch.progress import Watch
from unbatch.reporting.html import write as write_report
from unbatch.reporting.results import Audit

PAGE, RECORD = "report.html", "audit.json"


def run_audit(
    target: Target,
    *,
    folder: Path,
    pictures: Path | None = None,
    command: str = "",
    quiet: bool = False,
    resume: bool = False,
    force: bool = False,
    own: str = "",
    auditor: str = "",
    private: bool = True,
    appendix: bool = True,
    **options: Any,
) -> Audit:
    """Audit `target`, keeping `folder`/audit.json up to date after every run, and write `folder`/report.html.

    Nothing is written outside of `folder` and, where it is named, `pictures`, which gets every recovered picture; both are
    tried for writing before the first attack, and held against another writer. `command` is noted as what was run.
    Without `private` no example, label or token is written or returned, scores alone; without `appendix` the page does not
    say which standards ask for such a test. `auditor` is noted as who ran it.
    With `resume` the finished runs of the audit.json there are kept; with `force`, or where it is of the case `own`, they
    are overwritten.
    The first Ctrl-C ends the running attack with the best it has and stops the audit; the second stops at once.
    Raises UnbatchError: there is an audit in the folder, or it cannot be written; the message says what to do.
    """
    with ExitStack() as places:
        places.enter_context(claimed(folder, RECORD, PAGE))
        before = _before(folder, resume, force, own)
        _refuse_withheld(before, pictures, private)
        if pictures is not None and pictures.resolve() != folder.resolve():
            places.enter_context(claimed(pictures))
            _refuse_pictures(pictures, resume or force)
        watch = Watch()

        def sink(record: Audit) -> None:
            record.environment["command"] = command
            record.environment |= {"audited by": auditor} if auditor else {}
            (record if private else record.redacted()).save(folder / RECORD)
            (folder / PAGE).unlink(missing_ok=True)  # of what stood there before

        with _interruptible(watch), _bars(watch, quiet) as announce:
            record = audit(target, sink=sink, resume=before, watch=watch, announce=announce, **options)
        record = record if private else record.redacted()
        write_report(record, folder / PAGE, appendix=appendix)
        if pictures is not None:
            save_pictures(record, pictures)
    return record


def _before(folder: Path, resume: bool, force: bool, own: str) -> Audit | None:
    """The audit to go on with, if any. Raises UnbatchError: one stands there that may be neither kept nor overwritten."""
    path = folder / RECORD
    if resume and force:
        raise UnbatchError("--resume keeps the audit in --out and --force overwrites it; give one of them.")
    if resume:
        return Audit.load(path) if path.exists() else None
    standing = [name for name in (RECORD, PAGE) if (folder / name).exists()]
    if not standing or force or (own and path.exists() and Audit.load(path).case == own):
        return None
    raise UnbatchError(
        f"{folder} holds an audit already ({' and '.join(standing)}); --resume goes on with it, --force overwrites it, and "
        "--out NAME writes elsewhere. Nothing was run."
    )


def _refuse_withheld(before: Audit | None, pictures: Path | None, private: bool) -> None:
    if before is not None and not before.private and private:
        raise UnbatchError(
            "the audit in --out was written with --no-private: its finished runs hold scores alone. Go on with --resume "
            "--no-private, or overwrite it with --force."
        )
    if pictures is not None and not private:
        raise UnbatchError("--save-images writes recovered pictures, and --no-private writes none; give one of them.")


def _refuse_pictures(folder: Path, over: bool) -> None:
    if not over and any(folder.glob("client*-example*.png")):
        raise UnbatchError(
            f"{folder} holds pictures of an earlier audit; name another folder, or overwrite with --force."
        )


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
