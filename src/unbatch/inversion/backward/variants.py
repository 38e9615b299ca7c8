"""Variants: the links of a chain with one layer changed, and the layers after it fitted to what it then gives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.func import functional_call

from unbatch.errors import UnbatchError
from unbatch.models.small import initialise
from unbatch.network.chain import Link

Conv = nn.Conv1d | nn.Conv2d
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Variant:
    """A network with one layer changed, and those behind it fitted to what it then gives."""

    words: str  # what was changed, by the layer's name
    links: tuple[Link, ...]


def variants(links: Sequence[Link], rng: torch.Generator) -> Iterator[Variant]:
    """The networks that differ from this one by one convolution that passes on less.

    Of every convolution before the first dense layer: its stride doubled, the channels that it gives halved, or its output
    pooled by averages of 2 along each side. What must change with it has fresh weights, drawn by `rng`. Changes after which
    the layers do not fit each other, or the network's outputs are others, are left out.

    >>> from unbatch.network.chain import chain
    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(144, 2))
    >>> for variant in variants(chain(model, (1, 8, 8)), torch.Generator().manual_seed(0)):
    ...     print(variant.words, "->", variant.links[-1].before)
    0 at stride 2 -> (36,)
    0 with 2 of 4 channels -> (72,)
    0 followed by average pooling of 2 along each side -> (36,)
    """
    for i, link in enumerate(links[: first_dense(links)]):
        layer = link.module
        if isinstance(layer, Conv) and type(layer) in (nn.Conv1d, nn.Conv2d):
            for change in (_strided, _narrowed, _pooled):
                try:
                    words, made = change(layer)
                    found = _fitted(links, i, [_drawn(module, layer, rng) for module in made], rng)
                except (ValueError, RuntimeError, TypeError):  # what fits is found by trying, as PyTorch says it
                    continue
                if found[-1].after == links[-1].after:
                    yield Variant(f"{link.name or 'the convolution'} {words}", tuple(found))


def first_dense(links: Sequence[Link]) -> int:
    """The place of the first dense layer in a chain; behind the last link, if there is none.

    >>> from unbatch.network.chain import chain
    >>> first_dense(chain(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2)), (1, 4, 4)))
    2
    """
    return next((i for i, link in enumerate(links) if isinstance(link.module, nn.Linear)), len(links))


def parameters(links: Sequence[Link]) -> int:
    """How many numbers all weights and biases of a chain hold.

    >>> from unbatch.network.chain import chain
    >>> parameters(chain(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), (4,)))
    23
    """
    return sum(p.numel() for link in links for p in link.module.parameters())


def _strided(layer: Conv) -> tuple[str, list[nn.Module]]:
    stride = tuple(2 * side for side in layer.stride)
    return f"at stride {'x'.join(map(str, sorted(set(stride))))}", [_conv(layer, stride=stride)]


def _narrowed(layer: Conv) -> tuple[str, list[nn.Module]]:
    half = layer.out_channels // 2
    if not half:
        raise UnbatchError("one channel cannot be halved.")
    return f"with {half} of {layer.out_channels} channels", [_conv(layer, after=half)]


def _pooled(layer: Conv) -> tuple[str, list[nn.Module]]:
    pool = nn.AvgPool1d(2) if isinstance(layer, nn.Conv1d) else nn.AvgPool2d(2)
    return "followed by average pooling of 2 along each side", [layer, pool]


def _conv(
    layer: Conv, *, before: int | None = None, after: int | None = None, stride: Shape | None = None
) -> nn.Module:
    """The same convolution for other channels or of another stride; each channel alone (depthwise) stays so."""
    before = layer.in_channels if before is None else before
    alone = layer.groups == layer.in_channels > 1
    widened = before * (layer.out_channels // layer.in_channels) if alone else layer.out_channels
    return type(layer)(
        before,
        widened if after is None else after,
        layer.kernel_size,  # type: ignore[arg-type]  # of as many sides as the kind has
        layer.stride if stride is None else stride,  # type: ignore[arg-type]
        layer.padding,  # type: ignore[arg-type]
        layer.dilation,  # type: ignore[arg-type]
        before if alone else layer.groups,
        layer.bias is not None,
        layer.padding_mode,
        device="meta",
    )


def _for(module: nn.Module, shape: Shape) -> nn.Module:
    """The module itself where it takes inputs of that shape, or one of its kind for as many channels or features."""
    if isinstance(module, Conv) and type(module) in (nn.Conv1d, nn.Conv2d) and module.in_channels != shape[0]:
        return _conv(module, before=shape[0])
    if type(module) is nn.Linear and module.in_features != shape[-1]:
        return nn.Linear(shape[-1], module.out_features, module.bias is not None, device="meta")
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.num_features != shape[0]:
        own = (module.eps, module.momentum, module.affine, module.track_running_stats)
        return type(module)(shape[0], *own, device="meta")
    if type(module) is nn.GroupNorm and module.num_channels != shape[0]:
        return nn.GroupNorm(module.num_groups, shape[0], module.eps, module.affine, device="meta")
    if type(module) is nn.PReLU and module.num_parameters not in (1, shape[0]):
        return nn.PReLU(shape[0], device="meta")
    return module


def _drawn(made: nn.Module, like: nn.Module, rng: torch.Generator) -> nn.Module:
    """A module that was made on the meta device, beside another in place, precision and mode, with fresh weights."""
    tensor = next(like.parameters(), None)
    if not any(p.is_meta for p in made.parameters()) or tensor is None:
        return made.train(like.training)
    return initialise(made.to_empty(device="cpu"), rng).to(tensor.device, tensor.dtype).train(like.training)


def _fitted(links: Sequence[Link], i: int, made: Sequence[nn.Module], rng: torch.Generator) -> list[Link]:
    """The links with `made` in place of the i-th, and each later one itself if it fits. Raises UnbatchError: one cannot."""
    found, shape = list(links[:i]), links[i].before
    for k, module in enumerate(made):
        found.append(_link(links[i], f"{links[i].name}, pooled" if k else links[i].name, module, shape))
        shape = found[-1].after
    for old, link in zip(links[i:], links[i + 1 :], strict=False):
        if old.after != link.before:  # a reshape that is no module
            if len(link.before) > 1 and shape != old.after:
                raise UnbatchError(f"{link.name!r} takes a view of what comes before, of one shape alone.")
            shape = link.before if shape == old.after else (int(torch.Size(shape).numel()),)
        module = _drawn(_for(link.module, shape), link.module, rng)
        found.append(link if module is link.module and shape == link.before else _link(link, link.name, module, shape))
        shape = found[-1].after
    return found


def _link(old: Link, name: str, module: nn.Module, shape: Shape) -> Link:
    """A module in an old one's place.

    With its output's shape, found on the meta device: nothing is computed, and no statistics are written.
    """
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    state = {k: t.to("meta", torch.float64 if t.is_floating_point() else t.dtype) for k, t in tensors.items()}
    after = functional_call(module, state, (torch.empty(2, *shape, dtype=torch.float64, device="meta"),)).shape[1:]
    return replace(old, name=name, module=module, before=shape, after=tuple(after))
