"""Graph: every call of a module or function that a network's forward runs, and which tensors flow between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class BatchSize:
    """A number among a call's arguments that is `times` the number of examples."""

    times: int = 1


@dataclass(eq=False)
class Value:
    """A tensor at one moment: the network's input, what a call gave, or a parameter, buffer or constant.

    Told apart by the tensor itself and how often it was written to, never by its memory: what is written in place is
    another value, and so layout and strides change nothing.
    """

    shape: tuple[int, ...]  # with two examples
    call: Call | None = None  # that gave it; none for the input and what is held
    held: Tensor | None = None  # the parameter, buffer or constant
    name: str = ""  # of a parameter or buffer
    fed: bool = True  # whether it comes from the network's input
    each: bool = True  # whether its first side counts the examples


@dataclass(eq=False)
class Call:
    """One call that ran: a layer of torch.nn as a whole, or a function that forward called itself.

    In `args` and `kwargs` values stand for tensors and `BatchSize` for numbers that count examples.
    """

    name: str  # the module's, or the function's behind the name of the module that called it
    ran: nn.Module | Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    line: str  # "file.py:12" of the forward that made the call; empty where nobody's source is seen
    gave: tuple[Value, ...] = ()
    alone: bool = True  # it returned one tensor and nothing else
    own_gradient: bool = False  # it ran inside an autograd function of the user's, so its gradient is not its own

    @property
    def given(self) -> list[Value]:
        """The values among its arguments, in order."""
        return [leaf for leaf in leaves((self.args, self.kwargs)) if isinstance(leaf, Value)]

    @property
    def parameters(self) -> tuple[str, ...]:
        """The network's names of the parameters that it computes with."""
        own = self.ran.named_parameters() if isinstance(self.ran, nn.Module) else ()
        held = (value.name for value in self.given if isinstance(value.held, nn.Parameter))
        inner = (f"{self.name}.{name}" if self.name else name for name, _ in own)
        return tuple(dict.fromkeys((*inner, *held)))

    @property
    def fed(self) -> bool:
        """Whether it computes from the network's input."""
        return any(value.fed for value in self.given)

    @property
    def where(self) -> str:
        """The call in words: its name and the line of code."""
        return f"{self.name!r} ({self.line})" if self.line else repr(self.name)


@dataclass(eq=False)
class Scope:
    """One run of a module that is made of others or has a forward of its own, from the value given to the one it gave."""

    name: str
    module: nn.Module
    given: Value | None = None  # None: not one tensor in, one tensor out
    gave: Value | None = None
    nested: bool = False  # other modules ran inside


@dataclass(frozen=True)
class Graph:
    """What a network runs, as a directed graph without circles: calls in the order in which they ran.

    >>> class Net(nn.Module):
    ...     def __init__(self) -> None:
    ...         super().__init__()
    ...         self.fc = nn.Linear(4, 4)
    ...     def forward(self, x: Tensor) -> Tensor:
    ...         return x + nn.functional.relu(self.fc(x))
    >>> from unbatch.network.tracing import trace
    >>> graph = trace(Net(), (4,))
    >>> [(call.name, len(call.given)) for call in graph.calls]
    [('fc', 1), ('relu', 1), ('add', 2)]
    >>> graph.calls[1].given[0] is graph.calls[0].gave[0], graph.output.call.name
    (True, 'add')
    >>> graph.calls[0].parameters, graph.calls[2].gave[0].shape  # of two examples
    (('fc.weight', 'fc.bias'), (2, 4))
    """

    input: Value
    output: Value
    calls: tuple[Call, ...]  # those that the output depends on
    scopes: tuple[Scope, ...]  # outer ones first

    def names(self) -> dict[int, str]:
        """By the identity of a parameter or buffer, its name."""
        given = (value for call in self.calls for value in call.given)
        return {id(value.held): value.name for value in given if value.name}


def leaves(tree: Any) -> Iterator[Any]:
    """What stands in nested tuples, lists, dictionaries and slices.

    >>> list(leaves(((1, [2]), {"a": slice(3, None)})))
    [1, 2, 3, None, None]
    """
    if isinstance(tree, tuple | list):
        for item in tree:
            yield from leaves(item)
    elif isinstance(tree, dict):
        yield from leaves(list(tree.values()))
    elif isinstance(tree, slice):
        yield from leaves((tree.start, tree.stop, tree.step))
    else:
        yield tree


def mapped(tree: Any, change: Callable[[Any], Any]) -> Any:
    """The same nest of tuples, lists, dictionaries and slices with every leaf changed.

    >>> mapped((1, {"a": [2]}), lambda leaf: 10 * leaf)
    (10, {'a': [20]})
    """
    if isinstance(tree, tuple):
        items = [mapped(item, change) for item in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else tuple(items)
    if isinstance(tree, list):
        return [mapped(item, change) for item in tree]
    if isinstance(tree, dict):
        return {key: mapped(item, change) for key, item in tree.items()}
    if isinstance(tree, slice):
        return slice(*(mapped(side, change) for side in (tree.start, tree.stop, tree.step)))
    return change(tree)
