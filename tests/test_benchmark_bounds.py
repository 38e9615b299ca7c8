"""The benchmark of tightness: what stands in a row, where it leaves a network, and that the stored one meets its target."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from unbatch.benchmarks import bounds


def test_one_network_until_nothing_is_returned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("PROBLEMS", (("tanh", 2),)), ("SIGMAS", (1e-5, 10.0, 100.0)), ("SEEDS", 3), ("WIDTH", 60)):
        monkeypatch.setattr(bounds, name, value)
    small, lost = bounds.run(seconds=4.0, out=tmp_path)  # and 100.0 is not tried
    assert (small["returned"], small["asked"]) == (6, 6)
    assert abs(small["ratio"] - 1) < 5 * small["error"] + 0.05
    assert small["unmix"] == pytest.approx(small["cramer-rao"], rel=0.2)
    assert small["van-trees"] < small["chance"]
    assert lost["returned"] == 0
    assert lost["ratio"] is None
    assert lost["cramer-rao"] == pytest.approx(1e6 * small["cramer-rao"])
    screen = Console(width=200, record=True)
    screen.print(bounds.table([small, lost]))
    shown = screen.export_text()
    assert f"largest ratio {small['ratio']:.2f} where all are returned" in shown
    assert "6 of 6" in shown
    record = json.loads((tmp_path / "bounds.json").read_text())
    assert record["complete"]
    assert record["rows"] == [small, lost]
    pytest.importorskip("matplotlib")
    assert (tmp_path / "bounds.png").stat().st_size > 5_000


def test_the_stored_ratios_are_at_most_one_and_a_half_and_not_below_one() -> None:
    record = json.loads((Path(__file__).parents[1] / "benchmarks" / "results" / "bounds.json").read_text())
    assert record["complete"]
    networks = dict.fromkeys(row["activation"] for row in record["rows"])
    assert list(networks) == [activation for activation, _ in bounds.PROBLEMS]
    for activation in networks:
        own = [row for row in record["rows"] if row["activation"] == activation]
        some = [row for row in own if row["returned"]]
        assert len(some) >= 4
        assert own[len(some) :] == own[-1:]  # up to where recovery breaks down
        assert max(row["ratio"] for row in some) <= 1.5
        assert all(row["ratio"] + 4 * row["error"] > 1 for row in some)
