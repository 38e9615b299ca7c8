"""lopsided-norms: single units that weigh out of all proportion to the others of their layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, final

from unbatch.inversion.received import Received
from unbatch.sign import Sign, SignReading

FEWEST = 4  # rows or columns that are not zero


@final
class LopsidedNorms(Sign):
    """A unit whose weights, or those that read it, are many times those of the layer's other units.

    The value is the largest over the median length of a layer's rows, or of its columns, whichever is more; rows and
    columns of zeros are left out. A trap that closes after one example, and a last layer that hears one feature alone,
    need such weights.

    >>> import torch
    >>> from unbatch.inversion.received import Received
    >>> from unbatch.signs import LopsidedNorms
    >>> planted = torch.nn.Linear(16, 16)
    >>> with torch.no_grad():
    ...     _ = planted.weight[:, 3].fill_(1000.0)
    >>> LopsidedNorms()(Received.of(planted)).value > LopsidedNorms.limit
    True
    """

    paper: ClassVar[str] = "this library; the weights are those of Feng and Tramer, Privacy Backdoors, ICML 2024"
    honest: ClassVar[float] = 2.54
    limit: ClassVar[float] = 40.0

    def read(self, received: Received) -> Iterator[SignReading]:
        for matrix in received.matrices:
            for what, sides in (("a row", matrix.rows), ("a column", matrix.columns)):
                norms = sides.norm(dim=1)
                norms = norms[norms > 0]
                if len(norms) < FEWEST:
                    continue
                value = float(norms.max() / norms.median())
                yield SignReading(matrix.layer, value, f"{what} is {value:,.1f} times as long as the median one")
