"""Examples run, generated pages are current, links lead somewhere."""

import re
import runpy
import sys
from pathlib import Path

import pytest

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
    from unbatch.checks import CHECKS

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
