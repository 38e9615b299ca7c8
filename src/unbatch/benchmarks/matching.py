"""matching: the presets of gradient-matching on the same gradients for the same time, PSNR against time.

Pictures are scaled to [-2, 2] (about zero mean and unit variance), labels are known, and every preset restarts until its
time is spent. What counts at a time is the guess that the preset itself holds for the best then; the truth only scores.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from unbatch.auditing.client import observe
from unbatch.benchmarks import clock, matched, store
from unbatch.benchmarks.pictures import pool, source
from unbatch.domain import Images
from unbatch.inversion.matching import STEPS_A_RESTART, Preset, UpdateMatching
from unbatch.inversion.search_point import Candidate
from unbatch.inversion.view import View
from unbatch.knowledge import Knowledge
from unbatch.loss import loss_named
from unbatch.metric import Metric
from unbatch.models import small
from unbatch.numerics.search.matching import cosine_distance, total_variation
from unbatch.observation import Observation
from unbatch.protocol import Protocol
from unbatch.reconstruction import Reconstruction
from unbatch.truth import Truth

Row = dict[str, Any]
PRESETS: tuple[Preset, ...] = ("default", "dlg", "inverting-gradients")
SHARES = (0.05, 0.1, 0.25, 0.5, 0.75, 1.0)  # of the time, at which the PSNR is taken
SHOWN = (0.1, 0.25, 0.5, 1.0)
RANGE = (-2.0, 2.0)


@dataclass(frozen=True, kw_only=True)
class SearchProblem:
    """One gradient that searches are to invert: of which network, and of how many examples.

    >>> SearchProblem(name="mlp gelu n=2", model="mlp", activation="gelu", n=2).width
    64
    """

    name: str
    model: small.Name
    activation: small.ActivationName
    n: int
    width: int = 64
    depth: int = 1
    local_steps: int = 0


PROBLEMS = (
    SearchProblem(name="mlp gelu n=16", model="mlp", activation="gelu", n=16, width=1000),
    SearchProblem(name="mlp relu n=4", model="mlp", activation="relu", n=4, width=1000),
    SearchProblem(name="lenet sigmoid n=1", model="lenet", activation="sigmoid", n=1),
    SearchProblem(name="convnet relu n=1", model="convnet", activation="relu", n=1, width=16, depth=2),
    SearchProblem(name="convnet relu n=4", model="convnet", activation="relu", n=4, width=16, depth=2),
    SearchProblem(name="mlp relu n=4, 4 local steps", model="mlp", activation="relu", n=4, width=1000, local_steps=4),
)


def run(
    data: Path | None = None,
    seconds: float = 60.0,
    seed: int = 0,
    device: str = "cpu",
    out: Path | None = None,
    problems: tuple[SearchProblem, ...] = PROBLEMS,
) -> list[Row]:
    """One row a problem and preset: PSNR (mean and worst picture) at each share of `seconds`; saved in `out` as well.

    `data` is a folder with cifar10_test600.npz (images uint8 [n, h, w, c], labels); without it the bundled photographs
    are used. Raises UnbatchError: no such file there.
    """
    pictures, labels, k = scaled(data, seed)
    rows: list[Row] = []
    for problem in problems:
        obs, truth = _exchange(problem, pictures, labels, k, seed, device)
        ratio = speed(obs)
        for preset in PRESETS:
            rows.append({"problem": problem.name, "preset": preset, **_measure(obs, truth, preset, seconds, seed)})
            rows[-1]["seconds per step over plain autograd"] = ratio
            if out is not None:
                how: dict[str, Any] = {
                    "seconds": seconds,
                    "seed": seed,
                    "device": device,
                    "data": source("cifar10", data),
                }
                store("matching", rows, out, **how, problems=[asdict(p) for p in problems])
    if out is not None:
        _plot(rows, out / "matching.png")
    return rows


def table(rows: list[Row]) -> Table:
    """PSNR in dB, mean (worst picture), at shares of the time."""
    shown = Table(title="PSNR in dB, mean (worst picture)", title_justify="left")
    for column in ("problem", "preset"):
        shown.add_column(column)
    times = [point["seconds"] for point in rows[0]["curve"]] if rows else []
    kept = [i for i, share in enumerate(SHARES) if share in SHOWN]
    for i in kept:
        shown.add_column(f"{times[i]:g} s", justify="right")
    shown.add_column("match", justify="right")
    shown.add_column("step / plain", justify="right")
    for row in rows:
        scores = [f"{row['curve'][i]['mean']:.1f} ({row['curve'][i]['worst']:.1f})" for i in kept]
        ratio = row["seconds per step over plain autograd"]
        shown.add_row(
            row["problem"], row["preset"], *scores, f"{row['residual']:.1e}", "" if ratio is None else f"{ratio:.2f}"
        )
    return shown


def speed(obs: Observation, steps: int = 30) -> float | None:
    """Seconds of our signed Adam step over those of a plain autograd loop with the same objective, median of `steps`.

    Turn by turn, so that other work on the machine weighs on both. None after local steps, where no plain loop exists.
    """
    if obs.protocol.steps(obs.knowledge.batch_size):
        return None
    attack = UpdateMatching(preset="inverting-gradients", iterations=10**6)
    loops: list[Iterator[Any]] = [attack.search(View.of(obs), torch.Generator().manual_seed(0)), plain(obs, attack.tv)]
    spent: list[list[float]] = [[], []]
    for _ in range(steps + 2):
        for loop, times in zip(loops, spent, strict=True):
            begun = clock()
            next(loop)
            _wait(obs.device)
            times.append(clock() - begun)
    ours, theirs = (statistics.median(times[2:]) for times in spent)
    return ours / theirs


def plain(obs: Observation, tv: float) -> Iterator[float]:
    """Inverting gradients as it is usually written, step by step: what our own step is timed against.

    One gradient with a graph, one backward, one signed Adam step; yields the value that it minimises.

    >>> rng = torch.Generator().manual_seed(0)
    >>> model = small.build("mlp", (1, 4, 4), 3, width=8, rng=rng)
    >>> x, y = torch.rand(1, 1, 4, 4, generator=rng), torch.tensor([2])
    >>> seen, truth = observe(model, torch.nn.functional.cross_entropy, x, y, knowledge=Knowledge(labels=y))
    >>> steps = plain(seen, tv=0.0)
    >>> values = [next(steps) for _ in range(50)]
    >>> values[-1] < values[0]
    True
    """
    x = torch.randn(obs.knowledge.batch_size, *obs.knowledge.input_shape, generator=torch.Generator().manual_seed(0))
    x = x.to(obs.device).requires_grad_()
    adam = torch.optim.Adam([x], lr=0.1)
    parameters, seen = list(obs.model.parameters()), list(obs.update.values())
    labels = obs.knowledge.labels.to(obs.device)
    while True:
        found = torch.autograd.grad(obs.loss(obs.model(x), labels), parameters, create_graph=True)
        value = cosine_distance(found, seen) + tv * total_variation(x)
        x.grad = torch.autograd.grad(value, x)[0].sign()
        adam.step()
        with torch.no_grad():
            x.clamp_(*RANGE)
        yield float(value.detach())


def _measure(obs: Observation, truth: Truth, preset: Preset, seconds: float, seed: int) -> Row:
    """The curve of one preset; its number of steps is what half the time allows, at most its own."""
    attack = UpdateMatching(preset="inverting-gradients", iterations=10**6)
    begun, probe = clock(), attack.search(View.of(obs), torch.Generator().manual_seed(seed))
    for _ in range(5):
        next(probe)
    fit = int(0.5 * seconds * 5 / (clock() - begun))
    attack = UpdateMatching(preset=preset, iterations=max(20, min(STEPS_A_RESTART[preset], fit)), restarts=10**6)
    begun, held = clock(), list[Candidate]()
    search = attack.search(View.of(obs), torch.Generator().manual_seed(seed))
    best, steps = next(search), 1
    for candidate in search:
        steps += 1
        _wait(obs.device)
        now = clock() - begun
        while len(held) < len(SHARES) and now > SHARES[len(held)] * seconds:
            held.append(best)
        if now > seconds:
            break
        best = candidate if candidate.loss < best.loss else best
    end = clock() - begun
    held += [best] * (len(SHARES) - len(held))
    scores = [_psnr(candidate.inputs, truth) for candidate in held]
    return {
        "curve": [
            {"seconds": share * seconds, "mean": float(s.mean()), "worst": float(s.min())}
            for share, s in zip(SHARES, scores, strict=True)
        ],
        "residual": obs.residual(best.inputs, best.labels.to(obs.device)),
        "relative error": _relative(best.inputs, truth),
        "steps": steps,
        "restarts": best.restart + 1,
        "ended": round(end, 2),
        "iterations": attack.iterations,
    }


def _domain(truth: Truth) -> Images:
    return Images(shape=tuple(truth.inputs.shape[1:]), low=RANGE[0], high=RANGE[1])


def _psnr(found: Tensor, truth: Truth) -> Tensor:
    metric = Metric.find("psnr").model_validate({"peak": RANGE[1] - RANGE[0]})
    return metric.score(*matched(Reconstruction(inputs=found), truth, _domain(truth)))


def _relative(found: Tensor, truth: Truth) -> float:
    """Of the worst picture."""
    a, b = (t.flatten(1) for t in matched(Reconstruction(inputs=found), truth, _domain(truth)))
    return float(((a - b).norm(dim=1) / b.norm(dim=1)).max())


def _exchange(
    problem: SearchProblem, pictures: Tensor, labels: Tensor, k: int, seed: int, device: str
) -> tuple[Observation, Truth]:
    x, y = pictures[: problem.n].to(device), labels[: problem.n].to(device)
    model = small.build(
        problem.model,
        tuple(x.shape[1:]),
        k,
        depth=problem.depth,
        width=problem.width,
        activation=problem.activation,
        rng=torch.Generator().manual_seed(seed + 1),
    ).to(device)
    return observe(
        model,
        loss_named("cross-entropy"),
        x,
        y,
        protocol=Protocol(local_steps=problem.local_steps, learning_rate=0.01),
        knowledge=Knowledge(labels=y, input_range=RANGE, domain="images"),
    )


def scaled(data: Path | None, seed: int) -> tuple[Tensor, Tensor, int]:
    """Pictures [p, c, h, w] in RANGE, their labels [p] and the number of classes, in an order that the seed draws."""
    images, labels = pool("cifar10", data)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    low, high = RANGE
    return low + (high - low) * images[order], labels[order], int(labels.max()) + 1


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _plot(rows: list[Row], path: Path) -> None:
    """Mean PSNR against time, one panel a problem; nothing where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    names = list(dict.fromkeys(row["problem"] for row in rows))
    columns = min(3, len(names))
    figure = Figure(figsize=(4.2 * columns, 3.2 * math.ceil(len(names) / columns)), layout="constrained")
    for panel, name in enumerate(names):
        axes = figure.add_subplot(math.ceil(len(names) / columns), columns, panel + 1)
        for row in rows:
            if row["problem"] == name:
                axes.plot(*zip(*((p["seconds"], p["mean"]) for p in row["curve"]), strict=True), label=row["preset"])
        axes.set(title=name, xlabel="seconds", ylabel="PSNR (dB), mean")
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
