import pytest
import torch
from torch import nn
from torch.nn import functional as F

from unbatch import NotApplicable, Observation, Protocol, Truth, observe
from unbatch.attacks import Latch
from unbatch.case import Case
from unbatch.models.small import build
from unbatch.reconstruction import Reconstruction, certified

TRAINING = Protocol(epochs=2, local_batch_size=4, learning_rate=0.05)


def trained(spec: str, share: float, protocol: Protocol = TRAINING) -> tuple[Observation, Truth]:
    s = Case.parse(spec).setting()
    model = Latch(share=share).plant(s.model, torch.Generator().manual_seed(1))
    return observe(model, s.loss, s.inputs, s.labels, protocol=protocol)


def nearest(found: Reconstruction, truth: Truth) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each find the relative error to the nearest private example, and which that is."""
    assert found.inputs is not None
    x, true = found.inputs.double().flatten(1), truth.inputs.double().flatten(1)
    gaps = torch.cdist(x, true, compute_mode="donot_use_mm_for_euclid_dist") / x.norm(dim=1, keepdim=True)
    least = gaps.min(1)
    return least.values, least.indices


@pytest.mark.parametrize("depth", [1, 2])
def test_examples_are_read_off_the_final_weights_of_a_training(depth: int) -> None:
    seen, truth = trained(f"digits:batch=32,width=128,depth={depth}", share=0.01)
    found = certified(Latch()(seen))
    assert found.bound is not None
    assert found.labels is not None
    error, which = nearest(found, truth)
    assert len(set(which.tolist())) == len(found) >= 5
    assert bool((error <= found.bound).all())
    assert float(found.bound.max()) < 1e-4
    assert torch.equal(found.labels, truth.labels[which])


def test_several_examples_in_one_step_are_not_claimed() -> None:
    """All examples of the one step set off the only trap: its weights then hold their sum."""
    rng = torch.Generator().manual_seed(0)
    attack = Latch(units=1, share=0.5)
    model = attack.plant(build("mlp", (20,), 4, width=16, rng=rng), rng)
    w = model.get_parameter("dense1.weight")[0].detach()
    x = torch.rand(2, 20, generator=rng) * 0.1 + 0.5 + w  # both beyond the threshold
    for labels in ([1, 2], [1, 1]):
        seen, _ = observe(model, F.cross_entropy, x, torch.tensor(labels), protocol=Protocol(local_steps=1))
        with pytest.raises(NotApplicable, match="1 moved, and none by one example alone"):
            attack(seen)
    seen, _ = observe(model, F.cross_entropy, x[:1], torch.tensor([1]), protocol=Protocol(local_steps=1))
    found = attack(seen)
    assert found.inputs is not None
    assert torch.allclose(found.inputs, x[:1].double(), atol=1e-5)


def test_a_smaller_last_batch_is_not_taken_for_two_of_a_larger_one() -> None:
    """Two of a batch of four move a trap as one of a last batch of two does: nothing is claimed of such steps."""
    rng = torch.Generator().manual_seed(0)
    attack = Latch(units=1, share=0.5)
    model = attack.plant(build("mlp", (20,), 4, width=16, rng=rng), rng)
    w = model.get_parameter("dense1.weight")[0].detach()
    x = torch.rand(6, 20, generator=rng) * 0.1 + 0.5
    x[:2] += w
    x[2:] -= w
    protocol = Protocol(epochs=1, local_batch_size=4)
    seen, _ = observe(model, F.cross_entropy, x, torch.tensor([1, 1, 2, 3, 1, 2]), protocol=protocol)
    with pytest.raises(NotApplicable, match="1 moved, and none by one example alone"):
        attack(seen)


def test_examples_of_the_class_that_traps_feed_leave_no_trace() -> None:
    rng = torch.Generator().manual_seed(0)
    attack = Latch(units=1, share=0.5, onto=2)
    model = attack.plant(build("mlp", (20,), 4, width=16, rng=rng), rng)
    x = torch.full((1, 20), 0.5) + model.get_parameter("dense1.weight")[0].detach()
    seen, _ = observe(model, F.cross_entropy, x, torch.tensor([2]), protocol=Protocol(local_steps=3))
    with pytest.raises(NotApplicable, match="0 moved"):
        attack(seen)


def test_the_units_beside_the_traps_are_left_as_they_were() -> None:
    model = build("mlp", (6,), 3, width=8, depth=2, rng=torch.Generator().manual_seed(0))
    made = Latch(units=3).plant(model, torch.Generator().manual_seed(0))
    for name in ("dense1.weight", "dense1.bias", "dense2.bias"):
        assert torch.equal(made.get_parameter(name)[3:], model.get_parameter(name)[3:])
    assert torch.equal(made.get_parameter("dense2.weight")[3:, 3:], model.get_parameter("dense2.weight")[3:, 3:])
    assert torch.equal(made.get_parameter("head.weight")[:, 3:], model.get_parameter("head.weight")[:, 3:])


@pytest.mark.parametrize("change", [{"momentum": 0.9}, {"weight_decay": 0.01}, {"optimiser": "adam"}])
def test_other_optimisers_are_refused(change: dict[str, object]) -> None:
    protocol = Protocol.model_validate({"epochs": 1, "local_batch_size": 4} | change)
    seen, _ = trained("digits:batch=8,width=32", share=0.05, protocol=protocol)
    with pytest.raises(NotApplicable, match="plain SGD"):
        Latch()(seen)


def test_a_model_without_traps_is_refused() -> None:
    s = Case.parse("digits:batch=2,width=16").setting()
    seen, _ = observe(s.model, s.loss, s.inputs, s.labels, protocol=TRAINING)
    with pytest.raises(NotApplicable, match="not planted by this attack"):
        Latch()(seen)
    with pytest.raises(NotApplicable, match="other parameters"):
        Latch().plant(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2)), torch.Generator())
