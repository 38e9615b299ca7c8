"""label-accuracy: whether the recovered label is the private one."""

from __future__ import annotations

from typing import ClassVar, final

from torch import Tensor

from unbatch.label_form import agree
from unbatch.metric import Metric


@final
class LabelAccuracy(Metric):
    """Whether the recovered label is right.

    1 where the matched label is right, else 0; labels are matched with their examples, or alone by value. Class numbers,
    one-hot rows and bits are compared by what they say; probabilities and real targets agree to 1 %.

    >>> import torch, unbatch
    >>> unbatch.metrics.LabelAccuracy().score(torch.tensor([3, 1]), torch.tensor([3, 2]))
    tensor([1., 0.], dtype=torch.float64)
    """

    subject: ClassVar = "labels"
    higher_is_better: ClassVar[bool] = True
    best: ClassVar[float | None] = 1.0

    def score(self, found: Tensor, true: Tensor) -> Tensor:
        return agree(found, true).double()
