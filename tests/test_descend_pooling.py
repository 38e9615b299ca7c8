"""Pictures behind max poolings: which pixel of a window was the largest is told by the search for absolute values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unbatch
from unbatch import Protocol
from unbatch.attacks import Descend
from unbatch.inversion.descent.back import Back
from unbatch.inversion.descent.pictures import Misfit, newton, searched
from unbatch.inversion.descent.walk import Told
from unbatch.network.graph import Value

SIDE = 12
SHAPE = (3, SIDE, SIDE)


def pooled(norm: bool = True) -> nn.Module:
    """Two convolutions with max pooling behind each, a third, and a dense head."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for given, gave, last in ((3, 48, nn.MaxPool2d(2)), (48, 128, nn.MaxPool2d(2)), (128, 96, nn.AdaptiveAvgPool2d(1))):
        layers += [nn.Conv2d(given, gave, 3, padding=1), *([nn.BatchNorm2d(gave)] if norm else []), nn.ReLU(), last]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(96, 5)).double().eval()


def views(n: int) -> Tensor:
    """Pictures of a few coarse patches and some grain, about one unit of spread."""
    rng = torch.Generator().manual_seed(7)
    coarse = torch.randn(n, 3, 4, 4, generator=rng, dtype=torch.float64)
    grain = torch.randn(n, *SHAPE, generator=rng, dtype=torch.float64)
    return F.interpolate(coarse, size=(SIDE, SIDE), mode="bilinear") + 0.1 * grain


def told_of(below: nn.Module, x: Tensor) -> Told:
    seen = below(x).detach()
    return Told(Value(tuple(seen.shape)), None, seen, tuple(seen.shape), torch.zeros_like(seen))


def test_the_search_by_absolute_values_names_every_maximum_and_newton_ends_exactly() -> None:
    below, x = pooled()[:8].requires_grad_(False), views(1)
    misfit = Misfit(below, told_of(below, x))
    start = 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    (*_, (value, found)) = searched(misfit.single(), start, 1.0, steps=300)
    assert value < 1e-2
    (*_, (size, exact)) = newton(misfit, found.double())
    assert size < 1e-13
    assert float((exact - x).norm() / x.norm()) < 1e-12


def test_the_gradients_below_are_met_by_the_inputs_alone() -> None:
    below, x = pooled()[:8], views(2)
    weights = {name: p.detach().clone().requires_grad_() for name, p in below.named_parameters() if p.dim() > 1}
    out = torch.func.functional_call(below, weights, (x,))
    delta = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    seen = dict(zip(weights, torch.autograd.grad(out, list(weights.values()), delta), strict=True))
    back = Back(below, delta, seen).single()
    assert float(back(x.float()).detach()) < 1e-10
    off = x.float() + 0.1 * views(3)[1:].float()
    at = off.requires_grad_()
    loss = back(at)
    assert float(loss.detach()) > 1e-3
    loss.backward()
    assert at.grad is not None
    assert bool(at.grad.any())
    assert float(back(x.flip(0).float()).detach()) > 1e-3  # what came back belongs to its own example


@pytest.mark.slow
@pytest.mark.parametrize("norm", [True, False])
def test_a_batch_behind_two_max_poolings_is_recovered_exactly(norm: bool) -> None:
    net, x, y = pooled(norm), views(2), torch.tensor([1, 3])
    obs = unbatch.observe(net, F.cross_entropy, x, y, protocol=Protocol(mode="eval"))[0]
    found = Descend()(obs)
    assert found.inputs is not None
    assert found.bound is not None
    assert found.labels is not None
    assert len(found) == 2
    gap = torch.cdist(found.inputs.flatten(1), x.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
    error, which = (gap / x.flatten(1).norm(dim=1)).min(1)
    assert sorted(which.tolist()) == [0, 1]
    assert found.labels.tolist() == y[which].tolist()
    assert bool((error < 1e-10).all())
    assert bool((error <= found.bound).all())


def test_behind_a_strided_first_layer_and_max_pooling_the_gradient_leaves_the_picture_open() -> None:
    """The rank that the theory's (10) counts: distinct positive maxima and the first layer's own gradient."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 2, 5, 2, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Flatten(), nn.Linear(2 * 9, 3)
    ).double()
    x, weights = torch.randn(1, 1, 12, 12).double(), dict(net.named_parameters())

    def gradient(x: Tensor) -> Tensor:
        def loss(own: dict[str, Tensor]) -> Tensor:
            return F.cross_entropy(torch.func.functional_call(net, own, (x,)), torch.tensor([1]))

        return torch.cat([part.flatten() for part in torch.func.grad(loss)(weights).values()])

    ways = torch.eye(x.numel(), dtype=torch.float64).view(-1, *x.shape)
    values = torch.linalg.svdvals(torch.stack([torch.func.jvp(gradient, (x,), (way,))[1] for way in ways], 1).detach())
    pooled_, where = F.max_pool2d(net[:2](x), 3, 2, 1, return_indices=True)
    distinct = sum(len(set(at[p > 0].tolist())) for p, at in zip(pooled_[0], where[0], strict=True))
    rank = int((values > 1e-10 * values[0]).sum())
    assert distinct < rank <= distinct + 2 * 25 + 2 < x.numel()
