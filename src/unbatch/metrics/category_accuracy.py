"""category-accuracy: the share of a row's categories that are recovered, each rounded to its likeliest value."""

from __future__ import annotations

from typing import ClassVar, Self, final

import torch
from pydantic import PrivateAttr
from torch import Tensor

from unbatch.domain import Domain, Table
from unbatch.metric import Metric


@final
class CategoryAccuracy(Metric):
    """Share of the row's categories (job, town) that are right, each rounded to the largest of its columns.

    Which columns are one category the domain says (`Table.categories`); without a domain all of them are a single one.

    >>> import torch, unbatch
    >>> cook, guess = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.3, 0.4]])
    >>> unbatch.metrics.CategoryAccuracy().score(guess, cook)
    tensor([1.], dtype=torch.float64)
    """

    higher_is_better: ClassVar[bool] = True
    best: ClassVar[float | None] = 1.0

    _categories: tuple[tuple[int, ...], ...] = PrivateAttr(default=())

    def on(self, domain: Domain) -> Self | None:
        if not isinstance(domain, Table) or not domain.categories:
            return None
        fitted = self.model_copy()
        fitted._categories = domain.categories
        return fitted

    def score(self, found: Tensor, true: Tensor) -> Tensor:
        a, b = found.double().flatten(1), true.double().flatten(1)
        groups = [list(group) for group in self._categories] or [list(range(a.shape[1]))]
        right = [a[:, group].argmax(1) == b[:, group].argmax(1) for group in groups]
        return torch.stack(right, 1).double().mean(1)
