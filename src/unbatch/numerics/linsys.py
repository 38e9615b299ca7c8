"""Linear systems A x = b in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LinearSystem:
    """A x = b with A [equations, unknowns] and b [equations]."""

    A: Tensor
    b: Tensor

    def __post_init__(self) -> None:
        if self.A.ndim != 2 or self.b.shape != self.A.shape[:1]:
            raise ValueError(f"A {tuple(self.A.shape)} and b {tuple(self.b.shape)} are no linear system.")

    def __add__(self, other: LinearSystem) -> LinearSystem:
        """Both sets of equations on the same unknowns."""
        return LinearSystem(torch.cat([self.A, other.A]), torch.cat([self.b, other.b]))

    def solve(self) -> tuple[Tensor, int]:
        """The least-squares solution of least norm [unknowns], and the numerical rank of A."""
        A = self.A.double()
        U, S, Vh = torch.linalg.svd(A, full_matrices=False)
        kept = S > S[:1].sum() * max(A.shape) * torch.finfo(A.dtype).eps
        return Vh[kept].T @ ((U[:, kept].T @ self.b.double()) / S[kept]), int(kept.sum())
