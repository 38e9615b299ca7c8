"""What layers determine of their inputs: counted, measured, in words, and summed up as c(M)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from unbatch.analysis import Analysis
from unbatch.case import Case
from unbatch.chain import chain
from unbatch.client import observe
from unbatch.constraints import c_of, constraints
from unbatch.observation import Knowledge, Observation

LOSS = nn.functional.cross_entropy


def observed(spec: str) -> tuple[Observation, tuple[torch.Tensor, torch.Tensor]]:
    setting = Case.parse(spec).setting()
    obs, truth = observe(setting.model, setting.loss, setting.inputs, setting.labels, knowledge=setting.knowledge)
    return obs, (truth.inputs, truth.labels)


def own(model: nn.Module, shape: tuple[int, ...]) -> Observation:
    x, y = torch.rand(1, *shape, generator=torch.Generator().manual_seed(1)), torch.tensor([0])
    return observe(model, LOSS, x, y, knowledge=Knowledge())[0]


def drawn(*layers: nn.Module) -> nn.Module:
    model = nn.Sequential(*layers)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=rng) / max(p[0].numel(), 1) ** 0.5)
    return model


@pytest.mark.parametrize(("name", "value"), [("cnn2-c2", -1470), ("cnn2-c4", -2146), ("cnn3-c4", -2146)])
def test_the_published_metric_of_published_networks(name: str, value: int) -> None:
    obs, at = observed(f"photos:model={name},bias=false")
    (verdict,) = Analysis.parse("security-metric").run(obs, at=at)
    assert verdict.name == "c(M)"
    assert verdict.value == value


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "value"), [("cnn2-c1", 0), ("cnn2-c6", -189), ("lenet,activation=sigmoid", 0), ("cnn6-narrow", -233)]
)
def test_the_published_metric_where_ranks_are_measured(model: str, value: int) -> None:
    obs, at = observed(f"photos:model={model},bias=false")
    assert Analysis.parse("security-metric").run(obs, at=at)[0].value == value


def test_the_metric_weighs_layers_by_their_depth() -> None:
    assert c_of([(3072, 1602)]) == -1470
    assert c_of([(10, 10)] * 6) == 0
    assert c_of([(3072, 3072), (3468, 3188), *[(1600, 1600)] * 4]) == -233


@pytest.mark.parametrize("model", ["cnn2-c1", "cnn2-c2", "cnn2-c4", "cnn2-c6", "cnn3-c1"])
def test_counted_ranks_are_the_measured_ones(model: str) -> None:
    obs, (x, y) = observed(f"photos:size=12,model={model},double=true")
    for each in constraints(chain(obs.model, (3, 12, 12)), x, y, obs.loss):
        systems = each.weights.matrix(), each.gradients.matrix()
        both = torch.linalg.matrix_rank(torch.cat([m / m.norm() for m in systems]))
        assert each.both == both
        if each.counted is None:
            assert (each.weight, each.gradient) == tuple(int(torch.linalg.matrix_rank(m)) for m in systems)


def test_what_relu_hides_is_no_equation() -> None:
    obs, (x, y) = observed("photos:size=12,model=cnn2-c2,activation=relu,double=true")
    (conv, _) = constraints(chain(obs.model, (3, 12, 12)), x, y, obs.loss)
    outputs = obs.model.get_submodule("conv1")(x)
    assert conv.counted is None
    assert conv.weights.equations == int((outputs > 0).sum()) < outputs.numel()


def test_the_condition_number_is_that_of_the_matrix() -> None:
    obs, (x, y) = observed("photos:size=12,model=cnn2-c1,double=true")
    conv = constraints(chain(obs.model, (3, 12, 12)), x, y, obs.loss)[0]
    W, K = conv.weights.matrix(), conv.gradients.matrix()
    S = torch.linalg.svdvals(torch.cat([W, K * conv.weights.size / conv.gradients.size]))
    assert conv.condition == pytest.approx(float(S[0] / S[-1]), rel=1e-6)


def test_the_words_say_what_an_attacker_must_guess() -> None:
    obs, at = observed("photos:size=16,model=cnn2-c2")
    conv, head = Analysis.parse("layer-equations").run(obs, at=at)
    lost = conv.unknowns - conv.rank
    assert lost > 0
    assert f"conv1 loses {lost} of 768 unknowns: an attacker must guess them." in conv.words
    assert "Condition number" in conv.words
    assert conv.level == "partial"
    assert "head determines all" in head.words
    assert "drawn from the prior" in Analysis.parse("layer-equations").run(obs)[0].words


def test_a_batch_is_no_single_example() -> None:
    obs, at = observed("photos:size=16,model=cnn2-c1,batch=3")
    conv = Analysis.parse("layer-equations").run(obs, at=at)[0]
    assert "the batch has 3" in conv.words
    assert conv.level == "partial"


def test_what_is_too_large_to_measure_is_said() -> None:
    obs, at = observed("photos:size=16,model=cnn2-c1")
    assert "more than largest=100" in Analysis.parse("layer-equations:largest=100").run(obs, at=at)[0].words
    with pytest.raises(ValueError, match=r"the ranks of conv1 cannot be counted.*768 numbers, more than pixels=10"):
        Analysis.parse("security-metric:largest=100,pixels=10").run(obs, at=at)
    (verdict,) = Analysis.parse("security-metric:largest=100,pixels=768").run(obs, at=at)
    assert verdict.name == "determined share"
    assert "the ranks of conv1 cannot be counted" in verdict.words
    (verdict,) = Analysis.parse("security-metric:pixels=10").run(obs, at=at)
    assert verdict.name == "c(M)"
    assert "more than pixels=10" in verdict.words


def test_networks_without_convolutions_hide_nothing_from_the_published_metric() -> None:
    obs = own(drawn(nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 3)), (12,))
    verdict, share = Analysis.parse("security-metric").run(obs)
    assert verdict.value == 0
    assert share.name == "determined share"
    assert "no convolution lies before the first dense layer" in verdict.words
    assert [risk.rank for risk in Analysis.parse("layer-equations").run(obs)] == [12, 5]


def test_layers_that_the_published_metric_does_not_know_are_named() -> None:
    obs = own(drawn(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3)), (1, 8, 8))
    assert "what 2 may hide is not counted" in Analysis.parse("security-metric").run(obs)[0].words


def test_a_dense_layer_behind_relu_is_counted_whatever_relu_hides() -> None:
    obs = own(drawn(nn.Flatten(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 3)), (12,))
    layers = constraints(chain(obs.model, (12,)), torch.rand(1, 12), torch.tensor([0]), LOSS)
    assert [each.counted.both for each in layers if each.counted] == [12, 9]


def test_average_pooling_before_the_activation_is_within_the_chain() -> None:
    model = drawn(nn.Conv2d(1, 4, 3), nn.AvgPool2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(36, 3))
    names = [
        each.link.name for each in constraints(chain(model, (1, 8, 8)), torch.rand(1, 1, 8, 8), torch.tensor([0]), LOSS)
    ]
    assert names == ["0", "4"]
