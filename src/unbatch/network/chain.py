"""Chain: the layers of a network in the order in which they run, one feeding the next, found by running it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from unbatch.errors import NotApplicable
from unbatch.network.dense import forward


@dataclass(frozen=True)
class Link:
    """One layer of a chain, and the shapes of one example before and after it.

    >>> Link("dense", nn.Linear(6, 2), (2, 3), (2,)).unknowns
    6
    """

    name: str
    module: nn.Module
    before: tuple[int, ...]
    after: tuple[int, ...]

    @property
    def unknowns(self) -> int:
        """Numbers in its input."""
        return int(torch.Size(self.before).numel())


@dataclass(eq=False)
class _Call:
    name: str
    module: nn.Module
    given: Tensor | None = None  # None: not one tensor in, one tensor out
    gave: Tensor | None = None
    version: int = 0  # of the tensor given, as the module found it
    left: int = 0  # of the tensor that it gave: a higher one later was written to in place
    times: int = 0


def chain(model: nn.Module, input_shape: tuple[int, ...], mode: Literal["train", "eval"] = "eval") -> list[Link]:
    """The layers of a network as links from its input to its output; what reshapes between modules belongs to the next one.

    A module whose children do not feed each other in a row (a residual block) is one link by itself. The modules are those
    of a copy, in the mode given.
    Raises NotApplicable: the network as a whole is no chain, and where it breaks, or two of its layers share a weight,
    whose gradient then is a sum over both.

    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    >>> [(link.name, link.after) for link in chain(model, (3, 8, 8))]
    [('0', (4, 6, 6)), ('1', (4, 6, 6)), ('2', (144,)), ('3', (2,))]
    """
    model = copy.deepcopy(model).train(mode == "train")  # a copy, since in train mode batch norm writes its statistics
    calls: dict[nn.Module, _Call] = {}
    names = {module: name for name, module in model.named_modules()}

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = calls.setdefault(module, _Call(names[module], module))
        call.times += 1
        given = [*args, *kwargs.values()]
        if len(given) == 1 and isinstance(given[0], Tensor):
            call.given, call.version = given[0], given[0]._version

    def end(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor):
            calls[module].gave, calls[module].left = output, output._version

    hooks = [module.register_forward_pre_hook(begin, with_kwargs=True) for module in names]
    hooks += [module.register_forward_hook(end) for module in names]
    probe = torch.rand(2, *input_shape, generator=torch.Generator().manual_seed(0))
    try:
        with torch.random.fork_rng(devices=[]):  # dropout draws
            forward(model, probe, mode)
    finally:
        for hook in hooks:
            hook.remove()
    whole, inner = calls[model], _inner(calls[model], calls)
    if whole.given is None or whole.gave is None:
        raise NotApplicable("the network is no chain of layers: it takes other than one tensor.")
    if isinstance(inner, str):
        raise NotApplicable(f"the network is no chain of layers: {inner}.")
    links = list(_expanded(whole, whole.given, whole.gave, calls))
    for i, link in enumerate(links):
        for other in links[:i]:
            if {id(p) for p in link.module.parameters()} & {id(p) for p in other.module.parameters()}:
                raise NotApplicable(
                    f"{other.name!r} and {link.name!r} share a weight: its gradient is a sum over both."
                )
    return links


class Chained(nn.Module):
    """The network that links make, one after the other.

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
    >>> Chained(chain(model, (4,))).named()
    {'layers.0.weight': '0.weight', 'layers.0.bias': '0.bias'}
    """

    def __init__(self, links: Sequence[Link]) -> None:
        super().__init__()
        self.links = tuple(links)
        self.layers = nn.ModuleList(link.module for link in links)

    def forward(self, x: Tensor) -> Tensor:
        """[n, *links[0].before] -> [n, *links[-1].after]."""
        for link, layer in zip(self.links, self.layers, strict=True):
            x = layer(x.reshape(len(x), *link.before))
        return x

    def named(self) -> dict[str, str]:
        """By the name of a parameter here, its name in the network that the links come from."""
        own = ((i, link.name, name) for i, link in enumerate(self.links) for name, _ in link.module.named_parameters())
        return {f"layers.{i}.{name}": f"{link}.{name}" if link else name for i, link, name in own}


def follow(links: Sequence[Link], x: Tensor) -> Tensor:
    """The output [n, ...] of the links one after the other, for inputs x [n, *links[0].before]; x, if there are none.

    >>> links = chain(nn.Sequential(nn.ReLU(), nn.AvgPool1d(2)), (1, 4))
    >>> follow(links, torch.tensor([[[-1.0, 1.0, 2.0, 4.0]]]))
    tensor([[[0.5000, 3.0000]]])
    """
    for link in links:
        x = link.module(x.reshape(len(x), *link.before))
    return x


def _children(module: nn.Module, calls: dict[nn.Module, _Call]) -> list[_Call]:
    """The calls of a module's children in the order in which they ran; containers that did not run stand for theirs."""
    inside: list[_Call] = []
    for name, child in module.named_children():
        if name != "parametrizations":
            inside += [calls[child]] if child in calls else _children(child, calls)
    order = list(calls)
    return sorted(inside, key=lambda call: order.index(call.module))


def _expanded(call: _Call, given: Tensor, gave: Tensor, calls: dict[nn.Module, _Call]) -> Iterator[Link]:
    """The links of a module that was given one tensor and gave another: its children's, or it is one by itself."""
    inner = _inner(call, calls)
    if isinstance(inner, str) or not inner:
        yield Link(call.name, call.module, tuple(given.shape[1:]), tuple(gave.shape[1:]))
        return
    for child, before, after in inner:
        yield from _expanded(child, before, after, calls)


def _inner(call: _Call, calls: dict[nn.Module, _Call]) -> list[tuple[_Call, Tensor, Tensor]] | str:
    """A module's children in a row, with what each was given and gave; or where they do not feed each other, in words."""
    at, version, last = call.given, call.version, "the input"
    found = list[tuple[_Call, Tensor, Tensor]]()
    for child in _children(call.module, calls):
        if child.times > 1:
            return f"{child.name!r} runs {child.times} times; give every place a module of its own"
        if child.given is None or child.gave is None:
            return f"{child.name!r} is not one tensor in, one tensor out"
        if not _same(at, child.given, version, child.version):
            return (
                f"{child.name!r} is not fed by {last} alone; what lies between must be modules (nn.ReLU, not F.relu), and "
                "branches a module of their own"
            )
        if len(child.given) != len(child.gave):
            return f"{child.name!r} folds examples into each other"
        found.append((child, child.given, child.gave))
        at, version, last = child.gave, child.left, repr(child.name)
    if list(call.module.children()) and (call.gave is None or not _same(at, call.gave, version, call.left)):
        return f"something that is no module follows {last}"
    return found


def _same(a: Tensor | None, b: Tensor, before: int, after: int) -> bool:
    """Whether b is a or a view of it, example by example, and nothing was written into it meanwhile."""
    if a is None or before != after or len(a) != len(b):
        return False
    return a is b or (
        a.numel() == b.numel() and a.data_ptr() == b.data_ptr() and a.is_contiguous() and b.is_contiguous()
    )
