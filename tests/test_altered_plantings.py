"""Updates that are altered on their way to a server that planted the model: what it claims of them is true, or nothing."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from unbatch import Attack, Knowledge, NotApplicable, Observation, Truth
from unbatch.attack import ActiveAttack
from unbatch.auditing.cheating import planted_exchange
from unbatch.knowledge import Earlier
from unbatch.network.dense import layer_inputs
from unbatch.reconstruction import Reconstruction, certified
from unbatch.testing import demo_setting

QUICK = ("hyperplane", "trap-weights", "latch:share=0.4")  # the others have such tests of their own
CERTIFYING = (*QUICK, "imprint", "conv-imprint", "lt-codes", "loki:units=100", "adapter-imprint")

Way = Callable[[str, Tensor], Tensor]


def _noisy(u: Tensor) -> Tensor:
    return u + 1e-3 * u.abs().max() * torch.randn(u.shape, generator=torch.Generator().manual_seed(0)).to(u)


WAYS: dict[str, Way] = {
    "weights at half the rate": lambda name, u: u / 2 if name.endswith("weight") else u,
    "biases at twice the rate": lambda name, u: u * 2 if name.endswith("bias") else u,
    "biases a little faster": lambda name, u: u * 1.01 if name.endswith("bias") else u,
    "half the entries": lambda name, u: torch.where(u.abs() > u.abs().median(), u, torch.zeros_like(u)),
    "mirrored columns": lambda name, u: u.flip(-1) if u.ndim == 2 else u,
    "signs": lambda name, u: u.sign(),
    "turned": lambda name, u: -u,
    "three times": lambda name, u: 3 * u,
    "noise": lambda name, u: _noisy(u),
    "bfloat16": lambda name, u: u.bfloat16().to(u),
}
FAST = ("weights at half the rate", "half the entries")


@cache
def planted(attack: str) -> tuple[ActiveAttack, Observation, Truth]:
    """The exchange of the attack's own demo."""
    made = Attack.parse(attack)
    assert isinstance(made, ActiveAttack)
    demo = made.demo
    setting = demo_setting(demo)
    told = setting.domain.public() | setting.knowledge
    return made, *planted_exchange(made, setting, knowledge=told, defences=demo.defences, server_seed=3)


def errors(found: Reconstruction, obs: Observation, truth: Truth) -> Tensor:
    true = truth.inputs
    if found.layer:
        true = layer_inputs(obs.model, found.layer, true, obs.protocol.mode)
    assert found.inputs is not None
    x, true = (t.detach().double().flatten(1) for t in (found.inputs, true))
    return torch.stack([(true - one).norm(dim=1).min() / one.norm() for one in x])


def altered(obs: Observation, way: Way) -> Observation:
    """All rounds, in the same way."""
    told = Knowledge()
    if "earlier" in obs.knowledge:
        told = Knowledge(
            earlier=[
                Earlier(state=past.state, update={name: way(name, u) for name, u in past.update.items()})
                for past in obs.knowledge.earlier
            ]
        )
    return replace(obs, update={name: way(name, u) for name, u in obs.update.items()}, knowledge=obs.knowledge | told)


@pytest.mark.parametrize(
    ("attack", "way"),
    [
        (attack, way) if attack in QUICK and way in FAST else pytest.param(attack, way, marks=pytest.mark.slow)
        for attack in CERTIFYING
        for way in WAYS
    ],
)
def test_what_is_claimed_of_an_altered_update_is_true(attack: str, way: str) -> None:
    made, obs, truth = planted(attack)
    honest = certified(made(obs))
    assert len(honest)
    assert bool((errors(honest, obs, truth) <= honest.bound).all())
    try:
        found = certified(made(altered(obs, WAYS[way])))
    except NotApplicable:
        return
    assert not len(found) or bool((errors(found, obs, truth) <= found.bound).all()), found.trace.get("second judge")


def test_a_trap_without_a_threshold_says_what_the_size_rests_on() -> None:
    """All weights at half the rate are the honest update of half the example then, and nothing in it tells."""
    half = WAYS["weights at half the rate"]
    made, obs, _ = planted("latch:share=0.5")  # a threshold of 0
    honest, halved = made(obs), made(altered(obs, half))
    assert len(certified(honest))
    assert "condition" not in honest.trace  # another unit, which has a threshold, holds it as well
    assert len(certified(halved))
    assert "size rests on the client's having sent all parameters at one rate" in halved.trace["condition"]
    made, obs, _ = planted("latch:share=0.4")
    assert len(certified(made(obs)))
    with pytest.raises(NotApplicable, match="none by one example alone"):
        made(altered(obs, half))
