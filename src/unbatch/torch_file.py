"""Torch file: what torch.save wrote, opened in a process of its own, in which nothing but tensors and plain values is made.

A pickle can run code when it is opened. `torch.load(weights_only=True)` refuses to, and has had holes; so even that is left
to a process that ends with it, and hands over a safetensors file and JSON.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from unbatch.errors import UnbatchError
from unbatch.files import check_unpacked

LONGEST_READ = 600  # seconds that the process may take
_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # that torch.save wrote before it wrote zip archives
_FORM, _TENSORS = "form.json", "tensors.safetensors"
_PROGRAM = "import sys; from unbatch.torch_file import lay_out; lay_out(sys.argv[1], sys.argv[2])"


def read_torch_file(path: Path) -> Any:
    """What torch.save wrote, as tensors in mappings and lists with numbers and texts; it is opened in another process.

    Tensors come dense and on the CPU. What is neither a tensor, an array nor a plain value is left out: None stands for it.
    Raises UnbatchError: no such file, or it holds objects whose code would have to be run, or is none of torch's.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "state.pt"
    ...     try:
    ...         read_torch_file(path)
    ...     except UnbatchError as error:
    ...         print("cannot read" in str(error))
    True
    """
    _check_kind(path)
    with tempfile.TemporaryDirectory(prefix="unbatch-") as folder:
        places = {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry), "CUDA_VISIBLE_DEVICES": ""}
        words = [sys.executable, "-P", "-c", _PROGRAM, str(path.resolve()), folder]
        try:
            done = subprocess.run(
                words, env=os.environ | places, capture_output=True, text=True, timeout=LONGEST_READ, check=False
            )
        except subprocess.TimeoutExpired:
            raise UnbatchError(f"{path} was not read within {LONGEST_READ} s; save it as safetensors.") from None
        form = Path(folder) / _FORM
        if done.returncode or not form.exists():
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise UnbatchError(f"{path} cannot be read as what torch.save wrote ({last[:200]}). {_INSTEAD}")
        told = json.loads(form.read_text())
        if "refused" in told:
            raise UnbatchError(f"{path} {told['refused']}")
        tensors = Path(folder) / _TENSORS
        return _rebuilt(told["held"], load_file(tensors) if tensors.exists() else {})


_INSTEAD = (
    "Save tensors by name with safetensors.torch.save_file(model.state_dict(), path), or arrays in their order with "
    "numpy.savez(path, *arrays)."
)


def _check_kind(path: Path) -> None:
    """Raises UnbatchError: no file, or by how it begins none that torch.save wrote."""
    try:
        with path.open("rb") as file:
            head = file.read(len(_MAGIC))
        if head == _MAGIC:
            return
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith(".pkl") for name in archive.namelist()):
                return
    except OSError as error:
        raise UnbatchError(f"cannot read {path}: {error.strerror}.") from None
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        pass
    if head[:1] == b"\x80":
        raise UnbatchError(
            f"{path} is a pickle, but not of torch.save; it could run code when it is opened, so it is not. {_INSTEAD}"
        )
    raise UnbatchError(f"{path} is no file that torch.save wrote. {_INSTEAD}")


def lay_out(path: str, into: str) -> None:
    """Opens a torch file with `weights_only` and leaves what is in it in a folder, or why it is not opened: run by itself.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     torch.save({"weight": torch.ones(2)}, f"{folder}/state.pt")
    ...     lay_out(f"{folder}/state.pt", folder)
    ...     json.loads((Path(folder) / _FORM).read_text())
    {'held': {'mapping': [['weight', {'tensor': '0'}]]}}
    """
    tensors = dict[str, Tensor]()
    told: dict[str, Any]
    allowed = getattr(torch.serialization, "safe_globals", lambda names: nullcontext())
    try:
        with allowed(_numpy_s_own()), open(path, "rb") as file:  # of a path torch looks at the suffix
            held = torch.load(file, map_location="cpu", weights_only=True)
        told = {"held": _taken_apart(held, tensors, Path(path))}
        if tensors:
            save_file(tensors, Path(into) / _TENSORS)
    except UnbatchError as error:
        told = {"refused": str(error).removeprefix(f"{path} ").removeprefix(f"{path}: ")}
    except Exception as error:  # of whatever an unpickler stumbles over
        told = {"refused": _refusal(error)}
    (Path(into) / _FORM).write_text(json.dumps(told))


def _refusal(error: Exception) -> str:
    said = " ".join(str(error).split())
    name = re.search(r"GLOBAL ([\w.]+)", said)
    if name:
        return (
            f"holds an object ({name[1]}) and not tensors alone; to open it would run its code, so it is not opened. "
            f"{_INSTEAD}"
        )
    if "TorchScript" in said:
        return f"is a TorchScript archive, a program and not tensors. {_INSTEAD}"
    return f"cannot be read as what torch.save wrote ({type(error).__name__}). {_INSTEAD}"


def _numpy_s_own() -> list[Any]:
    """What numpy's arrays are pickled by, which makes arrays and nothing else."""
    core = getattr(np, "_core", None) or np.core
    kinds = {type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "?")}
    return [core.multiarray._reconstruct, core.multiarray.scalar, np.ndarray, np.dtype, *kinds]


def _taken_apart(value: Any, tensors: dict[str, Tensor], path: Path) -> dict[str, Any]:
    """The form of a value, as JSON; its tensors are put among `tensors`, each by a number."""
    if isinstance(value, np.ndarray | np.generic) and np.asarray(value).dtype.kind in "fiub":
        value = torch.from_numpy(np.ascontiguousarray(value).reshape(np.shape(value)))
    if isinstance(value, Tensor):
        size = sum(tensor.nbytes for tensor in tensors.values()) + value.numel() * value.element_size()
        check_unpacked(path, size, "its tensors")
        tensors[str(len(tensors))] = _solid(value)
        return {"tensor": str(len(tensors) - 1)}
    if isinstance(value, Mapping):
        keys = [key if isinstance(key, str | int) else str(key) for key in value]
        return {"mapping": [[k, _taken_apart(v, tensors, path)] for k, v in zip(keys, value.values(), strict=True)]}
    if isinstance(value, list | tuple | set | frozenset):
        return {"list": [_taken_apart(each, tensors, path) for each in value]}
    return {"plain": value if isinstance(value, bool | int | float | str) else None}


def _solid(tensor: Tensor) -> Tensor:
    """A tensor by itself: dense, in order, sharing memory with no other."""
    whole = tensor.detach().dequantize() if tensor.is_quantized else tensor.detach()
    return (whole.to_dense() if whole.layout != torch.strided else whole).clone(memory_format=torch.contiguous_format)


def _rebuilt(form: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    if "tensor" in form:
        return tensors[form["tensor"]]
    if "mapping" in form:
        return {key: _rebuilt(value, tensors) for key, value in form["mapping"]}
    if "list" in form:
        return [_rebuilt(value, tensors) for value in form["list"]]
    return form["plain"]
