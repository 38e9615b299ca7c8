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


def test_where_it_breaks_is_said() -> None:
    with pytest.raises(ValueError, match="'head' is not fed by 'trunk' alone"):
        chain(Custom(functional=True), (1, 5, 5))
    with pytest.raises(ValueError, match="'head' runs 2 times; give every place"):
        chain(Custom(twice=True), (1, 5, 5))
    for model in (
        Between(lambda y: F.relu(y, inplace=True)),
        Between(lambda y: y.mul_(2)),
        Between(lambda y: y.view(4, 2).repeat(1, 2)[:2]),
    ):
        with pytest.raises(ValueError, match="'b' is not fed by 'a' alone"):
            chain(model, (4,))
    for after in (lambda out, x: out.mul_(2), lambda out, x: out.add_(x), lambda out, x: out + x):
        with pytest.raises(ValueError, match="something that is no module follows 'b'"):
            chain(Between(lambda y: y, after), (4,))


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

    assert names(Keyed(False), (3,)) == ["a", "f"]
    with pytest.raises(ValueError, match="'f' is not one tensor in, one tensor out"):
        chain(Keyed(True), (3,))


def test_examples_folded_into_rows_and_shared_weights_are_no_chain() -> None:
    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.h = nn.Linear(3, 4), nn.Linear(20, 2)

        def forward(self, x):
            return self.h(self.a(x.reshape(-1, 3)).view(len(x), -1))

    with pytest.raises(ValueError, match="'a' is not fed by the input alone"):
        chain(Folded(), (5, 3))
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


def test_a_single_layer_and_a_forward_that_fails() -> None:
    assert names(nn.Linear(3, 2), (3,)) == [""]
    with pytest.raises(ValueError, match="forward fails"):
        chain(nn.Linear(3, 2), (4,))
