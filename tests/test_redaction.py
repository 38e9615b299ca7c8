"""An audit without its private examples: nothing of them is left, and nothing else is lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from audits import AUDITS
from torch.nn import functional as F

import unbatch
from unbatch import Knowledge
from unbatch.command.cli import main
from unbatch.models.transformer import build_transformer
from unbatch.reporting import html
from unbatch.reporting.redaction import ANOTHER, WITHHELD, redacted
from unbatch.reporting.results import Audit, Example


@pytest.mark.parametrize("audit", [make() for make in AUDITS], ids=[make.__name__ for make in AUDITS])
def test_scores_and_verdict_stay_and_pictures_go(audit: Audit) -> None:
    shown = redacted(audit)
    assert shown.verdict() == audit.verdict()
    assert shown.counts == audit.counts
    assert [e.scores for run in shown.runs for e in run.examples] == [
        e.scores for run in audit.runs for e in run.examples
    ]
    page = html.render(shown)
    for run in audit.runs:
        for e in run.examples:
            assert not e.picture or html.Markup.escape(e.picture) not in page
    for client in audit.clients:
        assert not any(picture in page for picture in client.pictures if picture)
    assert "This page holds private examples" not in page
    assert "were left out of this page" in page


def test_it_is_the_same_once_more_and_read_back() -> None:
    for make in AUDITS:
        once = redacted(make())
        assert redacted(once) == once
        again = Audit.model_validate_json(once.model_dump_json())
        assert (again.outcome, again.counts, again.private) == (once.outcome, once.counts, False)


def test_whether_a_label_was_right_stays() -> None:
    audit = unbatch.audit(unbatch.cases.Digits(batch=2, width=16), attacks="label-count", analyses=())
    run = audit.runs[0]
    own = audit.clients[0].labels
    wrong = Example(index=0, label="none of these")
    right = Example(index=1, label=own[1])
    shown = redacted(audit.model_copy(update={"runs": [run.model_copy(update={"examples": [wrong, right]})]}))
    assert [e.label for e in shown.runs[0].examples] == [ANOTHER, WITHHELD]


def test_no_word_of_a_text_is_left() -> None:
    rng = torch.Generator().manual_seed(0)
    model = build_transformer("gpt", 8, 60, 3, depth=1, width=64, heads=4, rng=rng)
    x, y = torch.randint(1, 60, (2, 8), generator=rng), torch.tensor([0, 2])
    seen, truth = unbatch.observe(
        model, F.cross_entropy, x, y, knowledge=Knowledge(padding=0, input_range=(0, 59), labels=y)
    )
    audit = unbatch.audit(seen, truth=truth, attacks="token-span", analyses=["token-bag"])
    assert audit.outcome == "exact"
    assert any(verdict.tokens for verdict in audit.verdicts)
    shown = json.loads(redacted(audit).model_dump_json())
    assert not any(run["trace"] for run in shown["runs"])
    assert not any(verdict["tokens"] or verdict["pieces"] for verdict in shown["verdicts"])
    assert shown["knowledge"]["labels"] == WITHHELD
    assert all(not client["pieces"] and set(client["labels"]) == {WITHHELD} for client in shown["clients"])


def unbatch_(*words: object) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    return int(end.value.code or 0)


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    audit = ["audit", "digits:width=16", "--attack", "bias-ratio", "--analysis", "gradient-rank", "--quiet"]
    folder = tmp_path / "a"
    assert unbatch_(*audit, "--out", folder, "--no-private", "--auditor", "A. Reviewer") == 0
    record = Audit.load(folder / "audit.json")
    assert not record.private
    assert record.environment["audited by"] == "A. Reviewer"
    assert record.clients[0].update_hash
    assert "data:image" not in (folder / "report.html").read_text(encoding="utf-8")
    capsys.readouterr()
    assert unbatch_(*audit, "--out", folder, "--resume") == 2
    assert "scores alone" in capsys.readouterr().err
    assert unbatch_(*audit, "--out", tmp_path / "b", "--no-private", "--save-images", tmp_path / "c") == 2
    assert "give one of them" in capsys.readouterr().err


def test_report_for_a_reviewer_of_a_whole_audit(tmp_path: Path) -> None:
    audit = unbatch.audit(unbatch.cases.Digits(width=16), attacks="bias-ratio", analyses=())
    audit.save(tmp_path / "audit.json")
    target = tmp_path / "shown.html"
    assert unbatch_("report", tmp_path / "audit.json", "--out", target, "--no-private", "--no-appendix") == 0
    page = target.read_text(encoding="utf-8")
    assert "data:image" not in page
    assert "MEASURE" not in page
