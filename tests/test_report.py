"""The report: complete, honest, safe and alone, for every kind of audit."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from html import unescape
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from audits import (
    AUDITS,
    EVIL,
    LABELS,
    an_audit,
    captured,
    designed,
    exact,
    example,
    features,
    hostile,
    not_recovered,
    nothing_ran,
    run,
    table,
)
from browser import CHROMIUM, printed, probe
from pages import Page

import unbatch
from unbatch.reporting import html as report
from unbatch.reporting.results import Audit, Example, Remedy

every = pytest.mark.parametrize("audit", [make() for make in AUDITS], ids=[make.__name__ for make in AUDITS])


@every
def test_stands_alone(audit: Audit) -> None:
    page = Page(report.render(audit))
    assert not page.open, "every element is closed"
    for tag, attributes in page.elements:
        for key in ("src", "href", "srcset", "action", "data", "poster", "xlink:href"):
            value = attributes.get(key, "#")
            assert value.startswith(("#", "data:image/png;base64,", "data:application/json;base64,")), (tag, value)
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")
        assert not any(key.startswith("on") for key in attributes), "no script in an attribute"
    assert [a.get("type") for a in page.all("script")] == ["application/json"]
    policy = [a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


@every
def test_embedded_json_is_the_audit(audit: Audit) -> None:
    page = Page(report.render(audit))
    assert Audit.model_validate_json(page.script) == audit
    (download,) = [a["href"] for a in page.all("a") if "download" in a]
    assert Audit.model_validate_json(base64.b64decode(download.split(",")[1])) == audit


@every
def test_can_be_read_by_everyone(audit: Audit) -> None:
    page = Page(report.render(audit))
    assert page.all("html")[0]["lang"] == "en"
    assert all(a["alt"] and a["src"].startswith("data:image/png;base64,") for a in page.all("img"))
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(b <= a + 1 for a, b in pairwise(levels)), "no heading level is skipped"
    names = [a["id"] for _, a in page.elements if "id" in a]
    assert len(names) == len(set(names))
    targets = {a["href"][1:] for a in page.all("a") if a["href"].startswith("#")}
    assert targets <= set(names), "every link on the page leads somewhere"
    drawn = [a for a in page.all("svg") if a.get("aria-hidden") != "true"]
    assert all(a.get("role") == "img" and a.get("aria-label") for a in drawn)
    assert all(a.get("tabindex") == "0" for a in page.all("div") if "scroll" in a.get("class", ""))
    assert "None" not in page.text.replace("None of", "").replace("None was raised", "").replace("None found", "")


@every
def test_verdict_comes_first(audit: Audit) -> None:
    page = report.render(audit)
    headline = re.search(r"<h1>(.*?)</h1>", page, re.DOTALL)
    assert headline is not None
    assert unescape(re.sub("</?small>", "", headline[1])) == audit.verdict()
    assert page.index("<h1>") < page.index('id="examples"') < page.index('id="why"') < page.index('id="flags"')


@pytest.mark.parametrize(
    ("audit", "words"),
    [
        (exact(), "Recovered exactly"),
        (not_recovered(), "None found"),
        (nothing_ran(), "Not tested"),
        (features(), "Features recovered"),
    ],
)
def test_severity_is_in_words(audit: Audit, words: str) -> None:
    assert report.severity(audit)[1] == words
    assert f"unbatch privacy audit {words}" in Page(report.render(audit)).text


def test_exact_recovery_shows_score_chance_and_certificate() -> None:
    page = Page(report.render(exact()))
    assert "PSNR 131.0 dB chance 11.5 dB" in page.text
    assert "certified to 3.0 × 10⁻⁷" in page.text
    assert page.row("0", "0", "exact")[3:5] == ["131.0 dB", "11.5 dB"]
    assert page.row("0", "1", "guess")[3:5] == ["20.0 dB", "11.5 dB"]
    assert len(page.all("img")) == 6  # private, recovered and difference of both
    assert "dog recovered as cat wrong" in page.text


def test_a_claim_that_fails_is_not_called_certified() -> None:
    audit = an_audit(runs=[run("bias-ratio", [example(0, 20.0, 0.3, bound=1e-6)])])
    text = Page(report.render(audit)).text
    assert "claim of 1.0 × 10⁻⁶ fails" in text
    assert "certified to" not in text


def test_not_recovered_is_no_score_of_zero() -> None:
    page = Page(report.render(not_recovered()))
    lost = page.row("0", "1", "0", "not recovered")
    assert lost[4:8] == ["not recovered", "11.5 dB", "not recovered", "0.71"]
    circles = [a for a in page.all("circle") if "dot" in a.get("class", "") and "%" in a["cx"]]
    assert len(circles) == 2, "two runs scored one of two examples; the other has no dot"
    assert "0 of 2 exact, 2 not recovered" in page.text
    assert "within 3 dB of chance" in page.text
    assert "labels only, not scored in PSNR" in page.text


def test_worse_than_chance_is_said() -> None:
    audit = an_audit(runs=[run("matching", [example(0, 9.0, 0.9), example(1, 14.6, 0.9)])])
    cards = report.groups(audit)[0][1]
    assert ("untested", "no better than chance") in cards[0].badges
    assert [words for _, words in cards[1].badges] == ["nearest guess"]
    lucky = Example(index=0, scores={"label-accuracy": 1.0}, chance={"label-accuracy": 1.0}, label="cat", bound=0.0)
    audit = an_audit(metrics={"label-accuracy": LABELS}, runs=[run("labels", [lucky])])
    assert [words for _, words in report.groups(audit)[0][1][0].badges] == ["label only", "no better than chance"]


def test_bounds_risks_defences_and_flags_are_told_whole() -> None:
    page = Page(report.render(not_recovered()))
    assert page.row("Cramér-Rao") == ["Cramér-Rao", "0.04", "unbiased attackers only", "known noise", "Rao 1945"]
    assert page.row("vacuous")[1:3] == ["∞", "any attacker"]
    assert page.row("0 Linear")[1:] == ["partial", "a span", "0.5", "12", "24", "2"]
    assert page.row("whole network Other")[3:] == ["not known", "4", "not known", "1"]
    assert page.row("+ prune:share=0.9") == ["+ prune:share=0.9", "0 of 2", "14.5 dB", "11.5 dB"]
    for words in ("near-chance", "at best +0.5 dB", "no leak shown", "compare with chance", "−1,470"):
        assert words in page.text
    assert "lies 0.25 of its own norm from the undefended one" in page.text
    assert "This audit was stopped before its end." in page.text
    bars = [a["width"] for a in page.all("rect") if a["class"] == "fill"]
    assert bars == ["50.0%"]


def test_the_way_back_to_the_input_is_drawn_by_share() -> None:
    page = Page(report.render(designed()))
    assert (
        "input conv1 Conv2d 48% of 3,072 conv2 Conv2d 99% of 4,704 block.conv3 Conv2d not known whole network Linear "
        "100% of 100 gradient"
    ) in page.text
    boxes = [a for a in page.all("li") if a.get("class", "").startswith("layer")]
    assert [a.get("style") for a in boxes] == ["--share: 48.0%", "--share: 100.0%", None, "--share: 100.0%"]
    assert [a["title"] for a in boxes] == [f"{name} in words" for name in ("conv1", "conv2", "block.conv3", "")]
    assert [a["width"] for a in page.all("rect") if a["class"] == "share"] == ["48.0%", "100.0%", "100.0%"]
    said = [a["aria-label"] for a in page.all("svg") if "of its input determined" in a.get("aria-label", "")]
    assert said == [
        "conv1: 48% of its input determined",
        "conv2: 99% of its input determined",
        "whole network: 100% of its input determined",
    ]
    assert "The way back" not in Page(report.render(exact())).text


def test_changes_that_would_make_it_safer_stand_in_one_table() -> None:
    page = Page(report.render(designed()))
    assert page.row("change") == ["change", "c(M)", "share determined", "price"]
    assert page.row("conv1 at stride 2")[1:3] == ["−12,596", "0.25"]
    assert page.row("conv2 at stride 2")[1:] == ["−1,502", "not counted", "Parameters 48,777 -> 12,327."]
    assert "c(M) −1,470 of the network as it is" in page.text
    assert "c(M): conv1" not in page.text
    assert "with one thing changed" not in Page(report.render(exact())).text


def test_the_way_by_an_inner_layer_stands_beside_the_way_back() -> None:
    text = Page(report.render(designed())).text
    way, inner, risk, numbers = (
        text.index(words)
        for words in ("The way back", "The way by an inner layer", "set of equations on what", "Numbers about")
    )
    assert way < inner < risk < numbers
    assert text.count("examples told apart 32 at 'conv2'") == 1
    assert "The way by an inner layer" not in Page(report.render(exact())).text


def test_obstacles_are_told() -> None:
    page = Page(report.render(nothing_ran()))
    why = page.row("bias-ratio", "0", "not applicable")
    assert why[3] == "there is no dense layer Missing: labels."
    assert page.row("matching", "0", "failed")[3] == "RuntimeError: too big"
    assert "Every attack that was asked for ran" not in page.text


def test_a_layer_of_which_all_was_recovered_is_taken() -> None:
    case = unbatch.cases.Digits(width=32, batch=2)
    exact_one = unbatch.audit(case, attacks="unmix", analyses="gradient-rank")
    page = Page(report.render(exact_one))
    assert len(exact_one.recovered()) == 2
    assert all(page.row(f"{r.layer} {r.kind}, gradient-rank")[1] == "taken" for r in exact_one.risks)
    guessed = unbatch.audit(case, attacks="label-count", analyses="gradient-rank")
    page = Page(report.render(guessed))
    assert all(page.row(f"{r.layer} {r.kind}, gradient-rank")[1] == "partial" for r in guessed.risks)


def test_table_rows_stand_side_by_side() -> None:
    audit = table()
    page = Page(report.render(audit))
    assert not page.all("img")
    cards = report.groups(audit)[0][1]
    assert cards[1].fields == [("age", "50", "50"), ("pay", "-1", "-2")]
    assert len(page.all("mark")) == 1, "the one value that is off is marked"
    assert page.row("age", "28") == ["age", "28", "not recovered"]
    assert "l2-error 0.2 chance 1.1" in page.text


def test_captured_update_shows_residual_and_bound() -> None:
    page = Page(report.render(captured()))
    assert len(page.all("img")) == 2
    assert "residual 3.3 × 10⁻⁵ error at most 4.0 × 10⁻⁶" in page.text
    assert "error at most no claim" in page.text
    assert "the update points uphill" in page.text
    assert "no original" in page.text


def test_guidance_fits_what_was_found() -> None:
    found, missed = Page(report.render(exact())).text, Page(report.render(not_recovered())).text
    assert "A failed attack proves little" in missed
    assert "A failed attack proves little" not in found
    assert "Check the model that arrives" not in found
    active = run("imprint", [example(0, 20.0, 0.3)], threat_model="malicious server (chooses the parameters)")
    audit = an_audit(protocol="4 local steps of sgd", runs=[active])
    text = Page(report.render(audit)).text
    assert "Check the model that arrives" in text
    assert "Several local steps" not in text
    assert "General guidance, not measured here" in text


def test_features_are_not_counted_as_recovered() -> None:
    page = Page(report.render(features()))
    assert "exact input features of layer 3.fc were recovered for 1 example." in page.text
    assert "features of 3.fc" in page.row("0", "0")[2]
    assert [heading for heading, _ in report.groups(features())] == [""]


def test_strangers_words_stay_words() -> None:
    text = report.render(hostile())
    assert text.count("<script") == 1
    assert "<!--" not in text
    page = Page(text)
    assert " ".join(EVIL.split()) in page.text
    assert not page.all("img"), "an address is no picture"
    assert "http://tracker.test/a.png" in page.text
    assert json.loads(page.script)["case"] == EVIL


def test_command_line() -> None:
    audit = an_audit(
        defences=["noise:sigma=0.1"],
        seeds=[0, 3],
        budget=60.0,
        protocol="2 local steps of sgd",
        knowledge={"local_steps": "2", "mode": "eval", "labels": "[1]"},
        remedies=[Remedy(defence="prune:share=0.9", recovered=0, size=2)],
    )
    assert report.command(audit) == (
        "unbatch audit photos:batch=2 --attack bias-ratio --defence noise:sigma=0.1 --remedy prune:share=0.9 --seed 0 "
        "--seed 3 --protocol local_steps=2,mode=eval --knows labels --budget 60"
    )
    assert report.command(captured()) == ""
    assert report.command(an_audit(case="mine:net on data.npz")) == ""
    assert report.command(an_audit(environment={"command": "unbatch demo"})) == "unbatch demo"


def test_write_is_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "report.html"
    report.write(exact(), path)
    assert path.read_text(encoding="utf-8") == report.render(exact())
    with pytest.raises(ValueError, match="cannot write"):
        report.write(exact(), path / "below-a-file.html")


def test_imports_no_torch() -> None:
    code = (
        "import sys, unbatch.reporting.html; print(sorted(m for m in ('torch', 'numpy', 'scipy') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@every
def test_a_notebook_shows_a_summary_that_stands_alone(audit: Audit) -> None:
    text = audit._repr_html_()
    assert len(text) < 20_000
    page = Page(text)
    assert not page.open
    assert " ".join(audit.verdict().split()) in page.text
    for tag, attributes in page.elements:
        assert tag not in ("link", "script", "style", "iframe", "object", "embed", "base", "form", "html", "body")
        assert not any(key.startswith("on") for key in attributes)
        assert attributes.get("src", report.PNG).startswith(report.PNG)
    assert all(flag.name in text for flag in audit.flags if flag.name != EVIL)
    assert 'audit.to_html("report.html")' in page.text


def test_a_summary_shows_examples_scores_and_chance() -> None:
    page = Page(exact()._repr_html_())
    assert len(page.all("img")) == 4
    assert page.row("client 0, example 0")[3:] == [
        "131.0 dB", "11.5 dB", "recovered exactly, certified to 3.0 × 10⁻⁷", "bias-ratio"
    ]  # fmt: skip
    client = exact().clients[0].model_copy(update={"size": 30})
    text = Page(exact().model_copy(update={"clients": [client]})._repr_html_()).text
    assert f"{30 - report.MOST} more in the report." in text


@every
def test_to_html_writes_the_report_for_its_owner(audit: Audit, tmp_path: Path) -> None:
    path = audit.to_html(tmp_path / "new" / "report.html")
    assert path.read_text(encoding="utf-8") == report.render(audit)
    assert path.stat().st_mode & 0o777 == 0o600
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
@pytest.mark.parametrize("make", [exact, not_recovered, table, hostile, designed], ids=lambda make: str(make.__name__))
def test_in_a_browser(make: Any, tmp_path: Path) -> None:
    page = report.render(make())
    seen = probe(page, tmp_path, width=360)
    assert seen["view"] == 360
    assert seen["width"] <= 360, "the page does not scroll sideways on a phone"
    assert len(seen["images"]) == len(Page(page).all("img"))
    assert all(natural > 0 and height > 0 and shown > 40 for natural, height, shown in seen["images"])
    assert all(name.startswith("data:") for name in seen["requests"]), seen["requests"]
    assert " ".join(seen["headline"].split()) == make().verdict()


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_print_cuts_no_picture_and_loses_none(tmp_path: Path) -> None:
    pdfium = pytest.importorskip("pypdfium2")
    page = report.render(many_pictures())
    document = pdfium.PdfDocument(printed(page, tmp_path))
    boxes = list[tuple[float, float, float, float]]()
    for sheet in document:
        width, height = sheet.get_size()
        own = [thing.get_bounds() for thing in sheet.get_objects(filter=[pdfium.raw.FPDF_PAGEOBJ_IMAGE])]
        for left, bottom, right, top in own:
            assert left >= 0, "cut at the edge"
            assert bottom >= 0, "cut at the edge"
            assert right <= width, "cut at the edge"
            assert top <= height, "cut at the edge"
        boxes += own
        text = sheet.get_textpage().get_text_bounded()
        heads, ends = (
            len(re.findall(r"example \d+", text)),
            len(re.findall(r"\bby\s+", text.partition("Every score")[0])),
        )
        if heads or own:
            assert heads == len(own) // 3 == ends, "a card begins, shows its pictures and ends on one sheet"
    assert len(document) > 2
    assert len(boxes) == len(Page(page).all("img")), "a picture that two sheets share is drawn on both"


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_print_cuts_no_words_of_a_wide_table(tmp_path: Path) -> None:
    pdfium = pytest.importorskip("pypdfium2")
    document = pdfium.PdfDocument(printed(report.render(many_metrics()), tmp_path))
    edges = [
        (thing.get_bounds()[2], sheet.get_size()[0])
        for sheet in document
        for thing in sheet.get_objects(filter=[pdfium.raw.FPDF_PAGEOBJ_TEXT])
    ]
    assert len(edges) > 100
    assert max(right / width for right, width in edges) < 0.95, "the margin is 0.4 of 8.5 inches"


def many_metrics() -> Audit:
    """What all metrics of pictures say of exact recoveries, and of labels alone, which they do not score."""
    audit = exact()
    names = ["psnr", "l2-error", "label-accuracy", "relative-leakage", "ssim"]
    held = [run.model_copy(update={"examples": [_scored(e, names) for e in run.examples]}) for run in audit.runs]
    labels = held[0].model_copy(
        update={"attack": "label-count", "examples": [e.model_copy(update={"scores": {}}) for e in held[0].examples]}
    )
    metrics = dict.fromkeys(names, audit.metrics["psnr"])
    return audit.model_copy(update={"metrics": metrics, "runs": [*held, labels]})


def _scored(example: Any, names: list[str]) -> Any:
    told = {"scores": dict.fromkeys(names, 152.52), "chance": dict.fromkeys(names, 0.003751), "bound": 1.8e-4}
    return example.model_copy(update=told)


def many_pictures() -> Audit:
    """Exact recoveries enough for several sheets."""
    audit = exact()
    client, run = audit.clients[0], audit.runs[0]
    n = 20
    client = client.model_copy(update={"size": n, "pictures": client.pictures[:1] * n, "labels": ["7"] * n})
    examples = [run.examples[0].model_copy(update={"index": i}) for i in range(n)]
    return audit.model_copy(update={"clients": [client], "runs": [run.model_copy(update={"examples": examples})]})


def test_who_and_which_update_stand_in_the_report() -> None:
    audit = exact()
    client = audit.clients[0].model_copy(update={"update_hash": "ab12" * 16})
    shown = audit.model_copy(update={"clients": [client], "environment": {"audited by": "A. Reviewer"}})
    page = report.render(shown)
    assert "ab12" * 16 in page
    assert "A. Reviewer" in page


def test_the_appendix_can_be_left_out() -> None:
    assert "MEASURE 2.10" in report.render(exact())
    without = report.render(exact(), appendix=False)
    assert "MEASURE 2.10" not in without
    assert "#controls" not in without
    assert '<h2 id="h-limits">' in without
