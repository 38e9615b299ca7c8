"""Catalogue: every installed plugin in words, for `unbatch list`, `unbatch show` and the reference pages."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Mapping
from typing import Any

from unbatch.analysis import Analysis
from unbatch.attack import ActiveAttack, Attack, Guarantee
from unbatch.case import Case
from unbatch.defence import Defence
from unbatch.errors import UnbatchError
from unbatch.layer import LayerRule
from unbatch.metric import Metric
from unbatch.plugin import Plugin
from unbatch.sign import Sign

SETS: tuple[type[Plugin], ...] = (Attack, Defence, Analysis, Sign, Metric, Case, LayerRule)
KINDS: Mapping[str, Callable[[], dict[str, type[Plugin]]]] = {kind.folder: kind.find for kind in SETS}
PURPOSES: Mapping[str, str] = {  # of a set, by its folder: what it is for, and how one is named on the command line
    "attacks": "read examples out of an update (audit --attack NAME)",
    "defences": "change what a client sends, or how it trains (audit --defence NAME, or --remedy NAME to compare)",
    "analyses": "say what an update gives away, or how near any attacker can come (risk --analysis NAME)",
    "signs": "say that a received model was made to read its data; all are read, and none is named (inspect)",
    "metrics": "say how near a recovered example is to the private one (audit --metric NAME)",
    "cases": "clients with data that comes along, to try all this on (audit NAME)",
    "layers": "what a layer's output and gradient say of its input; found by the layer's type, never named",
}
PROMISES: Mapping[Guarantee, str] = {
    Guarantee.EXACT: "every example it returns lies within its stated bound, at rounding error",
    Guarantee.BOUNDED: "every example it returns carries an error that holds",
    Guarantee.HEURISTIC: "a guess, which proves nothing",
}
WIDTH = 100  # columns of a page
_FACTS = (
    "family",
    "guarantee",
    "threat_model",
    "paper",
    "honest",
    "limit",
    "source",
    "needs",
    "uses",
    "identity",
    "unit",
    "kinds",
)


def first_sentence(plugin: type[Plugin]) -> str:
    """The first sentence of its docstring.

    >>> from unbatch.defences import Noise
    >>> first_sentence(Noise)
    'Adds normal noise to every entry of the update.'
    """
    return " ".join((inspect.getdoc(plugin) or "").split("\n\n")[0].split())


def facts(plugin: type[Plugin]) -> dict[str, str]:
    """Its class attributes, in words.

    >>> from unbatch.attacks import Unmix
    >>> facts(Unmix)["needs"]
    'input_shape'
    """
    return {name.replace("_", " "): _words(getattr(plugin, name)) for name in _FACTS if hasattr(plugin, name)}


def mark(plugin: type[Plugin]) -> str:
    """What sets it apart from others of its set, in a word or two: an attack's guarantee and family, a metric's direction.

    >>> from unbatch.attacks import Unmix
    >>> mark(Unmix)
    'exact, span'
    """
    if issubclass(plugin, Attack):
        active = ", chooses the model" if issubclass(plugin, ActiveAttack) else ""
        return f"{plugin.guarantee}, {plugin.family}{active}"
    if issubclass(plugin, Metric):
        return (
            f"{plugin.unit + ', ' if plugin.unit else ''}{'higher' if plugin.higher_is_better else 'lower'} is nearer"
        )
    return "random" if issubclass(plugin, Defence) and plugin.random else ""


def page(name: str) -> str:
    """All about the plugin called `name`. Raises UnbatchError: no plugin of any kind has that name.

    >>> print(page("prune").partition("for example:")[2])
    <BLANKLINE>
      unbatch audit CASE --defence prune
      unbatch.defences.Prune()    in Python
    """
    found = [plugins()[name] for plugins in KINDS.values() if name in plugins()]
    if not found:
        known = sorted(known for plugins in KINDS.values() for known in plugins())
        raise UnbatchError(f"nothing is called {name!r}. Known: {', '.join(known)}.")
    return "\n\n\n".join(_page(plugin) for plugin in found)


def _page(plugin: type[Plugin]) -> str:
    title = f"{plugin.name} ({plugin.kind})"
    lines = [title, "=" * len(title), "", inspect.getdoc(plugin) or "", ""]
    for key, value in facts(plugin).items():
        value = f"{value} ({PROMISES[Guarantee(value)]})" if key == "guarantee" else value
        if value:
            lines += textwrap.wrap(f"{key}: {value}", WIDTH, subsequent_indent="  ", break_on_hyphens=False)
    lines += ["", *_options(plugin), *_ways(plugin)]
    return "\n".join(lines).rstrip()


def _options(plugin: type[Plugin]) -> list[str]:
    """One line an option, in columns; what it takes stands below where there is no room for it."""
    options = plugin.options()
    if not options:
        return ["no options", ""]
    wide = max(len(f"{o.name} = {o.default}") for o in options)
    lines = ["options:"]
    for o in options:
        start = f"  {f'{o.name} = {o.default}':{wide}}  "
        words = f"{o.description} ({o.type})"
        lines += textwrap.wrap(start + words, WIDTH, subsequent_indent=" " * len(start), break_on_hyphens=False)
    return [*lines, ""]


def _ways(plugin: type[Plugin]) -> list[str]:
    """How it is named on the command line and in Python; nothing of a layer rule, which is never named."""
    if issubclass(plugin, LayerRule):
        return []
    if issubclass(plugin, Attack) and hasattr(plugin, "demo"):
        demo = plugin.demo
        spelling = f"{plugin.name}:{demo.options}" if demo.options else plugin.name
        words = ["audit", demo.case, "--attack", spelling]
        words += [word for defence in demo.defences for word in ("--defence", defence)]
        words += [word for known in demo.knows for word in ("--knows", known)]
    elif issubclass(plugin, Case):
        words = ["audit", f"{plugin.name}:batch=4"]
    elif issubclass(plugin, Analysis):
        words = ["risk", "CASE", "--analysis", plugin.name]
    else:
        words = ["audit", "CASE", f"--{plugin.kind}", plugin.name]
    python = f"unbatch.{plugin.folder}.{plugin.__name__}()"
    ours = plugin.__module__.startswith("unbatch.")
    return ["for example:", f"  unbatch {' '.join(words)}", *([f"  {python}    in Python"] if ours else [])]


def _words(value: Any) -> str:
    if isinstance(value, (frozenset, set)):
        return ", ".join(sorted(map(str, value))) or "nothing"
    if isinstance(value, tuple):
        return ", ".join(item.__name__ if isinstance(item, type) else str(item) for item in value)
    return str(value)
