"""Who may import whom, and what no file may do."""

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from rooms import ROOMS

import unbatch
from unbatch import UnbatchError

ROOT = Path(__file__).parents[1] / "src" / "unbatch"
ROW = {name: number for number, names in enumerate(ROOMS) for name in names}
OPEN_SETS = {"attacks", "analyses", "defences", "metrics", "cases", "layers", "signs"}
BLIND = {
    "numerics",
    "network",
    "inversion",
    "layers",
    "attacks",
    "analyses",
    "signs",
}  # the server's side of the boundary
HIDDEN = {"truth", "case", "metric", "auditing", "data"}  # they hold the truth, or reach it
PUBLIC = {  # names of the package itself, and the modules that they come from
    name: getattr(unbatch, name).__module__.removeprefix("unbatch.") for name in unbatch.__all__ if name[0] != "_"
}


def room(module: str) -> str:
    """The folder or module at the top level that `module` stands in: inversion.view -> inversion."""
    return module.split(".")[0]


def row(module: str) -> int:
    """Its own row, where it is drawn with its name, or its room's."""
    return ROW.get(module, ROW[room(module)])


@cache
def modules() -> dict[str, Path]:
    """Every module of the package but its `__init__`, without the leading `unbatch.`."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return {name: path for name, path in found.items() if name}


@cache
def imports(module: str) -> frozenset[str]:
    """What a module imports of the package when it or one of its functions runs; not what its types alone name."""
    tree, found = ast.parse(modules()[module].read_text()), set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "unbatch":
            public = {a.name: PUBLIC[a.name] for a in node.names if node.module == "unbatch" and a.name in PUBLIC}
            whole = [f"{node.module}.{alias.name}".removeprefix("unbatch.") for alias in node.names]
            found |= {name if name in modules() else name.rpartition(".")[0] for name in whole} | set(public.values())
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("unbatch.") for a in node.names if a.name.startswith("unbatch.")}
    return frozenset(name for name in found if name in modules())


def opaque(tree: ast.AST) -> list[str]:
    """Imports that hide what comes with them: of the whole package, relative ones, and those by a name made at run time."""
    found = list[str]()
    for node in ast.walk(tree):
        whole = isinstance(node, ast.Import) and any(alias.name == "unbatch" for alias in node.names)
        relative = isinstance(node, ast.ImportFrom) and node.level > 0
        made = isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in {"import_module", "__import__"}
        if whole or relative or made:
            found.append(ast.unparse(node))
    return found


@cache
def reached(module: str) -> frozenset[str]:
    """Everything that comes with a module, by way of however many others."""
    found, left = set[str](), [module]
    while left:
        new = imports(left.pop()) - found
        found |= new
        left += new
    return frozenset(found)


def test_every_room_is_drawn() -> None:
    assert {room(module) for module in modules()} == {name for name in ROW if "." not in name}
    assert {name for name in ROW if "." in name} <= set(modules())


def test_no_module_comes_with_itself() -> None:
    try:
        TopologicalSorter({module: imports(module) for module in modules()}).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


@pytest.mark.parametrize("module", modules())
def test_imports_only_from_rows_above(module: str) -> None:
    for other in imports(module):
        assert row(other) <= row(module), f"{module} imports {other}"
        if room(module) in OPEN_SETS:
            own = "." not in module
            assert own or room(other) != room(module), f"{module} imports its sibling {other}"
            assert room(other) == room(module) or room(other) not in OPEN_SETS - {"layers"}, f"{module}: {other}"
        if room(module) == "numerics":
            assert room(other) == "numerics", f"{module} imports {other}"
        if room(module) == "reporting":
            assert room(other) in {"reporting", "analysis", "plugin", "files", "errors", "privacy"}, (
                f"{module} imports {other}"
            )


@pytest.mark.parametrize("module", [module for module in modules() if room(module) in BLIND])
def test_the_attacker_cannot_reach_the_truth(module: str) -> None:
    assert not {other for other in reached(module) if room(other) in HIDDEN}
    assert not opaque(ast.parse(modules()[module].read_text()))


@pytest.mark.parametrize(
    "line",
    [
        "from unbatch import Truth",
        "from unbatch.truth import Truth",
        "from unbatch.auditing import judge",
        "import unbatch",
        "from ..truth import Truth",
        "importlib.import_module('unbatch.truth')",
    ],
)
def test_no_way_to_the_truth_is_overlooked(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted = tmp_path / "planted.py"
    planted.write_text(line)
    known = modules() | {"attacks.planted": planted}
    monkeypatch.setitem(globals(), "modules", lambda: known)
    seen = {room(other) for other in imports.__wrapped__("attacks.planted")}
    assert seen & HIDDEN or opaque(ast.parse(line))


ON_USE = {
    "scipy",
    "sklearn",
    "skimage",
    "torchmetrics",
    "matplotlib",
    "pandas",
    "opacus",
    "transformers",
    "tokenizers",
    "rouge_score",
    "flwr",
    "joblib",
    "ray",
    "distributed",
    "duckdb",
    "mlflow",
}  # slow to import, or extras
PAGES = {"jinja2", "markupsafe", "rich", "typer", "click"}  # for people who look


@pytest.mark.parametrize("module", modules())
def test_slow_packages_are_imported_on_use(module: str) -> None:
    for node in ast.parse(modules()[module].read_text()).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for name in (whole.split(".")[0] for whole in names):
            assert name not in ON_USE, f"{module} imports {name} whether or not it is used"
            assert name not in PAGES or room(module) in {"reporting", "command", "benchmarks"}, (
                f"{module} imports {name}"
            )


@pytest.mark.parametrize("module", [m for m in modules() if room(m) in BLIND | {"defences", "metrics"}])
def test_no_plugin_looks_another_up(module: str) -> None:
    """What two attacks share is a function; only a layer's rule is looked up, by the layer's type."""
    for node in ast.walk(ast.parse(modules()[module].read_text())):
        if isinstance(node, ast.Attribute) and node.attr in {"parse", "find", "several"}:
            assert ast.unparse(node.value) not in {"Attack", "Analysis", "Defence", "Metric", "Case"}, module


EXTRAS = {  # package -> rooms
    "matplotlib": {"benchmarks", "command"},
    "opacus": {"adapters"},
    "pandas": {"reporting"},
    "transformers": {"adapters"},
    "tokenizers": {"data"},
    "rouge_score": {"metrics"},
    "flwr": {"adapters"},
    "joblib": {"adapters"},
    "ray": {"adapters"},
    "distributed": {"adapters"},
    "duckdb": {"reporting"},
    "mlflow": {"adapters"},
    "nvflare": {"adapters"},
}
NAMES = {
    "rouge_score": "rouge-score",
    "sklearn": "scikit-learn",
    "click": "typer",
    "PIL": "pillow",
    "markupsafe": "jinja2",
}  # import -> what brings it


def test_what_is_imported_is_declared() -> None:
    declared = tomllib.loads((ROOT.parents[1] / "pyproject.toml").read_text())["project"]
    needed = {re.split("[^a-z0-9-]", words)[0] for words in declared["dependencies"]}
    used = set()
    for module, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in {whole.split(".")[0] for whole in names} - sys.stdlib_module_names - {"unbatch"}:
                if name in EXTRAS:
                    assert room(module) in EXTRAS[name], f"{module} imports {name}, which an extra brings"
                else:
                    used.add(NAMES.get(name, name))
    assert used == needed


def errors_of(module: str) -> list[type[BaseException]]:
    """The exceptions that a module defines."""
    held = vars(importlib.import_module(f"unbatch.{module}")).values()
    kinds = [kind for kind in held if isinstance(kind, type) and issubclass(kind, BaseException)]
    return [kind for kind in kinds if kind.__module__ == f"unbatch.{module}"]


@pytest.mark.parametrize("module", modules())
def test_errors_are_ours(module: str) -> None:
    """Whatever a caller can cause is an UnbatchError; numerics, which import nothing of ours, say ValueError."""
    assert all(issubclass(kind, UnbatchError) for kind in errors_of(module))
    for node in ast.walk(ast.parse(modules()[module].read_text())):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            assert ast.unparse(node.exc.func) != "ValueError" or room(module) == "numerics", f"line {node.lineno}"


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_house_rules(path: Path) -> None:
    assert path.stem not in {"utils", "helpers", "common", "base", "misc", "manager"}
    for node in ast.walk(ast.parse(path.read_text())):
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


CLIENT = """
import sys, torch
own = set(sys.modules)  # torch may bring what it likes
import unbatch
from unbatch import guard, observe
model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
x, y = torch.ones(2, 4), torch.tensor([0, 1])
sent, _ = observe(model, torch.nn.functional.cross_entropy, x, y, defences=["clip", "noise:sigma=0.1"])
sent.save(sys.argv[1])
brought = {name.partition(".")[0] for name in set(sys.modules) - own}
print(*sorted(name for name in brought - sys.stdlib_module_names if not name.startswith("_")))
"""


def test_a_client_that_observes_and_guards_imports_little(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, str(tmp_path / "sent")], capture_output=True, text=True, check=True
    )
    parts_of_pydantic = {"annotated_types", "pydantic_core", "typing_extensions", "typing_inspection"}
    parts_of_torch = {"opt_einsum", "sympy", "mpmath", "torchgen"}
    assert set(done.stdout.split()) - parts_of_pydantic - parts_of_torch <= {
        "numpy",
        "pydantic",
        "safetensors",
        "torch",
        "unbatch",
    }


def test_public_names_survive_the_import_of_every_module() -> None:
    code = (
        "import importlib, types, unbatch\n"
        f"for name in {sorted(modules())!r}: importlib.import_module('unbatch.' + name)\n"
        "assert not [n for n in unbatch.__all__ if isinstance(getattr(unbatch, n), types.ModuleType)]"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


LONG = 60  # lines of a function without its docstring: one screen


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of code, the docstring left out."""
    first, whole = function.body[0], (function.end_lineno or 0) - function.lineno + 1
    return whole - ((first.end_lineno or 0) - first.lineno + 1 if ast.get_docstring(function) else 0)


def test_a_function_is_one_screen() -> None:
    found = {
        f"{path.relative_to(ROOT)} {node.name}"
        for path in ROOT.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and length(node) > LONG
    }
    assert not found, sorted(found)


@pytest.mark.parametrize("path", sorted(Path(__file__).parent.glob("test_*.py")), ids=lambda path: path.stem)
def test_test_modules_stand_alone(path: Path) -> None:
    """What two of them share is a module or a fixture; `exchange` is the one in conftest."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not (node.module or "").startswith("test_"), f"line {node.lineno} imports {node.module}"
        if isinstance(node, ast.FunctionDef):
            assert node.name != "exchange", f"line {node.lineno}"


CONTRACT = {"run", "table"}  # what every module of benchmarks gives


def test_no_two_public_things_share_a_name() -> None:
    places: dict[str, list[str]] = {}
    for module, path in modules().items():
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            if room(module) != "benchmarks" or node.name not in CONTRACT:
                places.setdefault(node.name, []).append(module)
    shared = {name: found for name, found in places.items() if len(found) > 1}
    assert not shared
