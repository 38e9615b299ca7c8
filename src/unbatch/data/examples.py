"""Examples as they were read: inputs, labels, their domain, and what was done to read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from unbatch.domain import Domain


@dataclass(frozen=True, kw_only=True, repr=False)
class Data:
    """Examples with labels, ready for a Setting, and what was done to read them."""

    inputs: Tensor  # [n, ...]
    labels: Tensor  # [n, ...]
    domain: Domain
    classes: Sequence[str] = ()  # names of the labels 0, 1, 2 ...
    notes: Sequence[str] = ()  # what was done to read them, a sentence each

    def __repr__(self) -> str:
        held = f"{len(self.inputs)} {self.domain.name} {list(self.inputs.shape[1:])}"
        return f"<Data: {held}, labels {self.labels.dtype} {list(self.labels.shape)}>"
