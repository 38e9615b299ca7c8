"""Small networks of unbatch's own, and every model by its name, drawn from a given generator by PyTorch's default law."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from unbatch.errors import UnbatchError
from unbatch.models import published
from unbatch.models.channel_norm import NormName
from unbatch.models.published import PublishedName
from unbatch.models.residual import preact_resnet, resnet, resnet_small, wide_resnet
from unbatch.models.stack import Shape, stack
from unbatch.models.vgg import PLANS, vgg
from unbatch.models.vision_transformer import VisionTransformer, undrawn_vision_transformer

DeepName = Literal["resnet18", "resnet34", "preact-resnet18", "wideresnet16-4", "vgg11", "vgg16", "convnet8"]
Name = Literal["mlp", "lenet", "convnet", "resnet-small", "vit", DeepName, PublishedName]
ActivationName = Literal["relu", "leaky-relu", "elu", "gelu", "silu", "softplus", "tanh", "sigmoid", "identity"]

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky-relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "identity": nn.Identity,
}


def build(
    name: Name,
    input_shape: Shape,
    outputs: int,
    *,
    depth: int = 1,
    width: int = 64,
    activation: ActivationName | None = None,
    bias: bool = True,
    norm: NormName | None = "batch",
    rng: torch.Generator,
) -> nn.Module:
    """The model of that name for inputs [n, *input_shape] and outputs [n, outputs], in training mode on the CPU.

    `depth`, `width` and `norm` (None: no norm) mean what the model's own function says; which of them change nothing, says
    `unused`. No activation takes the model's own, relu unless it is a published network with another; those have a head
    with a bias in any case. Every weight and bias is uniform in +-1/sqrt(fan_in), which is what nn.Linear and nn.Conv2d
    draw, but from `rng`; batch norm starts as the identity.
    Raises UnbatchError: unknown name or activation, or a model that cannot take such inputs.

    >>> model = build("mlp", (1, 8, 8), 10, depth=2, width=32, activation="tanh", rng=torch.Generator().manual_seed(0))
    >>> [name for name, _ in model.named_children()]
    ['flatten1', 'dense1', 'tanh1', 'dense2', 'tanh2', 'head']
    >>> model(torch.zeros(5, 1, 8, 8)).shape
    torch.Size([5, 10])
    """
    if name not in (*_MODELS, *published.NETWORKS):
        raise UnbatchError(f"unknown model {name!r}; known: {', '.join((*_MODELS, *published.NETWORKS))}.")
    if activation is not None and activation not in ACTIVATIONS:
        raise UnbatchError(f"unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}.")
    if name != "mlp" and len(input_shape) != 3:
        raise UnbatchError(f"{name} convolves pictures [c, h, w], not inputs of shape {input_shape}; use model=mlp.")
    with torch.device("meta"):  # no tensor is filled here, so torch's global generator is not read
        act = None if activation is None else ACTIVATIONS[activation]
        if name in published.NETWORKS:
            model = _published(name, input_shape, outputs, act, bias)
        else:
            given, own = {"depth": depth, "width": width, "norm": norm}, _MODELS[name]
            options = {option: given[option] for option in own.takes}
            model = own.make(input_shape, outputs, act or own.activation, bias, **options)
    return initialise(model.to_empty(device="cpu"), rng)


def unused(name: Name) -> frozenset[str]:
    """Those of the options depth, width and norm that a model of that name has no use for.

    >>> sorted(unused("mlp")), sorted(unused("resnet18"))
    (['norm'], ['depth'])
    """
    return frozenset({"depth", "width", "norm"}.difference(_MODELS[name].takes if name in _MODELS else ()))


@torch.no_grad()
def initialise(model: nn.Module, rng: torch.Generator) -> nn.Module:
    """Draws every dense and convolutional layer of a model anew from `rng`, in place.

    Every normalisation and prelu is reset to its constants.
    Raises UnbatchError: a layer with parameters of another kind.

    >>> one, other = (initialise(nn.Linear(2, 3), torch.Generator().manual_seed(0)) for _ in range(2))
    >>> torch.equal(one.weight, other.weight)
    True
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
            bound = 1 / math.sqrt(module.weight[0].numel())  # fan_in is what one output sees
            for parameter in module.parameters(recurse=False):
                parameter.uniform_(-bound, bound, generator=rng)
        elif isinstance(module, VisionTransformer):
            module.draw_positions(rng)
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.GroupNorm | nn.LayerNorm | nn.PReLU):
            module.reset_parameters()  # constants alone: weight 1, bias 0, mean 0, variance 1, count 0; slope 1/4
        elif next(module.parameters(recurse=False), None) is not None:
            raise UnbatchError(f"no law to draw {name or 'the model'} ({type(module).__name__}) by.")
    return model


def mlp(shape: Shape, outputs: int, act: type[nn.Module], bias: bool, *, depth: int, width: int) -> nn.Module:
    """`depth` dense layers of `width` units, each with its activation, and a dense head; tables and pictures alike.

    >>> [type(layer).__name__ for layer in mlp((4,), 3, nn.Tanh, True, depth=1, width=8)]
    ['Flatten', 'Linear', 'Tanh', 'Linear']
    """
    sizes = [math.prod(shape)] + [width] * depth
    hidden = (layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b, bias), act()))
    return stack([nn.Flatten(), *hidden, nn.Linear(sizes[-1], outputs, bias)])


def lenet(shape: Shape, outputs: int, act: type[nn.Module], bias: bool) -> nn.Module:
    """Three 5x5 convolutions of 12 channels, strides 2, 2 and 1, and a dense head.

    The LeNet of Zhu, Liu and Han, Deep Leakage from Gradients (NeurIPS 2019), for any size of picture.

    >>> lenet((1, 8, 8), 10, nn.Sigmoid, True).head
    Linear(in_features=48, out_features=10, bias=True)
    """
    layers: list[nn.Module] = []
    for channels, stride in ((shape[0], 2), (12, 2), (12, 1)):
        layers += [nn.Conv2d(channels, 12, 5, stride, padding=2, bias=bias), act()]
    layers.append(nn.Flatten())
    return stack([*layers, nn.Linear(_size(layers, shape), outputs, bias)])


def convnet(shape: Shape, outputs: int, act: type[nn.Module], bias: bool, *, depth: int, width: int) -> nn.Module:
    """`depth` blocks of two 3x3 convolutions and a 2x2 max pooling, a dense layer of 4 `width` units, a dense head.

    The first block has `width` channels, each later one twice as many: a small VGG (Simonyan and Zisserman, ICLR 2015).
    Raises UnbatchError: that many poolings leave less than a pixel.

    >>> model = convnet((1, 8, 8), 10, nn.ReLU, True, depth=2, width=4)
    >>> model.conv4, model.dense1
    (Conv2d(8, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1)), Linear(in_features=32, out_features=16, bias=True))
    """
    most = int(math.log2(min(shape[1:])))
    if depth > most:
        raise UnbatchError(
            f"depth={depth} would halve pictures of {shape[1]}x{shape[2]} below one pixel; convnet takes at most "
            f"depth={most} here."
        )
    layers: list[nn.Module] = []
    before = shape[0]
    for block in range(depth):
        after = width * 2**block
        for channels in (before, after):
            layers += [nn.Conv2d(channels, after, 3, padding=1, bias=bias), act()]
        layers.append(nn.MaxPool2d(2))
        before = after
    layers.append(nn.Flatten())
    layers += [nn.Linear(_size(layers, shape), 4 * width, bias), act()]
    return stack([*layers, nn.Linear(4 * width, outputs, bias)])


def _published(name: str, shape: Shape, outputs: int, act: type[nn.Module] | None, bias: bool) -> nn.Module:
    layers = published.published_layers(name, shape[0], act, bias)
    try:
        size = _size(layers, shape)
    except RuntimeError as error:
        raise UnbatchError(f"{name} cannot convolve pictures of {shape[1]}x{shape[2]}: {error}") from error
    return stack([*layers, nn.Linear(size, outputs)])


def _size(layers: Iterable[nn.Module], shape: Shape) -> int:
    """Entries of one example after the layers; on the meta device, so that nothing is computed."""
    outputs: Tensor = nn.Sequential(*layers)(torch.empty(1, *shape, device="meta"))
    return outputs.numel()


class _Model(NamedTuple):
    make: Callable[..., nn.Module]
    takes: tuple[str, ...]  # which of the options depth, width and norm
    activation: type[nn.Module] = nn.ReLU  # of its own


_MODELS: dict[str, _Model] = {
    "mlp": _Model(mlp, ("depth", "width")),
    "lenet": _Model(lenet, ()),
    "convnet": _Model(convnet, ("depth", "width")),
    "resnet-small": _Model(resnet_small, ("depth", "width", "norm")),
    "vit": _Model(undrawn_vision_transformer, ("depth", "width"), nn.GELU),
    "resnet18": _Model(partial(resnet, (2, 2, 2, 2)), ("width", "norm")),
    "resnet34": _Model(partial(resnet, (3, 4, 6, 3)), ("width", "norm")),
    "preact-resnet18": _Model(partial(preact_resnet, (2, 2, 2, 2)), ("width", "norm")),
    "wideresnet16-4": _Model(wide_resnet, ("width", "norm")),
    **{name: _Model(partial(vgg, plan), ("width", "norm")) for name, plan in PLANS.items()},
}
