import pytest
import torch
from torch import nn
from torch.nn import functional as F

from unbatch import models
from unbatch.chain import chain


def names(model: nn.Module, shape: tuple[int, ...], **kw) -> list[str]:
    return [link.name for link in chain(model, shape, **kw)]


def test_layers_in_the_order_in_which_they_run_with_their_shapes() -> None:
    model = models.build("lenet", (3, 16, 16), 10, rng=torch.Generator().manual_seed(0))
    links = chain(model, (3, 16, 16))
    assert [link.name for link in links] == ["conv1", "relu1", "conv2", "relu2", "conv3", "relu3", "flatten1", "head"]
    assert (links[0].before, links[0].after, links[2].before) == ((3, 16, 16), (12, 8, 8), (12, 8, 8))
    assert links[-1].unknowns == 192


def test_a_residual_block_is_one_link() -> None:
    model = models.build("resnet-small", (3, 8, 8), 5, width=2, rng=torch.Generator().manual_seed(0))
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


def test_where_it_breaks_is_said() -> None:
    with pytest.raises(ValueError, match="'head' is not fed by 'trunk' alone"):
        chain(Custom(functional=True), (1, 5, 5))
    with pytest.raises(ValueError, match="'head' runs 2 times"):
        chain(Custom(twice=True), (1, 5, 5))


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
