"""Figures of the house itself: how large it is, what stands in it, and what its public docstrings show.

python docs/house.py              of this checkout, with what running it tells
python docs/house.py FOLDER       of another one, by reading it alone
"""

import ast
import contextlib
import io
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
RUNS = {  # attacks, each on a small case, by which the looks at a model are counted
    "bias-ratio": "photos:width=16",
    "label-count": "photos:batch=4",
    "unmix": "photos:batch=4,width=64",
    "gradient-matching:iterations=3": "photos:batch=2,width=32",
    "layer-by-layer": "photos:size=16,model=cnn2-c1,double=true",
    "tensor-moment": "tables:batch=4,width=2000,activation=gelu",
}


def sources(root: Path) -> dict[str, ast.Module]:
    """Every module under src/unbatch, parsed, by its dotted name without the package's."""
    package = root / "src" / "unbatch"
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name or "unbatch"] = ast.parse(path.read_text())
    return found


def imported(tree: ast.Module, known: set[str]) -> Iterator[str]:
    """The modules of the package that one imports, anywhere in it but for its types alone."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("unbatch"):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}".removeprefix("unbatch.")
                yield whole if whole in known else whole.rpartition(".")[0]


def circles(trees: dict[str, ast.Module]) -> int:
    """Modules that come with themselves, by way of however many others."""
    graph = {name: {m for m in imported(tree, set(trees)) if m in trees} for name, tree in trees.items()}

    def reached(name: str) -> set[str]:
        found, left = set[str](), [name]
        while left:
            new = graph[left.pop()] - found
            found |= new
            left += new
        return found

    return sum(name in reached(name) for name in graph)


def examples(trees: dict[str, ast.Module]) -> tuple[int, int]:
    """Public functions and classes of modules, and how many of them have an example in their docstring."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    public = [
        node
        for tree in trees.values()
        for node in tree.body
        if isinstance(node, kinds) and not node.name.startswith("_")
    ]
    return len(public), sum(">>>" in (ast.get_docstring(node) or "") for node in public)


def coded(path: Path) -> int:
    """Lines of a module that are neither empty nor a comment nor of a docstring."""
    text = path.read_text()
    said = set[int]()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            said |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = enumerate(text.splitlines(), 1)
    return sum(bool(line.strip()) and not line.strip().startswith("#") and k not in said for k, line in lines)


def looks() -> dict[str, str]:
    """How often a run of each attack watches its model run, and how often it probes its loss."""
    import unbatch
    from unbatch import loss
    from unbatch.attack import Attack
    from unbatch.network import dense

    Attack.find()
    counts = {spec: {"anatomy": 0, "identify": 0} for spec in RUNS}
    originals = [dense.anatomy, loss.identify]
    for original in originals:

        def counted(*args: object, original: object = original, **kwargs: object) -> object:
            counts[spec][original.__name__] += 1  # type: ignore[attr-defined]
            return original(*args, **kwargs)  # type: ignore[operator]

        for module in [m for name, m in sys.modules.items() if name.startswith("unbatch")]:
            if vars(module).get(original.__name__) is original:
                setattr(module, original.__name__, counted)
    for spec, case in RUNS.items():
        client = unbatch.Case.parse(case).setting()
        known = unbatch.Knowledge(input_range=(0.0, 1.0), domain=client.domain.name)
        seen, _ = unbatch.observe(client.model, client.loss, client.inputs, client.labels, knowledge=known)
        Attack.parse(spec)(seen)
    return {spec: f"{found['anatomy']} + {found['identify']}" for spec, found in counts.items()}


def readme() -> float:
    """Seconds of the README's first example."""
    code = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)[0]
    begun = time.monotonic()
    with contextlib.redirect_stdout(io.StringIO()):
        exec(code, {})
    return time.monotonic() - begun


def main(root: Path) -> None:
    trees = sources(root)
    package = root / "src" / "unbatch"
    nodes = [node for tree in trees.values() for node in ast.walk(tree)]
    functions = [n for n in nodes if isinstance(n, ast.FunctionDef)]
    public, shown = examples(trees)
    rows = {
        "rooms at the top level": len({name.split(".")[0] for name in trees} - {"unbatch"}),
        "modules": len(trees),
        "lines of src": sum(len(path.read_text().splitlines()) for path in package.rglob("*.py")),
        "of them code": sum(coded(path) for path in package.rglob("*.py")),
        "modules in a circle of imports": circles(trees),
        "asserts": sum(isinstance(n, ast.Assert) for n in nodes),
        "longest function, lines": max((n.end_lineno or 0) - n.lineno + 1 for n in functions),
        "public functions and classes": public,
        "of them with an example": f"{shown} ({shown / public:.0%})",
    }
    if root == HERE:
        rows["seconds of the README's example"] = f"{readme():.1f}"
        rows |= {f"looks at the model + at the loss, {spec}": count for spec, count in looks().items()}
    for name, value in rows.items():
        sys.stdout.write(f"{name:60} {value}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else HERE)
