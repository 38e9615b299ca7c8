"""relative-leakage: how much nearer a recovered picture is than what the prior alone gives."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self, final

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from unbatch.domain import Domain, Images
from unbatch.metric import Metric

LEAST_PRIOR_SIMILARITY = 0.01  # least similarity of the prior that is divided by


@final
class RelativeLeakage(Metric):
    """How much more similar the recovered picture is than the best that a prior gives without the update.

    (SIM(x, x') - SIM(x, p)) / SIM(x, p): x the private picture, x' the recovered one, p the prior's. The relative data
    leakage value (RDLV) of Hatamizadeh et al.; 0 is what the prior gives by itself, 1 is twice as similar.

    SIM is the structural similarity as `ssim` takes it, or the cosine of the pixels over the range's low end where the
    picture is smaller than its window or `similarity` says so. p is the most similar of `draws` pictures that the domain's
    prior draws (seed 0); the paper has one prior picture, draws=1. SIM(x, p) counts as at least .01, since a ratio with
    zero says nothing. The paper's value for a client is the largest over recovered pictures of each private one; here
    every private example is matched with one. A picture's own score, 1 / SIM(x, p) - 1, differs from picture to picture.

    >>> import torch, unbatch
    >>> true = torch.eye(8).view(1, 1, 8, 8)
    >>> metric = unbatch.metrics.RelativeLeakage(similarity="cosine")
    >>> exact, grey = metric.score(true, true), metric.score(torch.full_like(true, 0.5), true)
    >>> f"{float(exact):.2f}", f"{float(grey):.2f}"  # grey says less than the prior's best
    ('1.38', '-0.16')
    """

    higher_is_better: ClassVar[bool] = True
    best: ClassVar[float | None] = None
    paper: ClassVar[str] = (
        "Hatamizadeh et al., Do Gradient Inversion Attacks Make Federated Learning Unsafe?, IEEE TMI 2023 (arXiv "
        "2202.06924); the authors' code, NVFlare research/quantifying-data-leakage, rdlv_filter.py"
    )

    similarity: Annotated[Literal["ssim", "cosine"], Field(description="of two pictures")] = "ssim"
    draws: Annotated[int, Field(gt=0, description="of the prior, the most similar of which is p")] = 16
    low: Annotated[float, Field(description="of an entry; an audit sets it to the domain's")] = 0.0
    high: Annotated[float, Field(description="of an entry; an audit sets it to the domain's")] = 1.0

    def on(self, domain: Domain) -> Self | None:
        if domain.name != "images":
            return None
        small = min(domain.shape[1:]) < 11
        told = {"low": domain.low, "high": domain.high, **({"similarity": "cosine"} if small else {})}
        return self.model_copy(update=told)

    def score(self, found: Tensor, true: Tensor) -> Tensor:
        if not len(found):
            return found.new_zeros(0, dtype=torch.float64)
        return self._each(found, true).amin(0)

    def interval(self, found: Tensor, true: Tensor, share: float = 0.9) -> Tensor:
        """The paper's value with one of the draws as its prior picture: the middle `share` of what the draws give [p, 2].

        The value is a ratio to SIM(x, p), so that a bad prior inflates it: a threshold that lies within is one that the
        choice of the prior decides.

        >>> import torch, unbatch
        >>> true = torch.eye(8).view(1, 1, 8, 8)
        >>> metric = unbatch.metrics.RelativeLeakage(similarity="cosine")
        >>> low, high = metric.interval(true, true)[0].tolist()
        >>> f"{low:.2f} to {high:.2f}"
        '1.61 to 3.60'
        """
        if not len(found):
            return found.new_zeros(0, 2, dtype=torch.float64)
        ends = torch.tensor([(1 - share) / 2, (1 + share) / 2], dtype=torch.float64, device=true.device)
        return self._each(found, true).quantile(ends, dim=0).T

    def _each(self, found: Tensor, true: Tensor) -> Tensor:
        """The value with each draw as the prior's picture [draws, p]."""
        domain = Images(shape=tuple(true.shape[1:]), low=self.low, high=self.high)
        drawn = domain.prior(self.draws, torch.Generator().manual_seed(0)).to(true.device)
        alone = torch.stack([self._similarity(p.expand_as(true), true) for p in drawn])
        alone = alone.clamp_min(LEAST_PRIOR_SIMILARITY)
        similar = self._similarity(found, true)
        return (similar - alone) / alone

    def _similarity(self, a: Tensor, b: Tensor) -> Tensor:
        """Of pairs of pictures [p, c, h, w], [p, c, h, w] -> [p]."""
        from torchmetrics.functional.image import structural_similarity_index_measure

        a, b = a.double() - self.low, b.double() - self.low
        if self.similarity == "cosine":
            return F.cosine_similarity(a.flatten(1), b.flatten(1))
        each = structural_similarity_index_measure(a, b, data_range=self.high - self.low, reduction="none")
        return each[0].reshape(-1) if isinstance(each, tuple) else each.reshape(-1)
