"""How much room a gradient has for words and sentences, held against what token-span then finds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from low_rank import Adapted
from torch.nn import functional as F

import unbatch
from unbatch import Analysis, Knowledge
from unbatch.analysis import Verdict
from unbatch.errors import NotApplicable
from unbatch.models.transformer import build_transformer
from unbatch.observation import Observation

LENGTH = 8


def sent(n: int, *, adapter: int = 0, **more: Any) -> Observation:
    r = torch.Generator().manual_seed(0)
    model: Any = build_transformer("gpt", LENGTH, 200, 3, **({"depth": 2, "width": 64, "heads": 4} | more), rng=r)
    model.tokens.requires_grad_(False)
    model.positions.requires_grad_(False)
    if adapter:
        model.requires_grad_(False)
        for block in model.blocks:
            block.attention.value = Adapted(block.attention.value, adapter, started=False)
        model.head.requires_grad_(True)
    x = torch.randint(1, 200, (n, LENGTH), generator=r)
    known = Knowledge(padding=0, input_range=(0, 199))
    return unbatch.observe(model, F.cross_entropy, x, torch.arange(n) % 3, knowledge=known)[0]


def said(obs: Observation) -> dict[str, Any]:
    return {each.name: each for each in Analysis.parse("token-capacity")(obs) if isinstance(each, Verdict)}


def test_the_room_and_how_much_of_it_is_used_are_counted() -> None:
    found = said(sent(3))
    assert found["room for words"].value == 63 - LENGTH + 1
    assert found["room for sentences"].value == 63 // LENGTH
    assert "distinct prefixes 24 of at most 63" in found["room for sentences"].words


def test_more_sentences_than_there_is_room_for_are_said_to_be_open() -> None:
    found = said(sent(12))
    assert "distinct prefixes at least 63 of at most 63" in found["room for sentences"].words
    assert "tells no sentence" in found["room for sentences"].words


def test_an_adapter_of_the_safe_rank_tells_no_word_and_one_a_few_ranks_above_tells_all() -> None:
    safe = int(said(sent(2))["safe adapter rank"].value)
    with pytest.raises(NotApplicable, match="too many different tokens"):
        unbatch.attacks.TokenSpan()(sent(2, adapter=safe))
    found = unbatch.attacks.TokenSpan()(sent(2, adapter=safe + 4))
    assert found.bound is not None
    assert bool(found.bound.isfinite().all())


def test_pictures_have_no_tokens() -> None:
    model = torch.nn.Linear(4, 3)
    obs, _ = unbatch.observe(model, F.cross_entropy, torch.rand(2, 4), torch.tensor([0, 1]))
    with pytest.raises(NotApplicable, match="no tokens"):
        Analysis.parse("token-capacity")(obs)
