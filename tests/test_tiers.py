"""Tiers: how much of an example came back, and the verdict, the gate and the page that speak of the worst."""

from __future__ import annotations

import json

import pytest
import torch
from audits import L2, an_audit, captured, example, features, not_recovered, nothing_ran, run, table
from torch import nn
from torch.nn import functional as F

import unbatch
from unbatch.auditing.explained import freedom
from unbatch.auditing.judge import Judge
from unbatch.domain import Tokens
from unbatch.progress import Watch
from unbatch.reconstruction import Reconstruction
from unbatch.reporting import html as report
from unbatch.reporting.gate import breaches
from unbatch.reporting.results import Audit, Example
from unbatch.reporting.tiers import Outcome, Tier, tier_of
from unbatch.truth import Truth


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 24), nn.GELU(), nn.Linear(24, 6)).to(dtype)


X = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([3, 5])


def copies() -> Audit:
    came = [example(0, 63.9, 2e-3), example(1, 58.0, 3e-3)]
    return an_audit(attacks=["matching"], runs=[run("matching", came, guarantee="heuristic")])


def alike() -> Audit:
    return an_audit(runs=[run("matching", [example(0, 23.1, 0.15), example(1, 12.0, 0.7)], guarantee="heuristic")])


def explained(freedom: float | None) -> Audit:
    audit = captured()
    found = [Example(index=i, picture=e.picture) for i, e in enumerate(audit.runs[0].examples)]
    one = run("matching", found, residual=3e-7, explains=True, freedom=freedom, guarantee="heuristic")
    return audit.model_copy(update={"runs": [one]})


def not_audited() -> Audit:
    one = run("matching", [Example(index=0, picture="x")], residual=247.0)
    return captured().model_copy(update={"runs": [one], "not_audited": "its sign is flipped. Readings tried: sign."})


def left_out() -> Audit:
    runs = [
        run("matching", [example(0, 12.0, 0.7)], status="cut short", guarantee="heuristic"),
        run("unmix", [], status="left out", words="the attacks before it took 120 s."),
        run("span", [], status="failed", words="RuntimeError: too big"),
    ]
    return an_audit(runs=runs, allowance=120.0)


@pytest.mark.parametrize(
    ("audit", "outcome", "start", "badge"),
    [
        (an_audit(), "exact", "1 of 2 private images recovered exactly;", "Recovered exactly"),
        (
            copies(),
            "copy",
            "2 of 2 private images recovered as copies (the nearest at 63.9 dB, where chance is at 11.5 dB);",
            "Recovered as copies",
        ),
        (
            alike(),
            "recognisable",
            "1 of 2 private images recovered recognisably (the nearest at 23.1 dB",
            "Recognisable",
        ),
        (
            explained(1e-5),
            "explained",
            "The 2 images that matching read out of this update explain it to 3e-07, and",
            "Exp",
        ),
        (
            explained(None),
            "explained",
            "The 2 images that matching read out of this update explain it to 3e-07; wh",
            "Exp",
        ),
        (
            captured(),
            "exact",
            "1 image certified to be behind this update; anyone who sees it has it.",
            "Recovered exactly",
        ),
        (features(), "features", "None of 2 private images recovered, but the exact features", "Features recovered"),
        (not_recovered(), "none found", "None of 2 private images recovered by 3 runs;", "None found"),
        (nothing_ran(), "nothing ran", "No attack could run on 2 private images; that is not safety.", "Not tested"),
        (
            not_audited(),
            "not audited",
            "This update is not audited, and that is not safety. Its sign is",
            "Not audited",
        ),
        (left_out(), "none found", "None of 2 private images recovered by 1 run;", "None found"),
    ],
)
def test_the_verdict_the_badge_and_the_json_speak_of_the_worst(
    audit: Audit, outcome: str, start: str, badge: str
) -> None:
    assert audit.outcome == outcome
    assert audit.verdict().startswith(start)
    assert report.severity(audit)[1].startswith(badge)
    told = json.loads(audit.model_dump_json())
    assert (told["outcome"], told["headline"]) == (outcome, audit.verdict())
    assert sum(told["counts"].values()) == (audit.size if audit.truth else outcome == "exact")
    assert Audit.model_validate_json(audit.model_dump_json()) == audit
    assert audit.verdict() in audit._repr_html_().replace("&#39;", "'")


def test_nothing_is_none_where_something_could_have_been_found() -> None:
    assert "Cut short: matching. Failed: span. Left out for want of time: unmix." in left_out().verdict()
    assert "Failed: matching." in nothing_ran().verdict()
    assert (
        "Cut short"
        not in an_audit(runs=[run("a", [example(0, 99.0, 1e-9), example(1, 99.0, 1e-9)], status="cut short")]).verdict()
    )
    open_ = run("matching", [example(0, 12.0, 0.7), example(1, 9.0, 0.8)], residual=2e-7, explains=True)
    assert "explains the update to 2e-07: the update does not determine them" in an_audit(runs=[open_]).verdict()


def test_the_gate_counts_copies_and_what_explains_the_update() -> None:
    assert breaches(copies(), max_recovered=2) == []
    assert breaches(copies(), max_recovered=1) == ["2 examples recovered as copies, at most 1 allowed."]
    mixed = an_audit(runs=[run("a", [example(0, 131.0, 2e-7), example(1, 58.0, 3e-3)])])
    assert breaches(mixed, max_recovered=1) == ["2 examples recovered 1 exactly, 1 as a copy, at most 1 allowed."]
    assert breaches(alike(), max_recovered=0) == []
    for open_to in (1e-5, None, 0.4):
        (said,) = breaches(explained(open_to), max_recovered=0)
        assert said.startswith("2 examples of matching explain the update to 3e-07")
    assert breaches(explained(1e-5), max_recovered=2) == []
    assert any("its sign is flipped" in words for words in breaches(not_audited(), max_recovered=9))
    assert any(words.startswith("unmix left out for want of time") for words in breaches(left_out(), max_recovered=9))


def test_one_example_is_spoken_of_as_one() -> None:
    audit = explained(1e-5)
    audit.runs[0].examples, audit.runs[0].residual = audit.runs[0].examples[:1], 0.0
    said = "explains it to the last digit, and nothing else near it does."
    assert audit.verdict() == f"The image that matching read out of this update {said}"


def test_labels_alone_are_no_answer_about_examples() -> None:
    labels = run("labels", [Example(index=0, label="dog", bound=0.0)], family="labels")
    audit = an_audit(runs=[labels])
    assert audit.outcome is Outcome.NOTHING_RAN
    assert "Labels alone were read, by labels." in audit.verdict()
    assert breaches(audit, max_recovered=0) == [
        "no attack on the examples themselves could run, so nothing is known of them."
    ]
    assert breaches(audit, max_recovered=2) == []


def test_an_audit_of_before_there_were_tiers_has_them() -> None:
    told = copies().model_dump(mode="json")
    for each in told["runs"][0]["examples"]:
        del each["tier"]
    for derived in ("outcome", "counts", "headline"):
        del told[derived]
    again = Audit.model_validate(told)
    assert again.counts == {"exact": 0, "copy": 2, "recognisable": 0, "none found": 0}
    assert table().counts == {"exact": 1, "copy": 0, "recognisable": 1, "none found": 1}  # by error and chance


def test_a_score_counts_where_it_means_something() -> None:
    assert tier_of(0.05, psnr=41.0) is Tier.COPY
    assert tier_of(0.05) is Tier.NONE
    assert tier_of(0.05, chance=0.1) is Tier.NONE
    assert tier_of(0.4, ssim=0.5, ssim_of_chance=0.6) is Tier.NONE  # chance looks more like it
    wide = Example(index=0, error=0.05, scores={"psnr": 60.0}, chance={}, picture="age = 3, pay = 7.5")
    assert wide.tier is Tier.NONE  # of a table whose largest column hides the others
    assert an_audit(metrics={"l2-error": L2}).verdict().startswith("1 of 2")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_half_precision_client_s_pictures_come_out_as_copies(dtype: torch.dtype) -> None:
    client = unbatch.Setting(model=net(dtype), loss=F.cross_entropy, inputs=X.to(dtype), labels=Y)
    audit = unbatch.audit(client, attacks="gradient-matching:iterations=300", metrics="label-accuracy", analyses=())
    assert {e.tier for e in audit.runs[0].examples} <= {Tier.EXACT, Tier.COPY}  # whichever metrics were asked for
    assert audit.outcome in (Outcome.COPY, Outcome.EXACT)
    assert breaches(audit, max_recovered=0)
    assert audit.runs[0].explains


def seen(**known: object) -> unbatch.Observation:
    model = net()
    gradients = torch.autograd.grad(F.cross_entropy(model(X), Y), list(model.parameters()))
    factor = -0.05 if "local_steps" in known else 1.0
    update = {name: factor * g for (name, _), g in zip(model.named_parameters(), gradients, strict=True)}
    told = unbatch.Knowledge(input_shape=(3, 4, 4), batch_size=2, **known)
    return unbatch.Observation(model=model, loss=F.cross_entropy, update=update, knowledge=told)


@pytest.mark.parametrize("known", [{}, {"local_steps": 1, "learning_rate": 0.05}], ids=["gradient", "step"])
def test_a_capture_that_is_explained_to_its_rounding_is_never_none(known: dict[str, object]) -> None:
    audit = unbatch.audit(seen(**known), attacks="gradient-matching", analyses=())
    assert audit.outcome is Outcome.EXPLAINED
    assert "and nothing else near them does" in audit.verdict()
    found = sorted(e.label or "" for e in audit.runs[0].examples)
    assert found == ["3", "5"]
    assert breaches(audit, max_recovered=0)


def test_what_the_update_leaves_open_is_not_called_unique() -> None:
    whole = seen()
    head = {name: tensor for name, tensor in whole.update.items() if name.startswith("3.")}
    part = unbatch.Observation(model=whole.model, loss=whole.loss, update=head, knowledge=whole.knowledge)
    narrow = freedom(part, X, Y, 1e-7, Watch())  # 24 numbers of each example reach the head, of 48
    assert narrow is not None
    assert narrow > 1 > 1e-3 > (freedom(whole, X, Y, 1e-7, Watch()) or 1.0)


def test_tokens_are_counted_and_have_no_distance() -> None:
    domain = Tokens(shape=(4,), high=9.0)
    true = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    found = Reconstruction(inputs=torch.tensor([[1.0, 2.0, 3.0, 9.0], [5.0, 6.0, 7.0, 8.0]]))
    blank = run("a", [])
    model = nn.Sequential(nn.Embedding(10, 2), nn.Flatten(), nn.Linear(8, 2))
    client = unbatch.Setting(model=model, loss=F.cross_entropy, inputs=true, labels=torch.tensor([0, 1]))
    obs, _ = unbatch.observe(model, F.cross_entropy, true, torch.tensor([0, 1]))
    Judge(domain, {}).fill(blank, found, obs, Truth(inputs=true, labels=torch.tensor([0, 1])), client)
    assert [e.tier for e in blank.examples] == [Tier.RECOGNISABLE, Tier.EXACT]
