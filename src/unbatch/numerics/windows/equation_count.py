"""How much of a batch's input maps the weights' gradients can determine, by counting alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unbatch.numerics.windows.geometry import PADDED, Windows


@dataclass(frozen=True, eq=False)
class EquationCount:
    """Which entries of one input channel's map the weights' gradients speak of, and how many equations speak of each.

    The gradient of a convolution's weights at one place of its kernel, for one input channel, is c_out equations on those
    entries that this place meets (`weight_equations`). Entries that the same places meet are one cell. A place gives no
    more independent equations than it has, and a cell takes no more than it has unknowns, so their rank is at most the
    largest flow from places to cells. Where nothing else ties the equations together it is that.

    >>> strided = Windows.of((1, 4, 4), kernel=(3, 3), stride=(2, 2), padding=(1, 1))
    >>> shortcut = Windows.of((1, 4, 4), kernel=(1, 1), stride=(2, 2))
    >>> EquationCount.of([(8, strided)]).most(3), EquationCount.of([(8, strided), (8, shortcut)]).most(3)
    (44, 48)
    >>> EquationCount.of([(8, strided)]).largest  # examples up to which all of their 16 numbers each are determined
    2
    """

    outputs: tuple[int, ...]  # equations of every place
    sizes: tuple[int, ...]  # entries of every cell
    meets: np.ndarray  # [places, cells], whether they meet

    @classmethod
    def of(cls, readers: Sequence[tuple[int, Windows]]) -> EquationCount:
        """Of the layers that read the same tensor: the channels that each gives, and its windows of ONE input channel."""
        (numbers,) = {int(np.prod(windows.shape)) for _, windows in readers}
        columns, outputs = [], []
        for channels, windows in readers:
            for entries in windows.entries.T.numpy():
                met = np.zeros(numbers, dtype=bool)
                met[entries[entries != PADDED]] = True
                columns.append(met)
                outputs.append(channels)
        cells, sizes = np.unique(np.stack(columns, 1), axis=0, return_counts=True)
        return cls(tuple(outputs), tuple(int(size) for size in sizes), cells.T)

    @property
    def entries(self) -> int:
        """Entries of one example's map."""
        return sum(self.sizes)

    def most(self, n: int) -> int:
        """Independent equations that there can be, for n examples."""
        from scipy.sparse import csr_array
        from scipy.sparse.csgraph import maximum_flow

        places, cells = len(self.outputs), len(self.sizes)
        room = np.zeros((places + cells + 2, places + cells + 2), dtype=np.int32)
        room[0, 1 : places + 1] = self.outputs
        room[1 : places + 1, places + 1 : -1] = np.minimum(self.meets * np.array(self.outputs)[:, None], 2**31 - 1)
        room[places + 1 : -1, -1] = [n * size for size in self.sizes]
        return int(maximum_flow(csr_array(room), 0, places + cells + 1).flow_value)

    @property
    def largest(self) -> int:
        """The largest batch all of whose entries can be determined; 0 where one example's cannot."""
        low, high = 0, sum(self.outputs) // self.entries
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.most(middle) == middle * self.entries else (low, middle - 1)
        return low
