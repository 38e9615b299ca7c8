"""Benchmarks that were cut short go on where they stopped, and measure again what was measured otherwise."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

from unbatch.benchmarks import resumed


@dataclass(frozen=True)
class Sum:
    name: str
    numbers: tuple[int, ...] = (1, 2)


def test_rows_are_stored_as_they_come_and_no_row_is_measured_twice(tmp_path: Path) -> None:
    todo, asked = [Sum("b"), Sum("a"), Sum("c")], list[str]()

    def measure(problem: Sum) -> dict[str, Any]:
        if problem.name == "c" and len(asked) < 3:
            raise KeyboardInterrupt
        asked.append(problem.name)
        return {"network": problem.name, "settings": asdict(problem), "sum": sum(problem.numbers)}

    with pytest.raises(KeyboardInterrupt):
        resumed("sums", todo, measure, tmp_path, whole=True, device="cuda", seed=0)
    kept = json.loads((tmp_path / "sums.json").read_text())
    assert [row["network"] for row in kept["rows"]] == ["b", "a"]
    assert kept["complete"] is False

    asked.append("a third")
    rows = resumed("sums", [todo[2], Sum("a", (5,)), todo[0]], measure, tmp_path, whole=True, device="cuda", seed=0)
    assert [(row["network"], row["sum"]) for row in rows] == [("c", 3), ("a", 5), ("b", 3)]
    assert asked == ["b", "a", "a third", "c", "a"]
    assert json.loads((tmp_path / "sums.json").read_text())["complete"] is True
