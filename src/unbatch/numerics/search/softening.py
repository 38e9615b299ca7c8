"""Softening: run a network with its kinks rounded, so that a search can follow its gradients; and tell if it has any.

The gradient of a ReLU network jumps wherever a unit switches, and the jumps cannot be seen in its derivatives. With
relu(z) ~ s / b log(1 + exp(b z / s)), s the layer's own spread, they become slopes; b is raised step by step until b = inf.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

BEND_ROUNDINGS = 100  # of the update, above which a second difference is one

_RELU = {F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_}
_LEAKY = {F.leaky_relu, F.leaky_relu_}
_LEARNT = {F.prelu, torch.prelu, Tensor.prelu}


class Softened(TorchFunctionMode):
    """A network's kinks rounded while a block runs, so that a search can follow its gradients.

    Inside the block relu, leaky relu, prelu and max pooling are rounded at `sharpness` b; b = inf leaves them as they are.

    Of a window's k numbers max pooling then takes log(mean exp(b z / s)) s / b: their mean at b = 0, their maximum at inf.
    Only in two dimensions, without padding or dilation.

    The spreads s are those of the first block after a change of `sharpness`, by order of call, and stay fixed, so that
    the network is one fixed function. Later blocks may run it several times.

    >>> x = torch.tensor([-1.0, 0.0, 1.0])
    >>> with Softened(4.0):
    ...     soft = torch.relu(x)
    >>> bool((soft > torch.relu(x)).all())
    True
    """

    def __init__(self, sharpness: float = math.inf) -> None:
        super().__init__()
        self.sharpen(sharpness)

    def sharpen(self, sharpness: float) -> None:
        """Round kinks at another sharpness from the next block on, whose spreads are then the ones that count."""
        self.sharpness = sharpness
        self._spreads: list[Tensor] = []
        self._call, self._fixed = 0, False

    @property
    def rounds(self) -> bool:
        """Whether the first block met a kink."""
        return bool(self._spreads)

    def __enter__(self) -> Softened:
        self._call, self._fixed = 0, bool(self._spreads)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if math.isinf(self.sharpness):
            return func(*args, **kwargs)
        if func is F.max_pool2d and (windows := _windows(*args, **kwargs)) is not None:
            b = self.sharpness / self._spread(windows)
            return (torch.logsumexp(b * windows, -1) - math.log(windows.shape[-1])) / b
        if func not in _RELU | _LEAKY | _LEARNT:
            return func(*args, **kwargs)
        given = dict(zip(("input", "weight" if func in _LEARNT else "negative_slope"), args, strict=False)) | kwargs
        z, slope = given["input"], given.get("negative_slope", 0.01) if func in _LEAKY else 0.0
        if func in _LEARNT:
            slope = given["weight"].view(-1, *[1] * (z.dim() - 2)) if z.dim() > 1 else given["weight"]
        b = self.sharpness / self._spread(z)
        return slope * z + (1 - slope) * F.softplus(b * z, threshold=40) / b

    def _spread(self, z: Tensor) -> Tensor:
        if not self._fixed:
            self._spreads.append(z.detach().square().mean().sqrt().clamp_min(torch.finfo(z.dtype).tiny))
        self._call += 1
        return self._spreads[(self._call - 1) % len(self._spreads)]


def _windows(
    z: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | None:
    """What max pooling compares [..., h, w, k]; None with padding, dilation, a ceiling or indices."""
    (down, right), (h, w) = _pair(stride or kernel_size), _pair(kernel_size)
    if return_indices or ceil_mode or _pair(padding) != (0, 0) or _pair(dilation) != (1, 1):
        return None
    rows, columns = (z.shape[-2] - h) // down + 1, (z.shape[-1] - w) // right + 1
    places = itertools.product(range(h), range(w))
    return torch.stack([z[..., i::down, j::right][..., :rows, :columns] for i, j in places], -1)


def _pair(n: Any) -> tuple[int, int]:
    return (n, n) if isinstance(n, int) else (n[0], n[1])


def has_kinks(
    update: Callable[[Tensor], Sequence[Tensor]], x: Tensor, rng: torch.Generator, *, reach: float, fall: float = 20.0
) -> bool:
    """Whether a network's gradients jump or bend, as those of relu do.

    Whether the update jumps or bends along a random line of length `reach` an entry through x, as of relu networks.

    Second differences of a smooth function fall 64-fold when the step is cut to an eighth, those of a function with
    bends 8-fold, with many small jumps about 3-fold; below `fall` counts as kinked.

    >>> x, rng = torch.linspace(-1, 1, 1000, dtype=torch.float64), torch.Generator().manual_seed(0)
    >>> has_kinks(lambda x: [(x > 0).double()], x, rng, reach=0.1)  # the derivative of relu
    True
    >>> has_kinks(lambda x: [x**3], x, rng, reach=0.1)
    False
    """
    direction = reach * torch.randn(x.shape, generator=rng, dtype=torch.float64).to(x)
    middle = update(x)

    def bend(step: float) -> float:
        ends = zip(update(x + step * direction), middle, update(x - step * direction), strict=True)
        return math.sqrt(sum(float((a - 2 * b + c).detach().double().square().sum()) for a, b, c in ends))

    rounding = BEND_ROUNDINGS * sum(torch.finfo(a.dtype).eps * float(a.detach().double().norm()) for a in middle)
    return rounding < bend(1.0) < fall * bend(1 / 8)
