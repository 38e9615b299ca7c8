"""The rule for residual blocks against autograd, and how the attack and the analyses read them."""

from collections import OrderedDict

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from unbatch.attack import Attack
from unbatch.auditing.client import observe
from unbatch.case import Case
from unbatch.inversion.backward.rank_count import Constraints, constraints
from unbatch.knowledge import Knowledge
from unbatch.layer import rule_for
from unbatch.layers.residual import Residual, bend, parsed, split
from unbatch.models.residual import ResidualBlock
from unbatch.network.chain import chain
from unbatch.protocol import Protocol
from unbatch.testing import check_layer_rule


class Block(nn.Module):
    """last(beside(x) + branch(x)), layers by any name; `last` may be missing."""

    def __init__(self, branch: list[nn.Module], beside: nn.Module, last: nn.Module | None = None) -> None:
        super().__init__()
        self.branch, self.beside = nn.Sequential(*branch), beside
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        z = self.beside(x) + self.branch(x)
        return z if self.last is None else self.last(z)


def filled(module: nn.Module, seed: int) -> nn.Module:
    rng = torch.Generator().manual_seed(seed)
    for name, tensor in [*module.double().named_parameters(), *module.named_buffers()]:
        if tensor.is_floating_point():
            tensor.data = 0.4 * torch.randn(tensor.shape, generator=rng, dtype=torch.float64)
            if "var" in name:
                tensor.data = tensor.abs() + 0.5
    return module.eval()


def drawn(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)


def gradients(block: nn.Module, x: Tensor, dz: Tensor) -> Tensor:
    """All dL/dW of the block's weights, flat, in its parameters' order, by autograd."""
    own = [p for name, p in block.named_parameters() if name.endswith("weight")]
    return torch.cat([g.flatten() for g in torch.autograd.grad(block(x), own, dz)])


@hypothesis_settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 10**6),
    channels=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    sides=st.tuples(st.integers(4, 6), st.integers(4, 6)),
    stride=st.integers(1, 2),
    normed=st.booleans(),
    deep=st.booleans(),
    plain=st.booleans(),
)
def test_a_block_of_affine_branches_against_autograd(seed, channels, sides, stride, normed, deep, plain) -> None:
    before, middle, after = channels
    plain = plain and stride == 1
    after = before if plain else after
    branch = [nn.Conv2d(before, middle if deep else after, 3, stride, 1)]
    branch += [nn.BatchNorm2d(middle if deep else after)] if normed else []
    branch += [nn.Conv2d(middle, after, 3, 1, 1, bias=False)] if deep else []
    beside = nn.Identity() if plain else nn.Conv2d(before, after, 1, stride, bias=False)
    block = filled(Block(branch, beside), seed)
    x = drawn((before, *sides), seed)
    rule, z = rule_for(block), block(x).detach()
    assert isinstance(rule, Residual)
    dz = drawn(tuple(z.shape[1:]), 7)
    forward = rule.forward_equations(block, (before, *sides), z)
    backward = rule.gradient_equations(block, (before, *sides), dz, gradients(block, x, dz).detach())
    d = x.numel()
    torch.testing.assert_close(forward.matrix(), jacrev(block)(x).reshape(-1, d), rtol=1e-9, atol=1e-9)
    own = {name: p.detach() for name, p in block.named_parameters() if name.endswith("weight")}
    assert tuple(own) == rule.weights(block)

    def found(x: Tensor) -> Tensor:
        parts = torch.func.grad(lambda w: (functional_call(block, w, (x,)) * dz).sum())(own)
        return torch.cat([parts[name].flatten() for name in own])

    torch.testing.assert_close(backward.matrix(), jacrev(found)(x).reshape(-1, d), rtol=1e-9, atol=1e-9)
    u = drawn((backward.equations,), 3)
    torch.testing.assert_close(backward.pull(u), u @ backward.matrix(), rtol=1e-9, atol=1e-9)
    for system in (forward, backward):
        assert float(system.residual(x.flatten()).norm()) < 1e-9 * (1 + float(system.b.norm()))
    check_layer_rule(rule, block, x)


def test_the_sum_is_told_from_the_activation_behind_it() -> None:
    block = filled(Block([nn.Conv2d(2, 2, 3, padding=1)], nn.Identity(), nn.Tanh()), 0)
    assert rule_for(block) is None
    model = nn.Sequential(OrderedDict(block=block, head=nn.Flatten()))
    links = split(chain(model, (2, 5, 5)))
    assert [link.name for link in links] == ["block", "block.last", "head"]
    x = drawn((2, 5, 5), 0)
    torch.testing.assert_close(links[1].module(links[0].module(x)), block(x))
    assert [name for name, _ in links[0].module.named_parameters()] == [name for name, _ in block.named_parameters()]
    check_layer_rule(rule_for(links[0].module), links[0].module, x)


def test_a_branch_with_an_activation_is_refused_in_words() -> None:
    own = ResidualBlock(3, 3, 1, nn.ReLU).eval()
    assert parsed(own).after == "act2"
    assert rule_for(own) is None
    assert "'act1' (ReLU)" in bend(own)
    assert "'norm1' (BatchNorm2d)" in bend(own.train())  # on its own statistics it is not affine either
    assert split(chain(nn.Sequential(own), (3, 4, 4)))[0].module is not None


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + 2 * x


class Bent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x) if float(x.sum()) > 0 else x


@pytest.mark.parametrize("module", [Twice(), Bent(), nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 4)])
def test_what_is_no_sum_of_two_branches_of_layers_has_no_such_rule(module: nn.Module) -> None:
    assert parsed(module) is None
    assert bend(module) == ""


def network(seed: int = 0) -> nn.Sequential:
    act = nn.LeakyReLU
    layers = OrderedDict(
        first=nn.Conv2d(3, 8, 3),
        bent=act(),
        block=Block([nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)], nn.Identity(), act()),
        flatten=nn.Flatten(),
        head=nn.Linear(8 * 6 * 6, 5),
    )
    model = nn.Sequential(layers)
    rng = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        p.data = (2 * torch.rand(p.shape, generator=rng) - 1) / (p[0].numel() if p.ndim > 1 else 4) ** 0.5
        if "branch.1.weight" in name:
            p.data += 1
    return model.double().eval()


def test_a_picture_is_read_through_a_block_by_linear_systems_alone() -> None:
    rng = torch.Generator().manual_seed(1)
    x, y = torch.rand(1, 3, 8, 8, generator=rng, dtype=torch.float64), torch.tensor([2])
    loss = Case.parse("photos:size=16").setting().loss
    known = Knowledge(input_range=(0.0, 1.0))
    obs, _ = observe(network(), loss, x, y, knowledge=known, protocol=Protocol(mode="eval"))
    found = Attack.parse("layer-by-layer:method=r-gap")(obs)  # which does not follow a block by Gauss and Newton
    assert float((found.inputs - x).norm() / x.norm()) < 1e-9
    assert float(found.bound[0]) < 1e-6
    assert found.trace["deficient"] == []
    assert [row["layers"] for row in found.trace["readings"]] == ["block", "first"]


def test_its_equations_are_counted() -> None:
    links = chain(network(), (3, 8, 8))
    rng = torch.Generator().manual_seed(1)
    x, loss = torch.rand(1, 3, 8, 8, generator=rng, dtype=torch.float64), nn.CrossEntropyLoss()
    found = {each.link.name: each for each in constraints(links, x, torch.tensor([2]), loss)}
    block = found["block"]
    assert isinstance(block, Constraints)
    assert type(block.link.module).__name__ == "Block"
    assert block.deficit == 0
    assert block.unknowns == 8 * 6 * 6
    assert block.gradients.equations == 8 * 8 * 9 + 8  # the convolution's, and the norm's
