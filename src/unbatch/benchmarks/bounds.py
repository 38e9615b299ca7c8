"""bounds: how near unmix comes to the Cramer-Rao bound as noise grows, until it recovers nothing any more.

Pictures of 16 x 16 pixels from the bundled photographs, one hidden layer of smooth units, one float64 gradient with
Gaussian noise of known sigma in every entry. For each sigma, over `SEEDS` draws of the noise: the mean squared error of the
examples that unmix returns, matched to the private ones; the Cramer-Rao bound at the batch, which unbiased attackers cannot
beat; the van Trees bound, which no attacker beats on average over its prior; and chance, the error of mid-grey.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from unbatch.analysis import Analysis, Bound
from unbatch.attack import Attack, NotApplicable
from unbatch.benchmarks import allowance, clock, store
from unbatch.benchmarks.unmix import pool
from unbatch.client import observe
from unbatch.loss import loss_named
from unbatch.models import ACTIVATIONS, initialise
from unbatch.observation import Knowledge, Observation
from unbatch.progress import watching
from unbatch.protocol import Protocol
from unbatch.truth import Truth

Row = dict[str, Any]
SIGMAS = tuple(10.0 ** (k / 2) for k in range(-12, -3))
PROBLEMS = ("tanh", 4), ("gelu", 4), ("softplus", 4), ("gelu", 8)
SEEDS, THINNING, WIDTH, CLASSES = 8, 2, 400, 10
BOUNDS = {"cramer-rao": "cramer-rao:exact=2048", "van-trees": "van-trees:draws=8"}


def run(
    data: Path | None = None, seconds: float = 5.0, seed: int = 0, device: str = "cpu", out: Path | None = None
) -> list[Row]:
    """One row a network and sigma; saved in `out` as they come, with a chart.

    A network is left once unmix has returned nothing. `data` is a folder with cifar10_test600.npz; without it the
    bundled photographs are used.
    """
    rows: list[Row] = []
    for activation, n in PROBLEMS:
        for sigma in SIGMAS:
            rows.append(_measure(activation, n, sigma, data, device, seconds, seed))
            lost = not rows[-1]["returned"]
            if out is not None:
                done = (activation, n) == PROBLEMS[-1] and (lost or sigma == SIGMAS[-1])
                store("bounds", rows, out, seconds=seconds, seed=seed, data=data is not None, complete=done)
            if lost:
                break
    if out is not None:
        _plot(rows, out / "bounds.png")
    return rows


def table(rows: list[Row]) -> Table:
    """Root mean squared errors, and the square's ratio to the bound."""
    whole = [row["ratio"] for row in rows if row["returned"] == row["asked"]]
    worst = f"; largest ratio where all are returned {max(whole):.2f}" if whole else ""
    shown = Table(title=f"bounds: root mean squared error of an entry, of the range{worst}")
    columns = (
        "activation",
        "n",
        "sigma",
        "returned",
        "unmix",
        "Cramer-Rao",
        "ratio",
        "+-",
        "van Trees",
        "chance",
        "seconds",
    )
    for name in columns:
        shown.add_column(name, justify="left" if name == "activation" else "right", no_wrap=True)
    for row in rows:
        found = [f"{row[key]:.3g}" if row[key] is not None else "" for key in ("unmix", "ratio", "error")]
        shown.add_row(
            row["activation"],
            str(row["n"]),
            f"{row['sigma']:.2g}",
            f"{row['returned']} of {row['asked']}",
            found[0],
            f"{row['cramer-rao']:.3g}",
            *found[1:],
            f"{row['van-trees']:.3g}",
            f"{row['chance']:.3g}",
            f"{row['seconds']:.1f}",
        )
    return shown


def _measure(activation: str, n: int, sigma: float, data: Path | None, device: str, seconds: float, seed: int) -> Row:
    images, labels = pool("cifar10", data)
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:n]
    x, y = images[chosen][:, :, ::THINNING, ::THINNING].double().to(device), labels[chosen] % CLASSES
    layers = nn.Linear(x[0].numel(), WIDTH), ACTIVATIONS[activation](), nn.Linear(WIDTH, CLASSES)
    model = nn.Sequential(nn.Flatten(), *layers).double().to(device)
    initialise(model, torch.Generator().manual_seed(seed))
    exchanges = [_sent(model, x, y.to(device), sigma, seed + k) for k in range(SEEDS)]
    row: Row = {"activation": activation, "n": n, "sigma": sigma, "asked": n * SEEDS}
    for name, spec in BOUNDS.items():
        obs, truth = exchanges[0]
        (bound,) = Analysis.parse(spec).run(obs, at=(truth.inputs, truth.labels))
        assert isinstance(bound, Bound)
        row[name] = bound.value
    begun = clock()
    errors = [_errors(obs, truth, seconds) for obs, truth in exchanges]
    means = torch.tensor([sum(each) / len(each) for each in errors if each]) / row["cramer-rao"] ** 2
    row |= {"returned": sum(map(len, errors)), "ratio": float(means.mean()) if len(means) else None}
    row["error"] = float(means.std() / len(means) ** 0.5) if len(means) > 1 else None
    row["unmix"] = row["ratio"] and row["ratio"] ** 0.5 * row["cramer-rao"]
    return row | {"chance": float((x - 0.5).square().mean().sqrt()), "seconds": (clock() - begun) / SEEDS}


def _sent(model: nn.Module, x: Tensor, y: Tensor, sigma: float, seed: int) -> tuple[Observation, Truth]:
    return observe(
        model,
        loss_named("cross-entropy"),
        x,
        y,
        knowledge=Knowledge(domain="images", input_range=(0.0, 1.0)),
        protocol=Protocol(mode="eval"),
        defences=[f"noise:sigma={sigma}"],
        seed=seed,
    )


def _errors(obs: Observation, truth: Truth, seconds: float) -> list[float]:
    """Mean squared error of every example that unmix returns, held against the private one nearest to it."""
    try:
        with watching(allowance(seconds)):
            found = Attack.parse("unmix")(obs, seed=0).inputs
    except NotApplicable:
        return []
    if found is None or not len(found):
        return []
    gaps = torch.cdist(found.double().flatten(1), truth.inputs.flatten(1)).square() / truth.inputs[0].numel()
    return [float(gap) for gap in gaps.min(1).values]


def _plot(rows: list[Row], path: Path) -> None:
    """Errors against sigma; nothing where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    problems = list(dict.fromkeys((row["activation"], row["n"]) for row in rows))
    figure = Figure(figsize=(3.2 * len(problems), 3.4), layout="constrained")
    panels: Iterable[Any] = figure.subplots(1, len(problems), sharey=True, squeeze=False)[0]
    for panel, (activation, n) in zip(panels, problems, strict=True):
        own = [row for row in rows if (row["activation"], row["n"]) == (activation, n)]
        sigmas = [row["sigma"] for row in own]
        styles = {"cramer-rao": "-", "van-trees": "--", "chance": ":", "unmix": "o"}
        for name, style in styles.items():
            panel.loglog(
                sigmas, [torch.nan if row[name] is None else row[name] for row in own], style, label=name, markersize=4
            )
        panel.set(title=f"{activation}, n = {n}", xlabel="sigma")
    next(iter(figure.axes)).set_ylabel("root mean squared error, of the range")
    figure.axes[-1].legend(fontsize="small")
    figure.savefig(path, dpi=120)
