"""Residual networks, VGG and ConvNet: the published layers, for pictures of any size, with every norm or none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from unbatch import Analysis, NotApplicable, Protocol, UnbatchError, observe
from unbatch.case import Case
from unbatch.inversion import determined_share
from unbatch.inversion.backward import pullback, rank_count
from unbatch.inversion.backward.pullback import Pullback
from unbatch.knowledge import Knowledge
from unbatch.models.channel_norm import channel_norm
from unbatch.models.residual import PreActivationBlock, ResidualBlock
from unbatch.models.small import DeepName, build, unused
from unbatch.network.chain import Link, chain
from unbatch.network.tracing import trace
from unbatch.numerics.linear.linsys import LinearSystem
from unbatch.observation import Observation
from unbatch.progress import Watch, watching

NAMES = get_args(DeepName)
NORMS = ("batch", "group", None)
SHAPES = ((1, 8, 8), (3, 32, 32), (1, 25, 25), (3, 20, 36))

PARAMETERS = {  # of width 64 with batch norm, for 3 channels, 32 x 32 pixels and 10 classes
    "resnet18": 11_173_962,
    "resnet34": 21_282_122,
    "preact-resnet18": 11_172_170,
    "wideresnet16-4": 2_748_890,
    "vgg11": 9_231_114,
    "vgg16": 14_728_266,
    "convnet8": 2_904_970,
}
LARGE_PARAMETERS = {"resnet18": 11_689_512, "resnet34": 21_797_672}  # for 224 x 224 pixels and 1,000 classes


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=rng(7))


def sizes(name: str, shape: tuple[int, ...], classes: int) -> int:
    """Parameters at the published width; the weights are drawn once, as building without them is not public."""
    return sum(p.numel() for p in build(name, shape, classes, rng=rng()).parameters())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_gradient(shape: tuple[int, ...], name: str, norm: str | None) -> None:
    model = build(name, shape, 5, width=4, norm=norm, rng=rng()).double()
    outputs = model(pictures(4, *shape).double())
    assert outputs.shape == (4, 5)
    nn.functional.cross_entropy(outputs, torch.arange(4)).backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
        assert parameter.grad.abs().sum() > 0
    assert model.eval()(pictures(1, *shape).double()).shape == (1, 5)


@pytest.mark.parametrize("name", NAMES)
def test_the_published_networks_have_the_published_parameters(name: str) -> None:
    assert sizes(name, (3, 32, 32), 10) == PARAMETERS[name]
    if name in LARGE_PARAMETERS:
        assert sizes(name, (3, 224, 224), 1000) == LARGE_PARAMETERS[name]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", NAMES)
def test_every_network_is_traced(name: str, norm: str | None) -> None:
    model = build(name, (3, 32, 32), 5, width=4, norm=norm, rng=rng())
    for mode in ("eval", "train"):
        graph = trace(model, (3, 32, 32), mode)
        assert {name for call in graph.calls for name in call.parameters} == dict(model.named_parameters()).keys()
        assert graph.output.shape == (2, 5)


@pytest.mark.parametrize("name", NAMES)
def test_the_norm_is_the_one_that_is_asked_for_and_stands_behind_convolutions(name: str) -> None:
    kinds = {"batch": nn.BatchNorm2d, "group": nn.GroupNorm, None: ()}
    counts = set()
    for norm in NORMS:
        model = build(name, (3, 32, 32), 5, width=8, norm=norm, rng=rng())
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d | nn.GroupNorm)]
        assert all(type(m) is kinds[norm] for m in norms)
        counts |= {len(norms)} if norm else set()
        convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
        biased = norm is None or name in {"vgg11", "vgg16", "convnet8"}
        assert all((m.bias is not None) == biased for m in convolutions)
        assert norm or not norms
    assert len(counts) == 1
    assert counts.pop() > 0


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", NAMES)
def test_without_bias_no_layer_has_one(name: str, norm: str | None) -> None:
    model = build(name, (1, 8, 8), 5, width=4, norm=norm, bias=False, rng=rng())
    assert all(m.bias is None for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d))


def test_group_norm_divides_the_channels_and_leaves_two_or_more_a_group() -> None:
    for channels in range(1, 130):
        norm = channel_norm("group", channels)
        assert channels % norm.num_groups == 0
        assert norm.num_groups <= 32
        assert channels == 1 or channels // norm.num_groups >= 2
    assert [channel_norm("group", channels).num_groups for channels in (64, 128, 512, 8, 7)] == [32, 32, 32, 4, 1]


def test_the_stem_goes_with_the_size_of_the_picture() -> None:
    for name in ("resnet18", "preact-resnet18"):
        small, large = (build(name, (3, side, side), 5, width=4, rng=rng()) for side in (63, 64))
        assert [m.kernel_size for m in (small.conv1, large.conv1)] == [(3, 3), (7, 7)]
        assert [sum(isinstance(m, nn.MaxPool2d) for m in model) for model in (small, large)] == [0, 1]
    large = build("resnet18", (3, 224, 224), 5, width=4, rng=rng()).eval()
    assert large[:-3](pictures(1, 3, 224, 224)).shape == (1, 32, 7, 7)
    wide = build("wideresnet16-4", (3, 64, 64), 5, width=8, rng=rng()).eval()
    assert wide.conv1.kernel_size == (3, 3)
    assert wide[:-3](pictures(1, 3, 64, 64)).shape == (1, 32, 16, 16)


@pytest.mark.parametrize(
    ("name", "shape", "features", "poolings"),
    [
        ("vgg11", (3, 32, 32), (32, 1, 1), 5),
        ("vgg16", (1, 8, 8), (32, 1, 1), 3),
        ("vgg16", (3, 64, 64), (32, 2, 2), 5),
        ("convnet8", (3, 32, 32), (16, 3, 3), 2),
        ("convnet8", (1, 8, 8), (16, 2, 2), 1),
    ],
)
def test_poolings_end_where_the_picture_does(
    name: str, shape: tuple[int, ...], features: object, poolings: int
) -> None:
    model = build(name, shape, 5, width=4, rng=rng()).eval()
    layers = [m for m in model if not isinstance(m, nn.AdaptiveAvgPool2d | nn.Flatten | nn.Linear)]
    assert nn.Sequential(*layers)(pictures(1, *shape)).shape[1:] == features
    assert sum(isinstance(m, nn.MaxPool2d) for m in layers) == poolings


def test_convnet_has_the_published_layers() -> None:
    """Of the code beside Geiping et al. 2020."""
    model = build("convnet8", (3, 32, 32), 10, rng=rng())
    kinds = "".join(
        {nn.Conv2d: "c", nn.BatchNorm2d: "b", nn.ReLU: "r", nn.MaxPool2d: "p"}.get(type(m), "") for m in model
    )
    assert kinds == "cbr" * 6 + "p" + "cbr" * 2 + "p"
    assert [m.out_channels // 64 for m in model if isinstance(m, nn.Conv2d)] == [1, 2, 2, 4, 4, 4, 4, 4]
    assert model.head.in_features == 36 * 64


def test_resnet_34_and_wideresnet_have_their_blocks() -> None:
    blocks = [m for m in build("resnet34", (3, 32, 32), 10, width=2, rng=rng()) if isinstance(m, ResidualBlock)]
    assert [m.conv1.out_channels for m in blocks] == [2] * 3 + [4] * 4 + [8] * 6 + [16] * 3
    assert [i for i, m in enumerate(blocks) if m.conv1.stride == (2, 2)] == [3, 7, 13]
    wide = [m for m in build("wideresnet16-4", (3, 32, 32), 10, rng=rng()) if isinstance(m, PreActivationBlock)]
    assert [m.conv1.out_channels for m in wide] == [64, 64, 128, 128, 256, 256]
    assert [m.shortcut is not None for m in wide] == [True, False, True, False, True, False]


def test_blocks_add_their_shortcut() -> None:
    x = pictures(2, 4, 8, 8)
    pre = PreActivationBlock(4, 4, 1, nn.ReLU, "batch", True)
    nn.init.zeros_(pre.conv2.weight)
    assert torch.equal(pre(x), x)
    changing = PreActivationBlock(4, 8, 2, nn.ReLU, "batch", True)
    nn.init.zeros_(changing.conv2.weight)
    assert torch.allclose(changing(x), changing.shortcut(changing.norm1(x).relu()))
    plain = ResidualBlock(4, 4, 1, nn.ReLU, None)
    nn.init.zeros_(plain.conv2.weight)
    assert torch.allclose(plain(x - 0.5), (x - 0.5 + plain.conv2.bias.view(-1, 1, 1)).relu())


@pytest.mark.parametrize("case", ["photos:batch=4", "digits:batch=4", "faces:batch=4"])
def test_a_case_takes_model_norm_and_width(case: str) -> None:
    spelt = Case.parse(f"{case},model=resnet18,width=4,norm=group")
    assert str(spelt).endswith("model=resnet18,width=4,norm=group")
    norms = [m for m in spelt.setting().model.modules() if isinstance(m, nn.GroupNorm)]
    assert [m.num_channels for m in norms[:3]] == [4, 4, 4]
    assert "norm" not in str(Case.parse(f"{case},model=resnet18,width=4,norm=batch"))
    plain = Case.parse(f"{case},model=vgg11,width=4,norm=none")
    assert Case.parse(str(plain)) == plain
    assert not any(isinstance(m, nn.BatchNorm2d | nn.GroupNorm) for m in plain.setting().model.modules())


def test_options_that_a_model_has_no_use_for_are_refused_in_words() -> None:
    with pytest.raises(
        UnbatchError, match=r"resnet18 takes no depth; leave it out. Models that do: mlp, convnet, resnet-small"
    ):
        Case.parse("digits:model=resnet18,depth=2")
    with pytest.raises(UnbatchError, match=r"mlp takes no norm; leave it out. Models that do: resnet-small, resnet18"):
        Case.parse("digits:norm=group")
    with pytest.raises(UnbatchError, match="lenet takes no width"):
        Case.parse("digits:model=lenet,width=8")
    with pytest.raises(UnbatchError, match="option norm=layer"):
        Case.parse("digits:model=resnet18,norm=layer")
    with pytest.raises(UnbatchError, match="resnet18 convolves pictures"):
        Case.parse("tables:model=resnet18").setting()
    assert all(unused(name) == {"depth"} for name in NAMES)


def observed(spelling: str, mode: str) -> Observation:
    client = Case.parse(spelling).setting()
    known = Knowledge(labels=client.labels, domain="images", input_range=(0.0, 1.0))
    rules = Protocol(mode=mode)
    return observe(client.model, client.loss, client.inputs, client.labels, knowledge=known, protocol=rules)[0]


@pytest.mark.parametrize("name", ["layer-equations", "security-metric", "safer-design"])
def test_analyses_of_one_example_say_where_the_model_takes_none_alone(name: str) -> None:
    """Eight pixels a side are one in the last stage, where batch norm in train mode has one value a channel."""
    obs = observed("digits:batch=2,model=resnet18,width=4", "train")
    with pytest.raises(NotApplicable, match="one example is looked at by itself, and batch norm in train mode"):
        Analysis.find(name)()(obs)


def test_derivatives_of_residual_blocks_are_computed_when_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Pullback] = []

    class Counted(Pullback):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(rank_count, "Pullback", Counted)
    model = build("resnet18", (1, 8, 8), 3, width=2, norm="group", rng=rng())
    x, y = pictures(1, 1, 8, 8), torch.tensor([1])
    found = rank_count.constraints(chain(model, (1, 8, 8)), x, y, nn.functional.cross_entropy)
    blocks = [each for each in found if "block" in each.link.name]
    assert len(blocks) == 8
    assert not made
    last = blocks[-1]
    assert last.effort > 0
    assert last.both <= last.unknowns
    assert len(made) == 1
    assert last.weights.equations + last.gradients.equations == made[0].equations


def test_columns_of_large_gradients_are_computed_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each goes through every entry of the weights' gradients, whatever few of them are kept."""
    chunks: list[int] = []

    def vmap(function: Callable[..., Tensor], chunk_size: int) -> Callable[..., Tensor]:
        chunks.append(chunk_size)
        return torch.func.vmap(function, chunk_size=chunk_size)

    monkeypatch.setattr(pullback, "vmap", vmap)
    for channels in (4, 1024):
        link = Link("0", nn.Conv2d(channels, channels, 2, bias=False).double(), (channels, 2, 2), (channels, 1, 1))
        zero = torch.zeros(channels, dtype=torch.float64)
        known = LinearSystem.some(torch.arange(channels), zero, channels)
        update = {"0.weight": torch.zeros_like(link.module.weight)}
        system = Pullback([link], known, zero.view(1, channels, 1, 1), update)
        monkeypatch.setattr(pullback, "JACOBIAN_HELD", 0)
        system.system(torch.zeros(4 * channels, dtype=torch.float64)).push(torch.zeros(1, 4 * channels).double())
    assert chunks[0] > 1000
    assert chunks[1] == 1


def test_the_share_is_the_same_by_one_column_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is computed where the gradients of all columns together would not fit into memory."""
    model = build("lenet", (1, 4, 4), 3, activation="tanh", rng=rng())
    x, y = pictures(1, 1, 4, 4), torch.tensor([1])
    whole = determined_share.determined(model, nn.functional.cross_entropy, x, y)
    monkeypatch.setattr(determined_share, "ENTRIES_AT_ONCE", 1)
    shares = list[float]()
    with watching(Watch(listener=lambda share, best: shares.append(share))):
        single = determined_share.determined(model, nn.functional.cross_entropy, x, y)
    assert len(shares) == 16
    assert single.share == pytest.approx(whole.share, rel=1e-6)
    assert 0 < single.share <= 1
