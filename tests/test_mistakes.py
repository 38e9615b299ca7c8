"""Everyday mistakes in a user's model, loss and data: each is said with what, why and what to do, none is called ours."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from unbatch.command.blame import said
from unbatch.command.cli import main
from unbatch.errors import UnbatchError

NETS = """
import torch
from torch import nn
from torch.nn import functional as F
def mlp(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
def needs(width): return mlp()
def raising(): return undefined_name
def nothing(): pass
def leaving(): raise SystemExit(3)
def diverged():
    model = mlp()
    nn.init.constant_(model[1].bias, float("nan"))
    return model
def norm(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Linear(32, 10))
def frozen(): return mlp().requires_grad_(False)
class Bound(nn.Module):
    def __init__(self, width): super().__init__()
class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 10)
    def forward(self, x): return self.answer(self.head(x.flatten(1)))
class Typo(Head):
    def answer(self, out): return out.missing
class Pair(Head):
    def answer(self, out): return out, 3
class Cut(Head):
    def answer(self, out): return out.detach()
class Writes(Head):
    def forward(self, x): return self.head(x.mul_(0.5).flatten(1))
class Mask(Head):
    def answer(self, out): return {}["mask"] if self.training else out
def each(o, y): return F.cross_entropy(o, y, reduction="none")
def item(o, y): return F.cross_entropy(o, y).item()
def nan(o, y): return F.cross_entropy(o, y) * float("nan")
def detached(o, y): return F.cross_entropy(o, y).detach()
def bare(): return 1
def pair(o, y): return F.cross_entropy(o, y), 1
def boom(o, y): return {}["weights"]
def unrelated(o, y): return torch.tensor(1.0, requires_grad=True)
three = nn.CrossEntropyLoss(weight=torch.ones(3))
text = "loss"
"""
BROKEN = {
    "syntax": "def broken(:",
    "missing": "import not_there",
    "exits": "import sys; sys.exit(3)",
    "raises": "1 / 0",
}
MISTAKES = [
    (
        ["--model", "nets:needs"],
        "nets:needs needs arguments (width), and it is called without any; name a function that",
    ),
    (["--model", "nets:Bound"], "nets:Bound needs arguments (width)"),
    (
        ["--model", "nets:raising"],
        "NameError: name 'undefined_name' is not defined (nets.py, line 7, in raising). Mend it",
    ),
    (["--model", "nets:nothing"], "nets:nothing gave NoneType, not a torch.nn.Module; return the model itself."),
    (["--model", "nets:text"], "nets:text gave str, not a torch.nn.Module; name a function that returns your model."),
    (["--model", "nets:leaving"], "--model nets:leaving fails: SystemExit: 3 (nets.py, line 9, in leaving). Mend it"),
    (["--model", "nets:diverged"], "the model's '1.bias' holds NaN, as after training that diverged"),
    (["--model", "nets:Writes"], "the model's forward writes into its own inputs"),
    (["--seed", "99999999999999999999"], "Invalid value for '--seed'"),
    (["--model", "nets:frozen"], "frozen"),
    (["--model", "nets:Typo"], "AttributeError: 'Tensor' object has no attribute 'missing'. Give inputs of the form"),
    (["--model", "nets:Pair"], "the model returns tuple; wrap it so that it returns one tensor"),
    (["--model", "nets:Cut"], "without .detach() or .item()"),
    (
        ["--model", "nets:Mask"],
        "the model's forward fails in train mode on inputs float32 [2, 8, 8]: KeyError: 'mask'.",
    ),
    (
        ["--model", "nets:norm", "--batch", "1"],
        "Batch norm needs more than one example in train mode; take more, or mode=",
    ),
    (["--model", "nets:gone"], "module 'nets' has no attribute 'gone'"),
    (["--model", "nets.py:mlp"], "Write --model nets:mlp."),
    (["--model", "nets.mlp"], "is not package.module:name. Write --model nets:mlp."),
    (["--model", "nets"], "is not package.module:name"),
    (["--model", "os:path"], "os:path gave module, not a torch.nn.Module"),
    (["--model", "torch.nn:Linear"], "needs arguments (in_features, out_features)"),
    (["--model", "syntax:a"], "--model syntax:a: importing syntax fails: SyntaxError: invalid syntax"),
    (["--model", "missing:a"], "No module named 'not_there'"),
    (["--model", "exits:a"], "importing exits fails: SystemExit: 3 (exits.py, line 1, in <module>)"),
    (["--model", "raises:a"], "importing raises fails: ZeroDivisionError: division by zero (raises.py, line 1"),
    (
        ["--loss", "nets:each"],
        "and labels int64 [2]: it gives [2], and not one number. It takes labels in no other form",
    ),
    (["--loss", "nets:item"], "it gives float, and not one number"),
    (["--loss", "nets:nan"], "its value is NaN"),
    (["--loss", "nets:detached"], "return it without .detach() or .item()."),
    (["--loss", "nets:bare"], "TypeError: bare() takes 0 positional arguments but 2 were given."),
    (["--loss", "nets:pair"], "it gives tuple, and not one number"),
    (["--loss", "nets:boom"], "the loss fails on outputs [2, 10] and labels int64 [2]: KeyError: 'weights'."),
    (["--loss", "nets:unrelated"], "the loss does not depend on the model's parameters"),
    (["--loss", "nets:three"], "weight tensor should be defined either for all 10 classes"),
    (["--loss", "nets:text"], "nets:text is str, not a callable"),
    (["--loss", "mse"], "unknown loss 'mse'; known: cross-entropy"),
    (
        ["--data", "wide.npz"],
        "the model's forward fails on inputs of shape (4, 8), float32: RuntimeError: mat1 and mat2",
    ),
    (["--data", "many.npz"], "labels run from 1 to 99, but the model has 10 classes"),
    (["--data", "few.npz"], "1 labels for 2 inputs; give one label an example"),
    (["--data", "none.npz"], "none.npz holds no examples"),
    (["--data", "inf.npz"], "NaN or infinite values"),
    (["--data", "gone.npz"], "gone.npz does not exist"),
    (["--observation", "nets.py"], "nets.py"),
    (["--observation", "."], "cannot read"),
]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, text in (BROKEN | {"nets": NETS}).items():
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    x = np.random.default_rng(0).random((2, 8, 8)).astype("float32")
    for name, inputs, labels in (
        ("ok", x, [1, 2]),
        ("wide", x[:, :4], [1, 2]),
        ("many", x, [1, 99]),
        ("few", x, [1]),
        ("none", x[:0], np.zeros(0, int)),
        ("inf", x * np.float32("inf"), [1, 2]),
    ):
        np.savez(f"{name}.npz", inputs=inputs, labels=labels)
    return tmp_path


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize(("words", "wanted"), MISTAKES, ids=[" ".join(words) for words, _ in MISTAKES])
def test_a_mistake_is_said_as_the_user_s(words: list[str], wanted: str, here: Path, capsys) -> None:
    words = words if "--model" in words else ["--model", "nets:mlp", *words]
    words = words if {"--data", "--observation"} & set(words) else [*words, "--data", "ok.npz"]
    with pytest.raises(SystemExit) as ended:
        main(["audit", "--attack", "bias-ratio", "--analysis", "gradient-rank", *words])
    error = capsys.readouterr().err
    assert ended.value.code == 2, error
    assert wanted in error
    assert "defect of unbatch" not in error
    assert len(error.strip().splitlines()) == 1
    assert not (here / "audit").exists()


def raised(code: str, file: str) -> BaseException:
    try:
        exec(compile(code, file, "exec"), {})
    except BaseException as error:
        return error.with_traceback(error.__traceback__.tb_next if error.__traceback__ else None)
    raise AssertionError("nothing was raised")


def test_whose_an_error_is() -> None:
    package, library = Path(__import__("unbatch").__file__).parent, Path(np.__file__).parent
    assert said(UnbatchError("asked wrongly.")) == "asked wrongly."
    assert "defect of unbatch" in said(raised("{}['rank']", str(package / "attacks" / "mine.py")))
    assert "defect of unbatch" in said(raised("{}['rank']", str(library / "core.py")))
    assert "defect of unbatch" in said(raised("raise ValueError('no message of ours')", str(package / "view.py")))
    own = said(raised("def forward(x):\n    return {}['mask']\nforward(1)", "/home/me/nets.py"))
    assert (
        own
        == "nets.py, line 2, in forward: KeyError: 'mask' This is in code of yours, which unbatch calls; mend it there."
    )
    assert said(MemoryError()) == "out of memory (MemoryError); take a smaller batch or model, or another --device."
    assert said(FileNotFoundError(2, "No such file or directory", "x")) == "x: No such file or directory."
