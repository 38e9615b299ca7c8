"""Plugins: found, never listed; configured in one spelling, ``name:option=value,option=value``.

Every open set of unbatch (attacks, defences, analyses, metrics, cases, layer rules) is a folder of the package and an
entry-point group ``unbatch.<folder>`` for third parties. A plugin is a frozen pydantic model whose fields are its
options; from that one declaration come validation, the command line, JSON and the reference pages.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
import re
import warnings
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any, ClassVar, Self, overload

from pydantic import BaseModel, ConfigDict, ValidationError

from unbatch.errors import UnbatchError


@dataclass(frozen=True)
class Option:
    """One option of a plugin, as the reference pages and ``unbatch show`` print it."""

    name: str
    type: str
    default: str
    description: str


class Plugin(BaseModel):
    """A named, configured, immutable member of an open set."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: ClassVar[str]
    kind: ClassVar[str] = "plugin"
    folder: ClassVar[str] = ""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        if "name" not in cls.__dict__:
            cls.name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", cls.__name__).lower()

    @overload
    @classmethod
    def find(cls) -> dict[str, type[Self]]: ...
    @overload
    @classmethod
    def find(cls, name: str) -> type[Self]: ...
    @classmethod
    def find(cls, name: str | None = None) -> dict[str, type[Self]] | type[Self]:
        """All plugins of this set by name, or the one called `name`.

        Raises ValueError: no plugin has that name; the message names the nearest.
        """
        known: dict[str, type[Self]] = {k: v for k, v in _discover(cls.folder).items() if issubclass(v, cls)}
        if name is None:
            return known
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise UnbatchError(f"unknown {cls.kind} {name!r}.{hint} Known: {', '.join(known) or 'none'}.")
        return known[name]

    @classmethod
    def parse(cls, spec: str) -> Self:
        """The plugin that `spec` spells: ``name`` or ``name:option=value,option=value``.

        Booleans are ``true`` and ``false``, an absent value is ``none``.
        Raises ValueError: unknown name, unknown option, or a value out of range; the message lists what is allowed.
        """
        name, _, tail = spec.strip().partition(":")
        plugin = cls.find(name.strip())
        values: dict[str, str | bool | None] = {}
        for item in filter(None, (part.strip() for part in tail.split(","))):
            key, equals, text = (part.strip() for part in item.partition("="))
            if not equals:
                raise UnbatchError(f"{spec!r}: {item!r} is not option=value. {plugin._options_in_words()}")
            if key in values:
                raise UnbatchError(f"{spec!r}: option {key!r} is given twice; keep one.")
            values[key] = plugin._value(spec, key, text)
        try:
            return plugin.model_validate(values)
        except ValidationError as error:
            raise UnbatchError(f"{spec!r}: {_words(error)} {plugin._options_in_words()}") from None

    @classmethod
    def options(cls) -> tuple[Option, ...]:
        """The options in order of declaration."""
        return tuple(
            Option(key, _type_words(field.annotation, field.metadata), _spell(field.default), field.description or "")
            for key, field in cls.model_fields.items()
        )

    @classmethod
    def _value(cls, spec: str, key: str, text: str) -> str | bool | None:
        field = cls.model_fields.get(key)
        if field is not None and field.annotation is bool:
            if text not in ("true", "false"):
                raise UnbatchError(f"{spec!r}: {key} is true or false, not {text!r}.")
            return text == "true"
        return None if text == "none" else text

    @classmethod
    def _options_in_words(cls) -> str:
        lines = [f"{o.name} ({o.type}, default {o.default}): {o.description}" for o in cls.options()]
        return f"Options of {cls.name}: " + ("; ".join(lines) if lines else "none") + "."

    def __str__(self) -> str:
        """The shortest spelling: options at their defaults are left out."""
        return self._spelt({k: v for k, v in self if v != type(self).model_fields[k].default})

    def _spelt(self, options: dict[str, Any]) -> str:
        return self.name + (":" + ",".join(f"{k}={_spell(v)}" for k, v in options.items()) if options else "")


def _spell(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else str(value)


def _type_words(annotation: Any, metadata: list[Any]) -> str:
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    text = text.replace("typing.", "").replace("NoneType", "none").replace("None", "none")
    literal = re.fullmatch(r"Literal\[(.*)\]", text)
    if literal:
        return literal[1].replace("'", "").replace(", ", " | ")
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    bounds = [f"{sign} {getattr(m, key):g}" for m in metadata for key, sign in signs.items() if hasattr(m, key)]
    return " ".join([text, *bounds])


def _words(error: ValidationError) -> str:
    def one(problem: Any) -> str:
        key = ".".join(map(str, problem["loc"]))
        if problem["type"] == "extra_forbidden":
            return f"unknown option {key!r}."
        where = f"option {key}={_spell(problem['input'])}: " if key else ""
        return where + str(problem["msg"]).removeprefix("Value error, ") + "."

    return " ".join(one(problem) for problem in error.errors())


def _plugins_of(module: ModuleType) -> list[type[Plugin]]:
    return [
        member
        for member in vars(module).values()
        if isinstance(member, type)
        and issubclass(member, Plugin)
        and member.__module__ == module.__name__
        and not inspect.isabstract(member)
    ]


@cache
def _discover(folder: str) -> dict[str, type[Any]]:
    if not folder:
        raise TypeError("find and parse stand on a set of plugins: Attack, Defence, Analysis, Metric, Case, LayerRule.")
    package = importlib.import_module(f"unbatch.{folder}")
    found: list[type[Plugin]] = []
    for info in pkgutil.iter_modules(package.__path__):
        found += _plugins_of(importlib.import_module(f"{package.__name__}.{info.name}"))
    for point in entry_points(group=f"unbatch.{folder}"):
        try:
            found.append(point.load())
        except Exception as error:  # a stranger's package must not take the tool down with it
            warnings.warn(f"plugin {point.name!r} of {point.value!r} cannot be imported: {error}", stacklevel=2)
    return {plugin.name: plugin for plugin in sorted(found, key=lambda plugin: plugin.name)}
