"""Catalogue: every installed plugin in words, for `unbatch list`, `unbatch show` and the reference pages."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from unbatch.analysis import Analysis
from unbatch.attack import Attack
from unbatch.case import Case
from unbatch.defence import Defence
from unbatch.layer import LayerRule
from unbatch.metric import Metric
from unbatch.plugin import Plugin

SETS: tuple[type[Plugin], ...] = (Attack, Defence, Analysis, Metric, Case, LayerRule)
KINDS: Mapping[str, Callable[[], dict[str, type[Plugin]]]] = {kind.folder: kind.find for kind in SETS}
_FACTS = ("family", "guarantee", "threat_model", "paper", "source", "needs", "uses", "identity", "unit", "kinds")


def summary(plugin: type[Plugin]) -> str:
    """The first sentence of its docstring."""
    return " ".join((inspect.getdoc(plugin) or "").split("\n\n")[0].split())


def facts(plugin: type[Plugin]) -> dict[str, str]:
    """Its class attributes, in words."""
    return {name.replace("_", " "): _words(getattr(plugin, name)) for name in _FACTS if hasattr(plugin, name)}


def page(name: str) -> str:
    """All about the plugin called `name`. Raises ValueError: no plugin of any kind has that name."""
    found = [plugins()[name] for plugins in KINDS.values() if name in plugins()]
    if not found:
        known = sorted(known for plugins in KINDS.values() for known in plugins())
        raise ValueError(f"nothing is called {name!r}. Known: {', '.join(known)}.")
    return "\n\n".join(_page(plugin) for plugin in found)


def _page(plugin: type[Plugin]) -> str:
    lines = [f"{plugin.name} ({plugin.kind})", "", inspect.getdoc(plugin) or "", ""]
    lines += [f"{key}: {value}" for key, value in facts(plugin).items() if value]
    options = plugin.options()
    lines += ["", "options:" if options else "no options"]
    lines += [f"  {o.name} = {o.default}  ({o.type})  {o.description}" for o in options]
    return "\n".join(lines)


def _words(value: Any) -> str:
    if isinstance(value, (frozenset, set)):
        return ", ".join(sorted(map(str, value))) or "nothing"
    if isinstance(value, tuple):
        return ", ".join(item.__name__ if isinstance(item, type) else str(item) for item in value)
    return str(value)
