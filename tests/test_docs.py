"""Examples run, generated pages are current, links lead somewhere."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from rich.console import Console

from unbatch import Case, audit
from unbatch.auditing.harden import SCOPES, Hardening
from unbatch.auditing.utility import scene_of
from unbatch.command.hardening_view import rows

COVERS = "update", "training"
ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*ROOT.glob("*.md"), *DOCS.rglob("*.md")]


@pytest.mark.parametrize("path", sorted((DOCS / "examples").glob("*.py")), ids=lambda p: p.stem)
def test_examples_run(path: Path) -> None:
    assert runpy.run_path(str(path))["__doc__"]


def test_the_readme_s_example_runs(capsys) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    exec(compile(code, "README.md", "exec"), {})
    said = capsys.readouterr().out
    assert "1 of 1 private image recovered exactly" in said
    assert "('noise:sigma=0.01,relative=false', 0)" in said


def test_the_figures_of_the_page_on_safety_are_what_its_commands_print(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from unbatch.command.cli import main

    text = (DOCS / "how-safe-is-safe-enough.md").read_text()
    blocks = [block.replace("\\\n", " ") for block in re.findall(r"```\n(unbatch .*?)```", text, flags=re.S)]
    commands = [shlex.split(line)[1:] for block in blocks for line in block.splitlines()]
    monkeypatch.chdir(tmp_path)

    def said(word: str) -> str:
        (command,) = (c for c in commands if word in c)
        with pytest.raises(SystemExit):
            main(command)
        return " ".join(capsys.readouterr().out.split())

    exact = said("unmix")
    assert "4 of 4 private images recovered exactly" in exact
    scores = [float(score) for score in re.findall(r"unmix\S* ([\d.]+) dB", exact)]
    assert len(scores) == 4
    assert min(scores) > 100
    private = said("dp-reconstruction")
    for figure in ("epsilon = 5.497", "at most 12.9 dB", "at most 14.0 dB", "reconstruction success = 0.032"):
        assert figure in private
    for figure in ("epsilon = 5.497", "at most 12.9 dB", "at most 14.0 dB", "at most 0.032"):
        assert figure in " ".join(text.split())
    bound = re.search(r"prior alone gives ([\d.]+) dB.* at most ([\d.]+) dB", said("van-trees"))
    assert bound
    assert f"more than {bound[2]} dB" in text
    assert f"gets {bound[1]} dB by the prior alone" in text


def test_the_search_on_the_page_on_safety_is_the_stored_one_and_its_bounds_are_what_the_analyses_say() -> None:
    text = " ".join((DOCS / "how-safe-is-safe-enough.md").read_text().replace("\n> ", "\n").split())
    held = Hardening.model_validate_json((ROOT / "benchmarks" / "results" / "harden.json").read_text())
    assert held.complete
    assert f"unbatch harden {held.case} --target-psnr {held.target:g}" in text
    screen = Console(width=250, record=True)
    screen.print(rows(held))
    printed = [" ".join(line.split()) for line in screen.export_text().splitlines()]
    shown = [line for line in printed if line and line in text]
    assert len(shown) >= 16
    assert {line.split()[0].rstrip(",") for line in shown} >= {"dp-sgd", "noise", "prune", "quantise", "clip", "local"}
    for scope in SCOPES:
        best, answer = held.cheapest(scope), held.answer(scope)
        assert best is not None
        start, _, end = answer.partition(best.defences[0])
        short = f"dp-sgd with noise multiplier {best.strength:.4g}"
        assert start + short + end in text
    scene = scene_of(Case.parse(held.case), 4, held.rounds, 0)
    for family, strength in (("dp-sgd", 0.224), ("noise", 2.37)):
        (told,) = [t for t in held.tried if t.family == family and abs(t.strength / strength - 1) < 0.01]
        record = audit(scene.client(told.batch), attacks=[], defences=told.defences, analyses=held.analyses)
        best = {
            c: min((b.psnr for b in record.bounds if b.scope == "any" and b.covers == c), default=None) for c in COVERS
        }
        assert best["update"] == pytest.approx(told.bound, abs=0.05)
        assert best["training"] == (None if told.training is None else pytest.approx(told.training, abs=0.05))


def test_the_attack_of_the_guide_keeps_the_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    from unbatch.testing import check_attack

    text = (DOCS / "adding-an-attack.md").read_text()
    code = re.findall(r"```python\n(.*?)```", text, flags=re.S)[0]
    scope: dict = {"__name__": "guide"}
    monkeypatch.setitem(sys.modules, "guide", type(sys)("guide"))
    exec(compile(code, "adding-an-attack.md", "exec", dont_inherit=True), scope)
    check_attack(scope["PriorGuess"])


def test_generated_pages_are_current() -> None:
    generate = runpy.run_path(str(DOCS / "generate.py"))
    assert [str(path) for path in generate["stale"]()] == []


def test_every_flag_has_a_section() -> None:
    from unbatch.auditing.checks import CHECKS

    text = (DOCS / "flags.md").read_text()
    for check in CHECKS:
        assert f"## {check.name}\n" in text
        assert check.means in text
        assert check.do in text


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if not target.startswith(("http", "#")):
            assert (page.parent / target.split("#")[0]).exists(), target
