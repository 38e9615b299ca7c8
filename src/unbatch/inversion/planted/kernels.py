"""Kernels: convolutions planted so that they pass pictures on unchanged."""

from __future__ import annotations

import copy

import torch
from torch import nn

from unbatch.errors import NotApplicable


def identity_kernels(model: nn.Module) -> tuple[nn.Module, frozenset[str]]:
    """A copy of `model` whose convolutions pass their channels on, and the names of their parameters.

    Output channel o takes channel o mod C of the C received, at the place o // C of the cell of stride x stride pixels that
    a step jumps over; what is left is zero, and so are biases. Values below zero do not pass a relu.
    Raises NotApplicable: there is no convolution, or one of another kind.

    >>> made, names = identity_kernels(nn.Sequential(nn.Conv2d(1, 4, 3, stride=2, padding=1)))
    >>> picture = torch.arange(16.0).reshape(1, 1, 4, 4)
    >>> made(picture)[0, :, 0, 0].tolist(), sorted(names)
    ([0.0, 1.0, 4.0, 5.0], ['0.bias', '0.weight'])
    """
    made, names = copy.deepcopy(model), set[str]()
    for name, module in made.named_modules():
        if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            continue
        plain = isinstance(module, nn.Conv2d) and module.groups == 1 and module.dilation == (1, 1)
        if not plain or isinstance(module.padding, str):
            raise NotApplicable(f"the convolution {name!r} is of a kind that is not planted here.")
        with torch.no_grad():
            module.weight.zero_()
            if module.bias is not None:
                module.bias.zero_()
            for o in range(module.out_channels):
                cell, c = divmod(o, module.in_channels)
                down, right = divmod(cell, module.stride[1])
                y, x = module.padding[0] + down, module.padding[1] + right
                if down < module.stride[0] and y < module.kernel_size[0] and x < module.kernel_size[1]:
                    module.weight[o, c, y, x] = 1.0
        names |= {f"{name}.{own}" for own, _ in module.named_parameters()}
    if not names:
        raise NotApplicable("there is no convolution to pass pictures on.")
    return made, frozenset(names)
