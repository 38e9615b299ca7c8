"""malicious: servers that choose the model, each at the setting of its publication, beside the published figures.

Every row is one exchange of an honest client, or of the clients of a sum, on a model that an `ActiveAttack` planted. What
is counted is examples returned within 1e-3 of a private one, relative, l2 (`exact`), and those that are certified as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from unbatch.attack import ActiveAttack, Attack
from unbatch.auditing.certify import certify
from unbatch.auditing.cheating import planted_exchange
from unbatch.auditing.client import observe
from unbatch.benchmarks import allowance, clock, resumed
from unbatch.benchmarks.pictures import pool, source
from unbatch.case import Case, Setting
from unbatch.domain import domain_of
from unbatch.errors import NotApplicable
from unbatch.knowledge import Knowledge
from unbatch.loss import loss_named
from unbatch.metric import match
from unbatch.models import small
from unbatch.models.parallel_adapter import adapted
from unbatch.network.dense import layer_inputs
from unbatch.progress import watching
from unbatch.protocol import Protocol
from unbatch.reconstruction import Reconstruction
from unbatch.truth import Truth

Row = dict[str, Any]

EXACT = 1e-3  # relative error, l2, of an example that counts as exact
CLASSES = 10


@dataclass(frozen=True)
class MaliciousProblem:
    """One planted exchange; of pictures, unless the attack's own row says otherwise."""

    name: str
    attack: str
    n: int
    published: str  # the figure beside which the row stands
    target: str  # what is to be reached
    data: str = "cifar10"
    model: small.Name = "mlp"
    width: int = 1000
    public: bool = False  # whether the other pictures are what anybody has
    clients: int = 1
    rounds: int = 1


PROBLEMS: tuple[MaliciousProblem, ...] = (
    MaliciousProblem("imprint, public pictures", "imprint", 64, "60 of 64 (Robbing the Fed)", "63 of 64", public=True),
    MaliciousProblem(
        "imprint, one direction", "imprint:directions=1", 64, "60 of 64 (Robbing the Fed)", "", public=True
    ),
    MaliciousProblem("imprint, without data", "imprint", 64, "", "55 of 64"),
    MaliciousProblem("imprint, in front of LeNet", "imprint:bins=1000", 64, "60 of 64", "", model="lenet", public=True),
    MaliciousProblem("lt-codes, without data", "lt-codes", 64, "", ""),
    MaliciousProblem(
        "conv-imprint, pooled pictures", "conv-imprint", 64, "", "", model="convnet", width=64, public=True
    ),
    MaliciousProblem("adapter-imprint, 1,000 units beside a frozen layer", "adapter-imprint", 64, "", "", width=256),
    MaliciousProblem(
        "hyperplane, 64 units",
        "hyperplane",
        64,
        "every record, rounds not given",
        "64 in 20 rounds",
        width=64,
        rounds=20,
    ),
    MaliciousProblem("loki, 100 clients of 8", "loki", 800, "76-86 % (LOKI)", "86 %", model="lenet", clients=100),
    MaliciousProblem(
        "loki FedAvg, 100 clients of 8, two epochs", "loki", 800, "76-86 % (LOKI)", "86 %", model="lenet", clients=100
    ),
    MaliciousProblem("trap-weights, 1,000 rows", "trap-weights", 100, "about 50 of 100", "50 of 100"),
    MaliciousProblem("latch, 256 traps, two epochs", "latch:share=0.01", 256, "", "", width=256),
    MaliciousProblem("decepticon, one sentence", "decepticon", 1, "91.0 % of tokens", "91 % of tokens", data="text"),
    MaliciousProblem("decepticon, 8 sentences", "decepticon", 8, "87.3 % of tokens", "87.3 % of tokens", data="text"),
    MaliciousProblem(
        "fishing, ResNet-18, 64 pictures",
        "fishing",
        64,
        "one example, by matching (Fishing)",
        "1, as alone",
        model="resnet18",
        width=64,
        rounds=20,
    ),
    MaliciousProblem(
        "fishing in float64, ResNet-18, 64 pictures",
        "fishing",
        64,
        "one example, by matching (Fishing)",
        "1, as alone",
        model="resnet18",
        width=64,
        rounds=20,
    ),
)
LOCAL_BATCH, RATE, EPOCHS = 16, 0.05, 2  # of the training that latch waits through
CLIENTS_BATCH = 4  # of each step of a client whose epochs loki reads
TEXT_WIDTH, TEXT_DEPTH = 256, 2
ADAPTER = 1000  # units beside a frozen layer


def run(
    data: Path | None = None,
    seconds: float = 600.0,
    seed: int = 0,
    device: str = "cpu",
    out: Path | None = None,
    wanted: Callable[[str], bool] = lambda name: True,
) -> list[Row]:
    """One row a problem, saved in `out` as they come; `wanted` says by name which. A search has `seconds`.

    Pictures are CIFAR-10's of the folder `data`, or bundled photographs without one.
    """
    todo = [each for each in PROBLEMS if wanted(each.name)]
    measure = partial(_measure, data=data, seed=seed, device=device, seconds=seconds)
    how = {"seconds": seconds, "seed": seed, "data": source("cifar10", data)}
    return resumed("malicious", todo, measure, out, whole=len(todo) == len(PROBLEMS), device=device, **how)


def table(rows: list[Row]) -> Table:
    """Exact, certified and false claims of each attack, the target and the published figure."""
    shown = Table(title="malicious: servers that choose the model")
    for column in ("attack", "n", "rounds", "exact", "certified", "false", "target", "published", "seconds", "why"):
        shown.add_column(column, justify="left" if column in ("attack", "target", "published", "why") else "right")
    for row in rows:
        settings = row["settings"]
        counts = [str(row[key]) for key in ("n", "rounds", "exact", "certified", "false")]
        told = (settings["target"], settings["published"], f"{row['seconds']:.1f}", row["why"])
        shown.add_row(row["network"], *counts, *told)
    return shown


def _measure(problem: MaliciousProblem, data: Path | None, seed: int, device: str, seconds: float) -> Row:
    own = MEASURES.get(problem.name.partition(",")[0])
    if own is not None:
        return own(problem, data, seed, device, seconds)
    setting, public = _setting(problem, data, seed, device)
    return _played(problem, setting, public, seed, seconds)[0]


def _played(
    problem: MaliciousProblem, setting: Setting, public: Tensor, seed: int, seconds: float
) -> tuple[Row, Reconstruction, Truth]:
    """The row of one exchange, with what came back and the truth."""
    attack = Attack.parse(problem.attack)
    if not isinstance(attack, ActiveAttack):
        raise TypeError(f"{problem.attack} chooses no model.")
    known = setting.domain.public() | (Knowledge(public=public) if problem.public else Knowledge())
    defences = [f"secure-aggregation:clients={problem.clients}"] if problem.clients > 1 else []
    begun, why = clock(), ""
    obs, truth = planted_exchange(attack, setting, knowledge=known, defences=defences, seed=seed, server_seed=seed)
    found = Reconstruction(inputs=truth.inputs[:0])
    with watching(allowance(seconds)):
        try:
            found = certify(obs, attack(obs, seed=seed))
        except NotApplicable as error:
            why = str(error)
    counts = _counted(found, obs.model, truth)
    shown = {"n": problem.n, "rounds": len(obs.exchanges), **counts, "seconds": clock() - begun, "why": why}
    return {"network": problem.name, "settings": asdict(problem), **shown}, found, truth


def _trained_through(problem: MaliciousProblem, data: Path | None, seed: int, device: str, seconds: float) -> Row:
    """A whole local training, of which the client sends the end."""
    setting, public = _setting(problem, data, seed, device)
    training = Protocol(epochs=EPOCHS, local_batch_size=LOCAL_BATCH, learning_rate=RATE)
    return _played(problem, replace(setting, protocol=training), public, seed, seconds)[0]


def _summed_training(problem: MaliciousProblem, data: Path | None, seed: int, device: str, seconds: float) -> Row:
    """Epochs of every client of a sum."""
    setting, public = _setting(problem, data, seed, device)
    training = Protocol(epochs=EPOCHS, local_batch_size=CLIENTS_BATCH, learning_rate=RATE)
    return _played(problem, replace(setting, protocol=training), public, seed, seconds)[0]


def _beside_frozen(problem: MaliciousProblem, data: Path | None, seed: int, device: str, seconds: float) -> Row:
    """Adapters and the head of a network that is frozen otherwise."""
    setting, public = _setting(problem, data, seed, device)
    net = adapted(setting.model, ADAPTER, torch.Generator().manual_seed(seed))
    return _played(problem, replace(setting, model=net), public, seed, seconds)[0]


def _sentences(problem: MaliciousProblem, data: Path | None, seed: int, device: str, seconds: float) -> Row:
    """Bundled sentences: whole ones count as exact, and the share of tokens in their places is said."""
    setting = Case.parse(f"text:batch={problem.n},width={TEXT_WIDTH},depth={TEXT_DEPTH},seed={seed}").setting()
    row, found, truth = _played(problem, setting, setting.inputs[:0], seed, seconds)
    words = torch.ones_like(truth.inputs, dtype=torch.bool)
    if setting.domain.public().get("padding") is not None:
        words = truth.inputs != setting.domain.public().padding
    right = torch.zeros_like(words)
    if found.inputs is not None and len(found):
        pairs = match(found, truth, setting.domain)
        right[pairs.true] = found.inputs[pairs.found] == truth.inputs[pairs.true]
    tokens = float((right & words).sum() / words.sum())
    return row | {"tokens": tokens, "why": row["why"] or f"{tokens:.1%} of {int(words.sum())} tokens"}


def _beside_one_alone(
    problem: MaliciousProblem,
    data: Path | None,
    seed: int,
    device: str,
    seconds: float,
    precision: torch.dtype = torch.float32,
) -> Row:
    """A picture of many, and what `descend` makes of it where a client holds it alone: their relative errors."""
    setting, public = _setting(problem, data, seed, device)
    setting = replace(setting, model=setting.model.to(precision), inputs=setting.inputs.to(precision))
    quiet = Protocol(rounds=problem.rounds, mode="eval")
    row, found, truth = _played(problem, replace(setting, protocol=quiet), public, seed, seconds)
    if found.inputs is None or not len(found):
        return row
    true, got = truth.inputs.double().flatten(1).cpu(), found.inputs.double().flatten(1).cpu()
    gaps = (got[:1] - true).norm(dim=1)
    which = int(gaps.argmin())
    one, label = truth.inputs[which : which + 1], truth.labels[which : which + 1]
    seen, _ = observe(setting.model, setting.loss, one, label, protocol=Protocol(mode="eval"))
    alone = Attack.parse("descend")(seen, seed=seed)
    told = {"error": float(gaps.min() / got[0].norm()), "error alone": math.inf}
    if alone.inputs is not None and len(alone):
        off = (alone.inputs.double().flatten(1).cpu() - true[which]).norm()
        told["error alone"] = float(off / true[which].norm())
    return row | told | {"why": f"relative error {told['error']:.1e}; of the picture alone {told['error alone']:.1e}"}


MEASURES: dict[str, Callable[[MaliciousProblem, Path | None, int, str, float], Row]] = {  # attacks counted otherwise
    "adapter-imprint": _beside_frozen,
    "latch": _trained_through,
    "loki FedAvg": _summed_training,
    "decepticon": _sentences,
    "fishing": _beside_one_alone,
    "fishing in float64": partial(_beside_one_alone, precision=torch.float64),
}


def _setting(problem: MaliciousProblem, data: Path | None, seed: int, device: str) -> tuple[Setting, Tensor]:
    """The client with its n pictures, and the pictures that are left. Where there are too few, mirrored ones stand in."""
    rng = torch.Generator().manual_seed(seed)
    x, y = pool(problem.data, data)
    order = torch.randperm(len(x), generator=rng)
    x, y = x[order], y[order]
    if len(x) < problem.n:
        x, y = torch.cat([x, x.flip(-1)]), torch.cat([y, y])
    shape = tuple(x.shape[1:])
    options = {} if "width" in small.unused(problem.model) else {"width": problem.width}
    net = small.build(problem.model, shape, CLASSES, rng=rng, **options).to(device)  # type: ignore[arg-type]
    setting = Setting(
        model=net,
        loss=loss_named("cross-entropy", "mean"),
        inputs=x[: problem.n],
        labels=y[: problem.n] % CLASSES,
        protocol=Protocol(rounds=problem.rounds) if problem.rounds > 1 else Protocol(),
    )
    return setting, x[problem.n :]


def _counted(found: Reconstruction, model: torch.nn.Module, truth: Truth) -> Row:
    """How many examples are exact, how many of those certified, and how many are certified and wrong."""
    true = truth.inputs
    if found.layer:
        kind = next(model.parameters()).dtype
        true = layer_inputs(model, found.layer, true.to(kind)).detach()
    if found.inputs is None or not len(found):
        return {"exact": 0, "certified": 0, "false": 0}
    pairs = match(found, Truth(inputs=true, labels=truth.labels), domain_of(true))
    got = found.inputs[pairs.found].double().flatten(1).cpu()
    error = (got - true[pairs.true].double().flatten(1).cpu()).norm(dim=1) / got.norm(dim=1)
    sure = torch.full((len(found),), torch.inf) if found.bound is None else found.bound.cpu()
    held = sure[pairs.found].isfinite()
    within = error <= sure[pairs.found]
    unmatched = int(sure.isfinite().sum()) - int(held.sum())
    exact = error <= EXACT
    return {
        "exact": int(exact.sum()),
        "certified": int((held & within).sum()),
        "false": int((held & ~within).sum()) + unmatched,
    }
