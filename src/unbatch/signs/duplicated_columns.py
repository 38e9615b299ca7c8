"""duplicated-columns: units whose answers are all treated alike by the layer behind them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, final

from unbatch.inversion.received import Received
from unbatch.numerics.linear.parallel import parallel, spread_evenly
from unbatch.sign import Sign, SignReading

FEWEST_ROWS, FEWEST_ALIKE = 4, 3  # units that read a column, columns of one direction: below, chance makes them alike


@final
class DuplicatedColumns(Sign):
    """A layer that treats many units before it alike, up to scale.

    The value is the share of a layer's columns (of a convolution: its input channels) that point the way of two others or
    more. Where all bins of a planted layer are passed on in one way, what comes back to each is the same, and neighbouring
    bins can be subtracted; columns in pairs of opposite sign read odd functions of what was carried there.

    >>> import torch
    >>> from unbatch.inversion.received import Received
    >>> from unbatch.signs import DuplicatedColumns
    >>> planted = torch.nn.Linear(16, 8)
    >>> with torch.no_grad():
    ...     _ = planted.weight.copy_(torch.rand(8, 1).expand(8, 16))
    >>> DuplicatedColumns()(Received.of(planted)).value
    1.0
    """

    paper: ClassVar[str] = "the second layer of Fowl et al., Robbing the Fed, ICLR 2022; the test is this library's"
    honest: ClassVar[float] = 0.0
    limit: ClassVar[float] = 0.1

    def read(self, received: Received) -> Iterator[SignReading]:
        for matrix in received.matrices:
            columns = matrix.columns[spread_evenly(len(matrix.columns))]
            columns = columns[(columns != 0).sum(1) >= FEWEST_ROWS]
            if len(columns) < FEWEST_ALIKE:
                continue
            share = float((parallel(columns).sum(1) >= FEWEST_ALIKE).double().mean())
            yield SignReading(matrix.layer, share, f"it treats {share:.0%} of its inputs alike, up to scale")
