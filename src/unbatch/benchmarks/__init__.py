"""Benchmarks: measurements to repeat. Each is one module here with `run` and `table`; `unbatch bench NAME` calls them.

run(data: Path | None, seconds: float, seed: int, device: str, out: Path | None) -> rows
table(rows) -> rich.table.Table
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import pkgutil
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor

from unbatch import __version__
from unbatch.domain import Domain
from unbatch.errors import UnbatchError
from unbatch.files import write_atomically
from unbatch.metric import Metric, match
from unbatch.progress import Watch
from unbatch.reconstruction import Reconstruction
from unbatch.truth import Truth

Problem = TypeVar("Problem")
Result = TypeVar("Result")


def find(name: str) -> ModuleType:
    """The benchmark of that name, as a module with `run` and `table`.

    Raises UnbatchError: there is none; the message lists them.

    >>> find("unmix").__name__
    'unbatch.benchmarks.unmix'
    """
    modules = sorted(info.name for info in pkgutil.iter_modules(__path__))
    found = importlib.import_module(f"{__name__}.{name}") if name in modules else None
    if found is None or not hasattr(found, "run"):
        known = [each for each in modules if hasattr(importlib.import_module(f"{__name__}.{each}"), "run")]
        raise UnbatchError(f"unknown benchmark {name!r}; known: {', '.join(known)}.")
    return found


def clock() -> float:
    """Seconds to measure methods by: of the processor where one thread does the work, else of the wall clock.

    Other work on the machine does not touch the former.

    >>> begun = clock()
    >>> clock() >= begun
    True
    """
    return time.process_time() if _alone() else time.perf_counter()


def allowance(seconds: float) -> Watch:
    """A watch that stops what it listens to after that many seconds of `clock`.

    >>> from unbatch.progress import tick, watching
    >>> with watching(allowance(0.0)):
    ...     tick(0.5)  # the time is spent
    False
    """
    watch, begun = Watch(), clock()

    def look(share: float, best: float | None) -> None:
        watch.stop = clock() - begun >= seconds

    watch.listener = look
    return watch


def measured(
    todo: Sequence[Problem], measure: Callable[[Problem], Result], device: str
) -> Iterator[tuple[Problem, Result]]:
    """Every problem with what `measure` makes of it, as they come; on the CPU, processors / threads at once.

    Where that is two or more, each in a process of its own: `measure` must pickle.

    >>> list(measured([4], lambda problem: problem**2, "cpu"))
    [(4, 16)]
    """
    many = min(len(todo), (os.cpu_count() or 1) // torch.get_num_threads()) if device == "cpu" else 1
    if many < 2:
        yield from ((problem, measure(problem)) for problem in todo)
        return
    with ProcessPoolExecutor(many, mp_context=multiprocessing.get_context("spawn")) as workers:
        runs = {workers.submit(measure, problem): problem for problem in todo}
        for finished in as_completed(runs):
            yield runs[finished], finished.result()


def resumed(
    name: str,
    todo: Sequence[Any],
    measure: Callable[[Any], dict[str, Any]],
    out: Path | None,
    *,
    whole: bool,
    device: str,
    **how: Any,
) -> list[dict[str, Any]]:
    """One row a problem, in their order: those that a run cut short has stored, and the others, stored as they come.

    Problems are dataclasses with a `name`; `measure` makes rows that hold it as "network" and the fields as "settings".
    `whole`: these are all the problems of the benchmark. `device` and `how` say how it is measured, as `stored` takes it.

    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class Small:
    ...     name: str
    >>> row = lambda problem: {"network": problem.name, "settings": {"name": problem.name}, "dB": 30.0}
    >>> [row["network"] for row in resumed("mine", [Small("b"), Small("a")], row, None, whole=True, device="cuda")]
    ['b', 'a']
    """
    done: dict[str, dict[str, Any]] = {}
    for row in stored(name, out, device=device, **how):
        if any(json.dumps(asdict(problem)) == json.dumps(row["settings"]) for problem in todo):
            done[row["network"]] = row

    def ordered() -> list[dict[str, Any]]:
        return [done[problem.name] for problem in todo if problem.name in done]

    for problem, row in measured([each for each in todo if each.name not in done], measure, device):
        done[problem.name] = row
        if out is not None:
            store(name, ordered(), out, device=device, **how, complete=whole and len(done) == len(todo))
    return ordered()


def psnr(found: Tensor, true: Tensor) -> float:
    """The peak signal-to-noise ratio of one picture [1, ...] in dB, cut to [0, 1]; -inf where it is not finite.

    >>> true = torch.zeros(1, 1, 8, 8)
    >>> f"{psnr(true + 0.1, true):.1f}", psnr(true / 0, true)
    ('20.0', -inf)
    """
    if not bool(found.isfinite().all()):
        return -float("inf")
    metric = Metric.find("psnr").model_validate({"peak": 1.0})
    return float(metric.score(found.detach().double().cpu().clamp(0, 1), true.double().cpu())[0])


def matched(found: Reconstruction, truth: Truth, domain: Domain) -> tuple[Tensor, Tensor]:
    """The matched examples as they were found, and the private ones, [p, ...] each, in float64 on the CPU.

    Raises UnbatchError: there are no examples, but labels alone.

    >>> from unbatch.domain import domain_of
    >>> truth = Truth(inputs=torch.tensor([[1.0, 0.0], [0.0, 1.0]]), labels=torch.tensor([0, 1]))
    >>> found, true = matched(Reconstruction(inputs=torch.tensor([[0.0, 0.5]])), truth, domain_of(truth.inputs))
    >>> found.tolist(), true.tolist()
    ([[0.0, 0.5]], [[0.0, 1.0]])
    """
    pairs = match(found, truth, domain)
    if pairs.inputs is None:
        raise UnbatchError("labels alone were found, and no examples to be compared.")
    return pairs.inputs.double().cpu(), truth.inputs.double().cpu()[pairs.true]


def store(name: str, rows: Sequence[Any], out: Path, *, wall: bool = False, **how: Any) -> None:
    """Writes out/NAME.json: how it was measured, on what, and the rows so far.

    `wall`: their seconds are not of `clock`. Raises UnbatchError as `stored` does.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     store("mine", [{"n": 4, "psnr": 31.5}], Path(folder), complete=True)
    ...     json.loads((Path(folder) / "mine.json").read_text())["rows"]
    [{'n': 4, 'psnr': 31.5}]
    """
    where = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "seconds are": "CPU" if _alone() and not wall else "wall",
        "processor": platform.machine(),
    }
    _held(name, out, how)
    out.mkdir(parents=True, exist_ok=True)
    record = {"benchmark": name, "version": __version__, **how, "environment": where, "rows": list(rows)}
    write_atomically(out / f"{name}.json", json.dumps(record, indent=1) + "\n")


def stored(name: str, out: Path | None, **how: Any) -> list[Any]:
    """The rows of a run that was cut short, to go on with; none where out/NAME.json holds no such run.

    That is one measured in the same way by this version. Raises UnbatchError: the file was measured on other data, so that
    this run would replace what it cannot compare with.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     store("mine", [{"n": 4}], Path(folder), seconds=3.0, complete=False)
    ...     stored("mine", Path(folder), seconds=3.0), stored("mine", Path(folder), seconds=9.0)
    ([{'n': 4}], [])
    """
    record = {} if out is None else _held(name, out, how)
    same = all(record.get(key) == value for key, value in {**how, "version": __version__}.items())
    return list(record["rows"]) if same and record.get("complete") is False else []


def _held(name: str, out: Path, how: Mapping[str, Any]) -> dict[str, Any]:
    """What out/NAME.json holds; nothing where it cannot be read."""
    path = out / f"{name}.json"
    try:
        record: dict[str, Any] = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return {}
    if "data" in how and record.get("data", how["data"]) != how["data"]:
        raise UnbatchError(
            f"{path} was measured with data: {json.dumps(record['data'])}, and this run has data: "
            f"{json.dumps(how['data'])}, which would replace it; give another folder (--out), or move the file away."
        )
    return record


def _alone() -> bool:
    return torch.get_num_threads() == 1 and not torch.cuda.is_available()
