"""Language models whose head sent no gradient of its own: tied to the embedding, or frozen below an adapter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from low_rank import Adapted
from torch import Tensor, nn
from torch.nn import functional as F

import unbatch
from unbatch import Knowledge, Observation, Reconstruction
from unbatch.errors import NotApplicable
from unbatch.inversion.claims import judged
from unbatch.inversion.tokens.reading import sentences_read
from unbatch.inversion.view import View
from unbatch.models.transformer import build_transformer

LENGTH, VOCABULARY, IGNORED = 8, 60, -100


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def language_model(*, tied: bool = True, depth: int = 2, kind: torch.dtype = torch.float32, **more: Any) -> nn.Module:
    sizes = {"depth": depth, "width": 64, "heads": 4, "reads": "each", "tied": tied} | more
    model = build_transformer("gpt", LENGTH, VOCABULARY, VOCABULARY, **sizes, rng=rng()).to(kind)
    with torch.no_grad():  # at unit size it would foretell each token once more, for sure
        model.tokens.weight.mul_(0.1)
    return model


def texts(n: int, seed: int = 0) -> Tensor:
    r = rng(seed)
    x = torch.randint(1, VOCABULARY, (n, LENGTH), generator=r)
    for i in range(n):
        x[i, int(torch.randint(3, LENGTH + 1, (1,), generator=r)) :] = 0
    return x


def following(x: Tensor) -> Tensor:
    after = torch.cat([x[:, 1:], torch.zeros_like(x[:, :1])], 1)
    return after.masked_fill(after == 0, IGNORED)


def sent(model: nn.Module, x: Tensor) -> Observation:
    known = Knowledge(padding=0, input_range=(0, VOCABULARY - 1))
    return unbatch.observe(model, F.cross_entropy, x, following(x), knowledge=known)[0]


def read(obs: Observation) -> Reconstruction:
    view = View.of(obs)
    return judged(view, sentences_read(view, rng(), partial=False))


def sure_of(found: Reconstruction, x: Tensor) -> bool:
    """Whether every sentence came back, as often as it occurs, and is certified."""
    assert found.inputs is not None
    assert found.bound is not None
    assert bool(found.bound.isfinite().all()), found.trace
    return sorted(found.inputs.tolist()) == sorted(x.tolist())


@pytest.mark.parametrize("kind", [torch.float64, torch.float32])
@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_a_head_that_is_tied_to_the_embedding_hides_no_sentence(kind: torch.dtype, positions: str) -> None:
    x = texts(3)
    assert sure_of(read(sent(language_model(kind=kind, positions=positions), x)), x)


def test_sentences_that_occur_twice_or_begin_another_are_counted() -> None:
    x = texts(4)
    x[1] = x[0]
    x[3] = x[2]
    x[3, 3:] = 0  # the beginning of another one, and then a word of its own
    x[3, 3] = 17
    assert sure_of(read(sent(language_model(kind=torch.float64), x)), x)


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("which", [("value",), ("query", "value")])
def test_an_adapter_under_a_frozen_head_gives_sentences_away(started: bool, which: tuple[str, ...]) -> None:
    model: Any = language_model(depth=3).requires_grad_(False)
    for block in model.blocks:
        for name in which:
            setattr(block.attention, name, Adapted(getattr(block.attention, name), 40, started=started))
    x = texts(3)
    obs = sent(model, x)
    assert not any("head" in name or "tokens" in name for name in obs.update)
    assert sure_of(read(obs), x)


def test_another_loss_is_refused_in_words() -> None:
    x, model = texts(2), language_model()
    known = Knowledge(padding=0, input_range=(0, VOCABULARY - 1))
    loss = nn.CrossEntropyLoss(label_smoothing=0.1)
    obs, _ = unbatch.observe(model, loss, x, following(x), knowledge=known)
    with pytest.raises(NotApplicable, match="no cross entropy over next tokens"):
        read(obs)
