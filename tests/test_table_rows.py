"""One sentence by the rows of two tables: whatever the optimiser, the width and the length."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import unbatch
from unbatch import Knowledge, NotApplicable, Observation, Protocol
from unbatch.attacks import TokenSpan
from unbatch.models.transformer import build_transformer

VOCABULARY = 200
STEP = Protocol(local_steps=1, optimiser="adamw", learning_rate=5e-5, weight_decay=0.01)
STEPS = Protocol(local_steps=3, optimiser="adamw", learning_rate=1e-3, weight_decay=0.1)


def sent(
    protocol: Protocol, name: Any = "gpt", *, n: int = 1, length: int = 12, again: int = 0, seed: int = 0, **more: Any
) -> tuple[Observation, Tensor, Tensor]:
    """An exchange of n padded sentences in float32, in which the first two words occur `again` times more each."""
    rng = torch.Generator().manual_seed(seed)
    model = build_transformer(name, length, VOCABULARY, 3, depth=2, width=48, heads=4, rng=rng, **more)
    x = torch.stack([1 + torch.randperm(VOCABULARY - 1, generator=rng)[:length] for _ in range(n)])
    for k in range(2 * again):
        x[:, 3 + k] = x[:, k % 2]
    x[:, -2:] = 0
    y = torch.randint(3, (n,), generator=rng)
    told = Knowledge(padding=0, input_range=(0, VOCABULARY - 1))
    return unbatch.observe(model, F.cross_entropy, x, y, knowledge=told, protocol=protocol)[0], x, y


def without_size(seen: Observation) -> Observation:
    """The same exchange for somebody who does not know how many sentences there are."""
    return seen.only(*(set(seen.knowledge) - {"batch_size"}))


@pytest.mark.parametrize(
    ("protocol", "name", "how"),
    [
        (STEP, "gpt", {}),
        (STEP, "bert", {"again": 1}),
        (STEPS, "gpt", {"again": 1, "reads": "last"}),
        pytest.param(STEP, "gpt", {"again": 2}, marks=pytest.mark.slow),
        (Protocol(), "gpt", {"length": 80, "again": 20}),
    ],
    ids=str,
)
def test_a_sentence_comes_back_with_its_order_and_label(protocol: Protocol, name: str, how: dict[str, Any]) -> None:
    """AdamW leaves signs alone in float32, and 78 words fill every span of width 48."""
    seen, x, y = sent(protocol, name, **how)
    found = TokenSpan()(seen)
    assert "tables" in found.trace["by"]
    assert torch.equal(found.inputs, x)
    assert torch.equal(found.labels, y)
    assert found.bound.tolist() == [0.0]


@pytest.mark.parametrize("size", [None, 2])
def test_the_rows_of_two_sentences_are_sums_and_refused(size: int | None) -> None:
    seen, _, _ = sent(STEP, n=2)
    known = without_size(seen) if size is None else seen
    with pytest.raises(NotApplicable, match=r"any word fits their span|independent directions|tells? that|tell "):
        TokenSpan()(known)


def test_a_step_whose_rows_were_changed_is_not_certified() -> None:
    seen, x, _ = sent(STEP)
    table = seen.update["tokens.weight"].clone()
    table[x[0, 0]], table[x[0, 1]] = seen.update["tokens.weight"][x[0, 1]], seen.update["tokens.weight"][x[0, 0]]
    odd = Observation(
        model=seen.model,
        loss=seen.loss,
        update=seen.update | {"tokens.weight": table},
        knowledge=seen.knowledge,
    )
    try:
        found = TokenSpan()(odd)
    except NotApplicable:
        return
    assert not bool(found.bound.isfinite().any())


@pytest.mark.parametrize("how", [{"positions": "rotary"}, {"tied": True, "reads": "each"}], ids=str)
def test_without_two_tables_it_says_what_spans_say(how: dict[str, Any]) -> None:
    rng = torch.Generator().manual_seed(0)
    outputs = VOCABULARY if how.get("tied") else 3
    model = build_transformer("gpt", 12, VOCABULARY, outputs, depth=2, width=48, heads=4, rng=rng, **how)
    x = torch.randint(1, VOCABULARY, (1, 12), generator=rng)
    y = torch.cat([x[:, 1:], x[:, :1]], 1) if how.get("tied") else torch.tensor([1])
    told = Knowledge(padding=0, input_range=(0, VOCABULARY - 1))
    seen, _ = unbatch.observe(model, F.cross_entropy, x, y, knowledge=told, protocol=STEP)
    with pytest.raises(NotApplicable, match=r"span|independent"):
        TokenSpan()(seen)


@pytest.mark.slow
def test_no_sentence_by_rows_is_false() -> None:
    """At random lengths, steps, models and repetitions; most are certified."""
    made = 0
    for seed in range(40):
        rng = torch.Generator().manual_seed(1000 + seed)
        protocol = (STEP, STEPS, Protocol(local_steps=2, optimiser="adam", learning_rate=1e-3))[seed % 3]
        length, again = int(torch.randint(8, 30, (), generator=rng)), int(torch.randint(0, 3, (), generator=rng))
        name, n = ("gpt", "bert")[seed % 2], 1 + (seed % 5 == 4)
        seen, x, y = sent(protocol, name, n=n, length=length, again=again, seed=seed)
        try:
            found = TokenSpan()(without_size(seen))
        except NotApplicable:
            continue
        sure = found.bound.isfinite()
        made += bool(sure.any())
        truth = set(map(tuple, torch.cat([x, y[:, None]], 1).tolist()))
        claimed = torch.cat([found.inputs, found.labels[:, None]], 1)[sure]
        assert set(map(tuple, claimed.tolist())) <= truth, (seed, found)
    assert made > 25
