"""token-span on updates whose examples count unequally (class weights) or that were shortened (clipping)."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unbatch
from unbatch import Case

WEIGHTS = torch.tensor([0.7, 0.97, 0.29, 0.33, 0.51, 0.83])
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "plain": F.cross_entropy,
    "weighted": nn.CrossEntropyLoss(weight=WEIGHTS),
    "weighted sum": nn.CrossEntropyLoss(weight=WEIGHTS, reduction="sum"),
    "weighted by count": lambda o, y: F.cross_entropy(o, y, weight=WEIGHTS.to(o), reduction="none").mean(),
}


@pytest.mark.parametrize("defence", ["", "clip:norm=0.5"])
@pytest.mark.parametrize("name", LOSSES)
def test_sentences_come_back_exactly_whatever_each_counts(name: str, defence: str) -> None:
    s = Case.parse("text:batch=3,width=64,depth=1").setting()
    twice = torch.tensor([0, 1, 2, 2])  # one of them occurs twice
    x, y = s.inputs[twice], s.labels[twice]
    seen, truth = unbatch.observe(s.model, LOSSES[name], x, y, knowledge=s.domain.public(), defences=defence or ())
    audit = unbatch.audit(seen, truth=truth, attacks=["token-span"], analyses=())
    assert {index for _, index in audit.recovered()} == {0, 1, 2, 3}


def test_a_missing_sentence_is_not_made_up_for_by_a_factor() -> None:
    s = Case.parse("text:batch=3,width=64,depth=1").setting()
    seen, _ = unbatch.observe(s.model, s.loss, s.inputs, s.labels, knowledge=s.domain.public())
    other, _ = unbatch.observe(s.model, s.loss, s.inputs[:2], s.labels[:2])
    wrong = {name: tensor - 0.37 * other.update[name] for name, tensor in seen.update.items()}
    told = unbatch.Observation(model=seen.model, loss=s.loss, update=wrong, knowledge=seen.knowledge)
    with pytest.raises(unbatch.NotApplicable, match="do not add up to the gradient"):
        unbatch.attacks.TokenSpan()(told)
