"""token-accuracy: the share of a text's tokens that are right, each at its own place."""

from __future__ import annotations

from typing import ClassVar, Self, final

import torch
from pydantic import PrivateAttr
from torch import Tensor

from unbatch.domain import Domain, Tokens
from unbatch.metric import Metric


@final
class TokenAccuracy(Metric):
    """Share of the text's tokens that are recovered, each at its own place; 1 is the text itself.

    Places that are padding in both count for nothing; a token where the private text has ended is a wrong one.

    >>> import torch, unbatch
    >>> true, found = torch.tensor([[4, 9, 2, 7]]), torch.tensor([[4, 2, 9, 7]])
    >>> unbatch.metrics.TokenAccuracy().score(found, true)
    tensor([0.5000], dtype=torch.float64)
    """

    higher_is_better: ClassVar[bool] = True
    best: ClassVar[float | None] = 1.0

    _padding: int | None = PrivateAttr(default=None)

    def on(self, domain: Domain) -> Self | None:
        if not isinstance(domain, Tokens):
            return None
        fitted = self.model_copy()
        fitted._padding = domain.padding
        return fitted

    def score(self, found: Tensor, true: Tensor) -> Tensor:
        a, b = (x.flatten(1).double().round().long() for x in (found, true))
        counted = torch.ones_like(b, dtype=torch.bool)
        if self._padding is not None:
            counted = (a != self._padding) | (b != self._padding)
        return ((a == b) & counted).double().sum(1) / counted.double().sum(1).clamp_min(1)
