"""Truth: what only the judge knows."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True, repr=False)
class Truth:
    """The private batch, held by the runner only; no attack, analysis, layer rule or numerics can import this module."""

    inputs: Tensor  # [n, *input_shape]
    labels: Tensor  # [n]

    def __len__(self) -> int:
        return len(self.inputs)

    def __repr__(self) -> str:
        return f"<Truth: {len(self)} examples {list(self.inputs.shape[1:])}>"
