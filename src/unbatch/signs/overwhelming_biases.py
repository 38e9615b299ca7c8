"""overwhelming-biases: layers whose thresholds drown whatever reaches them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, final

from unbatch.inversion.received import Received
from unbatch.sign import Sign, SignReading

FEWEST = 2  # units


@final
class OverwhelmingBiases(Sign):
    """Biases that are many times what a layer's weights make of its input: its units are always on, or never.

    The value is the median over a layer's units of |b| over the root mean square of w . x, over examples and places; units
    that nothing reaches, as pruning leaves them, do not count. A block that is saturated or dead by its biases passes on
    what the server wants to pass on, and nothing else.

    >>> import torch
    >>> from unbatch.inversion.received import Received
    >>> from unbatch.signs import OverwhelmingBiases
    >>> model = torch.nn.Linear(4, 8)
    >>> with torch.no_grad():
    ...     _ = model.bias.fill_(1000.0)
    >>> seen = Received.of(model, inputs=torch.rand(16, 4), labels=torch.arange(16) % 8)
    >>> OverwhelmingBiases()(seen).value > OverwhelmingBiases.limit
    True
    """

    paper: ClassVar[str] = "this library"
    honest: ClassVar[float] = 22.4
    limit: ClassVar[float] = 100.0

    def read(self, received: Received) -> Iterator[SignReading]:
        for layer in received.each_running():
            bias = layer.matrix.bias
            if bias is None or len(bias) < FEWEST or not bool(bias.any()):
                continue
            heard = layer.weighed > 0
            if int(heard.sum()) < FEWEST:
                continue
            value = float((bias[heard].abs() / layer.weighed[heard].sqrt()).median())
            yield SignReading(
                layer.matrix.layer, value, f"its biases are {value:,.1f} times what its weights make of the batch"
            )
