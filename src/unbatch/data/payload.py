"""Payload: what a client sent, in a file as people keep it, told by its bytes and put under the model's names.

An npz file of arrays by name or in order (as Flower sends them), a safetensors file, what torch.save wrote, or JSON.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from unbatch.data.arrays import named_arrays
from unbatch.errors import UnbatchError
from unbatch.network.unwrapped import unwrapped
from unbatch.torch_file import read_torch_file
from unbatch.update import as_dense, named_values, some

STATES = ("state_dict", "model_state_dict", "model", "net", "network", "params", "parameters", "weights")
GRADIENTS = ("gradients", "gradient", "grads", "grad")
DIFFERENCES = ("update", "delta", "difference")
HOW = "Save arrays with numpy.savez(path, *arrays), or tensors with safetensors.torch.save_file(tensors, path)."
_TURNS = {2: (1, 0), 3: (2, 1, 0), 4: (3, 2, 0, 1), 5: (4, 3, 0, 1, 2)}  # of kernels that have their inputs first


@dataclass(frozen=True)
class Payload:
    """Values by the names of a model, as one file holds them, and what was done to read them.

    >>> Payload(values={"bias": Tensor([1.0])}, notes=(), under="", in_order=False).values
    {'bias': tensor([1.])}
    """

    values: Mapping[str, Tensor]  # of parameters and buffers
    notes: Sequence[str]
    under: str  # the key of a checkpoint that they stood under
    in_order: bool  # whether they came without names


def read_payload(path: Path, model: nn.Module) -> Payload:
    """What a file holds of a model: parameters, gradients or differences, and buffers, by the model's names.

    The kind of file is told by its first bytes. A file of torch.save is opened by `weights_only` in another process.
    A checkpoint's tensors are taken from under its key, nested lists and mappings are flattened, prefixes of wrappers are
    dropped, kernels that have their inputs first (Keras, Flax) are turned where the shapes show it; each is noted.
    Raises UnbatchError: no such file, another kind, or not the model's names, number and shapes.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.savez(f"{folder}/round7.npz", np.ones((3, 2)), np.zeros(3))
    ...     read = read_payload(Path(folder) / "round7.npz", nn.Linear(2, 3))
    >>> list(read.values), read.notes[1]
    (['weight', 'bias'], '2 arrays without names were taken in the order of the model.')
    """
    held, network = _opened(path), unwrapped(model)
    notes = [f"read from {path.name}, sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}."]
    try:
        held, under = _within(held, notes)
        held = _flat(held)
        if isinstance(held, Mapping | list) and not any(map(_is_array, _values(held))) and "param_groups" not in held:
            raise UnbatchError(f"it holds no tensor, and no numbers of one. {HOW}")
        if isinstance(held, Mapping):
            held = _own_names(network, held, notes)
        in_order = not isinstance(held, Mapping)
        if isinstance(held, list):
            notes.append(f"{len(held)} arrays without names were taken in the order of the model.")
        elif in_order:
            notes.append("one vector was cut into the parameters in the order of the model.")
        values = _named(network, held, notes)
    except UnbatchError as error:
        raise UnbatchError(f"{path}: {error}") from None
    notes += _precision(values)
    return Payload(values, notes, under, in_order)


def _opened(path: Path) -> Any:
    """What is in a file, whatever its kind, by how it begins. Raises UnbatchError: it cannot be read."""
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise UnbatchError(f"cannot read {path}: {error.strerror}.") from None
    if head[:4] == b"PK\x03\x04":
        try:
            with zipfile.ZipFile(path) as archive:
                of_torch = any(name.endswith((".pkl", "/version")) for name in archive.namelist())
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
            raise UnbatchError(f"{path} is a damaged zip archive; copy or capture it again.") from None
        return read_torch_file(path) if of_torch else dict(named_arrays(path, HOW))
    if head[:1] == b"\x80":
        return read_torch_file(path)
    if head[:6] == b"\x93NUMPY":
        try:
            return np.array(np.load(path, mmap_mode="r", allow_pickle=False))
        except ValueError as error:
            raise UnbatchError(f"cannot read {path}: {error} {HOW}") from None
    if head[8:] == b"{":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise UnbatchError(f"{path} is no whole safetensors file ({error}); copy or capture it again.") from None
    if head.lstrip()[:1] in (b"{", b"["):
        try:
            return json.loads(path.read_text())
        except (ValueError, RecursionError) as error:
            raise UnbatchError(f"{path} begins as JSON and is none: {error}.") from None
    kind = (
        "an HDF5 file; read its arrays with h5py, in the model's order"
        if head[:4] == b"\x89HDF"
        else "of no known kind"
    )
    raise UnbatchError(f"{path} is {kind}. {HOW}")


def _within(held: Any, notes: list[str]) -> tuple[Any, str]:
    """What a checkpoint holds of the model, and under which key; anything else as it is."""
    if not isinstance(held, Mapping):
        return held, ""
    kept = {key: value for key, value in held.items() if isinstance(value, Mapping | list) and not _numbers(value)}
    key = next((name for name in (*STATES, *GRADIENTS, *DIFFERENCES) if name in kept), None)
    if key is None or (len(kept) == len(held) > 1 and not any("param_groups" in _keys(v) for v in kept.values())):
        return held, ""
    besides = [str(name) for name in held if name != key]
    if besides:
        notes.append(f"its tensors are those under {key!r}; what stands beside them was not used: {some(besides)}.")
    notes += [words for value in kept.values() if (words := _of_optimiser(value))]
    inner, under = _within(held[key], notes)
    return inner, under or str(key)


def _values(held: Any) -> list[Any]:
    return list(held.values()) if isinstance(held, Mapping) else list(held)


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor | np.ndarray) or _numbers(value)


def _keys(held: Any) -> Sequence[Any]:
    return list(held) if isinstance(held, Mapping) else []


def _of_optimiser(held: Any) -> str:
    """What an optimiser's state says of how it was run, in words."""
    groups = held.get("param_groups") if isinstance(held, Mapping) else None
    if not isinstance(groups, list) or not groups or not isinstance(groups[0], Mapping):
        return ""
    told = {
        ours: groups[0][theirs]
        for theirs, ours in (("lr", "learning_rate"), ("momentum", "momentum"), ("weight_decay", "weight_decay"))
        if isinstance(groups[0].get(theirs), int | float) and groups[0][theirs]
    }
    kind = "Adam or AdamW" if "betas" in groups[0] else "SGD" if "momentum" in groups[0] else "another optimiser"
    said = ",".join(f"{name}={value:g}" for name, value in told.items())
    return f"beside them is the state of {kind}; if the client ran it, say so: --protocol {said or 'optimiser=...'}."


def _numbers(value: Any) -> bool:
    """Whether a value is numbers, in lists of whatever depth, and no list of arrays."""
    return isinstance(value, list) and bool(value) and all(isinstance(v, int | float) or _numbers(v) for v in value)


def _counted(name: Any) -> bool:
    return isinstance(name, str) and name.startswith("arr_") and name[4:].isdecimal()


def _flat(held: Any) -> Any:
    """Values by name or in order, without the mappings and lists that some keep them in, a layer in each."""
    if isinstance(held, Mapping) and held and all(map(_counted, held)):
        held = [held[name] for name in sorted(held, key=lambda name: int(name[4:]))]  # as numpy.savez names a list
    if isinstance(held, Mapping):
        nested = [value for value in held.values() if isinstance(value, Mapping | list) and not _numbers(value)]
        return dict(_leaves(held, "")) if nested and "param_groups" not in held else held
    if not isinstance(held, list):
        return held
    if len(held) == 1 and not isinstance(held[0], Mapping):
        return held[0] if np.ndim(held[0]) == 1 else held
    if held and all(isinstance(value, int | float) for value in held):
        return as_dense(held, "the file")
    if held and all(isinstance(v, list) and len(v) == 2 and isinstance(v[0], str) for v in held):
        return dict(held)
    nested = [value for value in held if isinstance(value, Mapping | list) and not _numbers(value)]
    return [value for _, value in _leaves(held, "")] if nested else held


def _own_names(model: nn.Module, held: Mapping[Any, Any], notes: list[str]) -> Any:
    """Values by the model's own names: without what stands before all of them, or in their order where none is its own."""
    own = set(model.state_dict()) | {name for name, _ in model.named_parameters(remove_duplicate=False)}
    names = [str(name) for name in held]
    if any(name in own for name in names):
        return held
    fronts = [name.split(".") for name in names]
    shared = next((k for k, parts in enumerate(zip(*fronts, strict=False)) if len(set(parts)) > 1), 0)
    for depth in range(1, shared + 1):
        front = ".".join(fronts[0][:depth]) + "."
        if any(name.removeprefix(front) in own for name in names):
            notes.append(f"{front!r}, which stood before every name, was dropped.")
            return {name.removeprefix(front): value for name, value in zip(names, held.values(), strict=True)}
    try:
        inside = named_values(model, held, "the file")
        if any(name in own for name in inside):
            return held
        named_values(model, list(held.values()), "the file", whole=True)
    except UnbatchError:
        return held
    notes.append(f"its names are not the model's ({some(names, 2)}), and its shapes are, in this order.")
    return list(held.values())


def _leaves(held: Any, name: str) -> Iterator[tuple[str, Any]]:
    parts = held.items() if isinstance(held, Mapping) else enumerate(held)
    for key, value in parts:
        inner = f"{name}.{key}" if name else str(key)
        if isinstance(value, Mapping | list) and not _numbers(value):
            yield from _leaves(value, inner)
        else:
            yield inner, value


def _named(model: nn.Module, held: Any, notes: list[str]) -> dict[str, Tensor]:
    """The values by the model's names, kernels turned where only that fits."""
    own = {name: p.shape for name, p in model.named_parameters(remove_duplicate=False)}
    try:
        values = named_values(model, held, "what was sent", whole=True)
        off = [name for name, tensor in values.items() if name in own and tensor.shape != own[name]]
        turned = {name: _turned(tensor) for name, tensor in values.items()}
        fits = bool(off) and all(turned[name].shape == own[name] for name in values if name in own)
    except UnbatchError:
        if not isinstance(held, list):
            raise
        try:
            turned = named_values(
                model, [_turned(as_dense(value, "an array")) for value in held], "what was sent", whole=True
            )
        except UnbatchError:
            turned = {}
        if not turned:
            raise
        values, fits = turned, True
    if fits:
        notes.append(_TURNS_SAID)
    return turned if fits else values


_TURNS_SAID = (
    "kernels have their inputs first, as Keras and Flax keep them, and were turned; where pictures are flattened before a "
    "dense layer, its columns may be in another order."
)


def _turned(tensor: Tensor) -> Tensor:
    """A kernel [..., inputs, outputs] as [outputs, inputs, ...]."""
    return tensor.permute(_TURNS[tensor.ndim]) if tensor.ndim in _TURNS else tensor


def _precision(values: Mapping[str, Tensor]) -> Iterator[str]:
    kinds = {tensor.dtype for tensor in values.values() if tensor.is_floating_point()}
    half = sorted(str(kind).removeprefix("torch.") for kind in kinds if kind.itemsize < 4)
    if half:
        yield f"numbers were kept in {' and '.join(half)}, and are as coarse."
