"""Datasets and DataLoaders as data: one batch drawn with a seed, the same one again, and nothing else disturbed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, WeightedRandomSampler

from unbatch import Setting, UnbatchError, audit
from unbatch.command.cli import main
from unbatch.data import read_dataset
from unbatch.reporting.results import Audit

X = torch.rand(20, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(20) % 4
PAIRS = TensorDataset(X, Y)


class Augmented(Dataset[Any]):
    """Draws in every look, as transforms do."""

    classes = ("cat", "dog", "eel", "fox")

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        return (X[place] + 0.01 * torch.randn(3, 8, 8)).clamp(0, 1), int(Y[place])


class Named(Dataset[Any]):
    def __init__(self, **fields: Tensor) -> None:
        self.fields = fields

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        return {name: tensor[place] for name, tensor in self.fields.items()}


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(X, Y, strict=True)


def test_a_batch_is_drawn_with_a_seed_and_is_the_same_again() -> None:
    first, again = read_dataset(PAIRS, batch=4, seed=3), read_dataset(PAIRS, batch=4, seed=3)
    assert torch.equal(first.inputs, again.inputs)
    assert not torch.equal(first.inputs, read_dataset(PAIRS, batch=4, seed=4).inputs)
    assert first.notes[0].startswith("4 of 20 examples of a TensorDataset were drawn with seed 3: numbers ")
    places = [int(word) for word in first.notes[0].rstrip(".").partition("numbers ")[2].split(", ")]
    assert torch.equal(first.inputs, X[places])
    assert torch.equal(first.labels, Y[places])
    assert len(read_dataset(PAIRS).inputs) == 20


def test_random_numbers_of_others_go_on_and_those_of_the_data_set_are_seeded() -> None:
    own = torch.Generator().manual_seed(9)
    loader = DataLoader(Augmented(), batch_size=4, shuffle=True, generator=own)
    before, state = torch.get_rng_state(), own.get_state()
    first, again = read_dataset(loader, seed=1), read_dataset(loader, seed=1)
    assert torch.equal(first.inputs, again.inputs)
    assert not torch.equal(first.inputs, read_dataset(loader, seed=2).inputs)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(own.get_state(), state)
    assert list(first.classes) == ["cat", "dog", "eel", "fox"]
    assert first.notes[0] == "the first batch that a DataLoader of Augmented gives under seed 1 was taken."


def test_a_loader_keeps_its_sampler_and_its_way_of_putting_together() -> None:
    third = WeightedRandomSampler([float(place == 3) for place in range(20)], 8)
    first = DataLoader(PAIRS, batch_size=4, sampler=third, collate_fn=lambda held: (held[0][0][None], held[0][1][None]))
    assert torch.equal(read_dataset(first).inputs, X[3:4])
    plain = DataLoader(PAIRS, batch_size=4, sampler=third, num_workers=2)
    assert torch.equal(read_dataset(plain).inputs, X[[3, 3, 3, 3]])
    assert len(read_dataset(plain, batch=2).inputs) == 2
    with pytest.raises(UnbatchError, match="a batch of 9 is asked for, and the DataLoader gives one of 4"):
        read_dataset(plain, batch=9)
    assert torch.equal(read_dataset(DataLoader(Stream(), batch_size=3)).inputs, X[:3])
    assert torch.equal(read_dataset(Stream(), batch=2).labels, Y[:2])


def test_mappings_by_usual_names_and_bytes() -> None:
    found = read_dataset(Named(pixel_values=(X * 255).byte(), labels=Y), batch=2)
    assert "8-bit values were divided by 255" in " ".join(found.notes)
    assert float(found.inputs.max()) <= 1


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (TensorDataset(X, X, Y), "has 3 parts, and a pair .* Of several inputs, one is recovered"),
        (TensorDataset(X), "has 1 parts"),
        (Named(image=X, features=X, label=Y), "has image, features, label; exactly one of"),
        (Stream(), "say how many"),
        ([(X[0], 1)], "gives no batch|holds"),
    ],
)
def test_what_is_no_pair_is_refused_in_words(source: Any, words: str) -> None:
    if isinstance(source, list):
        source = DataLoader([*source, (X[0, :1], 1)], batch_size=2)  # of two shapes
    with pytest.raises(UnbatchError, match=words):
        read_dataset(source)


def test_several_inputs_of_a_setting_are_refused_with_what_to_do() -> None:
    model = nn.Linear(4, 2)
    for several in ((X, X), {"a": X}, [X]):
        with pytest.raises(UnbatchError, match="or on one: wrap it in a module whose forward takes that one"):
            Setting(model=model, loss=F.cross_entropy, inputs=several, labels=Y)


def test_a_forward_of_several_inputs_is_refused_and_its_wrapper_audited() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 8)
            self.last = nn.Linear(8, 3)

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return self.last(torch.relu(self.first(x * scale)))

    class Held(nn.Module):
        def __init__(self, whole: nn.Module, scale: Tensor) -> None:
            super().__init__()
            self.whole, self.scale = whole, scale

        def forward(self, x: Tensor) -> Tensor:
            return self.whole(x, self.scale.to(x))

    x, y = torch.rand(1, 6, generator=torch.Generator().manual_seed(0)), torch.tensor([1])
    with pytest.raises(UnbatchError, match=r"positional argument: 'scale'\. A model of several inputs"):
        Setting(model=Both(), loss=F.cross_entropy, inputs=x, labels=y)
    wrapped = Setting(model=Held(Both(), torch.tensor([2.0])), loss=F.cross_entropy, inputs=x, labels=y)
    assert len(audit(wrapped, attacks="bias-ratio", analyses=()).recovered()) == 1


def test_a_data_set_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("trainset.py").write_text(
        "import torch\nfrom torch import nn\nfrom torch.utils.data import DataLoader, TensorDataset\n"
        "def pairs():\n    return TensorDataset(torch.rand(9, 3, 4, 4), torch.arange(9) % 3)\n"
        "loader = DataLoader(pairs(), batch_size=2)\n"
        "def net():\n    return nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 3))\n"
        "number = 3\n"
    )

    def call(*words: str) -> int:
        with pytest.raises(SystemExit) as ended:
            main([*words, "--model", "trainset:net", "--analysis", "gradient-rank"])
        return int(ended.value.code or 0)

    assert call("audit", "--data", "trainset:pairs", "--batch", "1", "--attack", "bias-ratio", "--quiet") == 0
    record = Audit.load("audit/audit.json")
    assert len(record.recovered()) == 1
    assert record.data_notes[0].startswith("1 of 9 examples of a TensorDataset were drawn with seed 0: numbers ")
    assert call("risk", "--data", "trainset:loader") == 0
    assert "the first batch that a DataLoader of TensorDataset gives" in " ".join(capsys.readouterr().out.split())
    assert call("risk", "--data", "trainset:number") == 2
    assert "gave int; name a torch Dataset, a DataLoader" in capsys.readouterr().err
