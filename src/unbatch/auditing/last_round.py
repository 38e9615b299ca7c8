"""Last round: what a client keeps of the model that it received, by which a layer put in its place shows in the next."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from unbatch.reporting.inspection import SignRead


@dataclass(frozen=True)
class LastRound:
    """The parameters that a client received in the round before, and the number of that round as it was told.

    >>> received = nn.Linear(2, 1)
    >>> last = LastRound().followed(1, received)
    >>> list(last.before(2)), list(last.before(4)), list(last.before(None))
    (['weight', 'bias'], [], [])
    """

    number: int | None = None  # None: not told, or there was none
    state: Mapping[str, Tensor] = field(default_factory=dict)

    def before(self, number: int | None) -> Mapping[str, Tensor]:
        """What the model of round `number` is compared with: nothing where rounds lie between, in which training goes on.

        A number that goes back or stands still is no reason not to compare: the server says it.
        """
        follows = number is not None and self.number is not None and number <= self.number + 1
        return self.state if follows else {}

    def followed(self, number: int | None, model: nn.Module, raised: Iterable[SignRead] = ()) -> LastRound:
        """What is kept once a model was looked at. Of weights with a sign it is what was there before them.

        >>> planted = nn.Linear(2, 1)
        >>> sign = SignRead(
        ...     sign="", layer="", value=1, limit=0, honest=0, words="", weights=["weight"]
        ... )
        >>> list(LastRound().followed(1, planted, [sign]).state)
        ['bias']
        """
        earlier = self.before(number)
        odd = {name for sign in raised for name in sign.weights}
        kept = dict[str, Tensor]()
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name not in odd:
                kept[name] = parameter.detach().cpu().to(torch.float32, copy=True)
            elif name in earlier:
                kept[name] = earlier[name]
        return LastRound(number, kept)
