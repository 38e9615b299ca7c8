"""A part of the slow suite within a limit of time: pytest --part 333/10 --minutes 15.

The slow tests, sorted by id, are dealt out in turn, and day 1 of n takes the first hand, day 2 the second, until day n + 1
takes the first again: n days in a row hold every test once. When a hand comes round again it begins one test further on,
so that a limit of time does not always leave the same tests. Out of time, what is under way is stopped and what is left
is skipped and listed: tests that ended count, and one that failed fails the run.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Generator, Iterable

import pytest

LATE = "out of time"
AGAIN = 20  # seconds until a test that did not stop is told again


def hand(names: Iterable[str], day: int, parts: int) -> list[str]:
    """The names of that day, counted from 1, in the order in which they are run."""
    mine = sorted(names)[(day - 1) % parts :: parts]
    first = (day - 1) // parts % max(len(mine), 1)
    return mine[first:] + mine[:first]


def numbers(text: str) -> tuple[int, int]:
    """'333/10' -> (333, 10). Raises pytest.UsageError."""
    try:
        day, parts = (int(number) for number in text.split("/"))
    except ValueError:
        day, parts = 0, 0
    if min(day, parts) < 1:
        raise pytest.UsageError(f"--part {text} is no part: give DAY/PARTS, two numbers from 1 on, such as 333/10.")
    return day, parts


class Part:
    """Keeps the slow tests of one day and no others."""

    def __init__(self, day: int, parts: int) -> None:
        self.day, self.parts = day, parts

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        slow = {item.nodeid: item for item in items if item.get_closest_marker("slow")}
        mine = hand(slow, self.day, self.parts)
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in set(mine)])
        items[:] = [slow[name] for name in mine]


class Late(pytest.skip.Exception):
    """Ends a test that is under way when the time is over."""


class Limit:
    """Skips what is not done so many seconds after the first test began."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.end = seconds, 0.0

    def late(self, *_: object) -> None:
        raise Late(LATE)

    def limited(self) -> Generator[None, object, object]:
        self.end = self.end or time.monotonic() + self.seconds
        if (left := self.end - time.monotonic()) <= 0:
            self.late()
        before, told = signal.signal(signal.SIGALRM, self.late), sys.unraisablehook

        def but_late(lost: sys.UnraisableHookArgs) -> None:
            if not isinstance(lost.exc_value, Late):
                told(lost)

        # The interpreter reports and drops what is raised while it destroys an object: the test is told again later.
        sys.unraisablehook = but_late
        signal.setitimer(signal.ITIMER_REAL, left, AGAIN)
        try:
            return (yield)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            sys.unraisablehook = told

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self) -> Generator[None, object, object]:
        return (yield from self.limited())

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self) -> Generator[None, object, object]:
        return (yield from self.limited())

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        left = [report.nodeid for report in terminalreporter.stats.get("skipped", []) if LATE in str(report.longrepr)]
        if left:
            terminalreporter.section(f"{LATE}: {len(left)} tests are left for another day")
            terminalreporter.write_line("\n".join(left))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", metavar="DAY/PARTS", help="of the slow tests those of that day alone")
    parser.addoption("--minutes", type=float, help="skip what is not done by then")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--part"):
        config.pluginmanager.register(Part(*numbers(config.getoption("--part"))))
    if config.getoption("--minutes"):
        config.pluginmanager.register(Limit(60 * config.getoption("--minutes")))
