"""mirrored-rows: units whose negative weights are their positive ones over again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, final

from torch import Tensor

from unbatch.inversion.received import Received
from unbatch.numerics.linear.parallel import spread_evenly
from unbatch.sign import Sign, SignReading

FEWEST = 8  # positive weights of a row, and negative ones
EQUAL = 0.01  # spread of the factors between the two, over their mean, that counts as one factor


@final
class MirroredRows(Sign):
    """Units whose negative weights have the sizes of their positive ones, times one factor.

    The value is the share of a layer's rows, of those with eight weights of each sign or more, whose positive and negative
    weights, each sorted by size, are one and the same list up to a factor. Trap weights are made so: a factor just beyond 1
    lets an input through only where it happens to be bright at the positive ones.

    >>> import torch
    >>> from unbatch.inversion.received import Received
    >>> from unbatch.signs import MirroredRows
    >>> planted = torch.nn.Linear(64, 16)
    >>> with torch.no_grad():
    ...     _ = planted.weight[:, :32].abs_()
    ...     _ = planted.weight[:, 32:].copy_(-1.1 * planted.weight[:, :32])
    >>> MirroredRows()(Received.of(planted)).value
    1.0
    """

    paper: ClassVar[str] = (
        "the rows of Boenisch et al., When the Curious Abandon Honesty, EuroS&P 2023; the test is ours"
    )
    honest: ClassVar[float] = 0.0
    limit: ClassVar[float] = 0.1

    def read(self, received: Received) -> Iterator[SignReading]:
        for matrix in received.matrices:
            if matrix.rows.shape[1] < 2 * FEWEST:
                continue
            rows = matrix.rows[spread_evenly(len(matrix.rows))]
            told = [found for row in rows if (found := _mirrored(row)) is not None]
            if told:
                share = sum(told) / len(told)
                yield SignReading(
                    matrix.layer, share, f"in {share:.0%} of its rows the negative weights mirror the positive ones"
                )


def _mirrored(row: Tensor) -> bool | None:
    """Whether one row is; None where it has too few weights of a sign."""
    positive, negative = row[row > 0].sort().values, (-row[row < 0]).sort().values
    fewer = min(len(positive), len(negative))
    if fewer < FEWEST:
        return None
    if abs(len(positive) - len(negative)) > 1:
        return False
    factors = positive[-fewer:] / negative[-fewer:]
    return float(factors.std() / factors.mean()) < EQUAL
