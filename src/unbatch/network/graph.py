"""Graph: every call of a module or function that a network's forward runs, and which tensors flow between them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from unbatch.errors import NotApplicable, UnbatchError
from unbatch.network.dense import forward

PROBES = 2, 3  # examples of the two runs that are compared: what is 2 in one and 3 in the other is the batch's size
_SOURCES = Path(torch.__file__).parent, Path(__file__).parents[1]  # whose frames are nobody's forward
# What gives the very numbers that it is given, whatever their layout in memory; a cast does so where nothing changes.
_SAME = {
    torch.clone,
    *(
        getattr(Tensor, name)
        for name in [
            "clone",
            "contiguous",
            "to",
            "type",
            "type_as",
            "float",
            "double",
            "half",
            "bfloat16",
            "cpu",
            "cuda",
        ]
    ),
}


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
    >>> graph = trace(Net(), (4,))
    >>> [(call.name, len(call.given)) for call in graph.calls]
    [('fc', 1), ('relu', 1), ('add', 2)]
    >>> graph.calls[1].given[0] is graph.calls[0].gave[0], graph.output.call.name
    (True, 'add')
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


def trace(model: nn.Module, input_shape: tuple[int, ...], mode: Literal["train", "eval"] = "eval") -> Graph:
    """What a network runs, modules and functions alike, by running it twice and listening to both.

    Layers of torch.nn are calls as a whole, and so is every function of torch that another module's forward calls. The
    second run has another number of examples and other values: where it does not run the same calls with the same
    numbers, the network depends on its data in a way that no graph shows.
    model: its buffers are the same afterwards. input_shape: of one example.
    Raises NotApplicable: the two runs differ, or a tensor comes from what cannot be heard, with the line of code;
    UnbatchError: its forward fails.

    >>> [call.name for call in trace(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), (2, 2)).calls]
    ['0', '1']
    """
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    rng = torch.Generator().manual_seed(0)
    probes = (
        torch.rand(PROBES[0], *input_shape, generator=rng),
        2 * torch.rand(PROBES[1], *input_shape, generator=rng) - 1,
    )
    with torch.random.fork_rng(devices=[]):  # dropout draws
        first = _Listener(model).hear(probes[0], mode)
        try:
            second = _Listener(model).hear(probes[1], mode)
        except UnbatchError as error:
            raise NotApplicable(
                f"the network is no chain of layers: it runs on {PROBES[0]} examples between 0 and 1, and not on "
                f"{PROBES[1]} between -1 and 1: {error}"
            ) from error
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(kept[name])
    if len(first.calls) != len(second.calls):
        raise NotApplicable("the network is no chain of layers: its forward runs other code for other inputs.")
    origin: dict[Value, Value] = {}
    for call, again in zip(first.calls, second.calls, strict=True):
        _agree(call, again, origin)
    live, calls = {first.output}, list[Call]()
    for call in reversed(first.calls):
        if any(value in live for value in call.gave):
            calls.insert(0, call)
            live.update(call.given)
    return Graph(first.input, first.output, tuple(calls), tuple(first.scopes))


def _agree(call: Call, again: Call, origin: dict[Value, Value]) -> None:
    """Write into the first run's call what the second tells: which numbers are the batch's size, which values are of one
    example. Raises NotApplicable: they are not the same call.
    """
    differs = NotApplicable(
        f"the network is no chain of layers: what {call.where} computes depends on the inputs in a way that no graph shows."
    )
    pairs = list(leaves((call.args, call.kwargs))), list(leaves((again.args, again.kwargs)))
    if call.ran != again.ran or len(pairs[0]) != len(pairs[1]) or len(call.gave) != len(again.gave):
        raise differs
    found = []
    for own, other in zip(*pairs, strict=True):
        if isinstance(own, Value):
            if not isinstance(other, Value) or not _corresponds(own, other, origin):
                raise differs
        elif type(own) is int and type(other) is int and own != other:
            times = own // PROBES[0]
            if (own, other) != (times * PROBES[0], times * PROBES[1]):
                raise differs
            own = BatchSize(times)
        elif not _equal(own, other):
            raise differs
        found.append(own)
    following = iter(found)
    call.args, call.kwargs = mapped((call.args, call.kwargs), lambda leaf: next(following))
    for value, other in zip(call.gave, again.gave, strict=True):
        origin[other] = value
        value.each = value.shape[:1] == PROBES[:1] and other.shape == (PROBES[1], *value.shape[1:])


def _equal(own: Any, other: Any) -> bool:
    """Whether two arguments that are no tensors say the same."""
    try:
        return bool(own is other or own == other or (own != own and other != other))  # NaN is not equal to itself
    except (ValueError, RuntimeError):  # arrays
        return repr(own) == repr(other)


def _corresponds(own: Value, other: Value, origin: Mapping[Value, Value]) -> bool:
    """Whether two runs' values are the same one."""
    if own.held is None or other.held is None:
        return (own.held is other.held) and (origin.get(other) is own or (own.call is other.call is None))
    if own.held is other.held:
        return True
    return not (own.name or other.name) and own.shape == other.shape and torch.equal(own.held, other.held)


@dataclass(eq=False)
class _Heard:
    """One run."""

    input: Value
    output: Value
    calls: list[Call]
    scopes: list[Scope]


def leaf(module: nn.Module) -> bool:
    """Whether a module is one call as a whole: a layer of torch.nn, or one whose weight torch computes.

    >>> leaf(nn.Linear(1, 1)), leaf(nn.Sequential())
    (True, False)
    """
    home, inner = type(module).__module__, any(name != "parametrizations" for name, _ in module.named_children())
    own = home.startswith("torch.nn.modules.") and home != nn.Sequential.__module__
    return own or (not inner and parametrize.is_parametrized(module))


class _Listener(TorchFunctionMode):
    """Hears every call while a model runs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.modules = {module: name for name, module in model.named_modules()}
        self.values: dict[tuple[int, int], Value] = {}  # by a tensor's identity, and how often it was written to
        self.kept: list[Tensor] = []  # lest another tensor takes over an identity
        self.held: dict[int, Value] = {}
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            self.held[id(tensor)] = Value(tuple(tensor.shape), held=tensor, name=name, fed=False, each=False)
        self.calls, self.scopes = list[Call](), list[Scope]()
        self.open: list[Scope] = []
        self.deaf = False  # while hooks of this class look at tensors
        self.closed = 0  # calls of torch.nn that are running: what they do inside is theirs
        self.taken = set(self.modules.values())
        self.flaw = ""  # why what was heard is not all that ran

    def hear(self, probe: Tensor, mode: Literal["train", "eval"]) -> _Heard:
        """One run on the probe, in that mode. Raises NotApplicable: it takes other than one tensor."""
        heard = [module for module in self.modules if not isinstance(module, torch.jit.ScriptModule)]  # takes no hooks
        hooks = [module.register_forward_pre_hook(self._begin, with_kwargs=True) for module in heard]
        hooks += [module.register_forward_hook(self._end, with_kwargs=True) for module in heard]
        self.result: Value | None = None
        self.input = Value(tuple(probe.shape))
        try:
            with self:
                outputs = forward(self.model, probe, mode)
        finally:
            for hook in hooks:
                hook.remove()
        if self.model not in heard:
            raise NotApplicable("the network is no chain of layers: a scripted module does not tell what it runs.")
        output = self.result
        if self.flaw:
            raise NotApplicable(f"the network is no chain of layers: {self.flaw}.")
        if output is None or not isinstance(outputs, Tensor):
            raise NotApplicable("the network is no chain of layers: it takes other than one tensor.")
        if not output.fed:
            raise NotApplicable(
                "the network is no chain of layers: its output is not seen to come from its input: they are unrelated, or "
                "something lies between that torch does not announce, such as another library or a compiled part."
            )
        return _Heard(self.input, output, self.calls, self.scopes)

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if self.closed or self.deaf or not self.open:
            return func(*args, **kwargs)
        found = _found((args, kwargs))
        out = func(*args, **kwargs)
        moments = [leaf for leaf in leaves(found) if isinstance(leaf, _Moment)]
        written = [m.tensor for m in moments if m.tensor._version != m.version and id(m.tensor) not in self.held]
        gave = [leaf for leaf in leaves(out) if isinstance(leaf, Tensor)]
        gave += [t for t in written if all(t is not other for other in gave)]
        if gave:
            given = self._values(found)
            if not self._aliased(func, given, args, gave):
                self._note(func, self._named(func), given, gave, gave[0] if len(gave) == 1 and out is None else out)
        return out

    def _aliased(self, func: Any, given: Any, args: Sequence[Any], gave: Sequence[Tensor]) -> bool:
        """Whether a call gave what it was given, the same numbers of the same type; then it is that value."""
        first, out = (args[0] if args else None), gave[0]
        if len(gave) > 1 or not isinstance(first, Tensor):
            return False
        value = given[0][0]
        if out is first and (id(out), out._version) in self.values and self.values[id(out), out._version] is value:
            return True
        if func in _SAME and out.dtype == first.dtype and out.shape == first.shape:
            self._keep(out, value)
            return True
        return False

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.deaf = True
        try:
            self._opened(module, args, kwargs)
        finally:
            self.deaf = False

    def _end(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.deaf = True
        try:
            self._left(module, output)
        finally:
            self.deaf = False

    def _opened(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.closed:
            self.closed += 1
            return
        if not self.open:
            tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
            if len(tensors) == 1:
                self._keep(tensors[0], self.input)
        else:
            self.open[-1].nested = True
        scope = Scope(self.modules[module], module)
        given = self._values(_found((args, kwargs)))
        inputs = [*given[0], *given[1].values()]
        if len(inputs) == 1 and isinstance(inputs[0], Value):
            scope.given = inputs[0]
        self.open.append(scope)
        self.pending = Call(scope.name, module, given[0], given[1], _line())
        if leaf(module):
            self.closed = 1
        else:
            self.scopes.append(scope)

    def _left(self, module: nn.Module, output: Any) -> None:
        if self.closed > 1:
            self.closed -= 1
            return
        scope = self.open.pop()
        if self.closed:
            self.closed = 0
            gave = [each for each in leaves(output) if isinstance(each, Tensor)]
            call = self.pending
            self._note(module, call.name, (call.args, call.kwargs), gave, output, call.line)
        if isinstance(output, Tensor):
            scope.gave = self._value(output, output._version)
        if not self.open:
            self.result = scope.gave if scope.given is not None else None

    def _note(self, ran: Any, name: str, given: Any, gave: Sequence[Tensor], out: Any, line: str = "") -> None:
        """A call, and the values that it gave."""
        call = Call(name, ran, given[0], given[1], line or _line(), alone=isinstance(out, Tensor) and len(gave) == 1)
        call.own_gradient = _in_autograd_function()
        fed = call.fed
        call.gave = tuple(Value(tuple(t.shape), call, fed=fed) for t in gave)
        for tensor, value in zip(gave, call.gave, strict=True):
            self._keep(tensor, value)
        self.calls.append(call)

    def _keep(self, tensor: Tensor, value: Value) -> None:
        self.values[id(tensor), tensor._version] = value
        self.kept.append(tensor)

    def _values(self, tree: Any) -> Any:
        """Arguments with values for tensors at their moment."""
        return mapped(tree, lambda leaf: self._value(leaf.tensor, leaf.version) if isinstance(leaf, _Moment) else leaf)

    def _value(self, tensor: Tensor, version: int) -> Value:
        """Where it was written to by way of another tensor that shares its memory, what it now is was not heard."""
        key = id(tensor), version
        if id(tensor) in self.held:
            return self.held[id(tensor)]
        if key not in self.values:
            if any(each is tensor for each in self.kept):
                where = f", before {line}" if (line := _line()) else ""
                self.flaw = f"a tensor is written to in place by way of a view of it{where}; write to the tensor itself"
            self.values[key] = Value(tuple(tensor.shape), held=tensor, fed=False, each=False)  # until the runs differ
            self.kept.append(tensor)
        return self.values[key]

    def _named(self, func: Any) -> str:
        """A name for a call of a function that no module and no other call has."""
        own = getattr(func, "__self__", None) if getattr(func, "__name__", "") == "__get__" else func
        plain = str(getattr(own, "__name__", "call")).strip("_")
        scope = self.open[-1].name
        first = name = f"{scope}.{plain}" if scope else plain
        k = 0
        while name in self.taken:
            k += 1
            name = f"{first}_{k}"
        self.taken.add(name)
        return name


@dataclass(frozen=True, eq=False)
class _Moment:
    """A tensor, and how often it had been written to."""

    tensor: Tensor
    version: int


def _found(tree: Any) -> Any:
    """Arguments as a call finds them: what it may write to keeps the moment before."""
    return mapped(tree, lambda leaf: _Moment(leaf, leaf._version) if isinstance(leaf, Tensor) else leaf)


def _line() -> str:
    """Where the innermost frame stands that is neither torch's nor ours."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not forward.__code__:
        if _theirs(frame.f_code.co_filename):
            return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def _in_autograd_function() -> bool:
    """Whether the forward of somebody's torch.autograd.Function is running."""
    frame: FrameType | None = sys._getframe(1)
    inner, applies = None, torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]
    while frame is not None and frame.f_code is not forward.__code__:
        if inner is not None and frame.f_code is applies and _theirs(inner.f_code.co_filename):
            return True
        inner, frame = frame, frame.f_back
    return False


@cache
def _theirs(file: str) -> bool:
    return not any(Path(file).is_relative_to(source) for source in _SOURCES)
