"""l2-error: relative l2 distance."""

from __future__ import annotations

from typing import ClassVar, Self, final

import torch
from torch import Tensor

from unbatch.domain import Domain
from unbatch.metric import Metric


@final
class L2Error(Metric):
    """Distance of the recovered example from the private one, in units of the private one's length; 0 is exact.

    |found - true| / |true| per pair; for an all-zero true example |found|.

    >>> import torch, unbatch
    >>> unbatch.metrics.L2Error().score(torch.tensor([[3.0, 4.5]]), torch.tensor([[3.0, 4.0]]))  # off by 0.5 of 5
    tensor([0.1000], dtype=torch.float64)
    """

    higher_is_better: ClassVar[bool] = False
    best: ClassVar[float | None] = 0.0

    def on(self, domain: Domain) -> Self | None:
        return None if domain.name == "tokens" else self  # the numbers of tokens have no distance

    def score(self, found: Tensor, true: Tensor) -> Tensor:
        gap: Tensor = torch.linalg.vector_norm((found - true).double().flatten(1), dim=1)
        size: Tensor = torch.linalg.vector_norm(true.double().flatten(1), dim=1)
        return gap / torch.where(size > 0, size, torch.ones_like(size))
