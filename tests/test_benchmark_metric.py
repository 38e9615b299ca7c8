import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from unbatch.benchmarks import find, metric
from unbatch.benchmarks.metric import ACTIVATIONS, architecture, metric_summary


def test_an_architecture_runs_and_is_the_same_for_the_same_draw() -> None:
    kinds = set()
    for i in range(40):
        model, again = (architecture((3, 8, 8), np.random.default_rng([7, i])) for _ in range(2))
        assert model(torch.zeros(2, 3, 8, 8)).shape == (2, metric.CLASSES)
        assert str(model) == str(again)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, again.state_dict()[name])
        kinds |= {type(module) for module in model.modules()}
        assert len({type(m) for m in model.modules()} & set(ACTIVATIONS)) == 1
    assert {nn.Conv2d, nn.AvgPool2d, nn.MaxPool2d, nn.BatchNorm2d, nn.GroupNorm, nn.AdaptiveAvgPool2d} <= kinds
    assert len(kinds & set(ACTIVATIONS)) == len(ACTIVATIONS)


def test_the_correlation_is_of_ranks_and_by_seed() -> None:
    rng = np.random.default_rng(0)
    told = rng.normal(size=40)
    rows = [{"seed": 0, "certified": i < 5, "predicted psnr": x, "psnr": np.exp(x)} for i, x in enumerate(told)]
    noise = zip(told, rng.normal(size=40), strict=True)
    rows += [{"seed": 1, "certified": True, "predicted psnr": x, "psnr": y} for x, y in noise]
    rows += [{"seed": 2, "certified": True, "predicted psnr": 1.0, "psnr": 2.0}] * 3  # too few to say
    rows += [{"seed": 3, "certified": False, "predicted psnr": 90.0, "psnr": y} for y in (20.0, 61.0)]
    assert metric_summary(rows)["reached"] == [1, 2]
    found = metric_summary(rows)["correlation"]
    assert found["seed 0"]["all"] == pytest.approx({"spearman": 1.0, "low": 1.0, "high": 1.0, "rows": 40})
    assert found["seed 0"]["uncertified"]["rows"] == 35
    assert found["seed 1"]["all"]["low"] < 0 < found["seed 1"]["all"]["high"]
    assert found["seed 1"]["all"]["low"] < found["seed 1"]["all"]["spearman"] < found["seed 1"]["all"]["high"]
    assert found["seed 1"]["uncertified"] is None
    assert found["seed 2"]["all"] is None


def test_three_seeds_are_measured_stored_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    rows = find("metric").run(seconds=0.5, out=tmp_path, count=2)
    assert [(row["seed"], row["number"]) for row in rows] == [(s, i) for s in range(3) for i in range(2)]
    assert all(0 <= row["share"] <= 1 for row in rows)
    for row in rows:  # what is certified is the picture, and what is not found is scored as mid-grey is
        assert row["psnr"] > 60 if row["certified"] else row["by"] != "mid-grey" or row["psnr"] == row["grey"]
    record = json.loads((tmp_path / "metric.json").read_text())
    assert record["complete"]
    assert record["rows"] == json.loads(json.dumps(rows))
    screen = Console(width=200, record=True)
    screen.print(metric.table(rows))
    assert "predicted share" in screen.export_text()
    pytest.importorskip("matplotlib")
    assert (tmp_path / "metric.png").stat().st_size > 5_000
