import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from unbatch.benchmarks import find, metric
from unbatch.benchmarks.metric import ACTIVATIONS, architecture, summary


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
    rows = [{"seed": 0, "predicted psnr": x, "psnr": np.exp(x)} for x in told]
    rows += [{"seed": 1, "predicted psnr": x, "psnr": y} for x, y in zip(told, rng.normal(size=40), strict=True)]
    rows += [{"seed": 2, "predicted psnr": 1.0, "psnr": 2.0}] * 3  # too few to say
    found = summary(rows)["correlation"]
    assert set(found) == {"seed 0", "seed 1"}
    assert found["seed 0"] == pytest.approx({"spearman": 1.0, "low": 1.0, "high": 1.0})
    assert found["seed 1"]["low"] < 0 < found["seed 1"]["high"]
    assert found["seed 1"]["low"] < found["seed 1"]["spearman"] < found["seed 1"]["high"]


def test_two_seeds_are_measured_stored_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    rows = find("metric").run(seconds=0.5, out=tmp_path, count=2)
    assert [(row["seed"], row["number"]) for row in rows] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all(0 <= row["share"] <= 1 and row["psnr"] >= row["grey"] for row in rows)
    record = json.loads((tmp_path / "metric.json").read_text())
    assert record["complete"]
    assert record["rows"] == json.loads(json.dumps(rows))
    screen = Console(width=200, record=True)
    screen.print(metric.table(rows))
    assert "predicted share" in screen.export_text()
    pytest.importorskip("matplotlib")
    assert (tmp_path / "metric.png").stat().st_size > 5_000
