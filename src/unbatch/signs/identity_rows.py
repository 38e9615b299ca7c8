"""identity-rows: kernels and rows that pass one input on as it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, final

import torch

from unbatch.inversion.received import Received
from unbatch.sign import Sign, SignReading

FEWEST = 4  # inputs of a row: of fewer, one may well weigh most
TRANSMISSION = 10.0  # of a row that counts: its largest weight over the sum of the others
EQUAL = 1e-3  # relative difference of two weights that count as one


@final
class IdentityRows(Sign):
    """Rows or kernels that pass one input on unchanged, all by the same factor.

    The transmission ratio of a row is its largest weight over the sum of all others, in size. Rows whose ratio is beyond 10
    transmit one input; a pruned network has such rows too, each with a factor of its own. The value is the share of a
    layer's rows, of those that are not zero, that transmit by a factor which others have as well.

    >>> import torch
    >>> from unbatch.inversion.received import Received
    >>> from unbatch.signs import IdentityRows
    >>> planted = torch.nn.Conv2d(3, 8, 3)
    >>> with torch.no_grad():
    ...     _ = torch.nn.init.dirac_(planted.weight)
    >>> IdentityRows()(Received.of(planted)).value
    1.0
    """

    paper: ClassVar[str] = "transmission ratio: Garov et al., SEER, ICLR 2024; equal factors: this library"
    honest: ClassVar[float] = 0.2
    limit: ClassVar[float] = 0.4

    def read(self, received: Received) -> Iterator[SignReading]:
        for matrix in received.matrices:
            sizes = matrix.rows.abs()
            sizes = sizes[sizes.amax(1) > 0]
            if sizes.shape[1] < FEWEST or not len(sizes):
                continue
            largest = sizes.amax(1)
            transmit = largest[largest > TRANSMISSION * (sizes.sum(1) - largest)].sort().values
            near = torch.searchsorted(transmit, transmit * (1 + EQUAL)) - torch.searchsorted(
                transmit, transmit * (1 - EQUAL)
            )
            share = float((near > 1).sum()) / len(sizes)
            yield SignReading(matrix.layer, share, f"{share:.0%} of its rows pass one input on, by the same factor")
