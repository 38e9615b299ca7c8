"""Digits: handwritten digits of 8 by 8 pixels."""

from __future__ import annotations

from typing import ClassVar, final

import torch

from unbatch.case import Case, Examples
from unbatch.domain import Images


@final
class Digits(Case):
    """Handwritten digits of 8 by 8 pixels.

    1,797 handwritten digits [1, 8, 8] in 17 grey levels, scaled to [0, 1]; ten classes.

    >>> import unbatch
    >>> unbatch.cases.Digits(batch=4).setting()
    <Setting digits:batch=4: 4 images [1, 8, 8], Sequential of 4,810 parameters>
    """

    source: ClassVar[str] = (
        "Optical Recognition of Handwritten Digits, test set: E. Alpaydin and C. Kaynak, 1998, "
        "UCI Machine Learning Repository (CC BY 4.0); the copy that scikit-learn ships"
    )

    def pool(self, rng: torch.Generator) -> Examples:
        from sklearn.datasets import load_digits

        data = load_digits()
        order = torch.randperm(len(data.target), generator=rng)
        return Examples(
            inputs=torch.as_tensor(data.images, dtype=torch.float32).unsqueeze(1)[order] / 16,
            labels=torch.as_tensor(data.target, dtype=torch.int64)[order],
            classes=[str(digit) for digit in range(10)],
            domain=Images(shape=(1, 8, 8)),
        )
