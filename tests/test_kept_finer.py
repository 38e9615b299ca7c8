"""Updates kept in a finer type than the one they were rounded to, and attacks that meet what they cannot run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unbatch
from unbatch.reporting.tiers import Outcome
from unbatch.update import as_rounded


@pytest.fixture
def net() -> nn.Sequential:
    torch.manual_seed(12)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 40), nn.ReLU(), nn.Linear(40, 6))


@pytest.fixture
def x(net: nn.Sequential) -> Tensor:
    return torch.rand(3, 1, 6, 6)


Y = torch.tensor([1, 4, 2])


def gradient(net: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    value = F.cross_entropy(net(x), y)
    return dict(zip(dict(net.named_parameters()), torch.autograd.grad(value, list(net.parameters())), strict=True))


def captured(net: nn.Module, update: dict[str, Tensor], n: int) -> unbatch.Observation:
    known = unbatch.Knowledge(input_shape=(1, 6, 6), batch_size=n)
    return unbatch.Observation(model=net, loss=F.cross_entropy, update=update, knowledge=known)


@pytest.mark.parametrize(
    ("sent", "kept", "outcome"),
    [
        (torch.float32, torch.float64, Outcome.EXACT),
        (torch.float16, torch.float32, Outcome.COPY),
        (torch.float16, torch.float64, Outcome.COPY),
    ],
)
def test_what_an_update_is_kept_in_changes_nothing(
    net: nn.Sequential, x: Tensor, sent: torch.dtype, kept: torch.dtype, outcome: Outcome
) -> None:
    update = {name: u.to(sent) for name, u in gradient(net, x[:2], Y[:2]).items()}
    finer = {name: u.to(kept) for name, u in update.items()}
    ways = [unbatch.audit(captured(net, each, 2), attacks="unmix", analyses=()) for each in (update, finer)]
    assert [way.outcome for way in ways] == [outcome, outcome]
    assert ways[0].headline == ways[1].headline


def test_bfloat16_kept_in_float32_is_explained(net: nn.Sequential, x: Tensor) -> None:
    update = {name: u.bfloat16().float() for name, u in gradient(net, x[:2], Y[:2]).items()}
    audit = unbatch.audit(captured(net, update, 2), attacks="gradient-matching", analyses=(), budget=20)
    assert audit.outcome is Outcome.EXPLAINED


def test_numbers_that_no_coarser_type_holds_and_few_different_ones_stay(net: nn.Sequential, x: Tensor) -> None:
    update = gradient(net, x, Y)
    few = {name: u.sign() for name, u in update.items()}
    mixed = {name: u.double() if "bias" in name else u for name, u in update.items()}
    for each in (update, few, mixed):
        found = as_rounded(each)
        assert all(found[name].dtype == u.dtype and torch.equal(found[name], u) for name, u in each.items())


def test_more_claims_than_the_batch_has_examples_are_refused_in_words(net: nn.Sequential, x: Tensor) -> None:
    old, new = gradient(net, x[2:], Y[2:]), gradient(net, x[:2], Y[:2])
    mean = {name: 0.9 * u + 0.1 * new[name] for name, u in old.items()}  # a running mean of gradients
    found = unbatch.Attack.parse("unmix")(captured(net, mean, 2))
    assert found.bound is not None
    assert not found.bound.isfinite().any()
    assert "more different examples are claimed than the 2 of the batch" in found.trace["withdrawn"]


def test_moments_need_as_many_neurons_as_groups() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(36, 12), nn.Tanh(), nn.Linear(12, 36)), torch.rand(2, 36)
    seen, _ = unbatch.observe(net, F.mse_loss, x, x)
    with pytest.raises(unbatch.NotApplicable, match="12 neurons of '0' are fewer than the 20"):
        unbatch.Attack.parse("tensor-moment")(seen)


def test_a_loss_without_a_second_derivative_is_named(net: nn.Sequential, x: Tensor) -> None:
    seen, _ = unbatch.observe(net, nn.MultiMarginLoss(), x[:1], Y[:1], knowledge=unbatch.Knowledge(labels=Y[:1]))
    with pytest.raises(unbatch.NotApplicable, match="no derivative of multi_margin_loss"):
        unbatch.Attack.parse("gradient-matching")(seen)
