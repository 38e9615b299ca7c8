"""Files: written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from unbatch.errors import UnbatchError


def write_atomically(path: Path, content: str | bytes, *, private: bool = False) -> None:
    """Write to a temporary file beside `path`, then rename it: a reader sees the old file or the new one, never a part.

    `private`: only the owner may read it, for what holds private examples in the clear.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "new" / "report.txt"
    ...     write_atomically(path, "whole", private=True)
    ...     path.read_text(), oct(path.stat().st_mode)[-3:]
    ('whole', '600')

    Raises UnbatchError: what the disk said, and what to do.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o600 if private else 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise UnbatchError(
            f"cannot write {path}: {error.strerror}. What stood there before is untouched; free space or name another "
            "place."
        ) from error
