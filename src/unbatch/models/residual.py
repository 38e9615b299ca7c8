"""Residual networks: ours for small pictures, and the published ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

from torch import Tensor, nn

from unbatch.models.channel_norm import NormName, channel_norm
from unbatch.models.stack import NamedBlock, Shape, stack

LARGE_PICTURE = 64  # pixels of the shorter side, from which on a network begins with its 7x7 convolution

_Act = type[nn.Module]


class ResidualBlock(NamedBlock):
    """A residual block of two convolutions: act(norm(conv(act(norm(conv x)))) + shortcut x).

    The shortcut is the identity unless the shape changes, and then a 1x1 convolution with a norm. Convolutions have a bias
    only where no norm follows them, and `bias` is set.

    >>> import torch
    >>> ResidualBlock(4, 8, 2, nn.ReLU)(torch.zeros(1, 4, 6, 6)).shape
    torch.Size([1, 8, 3, 3])
    """

    def __init__(
        self, before: int, after: int, stride: int, act: _Act, norm: NormName | None = "batch", bias: bool = True
    ) -> None:
        super().__init__()
        bias = bias and norm is None
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=bias)
        self.norm1 = channel_norm(norm, after)
        self.act1 = act()
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=bias)
        self.norm2 = channel_norm(norm, after)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            self.shortcut = stack([nn.Conv2d(before, after, 1, stride, bias=bias), *_norms(norm, after)])
        self.act2 = act()

    def forward(self, x: Tensor) -> Tensor:
        """Pictures [n, before, h, w] to pictures [n, after, h / stride, w / stride], sides rounded up."""
        inner = self.act1(self.norm1(self.conv1(x)))
        out: Tensor = self.act2(self.norm2(self.conv2(inner)) + self.shortcut(x))
        return out


class PreActivationBlock(NamedBlock):
    """A residual block that normalises first: conv(act(norm(conv a))) + shortcut, a = act(norm x).

    The shortcut is x itself unless the shape changes, and then a 1x1 convolution of a.
    He et al., Identity Mappings in Deep Residual Networks (ECCV 2016).

    >>> import torch
    >>> PreActivationBlock(4, 8, 2, nn.ReLU, "batch", True)(torch.zeros(1, 4, 6, 6)).shape
    torch.Size([1, 8, 3, 3])
    """

    def __init__(self, before: int, after: int, stride: int, act: _Act, norm: NormName | None, bias: bool) -> None:
        super().__init__()
        bias = bias and norm is None
        self.norm1 = channel_norm(norm, before)
        self.act1 = act()
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=bias)
        self.norm2 = channel_norm(norm, after)
        self.act2 = act()
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=bias)
        changes = stride != 1 or before != after
        self.shortcut = nn.Conv2d(before, after, 1, stride, bias=bias) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        """Pictures [n, before, h, w] to pictures [n, after, h / stride, w / stride], sides rounded up."""
        a = self.act1(self.norm1(x))
        inner = self.act2(self.norm2(self.conv1(a)))
        out: Tensor = self.conv2(inner) + (x if self.shortcut is None else self.shortcut(a))
        return out


def resnet_small(
    shape: Shape, outputs: int, act: _Act, bias: bool, *, depth: int, width: int, norm: NormName | None
) -> nn.Module:
    """Three stages of `depth` residual blocks with `width`, 2 `width` and 4 `width` channels: 6 depth + 2 layers.

    A norm after every convolution, which then has no bias of its own: `bias` is the head's. The later stages
    halve the picture; global average pooling feeds the head. The CIFAR network of He et al. (CVPR 2016).

    >>> model = resnet_small((3, 32, 32), 10, nn.ReLU, True, depth=1, width=4, norm="batch")
    >>> [name for name, _ in model.named_children()]
    ['conv1', 'norm1', 'relu1', 'block1', 'block2', 'block3', 'adaptiveavgpool2d1', 'flatten1', 'head']
    """
    first = nn.Conv2d(shape[0], width, 3, padding=1, bias=bias and norm is None)
    channels = _channels(width, [width, 2 * width, 4 * width], [depth] * 3)
    blocks = [ResidualBlock(*sizes, act, norm, bias) for sizes in channels]
    return stack([first, *_norms(norm, width), act(), *blocks, *_head(4 * width, outputs, bias)])


def resnet(
    counts: Sequence[int], shape: Shape, outputs: int, act: _Act, bias: bool, *, width: int, norm: NormName | None
) -> nn.Module:
    """The residual network of so many blocks a stage: ResNet-18 has 2, 2, 2, 2 and ResNet-34 has 3, 4, 6, 3.

    He et al., Deep Residual Learning for Image Recognition (CVPR 2016). The stages have `width` (there 64) channels, twice,
    four times and eight times as many; the later ones halve the picture; global average pooling feeds the head. Pictures
    below 64 pixels go through one 3x3 convolution first, as is usual on CIFAR; larger ones through the published 7x7
    convolution of stride 2 and 3x3 max pooling of stride 2.

    >>> model = resnet((1, 1, 1, 1), (3, 64, 64), 10, nn.ReLU, True, width=4, norm="batch")
    >>> [name for name, _ in model.named_children()][:4], model.conv1.kernel_size
    (['conv1', 'norm1', 'relu1', 'maxpool2d1'], (7, 7))
    """
    first, *pooling = _entrance(shape, width, bias and norm is None)
    stages = [width * 2**stage for stage in range(len(counts))]
    blocks = [ResidualBlock(*sizes, act, norm, bias) for sizes in _channels(width, stages, counts)]
    return stack([first, *_norms(norm, width), act(), *pooling, *blocks, *_head(stages[-1], outputs, bias)])


def preact_resnet(
    counts: Sequence[int], shape: Shape, outputs: int, act: _Act, bias: bool, *, width: int, norm: NormName | None
) -> nn.Module:
    """The residual network of so many blocks a stage whose blocks normalise first; a last norm stands before the head.

    He et al., Identity Mappings in Deep Residual Networks (ECCV 2016). Stages, stem and head are those of `resnet`, but for
    the stem's norm and activation, which the first block brings.

    >>> model = preact_resnet((1, 1, 1, 1), (3, 32, 32), 10, nn.ReLU, True, width=4, norm="group")
    >>> [name for name, _ in model.named_children()]
    ['conv1', 'block1', 'block2', 'block3', 'block4', 'norm1', 'relu1', 'adaptiveavgpool2d1', 'flatten1', 'head']
    """
    stages = [width * 2**stage for stage in range(len(counts))]
    blocks = [PreActivationBlock(*sizes, act, norm, bias) for sizes in _channels(width, stages, counts)]
    entrance = _entrance(shape, width, bias and norm is None)
    return stack([*entrance, *blocks, *_norms(norm, stages[-1]), act(), *_head(stages[-1], outputs, bias)])


def wide_resnet(shape: Shape, outputs: int, act: _Act, bias: bool, *, width: int, norm: NormName | None) -> nn.Module:
    """WideResNet-16-4: three stages of two pre-activation blocks with `width` (there 64), 2 and 4 `width` channels.

    Zagoruyko and Komodakis, Wide Residual Networks (BMVC 2016): 16 layers, four times as wide as their stem, which is a
    3x3 convolution to `width` / 4 channels for pictures of any size. Without dropout.

    >>> model = wide_resnet((3, 32, 32), 10, nn.ReLU, True, width=8, norm="batch")
    >>> model.conv1.out_channels, model.head
    (2, Linear(in_features=32, out_features=10, bias=True))
    """
    narrow = max(1, width // 4)
    first = nn.Conv2d(shape[0], narrow, 3, padding=1, bias=bias and norm is None)
    channels = _channels(narrow, [width, 2 * width, 4 * width], (2, 2, 2))
    blocks = [PreActivationBlock(*sizes, act, norm, bias) for sizes in channels]
    return stack([first, *blocks, *_norms(norm, 4 * width), act(), *_head(4 * width, outputs, bias)])


def _entrance(shape: Shape, width: int, bias: bool) -> list[nn.Module]:
    """The first convolution, and the max pooling that large pictures need."""
    if min(shape[1:]) < LARGE_PICTURE:
        return [nn.Conv2d(shape[0], width, 3, padding=1, bias=bias)]
    return [nn.Conv2d(shape[0], width, 7, 2, padding=3, bias=bias), nn.MaxPool2d(3, 2, padding=1)]


def _channels(first: int, stages: Sequence[int], counts: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Channels before and after, and the stride, of every block: the first of each later stage halves the picture."""
    after = list(chain.from_iterable([size] * count for size, count in zip(stages, counts, strict=True)))
    halving = {sum(counts[:stage]) for stage in range(1, len(counts))}
    for i, (a, b) in enumerate(zip([first, *after], after, strict=False)):
        yield a, b, 2 if i in halving else 1


def _norms(name: NormName | None, channels: int) -> list[nn.Module]:
    """The norm, if there is one."""
    return [] if name is None else [channel_norm(name, channels)]


def _head(channels: int, outputs: int, bias: bool) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, outputs, bias)]
