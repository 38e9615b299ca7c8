"""Which entries of its input a convolution looks at in each place, and where zero padding stands in for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

PADDED = -1  # the number of an entry that padding stands in for


@dataclass(frozen=True)
class Windows:
    """The places of a two-dimensional convolution, and the entries of its input that it looks at in each.

    `entries` [p, channels k k] numbers the entries of one example's input [channels, height, width] that the window at each
    of p places holds, in the order of a kernel's weights, -1 where it is zero padding.

    >>> windows = Windows.of((1, 4, 4), kernel=(3, 3), stride=(2, 2), padding=(1, 1))
    >>> windows.grid, windows.entries[0].tolist()  # the place in the corner
    ((2, 2), [-1, -1, -1, -1, 0, 1, -1, 4, 5])
    >>> windows.padded.sum(1).tolist()  # entries of each window that are padding
    [5, 3, 3, 0]
    """

    shape: tuple[int, int, int]
    kernel: tuple[int, int]
    grid: tuple[int, int]
    entries: Tensor  # [p, channels k k]

    @classmethod
    def of(
        cls,
        shape: tuple[int, int, int],
        *,
        kernel: tuple[int, int],
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        dilation: tuple[int, int] = (1, 1),
    ) -> Windows:
        """Those of inputs [channels, height, width] under a kernel with zero padding."""
        size = torch.Size(shape).numel()
        numbers = torch.arange(1, size + 1, dtype=torch.float64).view(1, *shape)  # zero is what padding will look like
        seen = F.unfold(numbers, kernel, dilation=dilation, padding=padding, stride=stride)[0].T  # [p, channels k k]
        sides = [
            (side + 2 * pad - gap * (k - 1) - 1) // step + 1
            for side, k, step, pad, gap in zip(shape[1:], kernel, stride, padding, dilation, strict=True)
        ]
        return cls(shape, kernel, (sides[0], sides[1]), seen.long() - 1)

    @property
    def padded(self) -> Tensor:
        """Whether an entry of a window is padding [p, channels k k]."""
        return self.entries == PADDED

    @property
    def whole(self) -> bool:
        """Whether there is one window, and it is the whole input."""
        return self.entries.tolist() == [list(range(torch.Size(self.shape).numel()))]

    @property
    def overlapping(self) -> bool:
        """Whether every entry of an input is in at least two windows.

        >>> Windows.of((1, 4, 4), kernel=(3, 3), padding=(1, 1)).overlapping
        True
        >>> Windows.of((1, 4, 4), kernel=(3, 3), stride=(2, 2), padding=(1, 1)).overlapping
        False
        """
        held = self.entries[self.entries != PADDED]
        return bool((torch.bincount(held, minlength=torch.Size(self.shape).numel()) > 1).all())

    def __len__(self) -> int:
        """The number of places."""
        return len(self.entries)

    def rows(self, inputs: Tensor) -> Tensor:
        """The windows [n, p, channels k k] of inputs [n, channels, height, width].

        >>> Windows.of((1, 2, 2), kernel=(2, 2)).rows(torch.arange(4.0).view(1, 1, 2, 2)).tolist()
        [[[0.0, 1.0, 2.0, 3.0]]]
        """
        flat = F.pad(inputs.flatten(1), (0, 1))  # a zero at the end, which -1 picks
        return flat[:, self.entries]
