"""Small networks of unbatch's own, drawn from a given generator by PyTorch's default law."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from unbatch.errors import UnbatchError
from unbatch.models import published
from unbatch.models.published import PublishedName

Name = Literal["mlp", "lenet", "convnet", "resnet-small", PublishedName]
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

_Shape = tuple[int, ...]


def build(
    name: Name,
    input_shape: _Shape,
    outputs: int,
    *,
    depth: int = 1,
    width: int = 64,
    activation: ActivationName | None = None,
    bias: bool = True,
    rng: torch.Generator,
) -> nn.Module:
    """The model of that name for inputs [n, *input_shape] and outputs [n, outputs], in training mode on the CPU.

    `depth` and `width` mean what the model's own function says. No activation takes the model's own, relu unless it is a
    published network with another; those have a head with a bias in any case. Every weight and bias is uniform in
    +-1/sqrt(fan_in), which is what nn.Linear and nn.Conv2d draw, but from `rng`; batch norm starts as the identity.
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
            model = _MODELS[name](input_shape, outputs, depth, width, act or nn.ReLU, bias)
    return initialise(model.to_empty(device="cpu"), rng)


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
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.GroupNorm | nn.PReLU):
            module.reset_parameters()  # constants alone: weight 1, bias 0, mean 0, variance 1, count 0; slope 1/4
        elif next(module.parameters(recurse=False), None) is not None:
            raise UnbatchError(f"no law to draw {name or 'the model'} ({type(module).__name__}) by.")
    return model


def mlp(shape: _Shape, outputs: int, depth: int, width: int, act: type[nn.Module], bias: bool) -> nn.Module:
    """`depth` dense layers of `width` units, each with its activation, and a dense head; tables and pictures alike.

    >>> [type(layer).__name__ for layer in mlp((4,), 3, 1, 8, nn.Tanh, True)]
    ['Flatten', 'Linear', 'Tanh', 'Linear']
    """
    sizes = [math.prod(shape)] + [width] * depth
    hidden = (layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b, bias), act()))
    return _stack([nn.Flatten(), *hidden, nn.Linear(sizes[-1], outputs, bias)])


def lenet(shape: _Shape, outputs: int, depth: int, width: int, act: type[nn.Module], bias: bool) -> nn.Module:
    """Three 5x5 convolutions of 12 channels, strides 2, 2 and 1, and a dense head; `depth` and `width` change nothing.

    The LeNet of Zhu, Liu and Han, Deep Leakage from Gradients (NeurIPS 2019), for any size of picture.

    >>> lenet((1, 8, 8), 10, 1, 64, nn.Sigmoid, True).head
    Linear(in_features=48, out_features=10, bias=True)
    """
    layers: list[nn.Module] = []
    for channels, stride in ((shape[0], 2), (12, 2), (12, 1)):
        layers += [nn.Conv2d(channels, 12, 5, stride, padding=2, bias=bias), act()]
    layers.append(nn.Flatten())
    return _stack([*layers, nn.Linear(_size(layers, shape), outputs, bias)])


def convnet(shape: _Shape, outputs: int, depth: int, width: int, act: type[nn.Module], bias: bool) -> nn.Module:
    """`depth` blocks of two 3x3 convolutions and a 2x2 max pooling, a dense layer of 4 `width` units, a dense head.

    The first block has `width` channels, each later one twice as many: a small VGG (Simonyan and Zisserman, ICLR 2015).
    Raises UnbatchError: that many poolings leave less than a pixel.

    >>> model = convnet((1, 8, 8), 10, 2, 4, nn.ReLU, True)
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
    return _stack([*layers, nn.Linear(4 * width, outputs, bias)])


def resnet_small(shape: _Shape, outputs: int, depth: int, width: int, act: type[nn.Module], bias: bool) -> nn.Module:
    """Three stages of `depth` residual blocks with `width`, 2 `width` and 4 `width` channels: 6 depth + 2 layers.

    Batch norm after every convolution, which therefore has no bias of its own: `bias` is the head's. The later stages
    halve the picture; global average pooling feeds the head. The CIFAR network of He et al. (CVPR 2016).

    >>> model = resnet_small((3, 32, 32), 10, 1, 4, nn.ReLU, True)
    >>> [name for name, _ in model.named_children()]
    ['conv1', 'norm1', 'relu1', 'block1', 'block2', 'block3', 'adaptiveavgpool2d1', 'flatten1', 'head']
    """
    layers = [nn.Conv2d(shape[0], width, 3, padding=1, bias=False), nn.BatchNorm2d(width), act()]
    channels = width
    for stage in range(3):
        for block in range(depth):
            stride = 2 if stage and not block else 1
            layers.append(ResidualBlock(channels, width * 2**stage, stride, act))
            channels = width * 2**stage
    return _stack([*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, outputs, bias)])


class ResidualBlock(nn.Module):
    """A residual block of two convolutions: act(norm(conv(act(norm(conv x)))) + shortcut x).

    The shortcut is the identity unless the shape changes, and then a 1x1 convolution with batch norm.

    >>> ResidualBlock(4, 8, 2, nn.ReLU)(torch.zeros(1, 4, 6, 6)).shape
    torch.Size([1, 8, 3, 3])
    """

    def __init__(self, before: int, after: int, stride: int, act: type[nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(after)
        self.act1 = act()
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(after)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            self.shortcut = _stack([nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after)])
        self.act2 = act()

    def forward(self, x: Tensor) -> Tensor:
        """Pictures [n, before, h, w] to pictures [n, after, h / stride, w / stride], sides rounded up."""
        inner = self.act1(self.norm1(self.conv1(x)))
        out: Tensor = self.act2(self.norm2(self.conv2(inner)) + self.shortcut(x))
        return out


def _published(name: str, shape: _Shape, outputs: int, act: type[nn.Module] | None, bias: bool) -> nn.Module:
    layers = published.published_layers(name, shape[0], act, bias)
    try:
        size = _size(layers, shape)
    except RuntimeError as error:
        raise UnbatchError(f"{name} cannot convolve pictures of {shape[1]}x{shape[2]}: {error}") from error
    return _stack([*layers, nn.Linear(size, outputs)])


_KINDS = {nn.Conv2d: "conv", nn.Linear: "dense", nn.BatchNorm2d: "norm", ResidualBlock: "block"}


def _stack(layers: Iterable[nn.Module]) -> nn.Sequential:
    """The layers in a row, named for the report: conv1, dense2, ... and head for a dense layer that ends it."""
    layers = list(layers)
    stack, count = nn.Sequential(), Counter[str]()
    for layer in layers:
        kind = _KINDS.get(type(layer), type(layer).__name__.lower())
        count[kind] += 1
        last = layer is layers[-1] and isinstance(layer, nn.Linear)
        stack.add_module("head" if last else f"{kind}{count[kind]}", layer)
    return stack


def _size(layers: Iterable[nn.Module], shape: _Shape) -> int:
    """Entries of one example after the layers; on the meta device, so that nothing is computed."""
    outputs: Tensor = nn.Sequential(*layers)(torch.empty(1, *shape, device="meta"))
    return outputs.numel()


_Maker = Callable[[_Shape, int, int, int, type[nn.Module], bool], nn.Module]
_MODELS: dict[str, _Maker] = {"mlp": mlp, "lenet": lenet, "convnet": convnet, "resnet-small": resnet_small}
