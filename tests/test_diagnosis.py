import pytest
import torch
from clients import linear
from torch import nn
from torch.nn import functional as F

from unbatch import Knowledge, Observation, Protocol, diagnose, observe


def batch(n: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(2)
    return torch.randn(n, 4, generator=rng), torch.randint(3, (n,), generator=rng)


def changed(
    factor: float = 1.0, protocol: Protocol | None = None, model: nn.Module | None = None, **known
) -> Observation:
    x, y = batch()
    obs, _ = observe(model or linear(), F.cross_entropy, x, y, protocol=protocol)
    return Observation(
        model=obs.model,
        loss=obs.loss,
        update={k: factor * v for k, v in obs.update.items()},
        knowledge=Knowledge(input_shape=(4,), **known),
    )


@pytest.mark.parametrize(
    ("obs", "words"),
    [
        (changed(-1), "sign is flipped"),
        (changed(4), "4 times too large: a sum over the batch"),
        (changed(-0.03), "learning rate 0.03"),
        (changed(0.7), "0.7 times the gradient"),
        (
            changed(protocol=Protocol(local_steps=3, learning_rate=0.2), learning_rate=0.2),
            "that of 3 local steps of sgd",
        ),
        (changed(protocol=Protocol(local_steps=2, optimiser="adam")), "that of 2 local steps of adam"),
        (
            changed(-1, protocol=Protocol(local_steps=4, learning_rate=0.1), learning_rate=0.1, local_steps=4),
            "before minus after",
        ),
        (
            changed(
                protocol=Protocol(local_steps=5, learning_rate=0.1, momentum=0.9), learning_rate=0.1, local_steps=5
            ),
            "momentum 0.9",
        ),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_what_is_off_is_said(obs: Observation, words: str) -> None:
    assert words in " ".join(diagnose(obs, *batch()))


def test_nothing_is_said_where_nothing_is_off() -> None:
    assert diagnose(changed(), *batch()) == []


def test_train_mode_is_told_from_eval_mode() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    notes = diagnose(changed(protocol=Protocol(mode="train"), model=model, mode="eval"), *batch())
    assert notes == [
        "The update is that of one gradient, model in train mode; declared was one gradient, model in eval mode."
    ]


def test_other_data_is_not_explained_away() -> None:
    x, y = batch()
    assert "No reading explains" in diagnose(changed(), x.flip(1) + 1, y)[0]


def test_missing_and_zero_parameters() -> None:
    obs = changed()
    part = {k: v for k, v in obs.update.items() if k != "0.bias"}
    fewer = Observation(model=obs.model, loss=obs.loss, update=part, knowledge=obs.knowledge)
    assert "lacks 1 trainable parameters (0.bias)" in diagnose(fewer)[0]
    part["0.weight"] = torch.zeros_like(part["0.weight"])
    assert (
        "exactly zero (0.weight)"
        in diagnose(Observation(model=obs.model, loss=obs.loss, update=part, knowledge=obs.knowledge))[0]
    )
    nothing = {k: torch.zeros_like(v) for k, v in obs.update.items()}
    silent = Observation(model=obs.model, loss=obs.loss, update=nothing, knowledge=obs.knowledge)
    assert "all zeros" in diagnose(silent)[0]
