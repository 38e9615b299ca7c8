"""Bounds: what a file may unpack to, looked at before any of it is unpacked."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from unbatch.errors import UnbatchError
from unbatch.files import check_unpacked

if TYPE_CHECKING:
    from PIL.Image import Image


def check_npz(path: Path) -> None:
    """Looks at what the arrays of an .npz file claim to be; nothing is said of a file that is no zip archive.

    Raises UnbatchError: an array is none, claims more than its member holds, or would unpack beyond bounds.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        check_unpacked(path, sum(member.file_size for member in archive.infolist()), "its arrays")
        for member in archive.infolist():
            with archive.open(member) as stream:
                claimed = _claimed(path, member.filename, stream)
            if claimed > member.file_size:
                raise UnbatchError(
                    f"{path}: {member.filename} claims {claimed:,} bytes and holds {member.file_size:,}; save it again."
                )


def check_picture(path: Path, image: Image) -> None:
    """Looks at what a picture that was opened, but not read, claims to be. Raises UnbatchError as `check_unpacked` does."""
    width, height = image.size
    deep = 4 if image.mode[0] in "IF" else 1
    check_unpacked(path, width * height * len(image.getbands()) * deep, f"the picture of {width} x {height}")


def _claimed(path: Path, name: str, stream: IO[bytes]) -> int:
    """The bytes that an array's header claims."""
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream)
    except Exception as error:  # a header is a piece of Python, and its parser fails in many ways
        said = " ".join(str(error).split()) or type(error).__name__
        raise UnbatchError(f"{path}: {name} is no array of numpy: {said[:200]}. Save it with numpy.savez.") from None
    return int(math.prod(shape) * dtype.itemsize)
