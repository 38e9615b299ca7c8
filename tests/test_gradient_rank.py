import pytest
import torch
from torch import nn

from unbatch import Analysis, Case, LayerRisk, observe


def risks(case: str, **options) -> dict[str, LayerRisk]:
    setting = Case.parse(case).setting()
    obs, _ = observe(setting.model, setting.loss, setting.inputs, setting.labels, **options)
    return {risk.layer: risk for risk in Analysis.parse("gradient-rank")(obs)}


@pytest.mark.parametrize("double", ["true", "false"])
@pytest.mark.parametrize("n", [1, 8, 30])
def test_a_dense_layer_counts_the_batch(n: int, double: str) -> None:
    first = risks(f"photos:batch={n},width=64,activation=gelu,double={double}")["dense1"]
    assert first.rank == n
    assert first.unknowns == 3072 * n
    assert first.equations == n * (64 + 3073 - n)
    assert first.level == ("exact" if n == 1 else "partial")
    expected = "one example, and its inputs are known exactly" if n == 1 else f"the batch has {n} examples and the span"
    assert expected in first.words


def test_a_head_with_few_outputs_does_not_pretend_to_count() -> None:
    head = risks("tables:batch=4")["head"]  # two classes: softmax regression has rank one whatever the batch
    assert head.rank == 1
    assert head.level == "partial"
    assert "rank 1 for 4 examples" in head.words


def test_noise_fills_the_rank() -> None:
    first = risks("photos:batch=4,width=16", defences=["noise:sigma=0.1"])["dense1"]
    assert first.rank == 16
    assert first.level == "low"
    assert "noise" in first.words


def test_convolutions_count_equations_and_frozen_layers_send_nothing() -> None:
    setting = Case.parse("photos:model=lenet,activation=sigmoid").setting()
    setting.model.head.weight.requires_grad_(False)
    setting.model.head.bias.requires_grad_(False)
    obs, _ = observe(setting.model, setting.loss, setting.inputs, setting.labels)
    found = {r.layer: r for r in Analysis.parse("gradient-rank")(obs)}
    assert "head" not in found
    assert found["conv1"].rank == 12
    assert found["conv1"].equations == 12 * (12 + 76 - 12)
    assert "leaves at least 70% open" in found["conv1"].words


def test_without_a_bias_scale_is_open_and_zero_is_said() -> None:
    model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.ReLU(), nn.Linear(5, 3))
    with torch.no_grad():
        model[0].weight.fill_(-1.0)
    x, y = torch.rand(1, 6, generator=torch.Generator().manual_seed(0)), torch.tensor([0])
    obs, _ = observe(model, nn.functional.cross_entropy, x, y)
    assert "gradient is zero" in Analysis.parse("gradient-rank")(obs)[0].words
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    obs, _ = observe(model, nn.functional.cross_entropy, x, y)
    assert "up to scale" in Analysis.parse("gradient-rank")(obs)[0].words
    with pytest.raises(ValueError, match="needs to know input_shape"):
        Analysis.parse("gradient-rank")(obs.only("batch_size"))


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")
def test_tensors_of_one_module_that_do_not_fit_side_by_side_are_counted_apart() -> None:
    class Lora(nn.Module):
        def __init__(self, d: int, m: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(m, d) / d**0.5, requires_grad=False)
            self.A, self.B = nn.Parameter(torch.randn(2, d) / d**0.5), nn.Parameter(torch.randn(m, 2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.weight + self.B @ self.A)

    torch.manual_seed(0)
    x, y = torch.rand(1, 12), torch.tensor([0])
    model = nn.Sequential(Lora(12, 6), nn.Tanh(), Lora(6, 3))
    found = Analysis.parse("gradient-rank")(observe(model, nn.functional.cross_entropy, x, y)[0])
    assert sum(risk.rank for risk in found) == 4  # one of each of both A and B
    recurrent = nn.LSTM(4, 8, proj_size=5, batch_first=True)

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.r, self.o = recurrent, nn.Linear(5, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.o(self.r(x)[0][:, -1])

    found = Analysis.parse("gradient-rank")(observe(Last(), nn.functional.cross_entropy, torch.rand(1, 6, 4), y)[0])
    assert {risk.layer.partition(".")[0] for risk in found} == {"r", "o"}
