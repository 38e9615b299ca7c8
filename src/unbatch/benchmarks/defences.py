"""defences: of five networks behind six defences, what attacks recover, what a bound allows, chance, and the price.

Bundled digits of 8 x 8 pixels, one gradient of a batch of four (dense networks) or one (convolutional), labels known to the
attacker as the bounds assume. Each cell is measured as by `harden`: the worst example under all attacks (of exactly
recovered ones a certified one), each without and with the defence's likelihood, for `seconds` of wall clock each; the
tightest bound with scope `any` on this one update; as many prior draws for the same example; and the test accuracy of the
same network trained for `ROUNDS` such updates. A bound is on the mean squared error of the batch, so the whole batch's PSNR
under the best single attack stands beside the worst example's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table

from unbatch.auditing.harden import ATTACKS as USUAL
from unbatch.auditing.harden import BOUNDS, families, measure
from unbatch.auditing.utility import Scene, scene_of
from unbatch.benchmarks import clock, store, stored
from unbatch.case import Case
from unbatch.knowledge import Knowledge
from unbatch.reporting.results import Audit

Row = dict[str, Any]
NETWORKS = {
    "mlp tanh": "digits:batch=4,width=64,activation=tanh",
    "mlp relu": "digits:batch=4,width=128,activation=relu",
    "lenet": "digits:model=lenet,activation=tanh",
    "cnn2-c2": "digits:model=cnn2-c2",
    "convnet": "digits:model=convnet,width=4,activation=tanh",
}
DEFENCES = {  # a family of harden's and a strength in its unit; a batch of itself is no defence
    "none": ("batch", None),
    "clip": ("clip", 0.1),
    "noise": ("noise", 1.0),
    "prune": ("prune", 0.1),
    "quantise": ("quantise", 4.0),
    "dp-sgd": ("dp-sgd", 0.2),
}
ATTACKS = (*USUAL, "layer-by-layer")
ROUNDS = 400
TOP = 60.0  # dB, the picture's upper edge


def run(
    seconds: float = 3.0,
    seed: int = 0,
    device: str = "cpu",
    out: Path | None = None,
    *,
    networks: Sequence[str] = tuple(NETWORKS),
    defences: Sequence[str] = tuple(DEFENCES),
    rounds: int = ROUNDS,
) -> list[Row]:
    """One row a network and defence; saved in `out` as they come, with a chart. A run that was cut short is continued.

    The digits are bundled.
    """
    how: dict[str, Any] = {
        "seconds": seconds,
        "seed": seed,
        "device": device,
        "rounds": rounds,
        "attacks": list(ATTACKS),
    }
    how |= {"networks": {n: NETWORKS[n] for n in networks}, "strengths": {d: list(DEFENCES[d]) for d in defences}}
    rows: list[Row] = stored("defences", out, **how)
    held = {(row["network"], row["defence"]) for row in rows}
    for network in networks:
        todo = [defence for defence in defences if (network, defence) not in held]
        if not todo:
            continue
        scene = _scene(network, seed, device, rounds)
        for defence in todo:
            rows.append(_measure(scene, network, defence, seconds))
            if out is not None:
                store("defences", rows, out, **how, complete=len(rows) == len(networks) * len(defences))
    if out is not None:
        _plot(rows, out / "defences.png")
    return rows


def table(rows: Sequence[Row]) -> Table:
    """PSNR in dB: the worst example's, the whole batch's, what a bound allows of that, and chance for the worst example."""
    shown = Table("network", "defence", title="defences: PSNR in dB; accuracy after training with the defence")
    for name in ("exact", "worst", "batch", "bound", "chance", "accuracy", "epsilon", "seconds"):
        shown.add_column(name, justify="right", no_wrap=True)
    shown.add_column("by")
    for row in rows:
        numbers = [_short(row[key], ".1f") for key in ("psnr", "batch psnr")]
        price = [_short(row[key], how) for key, how in (("accuracy", ".1%"), ("epsilon", ".3g"))]
        by = f"{row['attack']}; {row['by']}" if row["by"] else row["attack"]
        shown.add_row(
            row["network"],
            f"{row['defence']}: {row['strength']:g} {row['unit']}" if row["defence"] != "none" else "none",
            f"{row['recovered']} of {row['of']}",
            *numbers,
            _short(row["bound"], ".1f") or "none",
            _short(row["chance"], ".1f"),
            *price,
            f"{row['seconds']:.0f}",
            by or row["words"],
        )
    return shown


def _scene(network: str, seed: int, device: str, rounds: int) -> Scene:
    case = Case.parse(f"{NETWORKS[network]},seed={seed}")
    scene = scene_of(case, case.batch, rounds, seed)
    known = Knowledge(labels=scene.setting.labels[: scene.n])
    return replace(scene, setting=replace(scene.setting, model=scene.setting.model.to(device), knowledge=known))


def _measure(scene: Scene, network: str, defence: str, seconds: float) -> Row:
    name, strength = DEFENCES[defence]
    (family,) = (f for f in families(scene) if f.name == name)
    begun = clock()
    tried, record = measure(scene, family, float(scene.n) if strength is None else strength, ATTACKS, BOUNDS, seconds)
    return {
        "network": network,
        "case": str(scene.setting.name),
        "defence": defence,
        "specification": tried.defences,
        "strength": tried.strength,
        "unit": tried.unit,
        "of": tried.batch,
        "recovered": tried.recovered,
        "psnr": tried.psnr,
        "batch psnr": _batch(record) if record else None,
        "attack": tried.attack,
        "bound": tried.bound,
        "by": tried.by,
        "assumptions": next((b.assumptions for b in record.bounds if b.name == tried.by), "") if record else "",
        "without a bound": [] if record is None or tried.by else record.notes,
        "chance": tried.chance,
        "accuracy": tried.accuracy,
        "undefended": tried.undefended,
        "epsilon": tried.epsilon,
        "words": tried.words,
        "seconds": round(clock() - begun, 2),
    }


def _batch(record: Audit) -> float | None:
    """PSNR of the mean squared error over the batch, of the run that makes it largest; None where none returned it all."""
    found = []
    for one in record.runs:
        scores = [example.scores.get("psnr") for example in one.examples]
        if scores and None not in scores:
            found.append(
                -10 * math.log10(sum(10 ** (-score / 10) for score in scores if score is not None) / len(scores))
            )
    return max(found, default=None)


def _plot(rows: Sequence[Row], path: Path) -> None:
    """Attack, bound and chance by defence, a panel a network; nothing where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    networks = list(dict.fromkeys(row["network"] for row in rows))
    figure = Figure(figsize=(1 + 2.6 * len(networks), 4.2), layout="constrained")
    panels = figure.subplots(1, len(networks), sharey=True, squeeze=False)[0]
    marks = (
        ("psnr", "o", "C0", "attack, worst example"),
        ("batch psnr", "x", "C3", "attack, whole batch"),
        ("bound", "v", "C1", "bound, any attacker"),
        ("chance", "_", "C2", "chance"),
    )
    for panel, network in zip(panels, networks, strict=True):
        own = [row for row in rows if row["network"] == network]
        for key, mark, colour, label in marks:
            heights = [math.nan if row[key] is None else min(row[key], TOP) for row in own]
            panel.plot(range(len(own)), heights, mark, color=colour, label=label, markersize=8)
        open_ = [TOP if row["bound"] is None else math.nan for row in own]
        panel.plot(range(len(own)), open_, "v", mfc="none", color="C1", label="no bound", markersize=13)
        ticks = [f"{row['defence']} ({_short(row['accuracy'], '.0%') or 'not possible'})" for row in own]
        panel.set_xticks(range(len(own)), ticks, rotation=90)
        panel.set(title=network, ylim=(0, TOP + 4))
    panels[0].set_ylabel(f"PSNR (dB); {TOP:.0f} and more at the top")
    figure.supxlabel("defence (test accuracy)", fontsize="medium")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=5, fontsize="small")
    figure.savefig(path, dpi=110)


def _short(value: float | None, how: str) -> str:
    return "" if value is None else format(value, how)
