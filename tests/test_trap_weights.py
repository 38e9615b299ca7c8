import pytest
import torch
from torch import nn
from torch.nn import functional as F

import unbatch
from unbatch import NotApplicable, Observation, Truth, observe
from unbatch.attacks import TrapWeights
from unbatch.case import Case
from unbatch.models.small import build
from unbatch.reconstruction import Reconstruction, certified


def planted(spec: str, scale: float = 0.6) -> tuple[Observation, Truth]:
    s = Case.parse(spec).setting()
    model = TrapWeights(scale=scale).plant(s.model, torch.Generator().manual_seed(1))
    return observe(model, s.loss, s.inputs, s.labels)


def nearest(found: Reconstruction, truth: Truth) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each find the relative error to the nearest private example, and which that is."""
    assert found.inputs is not None
    x, true = found.inputs.double().flatten(1), truth.inputs.double().flatten(1)
    gaps = torch.cdist(x, true, compute_mode="donot_use_mm_for_euclid_dist") / x.norm(dim=1, keepdim=True)
    least = gaps.min(1)
    return least.values, least.indices


def test_most_of_a_batch_is_read_and_every_claim_holds() -> None:
    seen, truth = planted("digits:batch=24,width=256")
    found = certified(TrapWeights()(seen))
    assert found.bound is not None
    assert found.labels is not None
    error, which = nearest(found, truth)
    assert len(set(which.tolist())) == len(found) > 16
    assert bool((error <= found.bound).all())
    assert float(found.bound.max()) < 1e-3
    assert torch.equal(found.labels, truth.labels[which])


def test_taking_out_what_was_found_makes_others_lone() -> None:
    seen, _ = planted("digits:batch=24,width=256")
    trace = TrapWeights()(seen).trace
    assert 0 < trace["alone from the start"]
    assert 0 < trace["alone once others were taken out"]


def test_plants_parameters_alone() -> None:
    model = build("mlp", (6,), 3, width=8, rng=torch.Generator().manual_seed(0))
    made = TrapWeights().plant(model, torch.Generator().manual_seed(0))
    before, after = model.state_dict(), made.state_dict()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == ["dense1.weight", "dense1.bias"]
    assert bool(((after["dense1.weight"] < 0).sum(1) == 3).all())
    assert bool((after["dense1.weight"].sum(1) < 0).all())


def test_examples_that_always_fire_together_are_not_claimed() -> None:
    """Twice an example sets off the same units, so that no row is that of one of the two."""
    rng = torch.Generator().manual_seed(2)
    model = TrapWeights(scale=0.5).plant(build("mlp", (40,), 4, width=60, rng=rng), rng)
    x = torch.rand(1, 40, generator=rng)
    seen, _truth = observe(model, F.cross_entropy, torch.cat([x, 2 * x]), torch.tensor([1, 3]))
    with pytest.raises(NotApplicable, match="for none or for several"):
        TrapWeights()(seen)
    alone, _ = observe(model, F.cross_entropy, x, torch.tensor([1]))
    found = TrapWeights()(alone)
    assert found.inputs is not None
    assert torch.allclose(found.inputs, x.double(), rtol=1e-6)


@pytest.mark.parametrize("first", [nn.Linear(6, 8, bias=False), nn.Conv1d(1, 2, 3)])
def test_needs_a_dense_layer_with_a_bias(first: nn.Module) -> None:
    with pytest.raises(NotApplicable, match=r"no bias|no dense one"):
        TrapWeights().plant(nn.Sequential(first, nn.ReLU(), nn.Linear(8, 2)), torch.Generator())


def test_noise_takes_its_claims() -> None:
    s = Case.parse("digits:batch=5,width=100").setting()
    record = unbatch.audit(s, attacks="trap-weights:scale=0.6", defences="noise:sigma=0.01", analyses=())
    run = record.runs[0]
    assert not [e for e in run.examples if e.bound is not None and e.bound < 1]
