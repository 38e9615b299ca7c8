"""The client's step against torch.optim, which it must reproduce."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from unbatch import Protocol
from unbatch.protocol import local_update


def network(norm: bool = False) -> nn.Sequential:
    rng = torch.Generator().manual_seed(0)
    layers = [nn.Linear(6, 8), nn.BatchNorm1d(8) if norm else nn.Identity(), nn.Tanh(), nn.Linear(8, 3)]
    model = nn.Sequential(*layers).double()
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=rng, dtype=p.dtype)
    return model


def batch(n: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    return torch.randn(n, 6, generator=rng, dtype=torch.float64), torch.randint(3, (n,), generator=rng)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    "protocol",
    [
        Protocol(local_steps=1, learning_rate=0.1),
        Protocol(local_steps=4, learning_rate=0.1, momentum=0.9, weight_decay=0.01),
        Protocol(epochs=3, local_batch_size=2, learning_rate=0.05, mode="eval"),
        Protocol(epochs=2, local_batch_size=3, optimiser="adam", learning_rate=0.01, weight_decay=0.1),
        Protocol(local_steps=7, local_batch_size=2, optimiser="adam", mode="eval"),
    ],
    ids=str,
)
def test_local_training_is_that_of_torch_optim(protocol: Protocol, norm: bool) -> None:
    if norm and protocol.mode == "train" and protocol.local_batch_size == 2:
        pytest.skip("a last batch of one example has no batch statistics")
    model, (x, y) = network(norm), batch(6)
    start = copy.deepcopy(model)
    update = local_update(model, F.cross_entropy, x, y, protocol)
    model.train(protocol.mode == "train")
    kind = torch.optim.SGD if protocol.optimiser == "sgd" else torch.optim.Adam
    extra = {"momentum": protocol.momentum} if protocol.optimiser == "sgd" else {}
    optimiser = kind(model.parameters(), lr=protocol.learning_rate, weight_decay=protocol.weight_decay, **extra)
    size = protocol.local_batch_size or len(x)
    starts = list(range(0, len(x), size))
    for step in range(protocol.steps(len(x))):
        part = slice(starts[step % len(starts)], starts[step % len(starts)] + size)
        optimiser.zero_grad()
        F.cross_entropy(model(x[part]), y[part]).backward()
        optimiser.step()
    for (name, after), before in zip(model.named_parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(update[name], after.detach() - before.detach(), rtol=1e-9, atol=1e-12)


def test_one_gradient_is_autograd_s_and_the_model_stays_as_it_was() -> None:
    model, (x, y) = network(norm=True), batch()
    state = copy.deepcopy(model.state_dict())
    model[2].eval()
    update = local_update(model, F.cross_entropy, x, y, Protocol())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model] == [True, True, False, True]
    assert all(p.grad is None for p in model.parameters())
    F.cross_entropy(model.train()(x), y).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(update[name], p.grad)


def test_batch_norm_mode_is_part_of_the_protocol() -> None:
    model, (x, y) = network(norm=True), batch()
    train = local_update(model, F.cross_entropy, x, y, Protocol(mode="train"))
    evals = local_update(model, F.cross_entropy, x, y, Protocol(mode="eval"))
    assert not torch.allclose(train["0.weight"], evals["0.weight"])
    sent = {"1.running_mean": torch.ones(8).double(), "1.running_var": torch.full((8,), 2.0).double()}
    other = local_update(model, F.cross_entropy, x, y, Protocol(mode="eval"), buffers=sent)
    assert not torch.allclose(other["0.weight"], evals["0.weight"])


@pytest.mark.parametrize(
    "protocol",
    [
        Protocol(),
        Protocol(local_steps=3, momentum=0.5, learning_rate=0.1),
        Protocol(local_steps=2, optimiser="adam", learning_rate=0.1),
    ],
    ids=str,
)
def test_updates_differentiate_through_every_step(protocol: Protocol) -> None:
    model, (x, y) = network(), batch(2)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)

    def total(shift: torch.Tensor) -> torch.Tensor:
        update = local_update(model, F.cross_entropy, x + shift * direction, y, protocol, create_graph=True)
        return sum(u.square().sum() for u in update.values())

    at = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(total(at), at)
    h = 1e-5
    finite = (total(torch.tensor(h).double()) - total(torch.tensor(-h).double())) / (2 * h)
    torch.testing.assert_close(slope, finite.detach(), rtol=1e-5, atol=1e-12)


def test_frozen_parameters_send_nothing() -> None:
    model, (x, y) = network(), batch()
    model[0].weight.requires_grad_(False)
    assert set(local_update(model, F.cross_entropy, x, y, Protocol())) == {"0.bias", "3.weight", "3.bias"}


def test_unused_parameters_send_zeros() -> None:
    class Extra(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(6, 3).double(), nn.Parameter(torch.ones(2).double())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    update = local_update(Extra(), F.cross_entropy, *batch(), Protocol())
    assert torch.equal(update["spare"], torch.zeros(2).double())


@pytest.mark.parametrize("bad", [{"local_steps": 2, "epochs": 1}, {"learning_rate": 0}, {"momentum": 1}, {"steps": 3}])
def test_protocols_that_make_no_sense_are_refused(bad: dict) -> None:
    with pytest.raises(ValueError, match=r"give one|greater than|less than|unknown option"):
        Protocol(**bad)


def test_a_protocol_reads_as_words() -> None:
    assert str(Protocol(mode="eval")) == "one gradient, model in eval mode"
    words = str(Protocol(epochs=2, local_batch_size=8, momentum=0.9))
    assert "2 local epochs on batches of 8 of sgd" in words
    assert "momentum 0.9" in words
    assert str(Protocol(local_steps=1)).startswith("1 local step of sgd")
