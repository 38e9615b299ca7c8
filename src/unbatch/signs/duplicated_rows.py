"""duplicated-rows: units that ask the same question with different thresholds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, final

from torch import Tensor

from unbatch.inversion.received import Received
from unbatch.numerics.linear.parallel import parallel, spread_evenly
from unbatch.sign import Sign, SignReading

FEWEST_WEIGHED, FEWEST_ALIKE = 3, 3  # inputs that a row weighs, rows of one direction: below, chance makes them alike
SAME = 1e-6  # difference of two thresholds, over the largest, that counts as none


@final
class DuplicatedRows(Sign):
    """Units of one layer that weigh their input alike, up to scale, with different thresholds.

    The value is the share of a layer's rows, of those that weigh three inputs or more, that point the way of two others or
    more while their biases over their lengths differ. The differences of neighbouring bins are what imprint attacks read.
    Rows that are copies, bias and all, as a network that was widened has them, do not count, nor do layers without a bias,
    which have no thresholds: the second factor of an adapter (LoRA) has rows of one direction after its first steps.

    >>> import torch
    >>> from unbatch.inversion.received import Received
    >>> from unbatch.signs import DuplicatedRows
    >>> planted = torch.nn.Linear(16, 8)
    >>> with torch.no_grad():
    ...     _ = planted.weight.copy_(torch.outer(torch.arange(1.0, 9.0), torch.rand(16)))
    >>> DuplicatedRows()(Received.of(planted)).value
    1.0
    """

    paper: ClassVar[str] = "the layer of Fowl et al., Robbing the Fed, ICLR 2022; the test is this library's"
    honest: ClassVar[float] = 0.0
    limit: ClassVar[float] = 0.1

    def read(self, received: Received) -> Iterator[SignReading]:
        for matrix in received.matrices:
            rows, kept = _weighing(matrix.rows)
            if len(rows) < FEWEST_ALIKE or matrix.bias is None:
                continue
            pairs = parallel(rows)
            alike = pairs.sum(1) >= FEWEST_ALIKE
            alike &= 2 * _copies(rows, matrix.bias[kept], pairs) <= pairs.sum(1)
            share = float(alike.double().mean())
            words = f"{share:.0%} of its rows point one way in groups of {FEWEST_ALIKE} or more, with other thresholds"
            yield SignReading(matrix.layer, share, words)


def _weighing(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Of a matrix at most MOST_ROWS rows, those that weigh enough inputs, and their numbers."""
    some = spread_evenly(len(rows))
    kept = some[(rows[some] != 0).sum(1) >= FEWEST_WEIGHED]
    return rows[kept], kept


def _copies(rows: Tensor, bias: Tensor, pairs: Tensor) -> Tensor:
    """For each row, of those that point its way, how many have its threshold, itself among them."""
    own = (bias / rows.norm(dim=1).clamp_min(1e-300)).abs()
    near = (own[:, None] - own).abs() <= SAME * own.max()
    count: Tensor = (pairs & near).sum(1)
    return count
