"""Plan: a grid of audits, told in the words of `unbatch audit`'s own options, of which it keeps no list."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import itertools
import json
import re
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import click

from unbatch.analysis import Analysis
from unbatch.attack import Attack
from unbatch.auditing.sweep import Job, code_hash
from unbatch.command.settings import Asked, Ways
from unbatch.defence import Defence
from unbatch.errors import UnbatchError
from unbatch.metric import Metric
from unbatch.reporting.trial import Chosen, command_words

_NEXT_PLUGIN = re.compile(
    r",(?=\s*[\w-]+\s*(?::|,|$))"
)  # a comma before a name; one before option=value is within a plugin


def read_plan(path: Path) -> dict[str, Any]:
    """The axes in a TOML file. Raises UnbatchError: no such file, or no TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UnbatchError(f"cannot read {path}: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UnbatchError(f"{path} is no TOML: {error}. Write lines such as batch = [1, 2, 4].") from None


def jobs_of(plan: Mapping[str, Any], audit: click.Command, *, engine: str = "local", threads: int = 1) -> list[Job]:
    """A job for every point of the grid, the last key varying fastest; the same configuration twice is one job.

    `audit` is the command whose long options the keys are, and which reads their values. Every configuration is read before
    any of them runs.
    Raises UnbatchError: a key is no option, a value is refused, or a configuration names nothing that could be audited.
    """
    axes = {name: _axis(name, value, _option(name, audit)) for name, value in plan.items()}
    empty = [name for name, values in axes.items() if not values]
    if not axes or empty:
        raise UnbatchError(
            f"{empty[0]} has no value, so the plan has no configuration; give at least one."
            if empty
            else 'the plan is empty; give at least a case, such as case = "digits:batch=4".'
        )
    if "" not in sys.path:
        sys.path.insert(0, "")  # where a user's modules are looked up, as --model does
    jobs, digest = dict[str, Job](), cache(_digest)
    for point in itertools.product(*axes.values()):
        chosen: Chosen = {name: value for name, value in zip(axes, point, strict=True) if value}
        given = _given(chosen, audit)
        job = Job(
            key=_key(chosen, given, digest),
            configuration=chosen,
            given=given,
            place=Path.cwd(),
            engine=engine,
            threads=threads,
        )
        jobs.setdefault(job.key, job)
    return list(jobs.values())


def _options(audit: click.Command) -> dict[str, click.Parameter]:
    """The options of one audit that a plan may name; where its results go and what is printed is the sweep's own."""
    said = {each.name for kind in (Asked, Ways) for each in fields(kind)}
    return {param.opts[0].removeprefix("--"): param for param in audit.params if param.name in said}


def _option(name: str, audit: click.Command) -> click.Parameter:
    known = _options(audit)
    if name in known:
        return known[name]
    others = {spelling.removeprefix("--") for param in audit.params for spelling in param.opts}
    near = difflib.get_close_matches(name, known, n=1)
    why = (
        "that is not of one audit; give it to `unbatch sweep`, if it has it."
        if name in others
        else f"it is no option of `unbatch audit`.{f' Did you mean {near[0]!r}?' if near else ''}"
    )
    raise UnbatchError(f"the plan's key {name!r}: {why} Known: {', '.join(known)}.")


def _axis(name: str, value: object, option: click.Parameter) -> list[str | list[str]]:
    """The values that a key goes through, each as the words that the command line takes; empty for "not given"."""
    return [_words(name, each, option) for each in (value if isinstance(value, list | tuple) else [value])]


def _words(name: str, value: object, option: click.Parameter) -> str | list[str]:
    several = getattr(option, "multiple", False)
    if isinstance(value, list | tuple) and not several:
        raise UnbatchError(
            f"the plan's {name} = {value!r}: one audit takes one; a list in a list is for what it takes several of."
        )
    parts = [_word(name, each) for each in (value if isinstance(value, list | tuple) else [value])]
    if not several:
        return parts[0]
    return [part.strip() for each in parts for part in _NEXT_PLUGIN.split(each) if part.strip()]


def _word(name: str, value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float | Path):
        raise UnbatchError(f"the plan's {name}: {value!r} is neither words nor a number.")
    return str(value)


def _given(chosen: Chosen, audit: click.Command) -> dict[str, Any]:
    """A configuration as the command reads it, by the names of its parameters; files by their whole path.

    Raises UnbatchError: the command refuses it.
    """
    words = command_words(chosen)
    try:
        params = audit.make_context("audit", list(words)).params
    except click.ClickException as error:
        raise UnbatchError(f"unbatch audit {' '.join(words)}: {error.format_message()}") from None
    held = dict[str, Any]()
    for option in _options(audit).values():
        name = str(option.name)
        if params[name] not in (None, ()):
            held[name] = Path(params[name]).absolute() if isinstance(option.type, click.Path) else params[name]
    try:
        ways = Ways.of(held).of_use_to(Asked.of(held))
        for kind, spelt in ((Attack, ways.attack), (Metric, ways.metric), (Analysis, ways.analysis)):
            kind.several(spelt)
        Defence.several([*ways.defence, *ways.remedy])
    except UnbatchError as error:
        raise UnbatchError(f"unbatch audit {' '.join(words)}: {error}") from None
    return held


def _key(chosen: Chosen, given: Mapping[str, Any], digest: Callable[[Path], str]) -> str:
    """A hash of the configuration, of what stands in the files that it names, and of unbatch's code."""
    files = {name: digest(value) for name, value in given.items() if isinstance(value, Path)}
    sources = {name: digest(_source(str(given[name]))) for name in ("model", "loss") if ":" in str(given.get(name, ""))}
    told = json.dumps(
        {"configuration": chosen, "files": files, "sources": sources, "code": code_hash()}, sort_keys=True
    )
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    for each in _files(path):
        digest.update(each.relative_to(path).as_posix().encode())
        try:
            digest.update(each.read_bytes())
        except OSError:  # the job itself says what is wrong with it
            digest.update(b"unreadable")
    return digest.hexdigest()


def _files(path: Path) -> Iterator[Path]:
    if path == Path():
        return
    if path.is_dir():
        yield from sorted(each for each in path.rglob("*") if each.is_file())
    else:
        yield path


def _source(spec: str) -> Path:
    """The file of the module that a user's function stands in; an empty path where there is none."""
    try:
        found = importlib.util.find_spec(spec.partition(":")[0])
    except (ImportError, ValueError, AttributeError):
        return Path()
    origin = Path(found.origin) if found is not None and found.origin else Path()
    return origin if origin.is_file() else Path()
