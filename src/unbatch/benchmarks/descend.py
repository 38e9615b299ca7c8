"""descend: pictures behind ResNets and other convolutional networks, recovered from one gradient, with time and memory.

Standardised pictures (zero mean and unit variance a channel over the pool), ten classes, cross entropy, default
initialisation, batch norm in eval mode unless a row says otherwise; labels and batch size are not told. A trained network
knows 80 % at least of the pictures that it was taught, all but 100 of the pool; the batch is of those 100. A picture counts
as recovered where it comes with a bound and its peak signal-to-noise ratio, over the range of the batch, is above 60 dB. A
seed draws the pictures and the network anew; a row is the median over its seeds. Memory is the high-water mark of the
process, which measures one row after another.

Peers run on the first seed's gradient with the labels known: gradient matching by its default and by the preset
inverting-gradients, as long as descend took, and ten times as long. What others published on such a network stands in
PUBLISHED, with its source.
"""

from __future__ import annotations

import resource
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from unbatch.attack import Attack
from unbatch.auditing.client import observe
from unbatch.benchmarks import allowance, clock, resumed
from unbatch.benchmarks.pictures import pool
from unbatch.benchmarks.unmix import exponents
from unbatch.errors import NotApplicable, UnbatchError
from unbatch.knowledge import Knowledge
from unbatch.models import small
from unbatch.observation import Observation
from unbatch.progress import watching
from unbatch.protocol import Protocol, buffers_after
from unbatch.reconstruction import Reconstruction

Row = dict[str, Any]
RECOVERED = 60.0  # dB
LIMIT = 1800.0  # seconds of one run of descend
HELD_OUT = 100  # pictures that no network is taught, of which the batch is
EPOCHS, RATE, TAUGHT_AT_ONCE = 12, 0.05, 50  # of training
LEARNT = 0.8  # share of its own pictures that a trained network knows at least
PEERS = {
    "gradient-matching": "gradient-matching",
    "inverting-gradients": "gradient-matching:preset=inverting-gradients",
}
# Mean dB of four CIFAR-10 pictures on a ResNet-18 by Inverting Gradients after 24,000 iterations of Adam.
PUBLISHED = {
    "four classes": (22.03, "Inverting Gradients, in the survey arXiv:2503.11514"),
    "one class": (14.03, "the same"),
}


@dataclass(frozen=True, kw_only=True)
class NetworkProblem:
    """One setting whose batches are to be recovered; its gradients differ by the seed.

    >>> NetworkProblem(model="vgg11", n=4, precision="float32").name
    'vgg11, n=4, float32'
    """

    model: small.Name = "resnet18"
    n: int = 4
    norm: Literal["batch", "group", "none"] = "batch"
    mode: Literal["eval", "train"] = "eval"
    precision: Literal["float64", "float32"] = "float64"
    width: int = 64
    alike: bool = False  # all of one class
    peers: bool = False
    seeds: int = 3
    trained: bool = False  # on pictures among which the batch is not
    averages: bool = False  # the client sends its running averages after the step as well
    average_pooling: bool = False  # in place of every max pooling
    size: int = 32  # pixels a side; other pictures than CIFAR-10's are bundled photographs

    @property
    def name(self) -> str:
        parts = [self.model, f"n={self.n}", self.precision]
        parts += [f"{self.norm} norm" if self.norm != "none" else "no norm"] * (self.norm != "batch")
        parts += ["train mode"] * (self.mode == "train") + ["averages sent"] * self.averages
        parts += [f"{self.size} pixels"] * (self.size != 32) + [f"width {self.width}"] * (self.width != 64)
        parts += ["average pooling"] * self.average_pooling
        return ", ".join(parts + ["one class"] * self.alike + ["trained"] * self.trained)


def network_problems() -> list[NetworkProblem]:
    """What is recovered, and the next that is not, the cheapest first.

    >>> network_problems()[0].name
    'resnet18, n=1, float64'
    """
    base = NetworkProblem()
    found = [replace(base, n=n, peers=n == 4) for n in (1, 2, 4, 8)]
    found += [replace(base, n=n, precision="float32") for n in (1, 4, 8)]
    found += [replace(base, n=n, alike=True) for n in (4, 8)] + [replace(base, n=n, norm="none") for n in (1, 4)]
    found += [replace(base, model=model, n=n) for model in ("vgg11", "convnet8", "resnet34") for n in (1, 4)]
    found += [replace(base, model="convnet8", n=2)]
    found += [replace(base, model="convnet8", n=n, average_pooling=True, seeds=1) for n in (1, 4)]
    found += [replace(base, n=1, norm="group"), replace(base, n=4, norm="group", seeds=1)]
    found += [replace(base, n=1, mode="train", averages=averages) for averages in (True, False)]
    found += [replace(base, n=n, mode="train", averages=True, seeds=1) for n in (4, 8)]
    found += [replace(base, n=4, mode="train", seeds=1)]
    found += [replace(base, n=1, size=size, seeds=1) for size in (16, 48, 64)]
    found += [replace(base, n=1, width=width, seeds=1) for width in (16, 32)]
    found += [replace(base, model=model, n=1) for model in ("preact-resnet18", "wideresnet16-4")]
    found += [replace(base, n=1, width=32, trained=True)]
    found += [replace(base, n=n, seeds=1) for n in (16, 30)]
    return sorted(found, key=lambda problem: problem.n)


def run(
    data: Path | None = None,
    seconds: float = LIMIT,
    seed: int = 0,
    device: str = "cpu",
    out: Path | None = None,
    wanted: Sequence[NetworkProblem] | None = None,
) -> list[Row]:
    """One row a problem, saved in `out` as they come; a run that was cut short goes on where it stopped.

    `data` is a folder with cifar10_test600.npz; without it the bundled photographs are used. `seconds` is the time of one
    run of descend. With one thread a process (OMP_NUM_THREADS=1) as many problems run side by side as there are
    processors, and seconds are CPU seconds of each. Raises UnbatchError: no such file there.
    """
    pool("cifar10", data)  # what is missing is said before anything runs
    todo = list(network_problems() if wanted is None else wanted)
    how: dict[str, Any] = {"seconds": seconds, "seed": seed, "device": device, "data": data is not None}
    measure = partial(_measure, data=data, seed=seed, device=device, seconds=seconds)
    return resumed("descend", todo, measure, out, whole=wanted is None, **how)


def table(rows: list[Row]) -> Table:
    """The share recovered and certified, the worst picture, bound over error, time, memory, and the peers' dB."""
    shown = Table(title=f"descend: share of pictures above {RECOVERED:.0f} dB with a bound, median over seeds")
    columns = (
        "network",
        "share",
        "dB",
        "false",
        "bound / error",
        "seconds",
        "GiB",
        "told apart at",
        "peers (dB)",
        "why",
    )
    for column in columns:
        shown.add_column(column, justify="left" if column in ("network", "told apart at", "why") else "right")
    for row in rows:
        peers = "; ".join(f"{name} {dB:.1f}" for name, dB in row["peers"].items())
        shown.add_row(
            row["network"],
            f"{row['share']:.2f}",
            f"{row['psnr']:.1f}",
            str(row["false"]),
            "" if row["bound over error"] is None else f"{row['bound over error']:.0f}",
            f"{row['seconds']:.0f}",
            f"{row['GiB']:.1f}",
            row["layer"],
            peers,
            row["why"],
        )
    shown.caption = "; ".join(f"seconds grow with {what} to the {power:.1f}" for what, power in growth(rows).items())
    for what, (dB, source) in PUBLISHED.items():
        shown.add_row(f"published, n=4, {what}", "", f"{dB:.1f}", "", "", "", "", "", "", source)
    return shown


def growth(rows: Sequence[Row]) -> dict[str, float]:
    """By which powers the seconds grow with n, with the pixels of a picture and with the width, all else as at n = 1.

    More pixels are more windows in every layer. Only rows whose pictures all came back count; a power takes three of them.

    >>> alone = asdict(NetworkProblem(n=1))
    >>> def row(seconds, **other):
    ...     return {"settings": alone | other, "share": 1.0, "seconds": seconds}
    >>> {what: round(power, 6) for what, power in growth([row(3.0), row(6.0, n=2), row(12.0, n=4)]).items()}
    {'n': 1.0}
    """
    alone, found = asdict(NetworkProblem(n=1)), dict[str, float]()
    for name, words in (("n", "n"), ("size", "pixels"), ("width", "width")):
        points = sorted(
            (row["settings"][name] ** (2 if name == "size" else 1), row["seconds"])
            for row in rows
            if row["share"] == 1.0 and _but(row["settings"], name) == _but(alone, name)
        )
        if len(points) > 2:
            sizes, seconds = zip(*points, strict=True)
            found[words] = float(exponents(sizes, seconds)["exponent"])
    return found


def _but(settings: Row, name: str) -> Row:
    """Settings without one of them, and without those that change no batch's recovery."""
    return {key: value for key, value in settings.items() if key not in (name, "seeds", "peers")}


def _measure(problem: NetworkProblem, data: Path | None, seed: int, device: str, seconds: float) -> Row:
    tries = [_try(problem, data, seed + k, device, seconds) for k in range(problem.seeds)]
    peers: dict[str, float] = {}
    if problem.peers:
        obs, x, y = _exchange(problem, data, seed, device)
        for name, spelling in PEERS.items():
            for times in (1, 10):
                peers[f"{name} x{times}"] = _peer(spelling, obs, x, y, times * tries[0]["seconds"])
    ratios = [ratio for each in tries for ratio in each["ratios"]]
    return {
        "network": problem.name,
        "settings": asdict(problem),
        "share": statistics.median(each["share"] for each in tries),
        "psnr": statistics.median(each["psnr"] for each in tries),
        "false": sum(each["false"] for each in tries),
        "bound over error": statistics.median(ratios) if ratios else None,
        "seconds": statistics.median(each["seconds"] for each in tries),
        "GiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "layer": tries[0]["layer"],
        "peers": peers,
        "why": tries[0]["why"],
        "tries": tries,
    }


def _exchange(problem: NetworkProblem, data: Path | None, seed: int, device: str) -> tuple[Observation, Tensor, Tensor]:
    """What the server sees, and the pictures and labels behind it."""
    images, labels = _pictures(problem.size, data)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    if problem.alike:
        order = order[labels[order] == labels[order[0]]]
    chosen = order[: problem.n]
    mean, spread = images.mean((0, 2, 3), keepdim=True), images.std((0, 2, 3), keepdim=True)
    x = ((images[chosen] - mean) / spread).to(device)
    x, y = x.double() if problem.precision == "float64" else x, labels[chosen].to(device)
    rng = torch.Generator().manual_seed(seed)
    norm = None if problem.norm == "none" else problem.norm
    net = small.build(problem.model, tuple(x.shape[1:]), 10, width=problem.width, norm=norm, rng=rng).to(x)
    if problem.average_pooling:
        for name, layer in list(net.named_children()):
            if isinstance(layer, nn.MaxPool2d):
                setattr(net, name, nn.AvgPool2d(layer.kernel_size, layer.stride))
    if problem.trained:
        _train(net, ((images - mean) / spread).to(x), labels.to(device), order[HELD_OUT:], rng)
    told, known = Protocol(mode=problem.mode), Knowledge()
    if problem.averages:
        known = Knowledge(buffers=buffers_after(net, F.cross_entropy, x, y, told))
    seen, _ = observe(net, F.cross_entropy, x, y, protocol=told, knowledge=known)
    return seen.only("input_shape", "mode", "buffers"), x, y


def _pictures(size: int, data: Path | None) -> tuple[Tensor, Tensor]:
    """Pictures [p, 3, size, size] and labels [p]: CIFAR-10's up to 32 pixels, bundled photographs above, made smaller."""
    images, labels = pool("cifar10", data) if size <= 32 else pool("photos64", None)
    return (F.interpolate(images, size=size, mode="area") if size < images.shape[-1] else images), labels


def _train(net: nn.Module, x: Tensor, y: Tensor, own: Tensor, rng: torch.Generator) -> None:
    """Teaches a network some pictures until it knows most of them, in float32. Raises UnbatchError: it does not."""
    dtype = x.dtype
    net, x = net.float().train(), x.float()
    optimiser = torch.optim.SGD(net.parameters(), lr=RATE, momentum=0.9, nesterov=True)
    steps = EPOCHS * (len(own) // TAUGHT_AT_ONCE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps)
    with torch.enable_grad():
        for _ in range(EPOCHS):
            mixed = own[torch.randperm(len(own), generator=rng)]
            for chosen in torch.split(mixed[: len(own) // TAUGHT_AT_ONCE * TAUGHT_AT_ONCE], TAUGHT_AT_ONCE):
                optimiser.zero_grad()
                F.cross_entropy(net(x[chosen]), y[chosen]).backward()  # type: ignore[no-untyped-call]
                optimiser.step()
                schedule.step()
    net.eval()
    with torch.no_grad():
        known = float((net(x[own]).argmax(1) == y[own]).double().mean())
    if known < LEARNT:
        raise UnbatchError(f"training ended at {known:.0%} of its own pictures; give it more epochs.")
    net.zero_grad(set_to_none=True)
    net.to(dtype)


def _try(problem: NetworkProblem, data: Path | None, seed: int, device: str, seconds: float) -> Row:
    """How much of one batch descend recovers."""
    obs, x, _ = _exchange(problem, data, seed, device)
    begun, why, found = clock(), "", Reconstruction(inputs=x[:0], bound=torch.zeros(0))
    with watching(allowance(seconds)):
        try:
            found = Attack.parse("descend:partial=true")(obs, seed=seed)
            why = str(found.trace.get("stopped", ""))
        except NotApplicable as error:
            why = str(error)
    spent = clock() - begun
    own, errors = _nearest(found, x)
    bound = found.bound if found.bound is not None else torch.zeros(0)
    sure = bound.isfinite()
    fails = [j for j in sure.nonzero().flatten().tolist() if errors[j] > float(bound[j])]
    caught = {i for j, (i, dB) in enumerate(own) if bool(sure[j]) and dB > RECOVERED and j not in fails}
    best = {i: max((dB for k, dB in own if k == i), default=0.0) for i in range(problem.n)}
    return {
        "share": len(caught) / problem.n,
        "psnr": min(best.values()),
        "false": len(fails),
        "ratios": [float(bound[j]) / max(errors[j], 1e-300) for j in sure.nonzero().flatten().tolist()],
        "seconds": spent,
        "layer": str(found.trace.get("layer", "")),
        "why": why,
    }


def _nearest(found: Reconstruction, x: Tensor) -> tuple[list[tuple[int, float]], list[float]]:
    """For each found picture the nearest private one with its dB, and its relative error."""
    pairs, errors = list[tuple[int, float]](), list[float]()
    span = float(x.max() - x.min())
    for picture in found.inputs.to(x).double() if found.inputs is not None else ():
        off = (x.double() - picture).square().flatten(1)
        i = int(off.sum(1).argmin())
        pairs.append((i, float(-10 * torch.log10(off[i].mean().clamp_min(1e-300) / span**2))))
        errors.append(float(off[i].sum().sqrt() / picture.norm().clamp_min(1e-300)))
    return pairs, errors


def _peer(spelling: str, obs: Observation, x: Tensor, y: Tensor, seconds: float) -> float:
    """The mean dB of a peer's pictures, each beside the nearest private one."""
    told = Knowledge(batch_size=len(x), labels=y, input_range=(float(x.min()), float(x.max())))
    with watching(allowance(seconds)):
        found = Attack.parse(spelling)(replace(obs, knowledge=obs.knowledge | told))
    return statistics.fmean(dB for _, dB in _nearest(found, x)[0])
