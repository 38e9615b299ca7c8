"""Progress of long work: a loop tells how far it is and its best loss; whoever listens may ask it to stop.

An attack calls `tick` once per step. Nothing listens by default. An audit listens, to draw a bar, to end a run whose
time is spent, and to let Ctrl-C keep what was found.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

Listener = Callable[[float, float | None], None]  # (share done, best loss so far)


@dataclass
class Watch:
    """One listening: what to call, when to stop, and whether the work was told to stop early."""

    listener: Listener | None = None
    deadline: float = float("inf")  # on time.monotonic()
    stop: bool = False
    cut_short: bool = False

    def tick(self, share: float, best: float | None) -> bool:
        if self.listener:
            self.listener(share, best)
        self.cut_short = self.stop or time.monotonic() >= self.deadline
        return not self.cut_short


_watch: ContextVar[Watch | None] = ContextVar("watch", default=None)


def tick(share: float, best: float | None = None) -> bool:
    """Say that `share` of the work (0 to 1) is done, with the best loss so far. False: stop now and return the best."""
    watch = _watch.get()
    return watch is None or watch.tick(share, best)


@contextmanager
def watching(watch: Watch) -> Iterator[Watch]:
    """Listen to every `tick` inside the block."""
    token = _watch.set(watch)
    try:
        yield watch
    finally:
        _watch.reset(token)
