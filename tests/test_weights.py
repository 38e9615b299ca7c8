"""Exchanges of whole weights: the difference, the client's step as it was told, and what batch norm's buffers tell."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbatch import Knowledge, Protocol, UnbatchError
from unbatch.adapters.weights import WeightsExchange, weights_exchange

EXAMPLES = 6


def dense() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


def normed() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(EXAMPLES, 5, generator=torch.Generator().manual_seed(1)), torch.arange(EXAMPLES) % 3


def client(
    net: nn.Module, optimiser: torch.optim.Optimizer, epochs: int, size: int, train: bool = True
) -> dict[str, Tensor]:
    """What an ordinary training loop makes of a model: its state after it."""
    x, y = batch()
    net.train(train)
    for _ in range(epochs):
        for part in torch.arange(EXAMPLES).split(size):
            optimiser.zero_grad()
            F.cross_entropy(net(x[part]), y[part]).backward()
            optimiser.step()
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def sgd(net: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), **({"lr": 0.1} | options))


def residual(found: WeightsExchange) -> float:
    return found.observation(F.cross_entropy).residual(*batch())


@pytest.mark.parametrize("made", [dense, normed])
@pytest.mark.parametrize(
    ("epochs", "size", "told", "options"),
    [
        (2, 3, {"lr": 0.1, "local-epochs": 2, "batch-size": 3}, {}),
        (1, 4, {"learning_rate": 0.1, "epochs": 1.0, "local_batch_size": 4.0}, {}),
        (1, 2, {"client-lr": 0.1, "Local-Epochs": 1, "batch_size": 2, "momentum": 0.9}, {"momentum": 0.9}),
        (1, 6, {"lr": 0.1, "local_steps": 1, "weight-decay": 0.01, "optimizer": "SGD"}, {"weight_decay": 0.01}),
    ],
)
def test_the_true_batch_explains_the_update_under_what_was_told(made, epochs, size, told, options) -> None:
    net = made()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    after = client(net, sgd(net, **options), epochs, size)
    for out, back in ((before, after), ([t.numpy() for t in before.values()], [t.numpy() for t in after.values()])):
        found = weights_exchange(made(), out, back, told=told, examples=EXAMPLES)
        assert residual(found) < 1e-4
        assert not [note for note in found.notes if "counted" in note]
        assert found.moved
        assert found.protocol.steps(EXAMPLES) == epochs * -(-EXAMPLES // size)
    wrong = weights_exchange(made(), before, after, told=told | {"lr": 0.05, "client-lr": 0.05, "learning_rate": 0.05})
    assert residual(wrong) > 0.1


def test_the_model_that_went_out_and_not_the_one_that_was_given_is_where_the_client_began() -> None:
    net = dense()
    for p in net.parameters():
        p.data += 1
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    given = dense()
    found = weights_exchange(given, before, client(net, sgd(net), 1, 6), told={"lr": 0.1, "local-steps": 1})
    assert torch.equal(found.model.state_dict()["0.weight"], before["0.weight"])
    assert torch.equal(given.state_dict()["0.weight"], dense().state_dict()["0.weight"])
    assert residual(found) < 1e-4


def test_batch_norm_tells_the_mode_and_the_number_of_steps() -> None:
    net = normed()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    after = client(net, sgd(net), 2, 3)
    found = weights_exchange(normed(), before, after, examples=EXAMPLES)
    assert (found.knowledge.mode, found.knowledge.local_steps) == ("train", 4)
    assert torch.equal(found.knowledge.buffers["1.running_mean"], after["1.running_mean"])
    said = weights_exchange(normed(), before, after, told={"epochs": 1, "batch-size": 6}, examples=EXAMPLES)
    assert any("batch norm counted 4 batches" in note for note in said.notes)

    net = normed()
    after = client(net, sgd(net), 1, 6, train=False)
    found = weights_exchange(normed(), before, after, told={"lr": 0.1, "local-steps": 1}, examples=EXAMPLES)
    assert found.knowledge.mode == "eval"
    assert "buffers" not in found.knowledge
    assert residual(found) < 1e-4


def test_one_batch_that_batch_norm_counted_makes_an_epoch_one_step() -> None:
    net = normed()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    after = client(net, sgd(net), 1, 6)
    found = weights_exchange(normed(), before, after, told={"lr": 0.1, "epochs": 1}, examples=EXAMPLES)
    assert found.protocol.first_step_alone(EXAMPLES)
    assert residual(found) < 1e-4


def test_what_a_caller_says_goes_before_what_was_told() -> None:
    net = dense()
    after = client(net, sgd(net), 1, 6)
    told = {"lr": 0.7, "epochs": 3, "batch-size": 2}
    found = weights_exchange(
        dense(),
        dense().state_dict(),
        after,
        told=told,
        examples=99,
        protocol=Protocol(local_steps=1, learning_rate=0.1, local_batch_size=6),
        knowledge=Knowledge(batch_size=EXAMPLES),
    )
    known = found.knowledge
    assert (known.local_steps, known.learning_rate, known.batch_size) == (1, 0.1, EXAMPLES)
    assert "epochs" not in known
    assert residual(found) < 1e-4
    partly = weights_exchange(dense(), dense().state_dict(), after, told=told, protocol=Protocol(learning_rate=0.1))
    assert (partly.knowledge.epochs, partly.knowledge.learning_rate) == (3, 0.1)


def test_what_was_not_told_is_said_and_cannot_be_simulated() -> None:
    net = dense()
    found = weights_exchange(dense(), dense().state_dict(), client(net, sgd(net), 1, 6))
    assert not found.steps_told
    assert "for how long the client trained" in found.notes[0]
    with pytest.raises(UnbatchError, match="for how long the client trained"):
        found.protocol  # noqa: B018
    told = weights_exchange(
        dense(),
        dense().state_dict(),
        client(net, sgd(net), 1, 6),
        told={"epochs": 1, "lr": "fast", "optimizer": "lion"},
    )
    assert [words for words in ("'fast'", "'lion'") if not any(words in note for note in told.notes)] == []
    for missing in ("the learning rate", "the optimiser", "the number of examples", "the local batch size"):
        assert any(note.startswith(f"{missing} was not told") for note in told.notes), missing


def test_frozen_parameters_and_parts_that_were_not_exchanged_are_no_part_of_the_update() -> None:
    net = dense()
    net[0].requires_grad_(False)
    after = client(net, sgd(net), 1, 6)
    frozen = dense()
    frozen[0].requires_grad_(False)
    found = weights_exchange(frozen, dense().state_dict(), after, told={"lr": 0.1, "local-steps": 1})
    assert list(found.update) == ["2.weight", "2.bias"]
    assert residual(found) < 1e-4
    head = {name: tensor for name, tensor in after.items() if name.startswith("2.")}
    part = weights_exchange(
        dense(), {n: dense().state_dict()[n] for n in head}, head, told={"lr": 0.1, "local-steps": 1}
    )
    assert list(part.update) == list(part.after) == ["2.weight", "2.bias"]


def test_weights_in_half_precision_are_noted() -> None:
    net = dense()
    after = {name: tensor.half() for name, tensor in client(net, sgd(net), 1, 6).items()}
    found = weights_exchange(dense(), dense().state_dict(), after, told={"local-steps": 1, "lr": 0.1})
    assert found.notes[-1].startswith("the weights came back in float16")
    assert not any("float16" in note for note in weights_exchange(dense(), after, dense().state_dict()).notes)


def test_weights_that_come_back_as_they_went_out_have_not_moved() -> None:
    assert not weights_exchange(normed(), normed().state_dict(), normed().state_dict()).moved


def test_a_norm_that_the_client_was_told_to_clip_to_is_known_where_it_holds() -> None:
    net = dense()
    after = client(net, sgd(net), 1, 6)
    long = weights_exchange(dense(), dense().state_dict(), after, told={"clipping_norm": 1e-3})
    assert "clip" not in long.knowledge
    assert any("told to clip to the norm 0.001" in note for note in long.notes)
    assert weights_exchange(dense(), dense().state_dict(), after, told={"clipping_norm": 9.0}).knowledge.clip == 9.0


def test_a_proximal_term_changes_nothing_of_one_step_and_hides_several() -> None:
    net = dense()
    after = client(net, sgd(net), 1, 6)
    one = weights_exchange(dense(), dense().state_dict(), after, told={"proximal-mu": 0.1, "local-steps": 1})
    assert "altered" not in one.knowledge
    more = weights_exchange(dense(), dense().state_dict(), after, told={"proximal-mu": 0.1, "epochs": 2})
    assert more.knowledge.altered == "proximal term, mu 0.1"


@pytest.mark.parametrize("out", [nn.Linear(2, 2).state_dict(), {"0.weight": torch.zeros(2, 2)}])
def test_another_model_is_refused_in_words(out: dict[str, Tensor]) -> None:
    with pytest.raises(UnbatchError, match="give its own factory"):
        weights_exchange(dense(), out, dense().state_dict())
