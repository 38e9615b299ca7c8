"""Plugins: found, never listed; configured in one spelling, ``name:option=value,option=value``.

Every open set of unbatch (attacks, defences, analyses, signs, metrics, cases, layer rules) is a folder of the package and
an entry-point group ``unbatch.<folder>`` for third parties. A plugin is a frozen pydantic model whose fields are its
options; from that one declaration come validation, the command line, JSON and the reference pages.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from types import ModuleType, UnionType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypeVar, Union, get_args, get_origin, overload

from pydantic import BaseModel, ConfigDict, ValidationError

from unbatch.errors import UnbatchError


@dataclass(frozen=True)
class Option:
    """One option of a plugin, as the reference pages and ``unbatch show`` print it.

    >>> Option("tol", "float > 0", "0.1", "what counts as zero").name
    'tol'
    """

    name: str
    type: str
    default: str
    description: str


class Options(BaseModel):
    """Numbers and choices by name, each with what it takes; they cannot be changed, and wrong ones are an error of ours.

    >>> from unbatch import Protocol
    >>> Protocol(local_steps=4)
    Protocol(local_steps=4)
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    formerly: ClassVar[dict[str, str]] = {}  # options that had another name: that name, and the one that they have

    if not TYPE_CHECKING:  # which reads the options off the fields

        def __init__(self, /, **options: Any) -> None:
            """Raises UnbatchError: unknown option, or a value out of range; the message lists what is allowed."""
            try:
                super().__init__(**options)
            except ValidationError as error:
                raise UnbatchError(f"{_words(error, self.formerly)} {self._options_in_words()}") from None

    @classmethod
    def options(cls) -> tuple[Option, ...]:
        """The options in order of declaration.

        >>> from unbatch import Defence
        >>> [(option.name, option.type, option.default) for option in Defence.find("prune").options()]
        [('share', 'float >= 0 < 1', '0.9')]
        """
        return tuple(
            Option(key, _type_words(field.annotation, field.metadata), _spell(field.default), field.description or "")
            for key, field in cls.model_fields.items()
        )

    @classmethod
    def _options_in_words(cls) -> str:
        lines = [f"{o.name} ({o.type}, default {o.default}): {o.description}" for o in cls.options()]
        return f"Options of {getattr(cls, 'name', cls.__name__)}: " + ("; ".join(lines) if lines else "none") + "."

    def __repr__(self) -> str:
        """How it is built; options at their defaults are left out."""
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self._chosen().items())})"

    def _chosen(self) -> dict[str, Any]:
        return {k: v for k, v in self if v != type(self).model_fields[k].default}


class Plugin(Options):
    """A named, configured, immutable member of an open set.

    Its fields are its options, and `str` spells it as `parse` reads it:

    >>> from unbatch.attacks import Unmix
    >>> Unmix(partial=True), str(Unmix(partial=True)), str(Unmix())
    (Unmix(partial=True), 'unmix:partial=true', 'unmix')
    """

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

        >>> from unbatch import Defence
        >>> Defence.find("clip").__name__
        'Clip'

        Raises UnbatchError: no plugin has that name; the message names the nearest.
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

        >>> from unbatch import Defence
        >>> Defence.parse("noise:sigma=0.1")
        Noise(sigma=0.1)

        Raises UnbatchError: unknown name, unknown option, or a value out of range; the message lists what is allowed.
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
            return plugin(**values)
        except UnbatchError as error:
            raise UnbatchError(f"{spec!r}: {error}") from None

    @classmethod
    def several(cls, given: OneOrMore[Self]) -> list[Self]:
        """The plugins that `given` names: one or several, each spelt (`parse`) or built.

        >>> from unbatch import Attack
        >>> from unbatch.attacks import BiasRatio
        >>> Attack.several("unmix"), Attack.several(["unmix", BiasRatio(tol=0.01)])
        ([Unmix()], [Unmix(), BiasRatio(tol=0.01)])

        Raises UnbatchError: a spelling is wrong (see `parse`), or something is no plugin of this set.
        """
        each = [given] if isinstance(given, (str, Plugin, type)) or not isinstance(given, Iterable) else given
        return [cls.parse(one) if isinstance(one, str) else cls._built(one) for one in each]

    @classmethod
    def _built(cls, one: object) -> Self:
        if isinstance(one, cls):
            return one
        article = "an" if cls.kind[0] in "aeiou" else "a"
        if isinstance(one, type) and issubclass(one, cls):
            raise UnbatchError(f"{one.__name__} is a class; give {one.__name__}(), or its spelling {one.name!r}.")
        what = f"the {one.kind} {str(one)!r}" if isinstance(one, Plugin) else f"{one!r} ({type(one).__name__})"
        raise UnbatchError(f"{what} is no {cls.kind}; give {article} {cls.kind}'s spelling, or one that is built.")

    @classmethod
    def _value(cls, spec: str, key: str, text: str) -> str | bool | None:
        field = cls.model_fields.get(key)
        if field is not None and field.annotation is bool:
            if text not in ("true", "false"):
                raise UnbatchError(f"{spec!r}: {key} is true or false, not {text!r}.")
            return text == "true"
        return None if text == "none" else text

    def __str__(self) -> str:
        """The shortest spelling: options at their defaults are left out."""
        return self._spelt(self._chosen())

    def _spelt(self, options: dict[str, Any]) -> str:
        return self.name + (":" + ",".join(f"{k}={_spell(v)}" for k, v in options.items()) if options else "")


P = TypeVar("P", bound=Plugin)
OneOrMore = Union[str, P, Iterable[Union[str, P]]]  # noqa: UP007 (evaluated where P is still open)


def by_class_name(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of an open set's package: its plugins by the names of their classes, imported on use.

    Third parties' plugins are found as well; no list of names is kept.

    >>> from unbatch.defences import Clip
    >>> Clip(norm=2.0)
    Clip(norm=2.0)
    """
    folder = package.rpartition(".")[2]

    def found() -> dict[str, type[Any]]:
        return {plugin.__name__: plugin for plugin in _discover(folder).values()}

    def attribute(name: str) -> Any:
        # A lower-case name is a module or none at all: to look for it must not import the whole folder.
        if name[:1].isupper():
            known = found()
            if name in known:
                return known[name]
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise AttributeError(f"module {package!r} has no attribute {name!r}.{hint}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return attribute, lambda: sorted(found())


def _spell(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else str(value)


def _type_words(annotation: Any, metadata: list[Any]) -> str:
    """What values an option takes: ``int >= 1``, ``float > 0 | none``, ``mean | sum``."""
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    bounds = [f" {sign} {getattr(m, key):g}" for m in metadata for key, sign in signs.items() if hasattr(m, key)]
    return " | ".join(kind + "".join(bounds) * (kind in ("int", "float")) for kind in _kinds(annotation))


def _kinds(annotation: Any) -> list[str]:
    if annotation is type(None):
        return ["none"]
    if get_origin(annotation) is Literal:
        return [str(value) for value in get_args(annotation)]
    if get_origin(annotation) in (Union, UnionType):
        return [kind for part in get_args(annotation) for kind in _kinds(part)]
    return [annotation.__name__ if isinstance(annotation, type) else str(annotation)]


def _words(error: ValidationError, formerly: dict[str, str]) -> str:
    def one(problem: Any) -> str:
        key = ".".join(map(str, problem["loc"]))
        if problem["type"] == "extra_forbidden":
            return f"unknown option {key!r}{f'; it is called {formerly[key]!r} now' if key in formerly else ''}."
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
        raise TypeError(
            "find and parse stand on a set of plugins: Attack, Defence, Analysis, Sign, Metric, Case, LayerRule."
        )
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
