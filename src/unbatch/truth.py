"""The private batch, which only the judge knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from unbatch.domain import Domain


@dataclass(frozen=True, kw_only=True, repr=False)
class Truth:
    """The private batch, held by the runner only; no attack, analysis, layer rule or numerics can import this module.

    >>> import torch
    >>> Truth(inputs=torch.zeros(2, 1, 8, 8), labels=torch.tensor([3, 1]))
    <Truth: 2 examples [1, 8, 8]>
    """

    inputs: Tensor  # [n, *input_shape]
    labels: Tensor  # [n]
    notes: Sequence[str] = ()  # what was done to read them, for the report
    domain: Domain | None = None  # of the file that they come from: names, units and categories of its columns
    classes: Sequence[str] = ()  # names of the labels

    def __len__(self) -> int:
        return len(self.inputs)

    def __repr__(self) -> str:
        noun = "example" if len(self) == 1 else "examples"
        return f"<Truth: {len(self)} {noun} {list(self.inputs.shape[1:])}>"
