"""Masks and scales above a tensor that is known up to a small error, as from float32 gradients."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbatch.inversion.descent.above import Above, flips_above, known_above, rescaled
from unbatch.inversion.descent.places import WindowLayer, places
from unbatch.network.graph import Graph
from unbatch.network.sections import section
from unbatch.network.tracing import trace

ERROR = 1e-3


class Net(nn.Module):
    """Two convolutions above the first, a residual block with one module for all ReLUs that writes in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.b = (
            nn.Conv2d(2, 16, 3, padding=1),
            nn.Conv2d(16, 16, 3, padding=1),
            nn.Conv2d(16, 16, 3),
        )
        self.norm, self.relu, self.head = nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.Linear(256, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.first(x))
        x = self.relu(self.norm(self.a(x)) + x)
        return self.head(torch.flatten(self.relu(self.b(x)), 1))  # type: ignore[no-any-return]


def problem() -> tuple[Graph, list[WindowLayer], dict[str, Tensor], Tensor]:
    """A small residual network, its gradient, and what the first ReLU gave for the batch that it is of."""
    torch.manual_seed(0)
    net = Net().double().eval()
    x = torch.randn(12, 2, 6, 6, dtype=torch.float64)
    loss = F.cross_entropy(net(x), torch.arange(12) % 4)
    names, weights = zip(*net.named_parameters(), strict=True)
    update = dict(zip(names, torch.autograd.grad(loss, weights), strict=True))
    graph = trace(net.requires_grad_(False), (2, 6, 6), "eval")
    every = list(places(graph))
    return graph, every, update, section(graph, graph.input, every[1].given)(x)


def off(found: Above, true: Above) -> float:
    return max(float((found.deltas[k] - true.deltas[k]).norm() / true.deltas[k].norm()) for k in true.deltas)


def test_masks_that_an_error_decides_wrongly_are_found_from_the_head_downwards() -> None:
    graph, every, update, maps = problem()
    head, readers = every[-1], every[1:2]
    near = maps * (1 + ERROR * torch.randn(maps.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64))
    true, found = (known_above(graph, readers, each, head, update) for each in (maps, near))
    flips = flips_above(graph, every, found, readers[0].given, head, update, ERROR)
    for relu, mask in flips.items():
        passed = [section(graph, readers[0].given, relu)(each) > 0 for each in (maps, near)]
        assert torch.equal(mask, passed[0] ^ passed[1])
    assert sum(int(mask.sum()) for mask in flips.values()) > 1
    mended = known_above(graph, readers, near, head, update, flips)
    assert off(found, true) > 10 * ERROR
    assert off(mended, true) < 2 * ERROR


def test_listening_for_masks_leaves_the_layers_as_they_were() -> None:
    graph, every, update, maps = problem()
    up = known_above(graph, every[1:2], maps, every[-1], update)
    assert flips_above(graph, every, up, every[1].given, every[-1], update, ERROR) == {}
    assert not any(module._forward_hooks for place in every for module in (place.layer,))


def test_scales_that_weight_gradients_do_not_tell_are_told_by_the_shift() -> None:
    graph, every, update, maps = problem()
    scales = torch.linspace(0.99, 1.01, 12, dtype=torch.float64).view(-1, 1, 1, 1)
    up = known_above(graph, every[1:2], maps * scales, every[-1], update)
    up.deltas[every[1].gave] = known_above(graph, every[1:2], maps, every[-1], update).deltas[every[1].gave] / scales
    found = rescaled(graph, every[1:2], up, update, ERROR)
    assert float((found - maps).norm() / maps.norm()) < 1e-9
