"""No true claim of the stored benchmarks' problems is withdrawn."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from unbatch.benchmarks import claims


def test_claims_are_counted_printed_and_stored(tmp_path: Path) -> None:
    rows = claims.run(out=tmp_path, wanted=lambda name: name in ("case: photos:width=64", "case: digits:model=lenet"))
    assert [(row["made"], row["true"], row["kept"], row["lost"]) for row in rows] == [(1, 1, 1, 0)] * 2
    assert json.loads((tmp_path / "claims.json").read_text())["rows"] == json.loads(json.dumps(rows))
    screen = Console(width=200, record=True)
    screen.print(claims.table(rows))
    assert "true and lost" in screen.export_text()


def test_no_multiple_of_a_gradient_costs_a_claim_and_nothing_done_to_it_makes_one_false() -> None:
    whole = claims.run(wanted=lambda name: name.startswith("scaled: photos, unit, relu, n=16"))
    assert [(row["made"], row["true"], row["kept"]) for row in whole] == [(16, 16, 16)] * len(claims.FACTORS)
    altered = {
        row["problem"].removeprefix("altered: "): row for row in claims.run(wanted=lambda n: n.startswith("altered"))
    }
    assert {way: row["false"] for way, row in altered.items() if row["false"]} == {}
    assert sum(row["made"] - row["true"] for row in altered.values()) > 100  # false ones that were made
    for way in ("nothing", "times 3", "times -0.1"):
        assert altered[way]["kept"] == altered[way]["true"] == altered[way]["exchanges"] > 30


@pytest.mark.slow
def test_no_true_claim_is_lost(capsys: pytest.CaptureFixture[str]) -> None:
    rows = claims.run()
    sums = {key: sum(row[key] for row in rows) for key in ("made", "true", "kept", "lost", "false")}
    with capsys.disabled():
        print(f"{len(rows)} problems: {sums}")
    honest = [row for row in rows if row["problem"] != "altered: the head at twice its rate"]  # which some cannot tell
    assert [row for row in honest if row["lost"]] == []
    assert sums["false"] == 0
    assert sums["true"] > 900
