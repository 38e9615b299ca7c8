"""Chain: the layers of a network in the order in which they run, one feeding the next, found by running it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from unbatch.network import forward


@dataclass(frozen=True)
class Link:
    """One layer, and the shapes of one example before and after it."""

    name: str
    module: nn.Module
    before: tuple[int, ...]
    after: tuple[int, ...]

    @property
    def unknowns(self) -> int:
        return int(torch.Size(self.before).numel())


@dataclass
class _Call:
    name: str
    module: nn.Module
    given: Tensor | None  # None: not one tensor in, one tensor out
    gave: Tensor | None
    times: int = 1


def chain(model: nn.Module, input_shape: tuple[int, ...], mode: Literal["train", "eval"] = "eval") -> list[Link]:
    """The links from the network's input to its output; what only reshapes between modules belongs to the next link.

    A module whose children do not feed each other in a row (a residual block) is one link by itself. The modules are those
    of a copy, in the mode given. Raises ValueError: the network as a whole is no chain, and where it breaks.
    """
    model = copy.deepcopy(model).train(mode == "train")  # a copy, since in train mode batch norm writes its statistics
    calls: dict[nn.Module, _Call] = {}
    names = {module: name for name, module in model.named_modules()}

    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        one = len(args) == 1 and isinstance(args[0], Tensor) and isinstance(output, Tensor)
        if module in calls:
            calls[module].times += 1
        else:
            calls[module] = _Call(names[module], module, args[0] if one else None, output if one else None)

    hooks = [module.register_forward_hook(note) for module in names]
    try:
        forward(model, torch.rand(2, *input_shape, generator=torch.Generator().manual_seed(0)), mode)
    finally:
        for hook in hooks:
            hook.remove()
    links = list(_expanded(calls[model], calls))
    if len(links) == 1 and links[0].module is model and list(model.children()):
        raise ValueError(f"the network is no chain of layers: {_break(calls[model], calls)}.")
    return links


def _children(call: _Call, calls: dict[nn.Module, _Call]) -> list[_Call]:
    """The calls of a module's children in the order in which they ran; containers that did not run stand for theirs."""
    inside: list[_Call] = []
    for child in call.module.children():
        inside += [calls[child]] if child in calls else _children(_Call("", child, None, None), calls)
    order = list(calls.values())
    return sorted(inside, key=order.index)


def _expanded(call: _Call, calls: dict[nn.Module, _Call]) -> Iterator[Link]:
    if _children(call, calls) and _break(call, calls) is None:
        for child in _children(call, calls):
            yield from _expanded(child, calls)
        return
    if call.given is None or call.gave is None:
        raise ValueError(f"the network is no chain of layers: {call.name or 'it'} is not one tensor in, one out.")
    yield Link(call.name, call.module, tuple(call.given.shape[1:]), tuple(call.gave.shape[1:]))


def _break(call: _Call, calls: dict[nn.Module, _Call]) -> str | None:
    """Where a module's children do not feed each other in a row, in words."""
    at, last = call.given, "the input"
    for child in _children(call, calls):
        if child.times > 1:
            return f"{child.name!r} runs {child.times} times"
        if child.given is None or at is None or not _same(at, child.given):
            return (
                f"{child.name!r} is not fed by {last} alone; what lies between must be modules (nn.ReLU, not F.relu), and "
                "branches a module of their own"
            )
        at, last = child.gave, repr(child.name)
    if at is None or call.gave is None or not _same(at, call.gave):
        return f"something that is no module follows {last}"
    return None


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether b is a or a reshaped view of it."""
    return a is b or (
        a.numel() == b.numel() and a.data_ptr() == b.data_ptr() and a.is_contiguous() and b.is_contiguous()
    )
