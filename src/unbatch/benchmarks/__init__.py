"""Benchmarks: measurements to repeat. Each is one module here with `run` and `table`; `unbatch bench NAME` calls them.

run(data: Path | None, seconds: float, seed: int, device: str, out: Path | None) -> rows
table(rows) -> rich.table.Table
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType


def find(name: str) -> ModuleType:
    """The benchmark of that name. Raises ValueError: there is none; the message lists them."""
    known = sorted(info.name for info in pkgutil.iter_modules(__path__))
    if name not in known:
        raise ValueError(f"unknown benchmark {name!r}; known: {', '.join(known)}.")
    return importlib.import_module(f"{__name__}.{name}")
