"""Arrays of an .npz file: inputs of any shape and labels of any form, each kind of number by its own rule."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from unbatch.data.bounds import check_npz
from unbatch.data.examples import Data
from unbatch.data.labels import (
    WHOLE_NUMBER,
    Classes,
    Labels,
    class_labels,
    named_classes,
    real_labels,
    text_labels,
    word_labels,
)
from unbatch.domain import domain_of
from unbatch.errors import UnbatchError

LONGEST_NUMBER = 18  # digits of a class number
INPUT_NAMES, LABEL_NAMES = ("inputs", "images", "x", "data"), ("labels", "y", "targets", "label")
_STARTS = (b"PK\x03\x04", b"PK\x05\x06", b"\x93NUM")  # a zip archive, an empty one, one array


def read_arrays(path: Path, classes: Classes) -> Data:
    """Inputs and labels of an .npz file, values as they stand but for pictures of 8 and 16 bits, which are scaled.

    Raises UnbatchError: no such file, arrays that hold objects, missing names, or whole numbers without a range.
    """
    arrays = named_arrays(path)
    x = next((arrays[key] for key in INPUT_NAMES if key in arrays), None)
    y = next((arrays[key] for key in LABEL_NAMES if key in arrays), None)
    if x is None or y is None:
        raise UnbatchError(
            f"{path} holds {', '.join(arrays) or 'nothing'}; it needs one of {', '.join(INPUT_NAMES)} and one of "
            f"{', '.join(LABEL_NAMES)}."
        )
    try:
        if classes is None and "classes" in arrays:
            classes = named_classes([str(name) for name in arrays["classes"].ravel().tolist()])
        return data_of(x, y, classes)
    except UnbatchError as error:
        raise UnbatchError(f"{path}: {error}") from None


def data_of(x: np.ndarray, y: np.ndarray, classes: Classes) -> Data:
    """Inputs and labels as a model and a loss take them, each kind of number by its own rule.

    Raises UnbatchError: text, complex numbers, whole numbers without a range, labels of no known form.
    """
    notes = list[str]()
    with np.errstate(all="ignore"):  # what is not finite afterwards is refused
        inputs = _inputs(x, notes)
        labels = _labels(y, classes)
    notes += labels.notes
    return Data(inputs=inputs, labels=labels.values, domain=domain_of(inputs), classes=labels.classes, notes=notes)


def named_arrays(
    path: Path, how: str = "Save it with numpy.savez(path, inputs=..., labels=...)."
) -> Mapping[str, np.ndarray]:
    """The arrays of an .npz file by name, within bounds; `how` says in a message what to do instead.

    Raises UnbatchError: no such file, or arrays of Python objects, which are pickles and not opened.
    """
    try:
        check_npz(path)
        with path.open("rb") as stream:
            if stream.read(len(_STARTS[0])) not in _STARTS:
                raise UnbatchError(f"cannot read {path}: it is no .npz file (a zip archive of arrays). {how}")
            stream.seek(0)
            file = np.load(stream, allow_pickle=False)
            if isinstance(file, np.ndarray):
                raise UnbatchError(f"{path} holds a single array without a name (.npy). {how}")
            with file:
                return {key: file[key] for key in file.files}
    except UnbatchError:
        raise
    except ValueError as error:
        if "allow_pickle" in str(error):
            raise UnbatchError(
                f"cannot read {path}: an array of Python objects is a pickle, which can run code when it is opened. Save "
                "text with numpy.array(names, dtype=str) and rows of one length."
            ) from None
        raise UnbatchError(f"cannot read {path}: {error} {how}") from None
    except (OSError, EOFError, MemoryError, NotImplementedError, RuntimeError, struct.error) as error:
        raise UnbatchError(f"cannot read {path}: {error or type(error).__name__} {how}") from None
    except (zipfile.BadZipFile, zlib.error) as error:
        raise UnbatchError(f"cannot read {path}: {error} {how}") from None


def _inputs(x: np.ndarray, notes: list[str]) -> Tensor:
    """Values as a model takes them. Raises UnbatchError: text, complex numbers, or whole numbers without a range."""
    kind, pictures = x.dtype, x.ndim >= 3
    if kind == np.uint8 or (kind == np.uint16 and pictures):
        most = int(np.iinfo(kind).max)
        x = x.astype(np.float32) / np.float32(most)
        notes.append(f"inputs: {8 * kind.itemsize}-bit values were divided by {most:,}.")
    elif kind == np.bool_:
        x = x.astype(np.float32)
        notes.append("inputs: false and true were read as 0 and 1.")
    elif kind.kind in "iu":
        if pictures:
            low, high = (int(x.min()), int(x.max())) if x.size else (0, 0)
            raise UnbatchError(
                f"inputs of shape {list(x.shape)} are {kind} from {low} to {high}, and nothing says what range that is; "
                "scale them to [0, 1] as float32, or save pictures as uint8 or uint16."
            )
        x = _whole(x, "inputs")
        notes.append("inputs: whole numbers were read as token numbers; save them as float32 if they are values.")
    elif kind.kind != "f":
        raise UnbatchError(f"inputs of kind {kind} are no numbers that a model takes; save them as float32.")
    elif kind.itemsize not in (4, 8):
        x = x.astype(np.float32 if kind.itemsize < 4 else np.float64)
        notes.append(f"inputs: {kind} was read as {x.dtype}.")
    inputs = torch.from_numpy(np.ascontiguousarray(x, dtype=x.dtype.newbyteorder("=")))
    if inputs.ndim == 3 and kind in (np.uint8, np.uint16):
        inputs = inputs.unsqueeze(1)
        notes.append("inputs: pictures without a channel were given one.")
    if inputs.ndim == 4 and inputs.shape[-1] in (1, 3) and inputs.shape[1] not in (1, 3):
        inputs = inputs.permute(0, 3, 1, 2).contiguous()
        notes.append("inputs: channels were moved first.")
    if kind.kind == "f" and inputs.numel() and not 0 <= float(inputs.min()) <= float(inputs.max()) <= 1:
        notes.append(f"inputs: values were taken as they stand, {float(inputs.min()):g} to {float(inputs.max()):g}.")
    return inputs


def _labels(y: np.ndarray, classes: Classes) -> Labels:
    """Labels by their kind and shape: [n] class numbers, words or real targets, [n, k] one-hot or real, or per position."""
    kind, shape = y.dtype.kind, list(y.shape)
    column = y.ndim == 2 and shape[1] == 1
    if kind in "US":
        words = [w.decode("utf-8", "replace") if isinstance(w, bytes) else str(w) for w in y.ravel().tolist()]
        if len(words) != len(y):
            raise UnbatchError(f"labels of shape {shape} are text; give one word an example.")
        if all(
            WHOLE_NUMBER.fullmatch(word) and len(word) <= LONGEST_NUMBER for word in words
        ):  # as a column of a table
            return text_labels(words, np.array([float(word) for word in words]), classes, what="labels")
        return word_labels(words, classes, what="labels")
    if kind == "f":
        return _real(torch.from_numpy(y.astype(np.float64 if y.dtype.itemsize > 4 else np.float32)), classes)
    if kind not in "biu":
        raise UnbatchError(f"labels of kind {y.dtype} are neither numbers nor text; save class numbers as int64.")
    numbers = torch.from_numpy(_whole(y, "labels"))
    if column:
        found = class_labels(numbers[:, 0], classes, what="labels")
        found.notes.append(f"labels: the shape {shape} of class numbers was read as {shape[:1]}.")
        return found
    if numbers.ndim == 2 and bool(((numbers == 0) | (numbers == 1)).all()) and bool((numbers.sum(1) == 1).all()):
        found = _real(numbers.float(), classes)
        found.notes[:] = [f"labels: one-hot rows of {shape[1]} classes, kept as targets {shape}."]
        return found
    if len(numbers) and int(numbers.min()) < 0 and numbers.ndim == 1:
        found = real_labels(numbers.float(), classes, what="labels")
        found.notes.append("labels: class numbers would be at least 0.")
        return found
    return class_labels(numbers, classes, what="labels")


def _real(numbers: Tensor, classes: Classes) -> Labels:
    """Real targets; the names of their columns where targets are [n, k] and as many names are given."""
    if numbers.ndim != 2 or numbers.shape[1] < 2:
        return real_labels(numbers, classes, what="labels")
    names = named_classes(classes) if classes is not None and not isinstance(classes, int) else []
    count = classes if isinstance(classes, int) else len(names) or numbers.shape[1]
    if count != numbers.shape[1]:
        raise UnbatchError(f"labels are targets of {numbers.shape[1]} classes, but {count} classes are given.")
    return Labels(values=numbers, classes=names, notes=real_labels(numbers, None, what="labels").notes)


def _whole(numbers: np.ndarray, what: str) -> np.ndarray:
    """Whole numbers as int64. Raises UnbatchError: one of them does not fit."""
    if numbers.dtype == np.uint64 and numbers.size and int(numbers.max()) > np.iinfo(np.int64).max:
        raise UnbatchError(f"{what} hold {int(numbers.max())}, which is beyond 64-bit whole numbers.")
    return np.ascontiguousarray(numbers, dtype=np.int64)
