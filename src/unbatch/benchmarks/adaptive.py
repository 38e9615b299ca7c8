"""adaptive: attacks that know the defence's likelihood against the same attacks without it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from unbatch.attack import Attack
from unbatch.auditing.run import audit
from unbatch.benchmarks import store, stored
from unbatch.case import Case
from unbatch.knowledge import Knowledge
from unbatch.reporting.results import Audit, Run

Rules = Mapping[str, float]  # of the protocol, by name
PROBLEMS = {
    "gradient-matching": "digits:batch=2,activation=gelu,width=100",
    "unmix": "photos:batch=4,size=16,activation=gelu,width=200",
    "layer-by-layer": "photos:size=16,model=cnn2-c1",
}
DEFENCES = (
    ("clip:norm=0.1",),
    ("noise:sigma=1e-5",),
    ("noise:sigma=1e-3",),
    ("prune:share=0.5",),
    ("prune:share=0.9",),
    ("quantise:bits=12",),
    ("quantise:bits=8",),
    ("quantise:bits=8,stochastic=false",),
    ("noise:sigma=1e-4", "clip:norm=0.1"),
)
AGAIN: tuple[tuple[tuple[str], Rules], ...] = (
    tuple(  # a defence, and what the protocol says of rounds of the same batch
        ((defence,), rules)
        for defence in ("noise:sigma=1e-4", "quantise:bits=8")
        for rules in ({"rounds": 4}, {"rounds": 16}, {"rounds": 4, "server_rate": 0.1})
    )
)
Row = dict[str, Any]


def run(
    seconds: float = 10.0,
    seed: int = 0,
    device: str = "cpu",
    out: Path | None = None,
    *,
    problems: dict[str, str] = PROBLEMS,
    defences: Sequence[Sequence[str]] = DEFENCES,
    again: Sequence[tuple[Sequence[str], Rules]] = AGAIN,
    batches: int = 3,
) -> list[Row]:
    """One row an attack and defence: both ways on `batches` batches and models, each run within `seconds`.

    Then the rows of `again`, whose naive attack sees the last of several rounds of the same batch and the adaptive one all.
    The batches are bundled ones. Seconds are wall seconds. A run that was cut short goes on.
    """
    how = {"seconds": seconds, "seed": seed, "device": device, "batches": batches}
    rows: list[Row] = stored("adaptive", out, **how)
    done = {(row["case"], str(row.get("rounds", {})), *row["defence"]) for row in rows}
    ways: list[tuple[Sequence[str], Rules]] = [*((defence, {}) for defence in defences), *again]
    for attack, case in problems.items():
        for defence, rules in ways:
            if (case, str(rules), *defence) in done:
                continue
            rows.append(compare(attack, case, defence, seed, batches, seconds, device, rules))
            if out is not None:
                store("adaptive", rows, out, wall=True, **how, complete=len(rows) == len(problems) * len(ways))
    return rows


def compare(
    attack: str,
    case: str,
    defence: Sequence[str],
    seed: int = 0,
    batches: int = 3,
    seconds: float | None = None,
    device: str | None = None,
    rules: Rules | None = None,
) -> Row:
    """What an attack makes of the same updates with and without knowing how the defence draws.

    That is the defence's likelihood, and the rounds before the last that the `rules` of the protocol ask for; labels as in
    the attack's demo.
    """
    held: dict[bool, list[Run]] = {False: [], True: []}
    for batch in range(seed, seed + batches):
        for found in _audited(attack, case, defence, batch, seconds, device, rules or {}).runs:
            held[found.adaptive].append(found)
    row: Row = {
        "attack": attack,
        "case": case,
        "defence": list(defence),
        "rounds": dict(rules or {}),
        "batches": batches,
    }
    for word, runs in (("naive", held[False]), ("adaptive", held[True])):
        examples = [example for one in runs for example in one.examples]
        scores = [example.scores.get("psnr") or 0.0 for example in examples]
        size = batches * Case.parse(case).batch
        sure = [e for e in examples if e.bound is not None and e.error is not None]
        ratios = [e.bound / e.error for e in sure if e.bound is not None and e.error]
        row[word] = {
            "psnr": median(scores + [0.0] * (size - len(scores))) if size else None,  # what is not there scores 0
            "certified": sorted((one.seed, e.index) for one in runs for e in one.examples if e in sure),
            "of": size,
            "least bound over error": min(ratios, default=None),
            "seconds": round(sum(one.seconds for one in runs) / max(len(runs), 1), 2),
            "words": next((one.words for one in runs if one.words), ""),
        }
    return row


def _audited(
    attack: str, case: str, defence: Sequence[str], batch: int, seconds: float | None, device: str | None, rules: Rules
) -> Audit:
    setting = Case.parse(f"{case},seed={batch}").setting()
    setting = replace(setting, protocol=setting.protocol.model_copy(update=dict(rules)))
    if "labels" in Attack.parse(attack).demo.knows:
        setting = replace(setting, knowledge=setting.knowledge | Knowledge(labels=setting.labels))
    return audit(setting, attacks=[attack], defences=defence, analyses=(), seeds=[batch], budget=seconds, device=device)


def table(rows: Sequence[Row]) -> Table:
    """PSNR is the median over all examples, 0 for one that is not returned; certified counts are of all examples."""
    shown = Table(
        "attack", "defence", "naive dB", "adaptive dB", "naive certified", "adaptive certified", "bound / error", "s"
    )
    for row in rows:
        naive, adaptive = row["naive"], row["adaptive"]
        least = adaptive["least bound over error"]
        shown.add_row(
            row["attack"],
            ", ".join([*row["defence"], *(f"{name} {value:g}" for name, value in row.get("rounds", {}).items())]),
            f"{naive['psnr']:.1f}",
            f"{adaptive['psnr']:.1f}",
            f"{len(naive['certified'])} of {naive['of']}",
            f"{len(adaptive['certified'])} of {adaptive['of']}",
            "" if least is None else f"{least:.1f}",
            f"{naive['seconds']:.1f}, {adaptive['seconds']:.1f}",
        )
    return shown
