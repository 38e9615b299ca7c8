"""Batch norm in train mode: what its running statistics before and after a step say, and pictures read through it."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from clients import Exchange
from convolutional import SMALL, conv, errors, exact, leaky, network, psnr, refused, sound
from torch import Tensor, nn

from unbatch.attacks.layer_by_layer import LayerByLayer
from unbatch.knowledge import Knowledge
from unbatch.network.batch_norm import KnownBatchNorm, known_batch_norms
from unbatch.network.chain import Link, chain
from unbatch.observation import Observation
from unbatch.protocol import Protocol, local_update


def two(act: type[nn.Module] = nn.Tanh, seed: int = 0, *, momentum: float | None = 0.1, bias: bool = False):
    norms = [nn.BatchNorm2d(channels, momentum=momentum) for channels in (8, 12)]
    trunk = [conv(3, 8, padding=1, bias=bias), norms[0], act(), conv(8, 12, padding=1, bias=bias), norms[1], act()]
    return network(trunk, seed=seed)


def after(obs: Observation, x: Tensor, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The buffers of the client after its step, in that precision."""
    model = copy.deepcopy(obs.model).train()
    with torch.no_grad():
        model(x.to(next(model.parameters())))
    return {k: b.to(dtype) if dtype and b.is_floating_point() else b for k, b in model.named_buffers()}


def told(obs: Observation, buffers: dict[str, Tensor]) -> Observation:
    return replace(obs, knowledge=obs.knowledge | Knowledge(buffers=buffers))


def known(layer: nn.Module, before: dict[str, Tensor], sent: dict[str, Tensor], n: int = 1) -> KnownBatchNorm:
    (link,) = known_batch_norms([Link("", layer, (2, 4, 4), (2, 4, 4))], before, sent, n)
    assert isinstance(link.module, KnownBatchNorm)
    return link.module


# ------------------------------------------------------------------------------------------------------- the pictures


@pytest.mark.parametrize("act", [nn.Tanh, nn.ELU, leaky], ids=["tanh", "elu", "leaky"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_picture_behind_two_batch_norms_in_train_mode(
    exchange: Exchange, act: type[nn.Module], momentum: float | None
) -> None:
    obs, x, y = exchange(two(act, momentum=momentum), mode="train")
    known = told(obs, after(obs, x))
    found = LayerByLayer()(known)
    assert psnr(found, x) > 200
    assert torch.equal(found.labels, y)
    assert bool(found.bound.isfinite().all())
    sound(known, found, x)
    assert [row["rank"] for row in found.trace["readings"]] == [512, 192]


@pytest.mark.parametrize("act", [nn.Tanh, nn.ELU, leaky], ids=["tanh", "elu", "leaky"])
def test_the_same_in_single_precision(exchange: Exchange, act: type[nn.Module]) -> None:
    obs, x, _ = exchange(two(act), dtype=torch.float32, mode="train")
    known = told(obs, after(obs, x))
    found = LayerByLayer()(known)
    assert float(errors(found, x)[0][0]) < 1e-4
    assert bool(found.bound.isfinite().all())
    sound(known, found, x)


def test_without_its_statistics_the_batch_norm_is_named(exchange: Exchange) -> None:
    obs, x, _ = exchange(two(), mode="train")
    refused(
        obs,
        "layer '4' (BatchNorm2d) cannot be read backward: its output does not hold the standard deviation",
        method="r-gap",
    )
    refused(obs, "running statistics after the step (buffers) would", method="r-gap")
    half = {k: b for k, b in after(obs, x).items() if k.startswith("4.")}
    refused(told(obs, half), "layer '1' (BatchNorm2d)", method="r-gap")


def test_statistics_of_another_moment_are_declined(exchange: Exchange) -> None:
    obs, x, _ = exchange(two(), mode="train")
    same = {k: b.clone() for k, b in obs.model.named_buffers()}
    refused(told(obs, same), "are not those after one step", method="r-gap")
    again = after(obs, x)
    again["4.num_batches_tracked"] += 1
    refused(told(obs, again), "are not those after one step", method="r-gap")


def test_what_an_activation_hides_of_its_output_is_said(exchange: Exchange) -> None:
    obs, x, _ = exchange(two(nn.ReLU), mode="train")
    refused(told(obs, after(obs, x)), "needs its whole output", method="r-gap")
    pooled = network([conv(3, 8, padding=1), nn.BatchNorm2d(8), nn.AvgPool2d(2), nn.Tanh()])
    obs, x, _ = exchange(pooled, mode="train")
    refused(
        told(obs, after(obs, x)),
        "layer '1' (KnownBatchNorm) cannot be read backward: what it passes back needs",
        method="r-gap",
    )


def test_a_batch_s_statistics_are_of_all_its_examples(exchange: Exchange) -> None:
    model = network([conv(3, 8, padding=1), nn.BatchNorm2d(8), nn.Tanh()], hidden=(40,), act=nn.Softplus)
    obs, x, _ = exchange(model, n=2, mode="train")
    sent = after(obs, x)
    kept = [{k: b.clone() for k, b in buffers} for buffers in (sent.items(), obs.model.named_buffers())]
    refused(told(obs, sent), "its statistics run over 2 examples")
    for before, now in zip(kept, (sent, dict(obs.model.named_buffers())), strict=True):
        assert all(torch.equal(before[k], now[k]) for k in before), "unmix, which reads the features, changes nothing"


@pytest.mark.parametrize(
    ("trunk", "shape"),
    [
        ([conv(3, 8, padding=1), nn.BatchNorm2d(8), leaky(), conv(8, 12), nn.BatchNorm2d(12)], SMALL),
        ([nn.Unflatten(1, (4, 20)), nn.Conv1d(4, 8, 3, bias=False), nn.BatchNorm1d(8, affine=False), nn.Tanh()], (80,)),
    ],
    ids=["before the dense layer", "1d, not affine"],
)
def test_other_places_of_a_batch_norm(exchange: Exchange, trunk: list[nn.Module], shape: tuple[int, ...]) -> None:
    obs, x, y = exchange(network(trunk, shape), shape=shape, mode="train")
    exact(told(obs, after(obs, x)), x, y, 200.0)


def test_the_pull_back_constraint_through_a_batch_norm(exchange: Exchange) -> None:
    trunk = [conv(3, 12, 4, stride=2, padding=2), nn.BatchNorm2d(12), leaky(), conv(12, 8, stride=2, padding=1)]
    trunk += [nn.BatchNorm2d(8), leaky(), conv(8, 24, padding=1), nn.BatchNorm2d(24), leaky()]
    obs, x, _ = exchange(network(trunk, (3, 12, 12)), shape=(3, 12, 12), mode="train")
    known = told(obs, after(obs, x))
    found = LayerByLayer()(known)
    assert found.trace["deficient"] == ["3, 4"]
    assert float(errors(found, x)[0][0]) < 1e-9
    assert bool(found.bound.isfinite().all())
    sound(known, found, x)


def test_a_deficient_layer_before_a_batch_norm_is_a_guess(exchange: Exchange) -> None:
    obs, x, _ = exchange(
        network([conv(3, 4, stride=2), nn.BatchNorm2d(4), leaky(), conv(4, 24, 2), leaky()]), mode="train"
    )
    found = LayerByLayer()(told(obs, after(obs, x)))
    assert found.bound.tolist() == [torch.inf]
    assert found.trace["deficient"] == ["0, 1"]


def test_eval_mode_reads_sent_statistics_as_they_are(exchange: Exchange) -> None:
    obs, x, y = exchange(two())
    exact(told(obs, dict(obs.model.named_buffers())), x, y, 200.0)


# --------------------------------------------------------------------------------------------------------- the bounds


def biased(model: nn.Module, share: float) -> nn.Module:
    """Running statistics far from the batch's, which rounding costs more."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean += share
            module.running_var += share
    return model


SENT = [
    (torch.float64, None),
    (torch.float64, torch.float32),
    (torch.float32, None),
    pytest.param(torch.float32, torch.float16, marks=pytest.mark.slow),  # nothing fits, and every start is tried
]


@pytest.mark.parametrize("share", [0.0, 30.0], ids=["near", "far"])
@pytest.mark.parametrize(("dtype", "sent"), SENT, ids=["64", "64, sent in 32", "32", "32, sent in 16"])
def test_no_bound_lies_below_what_the_statistics_rounding_does(
    exchange: Exchange, dtype: torch.dtype, sent: torch.dtype | None, share: float
) -> None:
    finite = 0
    for seed in range(6):
        act, momentum = (nn.Tanh, nn.ELU, nn.Sigmoid)[seed % 3], (0.1, 0.03, 0.5)[seed % 3]
        obs, x, _ = exchange(biased(two(act, seed, momentum=momentum), share), dtype=dtype, seed=seed + 3, mode="train")
        known = told(obs, after(obs, x, sent))
        found = LayerByLayer()(known)
        if len(found):
            sound(known, found, x)
            finite += int(found.bound.isfinite().sum())
    assert finite >= (4 if sent is None and share == 0 else 0)


@pytest.mark.parametrize("momentum", [0.1, 0.01])
@pytest.mark.parametrize(
    "sent",
    [
        None,
        torch.float32,
        pytest.param(torch.float16, marks=pytest.mark.slow),
    ],  # nothing fits, and every start is tried
    ids=["64", "sent in 32", "sent in 16"],
)
def test_a_scale_that_the_update_does_not_hold_is_known_no_better_than_the_statistics(
    exchange: Exchange, sent: torch.dtype | None, momentum: float
) -> None:
    """What a frozen convolution and a batch norm feed is the same for a picture twice as bright: only they tell."""
    finite = 0
    for seed in range(8):
        model = network([conv(1, 1, 1), nn.BatchNorm2d(1, 1e-14, momentum), leaky()], (1, 6, 6), seed=seed)
        obs, x, _ = exchange(model, shape=(1, 6, 6), seed=seed, mode="train")
        frozen = replace(obs, update={k: t for k, t in obs.update.items() if k != "0.weight"})
        known = told(frozen, after(obs, x, sent))
        sound(known, LayerByLayer()(known), x)
        found = LayerByLayer(method="r-gap")(known)
        if len(found):
            assert found.trace["residual"] < 1e-6
            sound(known, found, x)
            finite += int(found.bound.isfinite().sum())
    assert sent == torch.float16 or finite >= 6


# ----------------------------------------------------------------------------------------------------- the statistics


def test_statistics_are_those_of_the_batch_up_to_their_error() -> None:
    rng = torch.Generator().manual_seed(0)
    for dtype in (torch.float64, torch.float32):
        for momentum in (0.1, 0.01, None, 1.0):
            layer = nn.BatchNorm2d(2, momentum=momentum).to(dtype)
            layer.running_mean += torch.randn(2, generator=rng, dtype=dtype)
            x = (2 * torch.randn(1, 2, 4, 4, generator=rng, dtype=dtype) + 3).double()
            before = {k: b.clone() for k, b in layer.named_buffers()}
            layer(x.to(dtype))
            found = known(layer.double(), before, {k: b.to(dtype) for k, b in layer.named_buffers() if "num" not in k})
            assert not found.flaw
            true = x[0].flatten(1).mean(1), x[0].flatten(1).var(1, unbiased=False)
            for got, right, error in zip((found.mean, found.var), true, found.errors, strict=True):
                assert bool(((got - right).abs() <= error + 4 * torch.finfo(dtype).eps * right.abs()).all())
                assert float(error.max()) < 100 * torch.finfo(dtype).eps * 10 / (momentum or 1.0)


def test_draws_are_one_error_off_and_the_layer_stays_as_it_is() -> None:
    layer = nn.BatchNorm2d(2).double()
    before = {k: b.clone() for k, b in layer.named_buffers()}
    layer(torch.rand(1, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    made = known(layer, before, dict(layer.named_buffers()))
    mean, var = made.mean.clone(), made.var.clone()
    other = made.drawn(torch.Generator().manual_seed(0))
    torch.testing.assert_close((other.mean - mean).abs(), made.errors[0], rtol=0.2, atol=1e-18)
    torch.testing.assert_close((other.var - var).abs(), made.errors[1], rtol=0.2, atol=1e-18)
    assert torch.equal(made.mean, mean)
    assert torch.equal(made.var, var)
    assert other.weight is made.weight


def test_statistics_of_no_use_say_why() -> None:
    layer = nn.BatchNorm2d(2).double()
    before = {k: b.clone() for k, b in layer.named_buffers()}
    layer(1e-9 * torch.rand(1, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    sent = {k: b.clone() for k, b in layer.named_buffers()}
    assert "no smaller than the batch's own variance" in known(layer, before, sent).flaw
    assert "of all" in known(layer, before, sent, 3).flaw
    still = nn.BatchNorm2d(2, momentum=0.0).double()
    moved = {k: b + 1 for k, b in before.items()}
    assert "momentum is 0" in known(still, before, moved).flaw


def test_other_layers_and_norms_that_sent_nothing_stay() -> None:
    model = nn.Sequential(conv(1, 2), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 3))
    links = chain(model, (1, 8, 8), "train")
    buffers = dict(model.named_buffers())
    assert [link.module for link in known_batch_norms(links, buffers, {}, 1)] == [link.module for link in links]
    kinds = [type(link.module) for link in known_batch_norms(links, buffers, buffers, 1)]
    assert kinds == [nn.Conv2d, KnownBatchNorm, nn.Flatten, nn.Linear]


def test_buffers_of_another_precision_fit_the_simulated_step(exchange: Exchange) -> None:
    obs, x, y = exchange(two())
    sent = {k: b.float() if b.is_floating_point() else b for k, b in obs.model.named_buffers()}
    found = local_update(obs.model, obs.loss, x, y, Protocol(mode="eval"), buffers=sent)
    for name, tensor in obs.update.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)
    assert SMALL == obs.knowledge.input_shape
