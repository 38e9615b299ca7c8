"""Information: what is simulated is what is sent, whatever stands between the batch and the update."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbatch import Knowledge, Protocol, observe
from unbatch.analysis import Analysis, Bound, Verdict
from unbatch.errors import NotApplicable
from unbatch.inversion.fisher import check_noise, doubled, sent
from unbatch.loss import Loss, loss_named
from unbatch.observation import Observation

RANGE = Knowledge(input_range=(0.0, 1.0))
N = 5


def huber(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.huber_loss(outputs, F.one_hot(labels, 6).to(outputs), reduction="sum")


LOSSES: dict[str, Loss] = {"mean": loss_named("cross-entropy"), "sum": loss_named("cross-entropy", "sum")}
PRIVATE = "dp-sgd:clip=0.5,noise_multiplier={z},accountant=rdp,reduction={how}"
NOISE, SUM, CLIP = "noise:sigma={z}", "secure-aggregation:clients=3", "clip:norm=0.1"
PRUNE, ROUND, MORE = "prune:share=0.5", "quantise:bits=4", "noise:relative=true,sigma=0.1"
ONCE, OFTEN = "local-steps:steps=1,learning_rate=.1", "local-steps:steps=3,learning_rate=.1"
SIMULATED = [
    [NOISE],
    [PRIVATE],
    [PRIVATE, SUM],
    [PRIVATE, ONCE],
    [PRIVATE, SUM, ONCE],
    [PRIVATE, "local-steps:steps=1,batch=2,learning_rate=.1"],
    [NOISE, PRIVATE],
    [PRIVATE, NOISE],
    [NOISE, OFTEN],
    [OFTEN, NOISE],
    [SUM, NOISE],
    [NOISE, SUM],
    [SUM, NOISE, OFTEN],
    [NOISE, CLIP],
    [NOISE, CLIP, "clip:norm=0.05"],
    [NOISE, CLIP, SUM],
    [NOISE, CLIP, OFTEN],
    [NOISE, "label-smoothing"],
]
REFUSED = [
    [ONCE, PRIVATE],
    [OFTEN, PRIVATE],
    [SUM, PRIVATE],
    [PRIVATE, OFTEN],
    [NOISE, PRIVATE, OFTEN],
    [NOISE, OFTEN, PRIVATE],
    [PRIVATE, "local-steps:steps=1,optimiser=adam"],
    [PRIVATE, NOISE, CLIP],
    [PRIVATE, PRUNE, NOISE, CLIP],
    [SUM, CLIP, NOISE],
    [SUM, PRUNE, NOISE],
    [OFTEN, PRUNE, PRIVATE],
    [ONCE, PRUNE, PRIVATE],
    [PRUNE, SUM, NOISE, CLIP],
    [PRUNE, NOISE, PRUNE],
    [NOISE, SUM, CLIP],
    ["mixup", NOISE],
    [NOISE, "mixup"],
    [NOISE, "quantise:bits=4"],
    [NOISE, "noise:relative=true,sigma=0.1"],
]
# What stands around a noisy update, and the stack within whose noise is counted.
CHANGED = [
    ([PRUNE], [NOISE]),
    ([ROUND], [NOISE]),
    ([MORE], [NOISE]),
    (["clip:norm=0.05"], [NOISE]),
    (["clip:norm=0.05"], [NOISE, CLIP]),
    (["noise:sigma=1", ROUND, PRUNE], [NOISE, CLIP]),
    ([PRUNE], [PRIVATE]),
    ([PRUNE, "clip:norm=0.05"], [PRIVATE, SUM]),
    ([ROUND], [SUM, NOISE]),
    ([PRUNE], [NOISE, OFTEN]),
]


def update_of(stack: list[str], loss: Loss, how: str, z: float, seed: int = 0) -> Observation:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 6)).double()
    steps = any("steps=3" in spec for spec in stack)
    spelt = [spec.replace("{z}", str(z)).replace("{how}", how) for spec in stack]
    spelt = [f"{spec},steps=3" if steps and spec.startswith("dp-sgd") else spec for spec in spelt]
    return observe(model, loss, *batch(), defences=spelt, knowledge=RANGE, protocol=Protocol(mode="eval"), seed=seed)[0]


def batch() -> tuple[Tensor, Tensor]:
    return torch.rand(N, 1, 4, 4, generator=torch.Generator().manual_seed(0)).double(), torch.arange(N)


def flat(obs: Observation) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in obs.update.values()])


def keeps(stack: list[str], loss: Loss, how: str) -> None:
    noisy, bare = update_of(stack, loss, how, 0.01), flat(update_of(stack, loss, how, 0.0))
    check_noise(noisy)
    torch.testing.assert_close(sent(doubled(noisy), *batch()).detach(), bare, rtol=0, atol=1e-6 * float(bare.norm()))
    off = torch.stack([flat(update_of(stack, loss, how, 0.01, seed)) - bare for seed in range(12)])
    assert noisy.knowledge.noise == pytest.approx(float(off.square().mean().sqrt()), rel=0.05)


@pytest.mark.parametrize("how", LOSSES)
@pytest.mark.parametrize("stack", SIMULATED, ids=", ".join)
def test_what_is_simulated_is_what_is_sent_but_for_noise_of_the_size_that_is_told(stack: list[str], how: str) -> None:
    keeps(stack, LOSSES[how], how)


@pytest.mark.parametrize("stack", [[PRIVATE], [NOISE, SUM]], ids=", ".join)
def test_a_loss_of_no_known_form(stack: list[str]) -> None:
    keeps(stack, huber, "sum")


@pytest.mark.parametrize("stack", REFUSED, ids=", ".join)
def test_what_is_not_simulated_is_refused(stack: list[str]) -> None:
    with pytest.raises(NotApplicable):
        Analysis.parse("van-trees")(update_of(stack, LOSSES["mean"], "mean", 0.01))


@pytest.mark.parametrize("how", ["mean", pytest.param("sum", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("around", "within"), CHANGED, ids=lambda stack: ", ".join(stack))
def test_what_is_made_of_a_noisy_update_is_bounded_as_that_update(
    around: list[str], within: list[str], how: str
) -> None:
    changed, noisy = (update_of(stack, LOSSES[how], how, 0.01) for stack in (around + within, within))
    assert not torch.allclose(flat(changed), flat(noisy))
    assert changed.knowledge.noise_within == noisy.knowledge.noise
    torch.testing.assert_close(sent(doubled(changed), *batch()), sent(doubled(noisy), *batch()))
    for name in ("cramer-rao", "van-trees", "noise-information"):
        for at in (None, batch()):
            (bound,), (plain,) = (Analysis.parse(name)(obs, at=at) for obs in (changed, noisy))
            assert isinstance(bound, Bound)
            assert isinstance(plain, Bound)
            assert bound.value == plain.value
            assert f"before {changed.knowledge.altered} made of it what was sent" in bound.assumptions
            assert "made of it" not in plain.assumptions


def test_local_steps_around_a_changed_update_are_those_of_the_noisy_one() -> None:
    inside, outside = (
        update_of(stack, LOSSES["mean"], "mean", 0.01) for stack in ([PRUNE, NOISE, OFTEN], [OFTEN, PRUNE, NOISE])
    )
    assert torch.equal(flat(inside), flat(outside))
    first, second = (Analysis.parse("van-trees")(obs)[0] for obs in (inside, outside))
    assert isinstance(first, Bound)
    assert isinstance(second, Bound)
    assert first.value == second.value


@pytest.mark.parametrize("factor", [0.6, 1.6, 30.0])
@pytest.mark.parametrize("name", ["cramer-rao", "van-trees", "noise-information"])
def test_noise_of_another_size_than_is_told_is_refused_where_the_batch_is_known(name: str, factor: float) -> None:
    obs = update_of([NOISE], LOSSES["mean"], "mean", 0.01)
    told = Observation(
        model=obs.model, loss=obs.loss, update=obs.update, knowledge=obs.knowledge | Knowledge(noise=0.01 * factor)
    )
    assert Analysis.parse(name)(obs, at=batch())
    with pytest.raises(ValueError, match="not of the size that is told"):
        Analysis.parse(name)(told, at=batch())


@pytest.mark.parametrize("name", ["cramer-rao", "van-trees", "noise-information", "dp-reconstruction"])
def test_statistics_that_are_sent_without_noise_are_no_constants(name: str) -> None:
    obs = update_of([PRIVATE], LOSSES["mean"], "mean", 0.01)
    assert Analysis.parse(name)(obs)
    with pytest.raises(ValueError, match="statistics are sent without noise"):
        Analysis.parse(name)(with_statistics(obs, running_mean=torch.zeros(24)))


def with_statistics(obs: Observation, **sent: Tensor) -> Observation:
    """The exchange of a model that has such buffers too, which were sent."""
    model = copy.deepcopy(obs.model)
    for name, tensor in sent.items():
        model.register_buffer(name, torch.zeros_like(tensor))
    return replace(obs, model=model, knowledge=obs.knowledge | Knowledge(buffers=sent))


def test_statistics_are_counted() -> None:
    obs = update_of(["prune:share=0.99"], LOSSES["mean"], "mean", 0.0)
    verdict = Analysis.parse("counting")(obs)[-1]
    more = Analysis.parse("counting")(with_statistics(obs, mean=torch.rand(64), count=torch.tensor(1)))[-1]
    assert isinstance(verdict, Verdict)
    assert isinstance(more, Verdict)
    assert more.value == pytest.approx(verdict.value + 64 / 80)
