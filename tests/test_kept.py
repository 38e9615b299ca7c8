"""What an audit leaves: nothing lost to a kill, one writer a folder, private files, and a command that gives it again."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import unbatch
from unbatch.command.cli import main
from unbatch.command.demo import Part
from unbatch.errors import UnbatchError
from unbatch.files import LOCK, claimed
from unbatch.reporting.html import render
from unbatch.reporting.results import Audit, Run

FACTORY = """
import random
import numpy as np
import torch
from torch import nn
def drawn():
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        model[1].weight.mul_(1 + random.random() + np.random.rand())
    return model
"""
WORDS = ["audit", "--model", "nets:drawn", "--data", "data.npz", "--batch", "1", "--analysis", "gradient-rank"]
WORDS += ["--attack", "bias-ratio", "--attack", "label-count"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(FACTORY)
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    rng = np.random.default_rng(0)
    np.savez("data.npz", inputs=rng.random((2, 3, 4, 4), dtype=np.float32), labels=np.array([0, 2]))
    return tmp_path


def call(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    return int(ended.value.code or 0)


def results(record: Audit) -> tuple[str, str, list[Run]]:
    """All of it that does not tell the time."""
    return record.model_hash, record.fingerprint, [run.model_copy(update={"seconds": 0.0}) for run in record.runs]


def kills(count: int, seed: int) -> str:
    script = [sys.executable, str(Path(__file__).parent / "kills.py"), str(count), str(seed)]
    done = subprocess.run(
        script, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("none lost, none twice") == count
    return done.stdout


def test_a_killed_audit_loses_nothing_and_repeats_nothing() -> None:
    kills(1, 1)


@pytest.mark.slow
def test_twenty_kills(capsys: pytest.CaptureFixture[str]) -> None:
    said = kills(20, 0)
    with capsys.disabled():
        print(f"\n{said}")


def test_the_same_command_gives_the_same_audit_and_so_does_the_page_s(here: Path, capsys) -> None:
    assert call(*WORDS, "--quiet") == 0
    first = Audit.load("audit/audit.json")
    torch.rand(5)
    np.random.random(3)
    again = shlex.split(first.environment["command"])
    assert again == ["unbatch", *WORDS, "--out", "audit-again"]
    assert call(*again[1:]) == 0
    assert results(Audit.load("audit-again/audit.json")) == results(first)
    assert first.environment["command"] in (here / "audit" / "report.html").read_text()
    assert first.model_hash in (here / "audit" / "report.html").read_text()
    assert call(*WORDS, "--attack", "unmix", "--resume", "--quiet") == 0
    after = Audit.load("audit/audit.json")
    assert after.runs[:2] == first.runs  # to the second that they took
    assert len(after.runs) == 3


def test_weights_of_a_file_stand_in_the_record(here: Path) -> None:
    from unbatch.command.named import load_model

    model = load_model("nets:drawn")
    with torch.no_grad():
        model[3].bias += 1.0
    torch.save(model.state_dict(), "trained.pt")
    assert call(*WORDS, "--weights", "trained.pt", "--quiet") == 0
    record = Audit.load("audit/audit.json")
    assert record.model_hash == unbatch.bundle.state_hash(model.state_dict())
    assert call(*WORDS, "--resume", "--quiet") == 2  # of another model


def test_a_bundle_of_a_model_in_another_state_is_refused(here: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    model = torch.nn.Linear(4, 3)
    seen, _ = unbatch.observe(model, F.cross_entropy, torch.ones(1, 4), torch.tensor([1]))
    seen.save("seen.safetensors")
    with safe_open("seen.safetensors", framework="pt") as file:
        held, told = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    save_file(held | {"state/bias": held["state/bias"] + 1}, "changed.safetensors", told)
    with pytest.raises(UnbatchError, match="The file was changed; capture it again"):
        unbatch.Observation.load("changed.safetensors", model=model, loss=F.cross_entropy)
    bare = {name: tensor for name, tensor in held.items() if not name.startswith("state/")}
    save_file(bare, "bare.safetensors", told)
    unbatch.Observation.load("bare.safetensors", model=model, loss=F.cross_entropy)
    with pytest.raises(UnbatchError, match="give those of the capture"):
        unbatch.Observation.load("bare.safetensors", model=torch.nn.Linear(4, 3), loss=F.cross_entropy)


def test_the_truth_of_a_captured_update_is_its_data(here: Path) -> None:
    from unbatch.command.named import load_model

    held = np.load("data.npz")
    x, y = torch.from_numpy(held["inputs"][:1]), torch.from_numpy(held["labels"][:1])
    seen, _ = unbatch.observe(load_model("nets:drawn"), F.cross_entropy, x, y)
    seen.save("seen.safetensors")
    words = ("audit", "--model", "nets:drawn", "--observation", "seen.safetensors", "--attack", "bias-ratio", "--quiet")
    assert call(*words, "--data", "data.npz", "--batch", "1") == 0
    record = Audit.load("audit/audit.json")
    assert record.truth
    assert record.recovered() == {(0, 0)}
    assert record.runs[0].examples[0].error < 1e-4


def test_what_holds_private_examples_is_for_its_owner_alone(here: Path) -> None:
    before = os.umask(0o000)
    try:
        assert call(*WORDS, "--quiet", "--save-images", "pictures") == 0
        unbatch.observe(torch.nn.Linear(4, 3), F.cross_entropy, torch.ones(1, 4), torch.tensor([1]))[0].save("seen")
        assert call("report", "audit/audit.json", "--out", "page.html") == 0
    finally:
        os.umask(before)
    private = [*Path("audit").iterdir(), *Path("pictures").iterdir(), Path("seen"), Path("page.html")]
    assert len(private) == 5
    assert {oct(path.stat().st_mode & 0o777) for path in private} == {"0o600"}
    assert call(*WORDS, "--quiet", "--out", "second", "--save-images", "pictures") == 2  # those of another audit
    assert not Path("second").exists()


def test_every_page_with_examples_says_that_it_holds_private_ones(here: Path) -> None:
    x, y = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([1])
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    seen, truth = unbatch.observe(model, F.cross_entropy, x, y)
    guesses = "gradient-matching:iterations=1"
    for known in (None, truth):
        record = unbatch.audit(seen, truth=known, attacks=[guesses], analyses=())
        assert "This page holds private examples." in render(record)
        assert "This page holds private examples." in record._repr_html_()


def test_two_writers_of_one_folder_are_refused(here: Path, capsys) -> None:
    with claimed(Path("audit")):
        assert call(*WORDS) == 2
    said = capsys.readouterr().err
    assert f"another process writes to audit (number {os.getpid()}); wait for its end" in said
    Path("audit").mkdir()
    (Path("audit") / LOCK).write_text("1")  # left by a process that was killed
    (Path("audit") / "audit.json.abc.tmp").write_text("half")
    assert call(*WORDS, "--quiet") == 0
    assert sorted(path.name for path in Path("audit").iterdir()) == ["audit.json", "report.html"]


def test_a_folder_that_cannot_be_written_is_refused_before_the_first_attack(here: Path, capsys, monkeypatch) -> None:
    real = os.open

    def read_only(path, flags, *more, **named):
        if str(path).endswith(LOCK):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, flags, *more, **named)

    monkeypatch.setattr("unbatch.files.os.open", read_only)
    monkeypatch.setattr("unbatch.command.console.audit", lambda *a, **k: pytest.fail("an attack was run"))
    assert call(*WORDS) == 2
    said = capsys.readouterr().err
    assert (
        "cannot write to the folder audit: Permission denied; name another place with --out. Nothing was run." in said
    )


def test_the_demo_overwrites_its_own_record_and_no_other(here: Path, capsys, monkeypatch) -> None:
    small = {"words": "digits", "attacks": ("bias-ratio",), "analyses": (), "budget": 5.0}
    parts = tuple(
        Part(case=f"digits:width={width}", folder=folder, **small) for width, folder in ((16, ""), (12, "other"))
    )
    monkeypatch.setattr("unbatch.command.demo.PARTS", parts)
    assert call("demo", "--quiet") == 0
    assert Path("demo/report.html").exists()
    assert Path("demo/other/report.html").exists()
    assert call("demo", "--quiet") == 0
    assert call(*WORDS, "--out", "demo", "--force", "--quiet") == 0
    assert call("demo", "--quiet") == 2
    assert "demo holds an audit already" in capsys.readouterr().err
