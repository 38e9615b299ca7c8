"""Networks whose forward calls functions, beside their twins made of modules: the same links, equations and readings."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from convolutional import drawn
from torch import Tensor, nn
from torch.nn import functional as F

from unbatch.analysis import Analysis
from unbatch.attack import Attack
from unbatch.auditing.client import observe
from unbatch.errors import NotApplicable
from unbatch.inversion.backward.rank_count import Constraints, constraints
from unbatch.inversion.determined_share import determined
from unbatch.knowledge import Knowledge
from unbatch.network.chain import chain, follow
from unbatch.observation import Observation
from unbatch.protocol import Protocol

Pair = tuple[nn.Module, nn.Module]  # functional, of modules


class Net(nn.Module):
    """Layers by name, and a forward that is handed them."""

    def __init__(self, forward: Callable[[Net, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def modular(**layers: nn.Module) -> nn.Module:
    sequence = nn.Sequential()
    for name, layer in layers.items():
        sequence.add_module(name, layer)
    return sequence


def conv(before: int, after: int, kernel: int = 3, **more: int) -> nn.Conv2d:
    return nn.Conv2d(before, after, kernel, **more)


def lenet() -> Pair:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(net.c1(x)), 2)
        x = F.max_pool2d(F.relu(net.c2(x)), (2, 2))
        x = torch.flatten(x, 1)
        return net.f2(F.relu(net.f1(x)))

    def layers() -> list[nn.Module]:
        return [conv(1, 6, padding=2), conv(6, 16), nn.Linear(16, 20), nn.Linear(20, 5)]

    a, b, c, d = layers()
    parts = {"c1": a, "r1": nn.ReLU(), "p1": nn.MaxPool2d(2), "c2": b, "r2": nn.ReLU(), "p2": nn.MaxPool2d((2, 2))}
    one = Net(forward, **dict(zip(("c1", "c2", "f1", "f2"), layers(), strict=True)))
    return one, modular(**parts, fl=nn.Flatten(), f1=c, r3=nn.ReLU(), f2=d)


def mnist() -> Pair:
    """PyTorch's own example, smaller."""

    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.conv1(x)
        x = F.relu(x)
        x = net.conv2(x)
        x = F.relu(x)
        x = F.max_pool2d(x, 2)
        x = net.dropout1(x)
        x = torch.flatten(x, 1)
        x = net.fc1(x)
        x = F.relu(x)
        x = F.dropout(x, training=net.training)
        return F.log_softmax(net.fc2(x), dim=1)

    def layers() -> list[nn.Module]:
        return [conv(1, 4), conv(4, 8), nn.Dropout(0.25), nn.Linear(32, 12), nn.Linear(12, 5)]

    a, b, c, d, e = layers()
    one = Net(forward, **dict(zip(("conv1", "conv2", "dropout1", "fc1", "fc2"), layers(), strict=True)))
    trunk = modular(conv1=a, r1=nn.ReLU(), conv2=b, r2=nn.ReLU(), p=nn.MaxPool2d(2), dropout1=c)
    for name, layer in (("fl", nn.Flatten()), ("fc1", d), ("r3", nn.ReLU()), ("d2", nn.Dropout()), ("fc2", e)):
        trunk.add_module(name, layer)
    trunk.add_module("out", nn.LogSoftmax(dim=1))
    return one, trunk


def perceptron() -> Pair:
    def forward(net: Net, x: Tensor) -> Tensor:
        return net.b(torch.tanh(net.a(x.view(-1, 64))))

    one = Net(forward, a=nn.Linear(64, 70), b=nn.Linear(70, 5))
    return one, modular(fl=nn.Flatten(), a=nn.Linear(64, 70), t=nn.Tanh(), b=nn.Linear(70, 5))


def averaged() -> Pair:
    """Pooled by averages; a leaky slope and a clamp among its activations; weights that it passes to functions itself."""

    def forward(net: Net, x: Tensor) -> Tensor:
        x = F.conv2d(x, net.a.weight, net.a.bias, padding=1)
        x = F.leaky_relu(F.avg_pool2d(x, 2), 0.2)
        x = net.b(x).sigmoid()
        return F.linear(x.reshape(x.size(0), -1), net.f.weight, net.f.bias).clamp(min=0)

    one = Net(forward, a=conv(1, 9), b=conv(9, 24), f=nn.Linear(96, 5))
    parts = {"a": conv(1, 9, padding=1), "p": nn.AvgPool2d(2), "l": nn.LeakyReLU(0.2), "b": conv(9, 24)}
    return one, modular(**parts, s=nn.Sigmoid(), fl=nn.Flatten(), f=nn.Linear(96, 5), r=nn.ReLU())


def normed() -> Pair:
    """As VGG with batch norm, its last pictures averaged, what it calls in place."""

    def forward(net: Net, x: Tensor) -> Tensor:
        x = F.elu(net.n1(net.c1(x)), inplace=True)
        x = F.batch_norm(net.c2(x), net.n2.running_mean, net.n2.running_var, net.n2.weight, net.n2.bias, net.training)
        x = torch.tanh_(x)
        return net.f(F.adaptive_avg_pool2d(x, 2).flatten(1))

    def layers() -> dict[str, nn.Module]:
        own = {"c1": conv(1, 8), "n1": nn.BatchNorm2d(8), "c2": conv(8, 12), "n2": nn.BatchNorm2d(12)}
        return own | {"f": nn.Linear(48, 5)}

    own = layers()
    parts = {"c1": own["c1"], "n1": own["n1"], "e": nn.ELU(), "c2": own["c2"], "n2": own["n2"], "t": nn.Tanh()}
    return Net(forward, **layers()), modular(**parts, p=nn.AdaptiveAvgPool2d(2), fl=nn.Flatten(), f=own["f"])


class Block(nn.Module):
    """An identity block as modules, or with its activations called; the last one behind the sum, before it or missing."""

    def __init__(self, functional: bool, where: str, bent: bool = False) -> None:
        super().__init__()
        self.conv1, self.norm1, self.conv2 = conv(8, 8, padding=1), nn.BatchNorm2d(8), conv(8, 8, padding=1)
        own = nn.Tanh() if not functional else None
        self.act, self.where = own, where
        self.inner = (nn.Tanh() if not functional else torch.tanh) if bent else None

    def forward(self, x: Tensor) -> Tensor:
        act = torch.tanh if self.act is None else self.act
        z = act(x) if self.where == "before" else x
        z = self.norm1(self.conv1(z))
        z = z if self.inner is None else self.inner(z)
        z = self.conv2(z)
        z += x
        return act(z) if self.where == "behind" else z


def block(where: str, bent: bool) -> Pair:
    def made(functional: bool) -> nn.Module:
        last = modular(stem=conv(1, 8, padding=1), act=nn.Tanh(), block=Block(functional, where, bent))
        last.add_module("end", nn.ELU())
        last.add_module("fl", nn.Flatten())
        last.add_module("f", nn.Linear(8 * 64, 5))
        return last

    return made(True), made(False)


def residual(bent: bool) -> Pair:
    """A residual network written out in forward, and its twin of blocks."""

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = conv(8, 8, padding=1), conv(8, 8, padding=1)
            self.act = nn.Tanh() if bent else nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.b(self.act(self.a(x)))

    def forward(net: Net, x: Tensor) -> Tensor:
        x = torch.tanh(net.stem(x))
        y = net.one.a(x)
        x = torch.tanh(x + net.one.b(torch.tanh(y) if bent else y))
        y = net.two.a(x)
        y = net.two.b(torch.tanh(y) if bent else y)
        y += x
        return net.f(torch.tanh(y).flatten(1))

    def own() -> dict[str, nn.Module]:
        return {"stem": conv(1, 8, padding=1), "one": Sum(), "two": Sum(), "f": nn.Linear(512, 5)}

    o = own()
    parts = {"stem": o["stem"], "a0": nn.Tanh(), "one": o["one"], "a1": nn.Tanh(), "two": o["two"], "a2": nn.Tanh()}
    return Net(forward, **own()), modular(**parts, fl=nn.Flatten(), f=o["f"])


PAIRS: dict[str, Callable[[], Pair]] = {
    "lenet": lenet,
    "mnist": mnist,
    "perceptron": perceptron,
    "averaged": averaged,
    "normed": normed,
    "residual": lambda: residual(False),
    "residual-bent": lambda: residual(True),
    "block-behind": lambda: block("behind", False),
    "block-behind-bent": lambda: block("behind", True),
    "block-before": lambda: block("before", True),
    "block-alone": lambda: block("alone", False),
}
SHAPE = (1, 8, 8)


def twins(name: str, seed: int) -> Pair:
    """Both with the same weights, in float64."""
    torch.manual_seed(seed)
    one, two = PAIRS[name]()
    drawn(two, seed)
    one.double()
    with torch.no_grad():
        for (a, p), (b, q) in zip(sorted(one.state_dict().items()), sorted(two.state_dict().items()), strict=True):
            assert a == b
            p.copy_(q)
    return one.eval(), two.eval()


def rows(model: nn.Module) -> list[tuple[object, ...]]:
    """Of every link but those that reshape: what it is, its shapes, and the names of its parameters in the network."""
    found = []
    for link in chain(model, SHAPE):
        own = tuple(sorted(link.called(name) for name, _ in link.module.named_parameters()))
        kind = "" if any(True for _ in link.module.children()) else repr(link.module).replace("inplace=True", "")
        if not isinstance(link.module, nn.Flatten | nn.Dropout):
            found.append((kind, link.after, own))
    return found


def seen(model: nn.Module, seed: int) -> tuple[Observation, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    x, y = torch.rand(1, *SHAPE, generator=rng, dtype=torch.float64), torch.tensor([2])
    knowledge = Knowledge(input_range=(0.0, 1.0), input_shape=SHAPE)
    return observe(model, F.cross_entropy, x, y, knowledge=knowledge, protocol=Protocol(mode="eval"))[0], x, y


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_same_links(name: str, seed: int) -> None:
    one, two = twins(name, seed)
    assert rows(one) == rows(two)
    x = torch.rand(3, *SHAPE, dtype=torch.float64)
    for model in (one, two):
        torch.testing.assert_close(follow(chain(model, SHAPE), x.clone()), model(x), rtol=1e-12, atol=1e-12)


def counted(model: nn.Module, seed: int) -> list[tuple[object, ...]]:
    _, x, y = seen(model, seed)
    found = []
    for each in constraints(chain(model, SHAPE), x, y, F.cross_entropy):
        read = (each.unknowns, each.weight, each.gradient, each.both) if isinstance(each, Constraints) else None
        found.append((each.link.before, each.link.after, read))
    return found


@pytest.mark.parametrize("name", PAIRS)
def test_the_same_equations(name: str) -> None:
    one, two = twins(name, 2)
    assert counted(one, 2) == counted(two, 2)


def plain(words: str) -> str:
    """Without the names of layers, and decibels to their last digit."""
    words = words.replace("(Branches)", "(Sum)")
    return re.sub(r"what .* may hide|'\w+'|\d+ dB", "", words)


@pytest.mark.parametrize("name", PAIRS)
def test_the_same_numbers_of_the_analyses(name: str) -> None:
    one, two = twins(name, 3)
    for analysis in ("security-metric", "gradient-rank"):
        said = []
        for model in (one, two):
            found = Analysis.parse(analysis)(seen(model, 3)[0])
            said.append([(getattr(each, "value", None), getattr(each, "rank", None), each.words) for each in found])
        assert len(said[0]) == len(said[1])
        for (a, r, words), (b, s, others) in zip(*said, strict=True):
            assert r == s
            assert a is None or a == pytest.approx(b, rel=1e-6)
            assert plain(words) == plain(others)


LONG = {"lenet", "mnist", "residual-bent", "block-behind-bent", "block-before"}  # they are searched, not solved


@pytest.mark.parametrize("seed", [4, pytest.param(5, marks=pytest.mark.slow), pytest.param(6, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name in LONG else []) for name in PAIRS if name != "perceptron"],
)
def test_the_same_picture_is_read(name: str, seed: int) -> None:
    found = []
    for model in twins(name, seed):
        obs, x, _ = seen(model, seed)
        read = Attack.parse("layer-by-layer")(obs, seed=0)
        error = float((read.inputs - x).norm() / x.norm()) if len(read) else None
        shapes = [(row["unknowns"], row["equations"], row["rank"]) for row in read.trace["readings"]]
        found.append((error, bool(read.bound.isfinite().all()), shapes, "stopped" in read.trace))
    (error, proven, shapes, stopped), (own, *others) = found
    assert [proven, shapes, stopped] == others
    assert (error is None) == (own is None)
    if error is not None and own is not None:
        assert error == pytest.approx(own, rel=1e-2, abs=1e-6)


def test_functional_dropout_is_off_where_modules_of_it_are() -> None:
    def made(functional: bool) -> nn.Module:
        def forward(net: Net, x: Tensor) -> Tensor:
            x = torch.tanh(net.a(x.flatten(1)))
            return net.b(F.dropout(x, 0.5, net.training) if functional else net.d(x))

        torch.manual_seed(0)
        return Net(forward, a=nn.Linear(16, 12), b=nn.Linear(12, 3), **({} if functional else {"d": nn.Dropout()}))

    at = torch.rand(1, 1, 4, 4), torch.tensor([1])
    shares = [determined(made(functional), F.cross_entropy, *at, mode="train").share for functional in (True, False)]
    assert shares[0] == pytest.approx(shares[1], rel=1e-9)


def test_gradient_rank_of_parameters_that_a_forward_holds_itself() -> None:
    class Raw(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1, self.b1 = nn.Parameter(torch.randn(12, 64) / 8), nn.Parameter(torch.zeros(12))
            self.w2, self.b2 = nn.Parameter(torch.randn(3, 12) / 3), nn.Parameter(torch.zeros(3))
            self.scale = nn.Parameter(torch.tensor(1.5))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(torch.tanh(F.linear(x.flatten(1), self.w1, self.b1)) * self.scale, self.w2, self.b2)

    torch.manual_seed(0)
    model = Raw().double()
    found = [(each.layer, each.kind, each.rank) for each in Analysis.parse("gradient-rank")(seen(model, 0)[0])]
    assert found == [("w1", "Linear", 1), ("scale", "AffineOperation", 1), ("w2", "Linear", 1)]
    assert [link.name for link in chain(model, SHAPE)] == ["w1", "tanh", "mul", "w2"]
    obs, x, _ = seen(model, 0)
    assert float((Attack.parse("bias-ratio")(obs).inputs - x).norm()) < 1e-9


class Normalised(nn.Module):
    """Its own normalisation by a buffer, channels last and back, padding, and a mean over rows."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.5, 0.4]).view(2, 1, 1))
        self.a, self.b = nn.Conv2d(2, 12, 3), nn.Linear(96, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.mean) / 0.25
        x = F.pad(x, (1, 1, 1, 1)).permute(0, 2, 3, 1).permute(0, 3, 1, 2)
        return self.b(torch.tanh(self.a(x)).mean(2).reshape(len(x), -1))


class Joined(nn.Module):
    """Two convolutions of different sizes, side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.f = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(2, 8, 5, padding=2), nn.Linear(768, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(torch.cat([torch.tanh(self.a(x)), F.leaky_relu(self.b(x))], 1).flatten(1))


def test_what_is_affine_is_read_whatever_function_it_is() -> None:
    torch.manual_seed(0)
    links = chain(Normalised().double(), (2, 8, 8))
    found = [type(link.module).__name__ for link in links]
    assert found == [*["AffineOperation"] * 5, "Conv2d", "Tanh", "AffineOperation", "Linear"]
    x, y = torch.rand(1, 2, 8, 8, dtype=torch.float64), torch.tensor([1])
    (mean,) = (each for each in constraints(links, x, y, F.cross_entropy) if each.link.name == "mean")
    assert isinstance(mean, Constraints)
    assert (mean.unknowns, mean.both) == (768, 96)


def test_branches_are_read_with_their_gradients_or_refused_with_the_line() -> None:
    torch.manual_seed(0)
    model, x, y = Joined().double(), torch.rand(1, 2, 8, 8, dtype=torch.float64), torch.tensor([1])
    knowledge = Knowledge(input_range=(0.0, 1.0), input_shape=(2, 8, 8))
    obs = observe(model, F.cross_entropy, x, y, knowledge=knowledge, protocol=Protocol(mode="eval"))[0]
    found = Attack.parse("layer-by-layer")(obs, seed=0)
    assert float((found.inputs - x).norm() / x.norm()) < 1e-9
    assert bool(found.bound.isfinite().all())
    stopped = Attack.parse("layer-by-layer:method=r-gap")(obs, seed=0).trace["stopped"]
    assert re.match(r"layer 'cat' \(Branches, test_functional.py:\d+\) cannot be read backward", stopped)


def test_casts_detached_tensors_and_dropout_between_recurrent_layers_end_no_analysis() -> None:
    def seen(model: nn.Module, *shape: int) -> Observation:
        return observe(model, F.cross_entropy, torch.rand(2, *shape), torch.tensor([0, 2]))[0]

    layers = {"a": nn.Linear(4, 8), "b": nn.Linear(8, 3)}
    cast = Net(lambda net, x: net.b(F.relu(net.a(x.float()).half().float())), **layers)
    assert {"a", "b"} <= {risk.layer for risk in Analysis.parse("layer-equations")(seen(cast, 4))}
    detached = Net(lambda net, x: net.b(F.relu(net.a(x)).detach()), **layers)
    with pytest.raises(NotApplicable, match="no gradient passes 'detach'"):
        Analysis.parse("layer-equations")(seen(detached, 4))
    parts = {"cell": nn.LSTM(4, 6, num_layers=2, dropout=0.5, batch_first=True), "out": nn.Linear(6, 3)}
    recurrent = Net(lambda net, x: net.out(net.cell(x)[0][:, -1]), **parts)
    (share,) = Analysis.parse("security-metric")(seen(recurrent, 5, 4))
    assert 0 < share.value <= 1
