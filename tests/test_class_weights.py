"""Under losses with class weights attacks read what they read without: each example counts by its own label's weight."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unbatch
from unbatch import Case, Protocol

WEIGHTS = 0.2 + torch.rand(10, generator=torch.Generator().manual_seed(0))
Loss = Callable[[Tensor, Tensor], Tensor]
LOSSES: dict[str, Loss] = {
    "mean over weights": nn.CrossEntropyLoss(weight=WEIGHTS),
    "sum": nn.CrossEntropyLoss(weight=WEIGHTS, reduction="sum"),
    "mean over rows": lambda o, y: F.cross_entropy(o, y, weight=WEIGHTS.to(o), reduction="none").mean(),
}


@pytest.mark.parametrize(
    "name", ["mean over weights", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sum", "mean over rows"))]
)
@pytest.mark.parametrize("protocol", [Protocol(), Protocol(local_steps=3, learning_rate=0.1)], ids=str)
def test_matching_counts_the_labels_and_recovers_the_batch(name: str, protocol: Protocol) -> None:
    s = Case.parse("digits:batch=4,activation=gelu,width=100").setting()
    known = s.domain.public()
    seen, truth = unbatch.observe(s.model, LOSSES[name], s.inputs, s.labels, knowledge=known, protocol=protocol)
    audit = unbatch.audit(seen, truth=truth, attacks=["gradient-matching"], analyses=())
    assert {index for _, index in audit.recovered()} == {0, 1, 2, 3}
    assert all(each.scores["label-accuracy"] == 1 for each in audit.runs[0].examples)


@pytest.mark.parametrize("name", LOSSES)
def test_unmix_and_label_count_are_as_exact_as_without_weights(name: str) -> None:
    s = Case.parse("digits:batch=3,activation=gelu,width=64").setting()
    seen, truth = unbatch.observe(s.model, LOSSES[name], s.inputs, s.labels, knowledge=s.domain.public())
    audit = unbatch.audit(seen, truth=truth, attacks=["unmix", "label-count"], analyses=())
    assert {index for _, index in audit.recovered()} == {0, 1, 2}
    labels = {run.attack: [each.scores["label-accuracy"] for each in run.examples] for run in audit.runs}
    assert labels == {"unmix": [1, 1, 1], "label-count": [1, 1, 1]}
