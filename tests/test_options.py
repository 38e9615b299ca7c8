"""Every option of every command that has a target: it changes what is asked for, or is refused in words."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

import unbatch
from unbatch.auditing.suites import LATEST
from unbatch.command.cli import app, main
from unbatch.command.settings import Asked, target_of

NETS = """
import torch
from torch import nn
class Pooled(nn.Sequential):
    def forward(self, x):
        return super().forward(nn.functional.adaptive_avg_pool2d(x, 4))
def small():
    return Pooled(nn.Flatten(), nn.Linear(48, 8), nn.ReLU(), nn.Linear(8, 3))
def rows():
    return nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 3))
def halved(outputs, labels):
    return 0.5 * nn.functional.cross_entropy(outputs, labels)
"""
DRAWN = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.ReLU(), nn.Linear(8, 3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place, rng = tmp_path_factory.mktemp("options"), np.random.default_rng(0)
    (place / "nets.py").write_text(NETS)
    np.savez(place / "data.npz", inputs=rng.random((2, 3, 4, 4), dtype=np.float32), labels=np.array([0, 2]))
    (place / "rows.csv").write_text("age,size,label\n1,2,0\n3,1,2\n5,1,1\n")
    for k in range(2):
        (place / "pictures" / f"class{k}").mkdir(parents=True)
        pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / "pictures" / f"class{k}" / "a.png")
    model = DRAWN
    seen, _ = unbatch.observe(model, F.cross_entropy, torch.ones(1, 3, 4, 4), torch.tensor([1]))
    seen.save(place / "seen.safetensors")
    np.savez(place / "after.npz", *(2 * v.numpy() for v in model.state_dict().values()))
    save_file({f"w{k}": v for k, v in model.state_dict().items()}, place / "other.safetensors")
    save_file(model.state_dict(), place / "drawn.safetensors")
    rows = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 3))
    save_file({k: 2 * v for k, v in rows.state_dict().items()}, place / "rows.safetensors")
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, place / "drawn.pt")
    return place


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    return folder


TARGETS: dict[str, list[str]] = {
    "a case": ["digits:batch=2,width=8"],
    "arrays": ["--model", "nets:small", "--data", "data.npz"],
    "pictures": ["--model", "nets:small", "--data", "pictures"],
    "a table": ["--model", "nets:rows", "--data", "rows.csv"],
    "a capture": ["--model", "nets:small", "--observation", "seen.safetensors"],
    "a capture and its truth": [
        *("--model", "nets:small", "--observation", "seen.safetensors", "--data", "data.npz", "--batch", "1"),
    ],
    "a captured file": ["--model", "nets:small", "--observation", "after.npz", "--as", "weights"],
}
TRIED = {  # every option of a command with a target, with a value that asks for something else than the default
    "model": ["nets:rows"], "data": ["rows.csv"], "observation": ["seen.safetensors"], "weights": ["drawn.safetensors"],
    "loss": ["squared-error"], "reduction": ["sum"], "size": ["5"], "batch": ["1"], "knows": ["mode=eval"],
    "protocol": ["mode=eval"], "defence": ["clip:norm=0.5"], "remedy": ["prune"], "metric": ["label-accuracy"],
    "analysis": ["gradient-rank"], "attack": ["bias-ratio"], "suite": [LATEST], "seed": ["3"], "budget": ["7"],
    "shape": ["3,8,2"], "before": ["drawn.safetensors"], "as_": ["delta"], "scale": ["-1"],
    "device": ["cpu"], "classes": ["3"], "family": ["clip"], "rounds": ["2"], "seconds": ["5"], "target_psnr": ["30"],
}  # fmt: skip
TRIED_ON = {
    ("batch", "a capture"): ["2"],
    ("weights", "a table"): ["rows.safetensors"],
    ("classes", "pictures"): ["class1,class0"],
}
OF_OUTPUT = {
    "case",
    "folder",
    "resume",
    "force",
    "save_images",
    "no_private",
    "no_appendix",
    "auditor",
    "as_json",
    "quiet",
}  # held by tests of their own
OF_FILES = {"before", "as_", "scale"}  # of captured files
REFUSED = {  # what a target has no use for, beside the options that name another target
    "a case": {
        "loss",
        "reduction",
        "size",
        "batch",
        "weights",
        "classes",
        "model",
        "data",
        "observation",
        "shape",
        *OF_FILES,
    },
    "arrays": {"size", "shape", *OF_FILES},
    "pictures": {"shape", *OF_FILES},
    "a table": {"size", "shape", *OF_FILES},
    "a capture": {"size", "weights", "remedy", "metric", "classes", *OF_FILES},
    "a capture and its truth": {"size", "weights", "remedy", "shape", *OF_FILES},
    "a captured file": {"size", "remedy", "metric", "classes"},
}
COMMANDS = {name: typer.main.get_command(app).commands[name] for name in ("audit", "risk", "harden")}


def options(command: str) -> list[str]:
    return [p.name for p in COMMANDS[command].params if p.name not in OF_OUTPUT]


def asked(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> tuple[int, str]:
    """The exit code, and everything that the command would have run with, in words."""
    seen: list[str] = []

    def note(target: Any, **given: Any) -> None:
        seen.append(
            f"{_told(target)} {[(k, _told(v)) for k, v in sorted(given.items()) if k not in ('command', 'sink')]}"
        )
        raise KeyboardInterrupt  # enough is known

    monkeypatch.setattr("unbatch.command.console.run_audit", note)
    monkeypatch.setattr("unbatch.auditing.run.audit", note)
    monkeypatch.setattr("unbatch.auditing.harden.harden", note)
    with pytest.raises(SystemExit) as ended:
        main(words)
    return int(ended.value.code or 0), "".join(seen)


def _told(value: Any) -> str:
    """In words that differ where the values do."""
    if isinstance(value, list | tuple):
        return str([_told(each) for each in value])
    if isinstance(value, nn.Module):
        return str([p.detach().sum().item() for p in value.parameters()])
    if isinstance(value, torch.Tensor):
        return f"{tuple(value.shape)} {value.double().sum().item()}"
    if isinstance(value, unbatch.Setting | unbatch.Observation | unbatch.truth.Truth):
        return str({k: _told(v) for k, v in vars(value).items()})
    if callable(value) and not isinstance(value, type):
        outputs = torch.tensor([[1.0, 2.0, 0.5], [0.0, 3.0, 1.0]])
        return str(float(value(outputs, torch.tensor([0, 1]))))
    return repr(value)


@pytest.mark.parametrize("command", list(COMMANDS))
def test_every_option_is_on_the_table(command: str) -> None:
    assert set(options(command)) <= set(TRIED)


@pytest.mark.parametrize("target", list(TARGETS))
@pytest.mark.parametrize("command", list(COMMANDS))
def test_an_option_is_used_or_refused(command: str, target: str, here: Path, monkeypatch, capsys) -> None:
    words = [command, *TARGETS[target]]
    if command == "harden" and "capture" in target:
        assert asked(monkeypatch, words)[0] == 2  # it needs data of its own to search on
        return
    code, plain = asked(monkeypatch, words)
    assert (code, bool(plain)) == (130, True), capsys.readouterr().err
    for option in options(command):
        given = f"--{option.rstrip('_').replace('_', '-')}"
        if given in words:
            continue
        value = TRIED_ON.get((option, target), TRIED[option])
        code, said = asked(monkeypatch, [*words, given, *value])
        told = capsys.readouterr().err
        refused = option in REFUSED[target]
        if option in ("data", "observation") and target != "a case":  # names another target, which fits or does not
            continue
        if refused:
            assert code == 2, f"{given}: {said or told}"
            assert "not" in told
            assert "defect" not in told
        else:
            assert code == 130, f"{given}: {told}"
            assert said != plain, f"{given} changes nothing of {target}"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--batch", "0"], "'--batch'"),
        (["--batch", "-1"], "'--batch'"),
        (["--batch", "9"], "--batch 9, and data.npz holds 2 examples; give a number from 1 to 2"),
        (["--seed", "-1"], "'--seed'"),
        (["--seed", "2", "--seed", "2"], "--seed 2 is given twice"),
        (["--attack", "unmix", "--attack", "unmix"], "--attack unmix is given twice"),
        (["--budget", "nan"], "nan is no time"),
        (["--budget", "0"], "0 is no time"),
        (["--budget", "-2"], "-2 is no time"),
        (["--device", "cuda:77"], "--device cuda:77 cannot be used here"),
        (["--device", "tpu"], "--device tpu cannot be used here"),
        (["--device", "meta"], "--device meta cannot be used here"),
        (["--weights", "gone.safetensors"], "cannot read --weights gone.safetensors"),
        (["--weights", "other.safetensors"], "does not fit Pooled"),
        (["--weights", "nets.py"], "nets.py is no file that torch.save wrote"),
        (["--weights", "data.npz"], "data.npz is no file that torch.save wrote"),
        (["--loss", "torch.nn:CrossEntropyLoss"], "is a class, and a loss is called with (outputs, labels)"),
        (["--loss", "nets:small", "--reduction", "sum"], "takes the mean or the sum by itself"),
        (["--loss", "halved"], "unknown loss 'halved'"),
        (["--reduction", "none"], "--reduction is mean or sum"),
        (["--knows", "batch_size=x"], "batch_size is 'x'; give a whole number of at least 1"),
        (["--knows", "batch_size=2.5"], "give a whole number"),
        (["--knows", "labels=cat"], "give numbers"),
        (["--knows", "input_shape=3"], "give the sides of one example"),
        (["--knows", "input_range=[1]"], "give two numbers"),
        (["--knows", "noise=-1"], "noise is -1; give a number from 0 on"),
        (["--knows", "privacy={}"], "privacy: clip: Field required"),
        (["--knows", "buffers=3"], "give a mapping"),
        (["--knows", "earlier=3"], "give rounds"),
        (["--knows", "log_prob=3"], "give a function"),
        (["--knows", "mode=eval", "--knows", "mode=train"], "mode is given twice"),
        (["--protocol", "local_steps"], "'local_steps' has no value; write it as local_steps=4"),
        (["--out", "data.npz"], "data.npz is a file; name another place with --out. Nothing was run."),
        (["--out", "data.npz/in"], "cannot write to the folder data.npz/in"),
        (["--save-images", "data.npz"], "data.npz is a file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_in_an_option_is_said(words: list[str], said: str, here: Path, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["audit", *TARGETS["arrays"], "--attack", "bias-ratio", "--analysis", "gradient-rank", *words])
    error = capsys.readouterr().err
    assert ended.value.code == 2, error
    assert said in " ".join(error.replace("│", " ").split())
    assert "defect of unbatch" not in error
    assert "Traceback" not in error
    assert not (here / "audit").exists()


def test_weights_of_both_kinds_are_used(here: Path) -> None:
    from unbatch.command.named import load_model, load_weights

    for name in ("drawn.safetensors", "drawn.pt"):
        network = load_weights(load_model("nets:small"), here / name)
        assert all(torch.equal(a, b) for a, b in zip(network.parameters(), DRAWN.parameters(), strict=True))


def test_a_factory_gives_the_same_model_whatever_was_drawn_before(here: Path) -> None:
    from unbatch.command.named import load_model

    torch.rand(7)
    before = torch.get_rng_state()
    first = load_model("nets:small")
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(7)
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), load_model("nets:small").parameters(), strict=True)
    )


IDLE = (
    "learning_rate=0.1",
    "momentum=0.9",
    "weight_decay=0.01",
    "optimiser=adam",
    "local_batch_size=2",
    "local_batch_size=1,mode=eval",
)


@pytest.mark.parametrize("command", [name for name in COMMANDS if "protocol" in options(name)])
@pytest.mark.parametrize("rules", IDLE)
def test_what_only_local_steps_use_is_refused_without_them(
    command: str, rules: str, here: Path, monkeypatch, capsys
) -> None:
    assert asked(monkeypatch, [command, *TARGETS["a case"], "--protocol", rules])[0] == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"--protocol {rules.partition('=')[0]} would not be used" in said
    assert "local_steps=N or epochs=N" in said


@pytest.mark.parametrize(
    "rules", ["local_steps=1,learning_rate=0.1", "epochs=1,momentum=0.5", "mode=eval", "momentum=0"]
)
def test_rules_that_are_used_or_change_nothing_are_taken(rules: str) -> None:
    (setting,) = target_of(Asked(case="digits:batch=2,width=8", protocol=rules)).what
    name, _, value = rules.partition(",")[0].partition("=")
    assert str(getattr(setting.protocol, name)) in (value, f"{value}.0")
