"""Within numerics a name means one thing."""

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1] / "src" / "unbatch" / "numerics"


def defined(path: Path) -> set[str]:
    """Functions, classes and constants at the top level of a module; not what it imports."""
    names = set[str]()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        names |= {part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)}
    return names


def test_no_two_things_share_a_name() -> None:
    where = defaultdict(list)
    for path in sorted(ROOT.rglob("*.py")):
        for name in defined(path):
            where[name].append(str(path.relative_to(ROOT)))
    assert len(where) > 100
    assert {name: paths for name, paths in where.items() if len(paths) > 1} == {}
