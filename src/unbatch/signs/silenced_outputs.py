"""silenced-outputs: a last layer that lets one class or feature through and silences the others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, final

from unbatch.inversion.received import Received
from unbatch.sign import Sign, SignReading

FEWEST, SILENT = 3, 0.01  # outputs; length of a row that is silent, over the longest


@final
class SilencedOutputs(Sign):
    """A last layer that hears one class alone: all its other rows are zero, or as good as zero.

    The value is the share of the outputs whose row is below a hundredth of the longest one, where that is not zero itself.
    Examples of other classes then send next to nothing back, and the update of a batch is that of its few.

    >>> import torch
    >>> from unbatch.inversion.received import Received
    >>> from unbatch.signs import SilencedOutputs
    >>> planted = torch.nn.Linear(16, 10)
    >>> with torch.no_grad():
    ...     _ = planted.weight[1:].zero_()
    >>> seen = Received.of(planted, inputs=torch.rand(3, 16), labels=torch.arange(3))
    >>> SilencedOutputs()(seen).value
    0.9
    """

    paper: ClassVar[str] = "the last layer of Wen et al., Fishing for User Data, ICML 2022; the test is this library's"
    honest: ClassVar[float] = 0.0
    limit: ClassVar[float] = 0.5

    def read(self, received: Received) -> Iterator[SignReading]:
        for layer in received.each_running():
            norms = layer.matrix.rows.norm(dim=1)
            if not layer.head or len(norms) < FEWEST or not bool(norms.max() > 0):
                continue
            silent = int((norms < SILENT * norms.max()).sum())
            yield SignReading(
                layer.matrix.layer, silent / len(norms), f"{silent} of its {len(norms)} outputs are silenced"
            )
