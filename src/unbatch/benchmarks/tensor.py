"""tensor: the experiments of Wang, Lee and Lei (AISTATS 2023) on the tensor-moment attack, and its targets.

The loss is the root of the mean over examples of |found - true|^2, examples matched, the sign resolved where it is open.
Published figures are those stated for d = 10 and d = 100, read off the paper's plots. "paper" is the attack with the
subspace from the moments and plain averages, on the gradient that the experiment takes; "default" has no options but the
norm of the inputs. No result is polished.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from unbatch.attack import Attack
from unbatch.auditing.client import observe
from unbatch.benchmarks import clock, matched, store
from unbatch.benchmarks.pictures import pool, source
from unbatch.domain import Images
from unbatch.domain import Table as Rows
from unbatch.loss import loss_named
from unbatch.metric import match
from unbatch.models.small import initialise
from unbatch.numerics.moments.hermite import coefficients
from unbatch.observation import Observation
from unbatch.reconstruction import Reconstruction
from unbatch.truth import Truth

Row = dict[str, Any]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "x^2+x^3": lambda t: t**2 + t**3,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
}
WIDTH, BIAS_TRICK = 5000, 30.0
SIZES = (10, 20, 40, 70, 100)
PUBLISHED = {  # activation, gradient -> loss at d = 10 and 100
    ("x^2+x^3", "head"): (0.15, 0.49),
    ("x^2+x^3", "first"): (0.035, 0.125),
    ("tanh", "first"): (0.065, 0.36),
    ("sigmoid", "first"): (0.10, 0.375),
}
DIGIT_WIDTHS = (1000, 3000, 5000)
TARGETS = {"x^2+x^3": 0.035, "tanh": 0.015}  # mean relative error at d = 784, n = 2, m = 5000
GRADIENTS = {"head": "dL/da", "first": "dL/dW"}


class TwoLayer(nn.Module):
    """The two-layer network of the paper: sum_j a_j s(w_j . x) + c, w_j drawn from N(0, I), a_j = 1 / m.

    The first layer has no bias.

    >>> TwoLayer(torch.tanh, 3, 100, 0.5, torch.Generator().manual_seed(0))(torch.zeros(2, 3)).tolist()
    [[0.5], [0.5]]
    """

    def __init__(self, s: Callable[[Tensor], Tensor], d: int, m: int, c: float, rng: torch.Generator) -> None:
        super().__init__()
        self.first, self.head = _empty(d, m, bias=False), _empty(m, 1)
        self.s = s
        nn.init.normal_(self.first.weight, generator=rng)
        nn.init.constant_(self.head.weight, 1 / m)
        nn.init.constant_(self.head.bias, c)

    def forward(self, x: Tensor) -> Tensor:
        """[n, ...] -> [n, 1]."""
        y: Tensor = self.head(self.s(self.first(x.flatten(1))))
        return y


def _empty(d: int, m: int, *, bias: bool = True) -> nn.Linear:
    """A dense layer that is to be filled: nn.Linear itself would draw from the global generator."""
    return nn.Linear(d, m, bias=bias, device="meta").to_empty(device="cpu")


def run(
    data: Path | None = None,
    seconds: float = 60.0,
    seed: int = 0,
    device: str = "cpu",
    out: Path | None = None,
    sizes: tuple[int, ...] = SIZES,
    large: bool = True,
) -> list[Row]:
    """One row a measurement, saved in `out` with two plots; `seconds` bounds the trials of each point (at most 10).

    `data` is a folder with mnist_test500.npz (images uint8 [n, 28, 28]); without it the bundled digits of 8 x 8 pixels.
    Raises UnbatchError: no such file there.
    """
    digits, origin = _digits(data)
    rows: list[Row] = []
    pictures: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(row: Row) -> None:
        rows.append(row)
        if out is not None:
            store("tensor", rows, out, seed=seed, device=device, data=origin, width=WIDTH, M=BIAS_TRICK)

    for (name, gradient), published in PUBLISHED.items():
        for d in sizes:
            stated = dict(zip((10, 100), published, strict=True)).get(d)
            found = _losses(name, gradient, torch.eye(d)[:2].double(), WIDTH, seed, device, seconds)
            keep(
                {"experiment": "e_1, e_2", "activation": name, "gradient": gradient, "d": d}
                | found
                | {"published": stated}
            )
    for m in DIGIT_WIDTHS:
        found = _losses("x^2+x^3", "first", digits.flatten(1), m, seed, device, seconds)
        keep({"experiment": "digits", "activation": "x^2+x^3", "gradient": "first", "m": m} | found)
        pictures[m] = _pictures("x^2+x^3", digits, m, seed, device)
    if large:
        for name, target in TARGETS.items():
            keep({"experiment": "random x", "activation": name} | _at_784(name, seed, device) | {"target": target})
        keep({"experiment": "time / one SVD", "activation": "gelu"} | _over_svd(seed, device) | {"target": 3.0})
        for name in ("tanh", "relu"):
            keep(
                {"experiment": "n = 16, m = 20,000", "activation": name} | _large(name, seed, device) | {"target": 20.0}
            )
    if out is not None:
        _plot(rows, digits, pictures, out / "tensor.png")
    return rows


def table(rows: list[Row]) -> Table:
    """Published, paper and default losses in one table; then times and memory."""
    shown = Table(title=f"loss, mean over trials (n = 2, m = {WIDTH:,} where not said)", title_justify="left", box=None)
    shown.add_column("experiment", no_wrap=True)
    for column in ("published", "paper", "default", "target"):
        shown.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        at = f"d = {row['d']}" if "d" in row else f"m = {row['m']:,}" if "m" in row else ""
        words = (row["experiment"], row["activation"], GRADIENTS.get(row.get("gradient", ""), ""), at)
        cells = [_brief(row.get(key)) for key in ("published", "paper", "default", "target")]
        shown.add_row(", ".join(word for word in words if word), *cells)
        if "measured" in row:
            shown.add_row(f"  {row['measured']}")
    return shown


def exchange(
    name: str, x: Tensor, m: int, seed: int, device: str = "cpu", bias: float = BIAS_TRICK
) -> tuple[Observation, Truth]:
    """The update of the paper's client: labels +-1, squared error, and an output raised by 2 M.

    So no residual is near 0.

    >>> seen, truth = exchange("tanh", torch.rand(2, 3, generator=torch.Generator().manual_seed(0)), 50, seed=0)
    >>> seen.update["first.weight"].shape, truth.labels.shape
    (torch.Size([50, 3]), torch.Size([2, 1]))
    """
    rng = torch.Generator().manual_seed(seed)
    model = TwoLayer(ACTIVATIONS[name], x[0].numel(), m, 2 * bias, rng).to(device)
    y = torch.randint(2, (len(x), 1), generator=rng).float() * 2 - 1
    return observe(model, loss_named("squared-error"), x.float(), y)


def _losses(name: str, gradient: str, x: Tensor, m: int, seed: int, device: str, seconds: float) -> Row:
    """Mean losses over up to ten draws of the weights, of the paper's way and of ours."""
    ways = {"paper": _paper(gradient), "default": "tensor-moment:norm=1"}
    found: dict[str, list[float]] = {key: [] for key in ways}
    begun = time.perf_counter()
    while len(found["paper"]) < 10 and (not found["paper"] or time.perf_counter() - begun < seconds):
        obs, truth = exchange(name, x, m, seed + len(found["paper"]), device)
        for key, spec in ways.items():
            found[key].append(_loss(Attack.parse(spec)(obs, seed=seed), truth)[0])
    means = {key: statistics.fmean(values) for key, values in found.items()}
    return means | {"trials": len(found["paper"]), "largest": {key: max(values) for key, values in found.items()}}


def _paper(gradient: str) -> str:
    return f"tensor-moment:subspace=moment,estimate=stein,gradient={gradient},norm=1"


def _loss(found: Reconstruction, truth: Truth) -> tuple[float, Tensor]:
    """Root mean square |found - true| over the examples, and the examples found, in the truth's order."""
    shape = tuple(truth.inputs.shape[1:])
    domain = Images(shape=shape) if len(shape) == 3 else Rows(shape=shape)
    pairs = match(found, truth, domain)
    ordered = torch.zeros(truth.inputs.shape, dtype=torch.float64)
    ordered[pairs.true] = matched(found, truth, domain)[0]
    gap = (ordered - truth.inputs.double().cpu()).flatten(1)
    return float(gap.square().sum(1).mean().sqrt()), ordered


def _pictures(name: str, digits: Tensor, m: int, seed: int, device: str) -> tuple[Tensor, Tensor]:
    """The digits as the paper's way and as ours find them, at one draw."""
    obs, truth = exchange(name, digits, m, seed, device)
    ways = (_paper("first"), "tensor-moment:norm=1")
    paper, ours = (_loss(Attack.parse(way)(obs, seed=seed), truth)[1] for way in ways)
    return paper, ours


def _at_784(name: str, seed: int, device: str) -> Row:
    """Mean relative error of ten pairs of random unit vectors at d = 784; targets E s(Z) +- [1, 2], no bias trick."""
    sizes: dict[str, list[float]] = {"default": [], "paper": []}
    ways = {"default": "tensor-moment:norm=1", "paper": "tensor-moment:estimate=stein,gradient=first,norm=1"}
    for trial in range(10):
        rng = torch.Generator().manual_seed(seed + trial)
        x = torch.randn(2, 784, generator=rng)
        x /= x.norm(dim=1, keepdim=True)
        y = torch.randn(2, 1, generator=rng).sign() * (1 + torch.rand(2, 1, generator=rng))
        model = TwoLayer(ACTIVATIONS[name], 784, WIDTH, 0.0, rng).to(device)
        obs, truth = observe(model, loss_named("squared-error"), x, y + float(coefficients(ACTIVATIONS[name])[0]))
        for key, way in ways.items():
            sizes[key].append(_loss(Attack.parse(way)(obs, seed=seed), truth)[0])
    means = {key: statistics.fmean(values) for key, values in sizes.items()}
    return {"d": 784, "default": means["default"], "averages, with the span": means["paper"], "trials": 10}


def _classifier(s: nn.Module, n: int, m: int, seed: int, device: str) -> tuple[Observation, Truth]:
    """n standard normal inputs of 3072 entries, ten classes, PyTorch's default initialisation, float32."""
    rng = torch.Generator().manual_seed(seed)
    model = initialise(nn.Sequential(_empty(3072, m), s, _empty(m, 10)), rng).to(device)
    x, y = torch.randn(n, 3072, generator=rng), torch.randint(10, (n,), generator=rng)
    return observe(model, loss_named("cross-entropy"), x, y)


def _over_svd(seed: int, device: str) -> Row:
    """Seconds of the whole attack at n = 8, d = 3072, m = 5000, median of 3, over those of one SVD of dL/dW (float64)."""
    obs, truth = _classifier(nn.GELU(), 8, WIDTH, seed, device)
    attack, G = Attack.parse("tensor-moment"), obs.update["0.weight"].double()
    spent: list[float] = []
    for _ in range(3):
        begun = clock()
        found = attack(obs, seed=seed)
        spent.append(clock() - begun)
    begun = clock()
    torch.linalg.svd(G, full_matrices=False)
    _wait(device)
    ours, svd = statistics.median(spent), clock() - begun
    return {
        "seconds": ours,
        "seconds of one SVD": svd,
        "ratio": ours / svd,
        "worst relative error": max(_relative(found, truth)),
        "measured": f"{ours / svd:.2f} ({ours:.2f} s / {svd:.2f} s)",
    }


def _large(name: str, seed: int, device: str) -> Row:
    """Seconds and peak memory of one attack in a process of its own."""
    code = f"from unbatch.benchmarks.tensor import alone; alone({name!r}, {seed}, {device!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    row: Row = json.loads(done.stdout)
    row["measured"] = (
        f"{row['seconds']:.1f} s, {row['growth in GB']:.2f} GB, worst error {row['worst relative error']:.2g}"
    )
    return row


def alone(name: str, seed: int, device: str) -> None:
    """n = 16, d = 3072, m = 20,000: writes seconds, peak resident memory and errors to the standard output, as JSON."""
    import resource

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # kB on Linux

    obs, truth = _classifier({"tanh": nn.Tanh(), "relu": nn.ReLU()}[name], 16, 20_000, seed, device)
    attack = Attack.parse("tensor-moment")
    resident = _resident()
    begun = clock()
    found = attack(obs, seed=seed)
    spent = clock() - begun
    errors = _relative(found, truth)
    row = {"seconds": spent, "peak in GB": peak(), "growth in GB": peak() - resident, "threads": torch.get_num_threads(),
           "worst relative error": max(errors), "median relative error": statistics.median(errors)}  # fmt: skip
    sys.stdout.write(json.dumps(row))


def _resident() -> float:
    """GB of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e9


def _relative(found: Reconstruction, truth: Truth) -> list[float]:
    gap = _loss(found, truth)[1] - truth.inputs.double().cpu()
    sizes: list[float] = (gap.norm(dim=1) / truth.inputs.double().cpu().norm(dim=1)).tolist()
    return sizes


def _digits(data: Path | None) -> tuple[Tensor, str]:
    """Two digits of different classes [2, 1, h, w], each of unit norm, and where they are from."""
    images, labels = pool("mnist", data)
    other = int((labels != labels[0]).nonzero()[0])
    pair = images[[0, other]].float()
    return pair / pair.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1), source("mnist", data)


def _brief(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1e}" if 0 < value < 1e-3 else f"{value:.3g}"


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _plot(rows: list[Row], digits: Tensor, found: dict[int, tuple[Tensor, Tensor]], path: Path) -> None:
    """Losses against d, one panel an experiment, and the digits below; nothing where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(13, 6), layout="constrained")
    above, below = (
        figure.add_subfigure(figure.add_gridspec(2, 1)[0]),
        figure.add_subfigure(figure.add_gridspec(2, 1)[1]),
    )
    for panel, ((name, gradient), stated) in zip(above.subplots(1, len(PUBLISHED)), PUBLISHED.items(), strict=True):
        own = [
            r for r in rows if r["experiment"] == "e_1, e_2" and (r["activation"], r["gradient"]) == (name, gradient)
        ]
        panel.plot((10, 100), stated, "k^", label="published")
        for key in ("paper", "default"):
            panel.plot([r["d"] for r in own], [r[key] for r in own], marker="o", label=key)
        panel.set(title=f"{name}, {GRADIENTS[gradient]}", xlabel="d", ylabel="loss", xscale="log", yscale="log")
        panel.legend(fontsize="small")
    shown = [("true", digits)] + [(f"{way}, m = {m:,}", x) for i, way in enumerate(("paper", "default")) for m, x in
                                  ((m, pair[i]) for m, pair in found.items())]  # fmt: skip
    panels = below.subplots(2, len(shown))
    for column, (title, pictures) in enumerate(shown):
        for row, picture in enumerate(pictures):
            panels[row][column].imshow(picture[0].numpy(), cmap="gray")
            panels[row][column].axis("off")
        panels[0][column].set_title(title, fontsize="small")
    figure.savefig(path, dpi=120)
