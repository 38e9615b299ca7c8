"""Harden: the cheapest defence under which neither an attack nor a bound allows more than a target PSNR.

Each family of defences is a ladder of strengths, from weak to strong. It is climbed until bounds exclude the target for
one update and for the whole training, and no attack contradicts them; bisection then looks for weaker ones. Utility is
the test accuracy of the same model trained with the defence. Only a bound that holds for any attacker makes a setting
safe; failed attacks do not. A bound on one update takes its examples to be in it for sure; one on the whole training takes
each step's examples to be a secret Poisson sample, where utility is measured with batches of a fixed size.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from unbatch.analysis import Analysis
from unbatch.attack import Attack
from unbatch.auditing.run import audit
from unbatch.auditing.utility import Scene, scene_of
from unbatch.case import Case, Setting
from unbatch.errors import UnbatchError
from unbatch.files import write_atomically
from unbatch.plugin import OneOrMore
from unbatch.reporting.results import Audit

ATTACKS = ("bias-ratio", "unmix", "gradient-matching")
BOUNDS = (  # those that are installed are asked
    "van-trees:draws=8",
    "noise-information",
    "dp-reconstruction",
    "counting",
)
DELTA = 1e-5
REFINE = 3  # bisections of each family, for one update and for the whole training

Scope = Literal["one update", "whole training"]
SCOPES: tuple[Scope, ...] = ("one update", "whole training")
Standing = Literal["leaks", "no bound excludes it", "excluded", "not possible"]


class Tried(BaseModel):
    """One setting of a defence as it was tried: what attacks got, what bounds allow, and what it costs in accuracy."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")

    family: str
    strength: float
    unit: str  # of the strength
    batch: int
    defences: list[str]
    verdict: Standing
    words: str
    psnr: float | None = None  # dB, the worst example under all attacks
    attack: str = ""  # that got it
    recovered: int = 0  # examples exactly, by all attacks together
    chance: float | None = None  # dB, of that example
    bound: float | None = None  # dB, the least that a bound for any attacker allows from this one update
    by: str = ""  # that bound's name
    training: float | None = None  # dB, the same from all updates of the training
    excluded: list[Scope] = []  # what the target is excluded for
    epsilon: float | None = None
    accuracy: float | None = None
    undefended: float | None = None  # accuracy with the same batch size and no defence
    seconds: float = 0.0

    def __repr__(self) -> str:
        strength = f"{self.strength:.3g} {self.unit}".strip()
        return f"<Tried {self.family} at {strength}, batch {self.batch}: {self.verdict}>"

    __str__ = __repr__


class Hardening(BaseModel):
    """A search for the cheapest safe setting, as far as it has come."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")

    case: str
    target: float
    rounds: int
    attacks: list[str]
    analyses: list[str]
    tried: list[Tried] = []
    complete: bool = False

    def __repr__(self) -> str:
        return f"<Hardening of {self.case}, at most {self.target:g} dB wanted: {len(self.tried)} settings tried>"

    __str__ = __repr__

    def cheapest(self, scope: Scope = "one update") -> Tried | None:
        """The most accurate setting that a bound makes safe; of equals the first tried."""
        safe = [t for t in self.tried if scope in t.excluded]
        return max(safe, key=lambda t: t.accuracy or 0.0, default=None)

    def answer(self, scope: Scope = "one update") -> str:
        """The finding in one sentence or two."""
        best, to = self.cheapest(scope), f"to {self.target:g} dB over {scope.replace('whole', 'the whole')}"
        if best is None:
            return (
                f"No setting tried is shown to keep every attacker {to}: no bound excludes it; failed attacks do not."
            )
        allowed = best.bound if scope == "one update" else best.training
        spent = f"; the training spends epsilon = {best.epsilon:.4g} at delta = {DELTA:g}" if best.epsilon else ""
        return (
            f"The cheapest setting shown to keep every attacker {to}: {', '.join(best.defences)} at batch {best.batch}. "
            f"A bound allows {allowed:.1f} dB at most{spent}. Test accuracy {best.accuracy:.1%}, undefended at "
            f"that batch {best.undefended:.1%}."
        )

    def save(self, path: Path) -> None:
        write_atomically(path, self.model_dump_json(indent=1))


@dataclass(frozen=True)
class Family:
    """Defences of one kind, from the weakest setting to the strongest."""

    name: str
    unit: str
    ladder: tuple[float, ...]  # from weak to strong
    defences: Callable[[Scene, float], list[str]]
    batch: Callable[[Scene, float], int] = lambda scene, strength: scene.n
    whole: bool = False  # strengths are counts

    def between(self, weak: float, strong: float) -> float | None:
        """The strength half way between two, their geometric mean; None where there is none.

        >>> steps = Family("local steps", "steps", (2, 8), lambda scene, strength: [], whole=True)
        >>> steps.between(2, 8), steps.between(2, 3)
        (4.0, None)
        """
        middle = math.sqrt(weak * strong)
        middle = float(round(middle)) if self.whole else middle
        return middle if min(weak, strong) < middle < max(weak, strong) else None


def _private(scene: Scene, strength: float, n: int) -> list[str]:
    rate = min(1.0, n / scene.cut)
    told = f"clip={scene.size:.4g},noise_multiplier={strength:.4g},sampling_rate={rate:.4g},steps={scene.rounds}"
    return [f"dp-sgd:{told},delta={DELTA:g},accountant=rdp,reduction={scene.reduction}"]


def families(scene: Scene) -> list[Family]:
    """The families of defences that are searched, their strengths in the scene's own units; bounded ones come first."""
    large = min(8 * scene.n, scene.cut)
    return [
        Family("dp-sgd", "noise multiplier", (0.1, 0.5, 2.0, 8.0, 32.0), lambda scene, s: _private(scene, s, scene.n)),
        Family(
            f"dp-sgd, batch {large}",
            "noise multiplier",
            (0.1, 0.5, 2.0, 8.0, 32.0),
            lambda scene, s: _private(scene, s, large),
            lambda scene, s: large,
        ),
        Family(
            "noise",
            "times the update's rms",
            (0.1, 1.0, 10.0, 100.0),
            lambda scene, s: [f"noise:sigma={s * scene.rms:.4g}"],
        ),
        Family("prune", "kept", (0.5, 0.1, 0.01, 0.001), lambda scene, s: [f"prune:share={1 - s:.6g}"]),
        Family("quantise", "bits", (8, 6, 4, 2), lambda scene, s: [f"quantise:bits={s:.0f}"], whole=True),
        Family(
            "clip",
            "of a gradient's norm",
            (1.0, 0.1, 0.01),
            lambda scene, s: [f"clip:norm={s * scene.size:.4g}"],
        ),
        Family(
            "local steps",
            "steps",
            (2, 8, 32),
            lambda scene, s: [f"local-steps:steps={s:.0f},learning_rate=0.1"],
            whole=True,
        ),
        Family(
            "batch",
            "examples",
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
    attacks: OneOrMore[Attack] | None = None,
    analyses: OneOrMore[Analysis] | None = None,
    only: Sequence[str] = (),
    sink: Callable[[Hardening], None] | None = None,
) -> Hardening:
    """Search every family (or those named in `only`) for the cheapest setting that keeps every attacker to `psnr` dB.

    `target` is a case, or a Setting whose inputs are all the data there is; an update is of `batch` examples (a case's
    own). `seconds` is for the whole: attacks get half of it in even shares, and when it is spent the search ends with what
    it has. `sink` is called after each setting. Bounds are those with scope `any` that `analyses` give.
    Raises UnbatchError: a number that makes no sense, a model that is released instead of updates being sent, labels that
    are no classes, too little data, no family, attack or analysis of that name.
    """
    if not (math.isfinite(psnr) and math.isfinite(seconds) and seconds >= 0 and batch >= 1 and rounds >= 1):
        raise UnbatchError(
            f"a target of {psnr} dB, {seconds} seconds, batches of {batch} and {rounds} rounds make no search; give finite "
            "numbers, and at least 1 example and 1 round."
        )
    scene = scene_of(target, batch, rounds, seed)
    if scene.setting.training is not None:
        raise UnbatchError(
            "this client sends no updates: its trained model is released, and what hardens updates hardens nothing of it. "
            "Private training does (`unbatch audit CASE,method=sgd,steps=N --defence dp-sgd:steps=N`), which has bounds."
        )
    chosen = [f for f in families(scene) if not only or f.name.partition(",")[0] in only]
    known = sorted({f.name.partition(",")[0] for f in families(scene)})
    if wrong := sorted(set(only) - set(known)):
        raise UnbatchError(f"no family is called {', '.join(wrong)}; known: {', '.join(known)}.")
    given = [a for a in BOUNDS if a.partition(":")[0] in Analysis.find()] if analyses is None else analyses
    tools = Attack.several(ATTACKS if attacks is None else attacks)
    asked = Analysis.several(given)
    held = Hardening(
        case=scene.setting.name,
        target=psnr,
        rounds=rounds,
        attacks=[str(a) for a in tools],
        analyses=[str(a) for a in asked],
    )
    end = time.monotonic() + seconds
    planned = sum(len(f.ladder) for f in chosen) + 2 * REFINE
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


def _climb(family: Family, attempt: Callable[[Family, float], Tried]) -> Iterator[Tried]:
    """Up the ladder until bounds exclude the target in every scope, then bisection below each scope's first safe one."""
    tried: list[Tried] = []
    for strength in family.ladder:
        tried.append(attempt(family, strength))
        yield tried[-1]
        if tried[-1].verdict == "not possible":
            return
        if set(tried[-1].excluded) == set(SCOPES):
            break
    for scope in SCOPES:
        for _ in range(REFINE):
            order = sorted(tried, key=lambda t: t.strength, reverse=family.ladder[0] > family.ladder[-1])
            first = next((i for i, t in enumerate(order) if scope in t.excluded), 0)
            middle = family.between(order[first - 1].strength, order[first].strength) if first else None
            if middle is None:
                break
            tried.append(attempt(family, middle))
            yield tried[-1]


def _try(
    scene: Scene,
    family: Family,
    strength: float,
    target: float,
    attacks: Sequence[Attack | str],
    analyses: Sequence[Analysis | str],
    budget: float,
) -> Tried:
    tried, record = measure(scene, family, strength, attacks, analyses, budget)
    if record is None:
        return tried
    tried.verdict, tried.words = _judged(tried, target)
    if tried.verdict == "excluded":
        whole = tried.training is not None and tried.training <= target
        tried.excluded = list(SCOPES) if whole else [SCOPES[0]]
    return tried


def measure(
    scene: Scene,
    family: Family,
    strength: float,
    attacks: Sequence[Attack | str],
    analyses: Sequence[Analysis | str],
    budget: float,
) -> tuple[Tried, Audit | None]:
    """One setting attacked, bounded and trained with, its verdict still open, and the audit behind it.

    `budget` is seconds for each attack; bounds take what they need. No audit where the setting is not possible; the
    words say why.
    """
    began = time.monotonic()
    batch, defences = family.batch(scene, strength), family.defences(scene, strength)
    tried = Tried(
        family=family.name,
        strength=strength,
        unit=family.unit,
        batch=batch,
        defences=defences,
        verdict="not possible",
        words="",
    )
    try:
        record = audit(
            scene.client(batch),
            attacks=attacks,
            defences=defences,
            metrics=("psnr",),
            analyses=analyses,
            budget=budget,
            analysis_budget=math.inf,  # what is called safe must not depend on how fast the machine is
        )
        tried.accuracy, tried.undefended = scene.accuracy(batch, defences), scene.undefended(batch)
    except UnbatchError as error:
        tried.words = str(error)
        return tried, None
    tried.verdict = "no bound excludes it"
    hits = [(index, hit) for (_, index), hit in record.worst("psnr").items() if hit]
    if hits:
        index, (tried.psnr, run) = max(hits, key=lambda hit: hit[1][0])
        tried.attack = run.title
        tried.chance = next(e.chance.get("psnr") for e in run.examples if e.index == index)
    tried.recovered = len(record.recovered())
    ceilings = [b for b in record.bounds if b.scope == "any"]
    tried.bound, tried.by = min(((b.psnr, b.name) for b in ceilings if b.covers == "update"), default=(None, ""))
    tried.training = min((b.psnr for b in ceilings if b.covers == "training"), default=None)
    tried.epsilon = record.privacy.epsilon if record.privacy else None
    tried.seconds = time.monotonic() - began
    return tried, record


def _judged(tried: Tried, target: float) -> tuple[Standing, str]:
    if tried.psnr is not None and tried.psnr > target:
        against = "" if tried.bound is None or tried.bound > target else f", above what {tried.by} allows on average"
        return "leaks", f"an attack reaches {tried.psnr:.1f} dB{against}."
    if tried.bound is not None and tried.bound <= target:
        return "excluded", f"{tried.by} allows any attacker at most {tried.bound:.1f} dB."
    best = "no bound speaks of it" if tried.bound is None else f"{tried.by} still allows {tried.bound:.1f} dB"
    return "no bound excludes it", f"attacks that failed prove nothing; {best}."
