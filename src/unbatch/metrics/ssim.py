"""ssim: structural similarity of pictures."""

from __future__ import annotations

from typing import Annotated, ClassVar, Self, final

from pydantic import Field
from torch import Tensor

from unbatch.domain import Domain
from unbatch.metric import Metric


@final
class Ssim(Metric):
    """Structural similarity of the recovered picture and the private one; 1 is equal.

    Structural similarity (Wang, Bovik, Sheikh, Simoncelli 2004), Gaussian window of 11 pixels, per pair.

    None on pictures that are smaller than the window, and on anything that is no picture.

    >>> import torch, unbatch
    >>> true = torch.eye(16).view(1, 1, 16, 16)
    >>> metric = unbatch.metrics.Ssim()
    >>> f"{float(metric.score(true, true)):.2f}", float(metric.score(0.5 * true, true)) < 0.9
    ('1.00', True)
    """

    higher_is_better: ClassVar[bool] = True
    best: ClassVar[float | None] = 1.0

    peak: Annotated[float, Field(gt=0, description="range of an entry; an audit sets it to the domain's")] = 1.0

    def on(self, domain: Domain) -> Self | None:
        if domain.name != "images" or min(domain.shape[1:]) < 11:
            return None
        return self.model_copy(update={"peak": domain.high - domain.low})

    def score(self, found: Tensor, true: Tensor) -> Tensor:
        from torchmetrics.functional.image import structural_similarity_index_measure

        if not len(found):
            return found.new_zeros(0, dtype=found.double().dtype)
        each = structural_similarity_index_measure(
            found.double(), true.double(), data_range=self.peak, reduction="none"
        )
        return each[0].reshape(-1) if isinstance(each, tuple) else each.reshape(-1)
