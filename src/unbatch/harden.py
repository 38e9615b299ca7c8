"""Harden: the cheapest defence under which neither an attack nor a bound allows more than a target PSNR.

Each family of defences is a ladder of strengths, from weak to strong. It is climbed until a bound excludes the target and
no attack contradicts it; then bisection looks for a weaker strength that still does. Utility is the test accuracy of the
same model trained with the defence. Only a bound that holds for any attacker makes a setting safe; failed attacks do not.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from unbatch.analysis import Analysis, Bound
from unbatch.attack import Attack
from unbatch.audit import audit
from unbatch.case import Case, Setting
from unbatch.client import honest_step
from unbatch.defence import Defence, Round, Step
from unbatch.files import write_atomically
from unbatch.loss import reduction
from unbatch.network import forward
from unbatch.protocol import flatten

ATTACKS = ("bias-ratio", "unmix", "gradient-matching")
BOUNDS = ("van-trees", "dp-reconstruction", "counting")  # those that are installed are asked
DELTA = 1e-5
TEST = 0.3  # share of the data held out
REFINE = 3  # bisections of each family

Verdict = Literal["leaks", "no bound excludes it", "excluded", "not possible"]


class Tried(BaseModel):
    """One setting: what attacks got, what bounds allow, what it costs."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")

    family: str
    strength: float
    batch: int
    defences: list[str]
    verdict: Verdict
    words: str
    psnr: float | None = None  # dB, the worst example under all attacks
    chance: float | None = None  # dB, of that example
    bound: float | None = None  # dB, the least that a bound for any attacker allows
    by: str = ""  # that bound's name
    epsilon: float | None = None
    accuracy: float | None = None
    seconds: float = 0.0


class Hardening(BaseModel):
    """A search, as far as it has come."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")

    case: str
    target: float
    rounds: int
    accuracy: float  # without any defence
    attacks: list[str]
    analyses: list[str]
    tried: list[Tried] = []
    complete: bool = False

    def cheapest(self) -> Tried | None:
        """The most accurate setting that a bound makes safe; of equals the first tried."""
        safe = [t for t in self.tried if t.verdict == "excluded"]
        return max(safe, key=lambda t: t.accuracy or 0.0, default=None)

    def answer(self) -> str:
        """The finding in words."""
        best = self.cheapest()
        if best is None:
            return (
                f"No setting that was tried is shown to keep every attacker to {self.target:g} dB: no bound excludes it. "
                "Attacks that failed prove nothing."
            )
        spent = "" if best.epsilon is None else f", epsilon = {best.epsilon:.4g} at delta = {DELTA:g}"
        return (
            f"Cheapest setting under which neither attack nor bound allows more than {self.target:g} dB: "
            f"{', '.join(best.defences)} at batch {best.batch}{spent}; test accuracy {best.accuracy:.1%} against "
            f"{self.accuracy:.1%} undefended. {best.by} allows at most {best.bound:.1f} dB."
        )

    def save(self, path: Path) -> None:
        write_atomically(path, self.model_dump_json(indent=1))


@dataclass(frozen=True)
class Family:
    """Defences of one kind by strength."""

    name: str
    ladder: tuple[float, ...]  # from weak to strong
    defences: Callable[[Scene, float], list[str]]
    batch: Callable[[Scene, float], int] = lambda scene, strength: scene.n
    whole: bool = False  # strengths are counts

    def between(self, weak: float, strong: float) -> float | None:
        """The geometric mean; None where no strength lies between."""
        middle = math.sqrt(weak * strong)
        middle = float(round(middle)) if self.whole else middle
        return middle if min(weak, strong) < middle < max(weak, strong) else None


@dataclass(frozen=True)
class Scene:
    """A model, its data split in two, and how long it is trained."""

    setting: Setting  # whose inputs are all data
    n: int  # examples of one update
    rounds: int
    seed: int = 0

    @cached_property
    def cut(self) -> int:
        return len(self.setting.inputs) - int(TEST * len(self.setting.inputs))

    def client(self, n: int) -> Setting:
        """The client whose update is audited."""
        return replace(self.setting, inputs=self.setting.inputs[:n], labels=self.setting.labels[:n])

    @cached_property
    def reduction(self) -> str:
        s = self.setting
        outputs = forward(s.model, s.inputs[:2])
        return reduction(s.loss, outputs, s.labels[:2].to(outputs.device)) or "mean"

    @cached_property
    def size(self) -> float:
        """The median norm of one example's gradient at the first model."""
        norms = [float(flatten(u, u).norm()) for i in range(8) for u in [self._step(slice(i, i + 1), [])]]
        return sorted(norms)[len(norms) // 2]

    @cached_property
    def rms(self) -> float:
        """Of an entry of the undefended update."""
        update = self._step(slice(self.n), [])
        return float(flatten(update, update).square().mean().sqrt())

    def accuracy(self, n: int, defences: Sequence[str]) -> float:
        """On the held-out data, after `rounds` updates of n training examples each, taken by Adam at the server.

        Adam's steps do not depend on the updates' scale, so that clipping costs no more than what it hides.
        """
        s, rng = self.setting, torch.Generator().manual_seed(self.seed)
        model = copy.deepcopy(s.model)
        made = [Defence.parse(spec) for spec in defences]
        parameters = dict(model.named_parameters())
        optimiser = torch.optim.Adam(parameters.values(), lr=0.01)
        for _ in range(self.rounds):
            part = torch.randperm(self.cut, generator=rng)[:n]
            update = self._step(part, made, model, rng)
            sign = -1.0 if any(d.name == "local-steps" for d in made) or s.protocol.steps(n) else 1.0
            for name, u in update.items():
                parameters[name].grad = sign * u.detach()
            optimiser.step()
        outputs = forward(model, s.inputs[self.cut :])
        labels = s.labels[self.cut :].to(outputs.device)
        found = outputs.argmax(1) if outputs.ndim == 2 and outputs.shape[1] > 1 else (outputs.reshape(-1) > 0)
        return float((found == labels.reshape(found.shape)).double().mean())

    def _step(
        self,
        part: slice | Tensor,
        defences: Sequence[Defence],
        model: nn.Module | None = None,
        rng: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        s = self.setting
        step: Step = honest_step
        for defence in reversed(defences):
            step = defence.wrap(step)
        model = model or s.model
        first = next(model.parameters())
        round_ = Round(
            model=model,
            loss=s.loss,
            inputs=s.inputs[part].to(first),
            labels=s.labels[part].to(first.device),
            protocol=s.protocol,
            rng=rng or torch.Generator().manual_seed(self.seed),
        )
        return dict(step(round_))


def _private(scene: Scene, strength: float, n: int) -> list[str]:
    rate = min(1.0, n / scene.cut)
    told = f"clip={scene.size:.4g},noise_multiplier={strength:.4g},sampling_rate={rate:.4g},steps={scene.rounds}"
    return [f"dp-sgd:{told},delta={DELTA:g},accountant=rdp,reduction={scene.reduction}"]


def families(scene: Scene) -> list[Family]:
    """What is searched; those that a bound can speak of come first."""
    large = min(8 * scene.n, scene.cut)
    return [
        Family("dp-sgd", (0.1, 0.5, 2.0, 8.0, 32.0), lambda scene, s: _private(scene, s, scene.n)),
        Family(
            f"dp-sgd, batch {large}",
            (0.1, 0.5, 2.0, 8.0, 32.0),
            lambda scene, s: _private(scene, s, large),
            lambda scene, s: large,
        ),
        Family("noise", (0.1, 1.0, 10.0, 100.0), lambda scene, s: [f"noise:sigma={s * scene.rms:.4g}"]),
        Family("prune", (0.5, 0.1, 0.01, 0.001), lambda scene, s: [f"prune:share={1 - s:.6g}"]),
        Family("clip", (1.0, 0.1, 0.01), lambda scene, s: [f"clip:norm={s * scene.size:.4g}"]),
        Family(
            "local steps", (2, 8, 32), lambda scene, s: [f"local-steps:steps={s:.0f},learning_rate=0.1"], whole=True
        ),
        Family(
            "batch",
            tuple(float(k * scene.n) for k in (1, 2, 4, 8)),
            lambda scene, s: [],
            lambda scene, s: min(int(s), scene.cut),
            whole=True,
        ),
    ]


def harden(
    target: Case | Setting,
    *,
    psnr: float,
    batch: int = 4,
    seconds: float = 180.0,
    rounds: int = 200,
    seed: int = 0,
    attacks: Sequence[Attack | str] | None = None,
    analyses: Sequence[Analysis | str] | None = None,
    only: Sequence[str] = (),
    sink: Callable[[Hardening], None] | None = None,
) -> Hardening:
    """Search every family (or those named in `only`) for the cheapest setting that keeps every attacker to `psnr` dB.

    `target` is a case, or a Setting whose inputs are all the data there is; an update is of `batch` examples (a case's
    own). `seconds` is for the whole: each attack gets an even share of it, and when it is spent the search ends with what
    it has. `sink` is called after each setting. Bounds are those with scope `any` that `analyses` give.
    Raises ValueError: labels are no classes, too little data, no family of that name.
    """
    scene = _scene(target, batch, rounds, seed)
    chosen = [f for f in families(scene) if not only or f.name.partition(",")[0] in only]
    known = sorted({f.name.partition(",")[0] for f in families(scene)})
    if wrong := sorted(set(only) - set(known)):
        raise ValueError(f"no family is called {', '.join(wrong)}; known: {', '.join(known)}.")
    tools = list(ATTACKS if attacks is None else attacks)
    asked = [a for a in BOUNDS if a in Analysis.find()] if analyses is None else list(analyses)
    held = Hardening(
        case=scene.setting.name,
        target=psnr,
        rounds=rounds,
        accuracy=scene.accuracy(scene.n, []),
        attacks=[str(a) for a in tools],
        analyses=[str(a) for a in asked],
    )
    end = time.monotonic() + seconds
    planned = sum(len(f.ladder) for f in chosen) + REFINE * 3
    budget = seconds / (2 * planned * max(len(tools), 1))
    for family in chosen:
        for tried in _climb(family, lambda f, s: _try(scene, f, s, psnr, tools, asked, budget)):
            held.tried.append(tried)
            if sink:
                sink(held)
            if time.monotonic() > end:
                return held
    held.complete = True
    if sink:
        sink(held)
    return held


def _scene(target: Case | Setting, batch: int, rounds: int, seed: int) -> Scene:
    if isinstance(target, Case):
        pool, setting = target.pool(torch.Generator().manual_seed(target.seed)), target.setting()
        setting = replace(setting, inputs=pool.inputs.to(setting.inputs), labels=pool.labels)
        batch = target.batch
    else:
        setting = target
    if setting.labels.is_floating_point() or setting.domain.name == "tokens":
        raise ValueError(
            "utility is test accuracy, and leakage PSNR: harden needs class labels and real-valued inputs."
        )
    scene = Scene(setting, batch, rounds, seed)
    if scene.cut < max(batch, 8) or scene.cut == len(setting.inputs):
        raise ValueError(
            f"{len(setting.inputs)} examples are too few: {TEST:.0%} are held out, and {max(batch, 8)} must be left."
        )
    return scene


def _climb(family: Family, attempt: Callable[[Family, float], Tried]) -> Iterator[Tried]:
    """Up the ladder to the first strength that a bound makes safe, then bisection below it."""
    weak: float | None = None
    for strength in family.ladder:
        tried = attempt(family, strength)
        yield tried
        if tried.verdict == "not possible":
            return
        if tried.verdict == "excluded":
            break
        weak = strength
    else:
        return
    for _ in range(REFINE):
        middle = family.between(weak, strength) if weak is not None else None
        if middle is None:
            return
        tried = attempt(family, middle)
        yield tried
        weak, strength = (weak, middle) if tried.verdict == "excluded" else (middle, strength)


def ceiling(bound: Bound) -> float:
    """The PSNR in dB of the mean squared error that a bound (a root mean square, of the input's range) leaves."""
    return -20 * math.log10(bound.value) if bound.value > 0 else math.inf


def _try(
    scene: Scene,
    family: Family,
    strength: float,
    target: float,
    attacks: Sequence[Attack | str],
    analyses: Sequence[Analysis | str],
    budget: float,
) -> Tried:
    began = time.monotonic()
    batch, defences = family.batch(scene, strength), family.defences(scene, strength)
    tried = Tried(
        family=family.name, strength=strength, batch=batch, defences=defences, verdict="not possible", words=""
    )
    try:
        record = audit(
            scene.client(batch),
            attacks=attacks,
            defences=defences,
            metrics=("psnr",),
            analyses=analyses,
            budget=budget,
        )
        tried.accuracy = scene.accuracy(batch, defences)
    except ValueError as error:
        tried.words = str(error)
        return tried
    hits = [hit for hit in record.worst("psnr").values() if hit]
    if hits:
        tried.psnr, run = max(hits, key=lambda hit: hit[0])
        tried.chance = next(e.chance.get("psnr") for e in run.examples if e.scores.get("psnr") == tried.psnr)
    ceilings = [(ceiling(b), b.name) for b in record.bounds if b.scope == "any"]
    if ceilings:
        tried.bound, tried.by = min(ceilings)
    tried.epsilon = record.privacy.epsilon if record.privacy else None
    tried.verdict, tried.words = _judged(tried, target)
    tried.seconds = time.monotonic() - began
    return tried


def _judged(tried: Tried, target: float) -> tuple[Verdict, str]:
    if tried.psnr is not None and tried.psnr > target:
        against = "" if tried.bound is None or tried.bound > target else f", above what {tried.by} allows on average"
        return "leaks", f"an attack reaches {tried.psnr:.1f} dB{against}."
    if tried.bound is not None and tried.bound <= target:
        return "excluded", f"{tried.by} allows any attacker at most {tried.bound:.1f} dB."
    best = "no bound speaks of it" if tried.bound is None else f"{tried.by} still allows {tried.bound:.1f} dB"
    return "no bound excludes it", f"attacks that failed prove nothing; {best}."
