"""The default attacks: everything that only looks, cheapest first, within a time, and no longer than there is need."""

from __future__ import annotations

from typing import Annotated, ClassVar, final

import pytest
import torch
from audits import example, run
from pydantic import Field

import unbatch
from unbatch import Attack, Case, Guarantee
from unbatch.attack import ActiveAttack, Cost, Demo
from unbatch.auditing import allowance as allowances
from unbatch.auditing.allowance import Allowance
from unbatch.auditing.suites import SUITES, passive
from unbatch.inversion.view import View
from unbatch.progress import tick
from unbatch.reconstruction import Reconstruction
from unbatch.reporting.results import Audit, Run
from unbatch.threat_model import sees


@final
class Sleepy(Attack):
    """Ticks until its time is spent."""

    family: ClassVar[str] = "test"
    guarantee: ClassVar[Guarantee] = Guarantee.HEURISTIC
    paper: ClassVar[str] = "none"
    demo: ClassVar[Demo] = Demo(case="digits")

    number: Annotated[int, Field(description="to tell two apart")] = 0

    def run(self, view: View, rng: torch.Generator) -> Reconstruction:
        while tick(0.0):
            pass
        return Reconstruction(inputs=None, labels=torch.tensor([0]))


def shown(audit: Audit) -> list[tuple[str, str]]:
    return [(one.attack, one.status.value) for one in audit.runs]


def test_the_default_is_all_that_only_looks_cheapest_first() -> None:
    names = passive()
    found = Attack.find()
    looks = {name for name, attack in found.items() if not issubclass(attack, ActiveAttack)}
    assert set(names) == {name for name in looks if sees(found[name].threat_model) == "update"}
    assert set(passive("release")) == looks - set(names)
    costs = [found[name].cost for name in names]
    assert costs == sorted(costs)
    assert names[0] == "bias-ratio"
    assert [found[name].guarantee for name in names if found[name].cost is Cost.SEARCHES] == ["heuristic", "heuristic"]
    assert SUITES["first"] == ("bias-ratio", "label-count", "gradient-matching")  # as published


def test_once_everything_is_certified_later_attacks_are_not_needed() -> None:
    audit = unbatch.audit(Case.parse("digits:width=16"), analyses=())
    assert shown(audit)[:3] == [("bias-ratio", "done"), ("label-count", "done"), ("descend", "not needed")]
    assert {status for _, status in shown(audit)[2:]} == {"not needed"}
    assert audit.runs[-1].words == "every example was recovered exactly and certified before, by bias-ratio."
    assert audit.allowance == 300.0
    assert audit.verdict().endswith("anyone who sees this update has it.")
    named = unbatch.audit(Case.parse("digits:width=16"), attacks=["bias-ratio", "unmix"], analyses=())
    assert shown(named) == [("bias-ratio", "done"), ("unmix", "done")]
    assert named.allowance is None


def test_a_captured_update_ends_as_early_where_the_batch_s_size_is_known() -> None:
    client = Case.parse("digits:width=16").setting()
    seen, _ = unbatch.observe(client.model, client.loss, client.inputs, client.labels)
    assert ("unmix", "not needed") in shown(unbatch.audit(seen, analyses=()))
    unsized = unbatch.Observation(
        model=seen.model, loss=seen.loss, update=seen.update, knowledge=seen.knowledge.without("batch_size")
    )
    assert ("unmix", "done") in shown(unbatch.audit(unsized, analyses=()))


def test_default_attacks_share_their_time_and_what_it_does_not_reach_is_on_record(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("unbatch.auditing.run.passive", lambda seen: (Sleepy(), Sleepy(number=1), "bias-ratio"))
    monkeypatch.setattr("unbatch.auditing.run.SEARCH_SECONDS", 0.5)
    case = Case.parse("digits:batch=2,width=16")
    audit = unbatch.audit(case, analyses=())
    assert shown(audit) == [("sleepy", "cut short"), ("sleepy:number=1", "cut short"), ("bias-ratio", "not applicable")]
    assert 0.2 < audit.runs[0].seconds < 0.45 > audit.runs[1].seconds > 0.2
    monkeypatch.setattr("unbatch.auditing.run.SEARCH_SECONDS", 0.3)
    late = unbatch.audit(case, analyses=())
    assert shown(late)[:2] == [("sleepy", "left out"), ("sleepy:number=1", "cut short")]
    assert "Left out for want of time: sleepy." in late.verdict()
    each = unbatch.audit(case, analyses=(), budget=0.05)
    assert {status for name, status in shown(each) if name.startswith("sleepy")} == {"cut short"}
    assert all(one.seconds < 0.2 for one in each.runs)


def test_every_client_and_seed_has_its_own_time() -> None:
    def turn(client: int, seed: int, attack: Attack) -> tuple[Attack, Run]:
        return attack, run(str(attack), [], client=client, seed=seed, seconds=3.0)

    turns = [turn(c, s, a) for c in (0, 1) for s in (0, 1) for a in (Sleepy(), Sleepy(number=1))]
    held = Allowance(queue=turns, total=20.0, searching=10.0)
    assert [held.seconds(*one) for one in turns] == [5.0, 10.0] * 4
    held.spend(*turns[0])
    assert [held.seconds(*one) for one in turns] == [3.5, 7.0] + [5.0, 10.0] * 3
    assert Allowance(queue=turns).seconds(*turns[0]) == float("inf")
    assert Allowance(queue=turns, budget=4.0, total=20.0).seconds(*turns[0]) == 4.0


def test_features_and_guesses_settle_nothing() -> None:
    def audit(*runs: Run) -> Audit:
        from audits import an_audit

        return an_audit(runs=list(runs))

    sure = [example(0, 131.0, 2e-7, bound=3e-7), example(1, 131.0, 2e-7, bound=3e-7)]
    guesses = [example(0, 131.0, 2e-7), example(1, 131.0, 2e-7)]
    assert allowances.settled(audit(run("a", sure)), 0) == "a"
    assert allowances.settled(audit(run("a", sure[:1]), run("b", sure[1:])), 0) in ("a, b", "b, a")
    assert allowances.settled(audit(run("a", sure, layer="fc")), 0) == ""
    assert allowances.settled(audit(run("a", guesses)), 0) == ""
    assert allowances.settled(audit(run("a", sure[:1])), 0) == ""


def test_the_command_line_of_a_default_audit_names_no_attack() -> None:
    from unbatch.reporting.html import command

    audit = unbatch.audit(unbatch.cases.Digits(width=16), analyses=())
    assert command(audit) == "unbatch audit digits:width=16 --seed 0"


def test_remedies_of_a_default_audit_are_tried_by_default_as_well() -> None:
    audit = unbatch.audit(Case.parse("digits:width=16"), analyses=(), remedies=["clip:norm=0.1"])
    (clip,) = audit.remedies
    assert (clip.recovered, clip.copies, clip.size) == (1, 0, 1)


@pytest.mark.slow
def test_one_picture_behind_six_convolutions_comes_out_by_default() -> None:
    audit = unbatch.audit(Case.parse("photos:model=cnn6"), analyses=())
    assert audit.verdict() == "1 of 1 private image recovered exactly; anyone who sees this update has it."
    assert ("gradient-matching", "not needed") in shown(audit)
