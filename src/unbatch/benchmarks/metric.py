"""metric: whether the share of a picture that security-metric predicts to be determined is what attacks then recover.

Random architectures, by a rule that was fixed before the first run: `architecture`. The attack was improved on seeds 0
and 1, whose misses were looked at; seed 2 was first measured after the last change. For each, the prediction at a draw of
the prior, without the picture, and the best PSNR of two attacks on one picture's float32 gradient: layer-by-layer, and
where that certifies nothing gradient matching, each for `seconds`. A picture is clipped to [0, 1] before it is scored;
what finds nothing is scored as mid-grey.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import nn

from unbatch.attack import Attack
from unbatch.auditing.client import observe
from unbatch.benchmarks import allowance, clock, measured, psnr, store
from unbatch.benchmarks.pictures import pool
from unbatch.domain import Images
from unbatch.inversion.determined_share import determined
from unbatch.knowledge import Knowledge
from unbatch.loss import loss_named
from unbatch.models import small
from unbatch.models.residual import ResidualBlock
from unbatch.observation import Observation
from unbatch.progress import watching
from unbatch.protocol import Protocol
from unbatch.truth import Truth

Row = dict[str, Any]
SEEDS, COUNT = 3, 36  # architectures a seed
THINNING, CLASSES = 4, 10  # pictures of 8 x 8 pixels
SURE = 60.0  # dB, above which a picture counts as whole
RESAMPLES, LEAST = 2000, 10  # of the rows; rows without which there is no correlation
ATTACKS = "layer-by-layer", "gradient-matching:preset=inverting-gradients,iterations=2000"
ACTIVATIONS = nn.Tanh, nn.Sigmoid, nn.Softplus, nn.ELU, nn.LeakyReLU, nn.GELU, nn.ReLU


def architecture(shape: tuple[int, ...], rng: np.random.Generator) -> nn.Sequential:
    """A convolutional network drawn at random: one to three blocks, then a dense head of ten classes.

    The head reads all features, or (one in six) their averages. All is drawn evenly: an activation for the network, of
    ACTIVATIONS, and for every block 1, 2, 3, 4, 6, 8 or 12 channels, one of two kinds in four convolutions (side 1, 3 or
    5; stride 1 or 2; padded to keep its size, or not), one residual block (stride 1 or 2), one convolution and 2 x 2
    average or maximum pooling; after a plain convolution, one time in three, batch norm (in eval mode) or group norm of
    one group. What does not run on the shape is drawn anew.

    >>> model = architecture((1, 8, 8), np.random.default_rng(0))
    >>> model(torch.zeros(1, 1, 8, 8)).shape
    torch.Size([1, 10])
    """
    while True:
        act, layers, before = ACTIVATIONS[rng.integers(len(ACTIVATIONS))], list[nn.Module](), shape[0]
        for _ in range(rng.integers(1, 4)):
            after = int(rng.choice([1, 2, 3, 4, 6, 8, 12]))
            kind = rng.choice(["convolution", "convolution", "residual", "pooled"])
            side, stride, kept = int(rng.choice([1, 3, 5])), int(rng.choice([1, 2])), bool(rng.integers(2))
            norm = rng.choice(["batch", "group", "", "", "", ""])
            average = bool(rng.integers(2))
            if kind == "residual":
                layers.append(ResidualBlock(before, after, stride, act))
            else:
                stride = 1 if kind == "pooled" else stride
                layers.append(nn.Conv2d(before, after, side, stride, side // 2 if kept else 0))
                if kind == "convolution" and norm:
                    layers.append(nn.BatchNorm2d(after) if norm == "batch" else nn.GroupNorm(1, after))
                layers.append(act())
                if kind == "pooled":
                    layers.append(nn.AvgPool2d(2) if average else nn.MaxPool2d(2))
            before = after
        layers += [nn.AdaptiveAvgPool2d(1)] * int(rng.integers(6) == 0) + [nn.Flatten()]
        try:
            features = nn.Sequential(*layers).eval()(torch.zeros(1, *shape)).numel()
        except (RuntimeError, ValueError):  # smaller than a kernel
            continue
        model = nn.Sequential(*layers, nn.Linear(features, CLASSES))
        small.initialise(model, torch.Generator().manual_seed(int(rng.integers(2**31))))
        return model


def run(
    data: Path | None = None,
    seconds: float = 10.0,
    seed: int = 0,
    device: str = "cpu",
    out: Path | None = None,
    count: int = COUNT,
) -> list[Row]:
    """One row an architecture, of the seed and then of the next two; saved in `out` as they come, with a chart.

    `data` is a folder with cifar10_test600.npz; without it the bundled photographs are used.
    """
    todo = [(s, i) for s in range(seed, seed + SEEDS) for i in range(count)]
    pool("cifar10", data)  # what is missing is said before anything runs
    done: dict[tuple[int, int], Row] = {}

    def keep(at: tuple[int, int], row: Row) -> None:
        done[at] = row
        if out is not None:
            rows = [done[each] for each in todo if each in done]
            how: dict[str, Any] = {"seconds": seconds, "device": device}
            store(
                "metric",
                rows,
                out,
                **how,
                data=data is not None,
                complete=len(done) == len(todo),
                **metric_summary(rows),
            )
            _plot(rows, out / "metric.png")

    for each, row in measured(todo, partial(_measure, data=data, device=device, seconds=seconds), device):
        keep(each, row)
    return [done[each] for each in todo]


def metric_summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Spearman's rank correlation of predicted and recovered PSNR, seed by seed, with a 95 % bootstrap interval.

    And of the rows alone of which nothing is certified: two clusters far apart raise the correlation of all. `reached`: of
    the rows predicted above SURE dB, how many were recovered so well.
    """
    found: dict[str, Any] = {}
    for seed in dict.fromkeys(row["seed"] for row in rows):
        own = [row for row in rows if row["seed"] == seed]
        found[f"seed {seed}"] = {
            "all": _spearman(own),
            "uncertified": _spearman([r for r in own if not r["certified"]]),
        }
    sure = [row for row in rows if row["predicted psnr"] > SURE]
    return {"correlation": found, "reached": [sum(row["psnr"] > SURE for row in sure), len(sure)]}


def _spearman(rows: Sequence[Row]) -> dict[str, float] | None:
    """None where there are too few rows to say."""
    from scipy.stats import spearmanr

    if len(rows) < LEAST:
        return None
    pairs: Any = np.array([(row["predicted psnr"], row["psnr"]) for row in rows])
    rng = np.random.default_rng(0)
    draws = [spearmanr(*pairs[rng.integers(len(pairs), size=len(pairs))].T)[0] for _ in range(RESAMPLES)]
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    return {"spearman": float(spearmanr(*pairs.T)[0]), "low": float(low), "high": float(high), "rows": len(rows)}


def table(rows: list[Row]) -> Table:
    """Prediction and result of every architecture, and how well their ranks agree."""
    said = "; ".join(
        f"{seed}, {which}: {each['spearman']:.2f} ({each['low']:.2f} to {each['high']:.2f})"
        for seed, own in metric_summary(rows)["correlation"].items()
        for which, each in own.items()
        if each
    )
    reached, sure = metric_summary(rows)["reached"]
    shown = Table(
        title=f"metric: Spearman's correlation, {said}; {reached} of {sure} predicted above {SURE:g} dB recovered so"
    )
    for column in ("seed", "predicted share", "predicted dB", "recovered dB", "by", "certified", "seconds"):
        shown.add_column(column, justify="left" if column == "by" else "right", no_wrap=True)
    shown.add_column("architecture")
    for row in rows:
        shown.add_row(
            str(row["seed"]),
            f"{row['share']:.4f}",
            f"{row['predicted psnr']:.1f}",
            f"{row['psnr']:.1f}",
            row["by"],
            "yes" if row["certified"] else "",
            f"{row['seconds']:.0f}",
            row["architecture"],
        )
    return shown


def _measure(at: tuple[int, int], data: Path | None, device: str, seconds: float) -> Row:
    seed, i = at
    rng = np.random.default_rng(at)
    images, labels = pool("cifar10", data)
    place = int(rng.integers(len(images)))
    x, y = images[place : place + 1, :, ::THINNING, ::THINNING], labels[place : place + 1] % CLASSES
    model = architecture(tuple(x.shape[1:]), rng)
    loss = loss_named("cross-entropy")
    known = Knowledge(domain="images", input_range=(0.0, 1.0))
    protocol = Protocol(mode="eval")
    obs, truth = observe(model.to(device), loss, x.to(device), y.to(device), knowledge=known, protocol=protocol)
    drawn = Images(shape=tuple(x.shape[1:])).prior(1, torch.Generator().manual_seed(0)).to(device)
    told = determined(obs.model, loss, drawn, y.to(device))
    begun, grey = clock(), psnr(torch.full_like(x, 0.5), x)
    best = (grey, "mid-grey", False)
    for spec in ATTACKS:
        if not best[2]:
            best = max(best, _attacked(spec, obs, truth, seconds))
    return {
        "seed": seed,
        "number": i,
        "architecture": " ".join(str(layer).split("\n")[0].rstrip("(") for layer in model),
        "share": told.share,
        "predicted psnr": told.psnr,
        "psnr": best[0],
        "grey": grey,
        "by": best[1],
        "certified": best[2],
        "seconds": clock() - begun,
    }


def _attacked(spec: str, obs: Observation, truth: Truth, seconds: float) -> tuple[float, str, bool]:
    """PSNR in dB, by which attack, and whether it claims a bound."""
    name = spec.split(":")[0]
    try:
        with watching(allowance(seconds)):
            found = Attack.parse(spec)(obs, seed=0)
    except (ValueError, RuntimeError):
        return -np.inf, name, False
    if found.inputs is None or not len(found):
        return -np.inf, name, False
    claimed = found.bound is not None and bool(found.bound.isfinite().all())
    return psnr(found.inputs, truth.inputs), name, claimed


def _plot(rows: list[Row], path: Path) -> None:
    """Recovered against predicted PSNR; nothing where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(5, 4.5), layout="constrained")
    panel = figure.subplots()
    for k, seed in enumerate(dict.fromkeys(row["seed"] for row in rows)):
        own = [row for row in rows if row["seed"] == seed]
        for certified, marker in ((True, "o"), (False, "x")):
            held = [row for row in own if row["certified"] == certified]
            label = f"seed {seed}, {'certified' if certified else 'not certified'}"
            xy = [[row[key] for row in held] for key in ("predicted psnr", "psnr")]
            panel.scatter(xy[0], xy[1], marker=marker, color=f"C{k}", label=label)
    panel.axline((0, 0), slope=1, color="grey", lw=0.8)
    panel.set(xlabel="predicted PSNR (dB)", ylabel="recovered PSNR (dB)")
    panel.legend(fontsize="small")
    figure.savefig(path, dpi=120)
