"""The part of the slow suite that every day runs: ten days hold every test once, and the limit of time hides nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from part import hand, numbers

ROOT = Path(__file__).parents[1]
SUITE = """
import time
import pytest

pytestmark = pytest.mark.slow

@pytest.mark.parametrize("n", range(4))
def test_a_quick(n): pass

def test_b_that_catches_everything():
    for _ in range(200):
        try:
            time.sleep(0.1)
        except Exception:
            pass

def test_c_left(): pass
"""


WHILE_AN_OBJECT_IS_DESTROYED = """
import time
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("error")]

class Slow:
    def __del__(self):
        time.sleep(4)

def test_a(): Slow()

def test_b(): pass
"""


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    (tmp_path / "test_it.py").write_text(SUITE)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow\n")
    return tmp_path


def run(*options: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests")}
    command = [sys.executable, "-m", "pytest", "-p", "part", "-p", "no:cacheprovider", *options]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("start", [1, 9, 357])
@pytest.mark.parametrize("count", [0, 3, 10, 309])
def test_ten_days_in_a_row_hold_every_name_once(count: int, start: int) -> None:
    names = [f"test_{i}" for i in range(count)]
    dealt = [name for day in range(start, start + 10) for name in hand(names, day, 10)]
    assert sorted(dealt) == sorted(names)
    assert max(len(hand(names, day, 10)) for day in range(1, 11)) - len(names) // 10 in (0, 1)


def test_a_hand_that_comes_round_again_begins_elsewhere() -> None:
    names = list("abcdefgh")
    assert [hand(names, day, 4) for day in (1, 5, 9)] == [["a", "e"], ["e", "a"], ["a", "e"]]


@pytest.mark.parametrize("text", ["3", "0/10", "3/0", "a/b", "1/2/3", "-1/3"])
def test_what_is_no_part_is_refused(text: str) -> None:
    with pytest.raises(pytest.UsageError, match="is no part"):
        numbers(text)


def ids(suite: Path, *options: str) -> list[str]:
    done = run("--collect-only", "-q", *options, cwd=suite)
    assert done.returncode == 0, done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if "::" in line]


def test_the_days_hold_the_slow_tests_and_no_others(suite: Path) -> None:
    (suite / "test_other.py").write_text("def test_fast(): pass\n")
    slow = ids(suite, "-m", "slow")
    assert len(slow) == len(ids(suite)) - 1 == 6
    assert sorted(ids(suite, "--part", "8/2") + ids(suite, "--part", "9/2")) == sorted(slow)
    assert ids(suite, "--part", "3/2") == ids(suite, "--part", "3/2", "-m", "slow") == hand(slow, 3, 2)


@pytest.mark.parametrize("workers", ["-n0", "-n1"])
def test_out_of_time_the_tests_that_ended_count_and_the_others_are_listed(suite: Path, workers: str) -> None:
    done = run("--part", "1/1", "--minutes", "0.05", workers, cwd=suite)
    assert done.returncode == 0, done.stdout
    assert "4 passed, 2 skipped" in done.stdout
    assert "out of time: 2 tests are left for another day" in done.stdout
    assert "test_it.py::test_b_that_catches_everything" in done.stdout


def test_a_failure_fails_the_run_whatever_is_left(suite: Path) -> None:
    (suite / "test_it.py").write_text(SUITE.replace("(n): pass", "(n): assert n != 1"))
    done = run("--part", "1/1", "--minutes", "0.05", cwd=suite)
    assert done.returncode == 1
    assert "1 failed, 3 passed, 2 skipped" in done.stdout


def test_out_of_time_while_an_object_is_destroyed_is_no_failure(suite: Path) -> None:
    (suite / "test_it.py").write_text(WHILE_AN_OBJECT_IS_DESTROYED)
    done = run("--part", "1/1", "--minutes", "0.05", cwd=suite)
    assert done.returncode == 0, done.stdout
    assert "1 passed, 1 skipped" in done.stdout


def test_what_a_test_loses_while_an_object_is_destroyed_fails_the_run(suite: Path) -> None:
    (suite / "test_it.py").write_text(WHILE_AN_OBJECT_IS_DESTROYED.replace("time.sleep(4)", "raise ValueError"))
    assert run("--part", "1/1", "--minutes", "0.05", cwd=suite).returncode == 1
