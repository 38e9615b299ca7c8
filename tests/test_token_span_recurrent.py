"""Sentences out of the gradients of recurrent networks, which no code here knows by name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unbatch
from unbatch import Knowledge, Observation
from unbatch.errors import NotApplicable
from unbatch.inversion.claims import judged
from unbatch.inversion.tokens.reading import sentences_read
from unbatch.inversion.view import View
from unbatch.network.precision import outputs_of

LENGTH, VOCABULARY, WIDTH = 6, 40, 48


class NextWord(nn.Module):
    """The next word behind each word, as on a phone's keyboard."""

    def __init__(self, kind: type[nn.RNNBase], layers: int) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(VOCABULARY, 24), nn.Linear(WIDTH, VOCABULARY)
        self.states = kind(24, WIDTH, layers, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.states(self.table(x))[0]).transpose(1, 2)  # type: ignore[no-any-return]


class Classifier(NextWord):
    """A sentence's class, from the last state."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.states(self.table(x))[0][:, -1])[:, :3]  # type: ignore[no-any-return]


def sent(model: nn.Module, *, following: bool) -> tuple[Observation, Tensor, Tensor]:
    r = torch.Generator().manual_seed(0)
    x = torch.randint(VOCABULARY, (3, LENGTH), generator=r)
    y = torch.cat([x[:, 1:], torch.full((3, 1), -100)], 1) if following else torch.tensor([2, 0, 2])
    obs, _ = unbatch.observe(model, F.cross_entropy, x, y, knowledge=Knowledge(domain="tokens", batch_size=3))
    return obs, x, y


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("layers", [1, 2])
def test_a_next_word_network_gives_its_sentences_away(kind: type[nn.RNNBase], layers: int) -> None:
    torch.manual_seed(1)
    obs, x, _ = sent(NextWord(kind, layers), following=True)
    found = judged(View.of(obs), sentences_read(View.of(obs), torch.Generator(), partial=False))
    assert sorted(found.inputs.tolist()) == sorted(x.tolist())
    assert found.bound is not None
    assert found.bound.tolist() == [0, 0, 0]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_classifier_of_two_recurrent_layers_gives_its_sentences_away(kind: type[nn.RNNBase]) -> None:
    torch.manual_seed(1)
    obs, x, y = sent(Classifier(kind, 2), following=False)
    found = judged(View.of(obs), sentences_read(View.of(obs), torch.Generator(), partial=False))
    assert found.labels is not None
    assert found.bound is not None
    assert sorted(zip(found.inputs.tolist(), found.labels.tolist(), strict=True)) == sorted(
        zip(x.tolist(), y.tolist(), strict=True)
    )
    assert found.bound.tolist() == [0, 0, 0]


def test_of_one_recurrent_layer_the_last_state_tells_the_bag_alone() -> None:
    torch.manual_seed(1)
    obs, _, _ = sent(Classifier(nn.LSTM, 1), following=False)
    with pytest.raises(NotApplicable, match="but not the sentences: no layer that sees more than one token sent"):
        sentences_read(View.of(obs), torch.Generator(), partial=False)


def test_recurrent_layers_run_as_single_products_and_leave_the_kernels_as_they_were() -> None:
    before = torch.backends.mkldnn.set_flags(True)[0]  # type: ignore[no-untyped-call]
    outputs_of(NextWord(nn.LSTM, 1), torch.zeros(1, 2, dtype=torch.long), twice=True)
    assert torch.backends.mkldnn.set_flags(before)[0] is True  # type: ignore[no-untyped-call]


def test_more_tokens_told_than_the_table_has_are_no_stand_ins() -> None:
    obs, _, _ = sent(NextWord(nn.LSTM, 1), following=True)
    told = View.of(replace(obs, knowledge=obs.knowledge | Knowledge(input_range=(0, 5 * VOCABULARY))))
    assert int(told.stand_in(50, torch.Generator().manual_seed(0)).max()) == VOCABULARY - 1
