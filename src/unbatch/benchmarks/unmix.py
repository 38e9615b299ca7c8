"""unmix: the share of a batch that `unmix` recovers exactly from one gradient, with time, memory and peers.

Default initialisation, one hidden layer of width 1000 and ten classes unless the problem says otherwise; labels are not
known to unmix. An example counts once, as recovered if its best match has a relative error below 1e-4. The median over
five seeds is quoted; a seed draws the pictures, the model and the attack's own randomness anew. Once three of them recover
the whole batch that median is 1 whatever the others give, and they are not run. Memory is the high-water mark of the
process, which measures one problem after another.

Peers run on the first seed's gradient: gradient matching by dlg (L-BFGS) and inverting-gradients (cosine, Adam), labels
known, for `seconds` or as long as unmix took where that is more; and FastICA on the span alone, as in the cocktail party
attack.
"""

from __future__ import annotations

import json
import math
import resource
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.table import Table
from torch import Tensor, nn

from unbatch.attack import Attack
from unbatch.auditing.client import observe
from unbatch.benchmarks import allowance, clock, matched, measured, store, stored
from unbatch.benchmarks.pictures import FILES, TABLES, pool
from unbatch.domain import Domain, Images
from unbatch.domain import Table as Rows
from unbatch.errors import UnbatchError
from unbatch.knowledge import Knowledge
from unbatch.loss import loss_named
from unbatch.metric import match
from unbatch.models import small
from unbatch.numerics.linear.span import leading_span
from unbatch.numerics.unmix.ica import fast_ica
from unbatch.observation import Observation
from unbatch.progress import watching
from unbatch.reconstruction import Reconstruction
from unbatch.reporting.thresholds import EXACT
from unbatch.truth import Truth

Row = dict[str, Any]
TRAINED = 0.9  # share of the training examples that a trained network classifies rightly, at least
LIMIT = 1800.0  # seconds after which unmix starts nothing new
SIZES = (16, 32, 64, 128, 256)


@dataclass(frozen=True, kw_only=True)
class BatchProblem:
    """One setting whose batches are to be taken apart; its gradients differ by the seed.

    >>> BatchProblem(n=16, activation="relu", width=200).name
    'cifar10, unit, relu, n=16, float64, width 200'
    """

    data: str = "cifar10"
    inputs: Literal["unit", "standardised"] = "unit"  # [0, 1], or zero mean and unit variance over the pool
    activation: small.ActivationName = "gelu"
    n: int = 32
    precision: Literal["float64", "float32"] = "float64"
    width: int = 1000
    depth: int = 1
    classes: int = 10
    trained: bool = False
    thinning: int = 1  # every so many pixels in both directions
    peers: bool = False
    seeds: int = 5

    @property
    def name(self) -> str:
        parts = [self.data, *[self.inputs] * (self.data not in TABLES), self.activation, f"n={self.n}", self.precision]
        parts += [f"width {self.width}"] * (self.width != 1000) + [f"depth {self.depth}"] * (self.depth != 1)
        parts += [f"{self.classes} classes"] * (self.classes != 10) + ["trained"] * self.trained
        parts += [f"pixels / {self.thinning**2}"] * (self.thinning != 1)
        return ", ".join(parts)


def batch_problems() -> list[BatchProblem]:
    """The tables of the literature, then what else users bring. Small batches come first.

    >>> batch_problems()[0].n
    16
    """
    smooth: tuple[small.ActivationName, ...] = ("gelu", "silu", "tanh", "elu", "sigmoid", "softplus")
    every = ("relu", *smooth)
    found = [BatchProblem(activation=a, n=n) for n in SIZES for a in every]
    found += [BatchProblem(activation=a, n=n, inputs="standardised") for n in SIZES[:-1] for a in every]
    found += [BatchProblem(activation=a, n=SIZES[-1], inputs="standardised") for a in ("relu", "gelu")]
    found += [BatchProblem(n=n, width=200) for n in (80, 90, 96)]  # towards half the width
    found += [BatchProblem(activation="relu", n=n, width=200) for n in (80, 90)]
    found += [BatchProblem(n=n, seeds=1) for n in (384, 448)] + [BatchProblem(n=384, seeds=1, activation="relu")]
    found += [BatchProblem(activation=a, n=n, precision="float32") for n in SIZES for a in ("relu", "gelu", "tanh")]
    found += [
        BatchProblem(data=d, activation=a, n=n) for d in ("mnist", "fashion") for n in (32, 64, 128) for a in every
    ]
    found += [BatchProblem(n=n, depth=depth, inputs="standardised") for depth in (3, 5) for n in (16, 32)]
    found += [BatchProblem(n=16, classes=1000), BatchProblem(data="mnist", n=16, trained=True)]
    found += [BatchProblem(data="photos64", n=16), BatchProblem(data="breast-cancer", classes=2, n=16)]
    found += [BatchProblem(data="adult", classes=2, n=32, activation=a) for a in ("relu", "gelu", "tanh")]
    found += [BatchProblem(n=32, activation=a, inputs="standardised", peers=True, seeds=1) for a in ("relu", "gelu")]
    # a run that is stopped has stored whole tables; the longest come last
    return sorted(found, key=lambda problem: (problem.n, problem.n == SIZES[-1] and problem.activation == "relu"))


def scales() -> dict[str, list[tuple[int, BatchProblem]]]:
    """Sizes and problems that show how time grows with n, m and d: gelu, standardised pictures, float64.

    >>> [size for size, problem in scales()["n"]]
    [8, 16, 32, 64, 128]
    """
    base = BatchProblem(inputs="standardised", n=32, seeds=1)
    return {
        "n": [(n, replace(base, n=n)) for n in (8, 16, 32, 64, 128)],
        "m": [(m, replace(base, width=m)) for m in (500, 1000, 2000, 4000)],
        "d": [(3072 // step**2, replace(base, thinning=step)) for step in (4, 2, 1)],
    }


def run(
    data: Path | None = None,
    seconds: float = 300.0,
    seed: int = 0,
    device: str = "cpu",
    out: Path | None = None,
    wanted: Sequence[BatchProblem] | None = None,
) -> list[Row]:
    """One row a problem, and one a fitted exponent of the time; saved in `out` as they come.

    `data` is a folder with CIFAR-10, MNIST, Fashion-MNIST as npz (images uint8, labels) and UCI Adult as csv; without it
    the bundled photographs stand in for CIFAR-10, and the others are left out. With one thread a process
    (OMP_NUM_THREADS=1) as many problems run side by side as there are processors, and seconds are CPU seconds of each.
    A run that was cut short goes on where it stopped, if `out` holds it; a row says when it was measured.
    Raises UnbatchError: no such file there.
    """

    def here(problem: BatchProblem) -> BatchProblem:
        return replace(problem, data="photos") if data is None and problem.data == "cifar10" else problem

    series = {} if wanted is not None else scales()
    growth = {here(problem) for points in series.values() for _, problem in points}
    listed = [here(problem) for problem in (batch_problems() if wanted is None else wanted)]
    listed = [problem for problem in listed if data is not None or problem.data not in FILES]
    large = next((i for i, problem in enumerate(listed) if problem.n == SIZES[-1]), len(listed))
    todo = [*listed[:large], *sorted(growth, key=lambda problem: problem.n), *listed[large:]]
    for name in {problem.data for problem in todo}:
        pool(name, data)  # what is missing is said before anything runs
    done: dict[BatchProblem, Row] = {}
    how: dict[str, Any] = {"seconds": seconds, "seed": seed, "device": device, "data": data is not None}

    def keep(problem: BatchProblem, row: Row) -> None:
        done[problem] = row
        if out is not None:
            store("unmix", rows(), out, **how, complete=wanted is None and len(done) == len(todo))
            if wanted is None:
                _plot(rows(), out / "unmix.png")

    def rows() -> list[Row]:
        found = [done[p] for p in listed if p in done]
        for letter, points in series.items():
            points = [(size, here(p)) for size, p in points]
            if all(p in done for _, p in points):
                spent = [done[p]["seconds"] for _, p in points]
                found.append({"problem": f"time against {letter}", **exponents([size for size, _ in points], spent)})
        return found

    measure = partial(_measure, data=data, seed=seed, device=device, seconds=seconds)
    kept = {json.dumps(row["settings"]): row for row in stored("unmix", out, **how) if "settings" in row}
    done |= {problem: kept[key] for problem in todo if (key := json.dumps(asdict(problem))) in kept}
    for problem, row in measured([problem for problem in todo if problem not in done], measure, device):
        keep(problem, row)
    return rows()


def exponents(sizes: Sequence[int], seconds: Sequence[float]) -> Row:
    """How time grows with a size: the exponent fitted to all sizes, and that of the last step alone.

    The latter is what small sizes do not flatter.

    >>> f"{exponents([10, 20, 40], [1.0, 2.0, 16.0])['last exponent']:.1f}"
    '3.0'
    """
    x, y = np.log(sizes), np.log(seconds)
    last = float((y[-1] - y[-2]) / (x[-1] - x[-2]))
    return {"exponent": float(np.polyfit(x, y, 1)[0]), "last exponent": last, "sizes": sizes, "seconds": seconds}


def table(rows: list[Row]) -> Table:
    """Share recovered, share certified, the bound over the error, seconds and memory; peers below their problem."""
    shown = Table(title="unmix: share of the batch recovered (relative error < 1e-4), median over seeds")
    for column in (
        "problem",
        "attack",
        "seeds",
        "recovered",
        "certified",
        "bound / error",
        "seconds",
        "worker's peak GB",
    ):
        shown.add_column(column, justify="left" if column in ("problem", "attack") else "right")
    for row in rows:
        if "exponent" in row:
            grown = f"exponent {row['exponent']:.2f}, from {row['sizes'][-2]:,} on {row['last exponent']:.2f}"
            shown.add_row(row["problem"], "unmix", "1", "", "", "", grown, "")
            continue
        ratio = row.get("bound over error")
        shown.add_row(
            row["problem"],
            row["attack"],
            str(len(row["shares"])),
            f"{row['recovered']:.3f}",
            "" if row.get("certified") is None else f"{row['certified']:.3f}",
            "" if ratio is None else f"{ratio:.0f}",
            f"{row['seconds']:.1f}",
            f"{row['peak GB of the worker so far']:.2f}",
        )
        for peer in row["peers"]:
            shown.add_row("", peer["attack"], "1", f"{peer['recovered']:.3f}", "", "", f"{peer['seconds']:.1f}", "")
    return shown


def _measure(problem: BatchProblem, data: Path | None, seed: int, device: str, seconds: float) -> Row:
    examples = pool(problem.data, data)
    shares, certified, spent, ratios, logs, accuracies = [], [], [], [], [], []
    first = list[tuple[Observation, Truth, Domain]]()
    for trial in range(seed, seed + problem.seeds):
        obs, truth, domain, accuracy = batch_exchange(problem, examples, trial, device)
        accuracies.append(accuracy)
        begun = clock()
        with watching(allowance(LIMIT)):
            found = Attack.parse("unmix")(obs, seed=trial)
        spent.append(clock() - begun)
        error, bound = _errors(found, truth, domain)
        shares.append(float((error < EXACT).double().sum()) / problem.n)
        certified.append(float(bound.isfinite().double().sum()) / problem.n)
        ratios += (bound / error)[bound.isfinite()].tolist()
        logs.append(found.trace.get("log"))
        first = first or [(obs, truth, domain)]
        if shares.count(1.0) > problem.seeds / 2:  # the median is settled
            break
    return {
        "problem": problem.name,
        "measured": date.today().isoformat(),
        "attack": "unmix",
        "recovered": statistics.median(shares),
        "certified": statistics.median(certified),
        "bound over error": statistics.median(ratios) if ratios else None,
        "least bound over error": min(ratios) if ratios else None,
        "seconds": statistics.median(spent),
        "training accuracy": min(accuracies) if problem.trained else None,
        "peak GB of the worker so far": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "shares": shares,
        "log": logs[0],
        "settings": asdict(problem),
        "peers": _peers(*first[0], seconds=max(seconds, spent[0]), seed=seed) if problem.peers else [],
    }


def _errors(found: Reconstruction, truth: Truth, domain: Domain) -> tuple[Tensor, Tensor]:
    """Relative errors and bounds of the matched examples."""
    pairs = match(found, truth, domain)
    if pairs.inputs is None or found.bound is None:
        return torch.zeros(0), torch.zeros(0)
    a, b = (t.double().cpu().flatten(1) for t in (pairs.inputs, truth.inputs[pairs.true]))
    return (a - b).norm(dim=1) / a.norm(dim=1), found.bound.cpu()[pairs.found]


def _peers(obs: Observation, truth: Truth, domain: Domain, *, seconds: float, seed: int) -> list[Row]:
    rows = []
    known = obs.knowledge | Knowledge(labels=truth.labels, batch_size=len(truth), input_range=_range(truth.inputs))
    for preset in ("dlg", "inverting-gradients"):
        begun = clock()
        attack = Attack.parse(f"gradient-matching:preset={preset},restarts=1000000")
        with watching(allowance(seconds)):
            found = attack(replace(obs, knowledge=known), seed=seed)
        rows.append(_peer(attack.name + f":preset={preset}", found, truth, domain, clock() - begun))
    begun = clock()
    dense = next(name for name, p in obs.model.named_parameters() if p.ndim == 2)
    rng = torch.Generator().manual_seed(seed)
    span = leading_span(obs.update[dense], rng, rank=len(truth))
    centred = span.rows - span.rows.mean(1, keepdim=True)
    pictures = (fast_ica(centred, rng) @ span.rows).reshape(truth.inputs.shape)
    found = Reconstruction(inputs=pictures, up_to=frozenset({"permutation", "sign", "scale"}))
    return [*rows, _peer("FastICA of the span", found, truth, domain, clock() - begun)]


def _peer(name: str, found: Reconstruction, truth: Truth, domain: Domain, seconds: float) -> Row:
    a, b = (t.flatten(1) for t in matched(found, truth, domain))
    error = (a - b).norm(dim=1) / b.norm(dim=1)
    cosine = float(torch.nn.functional.cosine_similarity(a, b).abs().mean())
    share = float((error < EXACT).double().sum()) / len(truth)
    return {"attack": name, "recovered": share, "seconds": seconds, "mean |cosine|": cosine}


def batch_exchange(
    problem: BatchProblem, pool: tuple[Tensor, Tensor], seed: int, device: str
) -> tuple[Observation, Truth, Domain, float]:
    """The gradient, the truth, the domain, and the share of the pool that the network classifies rightly (trained only)."""
    pictures, labels = pool
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(seed))[: problem.n]
    x = pictures[..., :: problem.thinning, :: problem.thinning].double() if problem.thinning > 1 else pictures.double()
    if problem.inputs == "standardised" or problem.data == "breast-cancer":
        x = (x - x.mean(0 if x.ndim == 2 else None)) / x.std(0 if x.ndim == 2 else None)
    rng = torch.Generator().manual_seed(seed + 1)
    many = problem.classes > 10
    y = torch.randint(problem.classes, labels.shape, generator=rng) if many else labels % problem.classes
    shape, (m, depth), s = tuple(x.shape[1:]), (problem.width, problem.depth), problem.activation
    model = small.build("mlp", shape, problem.classes, depth=depth, width=m, activation=s, rng=rng)
    accuracy = _train(model, x.float(), y) if problem.trained else math.nan
    dtype = torch.float64 if problem.precision == "float64" else torch.float32
    domain: Domain = Rows(shape=shape) if x.ndim == 2 else Images(shape=shape)
    obs, truth = observe(
        model.to(device, dtype),
        loss_named("cross-entropy"),
        x[order].to(device, dtype),
        y[order].to(device),
        knowledge=Knowledge(domain="table" if x.ndim == 2 else "images"),
    )
    return obs, truth, domain, accuracy


def _train(model: nn.Module, x: Tensor, y: Tensor, *, steps: int = 500) -> float:
    """Adam until more than nine in ten training examples are classified rightly: their share.

    Raises UnbatchError: they are not after `steps`, and figures of a trained network would be those of an untrained one.
    """
    adam = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(steps):
        outputs = model(x)
        share = float((outputs.argmax(1) == y).double().mean())
        if share > TRAINED:
            return share
        adam.zero_grad()
        torch.nn.functional.cross_entropy(outputs, y).backward()  # type: ignore[no-untyped-call]
        adam.step()
    raise UnbatchError(
        f"after {steps} steps the network classifies {share:.0%} of its training examples rightly, and a trained one is to "
        f"classify more than {TRAINED:.0%}; take a wider network or other data."
    )


def _range(x: Tensor) -> tuple[float, float]:
    return math.floor(float(x.min())), math.ceil(float(x.max()))


def _plot(rows: list[Row], path: Path) -> None:
    """Share recovered and seconds against the batch size; nothing where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    lines: dict[str, list[tuple[int, float, float]]] = {}
    for row in rows:
        s = row.get("settings")
        usual = {"inputs": "unit", "precision": "float64", "depth": 1}
        if s and s["data"] in ("cifar10", "photos") and usual.items() <= s.items():
            lines.setdefault(s["activation"], []).append((s["n"], row["recovered"], row["seconds"]))
    for name, points in lines.items():
        n, share, seconds = zip(*sorted(points), strict=True)
        panels[0].plot(n, share, marker="o", label=name)
        panels[1].loglog(n, seconds, marker="o", label=name)
    panels[0].set(xlabel="batch size", ylabel="share recovered", ylim=(0, 1.05), xscale="log")
    panels[1].set(xlabel="batch size", ylabel="seconds")
    panels[0].legend(fontsize="small")
    figure.savefig(path, dpi=120)
