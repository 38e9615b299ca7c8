"""token-span on models that give each token a label of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import unbatch
from unbatch import Knowledge, Observation
from unbatch.errors import NotApplicable
from unbatch.models.transformer import build_transformer

LENGTH, VOCABULARY, CLASSES, IGNORED = 8, 60, 3, -100


def sent(x: Tensor, y: Tensor, name: Any = "gpt", **more: Any) -> Observation:
    sizes = {"depth": 2, "width": 64, "heads": 4, "reads": "each"} | more
    model = build_transformer(name, LENGTH, VOCABULARY, CLASSES, **sizes, rng=torch.Generator().manual_seed(0))
    known = Knowledge(padding=0, input_range=(0, VOCABULARY - 1))
    return unbatch.observe(model, F.cross_entropy, x, y, knowledge=known)[0]


def batch(n: int) -> tuple[Tensor, Tensor]:
    r = torch.Generator().manual_seed(5)
    return torch.randint(1, VOCABULARY, (n, LENGTH), generator=r), torch.randint(CLASSES, (n, LENGTH), generator=r)


def pairs(x: Tensor, y: Tensor) -> list[list[int]]:
    return sorted(torch.cat([x, y], 1).tolist())


@pytest.mark.parametrize(
    ("name", "more"),
    [("gpt", {}), ("gpt", {"positions": "rotary"}), ("gpt", {"depth": 3, "bias": False}), ("bert", {})],
)
def test_every_token_comes_back_with_its_label(name: str, more: dict[str, Any]) -> None:
    x, y = batch(2)
    y[0, 2] = IGNORED
    if name == "bert":  # padding is seen by none of an encoder's tokens, and has no label
        x[1, 5:], y[1, 5:] = 0, IGNORED
    found = unbatch.attacks.TokenSpan()(sent(x, y, name, **more))
    assert found.inputs is not None
    assert found.labels is not None
    assert found.bound is not None
    assert pairs(found.inputs, found.labels) == pairs(x, y)
    assert bool(found.bound.isfinite().all()), found.trace


def test_sentences_that_begin_alike_and_are_labelled_alike_there_come_back() -> None:
    x, y = batch(2)
    x[1, :3], y[1, :3] = x[0, :3], y[0, :3]
    found = unbatch.attacks.TokenSpan()(sent(x, y))
    assert found.inputs is not None
    assert found.labels is not None
    assert pairs(found.inputs, found.labels) == pairs(x, y)


def test_labels_that_belong_to_either_of_two_sentences_are_not_guessed() -> None:
    x, y = batch(2)
    x[1, :3] = x[0, :3]
    y[0, :3], y[1, :3] = 0, 1
    with pytest.raises(NotApplicable, match="begin alike and are labelled differently"):
        unbatch.attacks.TokenSpan()(sent(x, y))


def test_a_sentence_that_occurs_twice_is_not_taken_for_one() -> None:
    x, y = batch(2)
    with pytest.raises(NotApplicable, match="1 different sentences were found, of 2"):
        unbatch.attacks.TokenSpan()(sent(x[:1].repeat(2, 1), y[:1].repeat(2, 1)))
