"""regular-biases: thresholds that lie as evenly as quantiles do."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import ClassVar, final

from unbatch.inversion.received import Received
from unbatch.sign import Sign, SignReading

FEWEST = 8  # biases, below which nothing is regular
DISTINCT = 0.9  # share of the biases that differ: below, they were rounded, pruned or never trained


@final
class RegularBiases(Sign):
    """Biases of a layer that lie more evenly than random or trained ones: quantiles, or equal steps.

    Sorted numbers that were drawn or trained have gaps of very different sizes: the logarithm of the ratio of two
    neighbouring gaps has the median size log 3 where they are drawn independently from any smooth law. Quantiles of a law
    have gaps that change slowly. The value is (log 3 - the median size of these logarithms) sqrt(m), of m biases: about
    normal around 0 for drawn ones.

    >>> import torch
    >>> from unbatch.inversion.received import Received
    >>> from unbatch.signs import RegularBiases
    >>> planted = torch.nn.Linear(4, 64)
    >>> with torch.no_grad():
    ...     _ = planted.bias.copy_(torch.special.ndtri(torch.arange(1, 65) / 65))
    >>> round(RegularBiases()(Received.of(planted)).value, 1)
    8.5
    """

    paper: ClassVar[str] = "this library; the biases are those of Fowl et al., Robbing the Fed, ICLR 2022"
    honest: ClassVar[float] = 3.18
    limit: ClassVar[float] = 6.0

    def read(self, received: Received) -> Iterator[SignReading]:
        for matrix in received.matrices:
            if matrix.bias is None or len(matrix.bias) < FEWEST:
                continue
            gaps = matrix.bias.sort().values.diff()
            gaps = gaps[gaps > 0]
            m = len(gaps) + 1
            if m < max(FEWEST, DISTINCT * len(matrix.bias)):
                continue
            size = float(gaps.log().diff().abs().median())
            value = (math.log(3) - size) * math.sqrt(m)
            words = f"neighbouring gaps of its {m} biases differ by a factor of {math.exp(size):.2f}, drawn ones by 3"
            yield SignReading(matrix.layer, value, words)
