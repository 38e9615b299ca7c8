"""One part of an audit that fails is a line in the report with its reason, and ends nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, final

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unbatch
from unbatch import Analysis, Attack, Defence, Domain, Guarantee, Knowledge, Metric, Reconstruction, Setting, observe
from unbatch.analysis import Finding
from unbatch.defence import Step
from unbatch.domain import domain_of
from unbatch.inversion.view import View

X, Y = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1])


class BrokenError(Exception):
    """Of no kind that anybody expects, and without words that can be read."""

    def __str__(self) -> str:
        raise RuntimeError


class Unprintable(nn.Sequential):
    def __repr__(self) -> str:
        raise BrokenError


def net(kind: type[nn.Sequential] = nn.Sequential) -> nn.Sequential:
    torch.manual_seed(0)
    return kind(nn.Flatten(), nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 3))


def setting(**changed: object) -> Setting:
    held = {"model": net(), "loss": F.cross_entropy, "inputs": X, "labels": Y}
    return Setting(**(held | changed))  # type: ignore[arg-type]


@final
class FailingMetric(Metric):
    """Fails on whatever it is to score."""

    higher_is_better: ClassVar[bool] = True
    best: ClassVar[float | None] = None

    def score(self, found: Tensor, true: Tensor) -> Tensor:
        raise BrokenError


@final
class ShortMetric(Metric):
    """Gives fewer scores than there are pairs."""

    higher_is_better: ClassVar[bool] = True
    best: ClassVar[float | None] = None

    def score(self, found: Tensor, true: Tensor) -> Tensor:
        return torch.zeros(0)


@final
class UnfitMetric(Metric):
    """Fails when it is asked whether it means something here."""

    higher_is_better: ClassVar[bool] = True
    best: ClassVar[float | None] = None

    def on(self, domain: Domain) -> UnfitMetric:
        raise KeyError("range")

    def score(self, found: Tensor, true: Tensor) -> Tensor:
        return torch.zeros(len(found))


@final
class FailingAttack(Attack):
    """Fails."""

    family: ClassVar[str] = "none"
    guarantee: ClassVar[Guarantee] = Guarantee.HEURISTIC
    paper: ClassVar[str] = ""

    def run(self, view: View, rng: torch.Generator) -> Reconstruction:
        raise BrokenError


@final
class EmptyAttack(Attack):
    """Returns what is no reconstruction."""

    family: ClassVar[str] = "none"
    guarantee: ClassVar[Guarantee] = Guarantee.HEURISTIC
    paper: ClassVar[str] = ""

    def run(self, view: View, rng: torch.Generator) -> Reconstruction:
        return None  # type: ignore[return-value]


@final
class FailingAnalysis(Analysis):
    """Fails."""

    paper: ClassVar[str] = ""

    def run(self, view: View, at: tuple[Tensor, Tensor] | None, rng: torch.Generator) -> Sequence[Finding]:
        raise BrokenError


@final
class EmptyAnalysis(Analysis):
    """Returns no findings, and no list of none."""

    paper: ClassVar[str] = ""

    def run(self, view: View, at: tuple[Tensor, Tensor] | None, rng: torch.Generator) -> Sequence[Finding]:
        return None  # type: ignore[return-value]


@final
class FailingDefence(Defence):
    """Fails when a client steps behind it."""

    def wrap(self, step: Step) -> Step:
        raise BrokenError


class Unseen(type(domain_of(X))):  # type: ignore[misc]
    """Pictures that nobody can draw."""

    def render(self, example: Tensor) -> str:
        raise BrokenError

    def difference(self, found: Tensor, true: Tensor) -> str:
        raise BrokenError


def test_a_metric_that_fails_is_a_line_and_the_others_score() -> None:
    metrics = [FailingMetric(), ShortMetric(), UnfitMetric(), "psnr"]
    record = unbatch.audit(setting(), attacks="bias-ratio", metrics=metrics, analyses=[])
    run = record.runs[0]
    assert run.status == "done"
    assert record.recovered()
    assert run.examples[0].scores["psnr"] is not None
    assert set(run.unscored) == {"failing-metric", "short-metric"}
    notes = "\n".join(record.notes)
    assert "bias-ratio, client 0: failing-metric failed: BrokenError" in notes
    assert "the metric unfit-metric was left out, since it failed: KeyError: 'range'" in notes
    assert unbatch.Audit.model_validate_json(record.model_dump_json()).runs[0].unscored == run.unscored


def test_an_attack_that_fails_is_a_line_and_the_others_run() -> None:
    record = unbatch.audit(setting(), attacks=[FailingAttack(), EmptyAttack(), "bias-ratio"], analyses=[])
    assert [run.status for run in record.runs] == ["failed", "failed", "done"]
    assert record.runs[0].words.startswith("BrokenError")
    assert record.recovered()


def test_an_analysis_that_fails_is_a_line_and_the_others_speak() -> None:
    record = unbatch.audit(setting(), attacks=[], analyses=[FailingAnalysis(), EmptyAnalysis(), "gradient-rank"])
    assert [done.status for done in record.analyses] == ["failed", "failed", "done"]
    assert record.risks
    assert any("BrokenError" in note for note in record.notes)


def test_a_remedy_that_fails_is_a_line_and_the_others_are_tried() -> None:
    record = unbatch.audit(setting(), attacks="bias-ratio", analyses=[], remedies=[FailingDefence(), "noise:sigma=1"])
    assert [remedy.defence for remedy in record.remedies] == ["noise:sigma=1.0,relative=false"]
    assert any("failing-defence was not tried, since it failed: BrokenError" in note for note in record.notes)


def test_what_cannot_be_shown_is_said_in_its_place() -> None:
    held = domain_of(X)
    unseen = Unseen(shape=held.shape, low=held.low, high=held.high)
    record = unbatch.audit(setting(domain=unseen, model=net(Unprintable)), attacks="bias-ratio", analyses=[])
    assert record.recovered()
    assert "not shown (BrokenError" in record.clients[0].pictures[0]
    assert "not shown (BrokenError" in str(record.runs[0].examples[0].picture)
    assert "not shown (BrokenError" in record.model


def test_a_diagnosis_that_fails_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object, **named: object) -> list[str]:
        raise BrokenError

    monkeypatch.setattr("unbatch.auditing.run.diagnose", fails)
    seen, _ = observe(net(), F.cross_entropy, X, Y)
    record = unbatch.audit(seen, attacks="bias-ratio", analyses=[])
    assert any("was not looked at, since that failed: BrokenError" in note for note in record.notes)


def test_a_guard_lets_nothing_pass_whose_nearness_is_not_known() -> None:
    sent = observe(net(), F.cross_entropy, X, Y, defences="noise:sigma=10")[0].update
    told = {"model": net(), "loss": F.cross_entropy, "inputs": X, "labels": Y, "seconds": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unbatch.metrics.L2Error.score", FailingMetric.score)
        with pytest.raises(unbatch.Leak, match=r"l2-error failed, so how near the attacks came is not known"):
            unbatch.guard(sent, attacks="gradient-matching", defences="noise:sigma=10", **told)


class Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.e, self.f, self.o = nn.Embedding(50, 16), nn.Linear(16, 32), nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.tanh(self.f(self.e(x).mean(1))))


def test_tokens_are_named_where_nothing_applies() -> None:
    x, y = torch.tensor([[3, 14, 15, 9, 26, 5]]), torch.tensor([1])
    seen, _ = observe(Text(), F.cross_entropy, x, y)
    for attack in ("bias-ratio", "unmix", "gradient-matching", "layer-by-layer"):
        with pytest.raises(unbatch.NotApplicable, match=r"tokens") as caught:
            Attack.parse(attack)(replace(seen, knowledge=seen.knowledge | Knowledge(domain="tokens")))
        assert "argument" not in str(caught.value)
    record = unbatch.audit(Setting(model=Text(), loss=F.cross_entropy, inputs=x, labels=y), attacks=[])
    assert not [done for done in record.analyses if done.status == "failed"]
    with pytest.raises(unbatch.Leak, match=r"No attack for its examples could run, so nothing is known: .*tokens"):
        unbatch.guard(seen.update, model=Text(), loss=F.cross_entropy, inputs=x, labels=y, seconds=3)
