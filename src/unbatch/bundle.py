"""Bundle: one captured exchange, and earlier rounds of its batch, in one safetensors file (docs/bundle-format.md).

Never pickle; nothing in it is run.
"""

from __future__ import annotations

import copy
import hashlib
import json
import struct
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from unbatch.errors import UnbatchError
from unbatch.files import write_atomically
from unbatch.knowledge import FIELDS, Earlier, Knowledge
from unbatch.privacy import Privacy, told_privacy
from unbatch.protocol import Update

FORMAT, SCHEMA = "unbatch-observation", "1"
_CALLABLES = {"log_prob"}


def write_bundle(path: Path, model: nn.Module, update: Update, knowledge: Knowledge, notes: Sequence[str] = ()) -> None:
    """Writes what a server holds of an exchange to a file: the update, the model's state and what is known besides.

    Callables are left out, since a file that holds code is not safe. `notes` say in words how it was captured.

    >>> import tempfile
    >>> model, sent = nn.Linear(2, 3).eval(), {"bias": Tensor([1.0, 2.0, 3.0])}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "seen.safetensors"
    ...     write_bundle(path, model, sent, Knowledge(batch_size=4))
    ...     held, update, known = read_bundle(path, model)
    >>> update, known
    ({'bias': tensor([1., 2., 3.])}, Knowledge(batch_size=4))
    """
    tensors: dict[str, Tensor] = {f"update/{name}": tensor for name, tensor in update.items()}
    tensors |= {f"state/{name}": tensor for name, tensor in model.state_dict().items()}
    facts: dict[str, Any] = {}
    for name in knowledge:
        value = knowledge.get(name)
        if name == "buffers":
            tensors |= {f"buffers/{key}": tensor for key, tensor in value.items()}
        elif name == "initial":
            tensors |= {f"initial/{key}": tensor for key, tensor in value.items()}
        elif name == "earlier":
            for number, past in enumerate(value):
                tensors |= {f"earlier/{number}/update/{key}": tensor for key, tensor in past.update.items()}
                tensors |= {f"earlier/{number}/state/{key}": tensor for key, tensor in past.state.items()}
        elif isinstance(value, Tensor):
            tensors[f"knowledge/{name}"] = value
        elif name not in _CALLABLES:
            facts[name] = vars(value) if isinstance(value, Privacy) else dict(value) if name == "recipe" else value
    metadata = {"format": FORMAT, "schema": SCHEMA, "model": type(model).__name__, "knowledge": json.dumps(facts)}
    metadata["state_sha256"] = state_hash(model.state_dict())
    if not update:
        metadata["released"] = "true"
    if notes:
        metadata["notes"] = json.dumps(list(notes))
    solid = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_atomically(path, save(solid, metadata), private=True)  # an update may give its examples away


def read_bundle(path: Path, model: nn.Module) -> tuple[nn.Module, dict[str, Tensor], Knowledge]:
    """A copy of `model` with the bundle's parameters and buffers in it, the update on its device, and what is known.

    Raises UnbatchError: no bundle, a truncated one, a pickle, another schema, or a state that is not of `model`.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "seen.safetensors"
    ...     write_bundle(path, nn.Linear(2, 3), {"bias": Tensor([1.0, 2.0, 3.0])}, Knowledge())
    ...     try:
    ...         read_bundle(path, nn.Sequential(nn.Linear(2, 3)))
    ...     except ValueError as error:
    ...         print("captured from another model (Linear)" in str(error))
    True
    """
    tensors, metadata = _open(path)
    update = _part(tensors, "update/")
    if not update and metadata.get("released") != "true":
        raise UnbatchError(
            f"{path} holds no update: no tensor is named 'update/<parameter>'. See docs/bundle-format.md."
        )
    private = copy.deepcopy(model)
    state = _part(tensors, "state/")
    if state:
        try:
            private.load_state_dict(state)
        except RuntimeError as error:
            said = " ".join(str(error).split())
            raise UnbatchError(
                f"{path} was captured from another model ({metadata.get('model', 'unnamed')}): {said} Give its factory."
            ) from None
    if metadata.get("state_sha256") not in (None, state_hash(state or private.state_dict())):
        raise UnbatchError(
            f"{path} was captured from a model in another state: the sha256 over its parameters and buffers differs. "
            + (
                "The file was changed; capture it again."
                if state
                else "It holds none itself: give those of the capture."
            )
        )
    first = next(private.parameters())
    try:
        facts = json.loads(metadata.get("knowledge", "{}"))
    except (ValueError, RecursionError) as error:
        raise UnbatchError(f"{path}: the metadata entry 'knowledge' is no JSON: {error}.") from None
    if not isinstance(facts, dict):
        raise UnbatchError(f"{path}: the metadata entry 'knowledge' is no JSON object.")
    if "privacy" in facts:
        facts["privacy"] = told_privacy(facts["privacy"])
    known = _part(tensors, "knowledge/")
    wrong = sorted((set(facts) | set(known)) - set(FIELDS))
    if wrong:
        raise UnbatchError(f"{path} claims knowledge of {', '.join(wrong)}; fields are {', '.join(FIELDS)}.")
    parts = {
        "buffers": _part(tensors, "buffers/"),
        "initial": _part(tensors, "initial/"),
        "earlier": _earlier(_part(tensors, "earlier/"), path),
    }
    held = {name: part for name, part in parts.items() if part}
    moved = {name: tensor.to(first.device) for name, tensor in update.items()}
    return private, moved, Knowledge(**(facts | known | held))


def state_hash(state: Mapping[str, Any]) -> str:
    """The sha256 over a model's state, by which two runs tell whether they attacked the same one.

    Over names, types, shapes and bytes of its parameters and buffers, in the order of their names.

    >>> one, other = nn.Linear(2, 3).state_dict(), nn.Linear(2, 3).state_dict()
    >>> state_hash(one) == state_hash(dict(one)), state_hash(one) == state_hash(other), len(state_hash({}))
    (True, False, 64)
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        if isinstance(tensor, Tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(raw_bytes(tensor))
    return digest.hexdigest()


def raw_bytes(tensor: Tensor) -> bytes:
    """The bytes of a tensor's entries in their order, whatever its device and its strides.

    >>> column = torch.arange(4, dtype=torch.uint8).view(2, 2)[:, :1]
    >>> raw_bytes(column)
    b'\\x00\\x02'
    """
    solid = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)  # contiguous() may keep strides
    return solid.reshape(-1).view(torch.uint8).numpy().tobytes()


def holds_state(path: Path) -> bool:
    """Whether a bundle holds the parameters of the model that it was captured from.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "seen.safetensors"
    ...     write_bundle(path, nn.Linear(2, 3), {"bias": Tensor([1.0, 2.0, 3.0])}, Knowledge())
    ...     holds_state(path)
    True
    """
    return bool(_part(_open(path)[0], "state/"))


def model_name(path: Path) -> str:
    """The name of the model that the bundle was captured from: shown to people, never imported.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "seen.safetensors"
    ...     write_bundle(path, nn.Linear(2, 3), {"bias": Tensor([1.0, 2.0, 3.0])}, Knowledge())
    ...     model_name(path)
    'Linear'
    """
    return _open(path)[1].get("model", "unnamed")


def bundle_notes(path: Path) -> tuple[str, ...]:
    """How the exchange in a bundle was captured, in the words of who wrote it; empty where they say nothing.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "seen.safetensors"
    ...     write_bundle(path, nn.Linear(2, 3), {"bias": Tensor([1.0, 2.0, 3.0])}, Knowledge(), ["read from a.npz."])
    ...     bundle_notes(path)
    ('read from a.npz.',)
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            held = json.loads((file.metadata() or {}).get("notes", "[]"))
    except (SafetensorError, ValueError, RecursionError, OSError) as error:
        raise UnbatchError(f"{path}: the metadata entry 'notes' is no JSON: {error}.") from None
    return tuple(map(str, held)) if isinstance(held, list) else ()


def is_bundle(path: Path) -> bool:
    """Whether a file says of itself that it is a bundle; False also of one that is none or cannot be read.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "seen.safetensors"
    ...     write_bundle(path, nn.Linear(2, 3), {"bias": Tensor([1.0, 2.0, 3.0])}, Knowledge())
    ...     is_bundle(path), is_bundle(Path(folder) / "gone")
    (True, False)
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (SafetensorError, struct.error, ValueError, OSError):
        return False


def _open(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise UnbatchError(f"cannot read {path}: {error.strerror}.") from None
    if head[8:] != b"{" and (kind := _other_kind(path, head)):  # a header's length precedes its brace
        raise UnbatchError(f"{path} is {kind}")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, struct.error, ValueError, OSError) as error:
        raise UnbatchError(f"{path} is no whole safetensors file ({error}); copy or capture it again.") from None
    if metadata.get("format") != FORMAT or metadata.get("schema") != SCHEMA:
        got = f"format {metadata.get('format', 'none')!r}, schema {metadata.get('schema', 'none')!r}"
        raise UnbatchError(
            f"{path} has {got}; this version reads {FORMAT!r}, schema {SCHEMA!r}. See docs/bundle-format.md."
        )
    return tensors, metadata


def _other_kind(path: Path, head: bytes) -> str | None:
    """What a file is that is no bundle, and what to do with it, by how it begins; None where that tells nothing."""
    names = list[str]()
    if head[:4] == b"PK\x03\x04":
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
            return "a damaged zip archive; copy or capture it again."
    if head[:6] == b"\x93NUMPY" or any(name.endswith(".npy") for name in names):
        return (
            f"a numpy {'archive (npz)' if names else 'array (npy)'}, and no bundle. unbatch.read_exchange(path, "
            "model=model, loss=loss) reads it, with before= of weights after training; `unbatch bundle` makes it one."
        )
    if head[:4] == b"\x89HDF":
        return "an HDF5 file; read its arrays with h5py, and give them to unbatch.as_update(model, ...)."
    if head[:1] == b"\x80" or any(name.endswith(".pkl") for name in names):
        return (
            "a pickle (torch.save), which can run code when it is opened, so it is not opened here. unbatch.read_exchange "
            "reads tensors from it in a process of its own; `unbatch bundle` makes a bundle of it."
        )
    if names:
        return f"a zip archive of {len(names)} files ({names[0]}), and no bundle. See docs/bundle-format.md."
    return None


def _earlier(tensors: dict[str, Tensor], path: Path) -> list[Earlier]:
    """Rounds 0, 1 ... of names N/update/NAME and N/state/NAME. Raises UnbatchError: the numbers are no such."""
    numbers = {name.partition("/")[0] for name in tensors}
    wanted = [str(k) for k in range(len(numbers))]
    if numbers != set(wanted):
        raise UnbatchError(f"{path} numbers its earlier rounds {', '.join(sorted(numbers))}; number them 0, 1, 2 ...")
    parts = [_part(tensors, f"{k}/") for k in wanted]
    return [Earlier(update=_part(part, "update/"), state=_part(part, "state/")) for part in parts]


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
