"""The published searches of `kkt`: their loss, the slope in place of relu's step, and what they choose by it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from unbatch.attacks.kkt import Kkt
from unbatch.auditing.client import observe
from unbatch.case import Case
from unbatch.errors import NotApplicable
from unbatch.inversion.gradient_sum import GradientSum, Sides, gradient_sum_of, without_copies
from unbatch.inversion.view import View
from unbatch.knowledge import Knowledge
from unbatch.numerics.search.smooth_backward import SmoothBackward
from unbatch.observation import Observation
from unbatch.truth import Truth


def released(spec: str) -> tuple[Observation, Truth]:
    client = Case.parse(f"trained:{spec}").setting()
    return observe(client.model, client.loss, client.inputs, client.labels, training=client.training)


def alike(true: Tensor, found: Tensor) -> Tensor:
    a, b = (x.double().flatten(1) - x.double().flatten(1).mean(1, keepdim=True) for x in (true, found))
    found_at: Tensor = (nn.functional.normalize(a) @ nn.functional.normalize(b).T).amax(1)
    return found_at


@pytest.mark.parametrize("sides", ["two classes", "numbers"])
def test_nothing_is_left_of_weights_that_are_the_sum(sides: Sides) -> None:
    """Of a linear model the gradients do not depend on the weights, so that a sum can be written down."""
    rng = torch.Generator().manual_seed(0)
    k = 1 if sides == "two classes" else 3
    x, y = torch.randn(4, 5, generator=rng).double(), torch.tensor([0, 1, 0, 1])
    strengths = torch.rand(4, k, generator=rng).double() + 0.1
    signs = 2 * y[:, None] - 1 if sides == "two classes" else 1
    weight = ((signs * strengths).T @ x).requires_grad_()
    held = GradientSum(nn.Linear(5, k, bias=False).double(), {"weight": weight}, sides, k, 1.0, (5,), (-1.0, 1.0))
    assert float(held.residual(x, y, strengths, 10.0).detach()) < 1e-25
    assert float(held.residual(x + 0.1, y, strengths, 10.0).detach()) > 1e-4
    assert float(held.residual(x, y, 1.1 * strengths, 10.0).detach()) == pytest.approx(0.01)


def test_of_several_classes_it_is_the_own_output_less_the_largest_other() -> None:
    model = nn.Linear(3, 3, bias=False).double()
    held = GradientSum(model, {"weight": torch.eye(3).double()}, "classes", 3, 1.0, (3,), (-1.0, 1.0))
    ahead = held.advantage(torch.tensor([[5.0, 3.0, 4.0], [5.0, 3.0, 4.0]]).double(), torch.tensor([0, 1]))
    assert ahead.tolist() == [[1.0], [-2.0]]


@pytest.mark.parametrize("relu", [torch.relu, nn.functional.relu, nn.ReLU(), nn.ReLU(inplace=True), Tensor.relu])
def test_the_values_are_relu_s_and_the_slope_a_sigmoid_that_has_a_slope(relu) -> None:
    z = torch.linspace(-1, 1, 7, dtype=torch.float64).requires_grad_()
    with SmoothBackward(5.0):
        out = relu(z * 1)
    (slope,) = torch.autograd.grad(out.sum(), z, create_graph=True)
    (bend,) = torch.autograd.grad(slope.sum(), z)
    s = torch.sigmoid(5 * z)
    assert torch.equal(out, z.clamp_min(0))
    assert torch.allclose(slope, s)
    assert torch.allclose(bend, 5 * s * (1 - s))
    assert torch.equal(torch.autograd.grad(torch.relu(z).sum(), z)[0], (z > 0).double())


def test_two_pictures_by_haim_beyond_chance_and_the_least_loss_is_chosen() -> None:
    seen, truth = released("batch=2,width=50,steps=400,centred=true")
    found = Kkt(preset="haim", draws=3, steps=120)(seen)
    assert found.inputs is not None
    assert found.labels is not None
    assert found.bound is None
    assert float(alike(truth.inputs, found.inputs).min()) > 0.8
    losses = found.trace["losses"]
    assert found.trace["chosen"] == losses.index(min(losses))
    assert len(set(losses)) == len(found.trace["settings"]) == 3


@pytest.mark.parametrize(
    "spec",
    [
        "batch=3,width=30,steps=100,centred=true,task=classes",
        "batch=3,width=30,steps=300,centred=true,task=regression,method=sgd,weight_decay=0.05,start=1",
    ],
    ids=["classes", "numbers"],
)
def test_buzaglo_returns_as_many_as_are_told_and_haim_refuses(spec: str) -> None:
    seen, truth = released(spec)
    found = Kkt(preset="buzaglo", draws=2, steps=20)(seen)
    assert found.inputs is not None
    assert found.inputs.shape == truth.inputs.shape
    assert bool(found.inputs.isfinite().all())
    assert all(math.isfinite(loss) for loss in found.trace["losses"])
    with pytest.raises(NotApplicable, match="buzaglo reads"):
        Kkt(preset="haim")(seen)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1, bias=False)), "rectified"),
        (nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1)), "whole power"),
    ],
    ids=["tanh", "bias"],
)
def test_other_networks_are_refused_in_words(model: nn.Module, words: str) -> None:
    known = Knowledge(input_shape=(3,), batch_size=2)
    seen = Observation(model=model.double(), loss=nn.BCEWithLogitsLoss(), update={}, knowledge=known)
    with pytest.raises(NotApplicable, match=words):
        Kkt(preset="buzaglo")(seen)


def test_the_weights_are_rescaled_to_a_margin_near_one_whatever_their_scale() -> None:
    seen, truth = released("batch=4,width=50,steps=400,centred=true")
    outs = list[Tensor]()
    for factor in (1.0, 30.0):
        with torch.no_grad():
            for p in seen.model.parameters():
                p.mul_(factor)
        held = gradient_sum_of(View.of(seen), torch.Generator().manual_seed(0))
        outs.append(held.advantage(truth.inputs.double(), truth.labels.long().flatten()).detach())
    assert torch.allclose(outs[0], outs[1])
    assert 0.1 < float(outs[0].median()) < 10


def test_copies_of_one_class_are_kept_last() -> None:
    z = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.01, 0.0], [0.0, 1.0, 0.0]])
    assert without_copies(z, torch.tensor([3.0, 2.0, 1.0]), torch.tensor([0, 0, 0]), 3) == [0, 2, 1]
    assert without_copies(z, torch.tensor([3.0, 2.0, 1.0]), torch.tensor([0, 1, 0]), 2) == [0, 1]
