"""Sign: what tells a client that the model it received was made to read its data; imports no torch at run time."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from unbatch.plugin import Plugin

if TYPE_CHECKING:
    from unbatch.inversion.received import Received


@dataclass(frozen=True)
class SignReading:
    """How far one layer of a received model has what a sign looks for: the more, the larger."""

    layer: str
    value: float
    words: str


class Sign(Plugin, ABC):
    """One thing that a malicious server's models have and honest ones do not, as a number with a limit.

    The limit is set from honest models alone: `honest` is the largest value that any layer of those that
    `unbatch bench inspect` sets limits by gave, and `limit` lies beyond it. Signs are read off the received model, the one
    before it where that is known, and a batch.

    >>> sorted(Sign.find())[:3]
    ['concentrated-gradients', 'constant-outputs', 'duplicated-columns']
    """

    kind: ClassVar[str] = "sign"
    folder: ClassVar[str] = "signs"

    paper: ClassVar[str]
    honest: ClassVar[float]  # largest value of the honest models of `unbatch bench inspect`
    limit: ClassVar[float]  # beyond which it is raised

    @abstractmethod
    def read(self, received: Received) -> Iterable[SignReading]:
        """A reading for each layer that it can be read off; none where there is nothing to read."""

    @final
    def __call__(self, received: Received) -> SignReading | None:
        """The largest reading of all layers; None where there is none.

        >>> import torch
        >>> from unbatch.inversion.received import Received
        >>> planted = torch.nn.Linear(16, 8)
        >>> with torch.no_grad():
        ...     _ = planted.weight.fill_(1 / 16)
        >>> Sign.parse("duplicated-rows")(Received.of(planted)).value
        1.0
        """
        found = [reading for reading in self.read(received) if not math.isnan(reading.value)]
        return max(found, key=lambda reading: reading.value, default=None)
