"""Write the pages that come from the code: docs/generated/*.md and docs/flags.md. A test compares them.

python docs/generate.py            writes
python docs/generate.py --check    exits with 1 where a page is out of date
"""

import inspect
import sys
from pathlib import Path

from unbatch.attack import Attack
from unbatch.catalogue import KINDS, facts, summary
from unbatch.checks import CHECKS
from unbatch.plugin import Plugin
from unbatch.suites import SUITES

HERE = Path(__file__).parent


def plugin_section(plugin: type[Plugin]) -> str:
    lines = [f"## {plugin.name}", "", inspect.getdoc(plugin) or "", ""]
    lines += [f"- {key}: {value}" for key, value in facts(plugin).items() if value]
    if plugin.options():
        lines += ["", "| option | type | default | |", "|---|---|---|---|"]
        lines += [
            f"| `{o.name}` | {o.type.replace('|', chr(92) + '|')} | `{o.default}` | {o.description} |"
            for o in plugin.options()
        ]
    return "\n".join(lines)


def reference(folder: str) -> str:
    found = KINDS[folder]()
    title = folder.capitalize()
    contents = "\n".join(f"- [{name}](#{name}): {summary(plugin)}" for name, plugin in found.items())
    return f"# {title}\n\n{contents}\n\n" + "\n\n".join(plugin_section(plugin) for plugin in found.values()) + "\n"


def matrix() -> str:
    lines = [
        "# Attack matrix",
        "",
        "What each attack promises, and what it must know. `exact`: within its bound at rounding error; `bounded`: every",
        "example carries an error that holds; `heuristic`: a guess.",
        "",
        "| attack | family | guarantee | needs | uses where known | threat model | suite |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, attack in Attack.find().items():
        suites = ", ".join(key for key, names in SUITES.items() if name in names)
        needs, uses = (", ".join(sorted(known)) or "nothing" for known in (attack.needs, attack.uses))
        cells = (f"`{name}`", attack.family, attack.guarantee, needs, uses, attack.threat_model, suites)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def flags() -> str:
    sections = [f"## {c.name}\n\n- *Raised if* {c.raised_if}.\n- *Means.* {c.means}\n- *Do.* {c.do}" for c in CHECKS]
    head = "# Flags\n\nWhat an audit says about itself. Every flag stands in the report with these words.\n\n"
    return head + "\n\n".join(sections) + "\n"


def pages() -> dict[Path, str]:
    generated = {HERE / "generated" / f"{folder}.md": reference(folder) for folder in KINDS}
    return generated | {HERE / "generated" / "matrix.md": matrix(), HERE / "flags.md": flags()}


def stale() -> list[Path]:
    return [path for path, text in pages().items() if not path.exists() or path.read_text() != text]


if __name__ == "__main__":
    old = stale()
    if "--check" in sys.argv:
        sys.exit("\n".join(f"out of date: {path}; run `make docs`" for path in old) or 0)
    for path in old:
        path.parent.mkdir(exist_ok=True)
        path.write_text(pages()[path])
