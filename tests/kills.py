"""Kills: audits ended by SIGKILL at random moments and gone on with, each in a fork of one process.

``python tests/kills.py 20 SEED`` prints what stood in the record at each kill; its exit code is the number of losses.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from unbatch.command.cli import main
from unbatch.reporting.results import Audit, Run

ATTACKS = ("label-count", "bias-ratio", "gradient-matching:iterations=30")
WORDS = ["audit", "digits:clients=2,batch=2,width=16", "--analysis", "gradient-rank", "--quiet", "--out", "audit"]
WORDS += [word for attack in ATTACKS for word in ("--attack", attack)]
WORDS += [word for seed in range(2) for word in ("--seed", str(seed))]
RUNS = 2 * len(ATTACKS) * 2


def started(*more: str) -> int:
    """The number of a process that audits."""
    child = os.fork()
    if child:
        return child
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        main([*WORDS, *more])
    except SystemExit as ended:
        os._exit(int(ended.code or 0))
    finally:
        os._exit(99)


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed(after: float, *more: str) -> dict[tuple[int, str, int], Run]:
    """The runs in the record of an audit that was killed so many seconds after its start."""
    child = started(*more)
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    ended(child)
    path = Path("audit/audit.json")
    return {run.key: run for run in Audit.load(path).runs if run.finished} if path.exists() else {}


def lost(before: dict[tuple[int, str, int], Run], after: dict[tuple[int, str, int], Run]) -> list[str]:
    """The runs that are gone, or were run again: a run is kept to the second that it took."""
    return [f"{key}" for key, run in before.items() if after.get(key) != run]


def trial(rng: random.Random, whole: float) -> tuple[int, list[str]]:
    """Killed, gone on with, killed again, and gone on with to the end: how many runs stood first, and what went wrong."""
    first = killed(rng.uniform(0, whole))
    second = killed(rng.uniform(0, whole / 2), "--resume")
    wrong = [f"lost at the second kill: {each}" for each in lost(first, second)]
    code = ended(started("--resume"))
    record = Audit.load("audit/audit.json")
    last = {run.key: run for run in record.runs}
    wrong += [f"lost in the end: {each}" for each in lost(first | second, last)]
    wrong += [f"{n} times: {key}" for key, n in Counter(run.key for run in record.runs).items() if n > 1]
    left = sorted(path.name for path in Path("audit").iterdir())
    if (code, record.complete, len(record.runs), left) != (0, True, RUNS, ["audit.json", "report.html"]):
        wrong.append(f"code {code}, complete {record.complete}, {len(record.runs)} runs of {RUNS}, files {left}")
    return len(first), wrong


def trials(count: int, seed: int) -> int:
    """Kills so many audits; the number of losses."""
    rng, bad = random.Random(seed), 0
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        began = time.monotonic()
        assert ended(started()) == 0
        whole = time.monotonic() - began
        for number in range(count):
            for path in Path("audit").glob("*"):
                path.unlink()
            held, wrong = trial(rng, whole)
            bad += len(wrong)
            print(
                f"kill {number}: {held} of {RUNS} runs stood; {'; '.join(wrong) or 'none lost, none twice'}", flush=True
            )
        os.chdir("/")
    return bad


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(trials(int(sys.argv[1]), int(sys.argv[2])))
