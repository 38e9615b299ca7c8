"""Listening: one run of a network, as the calls of modules and functions that torch announces."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from unbatch.errors import NotApplicable
from unbatch.network.dense import forward
from unbatch.network.graph import Call, Scope, Value, leaves, mapped

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


@dataclass(eq=False)
class Heard:
    """One run: its calls, the modules that made them, and where it begins and ends."""

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


class Listener(TorchFunctionMode):
    """Hears every call while a model runs once.

    Functions by torch's own announcement, modules by hooks. A tensor at one moment, told by its identity and how often it
    was written to, is one `Value`; what gives the numbers that it is given, as `contiguous`, gives that value again.

    >>> run = Listener(nn.Sequential(nn.Linear(4, 2), nn.ReLU(inplace=True))).hear(torch.rand(2, 4), "eval")
    >>> [call.name for call in run.calls], run.output.call is run.calls[1]
    (['0', '1'], True)
    """

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

    def hear(self, probe: Tensor, mode: Literal["train", "eval"]) -> Heard:
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
        return Heard(self.input, output, self.calls, self.scopes)

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
