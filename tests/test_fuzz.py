"""What is read from files: changed at random or made to overwhelm, each is read or refused in one line, within bounds."""

from __future__ import annotations

import io
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from mutants import KINDS, READ, REFUSED, Kind, Tried, outcome, tried

SAMPLE, WHOLE = 25, int(os.environ.get("UNBATCH_MUTANTS", "10000"))  # of every kind, and of all kinds together


def hold(name: str, found: Tried) -> None:
    assert not found.faults, f"{name}: {list(found.faults)}"
    assert set(found.counts) <= {READ, REFUSED}
    assert found.counts[REFUSED]


@pytest.mark.parametrize("name", list(KINDS))
def test_a_changed_file_is_read_or_refused_in_one_line(name: str, tmp_path: Path) -> None:
    hold(name, tried(KINDS[name], tmp_path, 8 if name == "torch weights" else SAMPLE))  # each in a process of its own


@pytest.mark.slow
@pytest.mark.parametrize("name", list(KINDS))
def test_ten_thousand_changed_files(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    share = -(-WHOLE // len(KINDS))
    found = tried(KINDS[name], tmp_path, share, seed=1)
    with capsys.disabled():
        print(f"\n{name}: {share} changed files, {found.counts[READ]} read, {found.counts[REFUSED]} refused")
    hold(name, found)


def png(width: int, height: int, rows: int) -> bytes:
    """A PNG of one colour, a thousandth of its pixels in bytes, of which it holds so many rows."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    pack, row = zlib.compressobj(9), bytes(1 + width)
    packed = b"".join(pack.compress(row) for _ in range(rows)) + pack.flush()
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def zipped(size: int, claimed: int) -> bytes:
    """An .npz whose inputs are so many zeros, packed to a thousandth, and claim to be so many."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as out:
        out.writestr("labels.npy", _npy(np.array([0])))
        with out.open("inputs.npy", "w", force_zip64=True) as member:
            text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': (1, {claimed}), }}".encode()
            text += b" " * (-(len(text) + 11) % 64) + b"\n"
            member.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text)
            for _ in range(0, size, 1 << 20):
                member.write(bytes(min(size, 1 << 20)))
    return stream.getvalue()


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def huge(header: dict[str, object]) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text


def _entry(kind: str, size: int) -> dict[str, object]:
    return {"dtype": kind, "shape": [size], "data_offsets": [0, size * int(kind[1:]) // 8]}


TOLD = {"format": "unbatch-observation", "schema": "1", "knowledge": "[" * 100_000}
BOMBS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "an npz that unpacks to a thousand times itself": ("npz", lambda: zipped(1 << 29, 1 << 29)),
    "an npz that claims more than it holds": ("npz", lambda: zipped(64, 1 << 40)),
    "a PNG of a billion pixels": ("pictures", lambda: png(30_000, 30_000, 10)),
    "a PNG of 80 million pixels": ("pictures", lambda: png(9_000, 9_000, 9_000)),
    "a header of safetensors that claims 8 TB": (
        "bundle",
        lambda: huge({"__metadata__": TOLD, "update/0.bias": _entry("F64", 2**40)}),
    ),
    "a header of safetensors that claims to be long": ("bundle", lambda: struct.pack("<Q", 2**62) + b"{" + b" " * 99),
    "what is known, a hundred thousand lists deep": (
        "bundle",
        lambda: huge({"__metadata__": TOLD, "update/0.bias": _entry("F32", 1)}) + bytes(4),
    ),
    "JSON a hundred thousand lists deep": ("gate", lambda: b"[" * 100_000),
    "JSON with a number of a hundred thousand digits": ("gate", lambda: b'{"schema_number": ' + b"9" * 100_000 + b"}"),
    "a csv with a field of a million letters": ("csv", lambda: b"age,label\n" + b"x" * 1_000_000 + b",1\n2,0\n"),
    "a csv with a text of its own in each of 20,000 rows": (
        "csv",
        lambda: b"name,label\n" + b"".join(b"n%d,%d\n" % (i, i % 2) for i in range(20_000)),
    ),
}


@pytest.mark.parametrize("words", list(BOMBS))
def test_what_would_overwhelm_is_refused(words: str, tmp_path: Path) -> None:
    name, made = BOMBS[words]
    kind: Kind = KINDS[name]
    assert outcome(kind, tmp_path / kind.name, made()) == REFUSED
