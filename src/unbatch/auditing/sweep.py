"""Sweep: many audits through one engine, each kept as soon as it ends, whatever becomes of the others."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

import unbatch
from unbatch.adapters.engines import Spread, engine
from unbatch.auditing.judge import failure
from unbatch.errors import UnbatchError
from unbatch.reporting.results import Audit
from unbatch.reporting.trial import Chosen, Trial, trial_at
from unbatch.reporting.trials import Manifest

Announce = Callable[[Trial], None]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One configuration on its way to a worker."""

    key: str
    configuration: Chosen
    given: Mapping[str, Any]  # the same as the audit takes it, by the names of its parameters
    place: Path  # the folder from which its files and modules are looked up
    engine: str = "local"
    threads: int = 1

    def trial(self, *, seconds: float = 0.0, words: str = "", audit: Audit | None = None) -> Trial:
        """What it came to."""
        return Trial(
            key=self.key,
            configuration=self.configuration,
            code=code_hash(),
            created=datetime.now(UTC).isoformat(timespec="milliseconds"),
            engine=self.engine,
            threads=self.threads,
            seconds=seconds,
            words=words,
            audit=audit,
        )


Work = Callable[[Mapping[str, Any]], Audit]


def run_jobs(
    jobs: Sequence[Job],
    work: Work,
    folder: Path,
    *,
    name: str = "local",
    count: int = 1,
    threads: int = 1,
    address: str = "",
    force: bool = False,
    announce: Announce | None = None,
) -> None:
    """Run what is not yet in `folder`, `count` jobs of `threads` threads each at a time, and keep each as soon as it ends.

    A job that fails is kept as a trial with the reason; it is run again by the next sweep, as are those that never ended.
    A worker that dies costs nothing but its own job: those that it may have had in hand are run again, each alone.
    `announce` hears of each trial, also of those that were there (all are run anew with `force`).
    Raises UnbatchError: no such engine, or the folder cannot be written to; what was finished is kept.
    """
    manifest = Manifest(
        version=unbatch.__version__,
        code=code_hash(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        configurations={job.key: job.configuration for job in jobs},
    )
    manifest.save(folder)
    waiting = {job.key: job for job in jobs}
    for job in jobs:
        held = None if force else _kept(folder, job)
        if held is not None:
            del waiting[job.key]
            if announce:
                announce(held)

    def keep(trial: Trial) -> None:
        trial.save(folder)
        waiting.pop(trial.key, None)
        if announce:
            announce(trial)

    if not waiting:
        return
    with engine(name, count, threads=threads, address=address) as spread:
        while waiting:
            handed = list[Job]()
            try:
                _go_through(spread, work, list(waiting.values()), handed, keep)
            except UnbatchError:
                raise
            except Exception as error:  # of the engine, whatever it is: a worker died
                suspects = [job for job in handed if job.key in waiting]
                if not suspects:
                    raise
                for job in suspects:
                    _alone(spread, work, job, keep, first=error)


def _go_through(
    spread: Spread[Job, str], work: Work, jobs: Sequence[Job], handed: list[Job], keep: Callable[[Trial], None]
) -> None:
    def one_by_one() -> Iterator[Job]:
        for job in jobs:
            handed.append(job)
            yield job

    for text in spread(partial(attempt, work=work), one_by_one()):
        keep(Trial.model_validate_json(text))


def _alone(spread: Spread[Job, str], work: Work, job: Job, keep: Callable[[Trial], None], first: Exception) -> None:
    """A job that a worker may have died of, with no other beside it, so that it is known which one it was."""
    try:
        _go_through(spread, work, [job], [], keep)
    except UnbatchError:
        raise
    except Exception as error:
        told = str(error).strip() or str(first)
        lines = [line for line in told.splitlines() if line.strip()] or [type(error).__name__]
        keep(job.trial(words=f"its worker died: {lines[0]}"))


def attempt(job: Job, work: Work) -> str:
    """The trial of a job as JSON, whatever happens in it: this is what runs on a worker."""
    start = time.monotonic()
    try:
        with _at(job.place), _threads(job.threads):
            audit = work(job.given)
            trial = job.trial(seconds=time.monotonic() - start, audit=audit)
            audit.environment["command"] = trial.command
    except UnbatchError as error:
        trial = job.trial(seconds=time.monotonic() - start, words=str(error))
    except (Exception, SystemExit) as error:  # one configuration must not cost the others their results
        words = failure(error) if isinstance(error, Exception) else f"something in it ended the program ({error})"
        trial = job.trial(seconds=time.monotonic() - start, words=words)
    return trial.model_dump_json()


def _kept(folder: Path, job: Job) -> Trial | None:
    """The finished trial of this job, if there is one; one that failed is no finished one."""
    path = folder / f"{job.key}.json"
    if not path.exists():
        return None
    trial = trial_at(path)
    return None if trial.audit is None or not trial.audit.complete else trial


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _at(place: Path) -> Iterator[None]:
    """In the folder that the sweep was begun in, where the worker has it, so that a user's modules and files are found."""
    before = Path.cwd()
    with suppress(OSError):
        os.chdir(place)
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        yield
    finally:
        os.chdir(before)


@cache
def code_hash() -> str:
    """Of all of unbatch's own source: results of other code are other results.

    >>> len(code_hash())
    16
    """
    digest, root = hashlib.sha256(unbatch.__version__.encode()), Path(unbatch.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]
