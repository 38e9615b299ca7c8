"""Hidden: the constants of a tensor's channels that batch norm in train mode keeps from the layers behind it.

A strided layer looks at some entries of its input through one of its weights alone. A constant that is added to all of
these adds a constant to the layer's output, which batch norm takes away again. What tells it is the ReLU in front: the
least of these entries is zero, unless all of them are positive.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from unbatch.inversion.descent.masks_above import ADDS
from unbatch.network.graph import Graph, Value
from unbatch.network.operations import layer_of


def alone_at_zero(x: Tensor, moved: Tensor) -> Tensor:
    """The entries [n, c, ...] of channels of which but one of the `moved` entries [n h w] is zero.

    Two that are zero at once are zeros of a ReLU. One alone may be positive, and then all of them are larger by as much.

    >>> import torch
    >>> x = torch.tensor([[[[0.0, 0.0, 3.0]], [[0.0, 2.0, 0.0]]]])
    >>> alone_at_zero(x, torch.tensor([True, True, False])).tolist()
    [[[[False, False, False]], [[True, True, False]]]]
    """
    seen = moved.view(len(x), 1, *x.shape[2:])
    zeros = ((x == 0) & seen).transpose(0, 1).flatten(1).sum(1)
    return (zeros == 1).view(1, -1, *[1] * (x.dim() - 2)) & seen


def least_is_positive(x: Tensor, delta: Tensor, open_: Tensor, shift: Tensor) -> Tensor:
    """Whether the least of the open entries is positive, of each channel [1, c, ...], by the `shift`'s gradient [c].

    A shift in front of the ReLU has for its gradient the sum over batch and places of what came back, delta [n, c, ...],
    where the ReLU passed: with the least entry or without it.

    >>> import torch
    >>> x, delta = torch.tensor([[[[0.0, 2.0]]]]), torch.tensor([[[[5.0, 1.0]]]])
    >>> open_ = torch.ones_like(x, dtype=torch.bool)
    >>> [least_is_positive(x, delta, open_, torch.tensor([sum_])).item() for sum_ in (6.0, 1.0)]
    [True, False]
    """
    every = (0, *range(2, x.dim()))
    off = shift - (delta * (x > 0)).sum(every)
    least = (delta * (open_ & (x == 0))).sum(every)
    return ((off - least).abs() < off.abs()).view(1, -1, *[1] * (x.dim() - 2))


def shift_before(graph: Graph, passed: Value, update: Mapping[str, Tensor]) -> Tensor | None:
    """The gradient [c] of a norm's shift in front of a ReLU, with nothing but a sum between; None where there is none.

    `passed` is what the ReLU gave.
    """
    before = [passed.call.given[0]] if passed.call is not None else []
    if before and before[0].call is not None and before[0].call.ran in ADDS:
        before = [value for value in before[0].call.given if value.fed]
    for value in before:
        call = value.call
        norm = None if call is None or not call.given else layer_of(call, call.given[0])
        if call is not None and isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.bias is not None:
            own = isinstance(call.ran, nn.Module)
            name = f"{call.name}.bias" if own else graph.names().get(id(norm.bias), "")
            if name in update:
                return update[name]
    return None
