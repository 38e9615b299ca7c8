"""psnr: peak signal-to-noise ratio, with the peak at the domain's own range."""

from __future__ import annotations

from typing import Annotated, ClassVar, Self, final

from pydantic import Field
from torch import Tensor

from unbatch.domain import Domain
from unbatch.metric import Metric


@final
class Psnr(Metric):
    """Peak signal-to-noise ratio of the recovered example in dB; beyond 60 the eye sees no difference.

    10 log10(peak^2 / mean squared error) per pair; capped at 300 dB, where float64 ends.

    >>> import torch, unbatch
    >>> true = torch.zeros(2, 1, 8, 8)
    >>> found = true + torch.tensor([0.1, 0.001]).view(2, 1, 1, 1)  # every pixel off by a tenth, by a thousandth
    >>> [f"{score:.1f}" for score in unbatch.metrics.Psnr().score(found, true)]
    ['20.0', '60.0']
    """

    higher_is_better: ClassVar[bool] = True
    unit: ClassVar[str] = "dB"
    best: ClassVar[float | None] = 300.0

    peak: Annotated[float, Field(gt=0, description="range of an entry; an audit sets it to the domain's")] = 1.0

    def on(self, domain: Domain) -> Self | None:
        return None if domain.name == "tokens" else self.model_copy(update={"peak": domain.high - domain.low})

    def score(self, found: Tensor, true: Tensor) -> Tensor:
        from torchmetrics.functional.image import peak_signal_noise_ratio

        if not len(found):
            return found.new_zeros(0, dtype=found.double().dtype)
        a, b = found.double().flatten(1), true.double().flatten(1)
        return peak_signal_noise_ratio(a, b, data_range=self.peak, reduction="none", dim=1).clamp(max=self.best)
