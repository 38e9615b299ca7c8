"""Bins in an adapter beside a frozen layer: the frozen network stays, and what is claimed is true."""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import unbatch
from unbatch import NotApplicable, Observation, Truth, UnbatchError
from unbatch.attacks import AdapterImprint
from unbatch.auditing.cheating import planted_exchange
from unbatch.case import Case, Setting
from unbatch.models.parallel_adapter import adapted
from unbatch.models.small import Name, build
from unbatch.reconstruction import Reconstruction, certified


def client(
    n: int, shape: tuple[int, ...], model: Name = "mlp", units: int = 120, seed: int = 0, **options: Any
) -> Setting:
    rng = torch.Generator().manual_seed(seed)
    net = adapted(build(model, shape, 5, rng=rng, **options), units, rng)
    x, y = torch.rand(n, *shape, generator=rng), torch.randint(5, (n,), generator=rng)
    return Setting(model=net, loss=torch.nn.functional.cross_entropy, inputs=x, labels=y)


def seen(setting: Setting, defences: str = "") -> tuple[Observation, Truth]:
    told = setting.domain.public() | unbatch.Knowledge(input_range=(0.0, 1.0))
    return planted_exchange(AdapterImprint(), setting, knowledge=told, defences=defences or ())


def errors(found: Reconstruction, truth: Truth) -> Tensor:
    inputs = certified(found).inputs
    assert inputs is not None
    sure = inputs.double().flatten(1)
    gaps: Tensor = torch.cdist(sure, truth.inputs.double().flatten(1)).amin(1)
    return gaps / sure.norm(dim=1)


def bounds(found: Reconstruction) -> Tensor:
    bound = certified(found).bound
    assert bound is not None
    return bound


@pytest.mark.parametrize(("shape", "depth", "width"), [((6,), 1, 16), ((1, 8, 8), 2, 64), ((3, 6, 6), 4, 20)])
def test_inputs_come_back_through_a_frozen_network_that_stays_as_it_was(
    shape: tuple[int, ...], depth: int, width: int
) -> None:
    setting = client(10, shape, depth=depth, width=width)
    obs, truth = seen(setting)
    trained = {name for name, held in setting.model.named_parameters() if held.requires_grad}
    assert set(obs.update) == trained
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in trained} == {"down", "up", "head"}
    before, after = setting.model.state_dict(), obs.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in set(before) - trained)
    found = AdapterImprint()(obs)
    sure = certified(found)
    assert not found.layer
    assert len(sure) >= 8
    assert bool((errors(found, truth) <= bounds(found)).all())
    assert float(bounds(found).max()) < 1e-2


@pytest.mark.parametrize("factor", [-1e2, -1e6])
def test_an_example_far_out_of_range_makes_no_claim_false(factor: float) -> None:
    """It may shut the units that were opened; then it sends nothing."""
    setting = client(6, (8,), width=16)
    x = setting.inputs.clone()
    x[0] *= factor
    obs, truth = seen(replace(setting, inputs=x))
    found = AdapterImprint()(obs)
    assert len(certified(found)) >= 1
    assert bool((errors(found, truth) <= bounds(found)).all())


def test_a_mean_of_two_is_withdrawn() -> None:
    obs, _ = seen(client(4, (8,), width=16))
    found = AdapterImprint()(obs)
    x = found.inputs.clone()
    x[0] = (x[0] + x[1]) / 2
    again = unbatch.certify(obs, replace(found, inputs=x)).bound
    assert again is not None
    assert again.isfinite().tolist() == [False, True, True, True]


def test_examples_that_share_every_bin_are_not_claimed() -> None:
    setting = client(2, (8,), width=16, units=30)
    x = setting.inputs[:1] + torch.tensor([[0.0], [1e-6]])
    with pytest.raises(NotApplicable, match="is of one example alone"):
        AdapterImprint()(seen(replace(setting, inputs=x, labels=torch.tensor([3, 3])))[0])


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        ("convnet", {"width": 2}, "'conv1.weight'"),
        ("vit", {"width": 16, "depth": 1}, "several vectors of an example"),
        ("mlp", {"width": 8, "activation": "tanh"}, "more than relu"),
    ],
)
def test_it_says_where_it_cannot_plant(model: Name, options: dict[str, int], words: str) -> None:
    with pytest.raises(NotApplicable, match=words):
        seen(client(2, (1, 8, 8), model, **options))


def test_it_needs_adapters_beside_layers_that_are_frozen() -> None:
    setting = client(2, (8,), width=16)
    setting.model.requires_grad_(True)
    with pytest.raises(NotApplicable, match="imprint plants its rows there"):
        seen(setting)
    with pytest.raises(NotApplicable, match="no adapter stands beside"):
        seen(Case.parse("digits:batch=2").setting())
    with pytest.raises(UnbatchError, match="no dense layer besides its head"):
        Case.parse("digits:model=lenet,adapter=4").setting()
    with pytest.raises(UnbatchError, match="leave adapter out"):
        Case.parse("text:adapter=4")
    with pytest.raises(UnbatchError, match="leave adapter out"):
        Case.parse("trained:adapter=4")


def test_a_client_that_looks_sees_it_and_honest_adapters_raise_nothing() -> None:
    setting = client(8, (1, 8, 8), width=32, depth=2, units=60)
    obs, _ = seen(setting)
    assert not unbatch.inspect(setting.model, data=setting).planted
    signs = {each.sign for each in unbatch.inspect(obs.model, data=setting).planted}
    assert {"duplicated-rows", "constant-outputs"} <= signs


def _pruned(u: Tensor) -> Tensor:
    return torch.where(u.abs() > u.abs().median(), u, torch.zeros_like(u))


SLOPPY: dict[str, Callable[[str, Tensor], Tensor]] = {
    "weights at half the rate": lambda name, u: u / 2 if name.endswith("weight") else u,
    "the way down's weights alone": lambda name, u: u / 2 if name == "dense1.down.weight" else u,
    "the way down's biases alone": lambda name, u: 2 * u if name == "dense1.down.bias" else u,
    "the way down alone": lambda name, u: u / 2 if ".down." in name else u,
    "the adapters alone": lambda name, u: u / 2 if name.startswith("dense") else u,
    "half the entries": lambda name, u: _pruned(u),
    "mirrored columns": lambda name, u: u.flip(-1) if u.ndim == 2 else u,
}


@pytest.mark.parametrize("way", SLOPPY)
def test_nothing_is_claimed_of_an_update_of_two_rates(way: str) -> None:
    obs, _ = seen(client(6, (8,), width=16, depth=2))
    sent = replace(obs, update={name: SLOPPY[way](name, u) for name, u in obs.update.items()})
    with contextlib.suppress(NotApplicable):
        assert not len(certified(AdapterImprint()(sent)))


def test_a_head_that_was_clipped_alone_costs_nothing() -> None:
    """The way down and the way up tell the examples; what is sent of the head is not asked."""
    obs, truth = seen(client(6, (8,), width=16, depth=2))
    sent = replace(obs, update={name: u * 0.01 if name.startswith("head") else u for name, u in obs.update.items()})
    found = AdapterImprint()(sent)
    assert len(certified(found)) >= 5
    assert bool((errors(found, truth) <= bounds(found)).all())


def test_an_adapter_starts_as_nothing_and_leaves_the_model_alone() -> None:
    rng = torch.Generator().manual_seed(0)
    net = build("mlp", (4,), 3, depth=2, width=8, rng=rng).double()
    made, x = adapted(net, 5, rng), torch.rand(6, 4, generator=rng, dtype=torch.float64)
    assert torch.equal(made(x), net(x))
    assert all(held.requires_grad for held in net.parameters())
    assert [name for name, held in made.named_parameters() if not held.requires_grad] == [
        f"dense{k}.layer.{part}" for k in (1, 2) for part in ("weight", "bias")
    ]
