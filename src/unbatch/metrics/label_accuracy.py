"""label-accuracy: whether the recovered label is the private one."""

from __future__ import annotations

from typing import ClassVar, final

from torch import Tensor

from unbatch.metric import Metric


@final
class LabelAccuracy(Metric):
    """Whether the recovered label is right.

    1 where the matched label is right, else 0; labels are matched with their examples, or alone by value.

    >>> import torch, unbatch
    >>> unbatch.metrics.LabelAccuracy().score(torch.tensor([3, 1]), torch.tensor([3, 2]))
    tensor([1., 0.], dtype=torch.float64)
    """

    subject: ClassVar = "labels"
    higher_is_better: ClassVar[bool] = True
    best: ClassVar[float | None] = 1.0

    def score(self, found: Tensor, true: Tensor) -> Tensor:
        same = found == true
        return same.flatten(1).all(1).double() if same.ndim > 1 else same.double()
