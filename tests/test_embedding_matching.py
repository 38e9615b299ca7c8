"""Presets tag and lamp of gradient-matching: sentences by a search over the vectors that a model looks up."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

import unbatch
from unbatch.attacks.gradient_matching import GradientMatching
from unbatch.case import Case
from unbatch.errors import NotApplicable
from unbatch.inversion.tokens.embedding_matching import Bigrams, reordered
from unbatch.knowledge import Knowledge
from unbatch.network.embedded import EmbeddingsFed
from unbatch.observation import Observation

SMALL = "text:batch=1,width=64,depth=1,length=6"


def seen_by(spec: str, **told: object) -> tuple[Observation, Tensor]:
    client = Case.parse(spec).setting()
    known = client.domain.public() | Knowledge(**told)
    obs, truth = unbatch.observe(client.model, client.loss, client.inputs, client.labels, knowledge=known)
    return obs, truth.inputs


@pytest.mark.parametrize("preset", ["tag", "lamp"])
def test_a_sentence_behind_a_tiny_decoder_comes_back_as_a_guess(preset: Literal["tag", "lamp"]) -> None:
    obs, x = seen_by(SMALL)
    found = GradientMatching(preset=preset, iterations=120, starts=20, moves=10)(obs)
    assert found.inputs is not None
    assert float((found.inputs == x)[x != 0].double().mean()) > 0.5  # chance is one of 1,900 words
    assert found.bound is not None
    assert bool(found.bound.isinf().all())
    assert found.labels is not None
    assert found.trace["labels"] == "counted"


def test_vectors_of_the_right_tokens_explain_the_gradient() -> None:
    obs, x = seen_by("text:batch=2,width=16,depth=1")
    table = obs.model.get_parameter("tokens.weight").detach()
    there, labels = x != 0, torch.tensor([0, 1])
    held = torch.where(there, 7, 0)
    with EmbeddingsFed(held, table[x], table.shape):
        fed = obs.simulate(held, labels)
    true = obs.simulate(x, labels)
    assert all(torch.allclose(fed[name], true[name]) for name in true if name != "tokens.weight")
    assert float(fed["tokens.weight"].norm()) == 0


@pytest.mark.parametrize("seed", range(20))
def test_a_move_keeps_every_token_and_the_padding_at_the_ends(seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    batch, lengths = torch.tensor([[1, 2, 3, 0, 0], [4, 5, 6, 7, 8], [9, 0, 0, 0, 0]]), torch.tensor([3, 5, 1])
    moved, after = reordered(batch, lengths, rng)
    assert sorted(moved.flatten().tolist()) == sorted(batch.flatten().tolist())
    assert torch.equal((moved != 0).sum(1), after)
    assert torch.equal((moved != 0), torch.arange(5) < after[:, None])


def test_moves_reorder_and_recombine() -> None:
    batch, lengths = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([3, 3])
    rng = torch.Generator().manual_seed(0)
    found = {tuple(map(tuple, reordered(batch, lengths, rng)[0].tolist())) for _ in range(200)}
    assert {((3, 2, 1), (4, 5, 6)), ((2, 3, 1), (4, 5, 6)), ((1, 5, 6), (4, 2, 3))} <= found


def test_the_prior_finds_the_order_that_texts_have() -> None:
    prior = Bigrams.of(torch.tensor([[5, 6, 7, 0], [5, 6, 8, 0]]), vocabulary=9, padding=0)
    assert prior.surprise([5, 6, 7, 0]) < min(prior.surprise([7, 6, 5, 0]), prior.surprise([6, 5, 7, 0]))


def test_public_sentences_are_the_prior_of_lamp_alone() -> None:
    obs, _ = seen_by(SMALL, public=torch.tensor([[5, 6, 7, 8, 3, 0]]))
    asked = {"iterations": 2, "starts": 1, "moves": 1}
    found = GradientMatching(preset="lamp", **asked)(obs)
    assert found.trace["prior"] == "bigrams of 1 public sentences"
    assert found.bound is not None
    assert bool(found.bound.isinf().all())
    assert GradientMatching(preset="tag", **asked)(obs).trace["prior"] == "none"


def test_what_they_cannot_search_is_said() -> None:
    obs, _ = seen_by(SMALL)
    with pytest.raises(NotApplicable, match="the presets tag and lamp"):
        GradientMatching()(obs)
    steps = replace(obs, knowledge=obs.knowledge | Knowledge(local_steps=3, learning_rate=0.1))
    with pytest.raises(NotApplicable, match="local steps"):
        GradientMatching(preset="tag")(steps)
    words, _ = seen_by(f"{SMALL},task=next")
    with pytest.raises(NotApplicable, match="the labels are unknown"):
        GradientMatching(preset="tag")(words)
    told = Knowledge(input_shape=(4,), batch_size=1)
    model = nn.Linear(4, 3)
    real = Observation(
        model=model,
        loss=nn.functional.cross_entropy,
        update={name: torch.ones_like(p) for name, p in model.named_parameters()},
        knowledge=told,
    )
    with pytest.raises(NotApplicable, match="search for tokens, and the inputs are none"):
        GradientMatching(preset="lamp")(real)
