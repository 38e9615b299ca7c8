"""Who may import whom, and what no file may do."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "src" / "unbatch"
LEVELS = [
    {"numerics"},
    {
        "plugin",
        "files",
        "loss",
        "network",
        "chain",
        "variants",
        "protocol",
        "progress",
        "observation",
        "bundle",
        "likelihood",
        "restoration",
        "tail",
        "models",
        "published",
        "twolayer",
        "reduction",
        "label",
        "unknowns",
    },
    {"domain", "truth", "analysis", "attack", "defence", "layer", "results", "metric"},
    {
        "adapters",
        "case",
        "data",
        "certify",
        "layers",
        "reading",
        "curve",
        "trunk",
        "first_dense",
        "batch_norm",
        "pullback",
        "probe",
        "constraints",
        "solvability",
        "determined",
        "information",
        "suites",
        "diagnosis",
    },
    {"attacks", "analyses", "defences", "metrics", "cases"},
    {"client"},
    {"checks", "findings", "judge", "audit", "gate", "target", "catalogue", "testing", "scene", "harden", "guard"},
    {"chart", "frontier", "report"},
    {"console", "demo", "benchmarks"},
    {"cli"},
]
LEVEL = {name: number for number, names in enumerate(LEVELS) for name in names}
OPEN_SETS = {"attacks", "analyses", "defences", "metrics", "cases", "layers"}
BLIND = {"attacks", "analyses", "layers", "numerics"}  # what runs on the server's side of the boundary
HIDDEN = {"truth", "case", "client", "audit", "judge", "metric"}


def files() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def home(path: Path) -> str:
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


def imports(path: Path, *, typing: bool = True) -> set[str]:
    """The modules of unbatch that a file imports, anywhere in it: `unbatch.loss` -> `loss`, with folders whole."""
    tree = ast.parse(path.read_text())
    if not typing:
        tree.body = [n for n in tree.body if not (isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n.test))]
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "unbatch":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("unbatch."):
            found.add(node.module.removeprefix("unbatch."))
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("unbatch.") for a in node.names if a.name.startswith("unbatch.")}
    return found - {"__version__"}


def test_every_module_has_a_level() -> None:
    assert {home(path) for path in files()} - {"__init__"} == set(LEVEL)


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_only_from_below(path: Path) -> None:
    if home(path) == "__init__":
        return
    for module in imports(path, typing=False):
        other = module.split(".")[0]
        if other == home(path):
            shared = path.name == "__init__.py" or other not in OPEN_SETS
            assert shared, f"{path.name} imports its sibling {module}: what two plugins share stands in numerics"
        elif (home(path), other) != ("observation", "bundle"):  # save and load, imported when called
            assert LEVEL[other] <= LEVEL[home(path)], f"{path.name} (level {LEVEL[home(path)]}) imports {other}"
    if home(path) == "numerics":
        assert all(module.startswith("numerics") for module in imports(path))


@pytest.mark.parametrize("path", [p for p in files() if home(p) in BLIND], ids=lambda p: p.name)
def test_the_attacker_cannot_see_the_truth(path: Path) -> None:
    assert not {module.split(".")[0] for module in imports(path)} & HIDDEN


def test_no_two_modules_import_each_other() -> None:
    graph = {home(p): {m.split(".")[0] for m in imports(p, typing=False)} for p in files() if p.parent == ROOT}
    pairs = {(a, b) for a, others in graph.items() for b in others if a != b and a in graph.get(b, ())}
    assert pairs <= {("observation", "bundle"), ("bundle", "observation")}  # save and load, imported when called


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_house_rules(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    assert path.stem not in {"utils", "helpers", "common", "base", "misc", "manager"}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            assert name not in {"torch.manual_seed", "torch.random.manual_seed", "print", "np.random.seed"}, name
            draws = {"torch.rand", "torch.randn", "torch.randint", "torch.randperm", "torch.normal", "torch.bernoulli"}
            if name in draws:
                assert any(k.arg == "generator" for k in node.keywords), (
                    f"{name} without a generator, line {node.lineno}"
                )


@pytest.mark.parametrize(
    "module",
    ["unbatch", "unbatch.command.cli", "unbatch.reporting.results", "unbatch.reporting.html", "unbatch.reporting.gate"],
)
def test_imports_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_functions_survive_the_import_of_their_modules() -> None:
    code = "import unbatch.auditing.run, unbatch.certify, unbatch; assert callable(unbatch.audit) and callable(unbatch.certify)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
