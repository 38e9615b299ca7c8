"""rouge: words, or runs of them, that a recovered text shares with the private one."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self, final

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor

from unbatch.domain import Domain, Tokens
from unbatch.errors import MissingExtra
from unbatch.metric import Metric


@final
class Rouge(Metric):
    """Words that the recovered text shares with the private one, in per cent; 100 is all of them and no others.

    ROUGE (Lin, 2004), the F-measure by Google's rouge-score: of single words ("1"), of pairs of neighbours ("2"), or of
    the longest run of words in the same order ("L"). The order counts for nothing in "1": a bag of the right words has 100.
    Tokens are read as the text that they stand for, or as their numbers where no vocabulary is known.

    >>> import torch, unbatch
    >>> true, found = torch.tensor([[4, 9, 2, 7]]), torch.tensor([[7, 9, 4, 3]])
    >>> unbatch.metrics.Rouge().score(found, true)
    tensor([75.], dtype=torch.float64)
    """

    higher_is_better: ClassVar[bool] = True
    unit: ClassVar[str] = "%"
    best: ClassVar[float | None] = 100.0

    runs: Annotated[Literal["1", "2", "L"], Field(description="of one word, of two, or as long as they come")] = "1"

    _domain: Tokens | None = PrivateAttr(default=None)

    def on(self, domain: Domain) -> Self | None:
        if not isinstance(domain, Tokens):
            return None
        fitted = self.model_copy()
        fitted._domain = domain
        return fitted

    def score(self, found: Tensor, true: Tensor) -> Tensor:
        try:
            from rouge_score.rouge_scorer import RougeScorer
        except ImportError:
            raise MissingExtra.of("the metric rouge", "rouge-score", "text") from None
        kind = f"rouge{self.runs}"
        scorer, domain = RougeScorer([kind]), self._domain or Tokens(shape=tuple(true.shape[1:]))
        pairs = zip(found, true, strict=True)
        each = [scorer.score(domain.render(b), domain.render(a))[kind].fmeasure for a, b in pairs]
        return 100 * torch.tensor(each, dtype=torch.float64)
