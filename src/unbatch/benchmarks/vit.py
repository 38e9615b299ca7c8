"""vit: pictures behind vision transformers, recovered from one gradient by `patch-span`, beside what others published.

Pictures of 32 x 32 in patches of 4, scaled to [0, 1], ten classes, cross entropy, PyTorch's default initialisation; of
224 x 224 in patches of 16 a crop of a photograph that scikit-learn holds. Labels and batch size are not told. A seed
draws the picture and the network anew; dB are the peak signal-to-noise ratio at peak 1, the least over the seeds beside
the median. *frozen* is a client whose embedding (patches, positions, class token) is not trained. Of a batch the worst
picture counts, and it is certified where all of it is.

Peers run on the first seed's gradient with the labels known: gradient matching by its default and by the preset
inverting-gradients, as long as patch-span took, and ten times as long; and APRIL's closed form, which is that of a block
without norms and residuals, put to these networks as they are, and to one whose first block is of that kind (*APRIL's
network*). What others published stands in PUBLISHED, with its source.
"""

from __future__ import annotations

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
from unbatch.errors import NotApplicable
from unbatch.knowledge import Knowledge
from unbatch.models.transformer import TransformerLayer
from unbatch.models.vision_transformer import PatchPositions, Pooling, build_vision_transformer
from unbatch.observation import Observation
from unbatch.progress import watching

Row = dict[str, Any]
PEERS = {
    "gradient-matching": "gradient-matching",
    "inverting-gradients": "gradient-matching:preset=inverting-gradients",
}
PUBLISHED = {"ViT-S, ImageNet, n=1": (23.9, "APRIL, Lu et al., CVPR 2022, as quoted by later work; 1 picture")}


@dataclass(frozen=True, kw_only=True)
class ViTProblem:
    """One setting whose pictures are to be recovered; its gradients differ by the seed.

    >>> ViTProblem(width=384, frozen=True).name
    'width 384, depth 4, 64 patches of 4x4, float64, frozen embedding'
    """

    width: int = 192
    depth: int = 4
    side: int = 32
    patch: int = 4
    precision: Literal["float64", "float32"] = "float64"
    pool: Pooling = "class"
    positions: PatchPositions = "learned"
    frozen: bool = False
    theirs: bool = False  # Hugging Face's ViT by the adapter
    n: int = 1  # pictures
    peers: bool = False
    seeds: int = 3

    @property
    def name(self) -> str:
        patches = f"{(self.side // self.patch) ** 2} patches of {self.patch}x{self.patch}"
        parts = ["Hugging Face ViT"] * self.theirs
        parts += [f"width {self.width}", f"depth {self.depth}", patches, self.precision]
        parts += ["mean pooling"] * (self.pool == "mean") + ["fixed positions"] * (self.positions == "fixed")
        return ", ".join(parts + ["frozen embedding"] * self.frozen + [f"n={self.n}"] * (self.n > 1))


@dataclass(frozen=True, kw_only=True)
class AprilProblem(ViTProblem):
    """A setting of the network that APRIL's closed form is of: nothing is normed before attention, nothing passes by it.

    >>> AprilProblem().name
    "APRIL's network, width 192, depth 4, 64 patches of 4x4, float64"
    """

    @property
    def name(self) -> str:
        return f"APRIL's network, {super().name}"


def vit_problems() -> list[ViTProblem]:
    """What is recovered, and what is counted as open, the cheapest first.

    >>> vit_problems()[0].width
    64
    """
    base = ViTProblem()
    found = [replace(base, width=64), replace(base, width=100, frozen=True), replace(base, width=128, frozen=True)]
    for precision in ("float64", "float32"):
        each = replace(base, precision=precision)
        found += [
            replace(each, peers=precision == "float64"),
            replace(each, pool="mean"),
            replace(each, frozen=True),
            replace(each, positions="fixed"),
        ]
        found += [replace(each, theirs=True), replace(each, width=384), replace(each, width=384, frozen=True)]
    found += [AprilProblem(precision=precision, peers=True) for precision in ("float64", "float32")]
    found += [replace(base, depth=12)]
    found += [replace(base, width=384, n=2, pool=pool, frozen=pool == "mean") for pool in ("class", "mean")]
    found += [replace(base, width=384, n=n, pool="mean", seeds=1) for n in (3, 4)]
    found += [replace(base, width=384, n=2, precision="float32"), replace(base, width=192, n=2)]
    base = ViTProblem(width=768, depth=2, side=224, patch=16, precision="float32", seeds=1)
    return [*found, base, replace(base, depth=12)]


def run(
    data: Path | None = None,
    seconds: float = 0.0,
    seed: int = 0,
    device: str = "cpu",
    out: Path | None = None,
    wanted: Sequence[ViTProblem] | None = None,
) -> list[Row]:
    """One row a problem, saved in `out` as they come; a run that was cut short goes on where it stopped.

    `data` is a folder with cifar10_test600.npz; without it the bundled photographs are used. `seconds` is not used: the
    attack ends by itself. Raises UnbatchError: no such file there.
    """
    pool("cifar10", data)  # what is missing is said before anything runs
    todo = list(vit_problems() if wanted is None else wanted)
    how: dict[str, Any] = {"seed": seed, "device": device, "data": data is not None}
    measure = partial(_measured_vit, data=data, seed=seed, device=device)
    return resumed("vit", todo, measure, out, whole=wanted is None, **how)


def table(rows: list[Row]) -> Table:
    """The worst and the median picture, how many are certified, bound over error, what is left open, and time."""
    shown = Table(title="patch-span: pictures from one gradient of a vision transformer, dB over seeds")
    columns = ("network", "least dB", "median dB", "certified", "false", "bound / error", "open", "seconds")
    for column in (*columns, "peers (dB)", "why"):
        shown.add_column(column, justify="left" if column in ("network", "why") else "right")
    for row in rows:
        shown.add_row(
            row["network"],
            _decibels(row["least"]),
            _decibels(row["median"]),
            f"{row['certified']} of {len(row['tries'])}",
            str(row["false"]),
            "" if row["bound over error"] is None else f"{row['bound over error']:.0f}",
            "" if row["open"] is None else f"{row['open']} of {row['numbers']}",
            f"{row['seconds']:.0f}",
            "; ".join(f"{name} {dB:.1f}" for name, dB in row["peers"].items()),
            row["why"],
        )
    for what, (dB, source) in PUBLISHED.items():
        shown.add_row(f"published: {what}", "", f"{dB:.1f}", "", "", "", "", "", "", source)
    return shown


def _decibels(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _measured_vit(problem: ViTProblem, data: Path | None, seed: int, device: str) -> Row:
    tries = [_one(problem, data, seed + k, device) for k in range(problem.seeds)]
    found = [each for each in tries if each["psnr"] is not None]
    ratios = [each["ratio"] for each in tries if each["ratio"] is not None]
    peers = _peers(problem, data, seed, device, tries[0]["seconds"]) if problem.peers else {}
    return {
        "network": problem.name,
        "settings": asdict(problem),
        "least": min((each["psnr"] for each in found), default=None),
        "median": statistics.median(each["psnr"] for each in found) if found else None,
        "certified": len(ratios),
        "false": sum(ratio < 1 for ratio in ratios),
        "bound over error": statistics.median(ratios) if ratios else None,
        "open": tries[0]["open"],
        "numbers": 3 * problem.patch**2,
        "seconds": statistics.median(each["seconds"] for each in tries),
        "peers": peers,
        "why": tries[0]["why"],
        "tries": tries,
    }


class _AttentionAlone(nn.Module):
    """A layer whose attention reads the tokens themselves, without a norm, and whose tokens do not pass by it."""

    def __init__(self, layer: TransformerLayer) -> None:
        super().__init__()
        self.attention, self.after = (
            layer.attention,
            nn.Sequential(layer.norm2, layer.dense1, layer.activation, layer.dense2),
        )

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        x = self.attention(x, seen)
        found: Tensor = x + self.after(x)
        return found


def _network_of(problem: ViTProblem, seed: int) -> nn.Module:
    rng = torch.Generator().manual_seed(seed)
    if not problem.theirs:
        model: nn.Module = build_vision_transformer(
            (3, problem.side, problem.side),
            10,
            patch=problem.patch,
            depth=problem.depth,
            width=problem.width,
            pool=problem.pool,
            positions=problem.positions,
            rng=rng,
        )
        if isinstance(problem, AprilProblem):
            blocks: Any = model.blocks
            blocks[0] = _AttentionAlone(blocks[0])
        frozen = {"embed.weight", "embed.bias", "positions", "class_token"} if problem.frozen else set[str]()
        for name, p in model.named_parameters():
            p.requires_grad_(name not in frozen)
        return model
    from unbatch.adapters.huggingface import vit_of_random_parameters

    return vit_of_random_parameters(
        side=problem.side, patch=problem.patch, width=problem.width, depth=problem.depth, classes=10, seed=seed
    )


def _pictures(problem: ViTProblem, data: Path | None, seed: int) -> tuple[Tensor, Tensor]:
    """Pictures [n, 3, side, side] in [0, 1], and their labels."""
    if problem.side == 32:
        images, labels = pool("cifar10", data)
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[: problem.n]
        return images[chosen], labels[chosen] % 10
    from sklearn.datasets import load_sample_image

    photograph = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1).float() / 255
    top, left = (
        int(torch.randint(s - problem.side, (1,), generator=torch.Generator().manual_seed(seed))) for s in (427, 640)
    )
    return photograph[None, :, top : top + problem.side, left : left + problem.side], torch.tensor([seed % 10])


def _exchange(problem: ViTProblem, data: Path | None, seed: int, device: str) -> tuple[Observation, Tensor, Tensor]:
    """What the server sees, and the pictures and labels behind it."""
    x, y = _pictures(problem, data, seed)
    x, y = x.to(device), y.to(device)
    x = x.double() if problem.precision == "float64" else x
    seen, _ = observe(_network_of(problem, seed).to(x), F.cross_entropy, x, y)
    return seen.only("input_shape", "mode"), x, y


def _one(problem: ViTProblem, data: Path | None, seed: int, device: str) -> Row:
    """How near the attack comes to the worst picture of one batch."""
    seen, x, _ = _exchange(problem, data, seed, device)
    begun = clock()
    try:
        found = Attack.parse("patch-span")(seen, seed=seed)
    except NotApplicable as error:
        return {"psnr": None, "ratio": None, "open": None, "seconds": clock() - begun, "why": str(error)}
    spent, ratio = clock() - begun, None
    if found.inputs is None or found.bound is None:
        return {"psnr": None, "ratio": None, "open": None, "seconds": spent, "why": "nothing was found."}
    own, off = _nearest(found.inputs, x)
    if bool(found.bound.isfinite().all()) and len(set(own)) == len(x):
        size = found.inputs.double().flatten(1).norm(dim=1).cpu()
        ratio = float((found.bound.cpu() / (off / size).clamp_min(1e-300)).min())
    dB = float(-10 * (off.max().square() / x[0].numel()).clamp_min(1e-300).log10()) if len(set(own)) == len(x) else None
    free = int(found.trace["free dimensions of a patch"])
    why = str(found.trace.get("withdrawn", found.trace["by"]))
    return {"psnr": dB, "ratio": ratio, "open": free, "seconds": spent, "why": why}


def _nearest(found: Tensor, x: Tensor) -> tuple[list[int], Tensor]:
    """The private picture that is nearest to each found one, and how far it is, l2."""
    far = (found.double().to(x.device)[:, None] - x.double()).flatten(2).norm(dim=2).min(1)
    return far.indices.tolist(), far.values.cpu()


def _peers(problem: ViTProblem, data: Path | None, seed: int, device: str, seconds: float) -> dict[str, float]:
    """The mean dB of others, on the first seed's gradient."""
    seen, x, y = _exchange(problem, data, seed, device)
    told = replace(seen, knowledge=seen.knowledge | Knowledge(batch_size=len(x), labels=y, input_range=(0.0, 1.0)))
    scores = dict[str, float]()
    for name, spelling in PEERS.items():
        for times in (1, 10):
            with watching(allowance(times * seconds)):
                scores[f"{name} x{times}"] = _score(Attack.parse(spelling)(told).inputs, x)
    if problem.n == 1 and problem.pool == "class" and not problem.theirs:
        scores["APRIL"] = _score(_april(seen), x)
    return scores


def _score(found: Tensor | None, x: Tensor) -> float:
    if found is None:
        return -float("inf")
    _, error = _nearest(found, x)
    return float((-10 * (error.square() / x[0].numel()).clamp_min(1e-300).log10()).mean())


def _april(seen: Observation) -> Tensor:
    """APRIL's closed form: D^T Z = W_q^T dL/dW_q + W_k^T dL/dW_k + W_v^T dL/dW_v, D = dL/d positions, then its patches."""
    parameters, update = dict(seen.model.named_parameters()), seen.update
    parts = [f"blocks.0.attention.{part}.weight" for part in ("query", "key", "value")]
    right = torch.stack([parameters[part].detach().double().T @ update[part].double() for part in parts]).sum(0)
    Z = torch.linalg.lstsq(update["positions"][0].double().T, right, driver="gelsd").solution
    E = parameters["embed.weight"].detach().double()
    z = (Z - parameters["positions"][0].detach().double() - parameters["embed.bias"].detach().double())[1:]
    windows = z @ torch.linalg.pinv(E.flatten(1)).T  # [T, p]
    return F.fold(windows.T[None], seen.knowledge.input_shape[1:], E.shape[2], stride=E.shape[2])
