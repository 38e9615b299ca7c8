"""replaced-layer: layers that changed since the last round by more than training changes them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, final

from unbatch.inversion.received import Received
from unbatch.sign import Sign, SignReading


@final
class ReplacedLayer(Sign):
    """A weight that has changed since the last round by as much as it is long.

    The value is |W - W before| / |W before|, of each matrix whose former state is known and not zero, in units of the
    layer's own spread, therefore. An honest round adds up the clients' steps and leaves most of a layer in place; one that
    is put in its place has the value 1 or more.

    >>> import torch
    >>> from unbatch.inversion.received import Received
    >>> from unbatch.signs import ReplacedLayer
    >>> old, new = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
    >>> ReplacedLayer()(Received.of(new, before=old.state_dict())).value > ReplacedLayer.limit
    True
    """

    paper: ClassVar[str] = "this library"
    honest: ClassVar[float] = 0.844
    limit: ClassVar[float] = 1.0

    def read(self, received: Received) -> Iterator[SignReading]:
        for matrix in received.matrices:
            old = (received.before or {}).get(matrix.weight)
            if old is None or not bool(old.any()):
                continue
            new = received.model.get_parameter(matrix.weight).detach().double().cpu()
            value = float((new - old.double().cpu()).norm() / old.double().norm().cpu())
            yield SignReading(
                matrix.layer, value, f"it has moved by {value:.0%} of its own length since the last round"
            )
