"""Two tokens of one embedding: no update tells them apart, so no sentence that holds one is claimed."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import unbatch
from unbatch import Knowledge, NotApplicable, Observation
from unbatch.inversion.claims import judged
from unbatch.inversion.tokens.reading import sentences_read
from unbatch.inversion.view import View
from unbatch.models.transformer import build_transformer

LENGTH, VOCABULARY = 8, 60


def behind_twins(twins: list[int], of: list[int], apart: float, sent: torch.dtype) -> tuple[Observation, torch.Tensor]:
    """Two sentences of tokens 1 to 49 behind frozen embeddings, some of which are twins."""
    rng = torch.Generator().manual_seed(3)
    model = build_transformer("gpt", LENGTH, VOCABULARY, 3, depth=2, width=64, heads=4, rng=rng)
    table = next(m for m in model.modules() if isinstance(m, torch.nn.Embedding) and m.num_embeddings == VOCABULARY)
    with torch.no_grad():
        moved = apart * table.weight.std() * torch.randn(len(twins), table.embedding_dim, generator=rng)
        table.weight[twins] = table.weight[of] + moved
    table.weight.requires_grad_(False)
    inputs = torch.randint(1, 50, (2, LENGTH), generator=rng)
    labels = torch.randint(3, (2,), generator=rng)
    knowledge = Knowledge(padding=0, input_range=(0, VOCABULARY - 1))
    observation, _ = unbatch.observe(model.to(sent), F.cross_entropy, inputs, labels, knowledge=knowledge)
    return observation, inputs


def read(observation: Observation) -> list[list[int]]:
    view = View.of(observation)
    result = judged(view, sentences_read(view, torch.Generator().manual_seed(0), partial=False))
    assert result.inputs is not None
    return sorted(result.inputs.tolist())


@pytest.mark.parametrize("sent", [torch.float32, torch.bfloat16])
def test_a_padded_vocabulary_hides_no_sentence(sent: torch.dtype) -> None:
    observation, inputs = behind_twins(list(range(50, 60)), [50] * 10, 0.0, sent)
    assert read(observation) == sorted(inputs.tolist())


@pytest.mark.parametrize(("apart", "sent"), [(0.0, torch.float64), (1e-6, torch.float32), (1e-3, torch.bfloat16)])
def test_twins_that_rounding_hides_are_not_claimed(apart: float, sent: torch.dtype) -> None:
    observation, _ = behind_twins(list(range(30, 59)), list(range(1, 30)), apart, sent)
    with pytest.raises(NotApplicable, match="any word fits"):
        read(observation)


def test_twins_that_differ_enough_are_told_apart() -> None:
    observation, inputs = behind_twins(list(range(30, 59)), list(range(1, 30)), 1e-3, torch.float32)
    assert read(observation) == sorted(inputs.tolist())
