"""Bins that a server plants: what is alone in one is read and proven, and nothing else is."""

import contextlib
import itertools
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unbatch
from unbatch import Attack, Knowledge, NotApplicable, Observation, Truth
from unbatch.attack import ActiveAttack
from unbatch.auditing.cheating import planted_exchange
from unbatch.case import Setting
from unbatch.models.small import Name, build
from unbatch.numerics.half_spaces import kind_of_one
from unbatch.protocol import Protocol
from unbatch.reconstruction import certified
from unbatch.testing import demo_setting

GOLDEN = (5**0.5 - 1) / 2


def attack(options: str = "", name: str = "imprint") -> ActiveAttack:
    made = Attack.parse(f"{name}:{options}" if options else name)
    assert isinstance(made, ActiveAttack)
    return made


def client(n: int, shape: tuple[int, ...], model: Name = "mlp", seed: int = 0, **options: int) -> Setting:
    rng = torch.Generator().manual_seed(seed)
    x = torch.rand(n, *shape, generator=rng)
    y = torch.randint(5, (n,), generator=rng)
    return Setting(model=build(model, shape, 5, rng=rng, **options), loss=F.cross_entropy, inputs=x, labels=y)


def seen(made: ActiveAttack, setting: Setting, defences: str = "", **known: object) -> tuple[Observation, Truth]:
    told = setting.domain.public() | Knowledge(**known)
    return planted_exchange(made, setting, knowledge=told, defences=defences or ())


def errors(found: unbatch.Reconstruction, truth: Truth) -> torch.Tensor:
    sure = certified(found).inputs.double().flatten(1)
    return torch.cdist(sure, truth.inputs.double().flatten(1)).amin(1) / sure.norm(dim=1)


@pytest.mark.parametrize("n", [1, 2, 5, 9])
def test_no_sum_of_two_or_more_is_taken_for_one(n: int) -> None:
    """Against all sums there are, of up to n weights."""
    weights = torch.tensor([GOLDEN, GOLDEN - 1], dtype=torch.float64)
    for m in range(n + 1):
        for chosen in itertools.combinations_with_replacement(weights.tolist(), m):
            kind = kind_of_one(sum(chosen), 1e-4, weights, n)
            assert (kind is not None) == (m == 1), chosen
            assert kind is None or weights[kind] == pytest.approx(chosen[0])


def test_equal_weights_prove_nothing() -> None:
    """Two of the one label and one of the other weigh as much as one does."""
    assert kind_of_one(0.5, 1e-6, torch.tensor([0.5, -0.5]), 3) is None
    assert kind_of_one(0.5, 1e-6, torch.tensor([0.5, -0.5]), 2) == 0


@pytest.mark.parametrize("shape", [(4,), (12,), (1, 8, 8), (3, 8, 8)])
@pytest.mark.parametrize("depth", [1, 3])
def test_what_is_claimed_lies_within_its_bound(shape: tuple[int, ...], depth: int) -> None:
    for seed in range(2):
        setting = client(12, shape, depth=depth, width=120, seed=seed)
        obs, truth = seen(attack(), setting, input_range=(0.0, 1.0))
        found = attack()(obs)
        sure = certified(found)
        assert len(sure) >= 9
        assert bool((errors(found, truth) <= sure.bound).all())
        assert float(sure.bound.max()) < 1e-2


def test_public_examples_and_statistics_set_the_bins() -> None:
    setting = client(16, (2, 6, 6), width=160)
    public = torch.rand(200, 2, 6, 6, generator=torch.Generator().manual_seed(9))
    told = {"public": public, "input_range": (0.0, 1.0)}
    obs, truth = seen(attack(), setting, **told)
    assert len(certified(attack()(obs))) >= 15
    made = attack(f"centre=0.5,spread={float(public.flatten(1).mean(1).std()):.3f}")
    obs, truth = seen(made, setting)
    found = made(obs)
    assert len(torch.unique(obs.model.get_parameter("dense1.weight"), dim=0)) == 1  # equal rows
    assert 10 <= len(certified(found)) <= 16
    assert float(errors(found, truth).max()) < 1e-4


def test_a_block_in_front_of_a_convolutional_network() -> None:
    setting = client(6, (1, 8, 8), "lenet")
    with pytest.raises(NotApplicable, match="imprint:bins=N puts a block in front"):
        seen(attack(), setting)
    made = attack("bins=100")
    obs, truth = seen(made, setting)
    found = made(obs)
    assert len(certified(found)) == 6
    assert float(errors(found, truth).max()) < 1e-4


def test_examples_that_are_the_same_are_never_alone() -> None:
    setting = client(6, (8,), width=200)
    x = setting.inputs.clone()
    x[1] = x[0]
    obs, _ = seen(attack(), replace(setting, inputs=x))
    found = certified(attack()(obs))
    assert len(found) == 4
    assert float((found.inputs[:, None] - x[0]).abs().amax(-1).min()) > 1e-2


def test_the_second_judge_withdraws_what_no_sum_is_of() -> None:
    obs, _ = seen(attack(), client(6, (8,), width=200))
    found = attack()(obs)
    assert bool(found.bound.isfinite().all())
    x = found.inputs.clone()
    x[0] = (x[0] + x[1]) / 2  # between two examples
    x[2] *= 1 + 1e-3
    x[3], labels = x[4], found.labels
    again = unbatch.certify(obs, replace(found, inputs=x, labels=labels))
    assert again.bound.isfinite().tolist() == [False, True, False, True, False, True]  # and of two copies one stands
    assert "each alone in a sum" in again.trace["withdrawn"]


def test_a_mixture_that_is_all_a_bin_holds_is_not_certified() -> None:
    """Two examples of one label in one bin: their mean explains the bin's ratio, and its weight gives it away."""
    setting = client(2, (8,), width=40)
    x = setting.inputs[:1] + torch.tensor([[0.0], [1e-6]])
    obs, _ = seen(attack(), replace(setting, inputs=x, labels=torch.tensor([3, 3])))
    with pytest.raises(NotApplicable, match="no sum that 'dense1' sent is of one example"):
        attack()(obs)
    said = {"bound": torch.tensor([1e-4]), "trace": {"planted layer": "dense1"}}
    mean = unbatch.certify(obs, unbatch.Reconstruction(inputs=x.mean(0, keepdim=True), **said))
    assert not bool(mean.bound.isfinite().any())


def test_the_rank_of_what_a_slab_sends_does_not_count_examples() -> None:
    """Under a softmax that is constant two examples of one label send a matrix of rank one, and their weight tells two."""
    x, y = torch.rand(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 3])
    p = torch.tensor([GOLDEN, *[(1 - GOLDEN) / 4] * 4], dtype=torch.float64)
    sent = p - F.one_hot(y, 5)  # [n, k], back to the outputs
    slab = sent.T @ torch.cat([x, torch.ones(2, 1, dtype=torch.float64)], 1)
    assert int(torch.linalg.matrix_rank(slab, rtol=1e-12)) == 1
    weights = torch.tensor([GOLDEN, GOLDEN - 1], dtype=torch.float64)
    assert kind_of_one(float(slab[0, -1]), 1e-9, weights, 2) is None
    other = p - F.one_hot(torch.tensor([3, 1]), 5)
    assert int(torch.linalg.matrix_rank(other.T @ x)) == 2


@pytest.mark.slow
def test_records_of_a_table_are_read_and_a_client_sees_it_coming() -> None:
    setting = unbatch.Case.parse("tables:batch=32,width=32").setting()
    object.__setattr__(setting, "protocol", Protocol(rounds=8))
    made = attack(name="hyperplane")
    obs, truth = seen(made, setting)
    found = made(obs)
    assert len(certified(found)) >= 28
    assert bool((errors(found, truth) <= certified(found).bound).all())
    signs = {sign.sign for sign in unbatch.inspect(obs.model, data=setting).planted}
    assert "duplicated-rows" in signs
    assert not unbatch.inspect(setting.model, data=setting).planted


def test_it_refuses_what_is_not_exact() -> None:
    setting = client(6, (8,), width=60)
    for defence, words in (("noise:sigma=1e-20", "leaves no sum exact"), ("prune:share=0.5", "leaves no sum exact")):
        with pytest.raises(NotApplicable, match=words):
            attack()(seen(attack(), setting, defence)[0])
    with pytest.raises(NotApplicable, match="a factor that nobody knows"):
        attack()(seen(attack(), setting, "clip:norm=1e-12")[0])
    honest, _ = unbatch.observe(setting.model, setting.loss, setting.inputs, setting.labels)
    with pytest.raises(NotApplicable, match="depends on more than the label"):
        attack()(honest)
    squared = replace(setting, loss=nn.MSELoss(), labels=torch.rand(6, 5))
    with pytest.raises(NotApplicable, match="labels of which there is no finite number"):
        attack()(seen(attack(), squared)[0])


@pytest.mark.parametrize("loss", ["squared-error", "binary-cross-entropy"])
def test_classes_under_other_losses_weigh_two_numbers_as_well(loss: str) -> None:
    obs, truth = seen(attack(), replace(client(8, (8,), width=120), loss=unbatch.loss.loss_named(loss)))
    sure = certified(attack()(obs))
    assert len(sure) >= 6
    assert bool((errors(sure, truth) <= sure.bound).all())


def test_a_factor_on_the_update_costs_the_claims() -> None:
    obs, _ = seen(attack(), client(4, (8,), width=100))
    for factor in (2.0, -1.0, 0.3):
        turned = replace(obs, update={name: factor * u for name, u in obs.update.items()})
        with contextlib.suppress(NotApplicable):
            assert not len(certified(attack()(turned)))


def test_every_row_of_a_fountain_code_is_another_and_the_batch_comes_apart() -> None:
    setting = client(16, (8,), width=200)
    public = torch.rand(300, 8, generator=torch.Generator().manual_seed(5))
    for told in ({"input_range": (0.0, 1.0)}, {"public": public}):
        made = attack(name="lt-codes")
        obs, truth = seen(made, setting, **told)
        assert len(torch.unique(obs.model.get_parameter("dense1.weight"), dim=0)) == 200
        sure = certified(made(obs))
        assert len(sure) >= 12
        assert bool((errors(sure, truth) <= sure.bound).all())


def test_slabs_are_cut_again_until_every_example_is_alone() -> None:
    setting = client(24, (8,), width=12)
    object.__setattr__(setting, "protocol", Protocol(rounds=20))
    made = attack(name="hyperplane")
    obs, truth = seen(made, setting, input_range=(0.0, 1.0))
    found = made(obs)
    assert 2 < len(obs.exchanges) < 20  # more examples than units
    assert len(certified(found)) == 24
    past = obs.knowledge.earlier[-1]
    model = deepcopy(obs.model)
    model.load_state_dict(dict(past.state))
    before = replace(obs, model=model, update=past.update, knowledge=_without_last(obs.knowledge))
    assert len(made(before)) < 24  # no round was played after the one that gave the last example
    assert bool((errors(found, truth) <= found.bound).all())
    rows = [past.state["dense1.weight"] for past in obs.knowledge.earlier]
    assert all(torch.equal(row, rows[0]) for row in rows)
    assert len({tuple(past.state["dense1.bias"].tolist()) for past in obs.knowledge.earlier}) == len(rows)


def _without_last(known: Knowledge) -> Knowledge:
    """What is known a round before."""
    return known.without("earlier") | Knowledge(earlier=known.earlier[:-1])


def test_each_client_of_a_sum_is_read_by_itself() -> None:
    setting = client(20, (1, 8, 8), "lenet")
    made = attack("units=60", "loki")
    obs, truth = seen(made, setting, "secure-aggregation:clients=5", input_range=(0.0, 1.0))
    found = made(obs)
    sure = certified(found)
    assert len(sure) >= 18
    assert float(errors(found, truth).max()) < 1e-4
    near = torch.cdist(sure.inputs.flatten(1), truth.inputs.flatten(1).double()).argmin(1)
    owners = [o for o, b in zip(found.trace["owners"], found.bound.isfinite().tolist(), strict=True) if b]
    assert (near // 4).tolist() == owners  # and it is told whose they are
    wrong = replace(found, trace={**found.trace, "owners": [(o + 1) % 5 for o in found.trace["owners"]]})
    assert not bool(unbatch.certify(obs, wrong).bound.isfinite().any())


TRAINING = {
    "steps on all examples": Protocol(local_steps=3, learning_rate=0.1),
    "one epoch": Protocol(epochs=1, local_batch_size=2, learning_rate=0.05),
    "three epochs": Protocol(epochs=3, local_batch_size=2, learning_rate=0.05),
}


def trained(protocol: Protocol, loss: unbatch.loss.Loss = F.cross_entropy) -> Setting:
    return replace(client(20, (1, 8, 8), "lenet"), protocol=protocol, loss=loss)


@pytest.mark.parametrize("how", TRAINING)
def test_each_client_of_a_sum_is_read_out_of_local_training(how: str) -> None:
    made = attack("units=60", "loki")
    obs, truth = seen(made, trained(TRAINING[how]), "secure-aggregation:clients=5", input_range=(0.0, 1.0))
    found = made(obs)
    sure = certified(found)
    assert len(sure) >= 18
    assert float(errors(found, truth).max()) < 1e-4
    summed = trained(TRAINING[how], unbatch.loss.loss_named("cross-entropy", "sum"))
    obs, truth = seen(made, summed, "secure-aggregation:clients=5", input_range=(0.0, 1.0))
    assert float(errors(made(obs), truth).max()) < 1e-4


def test_local_training_that_weighs_examples_otherwise_is_refused() -> None:
    made = attack("units=60", "loki")
    for protocol, words in (
        (Protocol(local_steps=3, local_batch_size=3), "some more often than others"),
        (Protocol(epochs=2, momentum=0.9), "under plain SGD"),
        (Protocol(local_steps=2, optimiser="adam"), "under plain SGD"),
        (Protocol(local_steps=2, learning_rate=1e9), "may move the planted block"),
    ):
        with pytest.raises(NotApplicable, match=words):
            made(seen(made, trained(protocol), input_range=(0.0, 1.0))[0])
    obs, _ = seen(made, trained(TRAINING["one epoch"]), "secure-aggregation:clients=5", input_range=(0.0, 1.0))
    with pytest.raises(NotApplicable, match="no sum that 'bins' sent is of one example"):
        made(replace(obs, knowledge=obs.knowledge | Knowledge(learning_rate=0.07)))  # each weighs nothing that is known


def test_no_example_is_claimed_of_training_that_was_sent_at_two_rates() -> None:
    made = attack("units=60", "loki")
    obs, _ = seen(made, trained(TRAINING["three epochs"]), "secure-aggregation:clients=5", input_range=(0.0, 1.0))
    ways = SLOPPY | {"each tensor clipped": lambda name, u: u / 2}  # what is sent is shorter than that clip
    for way, change in ways.items():
        with contextlib.suppress(NotApplicable):
            found = made(replace(obs, update={k: change(k, u) for k, u in obs.update.items()}))
            assert not len(certified(found)), way


def test_a_client_that_looks_finds_the_block_that_does_not_move() -> None:
    obs, _ = seen(attack("units=60", "loki"), trained(TRAINING["one epoch"]), input_range=(0.0, 1.0))
    setting = client(40, (1, 8, 8), "lenet")
    assert unbatch.inspect(obs.model, data=(setting.inputs, setting.labels)).planted


def test_kernels_pass_pictures_on_through_strides() -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 5, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(80, 100),
        nn.ReLU(),
        nn.Linear(100, 5),
    )
    setting = client(6, (1, 8, 8))
    own = Setting(model=net, loss=F.cross_entropy, inputs=setting.inputs, labels=setting.labels)
    made = attack(name="conv-imprint")
    obs, truth = seen(made, own, input_range=(0.0, 1.0))
    found = certified(made(obs))
    assert found.layer == "3"
    assert len(found) >= 5
    whole = found.inputs[:, :64].unflatten(1, (2, 2, 4, 4)).permute(0, 3, 1, 4, 2).flatten(1)  # [k, 64], the pictures
    assert float(torch.cdist(whole, truth.inputs.flatten(1).double()).amin(1).max()) < 1e-4
    public = torch.rand(200, 1, 8, 8, generator=torch.Generator().manual_seed(9))
    assert len(certified(made(seen(made, own, public=public)[0]))) >= 5
    with pytest.raises(NotApplicable, match="no convolution"):
        seen(made, client(2, (8,)))
    with pytest.raises(NotApplicable, match="no dense layer below the last one"):
        seen(made, client(2, (1, 8, 8), "lenet"))


def _pruned(u: Tensor) -> Tensor:
    return torch.where(u.abs() > u.abs().median(), u, torch.zeros_like(u))


SLOPPY: dict[str, Callable[[str, Tensor], Tensor]] = {
    "weights at half the rate": lambda name, u: u / 2 if name.endswith("weight") else u,
    "the planted weights alone": lambda name, u: u / 2 if name in ("dense1.weight", "bins.weight") else u,
    "half the entries": lambda name, u: _pruned(u),
    "each tensor clipped": lambda name, u: u * min(1.0, 0.05 / max(float(u.norm()), 1e-30)),
}


@pytest.mark.parametrize("way", SLOPPY)
@pytest.mark.parametrize("name", ["imprint", "conv-imprint", "lt-codes", "loki"])
def test_no_example_is_claimed_where_weights_and_biases_were_sent_at_two_rates(name: str, way: str) -> None:
    """A division gives another picture then, and each is alone in its bin as before."""
    server, demo = attack(name=name), Attack.find()[name].demo
    setting = demo_setting(demo)
    told = setting.domain.public() | setting.knowledge
    seen, _ = planted_exchange(server, setting, knowledge=told, defences=demo.defences, server_seed=3)
    honest = server(seen)
    assert honest.bound is not None
    assert bool(honest.bound.isfinite().any())
    sent = replace(seen, update={k: SLOPPY[way](k, u) for k, u in seen.update.items()})
    try:
        found = server(sent)
    except NotApplicable:
        return
    assert found.bound is not None
    assert not bool(found.bound.isfinite().any()), found.trace["second judge"]
