from typing import Any

import pytest
import torch
from clients import Exchange, perceptron
from torch import nn
from torch.nn import functional as F

from unbatch import Observation
from unbatch.inversion.input_span import in_input_span
from unbatch.inversion.view import View
from unbatch.models.small import build

PROTOCOLS = {
    "gradient": {},
    "steps": {"local_steps": 5, "learning_rate": 0.3},
    "momentum": {"epochs": 2, "local_batch_size": 2, "learning_rate": 0.1, "momentum": 0.9},
}
CLIENT = {
    "client": perceptron((3, 8, 8), 5, depth=2, width=40, activation="relu"),
    "y": torch.tensor([0, 3, 3, 1]),
    "n": 4,
    "dtype": torch.float64,
}


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
def test_the_reduced_network_trains_on_z_as_the_whole_one_on_x(exchange: Exchange, protocol: dict[str, Any]) -> None:
    obs, x, y = exchange(**CLIENT, **protocol)
    found = in_input_span(View.of(obs), torch.Generator().manual_seed(0))
    assert found is not None
    assert found.exact
    assert found.rows.shape == (4, 192)
    z = x.flatten(1) @ found.rows.T
    assert torch.allclose(found.inputs(z), x, atol=1e-9)
    assert found.obs.residual(z, y) < 1e-9
    assert found.obs.residual(z + 0.01, y) > 1e-3


def test_a_noisy_update_is_reduced_and_said_to_be_inexact(exchange: Exchange) -> None:
    obs, _, _ = exchange(**CLIENT)
    rng = torch.Generator().manual_seed(1)
    noisy = {k: t + 1e-4 * torch.randn(t.shape, generator=rng, dtype=t.dtype) for k, t in obs.update.items()}
    found = in_input_span(
        View.of(Observation(model=obs.model, loss=obs.loss, update=noisy, knowledge=obs.knowledge)), rng
    )
    assert found is not None
    assert not found.exact


@pytest.mark.parametrize(
    "protocol",
    [{"local_steps": 2, "optimiser": "adam"}, {"local_steps": 2, "weight_decay": 0.1}],
    ids=["adam", "weight decay"],
)
def test_updates_with_other_rows_than_the_inputs_are_left_alone(exchange: Exchange, protocol: dict[str, Any]) -> None:
    obs, _, _ = exchange(**CLIENT, **protocol)
    assert in_input_span(View.of(obs), torch.Generator().manual_seed(0)) is None


class Normalised(nn.Module):
    """A normalisation by channel, which inputs in the span have none of."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.head = nn.Linear(192, 40), nn.Linear(40, 5)
        self.register_buffer("shift", torch.full((3, 1, 1), 0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.gelu(self.dense((x - self.shift).flatten(1))))


@pytest.mark.parametrize("kind", ["convolution", "normalisation"])
def test_networks_that_do_more_than_flatten_are_left_alone(exchange: Exchange, kind: str) -> None:
    rng = torch.Generator().manual_seed(0)
    model = build("convnet", (3, 8, 8), 5, rng=rng) if kind == "convolution" else Normalised()
    obs, _, _ = exchange(**CLIENT | {"client": model})
    assert in_input_span(View.of(obs), torch.Generator().manual_seed(0)) is None
