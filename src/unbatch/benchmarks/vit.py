"""vit: pictures behind vision transformers, recovered from one gradient by `patch-span`, beside what others published.

Pictures of 32 x 32 in patches of 4, scaled to [0, 1], ten classes, cross entropy, PyTorch's default initialisation; of
224 x 224 in patches of 16 a crop of a photograph that scikit-learn holds. Labels and batch size are not told. A seed
draws the picture and the network anew; dB are the peak signal-to-noise ratio at peak 1, the least over the seeds beside
the median. *frozen* is a client whose embedding (patches, positions, class token) is not trained.
What others published stands in PUBLISHED, with its source.
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
from unbatch.benchmarks import clock, resumed
from unbatch.benchmarks.pictures import pool
from unbatch.errors import NotApplicable
from unbatch.models.vision_transformer import PatchPositions, Pooling, build_vision_transformer

Row = dict[str, Any]
PUBLISHED = {"ViT-S, ImageNet, n=1": (23.9, "APRIL, Lu et al., CVPR 2022, as quoted by later work; 1 picture")}


@dataclass(frozen=True, kw_only=True)
class ViTProblem:
    """One setting whose picture is to be recovered; its gradients differ by the seed.

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
    seeds: int = 3

    @property
    def name(self) -> str:
        patches = f"{(self.side // self.patch) ** 2} patches of {self.patch}x{self.patch}"
        parts = ["Hugging Face ViT"] * self.theirs
        parts += [f"width {self.width}", f"depth {self.depth}", patches, self.precision]
        parts += ["mean pooling"] * (self.pool == "mean") + ["fixed positions"] * (self.positions == "fixed")
        return ", ".join(parts + ["frozen embedding"] * self.frozen)


def vit_problems() -> list[ViTProblem]:
    """What is recovered, and what is counted as open, the cheapest first.

    >>> vit_problems()[0].width
    64
    """
    base = ViTProblem()
    found = [replace(base, width=64), replace(base, width=100, frozen=True), replace(base, width=128, frozen=True)]
    for precision in ("float64", "float32"):
        each = replace(base, precision=precision)
        found += [each, replace(each, pool="mean"), replace(each, frozen=True), replace(each, positions="fixed")]
        found += [replace(each, theirs=True), replace(each, width=384), replace(each, width=384, frozen=True)]
    found += [replace(base, depth=12)]
    base = ViTProblem(width=768, depth=12, side=224, patch=16, precision="float32", seeds=1)
    return [*found, base]


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
    shown = Table(title="patch-span: one picture from one gradient of a vision transformer, dB over seeds")
    for column in ("network", "least dB", "median dB", "certified", "false", "bound / error", "open", "seconds", "why"):
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
            row["why"],
        )
    for what, (dB, source) in PUBLISHED.items():
        shown.add_row(f"published: {what}", "", f"{dB:.1f}", "", "", "", "", "", source)
    return shown


def _decibels(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _measured_vit(problem: ViTProblem, data: Path | None, seed: int, device: str) -> Row:
    tries = [_one(problem, data, seed + k, device) for k in range(problem.seeds)]
    found = [each for each in tries if each["psnr"] is not None]
    ratios = [each["ratio"] for each in tries if each["ratio"] is not None]
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
        "why": tries[0]["why"],
        "tries": tries,
    }


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
        frozen = {"embed.weight", "embed.bias", "positions", "class_token"} if problem.frozen else set[str]()
        for name, p in model.named_parameters():
            p.requires_grad_(name not in frozen)
        return model
    from unbatch.adapters.huggingface import vit_of_random_parameters

    return vit_of_random_parameters(
        side=problem.side, patch=problem.patch, width=problem.width, depth=problem.depth, classes=10, seed=seed
    )


def _picture(problem: ViTProblem, data: Path | None, seed: int) -> tuple[Tensor, Tensor]:
    """One picture [1, 3, side, side] in [0, 1], and its label."""
    if problem.side == 32:
        images, labels = pool("cifar10", data)
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:1]
        return images[chosen], labels[chosen] % 10
    from sklearn.datasets import load_sample_image

    photograph = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1).float() / 255
    top, left = (
        int(torch.randint(s - problem.side, (1,), generator=torch.Generator().manual_seed(seed))) for s in (427, 640)
    )
    return photograph[None, :, top : top + problem.side, left : left + problem.side], torch.tensor([seed % 10])


def _one(problem: ViTProblem, data: Path | None, seed: int, device: str) -> Row:
    """How near the attack comes to one picture."""
    x, y = _picture(problem, data, seed)
    x, y = x.to(device), y.to(device)
    x = x.double() if problem.precision == "float64" else x
    seen, _ = observe(_network_of(problem, seed).to(x), F.cross_entropy, x, y)
    seen = seen.only("input_shape", "mode")
    begun = clock()
    try:
        found = Attack.parse("patch-span")(seen, seed=seed)
    except NotApplicable as error:
        return {"psnr": None, "ratio": None, "open": None, "seconds": clock() - begun, "why": str(error)}
    spent, ratio = clock() - begun, None
    if found.inputs is None or found.bound is None:
        return {"psnr": None, "ratio": None, "open": None, "seconds": spent, "why": "nothing was found."}
    off = (found.inputs.double() - x.double()).flatten()
    if bool(found.bound.isfinite()):
        ratio = float(found.bound[0]) / max(float(off.norm() / found.inputs.double().norm()), 1e-300)
    dB = float(-10 * off.square().mean().clamp_min(1e-300).log10())
    free = int(found.trace["free dimensions of a patch"])
    why = str(found.trace.get("withdrawn", found.trace["by"]))
    return {"psnr": dB, "ratio": ratio, "open": free, "seconds": spent, "why": why}
