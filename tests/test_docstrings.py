"""Every example in a docstring of the package is run."""

import ast
import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest

import unbatch
from unbatch.errors import MissingExtra

MODULES = ["unbatch", *(found.name for found in pkgutil.walk_packages(unbatch.__path__, "unbatch."))]
PACKAGE = Path(unbatch.__path__[0])
SHOWN = (  # rooms, and modules at the top level, in which everything public comes with an example
    *("attack", "bundle", "case", "cases", "loss", "metric", "metrics", "models", "numerics"),
    *("observation", "progress", "reconstruction", "truth", "update"),
)
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).with_suffix("").parts[0] in SHOWN)
EXTRAS = {"matplotlib", "opacus", "pandas", "tokenizers", "rouge_score", "skimage", "sklearn", "IPython"}


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith("__main__")])
def test_examples_of_a_module(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except MissingExtra as error:
        pytest.skip(str(error))
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        pytest.skip(str(error))
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for example in doctest.DocTestFinder(exclude_empty=True).find(module, name):
        runner.run(example, out=said.append)
    assert not runner.failures, "".join(said)


def test_examples_are_found() -> None:
    import unbatch.numerics.linear.linsys as module

    found = doctest.DocTestFinder().find(module)
    assert sum(len(one.examples) for one in found) > 5


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_what_is_public_shows_what_it_does_by_example(path: Path) -> None:
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            protocol = isinstance(node, ast.ClassDef) and any(ast.unparse(base) == "Protocol" for base in node.bases)
            assert protocol or ">>>" in (ast.get_docstring(node) or ""), f"{node.name} has no example"
