"""Descent behind norms: scales by what is sent back, inputs of layers before a norm, whole maps from a span."""

import copy
from collections.abc import Callable, Iterator
from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unbatch
from unbatch import Knowledge, Protocol, Reconstruction
from unbatch.attacks import Descend
from unbatch.inversion.descent.above import at_own_scale, known_above
from unbatch.inversion.descent.places import WindowLayer, places
from unbatch.inversion.descent.separation import separated
from unbatch.inversion.descent.walk import Walk, walk
from unbatch.models.channel_norm import NormName
from unbatch.models.small import build
from unbatch.network.graph import Graph
from unbatch.network.sections import section
from unbatch.network.tracing import trace
from unbatch.numerics.windows.geometry import Windows
from unbatch.numerics.windows.maps import maps_in

EPS = torch.finfo(torch.float64).eps
SHAPE = (3, 16, 16)
Mode = Literal["train", "eval"]


def problem(
    norm: NormName, mode: Mode, n: int, raised: float = 0.0
) -> tuple[Graph, list[WindowLayer], dict[str, Tensor], Tensor]:
    """A small residual network, its gradient and the batch that it is of; norms raise three channels by as much."""
    rng = torch.Generator().manual_seed(0)
    net = build("resnet-small", SHAPE, 5, depth=2, width=32, norm=norm, rng=rng).double().train(mode == "train")
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d) and mode == "train":
            module.running_mean = module.running_var = module.num_batches_tracked = None
            module.track_running_stats = False
        if isinstance(module, nn.BatchNorm2d):
            module.bias.data[:3] += raised
    coarse = torch.randn(n, 3, 8, 8, generator=rng, dtype=torch.float64)
    x = F.interpolate(coarse, size=SHAPE[1:], mode="bilinear")
    loss = F.cross_entropy(net(x), torch.arange(n) % 5)
    names, weights = zip(*net.named_parameters(), strict=True)
    update = dict(zip(names, torch.autograd.grad(loss, weights), strict=True))
    graph = trace(net.requires_grad_(False), SHAPE, mode)
    return graph, list(places(graph)), update, x


def told_apart(
    norm: NormName, mode: Mode, n: int, layer: str, raised: float = 0.0
) -> tuple[Graph, list[WindowLayer], dict[str, Tensor], Tensor, Tensor]:
    """The problem, and the maps at a layer at their own scales, in the order of the examples."""
    graph, every, update, x = problem(norm, mode, n, raised)
    place = next(place for place in every if place.call.name == layer)
    rng, mixed = torch.Generator().manual_seed(0), mode == "train" and norm == "batch"
    found = separated(place, place.flat(update[place.weight]), EPS, rng, lambda: True, mixed=mixed)
    assert found is not None
    assert (len(found), found.missed) == (n, 0)
    maps = at_own_scale(graph, found, every[-1], update, mixed=mixed)
    true = section(graph, graph.input, place.given)(x)
    near = torch.cdist(maps.flatten(1), true.flatten(1)).argmin(0)
    return graph, every, update, x, maps[near]


CASES = [("group", "eval", 2), ("batch", "train", 1), ("batch", "train", 3)]


@pytest.mark.parametrize(("norm", "mode", "n"), CASES)
def test_maps_are_told_apart_at_their_own_scales(norm: NormName, mode: Mode, n: int) -> None:
    graph, every, _, x, maps = told_apart(norm, mode, n, "block6.conv1")
    given = next(place.given for place in every if place.call.name == "block6.conv1")
    true = section(graph, graph.input, given)(x)
    assert float((maps - true).norm() / true.norm()) < 1e-9


def led_down(norm: NormName, mode: Mode, n: int, raised: float = 0.0) -> Iterator[tuple[str, float]]:
    graph, every, update, x, maps = told_apart(norm, mode, n, "block6.conv1", raised)
    readers = [place for place in every if place.call.name == "block6.conv1"]
    up = known_above(graph, readers, maps, every[-1], update)
    down: Walk = walk(graph, every, readers[0].given, up.maps, up.delta, update, EPS, EPS)
    for told in down.told:
        assert told.value.call is not None
        if told.rows is None:
            true = section(graph, graph.input, told.value)(x)
            yield told.value.call.name, float((told.seen - true).norm() / true.norm())


@pytest.mark.parametrize(("norm", "mode", "n"), CASES)
def test_inputs_of_layers_behind_which_a_norm_stands_are_found_whatever_it_mixes(
    norm: NormName, mode: Mode, n: int
) -> None:
    errors = dict(led_down(norm, mode, n))
    assert {"block5.act2", "block5.act1", "block4.act2", "block4.act1", "block3.act2"} <= set(errors)
    assert max(errors.values()) < 1e-10


def test_a_constant_that_batch_norm_hides_is_told_where_no_entry_is_zero() -> None:
    """Three channels of block 4's output are positive everywhere: the least of their entries passes for zero at first."""
    errors = dict(led_down("batch", "train", 1, raised=4.0))
    assert {"block4.act2", "block4.act1", "block3.act2"} <= set(errors)
    assert max(errors.values()) < 1e-10


@pytest.mark.parametrize("raised", [0.0, 4.0])
def test_a_tensor_whose_constant_stays_hidden_is_not_searched_by(raised: float) -> None:
    """The layer in front sent no gradient, so that nothing below tells the constant."""
    graph, every, update, _, maps = told_apart("batch", "train", 1, "block6.conv1", raised)
    readers = [place for place in every if place.call.name == "block6.conv1"]
    up = known_above(graph, readers, maps, every[-1], update)
    silent = next(place.weight for place in every if place.call.name == "block4.conv2")
    sent = {name: gradient for name, gradient in update.items() if name != silent}
    down = walk(graph, every, readers[0].given, up.maps, up.delta, sent, EPS, EPS)
    checked = {told.value.call.name: told.checked for told in down.told if told.value.call is not None}
    assert checked["block5.act1"]
    assert checked["block4.act2"] is (raised == 0.0)


@pytest.mark.parametrize("stride", [1, 2])
def test_whole_maps_are_among_those_whose_windows_lie_in_the_span(stride: int) -> None:
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(2, 40, 4 * stride, 4 * stride, generator=rng, dtype=torch.float64)
    windows = Windows.of(tuple(x.shape[1:]), kernel=(3, 3), stride=(stride, stride), padding=(1, 1))  # type: ignore[arg-type]
    rows = torch.linalg.qr(windows.rows(x).flatten(0, 1).T).Q.T
    basis = maps_in(rows, windows).flatten(1)
    assert len(basis) == (
        2 if stride == 1 else 32
    )  # shifted maps fit as well where no window reaches beyond the far edge
    assert torch.allclose(x.flatten(1) @ basis.T @ basis, x.flatten(1))


def chain(norm: Callable[[int], nn.Module], seed: int = 0) -> nn.Module:
    """Three convolutions with a norm behind each, and a dense head."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for given, gave, stride in ((2, 16, 1), (16, 32, 2), (32, 48, 1)):
        layers += [nn.Conv2d(given, gave, 3, stride, padding=1, bias=False), norm(gave), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 4)).double()


def recovered(
    norm: Callable[[int], nn.Module], mode: Mode, n: int, *, sent: bool = False, seed: int = 0
) -> tuple[Reconstruction, Tensor]:
    """What is certified of a batch behind norms, and the errors [k] of that; `sent`: running averages come along."""
    net, rng = chain(norm, seed), torch.Generator().manual_seed(100 + seed)
    x = torch.randn(n, 2, 8, 8, generator=rng, dtype=torch.float64)
    y = torch.randint(4, (n,), generator=rng)
    told = Knowledge()
    if sent:
        after = copy.deepcopy(net).train()
        after(x)
        told = Knowledge(buffers=dict(after.named_buffers()))
    obs, _ = unbatch.observe(net, F.cross_entropy, x, y, protocol=Protocol(mode=mode), knowledge=told)
    found = Descend(steps=60)(obs)
    assert found.inputs is not None
    gap = torch.cdist(found.inputs.flatten(1), x.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
    return found, gap.min(1).values / found.inputs.flatten(1).norm(dim=1)


def test_a_batch_behind_group_norm_is_recovered_and_certified() -> None:
    found, errors = recovered(lambda c: nn.GroupNorm(4, c), "eval", 2)
    assert len(found) == 2
    assert found.bound is not None
    assert bool((errors <= found.bound).all())
    assert float(found.bound.max()) < 1e-4


def test_a_scale_that_only_eps_tells_is_in_the_bound() -> None:
    """Behind layer norm: an input of another size sends nearly the same, and the error is a thousandth, not rounding."""
    found, errors = recovered(lambda c: nn.GroupNorm(1, c), "eval", 1, seed=11)
    assert len(found) == 1
    assert found.bound is not None
    assert float(errors.max()) > 1e-6
    assert bool((errors <= found.bound).all())


def test_running_averages_tell_the_batch_statistics_so_that_its_examples_come_apart() -> None:
    """In train mode a batch is recovered without them, too; with them no contrast or mean is hard to see."""
    bounds = []
    for sent in (False, True):
        found, errors = recovered(nn.BatchNorm2d, "train", 2, sent=sent)
        assert len(found) == 2
        assert found.bound is not None
        assert bool((errors <= found.bound).all())
        assert ("batch statistics" in found.trace) == sent
        bounds.append(float(found.bound.max()))
    assert bounds[1] < bounds[0] / 10
