"""Smooth backward: run a network of rectified units as it is, with a slope in place of their step when going back.

The derivative of relu is a step, whose own derivative is zero: a search over what a gradient was taken at gets nothing from
units that switch. The published attacks on trained weights keep the outputs and take sigmoid(alpha z) for the step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_RECTIFIED = {F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_}


class SmoothBackward(TorchFunctionMode):
    """While a block runs, relu's values are its own and its derivative is sigmoid(alpha z).

    By what is called, not by the names of modules. `met` says how often a rectified unit's layer ran in the block.

    >>> z = torch.tensor([-1.0, 0.0, 2.0], requires_grad=True)
    >>> with SmoothBackward(1.0) as block:
    ...     out = torch.relu(z)
    >>> out.tolist(), torch.allclose(torch.autograd.grad(out.sum(), z)[0], torch.sigmoid(z)), block.met
    ([0.0, 0.0, 2.0], True, 1)
    """

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.alpha, self.met = alpha, 0

    def __enter__(self) -> SmoothBackward:
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func not in _RECTIFIED:
            return func(*args, **given)
        self.met += 1
        z = args[0] if args else given["input"]
        sloped = (
            F.softplus(self.alpha * z) / self.alpha
        )  # whose derivative is sigmoid(alpha z), and whose value is left out
        return z.detach().clamp_min(0) + (sloped - sloped.detach())
