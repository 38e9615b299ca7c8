"""The second judge: no claim that its own examples contradict stands, and none that they bear out falls."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import ClassVar, final

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unbatch
from unbatch import Attack, Case, Knowledge, Observation, Protocol, Reconstruction, certify
from unbatch.attack import Guarantee
from unbatch.benchmarks import allowance, tensor
from unbatch.defence import Defence
from unbatch.inversion.view import View
from unbatch.loss import Loss, loss_named
from unbatch.models import small
from unbatch.network.dense import layer_inputs
from unbatch.progress import watching

Way = Callable[[str, Tensor], Tensor]
CLAIMS = {"exact-claim-fails", "bound-violated", "label-proof-fails"}
ALTERATIONS: dict[str, Way] = {
    "sign": lambda k, u: u.sign(),
    "scaled sign": lambda k, u: u.sign() * u.abs().mean(),
    "own clip": lambda k, u: u * min(1.0, 0.05 / float(u.norm())),
    "bias rate x2": lambda k, u: u * (2 if "bias" in k else 1),
    "bias rate x1.01": lambda k, u: u * (1.01 if "bias" in k else 1),
    "bias flipped": lambda k, u: u * (-1 if k == "dense1.bias" else 1),
}
FACTORS: dict[str, Way] = {
    "as it is": lambda k, u: u,
    "three times": lambda k, u: 3 * u,
    "a step": lambda k, u: -0.1 * u,
    "clipped": lambda k, u: u * 1e-3,
    "half": lambda k, u: u.half(),
}


def client(
    network: small.Name = "mlp",
    shape: tuple[int, ...] = (20,),
    classes: int = 5,
    n: int = 1,
    activation: small.ActivationName = "relu",
    loss: str = "cross-entropy",
    seed: int = 0,
    **how: object,
) -> tuple[Observation, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    model = small.build(network, shape, classes, width=40, activation=activation, rng=rng)
    x, y = torch.rand(n, *shape, generator=rng), torch.randint(max(classes, 2), (n,), generator=rng)
    return unbatch.observe(model, loss_named(loss), x, y, **how)[0], x  # type: ignore[arg-type]


def altered(obs: Observation, way: Way) -> Observation:
    return replace(obs, update={name: way(name, u) for name, u in obs.update.items()})


def error(found: Reconstruction, obs: Observation, x: Tensor) -> Tensor:
    """Of each returned example the least distance from a private one, relative."""
    assert found.inputs is not None
    true = x if not found.layer else layer_inputs(obs.model, found.layer, x, obs.protocol.mode)
    returned = found.inputs.double().flatten(1)
    return torch.cdist(returned, true.double().flatten(1)).amin(1) / returned.norm(dim=1)


CLIENTS = {
    "mlp": {},
    "two classes": {"classes": 2, "activation": "tanh"},
    "one logit": {"classes": 1, "loss": "binary-cross-entropy"},
    "features": {"network": "convnet", "shape": (1, 8, 8)},
    "one dense layer": {"network": "lenet", "shape": (1, 16, 16)},
}


@pytest.mark.parametrize("way", ALTERATIONS)
@pytest.mark.parametrize("which", CLIENTS)
def test_no_ratio_is_certified_where_weight_and_bias_carry_no_common_factor(which: str, way: str) -> None:
    if (which, way) == ("one dense layer", "bias flipped"):
        pytest.skip("it has no layer of that name")
    obs, x = client(**CLIENTS[which])  # type: ignore[arg-type]
    found = Attack.parse("bias-ratio")(altered(obs, ALTERATIONS[way]))
    assert float(error(found, obs, x)) > 5e-3  # it is wrong
    assert found.bound is not None
    assert found.bound.isinf().all()
    assert "1 claim was withdrawn by the second judge" in found.trace["withdrawn"]
    assert found.trace["claims"] == {"made": 1, "kept": 0}


@pytest.mark.parametrize("way", FACTORS)
@pytest.mark.parametrize("which", CLIENTS)
def test_a_common_factor_is_fitted_and_stated(which: str, way: str) -> None:
    obs, x = client(**CLIENTS[which])  # type: ignore[arg-type]
    found = Attack.parse("bias-ratio")(altered(obs, FACTORS[way]))
    assert found.bound is not None
    assert bool((error(found, obs, x) <= found.bound).all())
    assert found.bound.isfinite().all(), found.trace["second judge"]
    factor = {"three times": 3.0, "a step": -0.1, "clipped": 1e-3}.get(way, 1.0)
    if CLIENTS[which].get("classes", 5) != 1:
        assert abs(found.trace["recomputed factor"]) == pytest.approx(abs(factor), rel=0.2)


@pytest.mark.parametrize("loss", [F.mse_loss, nn.SmoothL1Loss()])
def test_an_honest_update_of_real_targets_is_certified_where_something_is_left_that_must_agree(loss: Loss) -> None:
    rng = torch.Generator().manual_seed(0)
    x, y = torch.rand(1, 20, generator=rng), torch.randn(1, 3, generator=rng)
    deep, flat = small.build("mlp", (20,), 3, width=40, activation="tanh", rng=rng), nn.Linear(20, 3)
    found = Attack.parse("bias-ratio")(unbatch.observe(deep, loss, x, y)[0])
    assert found.bound is not None
    assert found.bound.isfinite().all(), found.trace["second judge"]
    found = Attack.parse("bias-ratio")(unbatch.observe(flat, loss, x, y)[0])
    assert found.bound is not None
    assert found.bound.isinf().all()  # weight and bias at two rates would be another input with other targets
    assert found.inputs is not None
    assert torch.allclose(found.inputs.float(), x, rtol=1e-4)


def test_copies_are_certified_where_the_update_is_fine_enough_to_tell_them() -> None:
    rng = torch.Generator().manual_seed(0)
    model = small.build("mlp", (20,), 5, width=40, activation="gelu", rng=rng)
    x, y = torch.rand(2, 20, generator=rng)[[0, 1, 1]], torch.tensor([2, 0, 0])
    obs, _ = unbatch.observe(model, F.cross_entropy, x, y)
    found = Attack.parse("unmix")(obs)
    assert found.bound is not None
    assert found.bound.isfinite().sum() == 3
    coarse = Attack.parse("unmix")(altered(obs, lambda name, u: u.bfloat16()))
    assert coarse.bound is not None
    assert coarse.bound.isfinite().sum() <= 1


def test_a_factor_that_hides_a_wrong_scale_is_not_certified() -> None:
    """One logit, no layer between: two learning rates and one common factor look the same; only a factor of 1 tells."""
    rng = torch.Generator().manual_seed(0)
    model, x, y = nn.Linear(6, 1), torch.rand(1, 6, generator=rng), torch.tensor([[1.0]])
    obs, _ = unbatch.observe(model, F.binary_cross_entropy_with_logits, x, y)
    attack = Attack.parse("bias-ratio")
    assert attack(obs).bound.isfinite().all()
    for way in (ALTERATIONS["bias rate x2"], FACTORS["three times"]):
        found = attack(altered(obs, way))
        assert found.bound.isinf().all()
        assert "other inputs explain it as well" in found.trace["withdrawn"]
    clipped, _ = unbatch.observe(model, F.binary_cross_entropy_with_logits, x, y, defences=["clip:norm=0.01"])
    assert attack(clipped).bound.isfinite().all()  # a clip of known norm says how long the update was made


def test_local_steps_are_simulated_all() -> None:
    obs, _ = client(protocol=Protocol(local_steps=3, learning_rate=0.1, momentum=0.9))
    assert Attack.parse("bias-ratio")(obs).bound.isfinite().all()
    found = Attack.parse("bias-ratio")(altered(obs, ALTERATIONS["bias rate x2"]))
    assert found.bound.isinf().all()


def test_features_that_move_within_the_local_steps_are_not_certified() -> None:
    """Their mean over the steps explains the update, and is no layer's input at the model that was sent out."""
    obs, _ = client("lenet", (1, 16, 16), protocol=Protocol(local_steps=4, learning_rate=0.01))
    assert "move within the local steps" in Attack.parse("bias-ratio")(obs).trace["withdrawn"]
    one, _ = client("lenet", (1, 16, 16), protocol=Protocol(local_steps=1, learning_rate=0.01))
    assert Attack.parse("bias-ratio")(one).bound.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["sign", "own clip", "bias rate x2", "bias rate x1.01"])
def test_unmix_claims_nothing_false(way: str) -> None:
    obs, x = client(n=3, activation="gelu")
    try:
        with watching(allowance(10.0)):
            found = Attack.parse("unmix")(altered(obs, ALTERATIONS[way]))
    except unbatch.NotApplicable:
        return
    sure = found.bound.isfinite()
    assert not sure.any() or bool((error(found, obs, x) <= found.bound)[sure].all())


@pytest.fixture(scope="module")
def unmixed() -> tuple[Observation, Reconstruction]:
    obs, _ = client(n=4, activation="gelu")
    found = Attack.parse("unmix")(obs)
    assert len(found) == 4
    assert found.bound.isfinite().all()
    return obs, found


def part(found: Reconstruction, *which: int) -> Reconstruction:
    chosen = list(which)
    return Reconstruction(inputs=found.inputs[chosen], labels=found.labels[chosen], bound=found.bound[chosen])


def test_a_part_of_a_batch_is_taken_out_of_its_layer(unmixed: tuple[Observation, Reconstruction]) -> None:
    obs, found = unmixed
    some = part(found, 2, 0)
    assert certify(obs, some).bound.isfinite().all()
    assert certify(obs.only("input_shape", "mode"), some).bound.isfinite().all()  # whatever the size of the batch
    assert certify(obs, replace(some, labels=None)).bound.isfinite().all()  # the labels that fit
    wrong = replace(some, labels=(some.labels + 1) % 5)
    assert certify(obs, wrong).bound.isinf().all()
    mixed = replace(some, inputs=torch.cat([some.inputs[:1], some.inputs.mean(0, keepdim=True)]))
    assert certify(obs, mixed).bound.isfinite().tolist() == [True, False]
    twice = part(found, 0, 0)
    assert certify(obs, twice).bound.isfinite().tolist() == [True, False]  # it is there once
    thrice = replace(
        found, inputs=found.inputs.repeat(3, 1), labels=found.labels.repeat(3), bound=found.bound.repeat(3)
    )
    assert int(certify(obs, thrice).bound.isfinite().sum()) == 4  # and so are all


def test_a_part_is_held_to_its_factor(unmixed: tuple[Observation, Reconstruction]) -> None:
    obs, found = unmixed
    some = part(found, 1, 3)
    assert certify(altered(obs, FACTORS["three times"]), some).trace["recomputed factor"] == pytest.approx(3, rel=1e-4)
    assert certify(altered(obs, ALTERATIONS["bias rate x2"]), some).bound.isinf().all()
    told = replace(obs, knowledge=obs.knowledge | Knowledge(altered="a third party's"))
    assert certify(told, some).bound.isinf().all()  # only the whole batch would show what was altered
    assert certify(told, found).bound.isfinite().all()


@final
class Rogue(Attack):
    """Claims anything."""

    family: ClassVar[str] = "none"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT
    paper: ClassVar[str] = "none"
    needs: ClassVar[frozenset[str]] = frozenset({"input_shape"})
    layer: str = ""

    def run(self, view: View, rng: torch.Generator) -> Reconstruction:
        x = torch.rand(1, *view.knowledge.input_shape, generator=rng)
        return Reconstruction(inputs=x, layer=self.layer, bound=torch.tensor([1e-6]), trace={"second judge": "fine"})


@pytest.mark.parametrize("layer", ["", "head", "nowhere"])
def test_no_attack_passes_the_judge_by(layer: str) -> None:
    obs, _ = client()
    assert Rogue(layer=layer)(obs).bound.isinf().all()
    record = unbatch.audit(obs, attacks=[Rogue(layer=layer)], analyses=())
    assert record.recovered() == set()
    assert "withdrawn by the second judge" in record.runs[0].words


def test_under_a_loss_of_its_own_what_outputs_can_send_back_decides() -> None:
    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        return (outputs.tanh() * y).exp().sum() ** 0.5

    rng = torch.Generator().manual_seed(0)
    model = small.build("mlp", (20,), 3, width=40, activation="tanh", rng=rng)
    x, y = torch.rand(1, 20, generator=rng), torch.rand(1, 3, generator=rng)
    obs, _ = unbatch.observe(model, loss, x, y)
    found = Attack.parse("bias-ratio")(obs)
    assert found.bound.isfinite().all(), found.trace
    for way in ("bias rate x2", "sign", "own clip"):
        assert Attack.parse("bias-ratio")(altered(obs, ALTERATIONS[way])).bound.isinf().all()


def test_what_the_model_does_not_repeat_is_not_certified() -> None:
    rng = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 4))
    torch.manual_seed(0)
    obs, _ = unbatch.observe(model, F.cross_entropy, torch.rand(1, 20, generator=rng), torch.tensor([1]))
    assert Attack.parse("bias-ratio")(obs).bound.isinf().all()  # the layer's input is half dropped


def test_labels_are_proven_by_heads_that_add_up_alone() -> None:
    obs, _ = client(n=4)
    proof = Reconstruction(inputs=None, labels=torch.tensor([1, 1, 4, 4]), bound=torch.zeros(4))
    assert certify(obs, proof).bound.isfinite().all()
    assert certify(altered(obs, FACTORS["half"]), proof).bound.isfinite().all()
    assert certify(altered(obs, ALTERATIONS["sign"]), proof).bound.isinf().all()
    told = replace(obs, knowledge=obs.knowledge | Knowledge(altered="a third party's"))
    assert "altered by a third party's" in certify(told, proof).trace["withdrawn"]


def test_soft_labels_are_recomputed_as_they_are() -> None:
    rng = torch.Generator().manual_seed(0)
    model = small.build("mlp", (20,), 4, width=40, rng=rng)
    x, y = torch.rand(1, 20, generator=rng), torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    obs, _ = unbatch.observe(model, F.cross_entropy, x, y)
    found = Attack.parse("bias-ratio")(obs)
    assert found.bound.isfinite().all(), found.trace
    assert Attack.parse("bias-ratio")(altered(obs, ALTERATIONS["bias rate x2"])).bound.isinf().all()


def test_inputs_without_a_scale_are_held_to_what_any_scale_sends_back() -> None:
    obs, _ = tensor.exchange("tanh", torch.eye(10)[:2].double(), 1000, seed=0)
    attack = Attack.parse("tensor-moment")
    found = attack(obs)
    assert "scale" in found.up_to
    assert found.bound.isfinite().all()
    other = altered(obs, lambda k, u: u.roll(1, 0))  # the neurons change places
    assert certify(other, found).bound.isinf().all()


def defences() -> Iterator[str]:
    strong = [
        "prune:share=0.99",
        "quantise:bits=2,stochastic=false",
        "noise:sigma=1e-5",
        "noise:sigma=0.1,relative=true",
    ]
    for kind in Defence.find().values():
        yield str(kind())
    yield from (*strong, "clip:norm=0.1", "mixup:alpha=5")


def no_claim_fails(spec: str, cases: dict[str, list[str]], seconds: float) -> None:
    if spec.startswith("dp-sgd"):
        pytest.importorskip("opacus")
    for case, attacks in cases.items():
        if spec.startswith("secure") and "batch" not in case:
            continue
        record = unbatch.audit(Case.parse(case), attacks=attacks, defences=[spec], analyses=(), budget=seconds)
        assert not {flag.name for flag in record.flags} & CLAIMS, [flag.words for flag in record.flags]
        assert not [run.words for run in record.runs if run.status == "failed"]


@pytest.mark.parametrize("spec", sorted(set(defences())))
def test_no_built_in_defence_makes_a_claim_fail(spec: str) -> None:
    cases = {"digits:width=16": ["bias-ratio", "label-count"], "digits:model=lenet": ["bias-ratio"]}
    no_claim_fails(spec, cases | {"digits:batch=4,width=16": ["label-count"]}, 10.0)


@pytest.mark.slow
@pytest.mark.parametrize("spec", sorted(set(defences())))
def test_no_built_in_defence_makes_a_claim_of_the_longer_attacks_fail(spec: str) -> None:
    cases = {
        "digits:batch=2,width=24,activation=gelu": ["unmix"],
        "digits:model=lenet": ["layer-by-layer"],
        "tables:batch=2,width=500,activation=gelu": ["tensor-moment", "unmix"],
    }
    no_claim_fails(spec, cases, 10.0)
