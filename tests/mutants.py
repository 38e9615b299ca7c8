"""Mutants: files of every kind that is read, changed at random, and what a reader of each may do with one.

A reader may return, or raise an UnbatchError of one line. Anything else is a fault: another exception, a warning, a hang,
or memory beyond twice the file and a floor. ``python tests/mutants.py 10000 SEED [KIND ...]`` tries as many and prints
what it found.
"""

from __future__ import annotations

import io
import json
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save
from torch import nn
from torch.nn import functional as F

import unbatch
from unbatch import Knowledge, Observation, UnbatchError
from unbatch.command.blame import said
from unbatch.command.named import load_weights
from unbatch.data import read
from unbatch.reporting.gate import breaches
from unbatch.reporting.html import render
from unbatch.reporting.results import Audit

FLOOR = 192 << 20  # bytes that a reader may map beside twice the file: interpreters and allocators map in large pieces
SECONDS = 10.0  # after which a reader hangs
ODD = (
    None,
    True,
    -1,
    0,
    2**31,
    2**63,
    10**30,
    -0.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "é" * 99,
    [],
    {},
    [[]],
    {"a": 1},
)
DEEP = "[" * 3000


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).eval()


CLIENT = {"inputs": torch.linspace(0, 1, 8).view(2, 4), "labels": torch.tensor([0, 2])}


def setting() -> unbatch.Setting:
    return unbatch.Setting(model=network(), loss=F.cross_entropy, **CLIENT)


def an_audit(resume: Audit | None = None) -> Audit:
    attacks, analyses = ["bias-ratio", "label-count"], ["gradient-rank"]
    return unbatch.audit(setting(), attacks=attacks, analyses=analyses, resume=resume)


def audits(folder: Path) -> list[bytes]:
    shown = unbatch.audit(unbatch.cases.Digits(batch=2, width=8), attacks=["bias-ratio"], analyses=["gradient-rank"])
    return [an_audit().model_dump_json().encode(), shown.model_dump_json().encode()]


def bundles(folder: Path) -> list[bytes]:
    """One with the hash of its state, which refuses whatever was changed of that, and one without."""
    model, path = network(), folder / "seed"
    known = Knowledge(labels=torch.tensor([0, 2]), noise=0.1, input_range=(0, 1), domain="table")
    rules = unbatch.Protocol(rounds=2, server_rate=0.1, mode="eval")
    seen, _ = unbatch.observe(model, F.cross_entropy, *CLIENT.values(), knowledge=known, protocol=rules)
    seen.save(path)
    with safe_open(path, framework="pt") as file:
        held, told = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118 (not a dict)
    del told["state_sha256"]
    return [path.read_bytes(), save(held, told)]


def arrays(**held: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **held)  # type: ignore[arg-type]
    return stream.getvalue()


def picture(kind: str) -> bytes:
    stream = io.BytesIO()
    pixels = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


@dataclass(frozen=True)
class Kind:
    """A kind of file: whole ones to begin with, what reads them, and how they are changed beneath their checksums."""

    name: str  # of the file
    whole: Callable[[Path], list[bytes]]
    reads: Callable[[Path], object]
    inside: Callable[[bytes, random.Random], bytes] | None = None


def changed(data: bytes, rng: random.Random) -> bytes:
    """One to four changes of bytes."""
    held = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at, size = rng.randrange(len(held) + 1), rng.choice((1, 2, 4, 8, 64))
        way = rng.randrange(8)
        if way == 0:
            held[at : at + 1] = bytes([rng.randrange(256)])
        elif way == 1:
            held[at : at + size] = rng.randbytes(size)
        elif way == 2:
            del held[at : at + size]
        elif way == 3:
            del held[at:]
        elif way == 4:
            held[at:at] = held[: rng.randrange(200)]
        elif way == 5:
            held[at : at + 8] = struct.pack(
                "<Q", rng.choice((0, 1, 2**16, 2**31 - 1, 2**32 - 1, 2**40, 2**63, 2**64 - 1))
            )
        elif way == 6:
            held[at : at + 4] = struct.pack(">I", rng.choice((0, 1, 2**16, 2**31 - 1, 2**32 - 1)))
        else:
            held[at:at] = rng.choice(
                (b"9" * 400, b'"', b"\0", b"\xff", b",,,\n", DEEP.encode(), b"1e999", b"nan", b"\n")
            )
    return bytes(held)


def nodes(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every place of a tree of JSON: its holder and its key there."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(pairs):
        yield tree, key
        yield from nodes(value)


def odd_tree(tree: Any, rng: random.Random) -> Any:
    """A tree with one to three of its values gone, odd, or another's."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = list(nodes(tree))
        if not places:
            break
        holder, key = rng.choice(places)
        way = rng.randrange(5)
        if way == 0:
            del holder[key]
        elif way == 1 and isinstance(holder, list):
            holder.append(holder[key])
        elif way == 2:
            other, at = rng.choice(places)
            holder[key] = json.loads(json.dumps(other[at]))
        elif way == 3 and isinstance(holder, dict):
            holder[rng.choice(("more", "update/x", "state/", "shape", ""))] = holder.pop(key)
        else:
            holder[key] = rng.choice(ODD)
    return tree


def inside_json(data: bytes, rng: random.Random) -> bytes:
    return json.dumps(odd_tree(json.loads(data), rng)).encode()


def inside_safetensors(data: bytes, rng: random.Random) -> bytes:
    """The header changed as JSON, its length right again; what is known besides changed as JSON as well."""
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    told = header.get("__metadata__", {})
    if "knowledge" in told and rng.random() < 0.5:
        facts = json.loads(told["knowledge"])
        facts[rng.choice(list(unbatch.knowledge.FIELDS))] = rng.choice(ODD)
        told["knowledge"] = rng.choice((json.dumps(odd_tree(facts, rng)), json.dumps(facts), DEEP))
    else:
        names = [name for name in header if name != "__metadata__"]
        name = rng.choice(names)
        way = rng.randrange(4)
        if way == 0:
            header[name]["dtype"] = rng.choice(
                ("F16", "I32", "U32", "I64", "F64", "U64", "BOOL", "U8", "F8_E4M3", "C64", "F4")
            )
        elif way == 1:
            header[rng.choice(names)] = header.pop(name)
        elif way == 2:
            header[name]["shape"] = rng.choice(
                ([0], [], [2**40], [-1], [1, *header[name]["shape"]], header[name]["shape"][::-1])
            )
        else:
            odd_tree(header, rng)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


def inside_zip(data: bytes, rng: random.Random) -> bytes:
    """A member changed, with a checksum that agrees again."""
    with zipfile.ZipFile(io.BytesIO(data)) as held:
        members = {name: held.read(name) for name in held.namelist()}
    name = rng.choice(list(members))
    if rng.random() < 0.5:
        members[name] = changed(members[name], rng)
    else:
        shape, kind = (
            rng.choice(("(2**40,)", "(9999999999,)", "(2, 8, 8)", "()", "(0,)", "(-1,)")),
            rng.choice(("<f8", "|O", "<U9", "<M8[s]", "<c16", ">f2", "|b1", "<u2", "<f16", "|V7")),
        )
        text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".encode()
        text += b" " * (-(len(text) + 11) % 64) + b"\n"
        members[name] = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + members[name][128:]
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as out:
        for key, value in members.items():
            out.writestr(key, value)
    return stream.getvalue()


def inside_png(data: bytes, rng: random.Random) -> bytes:
    """The header of a PNG changed, with a checksum that agrees again; other pictures are changed by bytes."""
    if not data.startswith(b"\x89PNG"):
        return changed(data, rng)
    held = bytearray(data)
    at = rng.randrange(16, 29)
    held[at] = rng.randrange(256)
    held[29:33] = struct.pack(">I", zlib.crc32(bytes(held[12:29])))
    return bytes(held)


def gated(path: Path) -> object:
    return breaches(Audit.load(path), max_recovered=0, max_psnr=20, require_bound_psnr=20)


def shown(path: Path) -> object:
    audit = Audit.load(path)
    return render(audit), audit.verdict(), audit.rows()


def gone_on(path: Path) -> object:
    return an_audit(resume=Audit.load(path))


def weights(path: Path) -> object:
    return load_weights(network(), path)


def saved(model: nn.Module) -> bytes:
    stream = io.BytesIO()
    torch.save(model.state_dict(), stream)
    return stream.getvalue()


def in_folder(path: Path) -> object:
    return read(path.parent)


TABLE = b"age,job,label\n39,clerk,no\n50,cook,yes\n41,cook,no\n"
X = np.linspace(0, 1, 128, dtype=np.float32).reshape(2, 8, 8)
KINDS = {
    "bundle": Kind(
        "b.safetensors",
        bundles,
        lambda p: Observation.load(p, model=network(), loss=F.cross_entropy),
        inside_safetensors,
    ),
    "weights": Kind("w.safetensors", lambda f: [save(network().state_dict())], weights, inside_safetensors),
    "torch weights": Kind("w.pt", lambda f: [saved(network())], weights, inside_zip),
    "csv": Kind("t.csv", lambda f: [TABLE], read),
    "npz": Kind(
        "d.npz",
        lambda f: [
            arrays(inputs=X, labels=np.array([1, 2])),
            arrays(images=(X * 255).astype(np.uint8), labels=np.array(["cat", "dog"])),
        ],
        read,
        inside_zip,
    ),
    "pictures": Kind(
        "p.png",
        lambda f: [picture(kind) for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP")],
        in_folder,
        inside_png,
    ),
    "gate": Kind("audit.json", audits, gated, inside_json),
    "report": Kind("audit.json", audits, shown, inside_json),
    "resume": Kind("audit.json", lambda f: [an_audit().model_dump_json().encode()], gone_on, inside_json),
}


class Hangs(BaseException):
    """A reader took longer than it may."""


@contextmanager
def bounded(size: int) -> Iterator[None]:
    """No more memory than twice `size` bytes and a floor, and no more time than SECONDS."""

    def late(number: int, frame: FrameType | None) -> None:
        raise Hangs

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2 * size + FLOOR, hard))
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


READ, REFUSED = "read", "refused"  # what a reader may do with a file


def outcome(kind: Kind, path: Path, data: bytes) -> str:
    """READ, REFUSED in one line, or what the reader does that it may not."""
    path.write_bytes(data)
    try:
        with bounded(len(data)), warnings.catch_warnings():
            warnings.simplefilter("error")
            kind.reads(path)
    except UnbatchError as error:
        text = said(error)
        return (
            REFUSED if text.strip() and len(text.splitlines()) == 1 and len(text) < 1300 else f"no line: {text[:200]!r}"
        )
    except Hangs:
        return f"hangs for {SECONDS:g} s"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:160]}"
    return READ


def mutants(kind: Kind, wholes: list[bytes], count: int, seed: int) -> Iterator[bytes]:
    rng = random.Random(seed)
    for _ in range(count):
        data = rng.choice(wholes)
        yield kind.inside(data, rng) if kind.inside and rng.random() < 0.6 else changed(data, rng)


@dataclass
class Tried:
    """What a reader did with so many files, and by fault one that shows it."""

    counts: Counter[str]
    faults: dict[str, bytes]


def tried(kind: Kind, folder: Path, count: int, seed: int = 0) -> Tried:
    """A reader on whole files, which it must read, and on mutants of them."""
    path, found = folder / kind.name, Tried(Counter(), {})
    wholes = kind.whole(folder)
    (folder / "seed").unlink(missing_ok=True)
    for data in wholes:
        if (end := outcome(kind, path, data)) != READ:
            found.faults[f"whole: {end}"] = data
    for data in mutants(kind, wholes, count, seed):
        end = outcome(kind, path, data)
        found.counts[end] += 1
        if end not in (READ, REFUSED):
            found.faults.setdefault(end, data)
    return found


def main(count: int, seed: int, names: list[str]) -> int:
    bad = 0
    for name in names or KINDS:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as place:
            found = tried(KINDS[name], Path(place), count, seed)
        bad += len(found.faults)
        told = f"{found.counts[READ]} read, {found.counts[REFUSED]} refused, {len(found.faults)} kinds of fault"
        print(f"{name}: {count} mutants, {told}, {time.monotonic() - began:.0f} s", flush=True)
        for i, (end, data) in enumerate(found.faults.items()):
            Path(tempfile.gettempdir(), f"mutant-{name.replace(' ', '-')}-{i}").write_bytes(data)
            print(f"   {i} {end}")
    return bad


if __name__ == "__main__":
    torch.set_num_threads(1)
    total, start, *chosen = sys.argv[1:]
    sys.exit(bool(main(int(total), int(start), chosen)))
