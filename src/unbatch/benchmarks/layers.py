"""layers: one picture from one gradient of the published convolutional networks, by layer-by-layer and by its peers.

Default initialisation and bias-free convolutions, pictures in [0, 1], ten classes, the label not given: every method
reads it off the head. A picture is clipped to [0, 1] before it is scored, which can only help; a method that fails or
finds nothing is scored as if it had answered mid-grey, and the row says so.

The two methods that search, hybrid and gradient matching, get `seconds` more than auto took on the same picture, and
their published number of steps or as many as fit, so that their step sizes have fallen when the time is spent. The
others are stopped after LIMIT seconds. On every network that is not determined there are 20 pictures, where auto takes more
than two or three seconds of every other pixel, with fewer whole ones beside them; the whole is to take at most 1,800 CPU
seconds, a quarter of an hour of two processors.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.table import Table
from torch import Tensor, nn

from unbatch.attack import Attack
from unbatch.attacks.layer_by_layer import HYBRID
from unbatch.auditing.client import observe
from unbatch.benchmarks import allowance, clock, measured, psnr, store, stored
from unbatch.benchmarks.pictures import pool
from unbatch.inversion.backward.rank_count import c_of
from unbatch.inversion.matching import STEPS_A_RESTART
from unbatch.knowledge import Knowledge
from unbatch.loss import loss_named
from unbatch.models import published, small
from unbatch.observation import Observation
from unbatch.progress import Watch, watching
from unbatch.reconstruction import Reconstruction
from unbatch.truth import Truth

Row = dict[str, Any]
METHODS = {
    "auto": "layer-by-layer:method=auto",
    "copa": "layer-by-layer:method=copa",
    "r-gap": "layer-by-layer:method=r-gap",
    "r-conv": "layer-by-layer:method=r-conv",
    "hybrid": "layer-by-layer:method=hybrid",
    "matching": "gradient-matching:preset=inverting-gradients",
}
SEARCHES = ("hybrid", "matching")
PROBE = 20  # steps that show how long one takes
SLACK = 1.25  # of the time planned, after which a search is stopped
CLASSES = 10
LIMIT = 150.0  # seconds of a method that does not search


@dataclass(frozen=True, kw_only=True)
class PictureProblem:
    """One network whose gradients of single pictures are to be inverted; they differ by the picture and the weights' draw.

    >>> PictureProblem(network="cnn2-c2", thinning=2).name
    'cnn2-c2, pixels / 4'
    """

    network: small.Name
    precision: Literal["float64", "float32"] = "float64"
    pictures: int = 20
    methods: tuple[str, ...] = tuple(METHODS)  # auto first
    thinning: int = 1  # every so many pixels in both directions
    data: str = "cifar10"

    @property
    def name(self) -> str:
        parts = [self.network, *["float32"] * (self.precision == "float32")]
        return ", ".join(parts + [f"pixels / {self.thinning**2}"] * (self.thinning != 1))


def picture_problems() -> list[PictureProblem]:
    """The published networks, the dearest first; those of c(M) = 0, where pictures hardly differ, in float32 as well.

    Methods that do nothing else than another are left out: copa where one layer is open or none, as r-gap there; r-gap and
    r-conv on the dearest, as auto where every layer is determined. Six networks are given every other pixel for the 20
    pictures: the time goes with the third power of their number.

    >>> "cnn6-wide" in {problem.network for problem in picture_problems()}
    True
    """
    ours, alike = ("auto", "r-gap", "hybrid", "matching"), ("auto", "r-gap", "r-conv", "matching")
    every = tuple(METHODS)
    found = [
        PictureProblem(network="cnn6-narrow", pictures=1, methods=("auto",)),
        PictureProblem(network="cnn4-c1", pictures=1, methods=ours),
        PictureProblem(network="cnn4-c2", methods=ours, thinning=2),
        PictureProblem(network="cnn2-c2", methods=(*ours, "r-conv")),
        PictureProblem(network="cnn3-c1", methods=ours, thinning=2),
        PictureProblem(network="cnn3-c2", methods=every, thinning=2),
        PictureProblem(network="cnn4-c3", methods=ours, thinning=2),
        PictureProblem(network="cnn3-c4", methods=ours),
        PictureProblem(network="cnn4-c1", methods=ours, thinning=2),
        PictureProblem(network="cnn2-c4", methods=(*ours, "r-conv")),
        PictureProblem(network="cnn2-c6", pictures=4, methods=ours),
        PictureProblem(network="cnn3-c1", pictures=1, methods=ours),
        PictureProblem(network="cnn2-c6", methods=ours, thinning=2),
        PictureProblem(network="cnn3-c2", pictures=1, methods=ours),
    ]
    for network in ("cnn6", "cnn3-c3", "lenet", "cnn2-c1", "cnn6-wide"):
        methods = alike if network in ("lenet", "cnn2-c1", "cnn6-wide") else ("auto", "matching")
        exact = PictureProblem(
            network=network, pictures=1, methods=methods, thinning=2 if network == "cnn6-wide" else 1
        )
        found += [exact, replace(exact, precision="float32", methods=("auto",))]
    return found


def run(
    data: Path | None = None,
    seconds: float = 0.25,
    seed: int = 0,
    device: str = "cpu",
    out: Path | None = None,
    wanted: Sequence[PictureProblem] | None = None,
) -> list[Row]:
    """One row a network and method, saved in `out` as they come, with a chart; a run that was cut short goes on there.

    `data` is a folder with cifar10_test600.npz (images uint8 [n, h, w, c], labels); without it the bundled photographs
    are used. With one thread a process (OMP_NUM_THREADS=1) as many networks run side by side as there are processors,
    and seconds are CPU seconds of each. Raises UnbatchError: no such file there.
    """
    todo = list(picture_problems() if wanted is None else wanted)
    if data is None:
        todo = [replace(problem, data="photos") for problem in todo]
    for name in {problem.data for problem in todo}:
        pool(name, data)  # what is missing is said before anything runs
    done: dict[PictureProblem, list[Row]] = {}
    how: dict[str, Any] = {"seconds": seconds, "seed": seed, "device": device, "data": data is not None}
    for row in stored("layers", out, **how):
        same = [problem for problem in todo if json.dumps(asdict(problem)) == json.dumps(row.get("settings"))]
        for problem in same:
            done.setdefault(problem, []).append(row)

    def keep(problem: PictureProblem, rows: list[Row]) -> None:
        done[problem] = rows
        if out is not None:
            store("layers", ordered(), out, **how, complete=wanted is None and len(done) == len(todo))
            _plot(ordered(), out / "layers.png")

    def ordered() -> list[Row]:
        return [row for problem in todo for row in done.get(problem, [])]

    left = [problem for problem in todo if problem not in done]
    for problem, rows in measured(
        left, partial(_measure, data=data, seed=seed, device=device, seconds=seconds), device
    ):
        keep(problem, rows)
    return ordered()


def table(rows: list[Row]) -> Table:
    """PSNR, seconds, auto's over those of the published steps, what the equations leave open, bounds, and what failed."""
    whole = sum({row["network"]: row["seconds of all methods"] for row in rows}.values())
    title = f"PSNR in dB of a picture, median and worst; what failed counts as mid-grey; {whole:,.0f} s in all"
    shown = Table(title=f"layers: {title}")
    for column in (
        "network",
        "method",
        "pictures",
        "median",
        "worst",
        "seconds",
        "auto / whole",
        "c(M)",
        "open",
        "bound",
    ):
        shown.add_column(column, justify="left" if column in ("network", "method") else "right", no_wrap=True)
    shown.add_column("failed")
    for i, row in enumerate(rows):
        ratio = row["auto over published steps"]
        first = not i or rows[i - 1]["network"] != row["network"]
        claims, fails = [b for b in row["bounds"] if b is not None], row["failures"]
        claimed = f" ({len(claims)} of {row['pictures']})" if 0 < len(claims) < row["pictures"] else ""
        shown.add_row(
            row["network"] if first else "",
            row["method"],
            str(row["pictures"]),
            f"{row['median']:.1f}",
            f"{row['worst']:.1f}",
            f"{row['seconds']:.1f}",
            "" if ratio is None else f"{ratio:.2f}",
            str(row["c(M)"]) if first and row["c(M)"] is not None else "",
            f"{row['undetermined']:.3f}" if first and row["undetermined"] is not None else "",
            f"{max(claims):.0e}{claimed}" if claims else "",
            f"{len(fails)}: {next(iter(fails.values()))}" if fails else "",
        )
    return shown


@dataclass(frozen=True)
class Try:
    """What one method made of one picture: how near it came, in what time, or why it failed.

    >>> Try(found=None, psnr=12.5, seconds=3.0, failure="two layers are open").bound is None
    True
    """

    found: Reconstruction | None
    psnr: float
    seconds: float
    failure: str = ""
    bound: float | None = None  # None: no claim
    error: float = float("inf")  # |found - true| / |found|


@dataclass(frozen=True)
class Pace:
    """How long a method takes: seconds for what it does once, and for one step of every search that it makes.

    >>> pace = Pace(once=2.0, step=0.5, published=100)
    >>> pace.whole, pace.steps(12.0)
    (52.0, 20)
    """

    once: float
    step: float
    published: int  # steps of a search, on average over its searches

    @property
    def whole(self) -> float:
        """Seconds with the published number of steps."""
        return self.once + self.step * self.published

    def steps(self, seconds: float) -> int:
        """The published number, or as many as fit."""
        fit = int((seconds - self.once) / self.step) if self.step > 0 else self.published
        return max(1, min(self.published, fit))


def _measure(problem: PictureProblem, data: Path | None, seed: int, device: str, seconds: float) -> list[Row]:
    tries: dict[str, list[Try]] = {method: [] for method in problem.methods}
    paces: dict[str, Pace] = {}
    metrics, begun = list[int](), clock()
    for i in range(problem.pictures):
        obs, truth = picture_exchange(problem, pool(problem.data, data), seed, i, device)
        for method in problem.methods:
            spec, time = METHODS[method], LIMIT
            if method in SEARCHES:
                time = seconds + tries["auto"][-1].seconds
                pace = paces[method] = paces.get(method) or _pace(method, obs, seed)
                if method == "matching":
                    spec += f",iterations={pace.steps(time)},restarts=1000000"
                elif pace.steps(time) < pace.published:
                    spec += f",iterations={pace.steps(time)}"
                time *= SLACK
            tries[method].append(_attacked(spec, obs, truth, seed + i, time))
        metrics += _metric(obs, tries["r-gap" if "r-gap" in tries else "auto"][-1].found)
    open_ = [t.found.trace.get("undetermined", 0.0) for t in tries["auto"] if t.found is not None and not t.failure]
    open_ = [share for share in open_ if share is not None]
    told: Row = {"c(M)": min(metrics, default=None), "undetermined": statistics.median(open_) if open_ else None}
    told["seconds of all methods"] = clock() - begun
    rows = [
        {"network": problem.name, "method": method, **_row(found), **told} for method, found in tries.items() if found
    ]
    for row in rows:
        whole = paces[row["method"]].whole if row["method"] in paces else None
        row["auto over published steps"] = None if whole is None else rows[0]["seconds"] / whole
        row["settings"] = asdict(problem)
    return rows


def _row(tries: Sequence[Try]) -> Row:
    scores = [each.psnr for each in tries]
    ratios = [each.bound / each.error for each in tries if each.bound is not None and each.error > 0]
    return {
        "pictures": len(tries),
        "median": statistics.median(scores),
        "worst": min(scores),
        "seconds": statistics.median(each.seconds for each in tries),
        "bounds": [each.bound for each in tries],
        "least bound over error": min(ratios, default=None),
        "failures": {f"picture {i}": each.failure for i, each in enumerate(tries) if each.failure},
        "psnr": scores,
    }


def _attacked(spec: str, obs: Observation, truth: Truth, seed: int, seconds: float) -> Try:
    """One attack, stopped after `seconds`."""
    found, failure, begun = None, "", clock()
    try:
        with watching(allowance(seconds)):
            found = Attack.parse(spec)(obs, seed=seed)
    except (ValueError, RuntimeError) as words:
        failure = f"{type(words).__name__}: {words}"
    took, true = clock() - begun, truth.inputs.double().cpu()
    if found is None or found.inputs is None or not len(found) or found.layer:
        failure = failure or str(found.trace.get("stopped", "no picture") if found is not None else "no answer")
        return Try(found, psnr(torch.full_like(true, 0.5), true), took, failure)
    x = found.inputs.detach().double().cpu()
    bound = float(found.bound[0]) if found.bound is not None else float("inf")
    error = float((x - true).norm() / x.norm())
    return Try(found, psnr(x, true), took, "", bound if bound < float("inf") else None, error)


def _pace(method: str, obs: Observation, seed: int) -> Pace:
    """By PROBE steps of every search: what passes between the steps is the shortest of what passes between ticks."""
    times: list[float] = []
    watch, begun, steps = Watch(listener=lambda share, best: times.append(clock())), clock(), list[int]()
    try:
        with watching(watch):
            found = Attack.parse(f"{METHODS[method]},iterations={PROBE}")(obs, seed=seed)
        steps = [STEPS_A_RESTART["inverting-gradients"]]
        if method == "hybrid":
            places = [_convolutions(obs).index(name) for name in found.trace["deficient"]]
            steps = [HYBRID[min(place, len(HYBRID) - 1)][1] for place in places]
    except (ValueError, RuntimeError):
        pass  # the run itself will tell
    gaps = float(np.sort(np.diff(times))[: len(steps) * PROBE].sum())
    return Pace(clock() - begun - gaps, gaps / PROBE, round(statistics.fmean(steps or [1])))


def _metric(obs: Observation, found: Reconstruction | None) -> list[int]:
    """c(M) by the ranks that the attack found; nothing where it did not read every convolution, or could not count."""
    order = _convolutions(obs)
    readings = [] if found is None else found.trace["readings"]
    known = {row["layers"]: row for row in readings if row["rank"] is not None}
    if set(known) != set(order):
        return []
    return [c_of([(known[name]["unknowns"], known[name]["rank"]) for name in order])]


def _convolutions(obs: Observation) -> list[str]:
    return [name for name, module in obs.model.named_modules() if isinstance(module, nn.Conv2d)]


def picture_exchange(
    problem: PictureProblem, pictures: tuple[Tensor, Tensor], seed: int, i: int, device: str
) -> tuple[Observation, Truth]:
    """The i-th picture's gradient, at weights drawn for it."""
    order = torch.randperm(len(pictures[0]), generator=torch.Generator().manual_seed(seed))[i : i + 1]
    x, y = pictures[0][order][..., :: problem.thinning, :: problem.thinning], pictures[1][order] % CLASSES
    dtype = torch.float64 if problem.precision == "float64" else torch.float32
    model = small.build(
        problem.network,
        tuple(x.shape[1:]),
        CLASSES,
        activation=None if problem.network in published.NETWORKS else "sigmoid",
        bias=False,
        rng=torch.Generator().manual_seed(seed + 1 + i),
    )
    known = Knowledge(domain="images", input_range=(0.0, 1.0))
    loss = loss_named("cross-entropy")
    return observe(model.to(device, dtype), loss, x.to(device, dtype), y.to(device), knowledge=known)


def _plot(rows: list[Row], path: Path) -> None:
    """Median PSNR by network and method, down to the worst; what the systems determine, and what they leave open.

    Nothing where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    groups = {"every layer determined": [r for r in rows if r["c(M)"] == 0]}
    groups["c(M) < 0"] = [r for r in rows if r["c(M)"] != 0]
    groups = {title: own for title, own in groups.items() if own}
    names = [list(dict.fromkeys(row["network"] for row in own)) for own in groups.values()]
    figure = Figure(figsize=(3 + sum(map(len, names)), 4), layout="constrained")
    panels = figure.subplots(1, len(groups), squeeze=False, width_ratios=[len(each) for each in names])[0]
    for panel, (title, own), networks in zip(panels, groups.items(), names, strict=True):
        for k, method in enumerate(METHODS):
            held = [row for row in own if row["method"] == method]
            x = [networks.index(row["network"]) + 0.13 * (k - (len(METHODS) - 1) / 2) for row in held]
            fall = [[row["median"] - row["worst"] for row in held], [0.0] * len(held)]
            panel.errorbar(
                x, [row["median"] for row in held], yerr=fall, fmt="o", capsize=2, color=f"C{k}", label=method
            )
        panel.set(title=title, ylabel="PSNR (dB), median and worst", ylim=(0, None))
        panel.set_xticks(range(len(networks)), networks, rotation=30, ha="right")
    panels[0].legend(fontsize="small")
    figure.savefig(path, dpi=120)
