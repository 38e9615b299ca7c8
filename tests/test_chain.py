import pytest
import torch
from torch import nn
from torch.nn import functional as F

from unbatch.models import small
from unbatch.network.chain import chain


def names(model: nn.Module, shape: tuple[int, ...], **kw) -> list[str]:
    return [link.name for link in chain(model, shape, **kw)]


def test_layers_in_the_order_in_which_they_run_with_their_shapes() -> None:
    model = small.build("lenet", (3, 16, 16), 10, rng=torch.Generator().manual_seed(0))
    links = chain(model, (3, 16, 16))
    assert [link.name for link in links] == ["conv1", "relu1", "conv2", "relu2", "conv3", "relu3", "flatten1", "head"]
    assert (links[0].before, links[0].after, links[2].before) == ((3, 16, 16), (12, 8, 8), (12, 8, 8))
    assert links[-1].unknowns == 192


def test_a_residual_block_is_one_link() -> None:
    model = small.build("resnet-small", (3, 8, 8), 5, width=2, rng=torch.Generator().manual_seed(0))
    found = names(model, (3, 8, 8))
    assert found[:3] == ["conv1", "norm1", "relu1"]
    assert [name for name in found if "block" in name] == ["block1", "block2", "block3"]


class Custom(nn.Module):
    """A chain written out, with an order of its own and a reshape that is no module."""

    def __init__(self, functional: bool = False, twice: bool = False) -> None:
        super().__init__()
        self.head = nn.Linear(18, 3)
        self.trunk = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(inplace=True))
        self.unused = nn.Linear(2, 2)
        self.functional, self.twice = functional, twice

    def forward(self, x):
        x = self.trunk(x)
        if self.functional:
            x = F.relu(x + 1)
        out = self.head(torch.flatten(x, 1))
        return out + self.head(torch.flatten(x, 1)) if self.twice else out


def test_a_module_of_the_user() -> None:
    assert names(Custom(), (1, 5, 5)) == ["trunk.0", "trunk.1", "head"]


class Between(nn.Module):
    """Two layers, and something between them that is no module."""

    def __init__(self, between, after=lambda out, x: out) -> None:
        super().__init__()
        self.a, self.b, self.between, self.after = nn.Linear(4, 4), nn.Linear(4, 4), between, after

    def forward(self, x):
        return self.after(self.b(self.between(self.a(x))), x)


def kinds(model: nn.Module, shape: tuple[int, ...]) -> list[tuple[str, str]]:
    return [(link.name, type(link.module).__name__) for link in chain(model, shape)]


def test_functions_are_links() -> None:
    found = [
        ("trunk.0", "Conv2d"),
        ("trunk.1", "ReLU"),
        ("add", "AffineOperation"),
        ("relu", "ReLU"),
        ("head", "Linear"),
    ]
    assert kinds(Custom(functional=True), (1, 5, 5)) == found
    a, b = ("a", "Linear"), ("b", "Linear")
    assert kinds(Between(lambda y: F.relu(y, inplace=True)), (4,)) == [a, ("relu", "ReLU"), b]
    assert kinds(Between(lambda y: y.mul_(2)), (4,)) == [a, ("mul", "AffineOperation"), b]
    assert kinds(Between(lambda y: y, lambda out, x: out.mul_(2)), (4,)) == [a, b, ("mul", "AffineOperation")]
    for after in (lambda out, x: out.add_(x), lambda out, x: out + x):  # all of it is one sum
        assert kinds(Between(lambda y: y, after), (4,)) == [("", "Between")]


def test_what_reshapes_at_the_end_is_a_link() -> None:
    link = chain(Between(lambda y: y, lambda out, x: out.view(-1, 2, 2)), (4,))[-1]
    assert (link.name, link.before, link.after, link.line.split(":")[0]) == ("view", (4,), (2, 2), "test_chain.py")
    assert kinds(Between(lambda y: y, lambda out, x: out.squeeze()), (4,)) == [("a", "Linear"), ("b", "Linear")]


def _through_a_view(y):
    y.view(-1).mul_(2)
    return y


class Hidden(torch.autograd.Function):
    """Torch does not say that it ran."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


def test_where_it_breaks_is_said() -> None:
    with pytest.raises(ValueError, match="'head' runs 2 times; give every place"):
        chain(Custom(twice=True), (1, 5, 5))
    for between, words in (
        (lambda y: y.view(4, 2).repeat(1, 2)[:2], "runs on 2 examples between 0 and 1, and not on 3"),
        (lambda y: y / y.max().item(), r"'div' \(test_chain.py:\d+\) computes depends on the inputs"),
        (lambda y: F.relu(y) if len(y) == 2 else torch.tanh(y), r"'relu' \(test_chain.py:\d+\)"),
        (_through_a_view, r"by way of a view of it, before test_chain.py:\d+; write to the tensor itself"),
        (Hidden.apply, r"'mul' \(test_chain.py:\d+\) runs in an autograd function of its own"),
        (lambda y: torch.from_numpy(y.numpy() * 2), "not seen to come from its input"),
        (lambda y: y.reshape(-1, 2), "forward fails|folds"),
    ):
        with pytest.raises(ValueError, match=words):
            chain(Between(between), (4,))
    with pytest.raises(ValueError, match=r"'reshape' \(test_chain.py:\d+\) folds examples into each other"):
        chain(Between(lambda y: y, lambda out, x: out.reshape(-1, 2)), (4,))


def test_an_autograd_function_is_left_to_the_module_that_calls_it() -> None:
    class Doubled(nn.Module):
        def forward(self, x):
            return Hidden.apply(x)

    model = nn.Sequential(nn.Linear(4, 4), Doubled(), nn.ReLU())
    assert kinds(model, (4,)) == [("0", "Linear"), ("1", "Doubled"), ("2", "ReLU")]


def test_the_data_may_choose_nothing() -> None:
    class Chosen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.a(x) if float(x.min()) >= 0 else self.b(x)

    with pytest.raises(ValueError, match=r"'a' \(test_chain.py:\d+\) computes depends on the inputs"):
        chain(Chosen(), (4,))


def test_keywords_are_inputs_too() -> None:
    class Skip(nn.Module):
        def forward(self, x, skip=None):
            return x if skip is None else x + skip

    class Keyed(nn.Module):
        def __init__(self, skips: bool) -> None:
            super().__init__()
            self.a, self.f, self.skips = nn.Linear(3, 3), Skip(), skips

        def forward(self, x):
            return self.f(self.a(input=x), **({"skip": x} if self.skips else {}))

    assert names(Keyed(False), (3,)) == ["a"]  # what gives the tensor that it is given is no layer
    assert kinds(Keyed(True), (3,)) == [("", "Keyed")]  # a + x


def test_examples_folded_into_rows_are_one_link_and_shared_weights_are_no_chain() -> None:
    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.h = nn.Linear(3, 4), nn.Linear(20, 2)

        def forward(self, x):
            return self.h(self.a(x.reshape(-1, 3)).view(len(x), -1))

    links = chain(Folded(), (5, 3))
    assert [(link.name, type(link.module).__name__) for link in links] == [("view", "Branches"), ("h", "Linear")]
    x = torch.rand(4, 5, 3)
    assert torch.equal(links[0].module(x), links[0].module.a(x.reshape(-1, 3)).view(4, -1))
    tied = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    tied[2].weight = tied[0].weight
    with pytest.raises(ValueError, match="'0' and '2' share a weight"):
        chain(tied, (3,))


def test_dropout_leaves_the_global_generator_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
    state = torch.random.get_rng_state()
    chain(model, (3,), "train")
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_model_keeps_its_mode_and_its_statistics() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(18, 2))
    before = model[1].running_mean.clone()
    links = chain(model, (1, 5, 5), "train")
    assert torch.equal(model[1].running_mean, before)
    assert links[1].module.training
    assert model.training
    assert not chain(model, (1, 5, 5))[1].module.training


def test_outputs_that_are_no_numbers_are_compared_too() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Flatten())
    assert kinds(Between(lambda y: y, lambda out, x: out.log()), (4,))[-1] == ("log", "Operation")
    model[0].weight.data.fill_(torch.inf)
    assert names(model, (3,)) == ["0", "1"]


def test_a_single_layer_and_a_forward_that_fails() -> None:
    assert names(nn.Linear(3, 2), (3,)) == [""]
    with pytest.raises(ValueError, match="forward fails"):
        chain(nn.Linear(3, 2), (4,))
