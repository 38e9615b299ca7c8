from typing import Literal

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from unbatch.network.dense import DenseFeatures, anatomy, forward, layer_inputs


class Custom(nn.Module):
    """Parameters without nn.Linear, a normalisation before, a layer used twice, one that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.never, self.out = (
            nn.Linear(8, 6),
            nn.Linear(6, 6),
            nn.Linear(6, 6),
            nn.Linear(6, 3),
        )
        self.W = nn.Parameter(torch.ones(6, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = (x.flatten(1) - 0.5) / 0.25
        h = F.gelu(self.twice(self.twice(self.first(x))))
        return self.out(F.linear(h, self.W))


def test_dense_layers_are_found_by_running() -> None:
    first, free, head = anatomy(Custom(), (2, 2, 2)).layers
    assert (first.name, first.bias, first.head) == ("first", "first.bias", False)
    assert (free.name, free.bias, free.feeds) == ("W", None, None)
    assert head.name == "out"
    assert head.head
    assert first.feeds is not None
    x = torch.rand(3, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(first.feeds.invert((x - 0.5) / 0.25), x, rtol=1e-5, atol=1e-6)


def test_a_nonlinear_or_mixing_path_is_not_taken_for_the_input() -> None:
    for before in (nn.Tanh(), nn.Linear(8, 8), nn.LayerNorm(8)):
        model = nn.Sequential(before, nn.Linear(8, 3))
        assert anatomy(model, (8,)).layers[-1].feeds is None


def test_layers_on_sequences_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Flatten(), nn.Linear(15, 2))
    assert [d.name for d in anatomy(model, (3, 4)).layers] == ["2"]


def test_modes_are_put_back_and_failures_said() -> None:
    model = nn.Sequential(nn.Linear(4, 2), nn.Dropout(0.5))
    model[1].eval()
    forward(model, torch.ones(1, 4))
    assert [m.training for m in model] == [True, False]
    with pytest.raises(ValueError, match="forward fails on inputs of shape"):
        forward(model, torch.ones(1, 5))
    assert torch.equal(layer_inputs(model, "0", torch.ones(2, 4)), torch.ones(2, 4))
    with pytest.raises(ValueError, match="no dense layer called 'x'"):
        layer_inputs(model, "x", torch.ones(1, 4))


def behind_a_convolution() -> nn.Module:
    rng = torch.Generator().manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.GELU(), nn.Flatten(), nn.Linear(12, 5), nn.GELU(), nn.Linear(5, 2)
    ).double()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=rng, dtype=torch.float64)
    return model


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", ["4", "6"])
def test_features_are_the_layer_inputs_and_differentiable(name: str, mode: Literal["train", "eval"]) -> None:
    model, rng = behind_a_convolution(), torch.Generator().manual_seed(1)
    x = torch.randn(3, 2, 4, 4, generator=rng, dtype=torch.float64, requires_grad=True)
    features = DenseFeatures(model, name, mode)
    expected = layer_inputs(model, name, x.detach(), mode)
    torch.testing.assert_close(features(x).detach(), expected)
    assert torch.autograd.gradcheck(features, (x,))
    layer = model[int(name)]
    layer.weight.data += 1  # what lies above the features does not matter to them, and the layer is known by its name
    torch.testing.assert_close(features(x).detach(), expected)


def test_features_of_a_free_weight() -> None:
    x = torch.rand(3, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(DenseFeatures(Custom(), "first")(x).detach(), (x - 0.5) / 0.25)
    model = Custom()
    torch.testing.assert_close(DenseFeatures(model, "W")(x).detach(), layer_inputs(model, "W", x))


def test_features_put_modes_back_and_refuse_unknown_layers() -> None:
    model = behind_a_convolution()
    model[1].eval()
    before = [module.training for module in model.modules()]
    DenseFeatures(model, "4", "eval")(torch.ones(1, 2, 4, 4).double())
    assert [module.training for module in model.modules()] == before
    for name in ("0", "x"):  # a convolution is no dense layer
        with pytest.raises(ValueError, match=f"no dense layer called '{name}'"):
            DenseFeatures(model, name)(torch.ones(1, 2, 4, 4).double())
    assert [module.training for module in model.modules()] == before
    with pytest.raises(ValueError, match="never"):
        DenseFeatures(Custom(), "never")(torch.ones(1, 8))
