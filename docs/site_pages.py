"""What the site has that docs/ does not hold as pages: README, notebook, the Python reference, stored results.

A hook of mkdocs (mkdocs.yml). Links keep the spelling that works in the repository and are rewritten for the site.
"""

import json
import posixpath
import re
import runpy
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "docs/tour.ipynb": "tour.md",
}
HOME = {page: source for source, page in PAGES.items()}
LINK = re.compile(r"(\]\()([^)#\s]+)")  # [words](target#part), the target alone


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that stand at the repository's top, the Python reference, and what pages link to outside docs/."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text()
        files.append(File.generated(config, page, content=told(text) if source.endswith(".ipynb") else text))
    api = runpy.run_path(str(ROOT / "docs" / "generate.py"))["api"]()
    files.append(File.generated(config, "api.md", content=api))
    for path in (*sorted((ROOT / "benchmarks" / "results").iterdir()), ROOT / "CITATION.cff"):
        name = path.relative_to(ROOT).as_posix()
        files.append(File(name, str(ROOT), config.site_dir, use_directory_urls=False))
    return files


def told(notebook: str) -> str:
    """A notebook as Markdown: its code, and below it the text that it printed."""
    parts = list[str]()
    for cell in json.loads(notebook)["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        printed = "".join(line for output in cell.get("outputs", ()) for line in output["text"])
        parts += [f"```text\n{printed.rstrip()}\n```"] if printed else []
    return "\n\n".join(parts) + "\n"


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between places in the repository into links between places on the site."""
    here = page.file.src_uri
    source = HOME.get(here, f"docs/{here}")

    def turned(found: re.Match[str]) -> str:
        target = found[2]
        if "://" in target or target.startswith("mailto:"):
            return found[0]
        there = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        there = PAGES.get(there, there.removeprefix("docs/"))
        return found[1] + posixpath.relpath(there, posixpath.dirname(here) or ".")

    return LINK.sub(turned, markdown)
