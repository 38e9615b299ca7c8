"""constant-outputs: a model that answers the same whatever it is given, and yet hears its inputs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import ClassVar, final

from unbatch.inversion.received import Received
from unbatch.sign import Sign, SignReading

FEWEST = 8  # examples


@final
class ConstantOutputs(Sign):
    """Outputs that hardly depend on the input, while what comes back to the layers below does not vanish.

    The value is -log10 of how far the softmax of the outputs varies over the batch: the largest standard deviation of a
    class's probability. With a constant softmax every example comes back to the first layer with the same weight, which is
    what attacks by parallel hyperplanes divide by. A last layer of zeros, as honest servers start with, does not count.

    >>> import torch
    >>> from unbatch.inversion.received import Received
    >>> from unbatch.signs import ConstantOutputs
    >>> model = torch.nn.Linear(4, 3)
    >>> with torch.no_grad():
    ...     _ = model.weight.mul_(1e-9)
    >>> ConstantOutputs()(Received.of(model, inputs=torch.rand(16, 4), labels=torch.arange(16) % 3)).value > 9
    True
    """

    paper: ClassVar[str] = "the softmax of Cutting through Privacy, UAI 2025; the test is this library's"
    honest: ClassVar[float] = 4.37
    limit: ClassVar[float] = 6.0

    def read(self, received: Received) -> Iterator[SignReading]:
        layer = next((each for each in received.each_running() if each.head), None)
        if layer is None or received.outputs.shape[-1] < 2 or len(received.outputs) < FEWEST:
            return
        if not bool(layer.matrix.rows.any()):
            return
        spread = float(received.outputs.softmax(-1).std(0).max())
        value = -math.log10(max(spread, 1e-12))
        yield SignReading(
            layer.matrix.layer, value, f"no class's probability varies by more than {spread:.1g} over the batch"
        )
