"""What layers determine of their inputs: counted, measured, in words, and summed up as c(M)."""

from __future__ import annotations

import pytest
import torch
from clients import Exchange, normal
from torch import nn

from unbatch.analysis import Analysis
from unbatch.attacks.layer_by_layer import LayerByLayer
from unbatch.auditing.client import observe
from unbatch.inversion.backward.rank_count import c_of, constraints
from unbatch.models.residual import ResidualBlock
from unbatch.models.small import build, initialise
from unbatch.network.chain import chain
from unbatch.protocol import Protocol

LOSS = nn.functional.cross_entropy


@pytest.mark.parametrize(("name", "value"), [("cnn2-c2", -1470), ("cnn2-c4", -2146), ("cnn3-c4", -2146)])
def test_the_published_metric_of_published_networks(exchange: Exchange, name: str, value: int) -> None:
    obs, x, y = exchange(f"photos:model={name},bias=false")
    (verdict,) = Analysis.parse("security-metric:work=0")(obs, at=(x, y))
    assert verdict.name == "c(M)"
    assert verdict.value == value


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "value"), [("cnn2-c1", 0), ("cnn2-c6", -189), ("lenet,activation=sigmoid", 0), ("cnn6-narrow", -233)]
)
def test_the_published_metric_where_ranks_are_measured(exchange: Exchange, model: str, value: int) -> None:
    obs, x, y = exchange(f"photos:model={model},bias=false")
    assert Analysis.parse("security-metric:work=0")(obs, at=(x, y))[0].value == value


def test_the_metric_weighs_layers_by_their_depth() -> None:
    assert c_of([(3072, 1602)]) == -1470
    assert c_of([(10, 10)] * 6) == 0
    assert c_of([(3072, 3072), (3468, 3188), *[(1600, 1600)] * 4]) == -233


@pytest.mark.parametrize("model", ["cnn2-c1", "cnn2-c2", "cnn2-c4", "cnn2-c6", "cnn3-c1"])
def test_counted_ranks_are_the_measured_ones(exchange: Exchange, model: str) -> None:
    obs, x, y = exchange(f"photos:size=12,model={model},double=true")
    for each in constraints(chain(obs.model, (3, 12, 12)), x, y, obs.loss):
        systems = each.weights.matrix(), each.gradients.matrix()
        both = torch.linalg.matrix_rank(torch.cat([m / m.norm() for m in systems]))
        assert each.both == both
        if each.counted is None:
            assert (each.weight, each.gradient) == tuple(int(torch.linalg.matrix_rank(m)) for m in systems)


def test_what_relu_hides_is_no_equation(exchange: Exchange) -> None:
    obs, x, y = exchange("photos:size=12,model=cnn2-c2,activation=relu,double=true")
    (conv, _) = constraints(chain(obs.model, (3, 12, 12)), x, y, obs.loss)
    outputs = obs.model.get_submodule("conv1")(x)
    assert conv.counted is None
    assert conv.weights.equations == int((outputs > 0).sum()) < outputs.numel()


def test_the_condition_number_is_that_of_the_matrix(exchange: Exchange) -> None:
    obs, x, y = exchange("photos:size=12,model=cnn2-c1,double=true")
    conv = constraints(chain(obs.model, (3, 12, 12)), x, y, obs.loss)[0]
    W, K = conv.weights.matrix(), conv.gradients.matrix()
    S = torch.linalg.svdvals(torch.cat([W, K * conv.weights.size / conv.gradients.size]))
    assert conv.condition == pytest.approx(float(S[0] / S[-1]), rel=1e-6)


def test_the_words_say_what_an_attacker_must_guess(exchange: Exchange) -> None:
    obs, x, y = exchange("photos:size=16,model=cnn2-c2")
    conv, head = Analysis.parse("layer-equations")(obs, at=(x, y))
    lost = conv.unknowns - conv.rank
    assert lost > 0
    assert f"conv1 loses {lost} of 768 unknowns: an attacker must guess them." in conv.words
    assert "Condition number" in conv.words
    assert conv.level == "partial"
    assert "head determines all" in head.words
    assert "drawn from the prior" in Analysis.parse("layer-equations")(obs)[0].words


def test_a_batch_is_no_single_example(exchange: Exchange) -> None:
    obs, x, y = exchange("photos:size=16,model=cnn2-c1,batch=3")
    conv = Analysis.parse("layer-equations")(obs, at=(x, y))[0]
    assert "the batch has 3" in conv.words
    assert conv.level == "partial"


def test_what_is_too_large_to_measure_is_said(exchange: Exchange) -> None:
    obs, x, y = exchange("photos:size=16,model=cnn2-c1")
    assert "more than exact=100" in Analysis.parse("layer-equations:exact=100")(obs, at=(x, y))[0].words
    with pytest.raises(ValueError, match=r"the ranks of conv1 cannot be counted.*operations, more than work=1.0e\+06"):
        Analysis.parse("security-metric:exact=100,work=1e6")(obs, at=(x, y))
    (verdict,) = Analysis.parse("security-metric:exact=100")(obs, at=(x, y))
    assert verdict.name == "determined share"
    assert "the ranks of conv1 cannot be counted" in verdict.words
    (verdict,) = Analysis.parse("security-metric:work=1e6")(obs, at=(x, y))
    assert verdict.name == "c(M)"
    assert "more than work=1.0e+06: a product with the Jacobian for each of 768 unknowns" in verdict.words


def test_networks_without_convolutions_hide_nothing_from_the_published_metric(exchange: Exchange) -> None:
    obs = exchange(normal(nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 3)), shape=(12,))[0]
    verdict, share = Analysis.parse("security-metric")(obs)
    assert verdict.value == 0
    assert share.name == "determined share"
    assert "no convolution lies before the first dense layer" in verdict.words
    assert [risk.rank for risk in Analysis.parse("layer-equations")(obs)] == [12, 5]


def test_layers_that_the_published_metric_does_not_know_are_named(exchange: Exchange) -> None:
    obs = exchange(
        normal(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3)), shape=(1, 8, 8)
    )[0]
    verdict = Analysis.parse("security-metric")(obs)[0]
    assert verdict.words.startswith("every convolution is uniquely solvable; what 2 may hide is not counted")
    conv, pool, _ = Analysis.parse("layer-equations")(obs)
    assert (conv.level, pool.level) == ("partial", "unknown")
    assert "from its output, which 2 may leave open" in conv.words
    assert "'2' (MaxPool2d) has no linear way back: which entry of a window was the largest" in pool.words


def test_a_dense_layer_behind_relu_is_counted_whatever_relu_hides(exchange: Exchange) -> None:
    obs = exchange(normal(nn.Flatten(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 3)), shape=(12,))[0]
    layers = constraints(chain(obs.model, (12,)), torch.rand(1, 12), torch.tensor([0]), LOSS)
    assert [each.counted.both for each in layers if each.counted] == [12, 9]


NETWORKS: dict[str, list[nn.Module]] = {
    "average pooling": [nn.Conv2d(1, 4, 3), nn.AvgPool2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(36, 3)],
    "pooling behind the activation": [nn.Conv2d(1, 4, 3), nn.Tanh(), nn.AvgPool2d(1), nn.Flatten(), nn.Linear(144, 3)],
    "relu behind a reshape": [nn.Conv2d(1, 4, 3), nn.Flatten(), nn.ReLU(), nn.Linear(144, 3)],
    "batch norm and relu": [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)],
    "two convolutions": [nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3, stride=2), nn.Flatten(), nn.Linear(8, 3)],
    "padding and upsampling": [
        *(nn.ZeroPad2d(1), nn.Conv2d(1, 2, 3, 2), nn.Upsample(scale_factor=2), nn.ELU(), nn.Flatten()),
        nn.Linear(128, 3),
    ],
}


@pytest.mark.parametrize("name", NETWORKS)
def test_ranks_are_those_of_the_systems_that_the_attack_solves(name: str) -> None:
    model = normal(*NETWORKS[name]).double()
    for norm in (module for module in model if isinstance(module, nn.BatchNorm2d)):
        norm.weight.data.abs_()
        norm.bias.data *= 0.1  # or nothing comes through the ReLU
    x = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(1)).double()
    obs, _ = observe(model, LOSS, x, torch.tensor([0]), protocol=Protocol(mode="eval"))
    attack = LayerByLayer(method="r-gap")
    known = obs.only(*(attack.needs | attack.uses))
    readings = attack(known).trace["readings"]
    rows = {risk.layer: risk for risk in Analysis.parse("layer-equations")(obs, at=(x, torch.tensor([0])))}
    assert readings
    for reading in readings:
        row = rows[reading["layers"].split(", ")[0]]
        assert (row.unknowns, row.rank) == (reading["unknowns"], reading["rank"])
        assert ("nothing is left to guess" in row.words) == (row.rank == row.unknowns)


def test_what_pooling_hides_before_the_activation_is_counted(exchange: Exchange) -> None:
    obs = exchange(normal(*NETWORKS["average pooling"]).double(), shape=(1, 8, 8))[0]
    conv, _ = Analysis.parse("layer-equations")(obs)
    assert (conv.rank, conv.unknowns, conv.level) == (49, 64, "partial")
    verdict = Analysis.parse("security-metric")(obs)[0]
    assert verdict.value == -15
    assert "15 unknowns in all are left open" in verdict.words


def test_max_pooling_before_the_activation_leaves_the_layer_unknown(exchange: Exchange) -> None:
    obs = exchange(
        normal(nn.Conv2d(1, 4, 3), nn.MaxPool2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(36, 3)), shape=(1, 8, 8)
    )[0]
    conv, _ = Analysis.parse("layer-equations")(obs)
    assert conv.level == "unknown"
    assert "'1' (MaxPool2d) has no linear way back" in conv.words
    (share,) = Analysis.parse("security-metric")(obs)
    assert share.name == "determined share"
    assert "c(M): what is known of the output of 0 cannot be counted: '1' (MaxPool2d)" in share.words


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_published_metric_is_silent_of_residual_networks(mode: str) -> None:
    model = build("resnet-small", (1, 8, 8), 4, width=2, rng=torch.Generator().manual_seed(0))
    x = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    obs, _ = observe(model, LOSS, x, torch.tensor([0]), protocol=Protocol(mode=mode))
    (share,) = Analysis.parse("security-metric")(obs)
    assert share.name == "determined share"
    assert "'block1' (ResidualBlock), 'block2' (ResidualBlock), 'block3' (ResidualBlock)" in share.words
    rows = {risk.layer: risk for risk in Analysis.parse("layer-equations")(obs)}
    assert {"conv1", "norm1", "block1", "block2", "block3", "head"} < set(rows)
    assert not any("nothing is left" in risk.words for name, risk in rows.items() if name != "head")


def test_a_dense_layer_on_many_vectors_is_measured(exchange: Exchange) -> None:
    obs = exchange(normal(nn.Linear(6, 2), nn.Tanh(), nn.Flatten(), nn.Linear(10, 3)), shape=(5, 6))[0]
    tokens, _ = Analysis.parse("layer-equations")(obs)
    assert (tokens.unknowns, tokens.rank) == (30, 10 + 12 - 4)
    assert "(measured)" in tokens.words


def test_under_padding_the_rank_of_the_weights_is_measured(exchange: Exchange) -> None:
    obs = exchange(
        normal(nn.Conv2d(1, 3, 3, 2, 1), nn.Tanh(), nn.Flatten(), nn.Linear(48, 3)).double(), shape=(1, 7, 7)
    )[0]
    conv = Analysis.parse("layer-equations")(obs)[0]
    assert "weights give 45 equations" in conv.words
    assert "(counted, the weights' measured)" in conv.words
    large = Analysis.parse("layer-equations:exact=0")(obs)[0]
    assert "weights" not in large.words
    assert large.rank == conv.rank


def test_a_residual_block_has_the_rank_of_the_equations_that_the_attack_solves() -> None:
    rng = torch.Generator().manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 3, 3), nn.Tanh(), ResidualBlock(3, 3, 1, nn.Softplus), nn.Tanh()),
        *(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(36, 3)),
    )
    model = initialise(model, rng).double()
    x = torch.rand(1, 1, 7, 7, generator=rng).double()
    obs, _ = observe(model, LOSS, x, torch.tensor([0]), protocol=Protocol(mode="eval"))
    attack = LayerByLayer()
    found = attack(obs)
    readings = {reading["layers"].split(", ")[0]: reading for reading in found.trace["readings"]}
    rows = {risk.layer: risk for risk in Analysis.parse("layer-equations")(obs, at=(x, torch.tensor([0])))}
    assert rows["2"].rank == readings["2"]["rank"]
    assert rows["2"].level != "exact"
    assert "To first order at the batch's first example: '2' (ResidualBlock) has no rule" in rows["2"].words
    large = Analysis.parse("layer-equations:exact=70")(obs)[1]
    assert large.level == "unknown"
    assert (
        "'2' (ResidualBlock) has no rule to read it backward by: its branch is not affine in x at 'act1'" in large.words
    )
    assert "and 75 unknowns are more than exact=70" in large.words


def test_few_equations_on_many_unknowns_are_measured(exchange: Exchange) -> None:
    obs = exchange(
        normal(nn.Conv2d(1, 32, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 3)),
        shape=(1, 16, 16),
    )[0]
    _, pool, _ = Analysis.parse("layer-equations")(obs)
    assert (pool.rank, pool.unknowns, pool.level) == (32, 6272, "low")
