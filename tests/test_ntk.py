"""ntk: training examples out of a change of weights, where training was linear in them; and what it refuses."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import unbatch
from unbatch import Attack, Case, Knowledge, NotApplicable, Observation, Truth, UnbatchError, observe
from unbatch.inversion.claims import judged
from unbatch.inversion.linearised import as_one_step, duals_of
from unbatch.inversion.view import View
from unbatch.network.tangent import TangentMap
from unbatch.training import Training, trained

LAZY = "trained:batch=4,width=60,steps=100,start=1,method=linearised,threat=start"


def release(spec: str) -> tuple[Observation, Truth]:
    client = Case.parse(spec).setting()
    told = client.domain.public() | client.knowledge
    return observe(client.model, client.loss, client.inputs, client.labels, knowledge=told, training=client.training)


def errors(found: unbatch.Reconstruction, truth: Truth) -> list[float]:
    """The relative distance of each example from the nearest answer."""
    assert found.inputs is not None
    true, got = truth.inputs.double().flatten(1), found.inputs.double().flatten(1)
    return (torch.cdist(true, got).amin(1) / true.norm(dim=1)).tolist()


@pytest.mark.parametrize(
    "rules",
    [
        "task=binary,momentum=0.9",
        pytest.param("task=classes", marks=pytest.mark.slow),
        pytest.param("task=regression", marks=pytest.mark.slow),
        pytest.param("task=binary,depth=2,centred=true", marks=pytest.mark.slow),
    ],
)
def test_every_example_of_a_linearised_training_is_recovered_and_certified(rules: str) -> None:
    seen, truth = release(f"{LAZY},{rules}")
    found = Attack.parse("ntk")(seen)
    assert found.bound is not None
    assert len(found) == 4
    assert max(errors(found, truth)) <= float(found.bound.max()) < 1e-8
    assert found.trace["left of the change"] < 1e-11


def test_the_signs_of_the_duals_are_the_labels_under_the_logistic_loss() -> None:
    seen, truth = release(f"{LAZY},task=binary")
    found = Attack.parse("ntk")(seen)
    which = torch.cdist(found.inputs.double().flatten(1), truth.inputs.double().flatten(1)).argmin(1)
    assert torch.equal(torch.tensor(found.trace["duals"])[:, 0] > 0, truth.labels[which].bool())


def test_a_training_of_the_network_itself_is_no_such_sum_and_nothing_is_claimed() -> None:
    seen, truth = release(f"{LAZY.replace('linearised', 'sgd')},task=binary")
    with pytest.raises(NotApplicable, match="stayed linear"):
        Attack.parse("ntk")(seen)
    claim = unbatch.Reconstruction(inputs=truth.inputs, bound=torch.full((4,), 1e-6))
    ruled = judged(View.of(seen), claim)
    assert not bool(ruled.bound.isfinite().any())
    assert "of the change of the weights" in ruled.trace["withdrawn"]


@pytest.mark.parametrize("change", ["scaled", "mixed", "fewer", "narrow"])
def test_the_second_judge_withdraws_what_does_not_move_the_weights_so(change: str) -> None:
    seen, _ = release(f"{LAZY},task=regression")
    found = Attack.parse("ntk")(seen)
    x = found.inputs
    wrong = {
        "scaled": replace(found, inputs=x * 1.001),
        "mixed": replace(found, inputs=torch.cat([0.9 * x[:1] + 0.1 * x[1:2], x[1:]])),
        "fewer": replace(found, inputs=x[:3], bound=found.bound[:3]),
        "narrow": replace(found, inputs=x + 1e-7 * torch.ones_like(x), bound=torch.full((4,), 1e-13).double()),
    }[change]
    assert bool(judged(View.of(seen), found).bound.isfinite().all())
    assert not bool(judged(View.of(seen), wrong).bound.isfinite().any())


def test_weight_decay_and_weights_that_did_not_move_are_refused() -> None:
    seen, _ = release(f"{LAZY},task=regression")
    decayed = seen.knowledge | Knowledge(recipe={"weight_decay": 0.01})
    with pytest.raises(NotApplicable, match="weight decay"):
        Attack.parse("ntk")(replace(seen, knowledge=decayed))
    still = seen.knowledge | Knowledge(initial=dict(seen.model.named_parameters()))
    with pytest.raises(NotApplicable, match="as they were"):
        Attack.parse("ntk")(replace(seen, knowledge=still))


def test_the_linearised_training_of_a_linear_model_is_its_training() -> None:
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(5, 3, generator=rng).double(), torch.randn(5, 2, generator=rng).double()
    model = nn.Linear(3, 2).double()
    rules = {"steps": 30, "learning_rate": 0.1, "momentum": 0.5}
    same = (trained(model, nn.functional.mse_loss, x, y, Training(method=m, **rules)) for m in ("linearised", "sgd"))
    for one, other in zip(*(each.parameters() for each in same), strict=True):
        assert torch.allclose(one, other, atol=1e-12)
    with pytest.raises(UnbatchError, match="no weight decay"):
        trained(model, nn.functional.mse_loss, x, y, Training(method="linearised", weight_decay=0.1))


def test_the_kernel_is_that_of_the_gradients() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.randn(3, 3, generator=torch.Generator().manual_seed(1)).double()
    tangent = TangentMap.of(model, x)
    outputs = model(x).flatten()
    rows = torch.stack(
        [
            torch.cat([g.flatten() for g in torch.autograd.grad(o, list(model.parameters()), retain_graph=True)])
            for o in outputs
        ]
    )
    assert torch.allclose(tangent.kernel(), rows @ rows.T)


def test_the_duals_are_those_of_the_training_where_the_examples_are_right() -> None:
    seen, truth = release(f"{LAZY},task=regression")
    step = as_one_step(View.of(seen))
    assert duals_of(step, truth.inputs)[1] < 1e-12
    assert duals_of(step, truth.inputs.flip(-1))[1] > 0.01
