"""Progress of long work: a loop tells how far it is and its best loss; whoever listens may ask it to stop.

An attack or an analysis calls `tick` once per step. Nothing listens by default. An audit listens, to draw a bar, to end
work whose time is spent, and to let Ctrl-C keep what was found.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from unbatch.errors import NotApplicable

Listener = Callable[[float, float | None], None]  # (share done, best loss so far)

OPERATIONS_A_SECOND = 8e10  # of floating point, in which a large matrix is factored on two cores


@dataclass
class Watch:
    """One listening: what to call, when to stop, and whether the work was told to stop early.

    >>> heard = []
    >>> with watching(Watch(listener=lambda share, best: heard.append(share), deadline=0.0)) as watch:
    ...     going_on = tick(0.5)
    >>> heard, going_on, watch.cut_short
    ([0.5], False, True)
    """

    listener: Listener | None = None
    deadline: float = float("inf")  # on time.monotonic()
    stop: bool = False
    cut_short: bool = False

    def begin(self, seconds: float = float("inf")) -> None:
        """New work begins, and has so many seconds."""
        self.deadline, self.cut_short = time.monotonic() + seconds, False

    def tick(self, share: float, best: float | None) -> bool:
        """Hear that `share` of the work (0 to 1) is done. False: it is to stop."""
        if self.listener:
            self.listener(share, best)
        return self._in_time(time.monotonic())

    def affords(self, operations: float) -> bool:
        """Whether there is time for about so many floating-point operations in one piece. False: it is to stop."""
        return self._in_time(time.monotonic() + operations / OPERATIONS_A_SECOND)

    def _in_time(self, done: float) -> bool:
        late = self.stop or done >= self.deadline
        self.cut_short |= late
        return not late


_watch: ContextVar[Watch | None] = ContextVar("watch", default=None)


def tick(share: float, best: float | None = None) -> bool:
    """Say that `share` of the work (0 to 1) is done, with the best loss so far. False: stop now and return the best.

    >>> tick(0.5)  # nobody listens
    True
    """
    watch = _watch.get()
    return watch is None or watch.tick(share, best)


def affords(operations: float) -> bool:
    """Ask before a step that no `tick` can end, such as factoring a matrix, whether there is time for it.

    `operations`: of floating point, about. False: leave it, and return what there is.

    >>> affords(1e15)  # nobody listens, so there is no deadline
    True
    """
    watch = _watch.get()
    return watch is None or watch.affords(operations)


def tick_or_leave(share: float, what: str) -> None:
    """`tick` in work that has nothing to give before its end.

    Raises NotApplicable: it is to stop, before `what`.

    >>> try:
    ...     with watching(Watch(deadline=0.0)):
    ...         tick_or_leave(0.5, "the ranks were counted")
    ... except NotApplicable as error:
    ...     print(error)
    cut short before the ranks were counted.
    """
    if not tick(share):
        raise NotApplicable(f"cut short before {what}.")


def afford_or_leave(operations: float, what: str) -> None:
    """Ask as `affords` does, in work that has nothing to give before its end.

    Raises NotApplicable: there is no time for `what`.

    >>> try:
    ...     with watching(Watch(deadline=0.0)):
    ...         afford_or_leave(1e12, "the matrix was factored")
    ... except NotApplicable as error:
    ...     print(error)
    cut short before the matrix was factored.
    """
    if not affords(operations):
        raise NotApplicable(f"cut short before {what}.")


@contextmanager
def watching(watch: Watch) -> Iterator[Watch]:
    """Listens to every `tick` inside the block.

    >>> heard = []
    >>> with watching(Watch(listener=lambda share, best: heard.append((share, best)))):
    ...     tick(0.5, 0.1)
    True
    >>> heard
    [(0.5, 0.1)]
    """
    token = _watch.set(watch)
    try:
        yield watch
    finally:
        _watch.reset(token)
