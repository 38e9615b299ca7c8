"""What the documentation says runs, generated pages are current, links lead somewhere, the site loads nothing."""

import contextlib
import doctest
import io
import json
import os
import pkgutil
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import typer
from rich.console import Console
from rooms import ROOMS

import unbatch
from unbatch import Analysis, Attack, Case, Defence, audit, benchmarks
from unbatch.auditing.harden import SCOPES, Hardening
from unbatch.auditing.utility import scene_of
from unbatch.command.hardening_view import rows
from unbatch.plugin import Plugin

COVERS = "update", "training"
ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
FENCE = re.compile(r"^(?:<!-- first:\n(.*?)-->\n)?```(\w*)\n(.*?)^```$", re.M | re.S)
QUICK = {  # what a command of a page is held to here; `make slow` gives those of the README more time
    "audit": ["--budget", "1"],
    "harden": ["--seconds", "3"],
    "sweep": ["--jobs", "1"],
}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, with the lines before it that readers do not see (an HTML comment, `first:`)."""

    first: str
    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    return [Block(*(part or "" for part in found)) for found in FENCE.findall(page.read_text())]


def commands(page: Path) -> list[list[str]]:
    """The words of every command line of unbatch in the blocks of a page, without the program's name."""
    lines = [
        line.removeprefix("$ ")
        for block in blocks(page)
        if block.language in ("", "sh", "bash", "console")
        for line in block.text.replace("\\\n", " ").splitlines()
    ]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("unbatch ")]


def mentions(page: Path) -> list[list[str]]:
    """The same of commands in running text, where options may stand without their values: `unbatch gate --max-psnr`."""
    text = FENCE.sub("", page.read_text())
    return [shlex.split(found)[1:] for found in re.findall(r"`(unbatch [^`]+)`", " ".join(text.split()))]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


COMMANDS = [page for page in PAGES if commands(page)]
PYTHON = [
    page
    for page in PAGES
    if {b.language for b in blocks(page)} & {"python", "pycon"} and page.name != "README.md"  # has a test of its own
]


@pytest.mark.parametrize("path", sorted((DOCS / "examples").glob("*.py")), ids=lambda p: p.stem)
def test_examples_run(path: Path) -> None:
    assert runpy.run_path(str(path))["__doc__"]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the files that the pages call the reader's own: a model, pictures, a table, a captured update."""
    from PIL import Image
    from safetensors.torch import save_file

    (tmp_path / "mypackage").mkdir()
    (tmp_path / "mypackage" / "nets.py").write_text(
        "from torch import nn\n\n\ndef factory():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 16), nn.ReLU(), nn.Linear(16, 2))\n"
    )
    rng = torch.Generator().manual_seed(0)
    x, y = torch.rand(8, 3, 32, 32, generator=rng), torch.arange(8) % 2
    for i, picture in enumerate((x * 255).byte()):
        file = tmp_path / "images" / f"class{i % 2}" / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(file)
    np.savez(tmp_path / "data.npz", inputs=x[:2].numpy(), labels=y[:2].numpy())
    model = runpy.run_path(str(tmp_path / "mypackage" / "nets.py"))["factory"]()
    seen, _ = unbatch.observe(model, torch.nn.functional.cross_entropy, x[:1], y[:1])
    seen.save(tmp_path / "captured.safetensors")
    step = unbatch.Protocol(local_steps=1, learning_rate=0.1)
    moved, _ = unbatch.observe(model, torch.nn.functional.cross_entropy, x[:1], y[:1], protocol=step)
    before = model.state_dict()
    save_file(before, tmp_path / "received.safetensors")
    np.savez(tmp_path / "before.npz", *(tensor.numpy() for tensor in before.values()))
    np.savez(tmp_path / "round7.npz", *((before[name] + u).numpy() for name, u in moved.update.items()))
    (plan,) = (block.text for block in blocks(DOCS / "sweeps.md") if block.language == "toml")
    (tmp_path / "plan.toml").write_text(plan)
    (mymodels,) = (block.text for block in blocks(DOCS / "hugging-face.md") if "def adapted" in block.text)
    (tmp_path / "mymodels.py").write_text(mymodels)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for module in [m for m in sys.modules if m.partition(".")[0] in ("mypackage", "mymodels")]:
        del sys.modules[module]


def run(words: list[str]) -> int:
    from unbatch.command.cli import main

    with pytest.raises(SystemExit) as ended:
        main(words)
    return int(ended.value.code or 0)


def held(words: list[str]) -> list[str]:
    """A command made short. Analyses that it does not name are left to the tests of analyses."""
    named = any(word in words for word in ("--analysis", "--resume"))
    return [
        *words,
        *QUICK.get(words[0], []),
        *([] if named or words[0] != "audit" else ["--analysis", "gradient-rank"]),
    ]


@pytest.mark.parametrize("page", COMMANDS, ids=name)
def test_commands_of_a_page_run_one_after_the_other(page: Path, workplace: Path, capsys) -> None:
    for words in commands(page):
        if words[0] == "bench":
            assert benchmarks.find(words[1])
            continue
        code = run(held(words))
        assert code == 0 or (words[0], code) == ("gate", 1), f"unbatch {shlex.join(words)}\n{capsys.readouterr().err}"


@pytest.mark.slow
def test_commands_of_the_readme_run_with_every_default(workplace: Path, capsys) -> None:
    for words in commands(ROOT / "README.md"):
        if words[0] != "bench":
            code = run([*words, *{"audit": ["--budget", "20"], "harden": ["--seconds", "60"]}.get(words[0], [])])
            assert code == 0 or (words[0], code) == ("gate", 1), capsys.readouterr().err


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_in_running_text_have_these_words(page: Path) -> None:
    from unbatch.command.cli import app

    root = typer.main.get_command(app)
    for words in (*commands(page), *mentions(page)):
        command = root.commands.get(words[0])
        assert command, words
        known = {spelling for option in command.params for spelling in option.opts}
        given = {word.partition("=")[0] for word in words if word.startswith("--")} - {"--help"}
        assert given <= known, words
        if words[0] == "bench" and len(words) > 1:
            assert benchmarks.find(words[1])


@pytest.mark.parametrize("page", PYTHON, ids=name)
def test_python_of_a_page_runs_in_one_namespace(page: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guide = ModuleType("guide")
    monkeypatch.setitem(sys.modules, "guide", guide)
    for number, block in enumerate(b for b in blocks(page) if b.language in ("python", "pycon")):
        where = f"{name(page)}, block {number + 1}"
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(block.first, where, "exec", dont_inherit=True), vars(guide))
        if block.language == "python":
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(block.text, where, "exec", dont_inherit=True), vars(guide))
        else:
            told = doctest.DocTestParser().get_doctest(block.text, vars(guide), where, name(page), 0)
            assert told.examples, where
            said = io.StringIO()
            result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(told, out=said.write, clear_globs=False)
            vars(guide).update(told.globs)
            assert not result.failed, said.getvalue()
    for key, value in list(vars(guide).items()):
        if key.startswith("test_"):
            value()


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


def test_the_tour_prints_what_is_stored_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book = json.loads((DOCS / "tour.ipynb").read_text())
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert len(code) >= 8
    monkeypatch.chdir(tmp_path)
    scope = {"__name__": "tour"}
    for number, cell in enumerate(code):
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(compile("".join(cell["source"]), f"tour, cell {number}", "exec", dont_inherit=True), scope)
        stored = "".join(line for output in cell["outputs"] for line in output["text"])
        if "varies" in cell["metadata"].get("tags", []):  # with the time that a search is given
            assert said.getvalue()
        else:
            assert said.getvalue() == stored


@pytest.mark.parametrize("kind", [Attack, Analysis, Defence])
def test_every_choice_stands_on_the_page_on_choosing(kind: type[Plugin]) -> None:
    text = (DOCS / "how-to-choose.md").read_text()
    assert [name for name in kind.find() if f"`{name}`" not in text] == []


def test_the_rooms_of_the_architecture_are_those_that_are_held() -> None:
    text = (DOCS / "architecture.md").read_text()
    drawn = [set(re.findall(r"`([\w.]+)`", cells)) for cells in re.findall(r"^\| \d+ \| ([^|]+) \|", text, flags=re.M)]
    assert drawn == ROOMS


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=name)
def test_modules_and_names_that_a_page_names_exist(page: Path) -> None:
    text, rooms = page.read_text(), "|".join(sorted(set().union(*ROOMS)))
    for place in re.findall(rf"`((?:{rooms})(?:/[a-z_]+)+)`", text):
        path = ROOT / "src" / "unbatch" / place
        assert path.is_dir() or path.with_suffix(".py").exists(), place
    for dotted in re.findall(r"`unbatch\.([A-Za-z_.]*\w)", text):
        assert pkgutil.resolve_name(f"unbatch.{dotted}"), dotted


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


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if not target.startswith(("http", "#")):
            assert (page.parent / target.split("#")[0]).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_make_targets_and_extras_exist(page: Path) -> None:
    text = page.read_text()
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), flags=re.M)[1].split()
    assert set(re.findall(r"(?:^|`)make (\w+)", text, flags=re.M)) <= set(targets)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = {extra for found in re.findall(r"(?:unbatch|\.)\[([a-z, ]+)\]", text) for extra in re.split(", *", found)}
    assert asked <= set(project["optional-dependencies"])


class Loaded(HTMLParser):
    """What a browser fetches by itself when it opens a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        fetches = tag != "a" and not (tag == "link" and given.get("rel") in ("canonical", "next", "prev"))
        self.found += [given[key] or "" for key in ("src", "href", "srcset", "poster") if key in given and fetches]


def test_the_site_builds_without_a_warning_and_loads_nothing_from_the_network(tmp_path: Path) -> None:
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    assert not re.findall(r"^(?!INFO).+", built.stdout + built.stderr, flags=re.M)
    pages = sorted(tmp_path.rglob("*.html"))
    assert len(pages) >= len([page for page in PAGES if page.parent != ROOT])
    reference = (tmp_path / "api.html").read_text()
    assert [n for n in unbatch.__all__ if not n.startswith("_") and f'id="{n.lower()}' not in reference] == []
    for page in pages:
        loaded = Loaded()
        loaded.feed(page.read_text())
        assert loaded.found
        assert not [url for url in loaded.found if url.startswith(("http:", "https:", "//"))], page
    for style in tmp_path.rglob("*.css"):
        assert not re.findall(r"url\(['\"]?(?:https?:)?//", style.read_text()), style
