"""Tracing: a network's graph from two runs of it, which tell what depends on the batch's size and what on its values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from unbatch.errors import NotApplicable, UnbatchError
from unbatch.network.graph import BatchSize, Call, Graph, Value, leaves, mapped
from unbatch.network.listening import Listener

PROBES = 2, 3  # examples of the two runs that are compared: what is 2 in one and 3 in the other is the batch's size


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
    with draws_kept(model):
        first = Listener(model).hear(probes[0], mode)
        try:
            second = Listener(model).hear(probes[1], mode)
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


@contextmanager
def draws_kept(model: nn.Module) -> Iterator[None]:
    """Inside the block dropout draws as it would outside of it, where nothing then is drawn yet, wherever the model lies.

    >>> with draws_kept(nn.Linear(1, 1)):
    ...     first = torch.rand(2)
    >>> bool((first == torch.rand(2)).all())
    True
    """
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        yield


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
