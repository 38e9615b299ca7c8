"""What was done to read a user's data stands in results, report and console; categories are scored as such."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import unbatch
from unbatch.command.cli import main
from unbatch.data import read
from unbatch.reporting.html import primary, render

PEOPLE = "age,job,label\n39,clerk,no\n50,cook,yes\n61,cook,no\n28,nurse,yes\n"


@pytest.fixture
def people(tmp_path: Path) -> Path:
    path = tmp_path / "people.csv"
    path.write_text(PEOPLE)
    return path


def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    (tmp_path / "told_nets.py").write_text(f"from torch import nn\ndef net():\n    return {words}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "told_nets", raising=False)


def ran(*words: str) -> int:
    with pytest.raises(SystemExit) as done:
        main(list(words))
    return int(done.value.code or 0)


def test_a_mixed_table_is_recovered_in_words_and_scored_by_category(people: Path) -> None:
    data = read(people)
    setting = unbatch.Setting(
        model=nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2)),
        loss=F.cross_entropy,
        inputs=data.inputs[:1],
        labels=data.labels[:1],
        domain=data.domain,
        classes=data.classes,
        notes=data.notes,
    )
    record = unbatch.audit(setting, attacks=["bias-ratio", "label-count"], analyses=())
    example = record.runs[0].examples[0]
    assert example.picture == record.clients[0].pictures[0] == "age = 39, job = clerk"
    assert example.scores["category-accuracy"] == 1
    assert example.label == "no"
    assert primary(record) == "l2-error"
    assert record.data_notes == list(data.notes)
    assert record.knowledge["categories"] == "((1, 2, 3),)"
    page = render(record)
    assert "How the private data was read" in page
    assert "columns of words were one-hot encoded" in page
    assert re.search(r"<th scope=\"row\">job</th><td>clerk</td><td>clerk</td>", page)


def test_the_command_line_prints_what_was_done(people: Path, tmp_path, monkeypatch, capsys) -> None:
    nets(tmp_path, monkeypatch, "nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))")
    words = ["audit", "--model", "told_nets:net", "--data", str(people), "--attack", "label-count", "--batch", "2"]
    assert ran(*words, "--analysis", "counting", "--classes", "yes,maybe,no") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "data: labels, column 'label': classes are numbered in the given order, 0 = yes, 1 = maybe, 2 = no." in said
    assert "numeric columns were standardised by mean and standard deviation of these 4 rows: age 44.5 and" in said
    held = json.loads((tmp_path / "audit" / "audit.json").read_text())
    assert held["clients"][0]["labels"] == ["no", "yes"]
    assert any("one-hot" in note for note in held["data_notes"])


def test_where_a_model_does_not_take_the_data_its_reading_is_told(tmp_path, monkeypatch, capsys) -> None:
    np.savez(tmp_path / "d.npz", inputs=np.arange(6).reshape(2, 3), labels=[0, 1])
    nets(tmp_path, monkeypatch, "nn.Linear(3, 2)")
    assert ran("audit", "--model", "told_nets:net", "--data", "d.npz") == 2
    assert "whole numbers were read as token numbers; save them as float32" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("words", [["--classes", "a,a"], ["--classes", "1"], ["--classes", "x,y"], ["--classes", "0"]])
def test_wrong_classes_are_refused(people: Path, tmp_path, monkeypatch, capsys, words: list[str]) -> None:
    nets(tmp_path, monkeypatch, "nn.Linear(4, 2)")
    assert ran("audit", "--model", "told_nets:net", "--data", str(people), *words) == 2
    assert "defect" not in capsys.readouterr().err


def test_the_results_of_a_volume_are_small() -> None:
    big = nn.Sequential(nn.Flatten(), nn.Linear(32**3, 4), nn.Tanh(), nn.Linear(4, 2))
    x = torch.rand(1, 1, 32, 32, 32, generator=torch.Generator().manual_seed(0))
    setting = unbatch.Setting(model=big, loss=F.cross_entropy, inputs=x, labels=torch.tensor([1]))
    record = unbatch.audit(setting, attacks=["bias-ratio"], analyses=())
    assert len(record.model_dump_json()) < 100_000
    assert record.runs[0].examples[0].picture.startswith("data:image/png")


@pytest.mark.parametrize(
    ("answers", "loss", "takes"),
    [
        ("3.25 -7.5", "squared-error", "real numbers [n, 1]"),
        ("3.25 -7.5", "torch.nn.functional:mse_loss", "real numbers [n, 1]"),
        ("0 1", "torch.nn.functional:binary_cross_entropy_with_logits", "zeros and ones [n, 1]"),
        ("no yes", "torch.nn.functional:binary_cross_entropy_with_logits", "zeros and ones [n, 1]"),
        ("-1 1", "torch.nn.functional:soft_margin_loss", "-1 and 1 [n, 1]"),
    ],
)
def test_targets_of_a_file_reach_a_loss_of_one_output(
    tmp_path, monkeypatch, capsys, answers: str, loss: str, takes: str
) -> None:
    first, second = answers.split()
    (tmp_path / "t.csv").write_text(f"a,b,y\n1,5,{first}\n2,7,{second}\n4,4,{second}\n")
    nets(tmp_path, monkeypatch, "nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))")
    words = ["audit", "--model", "told_nets:net", "--data", "t.csv", "--loss", loss, "--attack", "label-count"]
    assert ran(*words, "--analysis", "counting") == 0, capsys.readouterr().err
    held = json.loads((tmp_path / "audit" / "audit.json").read_text())
    told = [note for note in held["data_notes"] if "the form that the loss takes" in note]
    assert len(told) <= 1
    assert told or loss == "squared-error"
    assert all(takes in note for note in told)
    assert held["clients"][0]["labels"][0] == ("0" if first == "0" else first)


@pytest.mark.parametrize(
    ("answers", "loss", "takes"),
    [
        ("-1 1", "torch.nn.functional:binary_cross_entropy_with_logits", "zeros and ones"),
        ("0 1", "torch.nn.functional:soft_margin_loss", "-1 and 1"),
        ("0.5 3", "cross-entropy", "class numbers 0 to 2"),
        ("1 3", "cross-entropy", "class numbers 0 to 2"),
    ],
)
def test_targets_that_a_loss_does_not_mean_are_refused(
    tmp_path, monkeypatch, capsys, answers: str, loss: str, takes: str
) -> None:
    first, second = answers.split()
    (tmp_path / "t.csv").write_text(f"a,b,y\n1,5,{first}\n2,7,{second}\n")
    outputs = 3 if loss == "cross-entropy" else 1
    nets(tmp_path, monkeypatch, f"nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, {outputs}))")
    assert ran("audit", "--model", "told_nets:net", "--data", "t.csv", "--loss", loss) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert takes in said
    assert "How t.csv was read" in said
    assert "defect" not in said


def test_codes_keep_their_zeros(tmp_path: Path) -> None:
    """A zip code that is read as a number loses its zero without a word."""
    path = tmp_path / "places.csv"
    path.write_text("zip,rooms,label\n02139,3,0\n94110,4,1\n10001,0,1\n")
    held = read(path)
    assert isinstance(held.domain, unbatch.domain.Table)
    assert held.domain.columns == ("zip=02139", "zip=10001", "zip=94110", "rooms")
    assert [note for note in held.notes if "codes and no numbers" in note and "zip" in note]
