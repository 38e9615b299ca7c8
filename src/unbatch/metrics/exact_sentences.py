"""exact-sentences: whether a text came back to its last token."""

from __future__ import annotations

from typing import ClassVar, Self, final

from torch import Tensor

from unbatch.domain import Domain, Tokens
from unbatch.metric import Metric


@final
class ExactSentences(Metric):
    """Whether the whole text is recovered: 1 where every token is right at its place and none is too many, else 0.

    >>> import torch, unbatch
    >>> true, found = torch.tensor([[4, 9, 2], [4, 9, 2]]), torch.tensor([[4, 9, 2], [4, 9, 3]])
    >>> unbatch.metrics.ExactSentences().score(found, true)
    tensor([1., 0.], dtype=torch.float64)
    """

    higher_is_better: ClassVar[bool] = True
    best: ClassVar[float | None] = 1.0

    def on(self, domain: Domain) -> Self | None:
        return self if isinstance(domain, Tokens) else None

    def score(self, found: Tensor, true: Tensor) -> Tensor:
        return (found.double().round() == true.double()).flatten(1).all(1).double()
