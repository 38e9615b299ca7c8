"""Update: whatever was sent, as tensors by the names of the model's parameters."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from unbatch.errors import UnbatchError
from unbatch.network.unwrapped import PREFIXES, unwrapped
from unbatch.protocol import Update

# The types, the coarsest first, whose numbers may be kept in a finer one.
COARSER = {
    torch.float64: (torch.bfloat16, torch.float16, torch.float32),
    torch.float32: (torch.bfloat16, torch.float16),
}
TELLING = 32  # different sizes among an update's numbers, from which on all of one type are no chance
SAMPLE = 4096  # numbers of a tensor that are looked at first
HINTED_PREFIXES = (*PREFIXES, "model.")  # that a message names


def as_update(model: nn.Module, sent: Any, *, before: Any = None) -> dict[str, Tensor]:
    """What was sent of a model, in whatever form it was kept, as an update: dense tensors by parameter name.

    `sent` is a mapping from parameter names to values, pairs of them, or values alone: a list, a tuple or a generator in
    the order of `model.parameters()`, of those that require a gradient, or of `model.state_dict()` (whose buffers are left
    out), from which some may be missing where shapes tell which; or one flat vector of all parameters. Values are tensors,
    dense or sparse, numpy arrays, arrays of other frameworks, numbers, or lists of numbers; None, the gradient of a
    parameter that was not used, is left out. They are detached and moved to the model's device, and keep their precision.
    `module.`, `_orig_mod.` and `_module.`, which wrappers put before names, are dropped.

    With `before`, both are states of the model, or models, and the update is the difference `sent` - `before` of its
    parameters, which local training sends. Buffers in such a state are no part of the update: a client that sends them
    makes them known, and `Knowledge(buffers={...})` says so.

    Raises UnbatchError, saying what, why and what to do: the form or a value of it is none of these, or names, numbers and
    shapes are not those of the model's parameters.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    >>> gradients = [torch.zeros(3, 2), torch.zeros(3), None, torch.zeros(1)]
    >>> list(as_update(model, gradients))
    ['0.weight', '0.bias', '1.bias']
    >>> after = {f"module.{name}": tensor + 1 for name, tensor in model.state_dict().items()}
    >>> as_update(model, after, before=model.state_dict())["1.bias"]
    tensor([1.])
    >>> try:
    ...     as_update(model, gradients[:3])
    ... except UnbatchError as error:
    ...     print(str(error).partition(";")[0])
    the update is a list of 3 values without names, and the model has 4 parameters
    """
    network = unwrapped(model)
    if before is not None:
        return state_difference(network, sent, before=before).update
    held = named_values(network, sent, "the update")
    _refuse_buffers(network, held)
    return _checked(network, held)


class StateDifference(NamedTuple):
    """What training made of a model's state: how far its parameters moved, and its buffers as they then were.

    >>> StateDifference(update={"weight": torch.ones(1)}, buffers={}).update
    {'weight': tensor([1.])}
    """

    update: dict[str, Tensor]  # after - before, by the names of the parameters
    buffers: dict[str, Tensor]  # those of the state after: batch norm's statistics and counts


def state_difference(model: nn.Module, after: Any, *, before: Any = None) -> StateDifference:
    """What a client that sends its whole model sends besides: the update, after - before, and the buffers after.

    `after` and `before` are states of the model in any form that `as_update` takes (a mapping such as `state_dict()`, a
    model, a list of arrays in the order of `state_dict()` as Flower sends them); without `before`, it is the model's own
    state. Parameters and buffers that `after` lacks were not sent, and are left out. The buffers are what
    `Knowledge(buffers=...)` takes.
    Raises UnbatchError: as `as_update` does, or `before` lacks what `after` has.

    >>> model = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))
    >>> after = [tensor.numpy() + 1 for tensor in model.state_dict().values()]
    >>> update, buffers = state_difference(model, after)
    >>> update["1.weight"], buffers["1.running_mean"]
    (tensor([1.]), tensor([1.]))
    """
    network = unwrapped(model)
    new = named_values(network, _state(after), "the state after", whole=True)
    old = named_values(network, _state(network if before is None else before), "the state before", whole=True)
    own = dict(network.named_buffers(remove_duplicate=False))
    buffers = {name: tensor for name, tensor in new.items() if name in own}
    return StateDifference(_checked(network, _difference(network, new, old)), buffers)


def _checked(network: nn.Module, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values by name as an update of the network, on its device. Raises UnbatchError: as `check_update` does."""
    update = _untied(network, held)
    check_update(network, update)
    parameters = dict(network.named_parameters())
    return {name: tensor.to(parameters[name].device) for name, tensor in update.items()}


def as_rounded(update: Update) -> dict[str, Tensor]:
    """The same numbers in the coarsest type that holds all of them: how finely an update was rounded, wherever it is kept.

    A gradient of float32 is often kept in float64, as numpy does, and one that was sent in half precision in float32. Its
    numbers are as coarse as they were, and what explains them is off by as much. Few different numbers (signs, counts)
    tell nothing of how they were rounded, and are left as they are, as are tensors of several types.

    >>> sent = torch.linspace(0, 1, 100).bfloat16()
    >>> as_rounded({"weight": sent.double()})["weight"].dtype, as_rounded({"weight": sent[:9].double()})["weight"].dtype
    (torch.bfloat16, torch.float64)
    """
    types = {tensor.dtype for tensor in update.values()}
    held = next(iter(types))
    if len(types) > 1 or held not in COARSER:
        return dict(update)
    for coarse in COARSER[held]:
        if all(_holds(tensor.flatten()[:SAMPLE], coarse) for tensor in update.values()) and all(
            _holds(tensor, coarse) for tensor in update.values()
        ):
            numbers = torch.cat([tensor[tensor != 0][:SAMPLE] for tensor in update.values()])
            enough = len(torch.unique(numbers.abs())) >= TELLING
            return {name: tensor.to(coarse) for name, tensor in update.items()} if enough else dict(update)
    return dict(update)


def _holds(tensor: Tensor, coarse: torch.dtype) -> bool:
    """Whether a type holds all numbers of a tensor as they are."""
    return torch.equal(tensor.to(coarse).to(tensor.dtype), tensor)


def named_values(model: nn.Module, held: Any, what: str, *, whole: bool = False) -> dict[str, Tensor]:
    """Values as dense tensors by the model's names: of its parameters, and of its buffers where they are among them.

    `what` is what the values are called in a message. Names that the model has not are kept as they are. Of a list in the
    order of the whole state, buffers are kept if `whole`.
    Raises UnbatchError: as `as_update` does.

    >>> named_values(nn.Linear(1, 1), {"module.bias": np.ones(1)}, "the update")
    {'bias': tensor([1.], dtype=torch.float64)}
    """
    _refuse_checkpoint(held, what)
    pairs = _pairs(model, held, what, whole)
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    found: dict[str, Tensor] = {}
    for name, value in pairs:
        if value is None:
            continue
        if isinstance(name, Tensor):  # a parameter itself, as optimisers key their state
            name = next((own_name for own_name, tensor in own.items() if tensor is name), name)
        if not isinstance(name, str):
            raise UnbatchError(
                f"{what} is keyed by {type(name).__name__} ({_short(name)}), not by the names of parameters; key it as "
                "dict(model.named_parameters())."
            )
        bare, tensor = _stripped(name, own), as_dense(value, f"{what}'s {name!r}")
        _put(found, bare, tensor, what)
    return found


def _refuse_checkpoint(held: Any, what: str) -> None:
    """Raises UnbatchError, saying what it is and what to hand over: a checkpoint, or what an optimiser keeps."""
    if not isinstance(held, Mapping) or not any(isinstance(value, Mapping) for value in held.values()):
        return
    inner = next(value for value in held.values() if isinstance(value, Mapping))
    if "param_groups" in held or not all(isinstance(key, str) for key in held) or not _holds_tensors(inner):
        kept = inner if "param_groups" not in held else next(iter(inner.values()), {})
        names = [str(name) for name in kept] if isinstance(kept, Mapping) else []
        raise UnbatchError(
            f"{what} is the state of an optimiser{f' ({some(names)})' if names else ''}: what it keeps from step to step, "
            "and not what was sent. Give the gradients, {name: p.grad for name, p in model.named_parameters()}, or the "
            "model's states before and after the step."
        )
    at = next(key for key, value in held.items() if value is inner)
    raise UnbatchError(
        f"{what} is a checkpoint: it holds {some(list(held))}, and names and tensors are under {at!r}. Of a model's state, "
        f"give the one before as well: as_update(model, held[{at!r}], before=...); of gradients, give held[{at!r}] itself."
    )


def _holds_tensors(held: Mapping[Any, Any]) -> bool:
    """Whether a mapping is from names of parameters, as states and gradients are, and not what an optimiser keeps."""
    arrays = [isinstance(name, str) and (isinstance(v, Tensor) or hasattr(v, "__array__")) for name, v in held.items()]
    return bool(arrays) and all(arrays) and not {"exp_avg", "momentum_buffer", "square_avg", "step"} & set(held)


def as_dense(value: Any, what: str) -> Tensor:
    """A value as a dense tensor without a graph, in its own precision. Raises UnbatchError: it is no array of real numbers.

    >>> as_dense([[1.0, 2.0]], "the value"), as_dense(torch.eye(2).to_sparse(), "the value").layout
    (tensor([[1., 2.]]), torch.strided)
    """
    if isinstance(value, Tensor):
        tensor = value.detach() if value.requires_grad or isinstance(value, nn.Parameter) else value
    elif isinstance(value, (bool, str, bytes)):
        raise UnbatchError(
            f"{what} is {_short(value)}, a {type(value).__name__}; give a tensor or an array of numbers."
        )
    elif isinstance(value, (int, float)):
        return _exact(torch.tensor(float(value), dtype=torch.float64))
    elif isinstance(value, (list, tuple)):
        tensor = _of_numbers(value, what)
    else:
        tensor = _of_array(value, what)
    if tensor.is_meta:
        raise UnbatchError(f"{what} is on the meta device and has no values; capture it where the client computed it.")
    if tensor.is_nested or type(tensor).__name__ == "DTensor":
        raise UnbatchError(
            f"{what} is a {'nested tensor' if tensor.is_nested else 'shard of a tensor (DTensor)'}; give the whole as one "
            "dense tensor of the parameter's shape (of a shard, full_tensor())."
        )
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    if tensor.is_complex():
        raise UnbatchError(f"{what} holds complex numbers; updates are real.")
    return tensor.to_dense() if tensor.layout != torch.strided else tensor


def check_update(model: nn.Module, update: Update) -> None:
    """Raises UnbatchError, saying what is off, unless `update` has the names and shapes of the model's parameters.

    >>> try:
    ...     check_update(nn.Linear(2, 3), {"weight": torch.zeros(2, 3)})
    ... except UnbatchError as error:
    ...     print(error)
    the update's 'weight' has shape (2, 3), the model's (3, 2). It is the transpose.
    """
    parameters = dict(model.named_parameters())
    if not update:
        raise UnbatchError("the update is empty; it maps parameter names to tensors, as named_parameters() does.")
    extra = [name for name in update if name not in parameters]
    if extra:
        cut = next((p for p in HINTED_PREFIXES if any(name.removeprefix(p) in parameters for name in extra)), None)
        hint = f" Strip the prefix {cut!r} from its names." if cut else ""
        missing = [name for name in parameters if name not in update]
        raise UnbatchError(
            f"the update has names that the model has not: {some(extra)}; the model also has {some(missing)}.{hint} "
            "Key the update as dict(model.named_parameters())."
        )
    for name, tensor in update.items():
        shape = tuple(parameters[name].shape)
        if tuple(tensor.shape) != shape:
            hint = " It is the transpose." if tuple(tensor.shape) == shape[::-1] else ""
            raise UnbatchError(f"the update's {name!r} has shape {tuple(tensor.shape)}, the model's {shape}.{hint}")
        if not tensor.is_floating_point():
            raise UnbatchError(f"the update's {name!r} is {tensor.dtype}; updates are floating point.")
        bad = int((~(tensor.float() if tensor.itemsize == 1 else tensor).isfinite()).sum())
        if bad:
            raise UnbatchError(
                f"the update's {name!r} holds {bad} NaN or infinite entries of {tensor.numel()}; "
                "look for a diverged step or a half-precision overflow in the capture."
            )


def some(names: Sequence[str], most: int = 4) -> str:
    """Names in a message, the first few of them.

    >>> some(["a", "b", "c"], most=2)
    "'a', 'b' and 1 more"
    """
    shown = ", ".join(map(repr, names[:most])) or "none else"
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


def _state(held: Any) -> Any:
    return held.state_dict() if isinstance(held, nn.Module) else held


def _pairs(model: nn.Module, held: Any, what: str, whole: bool) -> list[tuple[Any, Any]]:
    """Names and values, whatever form they came in."""
    if isinstance(held, nn.Module):
        raise UnbatchError(
            f"{what} is a model; give its gradients, {{name: p.grad for name, p in model.named_parameters()}}, or the "
            "states before and after: as_update(model, after.state_dict(), before=before.state_dict())."
        )
    if isinstance(held, Mapping):
        named = dict(held.items())
        if not named or not all(isinstance(name, str) and re.fullmatch(r"arr_\d+", name) for name in named):
            return list(named.items())
        held = [named[name] for name in sorted(named, key=lambda name: int(name[4:]))]  # as numpy.savez names a list
    if isinstance(held, np.ndarray) and held.dtype == object:
        held = list(held)
    if isinstance(held, (str, bytes, os.PathLike)):
        raise UnbatchError(
            f"{what} is the path or text {_short(held)}; a captured exchange is read by Observation.load."
        )
    if isinstance(held, Tensor) or hasattr(held, "__array__"):
        return _cut(model, as_dense(held, what), what)
    if not isinstance(held, Iterable) or isinstance(held, (set, frozenset)):
        raise UnbatchError(
            f"{what} is of type {type(held).__name__}; give a mapping from parameter names to tensors, or a list in the "
            "order of model.parameters()."
        )
    values = list(held)
    if values and all(isinstance(v, (tuple, list)) and len(v) == 2 and isinstance(v[0], str) for v in values):
        return [(name, value) for name, value in values]
    return _placed(model, values, f"{what} is {_form(held)} of {len(values)} values without names", whole)


def _placed(model: nn.Module, values: list[Any], words: str, whole: bool) -> list[tuple[str, Any]]:
    """Values alone, by the names of the order that they fit; the first of the orders where several do."""
    parameters = dict(model.named_parameters())
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    counted = {name: t for name, t in model.state_dict().items() if isinstance(t, Tensor)}
    state = {name: t for name, t in counted.items() if not name.endswith("num_batches_tracked")}
    shapes = [None if value is None else _shape(value) for value in values]
    for order in (parameters, trained, counted, state):
        if len(order) == len(values) and all(
            shape is None or shape == tuple(tensor.shape) for shape, tensor in zip(shapes, order.values(), strict=True)
        ):
            aliases = dict(model.named_parameters(remove_duplicate=False))
            return [(name, value) for name, value in zip(order, values, strict=True) if whole or name in aliases]
    picked = _only_subsequence(shapes, [tuple(p.shape) for p in parameters.values()])
    if picked is not None:
        return list(zip([list(parameters)[place] for place in picked], values, strict=True))
    off = ""
    if len(values) == len(parameters):
        name, shape = next(
            (name, shape)
            for (name, p), shape in zip(parameters.items(), shapes, strict=True)
            if shape is not None and shape != tuple(p.shape)
        )
        off = f" In that order {name!r} would have the shape {shape}, and it has {tuple(parameters[name].shape)}."
    raise UnbatchError(
        f"{words}, and the model has {len(parameters)} parameters; give one value, or None, for each parameter in the "
        f"order of model.parameters() or of model.state_dict(), or a mapping from names.{off}"
    )


def _only_subsequence(shapes: Sequence[object], whole: Sequence[object]) -> list[int] | None:
    """The places in `whole` where `shapes` stand in their order, if that is possible in one way alone; else None.

    So a list is read from which the parameters that were not used were left out.
    """
    first, at = list[int](), -1
    for shape in shapes:
        at = next((i for i in range(at + 1, len(whole)) if whole[i] == shape), len(whole))
        first.append(at)
    last, at = list[int](), len(whole)
    for shape in reversed(shapes):
        at = next((i for i in range(at - 1, -1, -1) if whole[i] == shape), -1)
        last.insert(0, at)
    return first if first and first == last else None  # the earliest places and the latest ones are the same


def _cut(model: nn.Module, flat: Tensor, what: str) -> list[tuple[str, Any]]:
    """One vector of all parameters, as torch.nn.utils.parameters_to_vector makes it, cut into them."""
    parameters = dict(model.named_parameters())
    sizes = [p.numel() for p in parameters.values()]
    if flat.ndim != 1 or len(flat) != sum(sizes):
        raise UnbatchError(
            f"{what} is one array of shape {tuple(flat.shape)}, and the model has {len(sizes)} parameters of {sum(sizes)} "
            "entries; give a mapping from their names, a list in their order, or all entries as one vector."
        )
    parts = zip(parameters.items(), torch.split(flat, sizes), strict=True)
    return [(name, part.reshape(p.shape)) for (name, p), part in parts]


def _difference(model: nn.Module, after: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What two states of the model differ by, of its parameters."""
    known, own = {name for name, _ in model.named_buffers()} | set(model.state_dict()), dict(model.named_parameters())
    names = [name for name in after if name not in known or name in own]
    missing = [name for name in names if name not in before]
    if missing:
        raise UnbatchError(
            f"the state before lacks {some(missing)}, which the state that was sent has; give both states whole."
        )
    for name in names:
        if after[name].shape != before[name].shape:
            raise UnbatchError(
                f"{name!r} has shape {tuple(before[name].shape)} before, and {tuple(after[name].shape)} after."
            )
    return {name: after[name] - before[name].to(after[name].device) for name in names}


def _refuse_buffers(model: nn.Module, update: Mapping[str, Tensor]) -> None:
    buffers = [name for name in update if name in dict(model.named_buffers())]
    if buffers:
        raise UnbatchError(
            f"the update holds {some(buffers)}, which are buffers of the model (running statistics) and no parameters: "
            "nothing is differentiated by them. Leave them out of it; if the client sent them after its step, give them as "
            "Knowledge(buffers={...}). If these are whole states, give as_update(model, after, before=before)."
        )


def _stripped(name: str, own: Mapping[str, Tensor]) -> str:
    """A name without what wrappers put into it, where that makes it one of the model's."""
    if name in own:
        return name
    bare = name
    while (cut := next((p for p in PREFIXES if bare.startswith(p)), None)) and bare not in own:
        bare = bare.removeprefix(cut)
    if bare not in own:  # a part of the model was wrapped
        bare = ".".join(part for part in name.split(".") if f"{part}." not in PREFIXES)
    return bare if bare in own else name


def _of_numbers(value: Sequence[Any], what: str) -> Tensor:
    try:
        array = np.asarray([v.detach().cpu() if isinstance(v, Tensor) else v for v in value], dtype=np.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UnbatchError(f"{what} is a {type(value).__name__} that makes no array of numbers ({error}).") from None
    return _exact(torch.from_numpy(array))


def _exact(tensor: Tensor) -> Tensor:
    """Numbers of float64 in float32, where they lose nothing by it: they came from there."""
    single = tensor.float()
    return single if torch.equal(single.double(), tensor) else tensor


def _of_array(value: Any, what: str) -> Tensor:
    """An array of numpy, or of a framework that makes one of itself."""
    if not (hasattr(value, "__array__") or hasattr(value, "numpy")):
        raise UnbatchError(
            f"{what} is a {type(value).__name__}, which is neither a tensor nor an array; give a tensor, a numpy array or "
            "a list of numbers."
        )
    if np.ma.is_masked(value):
        raise UnbatchError(f"{what} is a masked array; fill the masked entries, or leave the mask out.")
    try:
        array = np.asarray(value if hasattr(value, "__array__") else value.numpy())
    except Exception as error:  # another framework's object: anything may go wrong in it
        raise UnbatchError(
            f"{what} is a {type(value).__name__} that gives no array of itself ({error}); convert it to a numpy array."
        ) from None
    if array.dtype.name == "bfloat16":  # of ml_dtypes, which torch does not read
        bits = torch.from_numpy(np.array(array).view(np.int16).copy())
        return bits.view(torch.bfloat16).reshape(array.shape)
    if array.dtype == np.longdouble:
        array = array.astype(np.float64)
    if array.dtype.kind not in "fiubc":
        raise UnbatchError(f"{what} is an array of {array.dtype}; give one of floating point numbers.")
    native = array.astype(array.dtype.newbyteorder("="))  # a copy, which torch may write to
    return torch.from_numpy(np.ascontiguousarray(native).reshape(array.shape))


def _shape(value: Any) -> tuple[int, ...] | str:
    try:
        return tuple(np.shape(value))
    except Exception as error:  # a list of rows of different lengths, another framework's object
        return f"of no array ({error})"


def _untied(model: nn.Module, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values of parameters that go by several names (tied weights) by the first of them, as named_parameters does."""
    own, first = dict(model.named_parameters(remove_duplicate=False)), dict[int, str]()
    for name, parameter in own.items():
        first.setdefault(id(parameter), name)
    found = dict[str, Tensor]()
    for name, tensor in held.items():
        _put(found, first[id(own[name])] if name in own else name, tensor, "the update")
    return found


def _put(found: dict[str, Tensor], name: str, tensor: Tensor, what: str) -> None:
    if name in found and not _same(found[name], tensor):
        raise UnbatchError(f"{what} holds two different values for {name!r}; give one.")
    found[name] = tensor


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.cpu(), b.to(a.dtype).cpu())


def _short(thing: object) -> str:
    words = " ".join(repr(thing).split())
    return words if len(words) <= 60 else words[:57] + "..."


def _form(held: object) -> str:
    return f"a {type(held).__name__}" if isinstance(held, (list, tuple)) else "an iterable"
