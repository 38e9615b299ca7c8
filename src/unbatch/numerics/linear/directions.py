"""Directions: square linear systems with one matrix, one right-hand side after the other, by its products alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from unbatch.numerics.callables import Apply


class KeptDirections:
    """Solves A x = r by directions whose images A p are orthonormal, kept for the right-hand sides that follow (GCR).

    For A that are the identity up to a few directions: as many products are needed as there are of them. Source: Eisenstat,
    Elman and Schultz, Variational iterative methods for nonsymmetric systems of linear equations, 1983.

    >>> A = torch.diag(torch.tensor([1.0, 1.0, 0.01]).double())
    >>> system = KeptDirections(lambda v: A @ v)
    >>> system.solved(torch.tensor([1.0, 2.0, 3.0]).double(), within=1e-9).round().tolist()
    [1.0, 2.0, 300.0]
    >>> len(system), round(system.spread(lambda v: v, 3.0))
    (2, 100)
    """

    def __init__(self, apply: Apply, most: int = 400) -> None:
        self.apply, self.most = apply, most
        self.kept: list[Tensor] = []
        self.images: list[Tensor] = []

    def __len__(self) -> int:
        """How many directions are kept, which is how many products with A were taken."""
        return len(self.kept)

    def solved(self, right: Tensor, within: float) -> Tensor:
        """x [m] with |A x - right| <= within |right|, or as near as all directions that may be kept come."""
        x, left = self._projected(torch.zeros_like(right), right)
        while float(left.norm()) > within * float(right.norm()) and len(self) < self.most and self._extend(left):
            part = self.images[-1] @ left
            x, left = x + part * self.kept[-1], left - part * self.images[-1]
        return x

    def spread(self, covariance: Apply, total: float) -> float:
        """Root mean square |A^-1 e| of errors e with this covariance (of vectors [k, m], row by row) and its trace `total`.

        Beside the directions kept A is taken for the identity.
        """
        if not self.kept:
            return math.sqrt(total)
        P, Q = torch.stack(self.kept), torch.stack(self.images)
        more, turned = P - Q, covariance(Q)  # A^-1 = 1 + (P - Q)^T Q
        square: Tensor = total + 2 * (more * turned).sum() + ((more @ more.T) * (turned @ Q.T)).sum()
        return math.sqrt(max(float(square), 0.0))

    def _projected(self, x: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
        """x with what the directions kept add to it, and what is left of the right-hand side."""
        if not self.kept:
            return x, left
        P, Q = torch.stack(self.kept), torch.stack(self.images)
        for _ in range(2):  # the second time for the rounding of the first
            parts = Q @ left
            x, left = x + P.T @ parts, left - Q.T @ parts
        return x, left

    def _extend(self, along: Tensor) -> bool:
        """Keeps the direction of `along`, beside those there are. False: its image adds nothing to theirs."""
        p = along / along.norm()
        q = self.apply(p)
        size = float(q.norm())
        if self.kept:
            P, Q = torch.stack(self.kept), torch.stack(self.images)
            for _ in range(2):
                parts = Q @ q
                p, q = p - P.T @ parts, q - Q.T @ parts
        new = float(q.norm())
        if not new > torch.finfo(q.dtype).eps * size:
            return False
        self.kept.append(p / new)
        self.images.append(q / new)
        return True
