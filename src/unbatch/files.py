"""Files: written whole or not at all, in a folder that one writer holds at a time, and read within bounds."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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


ALWAYS = 1 << 24  # bytes that a file of any size may unpack to
TIMES = (
    100  # its own size, that a larger one may: data pack to a tenth, what unpacks to a thousand is made to overwhelm
)


def check_unpacked(path: Path, bytes_unpacked: int, what: str) -> None:
    """Refuses what would unpack to far more than its file holds.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile() as file:
    ...     try:
    ...         check_unpacked(Path(file.name), 10**9, "the picture")
    ...     except UnbatchError as error:
    ...         print(str(error).partition(": ")[2])
    the picture would take 1,000 MB, unpacked from a file of 0.0 MB. Save it less densely packed, or in parts.

    Raises UnbatchError: more than ALWAYS, and more than TIMES the file's size.
    """
    size = path.stat().st_size
    if bytes_unpacked > max(ALWAYS, TIMES * size):
        raise UnbatchError(
            f"{path}: {what} would take {bytes_unpacked / 1e6:,.0f} MB, unpacked from a file of {size / 1e6:,.1f} MB. Save "
            "it less densely packed, or in parts."
        )


LOCK = ".unbatch.lock"


@contextmanager
def claimed(folder: Path, *names: str) -> Iterator[None]:
    """Holds a folder for writing `names` to it: made where it is not there, tried for writing, and nobody else's meanwhile.

    The system lets go of the lock when its process ends, however it ends, so that one left behind holds nobody up. Parts of
    `names` that a killed writer left are swept up, and a folder that is still empty in the end is taken away again.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as place, claimed(Path(place)):
    ...     try:
    ...         with claimed(Path(place)):
    ...             pass
    ...     except UnbatchError as error:
    ...         print("another process writes to" in str(error))
    True

    Raises UnbatchError: it is a file, cannot be written to, or is held; the message says what to do.
    """
    fresh = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600)
    except OSError as error:
        what = f"{folder} is a file" if folder.is_file() else f"cannot write to the folder {folder}: {error.strerror}"
        raise UnbatchError(f"{what}; name another place with --out. Nothing was run.") from None
    with os.fdopen(handle, "r+") as lock:
        if not _locked(lock.fileno(), folder / LOCK):
            who = lock.read(32).strip()
            process = f" (number {who})" if who.isdigit() else ""
            raise UnbatchError(
                f"another process writes to {folder}{process}; wait for its end, or name another folder with --out."
            )
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        for name in names:
            for part in folder.glob(f"{name}*.tmp"):
                part.unlink(missing_ok=True)
        try:
            yield
        finally:
            with suppress(OSError):
                (folder / LOCK).unlink()
                if fresh and not any(folder.iterdir()):
                    folder.rmdir()


def _locked(handle: int, path: Path) -> bool:
    """Whether the open file at `path` is now this process' own, until it is closed."""
    try:
        import fcntl
    except ImportError:  # Windows has no such lock: two writers are not told apart there
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(handle), os.stat(path))  # not one that its holder has just taken away
    except OSError:
        return False
