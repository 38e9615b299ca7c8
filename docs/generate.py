"""Write the pages that come from the code: docs/generated/*.md and docs/flags.md. A test compares them.

python docs/generate.py            writes
python docs/generate.py --check    exits with 1 where a page is out of date
"""

import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import unbatch
from unbatch.attack import Attack
from unbatch.auditing.checks import CHECKS
from unbatch.auditing.client import observe
from unbatch.auditing.suites import SUITES
from unbatch.command.catalogue import KINDS, facts, first_sentence
from unbatch.errors import NotApplicable
from unbatch.loss import loss_named
from unbatch.models.small import ACTIVATIONS
from unbatch.numerics.moments.hermite import coefficients
from unbatch.plugin import Plugin

HERE = Path(__file__).parent


def prose(thing: object) -> str:
    """A docstring as Markdown: its examples, each up to the next empty line, in fences."""
    text = inspect.getdoc(thing) or ""
    return re.sub(r"(?m)^>>> .*(?:\n.+)*", lambda found: f"```pycon\n{found[0]}\n```", text)


def plugin_section(plugin: type[Plugin]) -> str:
    lines = [f"## {plugin.name}", "", prose(plugin), ""]
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
    contents = "\n".join(f"- [{name}](#{name}): {first_sentence(plugin)}" for name, plugin in found.items())
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


class _Two(nn.Module):
    """A two-layer network with normal weights, s between."""

    def __init__(self, s: Callable[[Tensor], Tensor], k: int, rng: torch.Generator) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(400, 8, generator=rng, dtype=torch.float64))
        self.head = nn.Parameter(torch.randn(k, 400, generator=rng, dtype=torch.float64) / 20)
        self.s = s

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = nn.functional.linear(self.s(nn.functional.linear(x, self.first)), self.head)
        return out


def leaks(s: Callable[[Tensor], Tensor], k: int) -> str:
    """What tensor-moment does with k outputs and this activation: the order it takes, or its obstacle."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(2, 8, generator=rng, dtype=torch.float64)
    y = torch.tensor([[3.0], [-3.0]]).double().expand(2, k)
    obs, _ = observe(_Two(s, k, rng), loss_named("squared-error"), x / x.norm(dim=1, keepdim=True), y)
    try:
        found = Attack.parse("tensor-moment:norm=1")(obs)
    except NotApplicable as words:
        return str(words).split("leaks ")[-1].rstrip(".")
    return f"order {found.trace['order']}" + (", up to sign" if "sign" in found.up_to else "")


def parity() -> str:
    more: dict[str, Callable[[Tensor], Tensor]] = {
        "erf(z / sqrt 2)": lambda t: torch.erf(t / 2**0.5),
        "z^2": torch.square,
        "z^2 + z^3": lambda t: t**2 + t**3,
    }
    lines = [
        "# Hermite coefficients and what leaks",
        "",
        "E s^(p)(Z) for Z ~ N(0, 1), by quadrature, and what `tensor-moment` does with two examples of unit norm on a",
        "network without biases. Zeros are exact. With a bias in the first layer sign and scale are known as well.",
        "",
        "| activation | p = 1 | 2 | 3 | 4 | one output | two outputs |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, s in {**{name: kind() for name, kind in ACTIVATIONS.items()}, **more}.items():
        cells = [f"{c:.3f}" if abs(c) > 1e-9 else "0" for c in coefficients(s)[1:].tolist()]
        lines.append(f"| {name} | {' | '.join(cells)} | {leaks(s, 1)} | {leaks(s, 2)} |")
    return "\n".join(lines) + "\n"


PLACE = re.compile(r"\bunbatch(?:\.[a-z_]+)+\.(?=[A-Z])")  # of a class in an annotation: its module


class Words(str):
    """An annotation that prints as it is written in the source, without quotes."""

    __repr__ = str.__str__


def call(name: str, thing: Callable[..., object]) -> str:
    """How `thing` is called, as its source spells it; one argument a line where that is long."""
    if isinstance(thing, type) and issubclass(thing, Exception):
        return name
    found = inspect.signature(thing)

    def bare(annotation: object) -> object:
        return Words(annotation) if isinstance(annotation, str) else annotation

    given = [p.replace(annotation=bare(p.annotation)) for key, p in found.parameters.items() if key != "self"]
    whole = str(found.replace(parameters=given, return_annotation=bare(found.return_annotation)))
    spelt = PLACE.sub("", name + whole)
    if len(spelt) <= 100:
        return spelt
    lines = [PLACE.sub("", str(p)) for p in given]
    keyword = [p.kind is inspect.Parameter.KEYWORD_ONLY for p in given]
    if any(keyword):
        lines.insert(keyword.index(True), "*")
    return f"{name}(\n" + "".join(f"    {line},\n" for line in lines) + ")" + spelt.rpartition(")")[2]


def public_section(name: str) -> str:
    thing = getattr(unbatch, name)
    lines = [f"## {name}", "", "```python", call(name, thing), "```", "", prose(thing)]
    members = vars(thing).items() if inspect.isclass(thing) else ()
    for key, member in members:
        inner = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        if (key.startswith("_") and key != "__call__") or not inspect.isfunction(inner) or not inner.__doc__:
            continue
        spelt = f"{name}.{key}" if isinstance(member, property) else call(f"{name}.{key}", getattr(thing, key))
        lines += ["", f"### {name}.{key}", "", "```python", spelt, "```", "", prose(inner)]
    return "\n".join(lines)


def api() -> str:
    """The Python reference: every public name of `import unbatch`. Part of the site alone, never stored."""
    names = [name for name in unbatch.__all__ if not name.startswith("_")]
    order = sorted(names, key=lambda name: (name[0].isupper(), name.lower()))
    contents = "\n".join(f"- [{n}](#{n.lower()}): {inspect.getdoc(getattr(unbatch, n)).splitlines()[0]}" for n in order)
    head = f"# Python\n\nEvery public name of `import unbatch`: functions first.\n\n{contents}\n\n"
    return head + "\n\n".join(map(public_section, order)) + "\n"


def pages() -> dict[Path, str]:
    generated = {HERE / "generated" / f"{folder}.md": reference(folder) for folder in KINDS}
    return generated | {
        HERE / "generated" / "matrix.md": matrix(),
        HERE / "generated" / "parity.md": parity(),
        HERE / "flags.md": flags(),
    }


def stale() -> list[Path]:
    return [path for path, text in pages().items() if not path.exists() or path.read_text() != text]


if __name__ == "__main__":
    old = stale()
    if "--check" in sys.argv:
        sys.exit("\n".join(f"out of date: {path}; run `make docs`" for path in old) or 0)
    for path in old:
        path.parent.mkdir(exist_ok=True)
        path.write_text(pages()[path])
