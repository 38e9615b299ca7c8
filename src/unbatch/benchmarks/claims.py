"""claims: how many claims exact attacks make on a sample of the other benchmarks' problems, and how many stand.

Every claim is held to the update that its examples would send, by a second judge that withdraws what fails. On honest
updates, and on those of defences whose law the attack was told, a true claim that is withdrawn is a loss; on updates to
which something was done on the way, a false one that is kept is a false proof. All are counted here. Behind the claim
stands the truth: a claim is true if the example lies within the bound that the attack gave.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from unbatch.attack import Attack
from unbatch.auditing.client import observe
from unbatch.benchmarks import clock, layers, store, tensor, unmix
from unbatch.benchmarks.layers import PictureProblem
from unbatch.benchmarks.pictures import pool
from unbatch.benchmarks.unmix import BatchProblem
from unbatch.case import Case
from unbatch.errors import NotApplicable
from unbatch.loss import loss_named
from unbatch.models import small
from unbatch.network.dense import layer_inputs
from unbatch.observation import Observation
from unbatch.reconstruction import Reconstruction
from unbatch.truth import Truth

Row = dict[str, Any]
Exchange = Callable[[], tuple[Observation, Truth]]

BATCHES = (
    BatchProblem(activation="relu", n=16, width=200),
    BatchProblem(activation="gelu", n=16, width=200),
    BatchProblem(activation="tanh", n=16, width=200, precision="float32"),
    BatchProblem(activation="relu", n=16, width=200, precision="float32"),
    BatchProblem(activation="sigmoid", n=16, width=200, inputs="standardised"),
    BatchProblem(n=16, depth=3, width=200, inputs="standardised"),
    BatchProblem(data="breast-cancer", classes=2, n=16),
    BatchProblem(n=16, classes=1000, width=200),
)
PICTURES = tuple(
    PictureProblem(network=network, thinning=2, precision=precision, data="photos")
    for network in ("lenet", "cnn2-c1", "cnn6", "cnn3-c3")
    for precision in ("float64", "float32")
)
CASES: tuple[
    tuple[str, str, str, dict[str, float]], ...
] = (  # an attack, a case, defences whose law is known, rules of the protocol
    ("bias-ratio", "photos:width=64", "", {}),
    ("bias-ratio", "photos:width=64", "clip:norm=0.1", {}),
    ("bias-ratio", "digits:model=lenet", "", {}),
    ("bias-ratio", "tables:width=32", "", {"local_steps": 4, "learning_rate": 0.1}),
    ("unmix", "digits:batch=4,model=convnet,width=64,activation=gelu", "", {}),
    ("unmix", "photos:batch=2,size=8,activation=gelu,width=60", "clip:norm=0.1", {}),
    ("unmix", "photos:batch=2,size=8,activation=gelu,width=60", "noise:sigma=1e-5", {}),
    ("unmix", "photos:batch=2,size=8,activation=gelu,width=60", "prune:share=0.3", {}),
    ("unmix", "photos:batch=2,size=8,activation=gelu,width=60", "quantise:bits=12", {}),
    ("unmix", "digits:batch=4,activation=gelu,width=60", "secure-aggregation:clients=2", {}),
    ("layer-by-layer", "photos:size=16,model=cnn2-c1", "noise:sigma=1e-5", {}),
    ("label-count", "digits:batch=4", "", {}),
    ("tensor-moment", "tables:batch=4,width=2000,activation=gelu", "", {}),
)
PAPER = ("x^2+x^3", "tanh", "sigmoid")
SCALED = (  # batches whose update is some multiple of their gradient
    BatchProblem(activation="gelu", n=16, width=200, precision="float32"),
    BatchProblem(activation="gelu", n=48, width=300, precision="float32"),
    BatchProblem(activation="relu", n=16, width=200, precision="float32"),
    BatchProblem(activation="relu", n=24, width=300, depth=3, precision="float32"),
)
FACTORS = (1.0, 2.0, 0.5, -1.0, -0.05, 1024.0)
WAYS: dict[str, Callable[[str, Tensor], Tensor]] = {  # what is done to each tensor of an update, by its name
    "nothing": lambda name, u: u,
    "times 3": lambda name, u: 3 * u,
    "times -0.1": lambda name, u: -0.1 * u,
    "signs alone": lambda name, u: u.sign(),
    "each tensor clipped by itself": lambda name, u: u * min(1.0, 0.05 / float(u.norm())),
    "biases at 1.01 times their rate": lambda name, u: u * (1.01 if "bias" in name else 1),
    "biases at twice their rate": lambda name, u: u * (2 if "bias" in name else 1),
    "the first bias flipped": lambda name, u: u * (-1 if name == "dense1.bias" else 1),
    "the head at twice its rate": lambda name, u: u * (2 if name.startswith("head") else 1),
    "the largest fifth of entries": lambda name, u: torch.where(u.abs() >= u.abs().quantile(0.8), u, 0),
    "8 bits": lambda name, u: (u / u.abs().max() * 127).round() * u.abs().max() / 127,
}
OUTPUTS, DRAWS = (1, 2, 10), 6  # of one example's networks to which each is done
ACTIVATIONS: tuple[small.ActivationName, ...] = ("relu", "tanh")


def run(
    data: Path | None = None,
    seconds: float = 0.0,
    seed: int = 0,
    device: str = "cpu",
    out: Path | None = None,
    wanted: Callable[[str], bool] = lambda name: True,
) -> list[Row]:
    """One row a problem: claims made and kept, and how many of both are true; saved in `out` as they come.

    Batches and pictures are bundled ones (`data` is not read), and nothing is cut short (`seconds` is not read either).
    `wanted` says by name which problems.
    """
    rows: list[Row] = []
    for name, spec, exchanges in _problems(seed, device):
        if not wanted(name):
            continue
        counts = [_counted(spec, exchange, seed) for exchange in exchanges]
        sums = {key: round(sum(each[key] for each in counts), 2) for key in counts[0] if key != "words"}
        words = next((each["words"] for each in counts if each["words"]), "")
        rows.append({"problem": name, "attack": spec, "exchanges": len(counts)} | sums | {"words": words})
        if out is not None:
            store("claims", rows, out, seed=seed, device=device)
    return rows


def table(rows: list[Row]) -> Table:
    """Claims made and kept, with how many are true, and the judge's share of the attack's seconds."""
    shown = Table(title="claims: of the attack, and after the second judge")
    numbers = ("exchanges", "made", "true", "kept", "lost", "false")
    for column in ("problem", "attack", *numbers[:4], "true and lost", "false and kept", "seconds", "words"):
        shown.add_column(column, justify="left" if column in ("problem", "attack", "words") else "right")
    for row in rows:
        values = (row[key] for key in numbers)
        shown.add_row(row["problem"], row["attack"], *map(str, values), f"{row['seconds']:.2f}", row["words"])
    sums = (str(sum(row[key] for row in rows)) for key in numbers)
    shown.add_row("all", "", *sums, f"{sum(row['seconds'] for row in rows):.1f}", "")
    return shown


def _problems(seed: int, device: str) -> Iterator[tuple[str, str, Sequence[Exchange]]]:
    """Every problem: its name, the attack, and the exchanges, each made when it is asked for."""

    def batch(problem: BatchProblem) -> tuple[Observation, Truth]:
        return unmix.batch_exchange(problem, pool(problem.data, None), seed, device)[:2]

    def picture(problem: PictureProblem) -> tuple[Observation, Truth]:
        return layers.picture_exchange(problem, pool(problem.data, None), seed, 0, device)

    def case(spec: str, defence: str, rules: dict[str, float]) -> tuple[Observation, Truth]:
        s = Case.parse(f"{spec},seed={seed}").setting()
        protocol = s.protocol.model_copy(update=rules)
        known = s.domain.public() | s.knowledge
        spelt = [defence] if defence else []
        return observe(
            s.model, s.loss, s.inputs, s.labels, knowledge=known, protocol=protocol, defences=spelt, seed=seed
        )

    for problem in BATCHES:
        problem = unmix.BatchProblem(
            **{**vars(problem), "data": "photos" if problem.data == "cifar10" else problem.data}
        )
        yield f"batch: {problem.name}", "unmix", [partial(batch, problem)]
    for one in PICTURES:
        yield f"picture: {one.name}", "layer-by-layer", [partial(picture, one)]
    for spec, name, defence, rules in CASES:
        told = ", ".join([name, *([defence] if defence else []), *(f"{k}={v:g}" for k, v in rules.items())])
        yield f"case: {told}", spec, [partial(case, name, defence, rules)]
    for name in PAPER:
        x = torch.eye(10)[:2].double()
        for spec in ("tensor-moment", "tensor-moment:norm=1"):
            yield f"paper: {name}", spec, [partial(tensor.exchange, name, x, 2000, seed, device)]
    for problem in SCALED:
        photos = replace(problem, data="photos")
        for factor in FACTORS:
            scaled = partial(_altered, partial(batch, photos), partial(_times, factor))
            yield f"scaled: {photos.name}, times {factor:g}", "unmix", [scaled]
    for way, change in WAYS.items():
        clients = [
            partial(_altered, partial(_one, k, act, 100 * seed + draw, device), change)
            for k in OUTPUTS
            for act in ACTIVATIONS
            for draw in range(DRAWS)
        ]
        yield f"altered: {way}", "bias-ratio", clients


def _one(outputs: int, activation: small.ActivationName, seed: int, device: str) -> tuple[Observation, Truth]:
    """One example of 20 numbers behind 40 neurons, as the server sees it; one output is a logit of two classes."""
    rng = torch.Generator().manual_seed(seed)
    model = small.build("mlp", (20,), outputs, width=40, activation=activation, rng=rng).to(device)
    x, y = torch.rand(1, 20, generator=rng), torch.randint(max(outputs, 2), (1,), generator=rng)
    return observe(model, loss_named("cross-entropy" if outputs > 1 else "binary-cross-entropy"), x, y)


def _times(factor: float, name: str, u: Tensor) -> Tensor:
    return factor * u


def _altered(exchange: Exchange, change: Callable[[str, Tensor], Tensor]) -> tuple[Observation, Truth]:
    """An exchange whose update had something done to each tensor on its way, of which the server knows nothing."""
    obs, truth = exchange()
    return replace(obs, update={name: change(name, u) for name, u in obs.update.items()}), truth


def _counted(spec: str, exchange: Exchange, seed: int) -> Row:
    """How many claims the attack makes, how many are kept, and how many true ones are not."""
    obs, truth = exchange()
    begun = clock()
    try:
        found = Attack.parse(spec)(obs, seed=seed)
    except NotApplicable as why:
        none = dict.fromkeys(("made", "true", "kept", "lost", "false"), 0)
        return none | {"seconds": clock() - begun, "words": str(why)}
    spent = clock() - begun
    counts = found.trace.get("claims", {"made": 0, "kept": 0})
    before = torch.tensor(found.trace.get("bounds before", [] if found.bound is None else found.bound.tolist()))
    true = _true(found, before, obs, truth)
    kept = torch.zeros_like(true) if found.bound is None else found.bound.isfinite()
    return {
        "made": counts["made"],
        "true": int(true.sum()),
        "kept": counts["kept"],
        "lost": int((true & ~kept).sum()),
        "false": int((kept & ~true).sum()),
        "seconds": round(spent, 2),
        "words": found.trace.get("withdrawn", ""),
    }


def _true(found: Reconstruction, bounds: Tensor, obs: Observation, truth: Truth) -> Tensor:
    """Whether each example [k] lies within its finite bound of a private one, or as a label among the private ones."""
    if found.inputs is None:
        left = truth.labels.flatten().tolist()
        held = []
        for label, bound in zip([] if found.labels is None else found.labels.tolist(), bounds.tolist(), strict=True):
            held.append(bound < float("inf") and label in left)
            if held[-1]:
                left.remove(label)
        return torch.tensor(held, dtype=torch.bool)
    private = truth.inputs if not found.layer else layer_inputs(obs.model, found.layer, truth.inputs, obs.protocol.mode)
    x, t = found.inputs.double().cpu().flatten(1), private.double().cpu().flatten(1)
    if {"sign", "scale"} & found.up_to:  # compared as directions
        x, t = torch.nn.functional.normalize(x, dim=1), torch.nn.functional.normalize(t, dim=1)
        gaps = torch.minimum(torch.cdist(x, t), torch.cdist(x, -t)) if "sign" in found.up_to else torch.cdist(x, t)
    else:
        gaps = torch.cdist(x, t)
    true: Tensor = (gaps.amin(1) <= bounds * x.norm(dim=1)) & bounds.isfinite()
    return true
