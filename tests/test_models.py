"""The small models: drawn by PyTorch's default law, from the given generator alone."""

from __future__ import annotations

import copy
import math
from typing import get_args

import pytest
import torch
from scipy.stats import ks_2samp, kstest
from torch import Tensor, nn
from torch.func import functional_call

from unbatch.models import small
from unbatch.models.published import NETWORKS, PublishedName
from unbatch.models.residual import ResidualBlock
from unbatch.models.small import build

DEEP = get_args(small.DeepName)  # tests/test_deep_models.py
NAMES = [name for name in get_args(small.Name) if name not in NETWORKS and name not in DEEP]
ACTIVATIONS = get_args(small.ActivationName)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(*shape: int, seed: int = 7) -> Tensor:
    return torch.rand(*shape, generator=rng(seed))


def same(a: nn.Module, b: nn.Module) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_every_name_has_a_model_and_every_activation_a_module() -> None:
    assert {*NAMES, *DEEP} == set(small._MODELS)
    assert set(ACTIVATIONS) == set(small.ACTIVATIONS)


def test_every_published_network_has_a_name() -> None:
    assert set(get_args(PublishedName)) == set(NETWORKS)
    assert set(NETWORKS) < set(get_args(small.Name))


@pytest.mark.parametrize(
    ("name", "features"), [("cnn2-c1", 5400), ("cnn2-c2", 1350), ("cnn3-c4", 4704), ("cnn4-c1", 363)]
)
def test_published_networks_have_the_published_features(name: str, features: int) -> None:
    model = build(name, (3, 32, 32), 10, bias=False, rng=rng())
    assert [type(m) for m in model][1] is nn.Tanh
    assert model.head.in_features == features
    assert model.head.bias is not None
    assert model.conv1.bias is None
    assert type(build(name, (3, 32, 32), 10, activation="relu", rng=rng())[1]) is nn.ReLU


def test_the_six_layer_network_of_r_gap() -> None:
    model = build("cnn6", (3, 32, 32), 10, rng=rng())
    assert model.head.in_features == 3200
    assert model[1].negative_slope == 0.2
    with pytest.raises(ValueError, match="cnn4-c2 cannot convolve pictures of 8x8"):
        build("cnn4-c2", (3, 8, 8), 10, rng=rng())


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_forward_and_gradient_reach_every_parameter(name: str, activation: str) -> None:
    model = build(name, (3, 16, 16), 5, depth=2, width=6, activation=activation, rng=rng())
    outputs = model(pictures(4, 3, 16, 16))
    assert outputs.shape == (4, 5)
    nn.functional.cross_entropy(outputs, torch.arange(4)).backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
        assert parameter.grad.abs().sum() > 0


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 25, 25), (3, 28, 20), (3, 64, 64)])
@pytest.mark.parametrize("name", NAMES)
def test_any_size_of_picture(name: str, shape: tuple[int, ...]) -> None:
    assert build(name, shape, 3, width=4, rng=rng())(pictures(2, *shape)).shape == (2, 3)


@pytest.mark.parametrize("name", NAMES)
def test_the_seed_decides_and_the_global_generator_is_left_alone(name: str) -> None:
    before = torch.random.get_rng_state()
    one, again, other = (build(name, (3, 16, 16), 5, width=6, rng=rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert same(one, again)
    assert not same(one, other)


@pytest.mark.parametrize("ours", ["dense", "conv"])
def test_the_law_is_pytorchs_own(ours: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(5)
        layer = nn.Linear(40, 900) if ours == "dense" else nn.Conv2d(12, 12, 5)
        theirs = [p.detach() for p in type(layer)(*_arguments(layer)).parameters()]
    model = build("mlp", (40,), 3, width=900, rng=rng()) if ours == "dense" else build("lenet", (1, 8, 8), 3, rng=rng())
    found = model.get_submodule("dense1" if ours == "dense" else "conv2")
    fan_in = 40 if ours == "dense" else 12 * 25
    bound = 1 / math.sqrt(fan_in)
    for mine, default in zip(found.parameters(), theirs, strict=True):
        mine = mine.detach().double().flatten()
        assert mine.abs().max() <= bound * (1 + 1e-6)
        assert default.abs().max() <= bound * (1 + 1e-6)
        assert kstest(mine.numpy(), "uniform", args=(-bound, 2 * bound)).pvalue > 1e-3
        assert ks_2samp(mine.numpy(), default.flatten().numpy()).pvalue > 1e-3
        if len(mine) > 1000:
            assert mine.var() == pytest.approx(bound**2 / 3, rel=0.05)


def _arguments(layer: nn.Module) -> tuple[int, ...]:
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.in_channels, layer.out_channels, layer.kernel_size[0]


@pytest.mark.parametrize("name", NAMES)
def test_every_drawn_layer_keeps_to_its_own_bound_and_fills_it(name: str) -> None:
    model = build(name, (3, 32, 32), 10, depth=2, width=16, rng=rng())
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert len(layers) == {"mlp": 3, "lenet": 4, "convnet": 6, "resnet-small": 14 + 2, "vit": 1 + 2 * 6 + 1}[name]
    for layer in layers:
        bound = 1 / math.sqrt(math.prod(layer.weight.shape[1:]))
        assert 0.95 * bound < layer.weight.abs().max() <= bound * (1 + 1e-6)


def test_batch_norm_starts_as_the_identity() -> None:
    norms = [
        m for m in build("resnet-small", (3, 16, 16), 5, width=4, rng=rng()).modules() if type(m) is nn.BatchNorm2d
    ]
    assert len(norms) == 7 + 2
    for norm in norms:
        assert (norm.weight == 1).all()
        assert (norm.bias == 0).all()
        assert (norm.running_mean == 0).all()
        assert (norm.running_var == 1).all()
        assert norm.num_batches_tracked == 0


@pytest.mark.parametrize("name", NAMES)
def test_copies_doubles_and_functional_calls_compute_the_same(name: str) -> None:
    model = build(name, (3, 16, 16), 5, width=6, activation="tanh", rng=rng())
    x = pictures(4, 3, 16, 16)
    twin = copy.deepcopy(model)
    assert same(model, twin)
    outputs = model(x)
    assert torch.equal(outputs, functional_call(twin, dict(twin.named_parameters()), (x,)))
    double = copy.deepcopy(model).double()(x.double())
    assert double.dtype == torch.float64
    assert torch.allclose(double.float(), outputs, atol=1e-4)


def test_lenet_has_the_published_shape() -> None:
    model = build("lenet", (3, 32, 32), 100, activation="sigmoid", rng=rng())
    assert [tuple(p.shape) for p in model.parameters()] == [
        (12, 3, 5, 5),
        (12,),
        (12, 12, 5, 5),
        (12,),
        (12, 12, 5, 5),
        (12,),
        (100, 768),
        (100,),
    ]


def test_depth_and_width() -> None:
    mlp = build("mlp", (7,), 2, depth=3, width=5, rng=rng())
    assert [tuple(p.shape) for p in mlp.parameters() if p.ndim == 2] == [(5, 7), (5, 5), (5, 5), (2, 5)]
    convnet = build("convnet", (3, 16, 16), 2, depth=2, width=4, rng=rng())
    assert [tuple(p.shape)[:2] for p in convnet.parameters() if p.ndim == 4] == [(4, 3), (4, 4), (8, 4), (8, 8)]
    assert convnet.get_submodule("dense1").weight.shape == (16, 8 * 4 * 4)
    resnet = build("resnet-small", (3, 16, 16), 2, depth=2, width=4, rng=rng())
    blocks = [m for m in resnet.modules() if isinstance(m, ResidualBlock)]
    identity = [isinstance(block.shortcut, nn.Identity) for block in blocks]
    assert identity == [True, True, False, True, False, True]


def test_a_residual_block_adds_its_shortcut() -> None:
    block = build("resnet-small", (3, 16, 16), 2, width=4, activation="identity", rng=rng()).get_submodule("block1")
    nn.init.zeros_(block.conv2.weight)
    x = pictures(2, 4, 8, 8)
    assert torch.equal(block(x), x)


@pytest.mark.parametrize("name", NAMES)
def test_without_bias_no_layer_has_one(name: str) -> None:
    model = build(name, (3, 16, 16), 5, width=6, bias=False, rng=rng())
    assert all(m.bias is None for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d))


def test_the_head_is_named() -> None:
    assert [list(dict(build(name, (3, 16, 16), 5, rng=rng()).named_children()))[-1] for name in NAMES] == [
        "head"
    ] * len(NAMES)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "mlp"])
def test_a_convolution_refuses_a_table(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} convolves pictures.*\(30,\); use model=mlp"):
        build(name, (30,), 2, rng=rng())


def test_other_refusals() -> None:
    with pytest.raises(ValueError, match="at most depth=3"):
        build("convnet", (1, 8, 8), 2, depth=4, rng=rng())
    assert build("convnet", (1, 8, 8), 2, depth=3, width=2, rng=rng())(pictures(1, 1, 8, 8)).shape == (1, 2)
    with pytest.raises(ValueError, match="unknown model 'vgg'; known: mlp"):
        build("vgg", (1, 8, 8), 2, rng=rng())
    with pytest.raises(ValueError, match="unknown activation 'swish'"):
        build("mlp", (1, 8, 8), 2, activation="swish", rng=rng())
    with pytest.raises(ValueError, match="no law to draw 0 \\(Embedding\\)"):
        small.initialise(nn.Sequential(nn.Embedding(3, 2)), rng())
