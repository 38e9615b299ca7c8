"""The bag of a batch's tokens: shown by the audit where the sentences are refused, and held against the truth."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

import unbatch
from unbatch import Analysis, Knowledge
from unbatch.analysis import TOKENS_PROVEN
from unbatch.errors import NotApplicable
from unbatch.models.transformer import build_transformer
from unbatch.observation import Observation
from unbatch.reporting.html import render

CROWDED = "text:batch=24,width=64,depth=1,heads=2,length=8,frozen=true,vocabulary=40"


def sent(n: int, words: int, **more: Any) -> tuple[Observation, torch.Tensor]:
    """What the server sees of n sentences of 8 tokens out of so many words, behind a decoder of width 64."""
    r = torch.Generator().manual_seed(0)
    model = build_transformer("gpt", 8, 200, 3, **({"depth": 1, "width": 64, "heads": 4} | more), rng=r)
    x = torch.randint(1, words, (n, 8), generator=r)
    known = Knowledge(padding=0, input_range=(0, 199))
    return unbatch.observe(model, F.cross_entropy, x, torch.arange(n) % 3, knowledge=known)[0], x


def test_an_audit_shows_the_words_where_the_sentences_are_refused() -> None:
    audit = unbatch.audit(unbatch.Case.parse(CROWDED), attacks="token-span", analyses="token-bag")
    assert audit.runs[0].status == "not applicable"
    said = {verdict.name: verdict for verdict in audit.verdicts}
    bag = said[TOKENS_PROVEN]
    assert bag.value == len(bag.tokens) == len(bag.pieces) > 20
    assert said["bag recall"].value == said["bag precision"].value == 1
    assert not [flag for flag in audit.flags if flag.name == "exact-claim-fails"]
    html = render(audit)
    assert all(f"<code>{piece}</code>" in html for piece in bag.pieces if piece.isalpha())
    assert unbatch.reporting.results.Audit.model_validate_json(audit.model_dump_json()).verdicts == audit.verdicts


def test_a_bag_that_holds_another_token_than_the_batch_is_flagged(monkeypatch: pytest.MonkeyPatch) -> None:
    real = unbatch.analyses.TokenBag.run

    def wrong(self: Any, view: Any, at: Any, rng: Any) -> Any:
        first, *rest = real(self, view, at, rng)
        return [first.model_copy(update={"tokens": [*first.tokens[1:], 0]}), *rest]

    monkeypatch.setattr(unbatch.analyses.TokenBag, "run", wrong)
    audit = unbatch.audit(unbatch.Case.parse(CROWDED), attacks=(), analyses="token-bag")
    said = {verdict.name: verdict.value for verdict in audit.verdicts}
    assert said["bag recall"] < 1
    assert "token-bag" in next(flag.words for flag in audit.flags if flag.name == "exact-claim-fails")


def test_a_full_span_leaves_the_embeddings_rows() -> None:
    obs, x = sent(40, 120)
    only = Analysis.parse("token-bag")(obs)[0]
    assert only.name == TOKENS_PROVEN
    assert set(only.tokens) == set(x.flatten().tolist())
    assert "rows of 'tokens.weight'" in only.words
    frozen = {name: u for name, u in obs.update.items() if name not in ("tokens.weight", "positions.weight")}
    with pytest.raises(NotApplicable, match="too many different tokens"):
        Analysis.parse("token-bag")(Observation(model=obs.model, loss=obs.loss, update=frozen, knowledge=obs.knowledge))


def test_where_positions_do_not_enter_there_are_words_and_no_places() -> None:
    obs, x = sent(3, 120, positions="rotary")
    (only,) = Analysis.parse("token-bag")(obs)
    assert only.name == TOKENS_PROVEN
    assert set(only.tokens) == set(x.flatten().tolist())


def test_pictures_have_no_tokens() -> None:
    with pytest.raises(NotApplicable, match="no tokens"):
        Analysis.parse("token-bag")(unbatch.observe(*settings())[0])


def settings() -> tuple[Any, ...]:
    client = unbatch.Case.parse("digits:batch=1,width=8").setting()
    return client.model, client.loss, client.inputs, client.labels
