import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from unbatch.benchmarks import find, layers
from unbatch.benchmarks.layers import METHODS, PictureProblem, picture_problems


def test_one_picture_is_exact_where_c_is_zero_and_a_guess_where_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 1)  # to start processes takes longer than to measure
    wanted = [PictureProblem(network=name, pictures=1, thinning=2) for name in ("cnn2-c1", "cnn2-c2")]
    rows = find("layers").run(seconds=0.5, out=tmp_path, wanted=wanted)
    assert [(row["network"], row["method"]) for row in rows] == [(p.name, m) for p in wanted for m in METHODS]
    assert all(math.isfinite(row["median"]) and row["worst"] <= row["median"] for row in rows)
    assert not any(row["failures"] for row in rows)
    exact, open_ = ({row["method"]: row for row in rows if row["network"] == p.name} for p in wanted)
    assert exact["auto"]["worst"] > 200
    assert exact["auto"]["c(M)"] == exact["auto"]["undetermined"] == 0
    assert exact["auto"]["least bound over error"] >= 1
    assert open_["auto"]["c(M)"] < 0 < open_["auto"]["undetermined"] < 1
    assert open_["auto"]["bounds"] == [None]
    assert all(open_[method]["seconds"] >= 0.5 for method in ("hybrid", "matching"))
    assert json.loads((tmp_path / "layers.json").read_text())["rows"] == json.loads(json.dumps(rows))
    monkeypatch.setattr(layers, "_measure", lambda *args, **kwargs: pytest.fail("it was measured already"))
    again = layers.run(seconds=0.5, out=tmp_path, wanted=wanted)  # goes on where it was cut short
    assert json.dumps(again) == json.dumps(rows)
    screen = Console(width=160, record=True)
    screen.print(layers.table(rows))
    shown = screen.export_text()
    assert "cnn2-c2, pixels / 4" in shown
    costs = {row["network"]: row["seconds of all methods"] for row in rows}
    assert all(costs[name] >= sum(r["seconds"] for r in rows if r["network"] == name) for name in costs)
    assert f"{sum(costs.values()):,.0f} s in all" in shown
    pytest.importorskip("matplotlib")
    assert (tmp_path / "layers.png").stat().st_size > 10_000


@pytest.mark.parametrize(("attack", "words"), [("tensor-moment", "NotApplicable"), ("label-count", "no picture")])
def test_what_fails_is_scored_as_mid_grey_and_named(attack: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "r-conv", attack)
    wanted = [PictureProblem(network="cnn2-c4", pictures=1, thinning=4, methods=("auto", "r-conv"))]
    row = layers.run(wanted=wanted)[1]
    assert 0 < row["worst"] < 20
    assert words in row["failures"]["picture 0"]
    screen = Console(width=200, record=True)
    screen.print(layers.table([row]))
    assert words in screen.export_text()


def test_the_problems_are_the_published_networks() -> None:
    found = picture_problems()
    assert len({problem.name for problem in found}) == len(found)
    assert len({problem.network for problem in found}) == 15
    assert {p.network for p in found if p.precision == "float32"} == {
        "cnn2-c1",
        "lenet",
        "cnn3-c3",
        "cnn6",
        "cnn6-wide",
    }
    assert all(p.methods[0] == "auto" for p in found)
    determined = {"cnn2-c1", "cnn3-c3", "lenet", "cnn6", "cnn6-wide", "cnn6-narrow"}
    many = {p.network for p in found if p.pictures == 20 and {"auto", "r-gap", "hybrid", "matching"} <= {*p.methods}}
    assert many == {p.network for p in found} - determined
