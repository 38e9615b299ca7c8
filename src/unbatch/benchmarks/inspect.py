"""inspect: how often `unbatch inspect` takes an honest model for a planted one, and how often it finds a planted one.

Honest models are drawn, drawn by other laws, trained, pruned, rounded, fine-tuned and given adapters, of every built-in
architecture at several widths. Those of the first half of the seeds set the limits that stand with the signs; false alarms
are counted on those of the other half, which set nothing. Planted models are those of every attack that plants
parameters, on the cases that each fits, and of published recipes (`unbatch.benchmarks.plantings`), before and after honest
training. A client holds 64 examples, and, of
a model that was trained or planted in the course of training, the model of the round before.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.table import Table
from torch import Tensor, nn

from unbatch.attack import ActiveAttack
from unbatch.auditing.client import published
from unbatch.benchmarks import clock, resumed
from unbatch.benchmarks.plantings import PLANTINGS, planted
from unbatch.case import Case, Examples, Setting
from unbatch.errors import NotApplicable
from unbatch.inversion.received import Received
from unbatch.models.published import NETWORKS
from unbatch.sign import Sign

Row = dict[str, Any]
Treatment = Literal[
    "drawn", "kaiming", "orthogonal", "zero head", "trained", "pruned", "rounded to 8 bits", "rounded to 4 bits", "half",
    "fine-tuned", "adapter", "trained adapter", "next round",
]  # fmt: skip
ROUND_BEFORE: frozenset[str] = frozenset({"trained", "fine-tuned", "trained adapter", "next round"})
BATCH, EXAMPLES, MOST_EXAMPLES, STEPS, LOCAL_STEPS, ADAPTER_RANK = 8, 64, 500, 40, 10, 4
RECIPE, RECIPES_ON = "recipe ", 5  # before a recipe's name; cases that recipes are tried on
SEEDS = 4  # of each honest model; the even ones set the limits


@dataclass(frozen=True, kw_only=True)
class ReceivedProblem:
    """One model that a client receives, honest or planted.

    >>> ReceivedProblem(case="digits:width=16", treatment="pruned", seed=1).name
    'digits:width=16, pruned, seed 1'
    """

    case: str
    treatment: Treatment = "drawn"
    attack: str = ""  # that planted it: a plugin, or "recipe NAME"
    seed: int = 0

    @property
    def name(self) -> str:
        by = [f"planted by {self.attack}"] * bool(self.attack)
        return ", ".join([self.case, self.treatment, *by, f"seed {self.seed}"])


def honest_problems() -> list[ReceivedProblem]:
    """Every honest model.

    >>> len(honest_problems()) >= 200
    True
    """
    found = [ReceivedProblem(case=case, seed=seed) for case in _drawn_cases() for seed in range(SEEDS)]
    treatments: list[Treatment] = [
        "kaiming", "orthogonal", "zero head", "trained", "pruned", "rounded to 8 bits", "rounded to 4 bits", "fine-tuned",
        "next round",
    ]  # fmt: skip
    found += [
        ReceivedProblem(case=case, treatment=treatment, seed=seed)
        for case in _TREATED
        for treatment in treatments
        for seed in range(2)
    ]
    adapters: list[Treatment] = ["adapter", "trained adapter"]
    found += [
        ReceivedProblem(case=case, treatment=treatment, seed=seed)
        for case in _ADAPTED
        for treatment in adapters
        for seed in range(2)
    ]
    return found


def planted_problems() -> list[ReceivedProblem]:
    """Every planted model: of the attacks that choose parameters, on their own demo and on others, and of the recipes."""
    pairs = [(case, f"{RECIPE}{name}") for case in _PLANTED[:RECIPES_ON] for name in PLANTINGS]
    for name, attack in ActiveAttack.find().items():
        options = f":{attack.demo.options}" if attack.demo.options else ""
        pairs += [(case, f"{name}{options}") for case in dict.fromkeys([attack.demo.case, *_PLANTED])]
    treatments: tuple[Treatment, ...] = ("drawn", "trained")
    return [
        ReceivedProblem(case=case, treatment=treatment, attack=attack, seed=1)
        for case, attack in pairs
        for treatment in treatments
    ]


def _drawn_cases() -> Iterator[str]:
    """The cases whose models are drawn as built: every architecture at two widths or more, where it has one."""
    yield from _WIDTHS
    for name in NETWORKS:
        yield f"photos:model={name}"


_WIDTHS = (
    "digits:width=16", "digits:width=64,depth=2", "digits:width=256", "digits:width=64,depth=4,activation=tanh",
    "digits:width=64,depth=3,activation=sigmoid", "digits:width=128,depth=2,activation=gelu", "tables:width=32",
    "tables:width=200,depth=2", "photos:width=64", "photos:width=256", "digits:model=lenet", "photos:model=lenet",
    "digits:model=convnet,width=4", "digits:model=convnet,width=16", "photos:model=convnet,width=8,depth=2",
    "digits:model=resnet-small,width=4", "photos:model=resnet-small,width=16", "digits:model=vit,width=24,depth=2",
    "photos:model=vit,width=96,depth=2", "photos:model=resnet18,width=4", "photos:model=resnet18,width=16",
    "photos:model=resnet18,width=8,norm=none", "photos:model=resnet34,width=8", "photos:model=preact-resnet18,width=8",
    "photos:model=preact-resnet18,width=16", "photos:model=wideresnet16-4,width=4", "photos:model=wideresnet16-4,width=8",
    "photos:model=vgg11,width=8", "photos:model=vgg11,width=16", "photos:model=vgg16,width=8",
    "photos:model=convnet8,width=8", "photos:model=convnet8,width=16", "text:width=32", "text:width=64,model=bert",
    "text:width=128,depth=1", "text:width=32,task=next",
)  # fmt: skip
_TREATED = (
    "digits:width=64", "digits:width=64,depth=3,activation=tanh", "tables:width=64,depth=2", "digits:model=lenet",
    "digits:model=convnet,width=8", "digits:model=resnet-small,width=8", "digits:model=vit,width=48,depth=2",
    "text:width=32",
)  # fmt: skip
_ADAPTED = ("digits:width=64,depth=2", "digits:model=vit,width=48,depth=2", "text:width=32")
_PLANTED = (
    "digits:width=100,depth=2", "photos:width=64,depth=2", "digits:model=convnet,width=8",
    "digits:model=vit,width=48,depth=2", "text:width=64", "digits:width=200", "digits:model=lenet",
    "photos:model=resnet18,width=8",
)  # fmt: skip


def run(
    data: Path | None = None,
    seconds: float = 0.0,
    seed: int = 0,
    device: str = "cpu",
    out: Path | None = None,
    wanted: Sequence[ReceivedProblem] | None = None,
) -> list[Row]:
    """One row a model, saved in `out` as they come; a run that was cut short goes on where it stopped.

    The data come with unbatch; `seconds` is not used. An attack that does not fit a case makes no row.
    """
    todo = list([*honest_problems(), *_fitting(planted_problems())] if wanted is None else wanted)
    return resumed(
        "inspect", todo, partial(_measured_model, seed=seed), out, whole=wanted is None, seed=seed, device=device
    )


def table(rows: list[Row]) -> Table:
    """For each sign the largest value of honest models and its limit; then alarms by kind of model."""
    shown = Table(title="unbatch inspect: signs of planting on honest and on planted models")
    for column in (
        "",
        "models",
        "alarms",
        "share",
        "largest that sets the limit",
        "limit",
        "largest of the others",
        "by",
    ):
        shown.add_column(column, justify="left" if column in ("", "by") else "right")
    honest = [row for row in rows if not row["settings"]["attack"]]
    setting = [row for row in honest if row["settings"]["seed"] % 2 == 0]
    counted = [row for row in honest if row["settings"]["seed"] % 2]
    for name, sign in Sign.find().items():
        own, others = (max((r["signs"].get(name, -math.inf) for r in s), default=-math.inf) for s in (setting, counted))
        alarms = sum(name in raised(row) for row in counted)
        shown.add_row(
            f"sign {name}", str(len(counted)), str(alarms), "", f"{own:.3g}", f"{sign.limit:g}", f"{others:.3g}", ""
        )
    shown.add_section()
    groups: dict[str, list[Row]] = {"honest, other seeds": counted}
    for row in counted:
        groups.setdefault(f"honest, {row['settings']['treatment']}", []).append(row)
    groups["planted"] = [row for row in rows if row["settings"]["attack"]]
    for row in groups["planted"]:
        groups.setdefault(f"planted by {row['settings']['attack'].partition(':')[0]}", []).append(row)
    for words, members in groups.items():
        hits = [row for row in members if raised(row)]
        by = sorted({name for row in hits for name in raised(row)})
        share = f"{len(hits) / len(members):.1%}" if members else ""
        shown.add_row(words, str(len(members)), str(len(hits)), share, "", "", "", ", ".join(by))
    return shown


def raised(row: Row) -> list[str]:
    """The signs that a row's values raise, by the limits as they stand.

    >>> raised({"signs": {"duplicated-rows": 1.0, "lone-units": 0.0}})
    ['duplicated-rows']
    """
    known = Sign.find()
    return [name for name, value in row["signs"].items() if name in known and value > known[name].limit]


def _measured_model(problem: ReceivedProblem, seed: int) -> Row:
    setting, model, before = received_model(problem, seed)
    begun = clock()
    seen = Received.of(
        model,
        before=before,
        inputs=setting.inputs[:EXAMPLES],
        labels=setting.labels[:EXAMPLES],
        loss=setting.loss,
    )
    readings = {name: found for name, sign in Sign.find().items() if (found := sign()(seen)) is not None}
    return {
        "network": problem.name,
        "settings": asdict(problem),
        "signs": {name: found.value for name, found in readings.items()},
        "seconds": clock() - begun,
    }


def _fitting(problems: Sequence[ReceivedProblem]) -> Iterator[ReceivedProblem]:
    """Those whose attack fits their case's model."""
    unfit = set[tuple[str, str]]()
    for problem in problems:
        if problem.attack == f"{RECIPE}conv imprint" and "model=convnet" not in problem.case:
            continue
        if problem.treatment == "drawn":
            try:
                received_model(problem, 0)
            except NotApplicable:
                unfit.add((problem.case, problem.attack))
        if (problem.case, problem.attack) in unfit:
            continue
        yield problem


def received_model(problem: ReceivedProblem, seed: int) -> tuple[Setting, nn.Module, Mapping[str, Tensor] | None]:
    """The client with its examples, the model that it receives, and the state of the round before, where there is one.

    >>> setting, model, before = received_model(ReceivedProblem(case="digits:width=8", treatment="half"), 0)
    >>> len(setting.inputs) >= EXAMPLES, before is None
    (True, True)
    """
    case = Case.parse(problem.case)
    held, rng = _examples_of(problem.case), torch.Generator().manual_seed(1000 * seed + problem.seed)
    order = torch.randperm(len(held.inputs), generator=rng)
    model = case.global_model(held, len(held.classes), rng)
    setting = Setting(
        model=model,
        loss=case.training_loss(),
        inputs=held.inputs[order].float() if held.inputs.is_floating_point() else held.inputs[order],
        labels=held.labels[order],
        domain=held.domain,
        name=problem.case,
    )
    model, before = _treated(copy.deepcopy(setting.model), problem.treatment, setting, rng)
    if problem.attack:
        before = before and {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model = _planted(problem, model, setting, rng)
    return setting, model, before if problem.treatment in ROUND_BEFORE else None


def _planted(problem: ReceivedProblem, model: nn.Module, setting: Setting, rng: torch.Generator) -> nn.Module:
    """By a recipe, which knows the statistics of other examples, or by an attack, which is handed what it declares."""
    if problem.attack.startswith(RECIPE):
        return planted(problem.attack.removeprefix(RECIPE), model, setting.inputs[EXAMPLES:], problem.seed)
    attack = ActiveAttack.parse(problem.attack)
    known = published(setting.inputs[:BATCH], setting.protocol) | setting.domain.public()
    return attack.plant(model, rng, known.only(*(attack.needs | attack.uses)))


def _examples_of(case: str) -> Examples:
    """The data of a case, the same for all its models."""
    name, _, options = case.partition(":")
    return _drawn_examples(":".join([name, *[each for each in options.split(",") if each.startswith("task=")]]))


@cache
def _drawn_examples(case: str) -> Examples:
    found = Case.parse(case).pool(torch.Generator().manual_seed(0))
    return replace(found, inputs=found.inputs[:MOST_EXAMPLES], labels=found.labels[:MOST_EXAMPLES])


def _treated(
    model: nn.Module, treatment: Treatment, setting: Setting, rng: torch.Generator
) -> tuple[nn.Module, Mapping[str, Tensor] | None]:
    if treatment == "drawn":
        return model, None
    if treatment in ("kaiming", "orthogonal", "zero head"):
        return _drawn_anew(model, treatment, rng), None
    if treatment == "next round":
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        return _trained(model, setting, LOCAL_STEPS, rng), before
    if "adapter" in treatment:
        model = _adapted(_trained(model, setting, STEPS, rng), rng)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        return (_trained(model, setting, LOCAL_STEPS, rng) if treatment == "trained adapter" else model), before
    model = _trained(model, setting, STEPS, rng)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if treatment == "fine-tuned":
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name.rpartition(".")[2] == "head":
                _fill(module, "drawn", rng)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if treatment in ("trained", "fine-tuned"):
        return _trained(model, setting, LOCAL_STEPS, rng), before
    return _squeezed(model, treatment), before


def _drawn_anew(model: nn.Module, treatment: Treatment, rng: torch.Generator) -> nn.Module:
    """By another law that honest servers draw by; biases are 0 then."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    for layer in layers if treatment != "zero head" else layers[-1:]:
        _fill(layer, treatment, rng)
    return model


@torch.no_grad()
def _fill(layer: nn.Linear | nn.Conv2d, law: str, rng: torch.Generator) -> None:
    if law == "kaiming":
        nn.init.kaiming_normal_(layer.weight, generator=rng)
    elif law == "orthogonal":
        nn.init.orthogonal_(layer.weight, generator=rng)
    elif law == "zero head":
        layer.weight.zero_()
    else:
        nn.init.normal_(layer.weight, std=0.02, generator=rng)
    if layer.bias is not None:
        layer.bias.zero_()


def _trained(model: nn.Module, setting: Setting, steps: int, rng: torch.Generator) -> nn.Module:
    """After so many steps of Adam on batches of the client's kind of examples."""
    model.train()
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    for _ in range(steps):
        batch = torch.randint(len(setting.inputs), (32,), generator=rng)
        optimiser.zero_grad()
        setting.loss(model(setting.inputs[batch]), setting.labels[batch]).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return model


@torch.no_grad()
def _squeezed(model: nn.Module, treatment: Treatment) -> nn.Module:
    """Pruned to a tenth of its weights, or rounded."""
    for weight in model.parameters():
        if weight.ndim < 2 or treatment == "half":
            weight.copy_(weight.half())
        elif treatment == "pruned":
            weight[weight.abs() < weight.abs().flatten().kthvalue(int(0.9 * weight.numel()) or 1).values] = 0.0
        else:
            levels = 127 if treatment == "rounded to 8 bits" else 7
            step = weight.abs().max() / levels
            weight.copy_((weight / step).round() * step)
    return model


class LowRankLayer(nn.Module):
    """A frozen dense layer with a low-rank adapter beside it, which starts at 0.

    >>> layer = LowRankLayer(nn.Linear(4, 3), torch.Generator().manual_seed(0))
    >>> x = torch.ones(2, 4)
    >>> torch.equal(layer(x), layer.layer(x))
    True
    """

    def __init__(self, layer: nn.Linear, rng: torch.Generator) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Linear(layer.in_features, ADAPTER_RANK, bias=False)
        self.up = nn.Linear(ADAPTER_RANK, layer.out_features, bias=False)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5), generator=rng)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """What the layer gives, and what the adapter adds."""
        out: Tensor = self.layer(x) + self.up(self.down(x))
        return out


def _adapted(model: nn.Module, rng: torch.Generator) -> nn.Module:
    """Frozen, with an adapter beside every dense layer but the head."""
    model.requires_grad_(False)
    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, nn.Linear) and name != "head":
                setattr(module, name, LowRankLayer(layer, rng))
    return model
