"""bounds: how near unmix comes to the Cramer-Rao bound as noise grows, until it recovers nothing any more.

Pictures of 16 x 16 pixels from the bundled photographs, one hidden layer of smooth units, one float64 gradient with
Gaussian noise of known sigma in every entry. For each sigma, over `SEEDS` draws of the noise: the mean squared error of the
examples that unmix returns, matched to the private ones; the Cramer-Rao bound at the batch, which unbiased attackers cannot
beat; the ratio of both, over the examples returned; the van Trees bound, which no attacker beats on average over its prior;
and chance, the error of mid-grey.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from unbatch.analysis import Analysis, Bound
from unbatch.attack import Attack
from unbatch.auditing.client import observe
from unbatch.benchmarks import allowance, clock, store
from unbatch.benchmarks.pictures import pool
from unbatch.errors import NotApplicable
from unbatch.inversion.fisher import Information
from unbatch.knowledge import Knowledge
from unbatch.loss import loss_named
from unbatch.models.small import ACTIVATIONS, initialise
from unbatch.numerics.linear.inverse_trace import dense_inverse_trace
from unbatch.observation import Observation
from unbatch.progress import watching
from unbatch.protocol import Protocol
from unbatch.truth import Truth

Row = dict[str, Any]
SIGMAS = tuple(10.0 ** (k / 2) for k in range(-12, -3))
PROBLEMS = ("tanh", 4), ("gelu", 4), ("softplus", 4)
SEEDS, THINNING, WIDTH, CLASSES = 8, 2, 400, 10


def run(
    data: Path | None = None, seconds: float = 5.0, seed: int = 0, device: str = "cpu", out: Path | None = None
) -> list[Row]:
    """One row a network and sigma; saved in `out` as they come, with a chart.

    A network is left once unmix has returned nothing. `data` is a folder with cifar10_test600.npz; without it the
    bundled photographs are used.
    """
    rows: list[Row] = []
    for activation, n in PROBLEMS:
        problem = _Problem.of(activation, n, data, device, seed)
        for sigma in SIGMAS:
            rows.append(_measure(problem, sigma, seconds, seed))
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
    some = [row["ratio"] for row in rows if row["returned"]]
    worst = f"; largest ratio {max(whole):.2f} where all are returned" if whole else ""
    worst += f", {max(some):.2f} where any are" if some else ""
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


@dataclass(frozen=True)
class _Problem:
    """A network, a batch, and the Cramer-Rao bound on the variance of each example's entries at sigma = 1, [n]."""

    activation: str
    x: Tensor
    y: Tensor
    model: nn.Module
    least: Tensor

    @classmethod
    def of(cls, activation: str, n: int, data: Path | None, device: str, seed: int) -> _Problem:
        images, labels = pool("cifar10", data)
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:n]
        x, y = images[chosen][:, :, ::THINNING, ::THINNING].double().to(device), (labels[chosen] % CLASSES).to(device)
        layers = nn.Linear(x[0].numel(), WIDTH), ACTIVATIONS[activation](), nn.Linear(WIDTH, CLASSES)
        model = nn.Sequential(nn.Flatten(), *layers).double().to(device)
        initialise(model, torch.Generator().manual_seed(seed))
        F = Information(_sent(model, x, y, 1.0, 0)[0], x, y).matrix()
        *_, inverse = dense_inverse_trace([[F]], torch.ones(len(F)).to(F))
        return cls(activation, x, y, model, inverse.diagonal().view(n, -1).mean(1))


def _measure(problem: _Problem, sigma: float, seconds: float, seed: int) -> Row:
    x, y, least = problem.x, problem.y, sigma**2 * problem.least
    exchanges = [_sent(problem.model, x, y, sigma, seed + k) for k in range(SEEDS)]
    said = Analysis.parse("van-trees:draws=8")(exchanges[0][0], at=(x, y))
    (bound,) = (each for each in said if isinstance(each, Bound))
    begun = clock()
    found = [_errors(obs, truth, seconds) for obs, truth in exchanges]
    whole = [sum(errors.values()) / sum(float(least[i]) for i in errors) for errors in found if errors]
    ratios, returned = torch.tensor(whole), [error for errors in found for error in errors.values()]
    return {
        "activation": problem.activation,
        "n": len(x),
        "sigma": sigma,
        "asked": len(x) * SEEDS,
        "returned": len(returned),
        "unmix": (sum(returned) / len(returned)) ** 0.5 if returned else None,
        "cramer-rao": float(least.mean().sqrt()),
        "ratio": float(ratios.mean()) if whole else None,
        "error": float(ratios.std() / len(ratios) ** 0.5) if len(whole) > 1 else None,
        "van-trees": bound.value,
        "chance": float((x - 0.5).square().mean().sqrt()),
        "seconds": (clock() - begun) / SEEDS,
    }


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


def _errors(obs: Observation, truth: Truth, seconds: float) -> dict[int, float]:
    """Mean squared error of the entries of each private example that unmix returns, by its place in the batch."""
    try:
        with watching(allowance(seconds)):
            found = Attack.parse("unmix")(obs, seed=0).inputs
    except NotApplicable:
        return {}
    if found is None or not len(found):
        return {}
    gaps = torch.cdist(found.double().flatten(1), truth.inputs.flatten(1)).square() / truth.inputs[0].numel()
    return {int(place): float(gap) for gap, place in zip(*gaps.min(1), strict=True)}


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
