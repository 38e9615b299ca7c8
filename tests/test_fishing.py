"""A last layer that lets one example of a batch through: what it sends, how that is counted, and what is claimed of it."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unbatch
from unbatch import Attack, Case, NotApplicable, Observation, Truth
from unbatch.attack import ActiveAttack
from unbatch.auditing.cheating import planted_exchange
from unbatch.case import Setting
from unbatch.inversion.planted.caught import caught, cuts_of
from unbatch.inversion.view import View
from unbatch.models.small import build
from unbatch.network.dense import layer_inputs
from unbatch.protocol import Protocol
from unbatch.reconstruction import certified


def attack(options: str = "") -> ActiveAttack:
    made = Attack.parse(f"fishing:{options}" if options else "fishing")
    assert isinstance(made, ActiveAttack)
    return made


def client(labels: list[int], seed: int = 0, rounds: int = 24, loss: unbatch.loss.Loss = F.cross_entropy) -> Setting:
    rng = torch.Generator().manual_seed(seed)
    x = torch.rand(len(labels), 12, generator=rng)
    model = build("mlp", (12,), 5, rng=rng, width=24, depth=2)
    protocol = Protocol(rounds=rounds) if rounds > 1 else Protocol()
    return Setting(model=model, loss=loss, inputs=x, labels=torch.tensor(labels), protocol=protocol)


def seen(made: ActiveAttack, setting: Setting, **how: object) -> tuple[Observation, Truth]:
    return planted_exchange(made, setting, knowledge=setting.domain.public(), **how)  # type: ignore[arg-type]


def nearest(found: unbatch.Reconstruction, truth: Truth) -> tuple[Tensor, Tensor]:
    """Of each claimed example the relative error, and which of the private ones it is."""
    sure = certified(found)
    assert sure.inputs is not None
    assert sure.bound is not None
    x, true = (t.double().flatten(1) for t in (sure.inputs, truth.inputs))
    gaps = (x[:, None] - true).norm(dim=2)
    error = gaps.amin(1) / x.norm(dim=1)
    assert bool((error <= sure.bound).all())
    return error, gaps.argmin(1)


PAIRS = [0, 1, 2, 3, 4] * 6  # no class has one example


def test_the_only_example_of_its_class_comes_back_with_its_label() -> None:
    labels = [0, 1, 2, 4] * 8 + [3]
    obs, truth = seen(attack(), client(labels))
    found = attack()(obs)
    assert len(obs.exchanges) == 2  # one to count the classes, one for this class
    error, which = nearest(found, truth)
    assert found.labels is not None
    assert (found.labels.tolist(), which.tolist()) == ([3], [32])
    assert float(error.max()) < 1e-5


@pytest.mark.parametrize(
    ("examples", "seed"), [(4, 0), *(pytest.param(k, s, marks=pytest.mark.slow) for k in (1, 4) for s in (1, 2, 3))]
)
def test_examples_of_classes_with_several_are_cut_out_by_a_feature(examples: int, seed: int) -> None:
    made = attack(f"examples={examples}")
    obs, truth = seen(made, client(PAIRS, seed))
    found = made(obs)
    error, which = nearest(found, truth)
    assert len(set(which.tolist())) == examples
    assert float(error.max()) < 1e-4
    assert found.labels is None  # the difference of two rounds does not tell them
    assert len(obs.exchanges) <= 24


def test_counts_are_those_of_the_batch() -> None:
    obs, truth = seen(attack("examples=6"), client(PAIRS))
    cuts = cuts_of(View.of(obs))
    features = layer_inputs(obs.model, "head", truth.inputs).double()
    told = [cut for cut in cuts if cut.above is not None]
    assert len(told) >= len(cuts) - 1
    for cut in told:
        assert cut.labels == (6, 6, 6, 6, 6)
        assert cut.above == int((features @ cut.row > cut.threshold).sum())


def test_what_is_caught_is_what_a_client_with_this_example_alone_would_send() -> None:
    for labels in (PAIRS, [0, 1, 2, 4] * 8 + [3]):
        obs, truth = seen(attack(), client(labels))
        held = caught(cuts_of(View.of(obs)))
        one = held[0].obs
        _, which = nearest(attack()(obs), truth)
        x, y = truth.inputs[which[:1]], one.knowledge.labels
        alone, _ = unbatch.observe(one.model, F.cross_entropy, x, y)
        for name, u in alone.update.items():
            assert torch.allclose(u, one.update[name], rtol=1e-3, atol=1e-4 * float(u.abs().max())), name


def test_without_further_rounds_a_class_with_several_gives_none() -> None:
    obs, _ = seen(attack(), client(PAIRS, rounds=1))
    with pytest.raises(NotApplicable, match="More rounds cut finer"):
        attack()(obs)
    obs, truth = seen(attack("target=3"), client([0, 1, 2, 4] * 8 + [3], rounds=1))
    assert nearest(attack("target=3")(obs), truth)[1].tolist() == [32]


def test_examples_of_a_sum_over_clients_are_let_through_as_those_of_a_batch() -> None:
    setting = client([0, 1, 2, 4] * 8 + [3] + [0, 1, 2])
    obs, truth = seen(attack(), setting, defences="secure-aggregation:clients=4")
    assert nearest(attack()(obs), truth)[1].tolist() == [32]


def _pruned(u: Tensor) -> Tensor:
    return torch.where(u.abs() > u.abs().median(), u, torch.zeros_like(u))


SLOPPY: dict[str, Callable[[str, Tensor], Tensor]] = {
    "weights at half the rate": lambda name, u: u / 2 if name.endswith("weight") else u,
    "biases at half the rate": lambda name, u: u / 2 if name.endswith("bias") else u,
    "all but the last layer at half the rate": lambda name, u: u if name.startswith("head") else u / 2,
    "the first layer at half the rate": lambda name, u: u / 2 if name.startswith("dense1") else u,
    "half the entries": lambda name, u: _pruned(u),
    "mirrored columns": lambda name, u: u.flip(-1) if u.ndim == 2 else u,
    "turned": lambda name, u: -u,
    "doubled": lambda name, u: 2 * u,
    "signs": lambda name, u: u.sign(),
    "clipped": lambda name, u: u * 1e-3,
    "biases a little faster": lambda name, u: u * 1.01 if name.endswith("bias") else u,
    "one bias turned": lambda name, u: -u if name == "dense1.bias" else u,
}


QUICK = ("weights at half the rate", "biases at half the rate", "half the entries")


@pytest.mark.parametrize("way", [way if way in QUICK else pytest.param(way, marks=pytest.mark.slow) for way in SLOPPY])
@pytest.mark.parametrize("labels", [PAIRS, [0, 1, 2, 4] * 8 + [3]], ids=["feature", "class"])
def test_nothing_is_claimed_of_an_update_that_was_altered(labels: list[int], way: str) -> None:
    obs, truth = seen(attack(), client(labels))
    sent = replace(obs, update={name: SLOPPY[way](name, u) for name, u in obs.update.items()})
    try:
        found = attack()(sent)
    except NotApplicable:
        return
    assert not len(certified(found)), nearest(found, truth)


def test_between_two_thresholds_the_size_of_an_example_is_told_without_any_bias() -> None:
    """Elsewhere all weights at half the rate are the honest update of half the example, in a network without biases."""
    setting = client(PAIRS)
    rng = torch.Generator().manual_seed(1)
    first = nn.Linear(12, 24, bias=False)
    first.weight.data.copy_(torch.randn(24, 12, generator=rng) / 3)
    net = nn.Sequential(first, nn.ReLU(), nn.Linear(24, 5))
    obs, _ = seen(attack(), replace(setting, model=net))
    held = caught(cuts_of(View.of(obs)))
    assert held
    halves = [unbatch.knowledge.Earlier(state=past.state, update=_half(past.update)) for past in obs.knowledge.earlier]
    sent = replace(obs, update=_half(obs.update), knowledge=obs.knowledge | unbatch.Knowledge(earlier=halves))
    assert not caught(cuts_of(View.of(sent)))


def test_behind_a_network_without_biases_the_claim_says_what_its_size_rests_on() -> None:
    rng = torch.Generator().manual_seed(1)
    first = nn.Linear(12, 24, bias=False)
    first.weight.data.copy_(torch.randn(24, 12, generator=rng) / 3)
    setting = client([0, 1, 2, 4] * 8 + [3])
    net = nn.Sequential(first, nn.ReLU(), nn.Linear(24, 5))
    obs, truth = seen(attack(), replace(setting, model=net))
    found = attack()(obs)
    assert nearest(found, truth)[1].tolist() == [32]
    assert "an example's size rests on" in found.trace["condition"]
    halved = attack()(replace(obs, update=_half(obs.update)))  # the honest update of half the example
    assert not len(certified(halved)) or "an example's size rests on" in halved.trace["condition"]
    biased, _ = seen(attack(), setting)
    assert "condition" not in attack()(biased).trace


def _half(update: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: u / 2 if name.endswith("weight") else u for name, u in update.items()}


def test_the_second_judge_holds_an_example_to_what_it_would_send_alone() -> None:
    obs, truth = seen(attack(), client(PAIRS))
    found = attack()(obs)
    assert found.inputs is not None
    assert len(certified(unbatch.certify(obs, found))) == 1
    for other in (found.inputs * (1 + 1e-3), truth.inputs[:1].double()):
        assert not len(certified(unbatch.certify(obs, replace(found, inputs=other))))
    wrong = replace(found, labels=torch.tensor([2]))  # which nothing tells
    assert not len(certified(unbatch.certify(obs, wrong)))


def test_it_refuses_what_it_cannot_let_one_through_of() -> None:
    rng = torch.Generator().manual_seed(0)
    two = replace(client([0, 1] * 4), model=nn.Linear(12, 2))
    bare = replace(client([0, 1] * 4), model=nn.Linear(12, 5, bias=False))
    for setting, words in ((two, "2 outputs; 3 are needed"), (bare, "with a bias")):
        with pytest.raises(NotApplicable, match=words):
            seen(attack(), setting)
    norms = build("resnet-small", (1, 8, 8), 5, rng=rng, width=4)
    pictures = replace(client([0, 1, 2, 4] * 2), model=norms, inputs=torch.rand(8, 1, 8, 8, generator=rng))
    with pytest.raises(NotApplicable, match="batch norm or dropout in train mode"):
        attack()(seen(attack(), pictures)[0])
    for setting, words in (
        (replace(client([0, 1] * 4), loss=nn.CrossEntropyLoss(label_smoothing=0.1)), "this loss is another"),
        (client([0, 1] * 4), "it was not planted by this attack"),
    ):
        honest = "not planted" in words
        obs = unbatch.observe(setting.model, setting.loss, setting.inputs, setting.labels)[0] if honest else None
        with pytest.raises(NotApplicable, match=words):
            attack()(obs if obs is not None else seen(attack(), setting)[0])
    with pytest.raises(NotApplicable, match="leaves no sum exact"):
        attack()(seen(attack(), client(PAIRS), defences="noise:sigma=1e-9")[0])


def test_a_client_that_looks_finds_it() -> None:
    setting = Case.parse("digits:batch=64,width=16").setting()
    obs, _ = seen(attack(), replace(setting, protocol=Protocol(rounds=3)))
    found = unbatch.inspect(obs.model, data=setting)
    assert "silenced-outputs" in {sign.sign for sign in found.planted}


@pytest.mark.slow
def test_a_report_says_what_a_claim_rests_on() -> None:
    rng = torch.Generator().manual_seed(1)
    first = nn.Linear(12, 24, bias=False)
    first.weight.data.copy_(torch.randn(24, 12, generator=rng) / 3)
    net = nn.Sequential(first, nn.ReLU(), nn.Linear(24, 5))
    record = unbatch.audit(replace(client([0, 1, 2, 4] * 8 + [3]), model=net), attacks=[attack()], analyses=())
    assert "an example's size rests on" in record.runs[0].words


@pytest.mark.slow
def test_one_picture_of_many_behind_a_residual_network_is_read_as_if_it_were_alone() -> None:
    setting = Case.parse("photos:batch=32,size=16,model=resnet18,width=16,double=true").setting()
    setting = replace(setting, protocol=Protocol(rounds=20, mode="eval"))
    obs, truth = seen(attack(), setting)
    found = attack()(obs)
    error, _ = nearest(found, truth)
    assert found.trace["read by"] == ["descend"]
    assert 20 * math.log10(1 / float(error.max())) > 200
