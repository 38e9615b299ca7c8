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


@pytest.mark.slow
def test_no_true_claim_is_lost(capsys: pytest.CaptureFixture[str]) -> None:
    rows = claims.run()
    made, true, kept, lost = (sum(row[key] for row in rows) for key in ("made", "true", "kept", "lost"))
    with capsys.disabled():
        print(f"{len(rows)} problems: {made} claims made, {true} of them true, {kept} kept, {lost} true ones lost")
    assert lost == 0, [row for row in rows if row["lost"]]
    assert kept == true > 150
