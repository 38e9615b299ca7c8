"""Workflows, hooks and what runs on every submission: they parse, and what they call is there."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z][a-z-]*):(?!=)", MAKEFILE, re.MULTILINE))
VARIABLES = set(re.findall(r"^([A-Z]+) [?:]=", MAKEFILE, re.MULTILINE))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
INSTALLED = {"ruff", "coverage", "mypy", "python"}  # by the extra `dev` into .venv/bin


def read(path: Path) -> dict[Any, Any]:
    found = yaml.safe_load(path.read_text())
    assert isinstance(found, dict)
    return found


def matrices(job: dict[str, Any]) -> list[dict[str, Any]]:
    """The values that a job is run with."""
    matrix = job.get("strategy", {}).get("matrix", {})
    whole = [{key: value} for key, values in matrix.items() if key != "include" for value in values]
    return [*matrix.get("include", []), *whole] or [{}]


def commands(job: dict[str, Any]) -> list[str]:
    """What a job runs, with the values of its matrix in place; none is left open."""
    lines = [line for step in job["steps"] for line in step.get("run", "").splitlines()]
    made = [filled(line, values) for line in lines for values in matrices(job)]
    assert not [line for line in made if "${{" in line]
    return made


def filled(line: str, values: dict[str, Any]) -> str:
    for name, value in values.items():
        line = line.replace(f"${{{{ matrix.{name} }}}}", str(value))
    return line


def called(command: str) -> None:
    """A target of the Makefile with variables that it reads, or a tool of the extra `dev`."""
    first, *words = command.split()
    if first == "make":
        target, *settings = words
        assert target in TARGETS, command
        for setting in settings:
            name, value = setting.split("=")
            assert name in VARIABLES, command
            assert name != "CONSTRAINTS" or (ROOT / value).is_file(), command
    else:
        assert first.startswith(".venv/bin/"), command
        assert first.removeprefix(".venv/bin/") in INSTALLED, command


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_run_what_is_there(path: Path) -> None:
    workflow = read(path)
    assert {"name", True, "jobs"} <= set(workflow)  # YAML reads the key `on` as true
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 360
        assert commands(job)
        for command in commands(job):
            called(command)


def test_the_suite_runs_on_the_oldest_and_the_newest_of_torch_and_python() -> None:
    rows = read(ROOT / ".github/workflows/suite.yml")["jobs"]["suite"]["strategy"]["matrix"]["include"]
    assert {(row["torch"], row["python"]) for row in rows} == {
        ("oldest", "3.11"),
        ("newest", "3.11"),
        ("newest", "3.13"),
    }
    assert PROJECT["requires-python"] == ">=3.11"


def test_the_oldest_torch_is_the_one_that_the_project_declares() -> None:
    (declared,) = (line.removeprefix("torch>=") for line in PROJECT["dependencies"] if line.startswith("torch>="))
    assert f"torch=={declared}.0" in (ROOT / ".github/oldest.txt").read_text().splitlines()
    held = [line for line in (ROOT / ".github/newest.txt").read_text().splitlines() if not line.startswith("#")]
    assert held == []


def test_the_slow_suite_runs_whole_every_night() -> None:
    nightly = read(ROOT / ".github/workflows/nightly.yml")
    assert nightly[True]["schedule"]
    (job,) = nightly["jobs"].values()
    days = [re.search(r"DAY=(\d+)", line) for line in commands(job) if "slow-part" in line]
    assert sorted({int(day[1]) % 10 for day in days if day}) == list(range(10))
    (parts,) = re.findall(r"--part \$\(DAY\)/(\d+)", MAKEFILE)
    assert parts == "10"


def test_hooks_are_the_repository_s_own_tools() -> None:
    repos = read(ROOT / ".pre-commit-config.yaml")["repos"]
    assert [repo["repo"] for repo in repos] == ["local"]  # nothing is fetched
    hooks = {hook["id"]: hook for hook in repos[0]["hooks"]}
    assert set(hooks) == {"ruff", "ruff-format", "mypy", "pages"}
    for hook in hooks.values():
        assert hook["language"] == "system"
        called(hook["entry"])
        assert re.compile(hook.get("files", ""))


def test_a_submission_runs_the_suite_and_then_a_part_of_the_slow_one() -> None:
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    made = [line for line in lines if line.startswith("make ")]
    assert made == ["make test", "make slow-part"]
    assert "set -euo pipefail" in lines
    for command in made:
        called(command)


def test_every_target_is_phony_and_every_phony_one_a_target() -> None:
    (phony,) = re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)
    assert set(phony.split()) == TARGETS


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not here")
@pytest.mark.parametrize("target", sorted(TARGETS))
def test_make_knows_how(target: str) -> None:
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if target == "slow-part":
        assert re.search(r"--part \d{5}/10 --minutes 15\b", done.stdout)
