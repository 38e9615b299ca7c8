"""Pictures of a folder, with values by their bit depth and the folder's sub-folders as classes."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from unbatch.data.bounds import check_picture
from unbatch.data.examples import Data
from unbatch.data.labels import WHOLE_NUMBER, Classes, Labels, named_classes, text_labels
from unbatch.domain import Images
from unbatch.errors import UnbatchError

if TYPE_CHECKING:
    from PIL.Image import Image

_SHOWN = 8  # names in a note
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"}


@dataclass
class _Reading:
    """What was done to the pictures, counted by its words."""

    size: int | None
    done: Counter[str] = field(default_factory=Counter)

    def note(self, words: str) -> None:
        self.done[words] += 1

    def notes(self, n: int) -> list[str]:
        """A sentence each, with how many pictures it is about."""
        return [
            f"{'all' if count == n else f'{count} of {n}'} pictures: {words}." for words, count in self.done.items()
        ]


def read_pictures(path: Path, size: int | None, classes: Classes) -> Data:
    """All pictures under a folder: [1, h, w] where every one is grey, else [3, h, w], in [0, 1].

    Raises UnbatchError: none, one that cannot be read or whose values have no range, different sizes, or no clear classes.
    """
    every = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
    files = [file for file in every if not any(_hidden(part) for part in file.relative_to(path).parts)]
    if not files:
        raise UnbatchError(f"{path} holds no images ({', '.join(sorted(SUFFIXES))}).")
    labels = _labels(path, files, classes)
    reading = _Reading(size)
    pictures = [_picture(file, reading) for file in files]
    sizes = {tuple(picture.shape[1:]) for picture in pictures}
    if len(sizes) > 1:
        raise UnbatchError(f"{path} holds images of {len(sizes)} sizes; give --size N to resize them to N x N.")
    if len({len(picture) for picture in pictures}) > 1:
        for picture in pictures:
            if len(picture) == 1:
                reading.note("grey repeated over three channels, since others are in colour")
        pictures = [picture.expand(3, -1, -1) for picture in pictures]
    inputs = torch.stack(pictures)
    shape = tuple(inputs.shape[1:])
    depth = "one grey channel, since every picture is grey" if shape[0] == 1 else "three channels"
    notes = [f"pictures are {list(shape)} in [0, 1]: {depth}.", *reading.notes(len(files)), *labels.notes]
    notes += _left_out(path, files)
    if len(files) < len(every):
        notes.append(f"{len(every) - len(files)} hidden files were left out.")
    return Data(inputs=inputs, labels=labels.values, domain=Images(shape=shape), classes=labels.classes, notes=notes)


def _left_out(path: Path, files: Sequence[Path]) -> list[str]:
    """What lies in the folder besides the pictures that were read: files of another kind, and folders without a picture."""
    notes, read = list[str](), set(files)
    shown = [p for p in sorted(path.rglob("*")) if not any(_hidden(part) for part in p.relative_to(path).parts)]
    others = [p.name for p in shown if p.is_file() and p not in read]
    if others:
        notes.append(f"files of another kind than {', '.join(sorted(SUFFIXES))} were left out: {_first(others)}.")
    held = {file.relative_to(path).parts[0] for file in files if len(file.relative_to(path).parts) > 1}
    empty = [p.name for p in shown if p.parent == path and p.is_dir() and p.name not in held]
    if held and empty:
        notes.append(f"folders without a picture were not counted as classes: {_first(empty)}.")
    return notes


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" ... ({len(names)} in all)" if len(names) > _SHOWN else "")


def _labels(path: Path, files: Sequence[Path], classes: Classes) -> Labels:
    """The first folder below `path` is the class; without sub-folders labels are not known."""
    places = [file.relative_to(path).parts for file in files]
    bare = [parts[0] for parts in places if len(parts) == 1]
    if len(bare) == len(files):
        if isinstance(classes, Sequence) and len(classes) > 1:
            raise UnbatchError(f"{path} has no sub-folders, so it does not say which picture is of which class.")
        names = named_classes(classes) if isinstance(classes, Sequence) else []
        note = (
            "labels are not known, since the folder has no sub-folders: every picture was given label 0. Sort them into "
            "one folder a class, or what is said of labels is worth nothing."
        )
        told = f"every picture has label 0, {names[0]}, as given." if names else note
        return Labels(values=torch.zeros(len(files), dtype=torch.long), classes=names, notes=[told])
    if bare:
        raise UnbatchError(
            f"{path} holds pictures beside its class folders ({', '.join(bare[:3])}), whose class is not known; move them "
            "into a folder of their class."
        )
    folders = sorted({parts[0] for parts in places})
    deep = {parts[:2] for parts in places if len(parts) > 2}
    if deep and len(folders) == 1:
        raise UnbatchError(
            f"{path} holds one folder, {folders[0]!r}, with folders in it ({', '.join(sorted(p[1] for p in deep)[:3])}); "
            f"give {path / folders[0]} if those are the classes."
        )
    answers = [parts[0] for parts in places]
    numbers = np.array([float(answer) for answer in answers]) if all(map(WHOLE_NUMBER.fullmatch, folders)) else None
    found = text_labels(answers, numbers, classes, what="folders")
    if deep:
        found.notes.append(f"classes are the first folders below {path.name}; deeper ones do not count.")
    return found


def _picture(file: Path, reading: _Reading) -> Tensor:
    """One picture [1 or 3, h, w] in [0, 1]. Raises UnbatchError: it cannot be read, or its values have no range."""
    from PIL import Image, ImageOps

    logging.getLogger("PIL").addHandler(logging.NullHandler())  # what it has to say is in its errors
    try:
        with warnings.catch_warnings(), Image.open(file) as image:
            warnings.simplefilter("ignore")  # of tags and profiles that are not read
            check_picture(file, image)
            if getattr(image, "n_frames", 1) > 1:
                reading.note("the first of several frames was taken")
            raw = _raw_mode(image)
            upright = ImageOps.exif_transpose(image)
            if image.getexif().get(0x0112, 1) != 1:  # Orientation
                reading.note("turned upright as the camera noted (EXIF)")
            values = _values(upright, raw, reading)
    except UnbatchError as error:
        raise UnbatchError(str(error) if str(file) in str(error) else f"{file}: {error}") from None
    except Exception as error:  # a broken file makes decoders fail in many ways
        words = str(error) or type(error).__name__
        raise UnbatchError(f"cannot read the image {file}: {words}. Remove or replace it.") from None
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))


def _values(image: Image, raw: str, reading: _Reading) -> np.ndarray:
    """Values [1 or 3, h, w] in [0, 1] by the bit depth that `raw`, the file's own layout, tells."""
    mode = image.mode
    if mode == "F" or mode[0] == "I":
        return _deep(image, raw, reading)
    if ";16" in raw:
        reading.note("16 bits a colour, of which the upper 8 were read")
    transparent = "transparency" in image.info or mode in ("RGBA", "LA", "PA", "RGBa", "La")
    if transparent and image.convert("RGBA").getchannel("A").getextrema() != (255, 255):
        reading.note("transparent parts were read in the colours stored below them")
    elif mode not in ("1", "L", "LA", "La", "P", "RGB", "RGBA", "RGBa"):
        reading.note(f"colours were converted from {mode} to RGB")
    grey = mode in ("1", "L", "LA", "La")
    plain = image.convert("L" if grey else "RGB")
    if mode in ("P", "PA"):
        reading.note("colours were looked up in the picture's palette")
        pixels = np.asarray(plain)
        if (pixels == pixels[..., :1]).all():
            plain = plain.getchannel(0)
    if reading.size is not None and plain.size != (reading.size, reading.size):
        reading.note(f"resized to {reading.size} x {reading.size}")
        plain = plain.resize((reading.size, reading.size), _lanczos())
    pixels = np.asarray(plain, dtype=np.float32) / np.float32(255)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _deep(image: Image, raw: str, reading: _Reading) -> np.ndarray:
    """Values [1, h, w] of one channel of more than 8 bits."""
    from PIL import Image as Pillow

    values = np.asarray(image).astype(np.float64)
    if image.mode == "F":
        low, high = float(values.min()), float(values.max())
        if not 0 <= low <= high <= 1:  # which NaN fails as well
            raise UnbatchError(
                f"floating point values from {low:g} to {high:g}, and nothing says what is black and white; scale them to "
                "[0, 1], or give an .npz file, whose values are taken as they are."
            )
        reading.note("floating point values in [0, 1] were kept as they stand")
    elif image.mode == "I" and raw not in ("I;16", "I;16B", "I;16N"):
        low, high = int(values.min()), int(values.max())
        raise UnbatchError(
            f"whole numbers of 32 bits, or signed ones, from {low} to {high}, and nothing says what is black and white; "
            "save the picture with 8 or 16 bits, or scaled to [0, 1] in an .npz file."
        )
    else:
        most = 4095 if raw.startswith("I;12") else 65535
        reading.note(f"{'12' if most == 4095 else '16'}-bit values were divided by {most:,}")
        values = values / most
    if reading.size is not None and image.size != (reading.size, reading.size):
        reading.note(f"resized to {reading.size} x {reading.size}")
        floats = Pillow.fromarray(values.astype(np.float32))
        values = np.asarray(floats.resize((reading.size, reading.size), _lanczos())).clip(0, 1)
    return np.asarray(values, dtype=np.float32)[None]


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _raw_mode(image: Image) -> str:
    """How the file itself lays out a pixel, as Pillow's decoder is told: 'RGB;16B' of a picture that is read as RGB."""
    layout = getattr(image, "tile", None)  # (decoder, box, offset, arguments) of each part
    arguments = layout[0][3] if layout else ""
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


def _lanczos() -> int:
    from PIL import Image

    return Image.Resampling.LANCZOS
