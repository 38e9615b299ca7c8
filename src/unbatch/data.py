"""Data: a user's own examples from an npz file, a folder of images or a csv table."""

from __future__ import annotations

import csv
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from unbatch.domain import Domain, Images, Table, domain_of
from unbatch.errors import UnbatchError

_INPUTS, _LABELS = ("inputs", "images", "x", "data"), ("labels", "y", "targets", "label")
_PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"}


@dataclass(frozen=True, kw_only=True)
class Data:
    """Examples with labels, ready for a Setting."""

    inputs: Tensor  # [n, ...]
    labels: Tensor  # [n]
    domain: Domain
    classes: Sequence[str] = ()
    notes: Sequence[str] = ()  # what was done to read them


def read(path: Path, *, size: int | None = None) -> Data:
    """Read by what `path` is: a folder of images, `.npz`, or `.csv`. `size` resizes pictures to size x size.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "people.csv"
    ...     _ = path.write_text("age,job,label\\n39,clerk,no\\n50,cook,yes\\n")
    ...     data = read(path)
    >>> data.domain.columns, data.labels.tolist(), list(data.classes)
    (('age', 'job=clerk', 'job=cook'), [0, 1], ['no', 'yes'])

    Raises UnbatchError: nothing there, an empty folder, a file that cannot be read, or examples of different shapes.
    """
    if not path.exists():
        raise UnbatchError(f"{path} does not exist; give an .npz file, a .csv file or a folder of images.")
    if path.is_dir():
        return _folder(path, size)
    if path.suffix == ".npz":
        return _npz(path)
    if path.suffix == ".csv":
        return _csv(path)
    raise UnbatchError(f"{path}: unknown kind {path.suffix!r}; give an .npz file, a .csv file or a folder of images.")


def _npz(path: Path) -> Data:
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise UnbatchError(
            f"cannot read {path}: {error} Save it with numpy.savez(path, inputs=..., labels=...)."
        ) from None
    x = next((arrays[key] for key in _INPUTS if key in arrays), None)
    y = next((arrays[key] for key in _LABELS if key in arrays), None)
    if x is None or y is None:
        raise UnbatchError(
            f"{path} holds {', '.join(arrays) or 'nothing'}; it needs one of {', '.join(_INPUTS)} and one of "
            f"{', '.join(_LABELS)}."
        )
    notes = []
    inputs = torch.as_tensor(x)
    if inputs.dtype == torch.uint8:
        inputs = inputs.float() / 255
        notes.append("8-bit values were divided by 255.")
        if inputs.ndim == 3:
            inputs = inputs.unsqueeze(1)
    if inputs.ndim == 4 and inputs.shape[-1] in (1, 3) and inputs.shape[1] not in (1, 3):
        inputs = inputs.permute(0, 3, 1, 2).contiguous()
        notes.append("channels were moved first.")
    inputs = inputs.float() if inputs.dtype == torch.float16 else inputs
    labels = torch.as_tensor(y)
    labels = labels.long() if not labels.is_floating_point() else labels
    names = [str(name) for name in arrays["classes"].tolist()] if "classes" in arrays else []
    return Data(inputs=inputs, labels=labels, domain=domain_of(inputs), classes=names, notes=notes)


def _folder(path: Path, size: int | None) -> Data:
    from PIL import Image, UnidentifiedImageError

    files = sorted(f for f in path.rglob("*") if f.suffix.lower() in _PICTURES)
    if not files:
        raise UnbatchError(f"{path} holds no images ({', '.join(sorted(_PICTURES))}).")
    pictures = []
    for file in files:
        try:
            with Image.open(file) as image:
                picture = image.convert("RGB")
            if size is not None:
                picture = picture.resize((size, size), Image.Resampling.LANCZOS)
            pictures.append(torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float() / 255)
        except (UnidentifiedImageError, OSError) as error:
            raise UnbatchError(f"cannot read the image {file}: {error}. Remove or replace it.") from None
    shapes = {tuple(picture.shape) for picture in pictures}
    if len(shapes) > 1:
        raise UnbatchError(f"{path} holds images of {len(shapes)} sizes; give --size N to resize them to N x N.")
    folders = [file.relative_to(path).parts[0] if file.parent != path else "" for file in files]
    classes = sorted(set(folders))
    notes = [] if classes != [""] else ["no sub-folders, so every picture has label 0; name one folder a class."]
    inputs = torch.stack(pictures)
    labels = torch.tensor([classes.index(folder) for folder in folders])
    names = classes if classes != [""] else []
    return Data(inputs=inputs, labels=labels, domain=Images(shape=tuple(inputs.shape[1:])), classes=names, notes=notes)


def _csv(path: Path) -> Data:
    try:
        with path.open(newline="") as file:
            rows = [row for row in csv.reader(file) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UnbatchError(f"cannot read {path} as a csv table: {error}.") from None
    if len(rows) < 2:
        raise UnbatchError(f"{path} holds no rows below its header; it needs a header row and one row an example.")
    header, body = [name.strip() for name in rows[0]], rows[1:]
    ragged = next((i for i, row in enumerate(body, 2) if len(row) != len(header)), None)
    if ragged is not None:
        raise UnbatchError(f"{path}, line {ragged}: {len(body[ragged - 2])} fields where the header has {len(header)}.")
    target = next((i for i, name in enumerate(header) if name.lower() in _LABELS), len(header) - 1)
    columns: list[np.ndarray] = []
    names: list[str] = []
    for i, name in enumerate(header):
        if i != target:
            values = [row[i].strip() for row in body]
            more = _column(name, values)
            columns += [column for _, column in more]
            names += [title for title, _ in more]
    if not columns:
        raise UnbatchError(f"{path} has only the label column {header[target]!r}; it needs at least one more.")
    inputs = torch.from_numpy(np.stack(columns, 1)).float()  # [n, d]
    answers = [row[target].strip() for row in body]
    classes = sorted(set(answers))
    domain = Table(shape=(len(names),), low=-10.0, high=10.0, columns=tuple(names))
    notes = [f"labels are column {header[target]!r}; numeric columns were standardised, others one-hot encoded."]
    labels = torch.tensor([classes.index(answer) for answer in answers])
    return Data(inputs=inputs, labels=labels, domain=domain, classes=classes, notes=notes)


def _column(name: str, values: Sequence[str]) -> list[tuple[str, np.ndarray]]:
    """A numeric column standardised, or a text column as one column of 0 and 1 for each value."""
    try:
        numbers = np.array([float(value) for value in values])
    except ValueError:
        return [(f"{name}={v}", np.array([value == v for value in values], float)) for v in sorted(set(values))]
    if not np.isfinite(numbers).all():
        raise UnbatchError(f"column {name!r} holds NaN or infinite values; fill or drop those rows.")
    spread = numbers.std()
    return [(name, (numbers - numbers.mean()) / (spread if spread > 0 else 1.0))]
