"""The command line as its users meet it: what it prints, what it writes, what it says of bad input."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from html import unescape
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import save_file

import unbatch
from unbatch import Attack, Case, Defence, Observation, observe
from unbatch.command.catalogue import KINDS, first_sentence
from unbatch.command.cli import main
from unbatch.reporting.results import Audit

FACTORY = """
import torch
from torch import nn
def small():
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.ReLU(), nn.Linear(8, 3))
def other():
    return nn.Linear(5, 2)
def text():
    return "model"
class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(1))
    def forward(self, x):
        raise RuntimeError("no such layer")
def halved(outputs, labels):
    return 0.5 * nn.functional.cross_entropy(outputs, labels)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(FACTORY)
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    rng = np.random.default_rng(0)
    np.savez("data.npz", inputs=rng.random((2, 3, 4, 4), dtype=np.float32), labels=np.array([0, 2]))
    return tmp_path


def call(*words: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(list(words))
    return int(stop.value.code or 0)


def audit(*words: str) -> Audit:
    assert call("audit", *words, "--quiet", *([] if "--resume" in words else ["--force"])) == 0
    return Audit.load("audit/audit.json")


def test_audit_writes_json_and_a_page(here: Path, capsys) -> None:
    assert call("audit", "photos:clients=2,width=16", "--attack", "bias-ratio", "--save-images", "pictures") == 0
    said = capsys.readouterr().out
    assert "2 of 2 private images recovered exactly" in said
    assert Path("audit/report.html").stat().st_size > 1000
    record = Audit.load("audit/audit.json")
    assert len(record.recovered()) == 2
    assert sorted(p.name for p in Path("pictures").iterdir()) == [
        "client0-example0-bias-ratio-seed0.png",
        "client1-example0-bias-ratio-seed0.png",
    ]


def test_json_alone_is_printed(here: Path, capsys) -> None:
    assert call("audit", "digits:width=16", "--attack", "bias-ratio", "--json") == 0
    assert len(Audit.model_validate(json.loads(capsys.readouterr().out)).recovered()) == 1
    assert call("risk", "digits:batch=3,width=16", "--json") == 0
    assert json.loads(capsys.readouterr().out)["risks"][0]["rank"] == 3


def test_your_own_model_and_data(here: Path) -> None:
    record = audit(
        "--model", "nets:small", "--data", "data.npz", "--batch", "1", "--attack", "bias-ratio", "--loss", "nets:halved"
    )
    assert len(record.recovered()) == 1
    assert record.loss == "cross-entropy (mean, scale 0.5)"
    assert record.case == "nets:small on data.npz"


def test_protocol_knowledge_defences_and_remedies_reach_the_audit(here: Path) -> None:
    record = audit(
        *("digits:batch=3,width=16", "--attack", "bias-ratio", "--attack", "label-count", "--defence", "clip:norm=1"),
        *("--protocol", "local_steps=2,learning_rate=0.05", "--knows", "labels", "--knows", "batch_size=3"),
        *("--remedy", "prune:share=0.5", "--metric", "label-accuracy", "--seed", "0", "--seed", "1"),
    )
    assert record.defences == [str(Defence.parse("clip:norm=1"))]
    assert record.protocol.startswith("2 local steps of sgd, learning rate 0.05")
    assert "labels" in record.knowledge
    assert list(record.metrics) == ["label-accuracy"]
    assert record.seeds == [0, 1]
    assert len(record.runs) == 4
    assert record.remedies[0].defence == str(Defence.parse("prune:share=0.5"))


def test_a_captured_update(here: Path, capsys) -> None:
    sys.path.insert(0, "")
    from nets import small

    model = small()
    x, y = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([1])
    obs, _ = observe(model, torch.nn.functional.cross_entropy, x, y)
    obs.save("captured.safetensors")
    words = ("--observation", "captured.safetensors", "--model", "nets:small", "--attack", "bias-ratio")
    assert call("audit", *words) == 0
    assert "1 image certified to be behind this update" in capsys.readouterr().out
    record = Audit.load("audit/audit.json")
    assert record.risks[0].rank == 1
    assert record.runs[0].residual < 1e-6
    scaled = Observation(
        model=model, loss=obs.loss, update={k: -v for k, v in obs.update.items()}, knowledge=obs.knowledge
    )
    scaled.save("captured.safetensors")
    assert call("audit", *words, "--force") == 0
    assert "sign is flipped" in capsys.readouterr().out


def test_a_captured_file_is_made_a_bundle_and_audited_as_it_is(here: Path, capsys) -> None:
    sys.path.insert(0, "")
    from nets import small

    model, x = small(), torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    obs, _ = observe(
        model,
        torch.nn.functional.cross_entropy,
        x,
        torch.tensor([1]),
        protocol=unbatch.Protocol(local_steps=1, learning_rate=0.1),
    )
    np.savez("before.npz", *(tensor.numpy() for tensor in model.state_dict().values()))
    np.savez("after.npz", *((p + obs.update[name]).detach().numpy() for name, p in model.named_parameters()))
    np.savez("turned.npz", **{name: -tensor.numpy() for name, tensor in obs.update.items()})
    given = ("--model", "nets:small", "--shape", "3,4,4", "--batch", "1", "--learning-rate", "0.1")
    assert call("bundle", "b.safetensors", "--after", "after.npz", "--before", "before.npz", *given) == 0
    said = capsys.readouterr().out
    assert "one local step was taken for granted" in said
    assert "wrote b.safetensors: <Observation of Sequential: 419 entries" in said
    assert call("bundle", "b.safetensors", "--after", "after.npz", *given) == 2
    assert "b.safetensors is there already; --force overwrites it" in capsys.readouterr().err
    assert call("bundle", "c.safetensors", "--after", "after.npz", *given) == 2
    assert "this is the model after training, not a difference" in capsys.readouterr().err
    assert not Path("c.safetensors").exists()
    assert call("bundle", "c.safetensors", "--after", "turned.npz", "--as", "delta", *given) == 1
    assert "its sign is flipped" in capsys.readouterr().err
    assert (
        call("bundle", "c.safetensors", "--after", "turned.npz", "--as", "delta", "--scale", "-1", *given, "--force")
        == 0
    )
    words = ("--model", "nets:small", "--attack", "bias-ratio", "--analysis", "gradient-rank")
    assert call("bundle", "c.npz", "--after", "after.npz", "--before", "before.npz", *given) == 2
    assert "a bundle is a safetensors file; name it c.safetensors" in capsys.readouterr().err
    told = ("--protocol", "learning_rate=0.1", "--observation", "after.npz", "--before", "before.npz")
    direct = (*told, "--knows", "input_shape=3,4,4", "--knows", "batch_size=1")
    short = (*told, "--shape", "3,4,4", "--batch", "1")
    for target in (("--observation", "b.safetensors"), ("--observation", "c.safetensors"), direct, short):
        record = audit(*target, *words)
        assert "1 image certified to be behind this update" in record.verdict()
        assert record.data_notes[-1].endswith(
            "taken for granted; --protocol local_steps=N (or epochs=N) says otherwise."
        )
    assert "read from before.npz, sha256" in record.data_notes[0]
    record = audit(*told, *words)
    assert "the shape of one example was not told, and bias-ratio cannot do without: give it by --shape" in " ".join(
        record.notes
    )


def test_rows_of_a_captured_table_stand_in_their_own_units(here: Path) -> None:
    Path("people.csv").write_text("age,job,label\n40,cook,yes\n20,clerk,no\n60,cook,no\n")
    Path("tabular.py").write_text(
        "from torch import nn\ndef net():\n    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))\n"
    )
    from unbatch.command.named import load_model
    from unbatch.data import read

    data, model = read("people.csv"), load_model("tabular:net")
    row, label = data.inputs[:1], data.labels[:1]  # whose age is the mean: 0 in standard deviations
    observe(model, torch.nn.functional.cross_entropy, row, label)[0].save("captured.safetensors")
    words = ("--observation", "captured.safetensors", "--model", "tabular:net", "--attack", "bias-ratio")
    record = audit(*words, "--data", "people.csv", "--batch", "1")
    assert record.clients[0].pictures == ["age = 40, job = cook"]
    assert record.runs[0].examples[0].picture == "age = 40, job = cook"
    assert record.clients[0].labels == ["yes"]
    assert "<mark>" not in Path("audit/report.html").read_text()


def test_risk(here: Path, capsys) -> None:
    assert call("risk", "digits:batch=5,width=32") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "dense1" in said
    assert "rank 5" in said


def test_risk_of_a_model_alone_draws_its_inputs(here: Path, capsys) -> None:
    Path("alone.py").write_text(
        "from torch import nn\n"
        "def flat():\n    return nn.Sequential(nn.Flatten(), nn.Linear(784, 8), nn.ReLU(), nn.Linear(8, 3))\n"
        "def windows():\n    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), "
        "nn.Linear(8, 3))\n"
        "def volumes():\n    return nn.Sequential(nn.Conv3d(1, 2, 3), nn.Flatten(), nn.Linear(16, 3))\n"
        "def words():\n    return nn.Sequential(nn.Embedding(50, 4), nn.Flatten(), nn.Linear(64, 3))\n"
    )
    analysis = ("--analysis", "gradient-rank")
    for name, shape in (("flat", "[1, 28, 28]"), ("windows", "[1, 32, 32]"), ("words", "[16]")):
        assert call("risk", "--model", f"alone:{name}", *analysis) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert f"no data were given: 1 input of shape {shape} and labels were drawn" in said
        assert "rank" in said
    assert call("risk", "--model", "alone:windows", "--shape", "1,12,12", "--batch", "2", *analysis) == 0
    assert "2 inputs of shape [1, 12, 12]" in " ".join(capsys.readouterr().out.split())
    assert call("risk", "--model", "alone:volumes", *analysis) == 2
    assert "takes none of the usual inputs" in capsys.readouterr().err
    assert call("risk", "--model", "alone:volumes", "--shape", "1,4,4,4", *analysis) == 0
    assert call("risk", "--model", "alone:flat", "--shape", "1,9", *analysis) == 2
    assert call("risk", "--model", "alone:flat", "--shape", "big", *analysis) == 2
    assert "give the sides of one input" in capsys.readouterr().err


def test_risk_draws_the_way_back_to_the_input(here: Path, capsys) -> None:
    assert call("risk", "photos:size=16,model=cnn2-c2") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "input <- conv1 71% <- head 100% <- gradient" in said
    assert "conv1 loses 222 of 768 unknowns: an attacker must guess them." in said
    assert "c(M) = -222" in said
    assert "what would make it safer change determined share c(M) price conv1" in said
    assert " -486 " in said
    assert "determined share = 0.9634" in said
    assert "c(M): conv1" not in said


def test_list_off_a_terminal_is_one_name_a_line(here: Path, capsys) -> None:
    assert call("list") == 0
    names = capsys.readouterr().out.split("\n")
    assert {"bias-ratio", "label-count", "gradient-matching"} <= set(names)
    assert {"clip", "noise", "prune", "quantise", "secure-aggregation"} <= set(names)
    assert {"local-steps", "label-smoothing", "mixup"} <= set(names)
    assert {"gradient-rank", "l2-error", "psnr", "ssim", "label-accuracy"} <= set(names)
    assert {"photos", "digits", "faces", "tables"} <= set(names)
    assert call("list", "attacks") == 0
    assert capsys.readouterr().out.split() == list(Attack.find())


def test_list_at_a_terminal_is_an_index(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = io.StringIO()
    monkeypatch.setattr(
        "unbatch.command.cli.out", Console(file=page, force_terminal=True, no_color=True, width=200, highlight=False)
    )
    assert call("list") == 0
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).rstrip() for line in page.getvalue().splitlines()]
    heads = [line.split()[0] for line in lines if line and not line.startswith(" ")]
    assert heads == [*(folder.upper() for folder in KINDS), "unbatch"]
    for plugins in KINDS.values():
        for name, plugin in plugins().items():
            (line,) = [line for line in lines if line.startswith(f"  {name} ")]
            assert line.endswith(first_sentence(plugin))
    (unmix,) = [line for line in lines if line.startswith("  unmix ")]
    assert "exact, span" in unmix
    (planted,) = [line for line in lines if line.startswith("  tensor-moment-deep ")]
    assert "chooses the model" in planted
    page.truncate(0)
    assert call("list", "metrics") == 0
    assert "dB, higher is nearer" in page.getvalue()
    assert "ATTACKS" not in page.getvalue()


def test_completion_and_the_table_fit_a_terminal(here: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    assert call("--show-completion", "bash") == 0
    assert "_UNBATCH_COMPLETE=complete_bash" in capsys.readouterr().out
    finished = subprocess.run(
        [sys.executable, "-c", "from unbatch.command.cli import main; main()"],
        env=os.environ | {"_UNBATCH_COMPLETE": "complete_bash", "COMP_WORDS": "unbatch bun", "COMP_CWORD": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert re.split("[, ]", finished.stdout.strip())[-1] == "bundle"
    out = io.StringIO()
    monkeypatch.setattr("unbatch.command.cli.out", Console(file=out, width=80))
    assert call("audit", "digits:batch=2,width=64", "--attack", "unmix", "--attack", "label-count") == 0
    assert call("risk", "digits:batch=2,width=64") == 0
    said = out.getvalue()
    assert max(map(len, said.splitlines())) <= 80
    assert said.count("rows of probabilities") <= 1  # what an attack says of its answer, once


def test_pages_say_how_to_use_what_they_show(here: Path, capsys) -> None:
    for plugins in KINDS.values():
        for name, plugin in plugins().items():
            assert call("show", name) == 0
            said = capsys.readouterr().out
            assert said.startswith(f"{name} (")
            assert first_sentence(plugin) in said
            assert all(len(line) <= 124 for line in said.splitlines())
            assert all(f"{o.name} = {o.default}" in said for o in plugin.options())
            if plugin.kind == "attack":
                command = said.split("for example:\n")[1].split("\n")[0].split()
                assert command[:2] == ["unbatch", "audit"]
                Case.parse(command[2])
                assert Attack.parse(command[command.index("--attack") + 1]).name == name
            if plugin.kind != "layer rule":
                made = said.rpartition("  unbatch.")[2].split()[0]
                folder, spelt = made.split(".")
                assert getattr(getattr(unbatch, folder), spelt.removesuffix("()")) is plugin


def test_show(here: Path, capsys) -> None:
    assert call("show", "bias-ratio") == 0
    said = capsys.readouterr().out
    assert "guarantee: exact (every example it returns lies within its stated bound" in said
    assert "tol = none" in said
    assert "(float > 0 | none)" in " ".join(said.split())


def test_gate_and_report(here: Path, capsys) -> None:
    audit("digits:width=16", "--attack", "bias-ratio")
    assert call("gate", "audit/audit.json", "--max-recovered", "1") == 0
    assert call("gate", "audit/audit.json", "--max-recovered", "0", "--max-psnr", "20") == 1
    assert "breach: 1 example recovered exactly" in capsys.readouterr().err
    assert call("gate", "audit/audit.json", "--max-recovered", "1", "--require-bound-psnr", "20") == 1
    assert "no lower bound holds for any attacker" in capsys.readouterr().err
    assert call("report", "audit/audit.json", "--out", "again.html") == 0
    assert "<html" in Path("again.html").read_text()
    Path("audit/report.html").unlink()
    assert call("report", "audit") == 0
    assert Path("audit/report.html").read_text() == Path("again.html").read_text()


def test_an_earlier_audit_is_refused_overwritten_or_gone_on_with(here: Path, capsys) -> None:
    words = ("audit", "digits:width=16", "--analysis", "gradient-rank", "--quiet", "--attack")
    first = audit("digits:width=16", "--attack", "bias-ratio")
    assert call(*words, "label-count") == 2
    said = capsys.readouterr().err
    assert "audit holds an audit already (audit.json and report.html); --resume goes on with it, --force" in said
    assert Audit.load("audit/audit.json") == first
    assert call(*words, "label-count", "--force", "--resume") == 2
    assert call(*words, "label-count", "--force") == 0
    assert [run.attack for run in Audit.load("audit/audit.json").runs] == ["label-count"]
    record = audit("digits:width=16", "--attack", "bias-ratio", "--attack", "label-count", "--resume")
    assert [run.attack for run in record.runs] == ["bias-ratio", "label-count"]
    assert sorted(path.name for path in Path("audit").iterdir()) == ["audit.json", "report.html"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["audit", "fotos"], "unknown case 'fotos'. Did you mean 'photos'"),
        (["audit", "photos:colour=1"], "unknown option 'colour'"),
        (["audit", "photos:batch=0"], "greater than 0"),
        (["audit", "photos:batch=100000"], "examples"),
        (["audit", "digits", "--attack", "bias"], "unknown attack 'bias'"),
        (["audit", "digits", "--attack", "bias-ratio:tol=-1"], "greater than 0"),
        (["audit", "digits", "--defence", "pray"], "unknown defence 'pray'"),
        (["audit", "digits", "--metric", "lpips"], "unknown metric 'lpips'"),
        (["audit", "digits", "--suite", "last"], "unknown suite 'last'"),
        (
            ["audit", "digits", "--protocol", "steps=3"],
            "unknown option 'steps'. Options of Protocol: local_steps (int >= 0, default 0)",
        ),
        (["audit", "digits", "--knows", "lables=[1]"], "Did you mean 'labels'"),
        (["audit"], "nothing to audit"),
        (["audit", "digits", "--model", "nets:small", "--data", "data.npz"], "not both"),
        (["harden", "digits", "--model", "nets:small"], "not both"),
        (["audit", "--model", "nets:small"], "--model alone is not enough"),
        (["audit", "--model", "nets", "--data", "data.npz"], "is not package.module:name"),
        (["audit", "--model", "nets:gone", "--data", "data.npz"], "cannot import --model nets:gone"),
        (["audit", "--model", "absent:gone", "--data", "data.npz"], "cannot import --model absent:gone"),
        (["audit", "--model", "nets:text", "--data", "data.npz"], "gave str, not a torch.nn.Module"),
        (["audit", "--model", "nets:Broken", "--data", "data.npz"], "forward fails on inputs of shape"),
        (["audit", "--model", "nets:other", "--data", "data.npz"], "forward fails on inputs of shape"),
        (["audit", "--model", "nets:small", "--data", "gone.npz"], "does not exist"),
        (["audit", "--model", "nets:small", "--data", "data.npz", "--loss", "hinge"], "unknown loss 'hinge'"),
        (["audit", "--model", "nets:small", "--observation", "gone"], "cannot read gone"),
        (["risk"], "nothing to audit"),
        (["list", "dragons"], "unknown kind 'dragons'"),
        (["show", "bias"], "nothing is called 'bias'"),
        (["report", "gone.json"], "cannot read gone.json"),
        (["gate", "data.npz", "--max-recovered", "0"], "is no audit of unbatch"),
        (["bench", "speed"], "unknown benchmark 'speed'"),
        (["fly"], "No such command 'fly'"),
        (["audit", "digits", "--seed", "x"], "valid integer"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_bad_input_is_one_message_and_exit_code_2(here: Path, capsys, words: list[str], said: str) -> None:
    assert call(*words) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
    assert "defect of unbatch" not in error
    assert len(error.strip().splitlines()) <= 4


def test_labels_outside_the_classes_and_nan(here: Path, capsys) -> None:
    np.savez("data.npz", inputs=np.ones((2, 3, 4, 4), np.float32), labels=np.array([0, 7]))
    assert call("audit", "--model", "nets:small", "--data", "data.npz") == 2
    assert "labels run from 0 to 7, but the model has 3 classes" in capsys.readouterr().err
    np.savez("data.npz", inputs=np.full((2, 3, 4, 4), np.nan, np.float32), labels=np.array([0, 1]))
    assert call("audit", "--model", "nets:small", "--data", "data.npz") == 2
    assert "NaN" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "no whole safetensors file"),
        (lambda path: torch.save({"update": 1}, path), "it holds no tensor"),
        (lambda path: _rewrite(path, "update/1.bias", torch.full((8,), torch.nan)), "holds 8 NaN"),
        (lambda path: _rewrite(path, "update/1.bias", torch.ones(9)), "has shape (9,), the model's (8,)"),
        (lambda path: _rewrite(path, "update/9.bias", torch.ones(9)), "names that the model has not: '9.bias'"),
    ],
    ids=["truncated", "pickle", "nan", "shape", "name"],
)
def test_a_bad_bundle(here: Path, capsys, spoil, words: str) -> None:
    sys.path.insert(0, "")
    from nets import small

    x, y = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([1])
    observe(small(), torch.nn.functional.cross_entropy, x, y)[0].save("b.safetensors")
    spoil(Path("b.safetensors"))
    assert call("audit", "--observation", "b.safetensors", "--model", "nets:small") == 2
    assert words in capsys.readouterr().err


def _rewrite(path: Path, name: str, tensor: torch.Tensor) -> None:
    with safe_open(path, framework="pt") as file:
        held, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    save_file(held | {name: tensor}, path, metadata)


def test_debug_shows_the_traceback(here: Path, capsys) -> None:
    assert call("audit", "fotos", "--debug") == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_full_disk_keeps_what_was_written_and_writes_nowhere_else(
    here: Path, capsys, monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    import unbatch.files

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "elsewhere"))
    real = os.fsync

    def full(handle: int) -> None:
        if '"attack": "label-count"' in Path(os.readlink(f"/proc/self/fd/{handle}")).read_text():
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(unbatch.files.os, "fsync", full)
    words = ("audit", "digits:width=16", "--attack", "bias-ratio", "--attack", "label-count", "--quiet")
    assert call(*words) == 2
    error = capsys.readouterr().err
    assert "No space left on device" in error
    assert "defect" not in error
    assert len(Audit.load("audit/audit.json").recovered()) == 1
    assert not list((tmp_path / "elsewhere").iterdir())
    assert [path.name for path in Path("audit").iterdir()] == ["audit.json"]
    monkeypatch.setattr(unbatch.files.os, "fsync", real)
    assert call(*words, "--resume") == 0
    assert len(Audit.load("audit/audit.json").runs) == 2


def test_help_tells_of_arguments_and_escapes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("audit", "report", "gate", "sweep", "bundle", "bench"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        text = capsys.readouterr().out
        assert "\\[" not in text
        if command == "audit":
            assert "A built-in case" in text


def test_help_is_quick_to_import() -> None:
    code = "import sys\nfrom unbatch.command.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "sys.exit('torch' in sys.modules or 'pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, stdout=subprocess.DEVNULL).returncode == 0


def test_the_module_is_the_command_line(here: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "unbatch", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"unbatch {unbatch.__version__}\n"


WITHOUT_EXTRAS = """
import importlib.metadata as metadata, sys
blocked = {"scikit-image": "skimage", "matplotlib": "matplotlib", "opacus": "opacus", "pandas": "pandas"}
sys.modules |= dict.fromkeys(blocked.values())
real = metadata.distribution
def distribution(name):
    if name in blocked:
        raise metadata.PackageNotFoundError(name)
    return real(name)
metadata.distribution = distribution
from unbatch.command.catalogue import KINDS, first_sentence
from unbatch.command.cli import main
main(sys.argv[1:])
"""


def without_extras(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT_EXTRAS, *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_an_own_model_is_audited_without_any_extra(here: Path) -> None:
    words = ("--model", "nets:small", "--data", "data.npz", "--batch", "1", "--attack", "bias-ratio")
    # analyses share three seconds where no budget is given, which are few on a machine with other work
    done = without_extras("audit", *words, "--remedy", "prune", "--budget", "60")
    assert done.returncode == 0, done.stderr
    record = Audit.load("audit/audit.json")
    assert len(record.recovered()) == 1
    assert record.risks
    assert record.bounds or record.verdicts
    assert not [note for note in record.notes if "pip install" in note]
    assert Path("audit/report.html").stat().st_size > 1000


@pytest.mark.parametrize(
    ("words", "extra"),
    [
        (["audit", "photos", "--attack", "bias-ratio"], "the case photos needs scikit-image, which is not installed: "
         "pip install 'unbatch[cases]'"),
        (["audit", "faces"], "pip install 'unbatch[cases]'"),
        (["audit", "digits", "--defence", "dp-sgd"], "pip install 'unbatch[opacus]'"),
    ],
    ids=lambda value: value[1] if isinstance(value, list) else "",
)  # fmt: skip
def test_a_missing_extra_is_named(here: Path, words: list[str], extra: str) -> None:
    done = without_extras(*words)
    assert done.returncode == 2
    assert extra in done.stderr
    assert "defect of unbatch" not in done.stderr


def test_a_remedy_that_lacks_its_extra_is_told_in_the_report(here: Path) -> None:
    words = ("digits:width=16", "--attack", "bias-ratio", "--analysis", "gradient-rank")
    done = without_extras("audit", *words, "--remedy", "dp-sgd", "--remedy", "prune")
    assert done.returncode == 0, done.stderr
    record = Audit.load("audit/audit.json")
    (note,) = record.notes
    assert note.startswith("dp-sgd")
    assert note.endswith("was not tried: dp-sgd needs opacus, which is not installed: pip install 'unbatch[opacus]'")
    assert [remedy.defence for remedy in record.remedies] == ["prune:share=0.9"]
    assert note in unescape(Path("audit/report.html").read_text())
    assert "pip install 'unbatch[opacus]'" in " ".join(done.stdout.split())


def test_a_picture_that_cannot_be_drawn_is_told(here: Path) -> None:
    words = ("digits:batch=2,width=16", "--family", "clip", "--attack", "bias-ratio", "--rounds", "1", "--seconds", "0")
    done = without_extras("harden", *words)
    assert done.returncode == 0, done.stderr
    assert (
        "No picture was drawn: it needs matplotlib, which is not installed: pip install 'unbatch[bench]'" in done.stderr
    )
    assert not Path("harden/harden.png").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "killed"])
def test_a_stopped_audit_keeps_what_was_found_and_resumes(here: Path, number: signal.Signals) -> None:
    endless = "gradient-matching:preset=inverting-gradients,iterations=10000000"
    words = ["audit", "digits:clients=2,batch=4,width=32", "--attack", "label-count", "--attack", endless]
    command = [sys.executable, "-c", "from unbatch.command.cli import main; main()", *words, "--quiet"]
    with Path("said.txt").open("w") as said:
        process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=said)
    for _ in range(600):
        time.sleep(0.1)
        if Path("audit/audit.json").exists() and Audit.load("audit/audit.json").runs:  # analyses are written before
            break
    time.sleep(1.0)
    process.send_signal(number)
    assert process.wait(60) == (130 if number == signal.SIGINT else -number)
    before = Audit.load("audit/audit.json")
    assert not before.complete
    if number == signal.SIGINT:
        count = f"{len(before.runs)} of 4"
        assert f"stopped after {count} runs; go on with the same command and --resume." in Path("said.txt").read_text()
        page = Path("audit/report.html").read_text()
        assert f"{4 - len(before.runs)} of 4 not begun" in page
        assert "every one asked for" not in page
    assert before.runs[0].status == "done"
    assert Path("audit/report.html").exists() == (number == signal.SIGINT)
    assert call(*words, "--quiet", "--resume", "--budget", "0.1") == 0
    after = Audit.load("audit/audit.json")
    assert after.complete
    assert len(after.runs) == 4
    assert after.runs[0] == before.runs[0]  # to the second that it took: it was not run again


def test_cases_and_models_are_what_the_list_says() -> None:
    for name, case in Case.find().items():
        assert str(case()) == name


def test_a_benchmark_s_table_is_whole_in_a_pipe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = Table(*[f"a long column {i}" for i in range(8)])
    wide.add_row(*[f"entry number {i}" for i in range(8)])
    module = SimpleNamespace(run=lambda **kw: [], table=lambda rows: wide)
    monkeypatch.setattr("unbatch.benchmarks.find", lambda name: module)
    assert call("bench", "wide") == 0
    said = capsys.readouterr().out
    assert "a long column 7" in said
    assert "entry number 7" in said
