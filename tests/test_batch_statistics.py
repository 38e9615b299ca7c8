"""Batch statistics off running averages: exact after one step, a mixture after several, and a term that pictures feel."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from unbatch.attacks.gradient_matching import GradientMatching
from unbatch.auditing.client import observe
from unbatch.errors import NotApplicable, UnbatchError
from unbatch.inversion.batch_statistics import BatchStatistics, heard_statistics
from unbatch.inversion.matching import InversionTerms, UpdateMatching
from unbatch.inversion.view import View
from unbatch.knowledge import Knowledge
from unbatch.network.batch_norm import step_shares
from unbatch.observation import Observation
from unbatch.protocol import Protocol, buffers_after


def client(
    n: int = 2, *, momentum: float | None = 0.1, dtype: torch.dtype = torch.float64, **how: float
) -> tuple[Observation, Tensor, Tensor]:
    """A client that sends its running averages, its batch and labels."""
    rng = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1, bias=False),
            nn.BatchNorm2d(6, momentum=momentum),
            nn.Tanh(),
            nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(8, momentum=momentum),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(8 * 9, 4),
        ).to(dtype)
    x = torch.rand(n, 1, 6, 6, generator=rng, dtype=torch.float64).to(dtype)
    y = torch.arange(n) % 4
    protocol = Protocol(mode="train", **how)  # type: ignore[arg-type]
    told = Knowledge(labels=y, input_range=(0.0, 1.0), domain="images")
    seen, _ = observe(model, nn.functional.cross_entropy, x, y, protocol=protocol, knowledge=told)
    buffers = buffers_after(model, nn.functional.cross_entropy, x, y, protocol)
    return replace(seen, knowledge=seen.knowledge | Knowledge(buffers=buffers)), x, y


def misfit(seen: Observation, x: Tensor, y: Tensor) -> float:
    with heard_statistics(seen.model) as heard:
        seen.simulate(x, y)
    return float(BatchStatistics.of(seen).misfit(heard).detach())


@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_the_batch_explains_the_running_averages_after_one_step_and_after_several(
    steps: int, momentum: float | None
) -> None:
    how = {"local_steps": steps, "learning_rate": 0.5} if steps else {}
    seen, x, y = client(momentum=momentum, **how)
    assert misfit(seen, x, y) < 1e-11
    assert misfit(seen, 1 - x, y) > 0.1


def test_local_batches_each_count_their_share() -> None:
    seen, x, y = client(4, local_steps=2, local_batch_size=2, learning_rate=0.5)
    assert misfit(seen, x, y) < 1e-11
    assert misfit(seen, x[[2, 3, 0, 1]], y[[2, 3, 0, 1]]) > 1e-3  # the last step counts more


def test_shares_are_those_of_the_recursion() -> None:
    average, steps = 2.0, [5.0, -1.0, 4.0]
    for value in steps:
        average = 0.7 * average + 0.3 * value
    whole, shares = step_shares(0.3, None, 3)
    assert abs((average - (1 - whole) * 2.0) / whole - sum(s * v for s, v in zip(shares, steps, strict=True))) < 1e-12
    assert abs(sum(shares) - 1) < 1e-12


@pytest.mark.parametrize("terms", [InversionTerms(statistics=0.0), InversionTerms(match=0.0)], ids=["match", "stats"])
def test_each_term_alone_reaches_the_pictures(terms: InversionTerms) -> None:
    """In the authors' code the match is computed from detached values, and has no path to them."""
    seen, _, _ = client()
    alone = replace(terms, variation=0.0, size=0.0)
    search = UpdateMatching(preset="batch-norm-inversion", iterations=8, terms=alone)
    found = list(search.search(View.of(seen), torch.Generator().manual_seed(0)))
    assert min(candidate.loss for candidate in found) < 0.9 * found[0].loss


def test_statistics_and_match_find_a_picture_that_neither_start_nor_chance_is_near() -> None:
    seen, x, _ = client(1)
    found = GradientMatching(preset="batch-norm-inversion", iterations=200)(seen)
    assert found.inputs is not None
    assert float((found.inputs - x).square().mean()) < 0.4 * float((x - 0.5).square().mean())


def test_other_presets_take_the_term_and_say_why_they_cannot() -> None:
    seen, _, _ = client()
    plain, weighed = (
        GradientMatching(preset="inverting-gradients", iterations=10, statistics=weight)(seen) for weight in (0.0, 1.0)
    )
    assert plain.inputs is not None
    assert weighed.inputs is not None
    assert not torch.equal(plain.inputs, weighed.inputs)
    silent = replace(seen, knowledge=seen.knowledge.without("buffers"))
    with pytest.raises(NotApplicable, match="running averages"):
        GradientMatching(preset="batch-norm-inversion")(silent)
    still = replace(seen, knowledge=seen.knowledge | Knowledge(mode="eval"))
    with pytest.raises(NotApplicable, match="eval mode"):
        GradientMatching(preset="inverting-gradients", statistics=0.1)(still)
    longer = replace(seen, knowledge=seen.knowledge | Knowledge(local_steps=2, learning_rate=0.1))
    with pytest.raises(NotApplicable, match="not those after 2 steps"):
        BatchStatistics.of(longer)


@pytest.mark.parametrize("defences", [(), ("local-steps:steps=3,learning_rate=0.5",), ("clip:norm=0.1",)], ids=str)
def test_a_protocol_that_sends_buffers_sends_those_of_the_step_that_was_taken(defences: tuple[str, ...]) -> None:
    plain, x, y = client()
    rules = Protocol(mode="train", sends_buffers=True)
    seen, _ = observe(plain.model, plain.loss, x, y, protocol=rules, defences=defences)
    assert "running averages are sent as well" in str(seen.protocol)
    assert misfit(seen, x, y) < 1e-11
    assert misfit(seen, 1 - x, y) > 0.1


def test_buffers_that_nobody_has_are_not_sent() -> None:
    seen, x, y = client()
    rules = Protocol(mode="train", sends_buffers=True)
    for defence, words in (("secure-aggregation:clients=2", "2 trainings"), ("dp-sgd", "example by example")):
        with pytest.raises(UnbatchError, match=words):
            observe(seen.model, seen.loss, x, y, protocol=rules, defences=defence)
    bare = nn.Sequential(nn.Flatten(), nn.Linear(36, 4)).double()
    with pytest.raises(UnbatchError, match="the model has none"):
        observe(bare, seen.loss, x, y, protocol=rules)
