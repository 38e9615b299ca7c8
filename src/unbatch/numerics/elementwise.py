"""Elementwise: the inverse and the slope of an activation of single numbers, on the branch that goes through zero."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

REACH, GRID = 40.0, 8001  # numbers that are looked at to find where the branch begins
HALVINGS = 60
OUTSIDE = 1e-6  # by which numbers may lie beyond the branch's values, relative to the largest of them


def inverted(f: Callable[[Tensor], Tensor], y: Tensor) -> Tensor | None:
    """The z with f(z) = y on the rising branch of f through zero; None where some y is no value of that branch.

    GELU and SiLU fall before they rise, so numbers far below zero have small negative values as well: which of the two it
    was must be told by something else. Near the turning point z is known half as well as y.

    >>> z = torch.tensor([-0.5, 0.0, 3.0], dtype=torch.float64)
    >>> torch.allclose(inverted(torch.nn.functional.gelu, torch.nn.functional.gelu(z)), z)
    True
    """
    at = torch.linspace(-REACH, REACH, GRID, dtype=y.dtype, device=y.device)
    values = f(at)
    middle = GRID // 2
    falls = (values[1 : middle + 1] < values[:middle]).nonzero()
    low = at[int(falls[-1]) + 1] if len(falls) else at[0]
    for _ in range(HALVINGS if len(falls) else 0):  # the turning point, by its slope
        around = low + torch.linspace(-1, 1, 3, dtype=y.dtype, device=y.device) * (at[1] - at[0])
        low = around[int(f(around).argmin())]
        at = at / 2
    slack = OUTSIDE * float(y.abs().max())
    if bool((y < f(low[None]) - slack).any()) or bool((y > f(at.new_tensor([REACH])) + slack).any()):
        return None
    a, b = low.expand_as(y).clone(), torch.full_like(y, REACH)
    for _ in range(HALVINGS):
        half = (a + b) / 2
        above = f(half) > y
        a, b = torch.where(above, a, half), torch.where(above, half, b)
    return (a + b) / 2


def slope(f: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """The derivative of an activation of single numbers at z.

    >>> slope(torch.tanh, torch.zeros(2))
    tensor([1., 1.])
    """
    at = z.detach().requires_grad_()
    with torch.enable_grad():
        (found,) = torch.autograd.grad(f(at).sum(), at)
    return found
