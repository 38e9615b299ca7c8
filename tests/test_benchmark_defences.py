"""The table of defences: what stands in a row, what it says where no bound speaks, and that a stopped run goes on."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from unbatch.benchmarks import defences, find

NETWORK, BEHIND = "one unit a pixel", ("none", "noise")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(defences.NETWORKS, NETWORK, "digits:width=64,activation=tanh")
    monkeypatch.setattr(defences, "ATTACKS", ("bias-ratio", "gradient-matching"))


def measured(out: Path) -> list[dict[str, Any]]:
    rows = find("defences").run(seconds=0.5, out=out, networks=[NETWORK], defences=BEHIND, rounds=30)
    assert isinstance(rows, list)
    return rows


@pytest.mark.usefixtures("small")
def test_a_network_behind_two_defences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, noisy = measured(tmp_path)
    assert (plain["recovered"], plain["of"]) == (1, 1)
    assert plain["psnr"] > 100
    assert plain["bound"] is None
    assert any("without noise nothing bounds" in words for words in plain["without a bound"])
    assert noisy["recovered"] == 0
    assert noisy["specification"][0].startswith("noise:sigma=")
    assert noisy["chance"] < noisy["bound"] < 30
    assert noisy["psnr"] == pytest.approx(noisy["batch psnr"])  # of one example
    assert "on average" in noisy["assumptions"]
    assert plain["undefended"] == plain["accuracy"] == noisy["undefended"] > 0.1

    screen = Console(width=220, record=True)
    screen.print(defences.table([plain, noisy]))
    shown = screen.export_text().splitlines()
    assert [line.split().count("none") for line in shown if NETWORK in line] == [2, 0]
    assert any("1 of 1" in line for line in shown)
    pytest.importorskip("matplotlib")
    assert (tmp_path / "defences.png").stat().st_size > 5_000

    record = json.loads((tmp_path / "defences.json").read_text())
    assert record["complete"]
    assert record["rows"] == [plain, noisy]
    record["complete"], record["rows"] = False, [plain | {"seconds": -1.0}]
    (tmp_path / "defences.json").write_text(json.dumps(record))
    asked: list[str] = []
    monkeypatch.setattr(defences, "_measure", lambda scene, network, defence, s: asked.append(defence) or noisy)
    assert measured(tmp_path) == [plain | {"seconds": -1.0}, noisy]
    assert asked == ["noise"]


def test_a_defence_that_a_network_cannot_have_is_said_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(defences.NETWORKS, "normed", "digits:batch=2,model=resnet-small,width=4")
    (row,) = defences.run(seconds=0.1, networks=["normed"], defences=["dp-sgd"], rounds=2)
    assert "BatchNorm" in row["words"]
    assert row["psnr"] is row["accuracy"] is None
    screen = Console(width=220, record=True)
    screen.print(defences.table([row]))
    assert "BatchNorm" in screen.export_text()


def test_the_stored_table_is_whole_and_never_silent_about_a_bound() -> None:
    root = Path(__file__).parents[1]
    record = json.loads((root / "benchmarks" / "results" / "defences.json").read_text())
    assert record["complete"]
    cells = [(row["network"], row["defence"]) for row in record["rows"]]
    assert cells == [(network, defence) for network in defences.NETWORKS for defence in defences.DEFENCES]
    assert all(row["assumptions"] if row["by"] else row["without a bound"] for row in record["rows"])
    told = (root / "docs" / "how-safe-is-safe-enough.md").read_text()
    best = {row["network"]: f"{row['bound']:.1f} dB" for row in record["rows"] if row["defence"] == "noise"}
    worst = max(row["bound"] for row in record["rows"] if row["defence"] == "dp-sgd")
    assert all(words in told for words in (best["mlp tanh"], best["mlp relu"], f"{worst:.1f} dB or less on all five"))
