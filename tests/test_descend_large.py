"""Batches larger than the way down determines: each picture is searched for from its own tensor, where they come apart."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unbatch
from unbatch import Observation, Protocol, Reconstruction
from unbatch.attacks import Descend
from unbatch.inversion.descent.pictures import Misfit, searched
from unbatch.inversion.descent.tangent import Tangent
from unbatch.inversion.descent.walk import Told
from unbatch.network.graph import Value
from unbatch.network.sections import section
from unbatch.network.tracing import trace
from unbatch.numerics.linear.null_space import null_space
from unbatch.numerics.windows.rays import rays

SHAPE = (2, 8, 8)
EXAMPLES = 6  # the second layer's strided kernel meets a quarter of 6 x 64 entries with 48 equations a channel


def wide() -> nn.Sequential:
    """Four windows an example and 64 channels tell up to 16 examples apart; 48 channels lead two of them down."""
    torch.manual_seed(0)
    return (
        nn.Sequential(
            nn.Conv2d(2, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 48, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(48, 64, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(256, 5),
        )
        .double()
        .eval()
    )


def views(n: int) -> Tensor:
    rng = torch.Generator().manual_seed(3)
    return torch.randn(n, *SHAPE, generator=rng, dtype=torch.float64)


def seen(x: Tensor, y: Tensor) -> Observation:
    return unbatch.observe(wide(), F.cross_entropy, x, y, protocol=Protocol(mode="eval"))[0]


def errors(found: Reconstruction, x: Tensor) -> Tensor:
    """Of every recovered example, relative to the nearest true one."""
    assert found.inputs is not None
    gap = torch.cdist(found.inputs.flatten(1), x.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
    return gap.min(1).values / found.inputs.flatten(1).norm(dim=1)


@pytest.mark.parametrize("alike", [False, True])
def test_a_batch_beyond_the_way_down_is_recovered_example_by_example(alike: bool) -> None:
    x, y = views(EXAMPLES), torch.tensor([1] * EXAMPLES if alike else [0, 1, 2, 3, 4, 0])
    found = Descend(steps=200)(seen(x, y))
    assert found.trace["searched by"] == "3"
    assert len(found) == EXAMPLES
    assert found.bound is not None
    assert found.labels is not None
    far = errors(found, x)
    assert float(far.max()) < 1e-9
    assert bool((far <= found.bound).all())
    assert sorted(found.labels.tolist()) == sorted(y.tolist())


def told_of(below: nn.Module, x: Tensor) -> Told:
    maps = below(x).detach()
    return Told(Value(tuple(maps.shape)), None, maps, tuple(maps.shape), torch.zeros_like(maps))


def test_examples_are_searched_for_as_each_would_be_alone() -> None:
    below, x = wide()[:4].requires_grad_(False), views(3)
    told, start = told_of(below, x), views(6)[3:].float()
    together = [value for value, _ in searched(Misfit(below, told).single(), start, 1.0, steps=10)][-1]
    one = Misfit(below, told.of([1])).single()
    alone = [value for value, _ in searched(one, start[1:2], 1.0, steps=10)][-1]
    assert together.shape == (3,)
    assert float(together[1]) == pytest.approx(float(alone[0]), rel=1e-3)


def test_a_few_null_directions_of_a_large_matrix_are_all_found_and_too_many_show() -> None:
    rng = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(120, 120, generator=rng, dtype=torch.float64)).Q
    values = torch.cat([torch.zeros(5, dtype=torch.float64), torch.linspace(0.05, 2, 115, dtype=torch.float64)])
    squares = (Q * values) @ Q.T
    found = null_space(squares, 1e-10, most=5)
    assert found.shape == (5, 120)
    assert torch.allclose(found.T @ found, Q[:, :5] @ Q[:, :5].T, atol=1e-10)
    assert len(null_space(squares, 1.0, most=5)) > 5


def test_rays_beyond_the_number_of_dimensions_are_looked_for() -> None:
    """The cone over a pentagon has five rays in three dimensions; none of them may end the search for the others."""
    turn = 2 * torch.pi / 5 * torch.arange(5, dtype=torch.float64)
    corners = torch.stack([turn.cos(), turn.sin()], 1)
    sides = torch.stack([(turn + torch.pi / 5).cos(), (turn + torch.pi / 5).sin()], 1)
    vectors = (torch.cos(torch.tensor(torch.pi / 5)) - corners @ sides.T).repeat(1, 2)  # [5 rays, 10 facets]
    rows = torch.linalg.svd(vectors, full_matrices=False)[2][:3]
    assert len(list(rays(rows, torch.Generator().manual_seed(0), most=40))) == 5


class Branched(nn.Module):
    """What a residual network is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.end = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.a(x)))
        return self.end(F.avg_pool2d(F.relu(self.b(y) + y), 4).flatten(1))


def test_a_networks_tangent_is_its_derivative() -> None:
    torch.manual_seed(0)
    net = Branched().double()
    net(views(4))
    graph = trace(net.eval().requires_grad_(False), SHAPE)
    whole = section(graph, graph.input, graph.output)
    x, v = views(2), views(4)[2:]
    assert Tangent.reads(whole)
    assert torch.allclose(Tangent(whole, x).run(v), torch.func.jvp(net, (x,), (v,))[1], rtol=1e-12)


@pytest.mark.parametrize("layer", [nn.GELU(), nn.MaxPool2d(2), nn.GroupNorm(1, 2), nn.BatchNorm2d(2)])
def test_what_is_not_piecewise_linear_is_no_tangent(layer: nn.Module) -> None:
    graph = trace(nn.Sequential(nn.Conv2d(2, 2, 1), layer), SHAPE, "train")
    assert not Tangent.reads(section(graph, graph.input, graph.output))
