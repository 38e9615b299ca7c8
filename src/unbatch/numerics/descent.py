"""Descent: all examples of a mixture at once from near the origin, where their labels are known in any order."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from unbatch.numerics.least_squares import levenberg_marquardt
from unbatch.numerics.mixture import Mixture


def descend(
    mixture: Mixture, start: Tensor, y: Tensor, rng: torch.Generator, *, steps: int = 60, inner: int = 50
) -> Iterator[Tensor]:
    """Minimise |U S - sum_i F(z_i, y_i) z_i^T|^2 / |U S|^2 over z [n, n] from `start`: z after every product with J.

    From near the origin the deltas of all examples of a class are almost alike, and the examples part one after the other
    as they grow: smooth networks of a thousand neurons give up a hundred examples this way, whatever the data.
    """
    B = mixture.U * mixture.S
    size = B.norm()

    def residual(z: Tensor, /, *, create_graph: bool = False) -> Tensor:
        before = mixture.before(z)
        if not create_graph:
            before = before.detach()
        left: Tensor = (mixture.deltas(before, y).T @ z - B) / size
        return left.flatten()

    for _, z in levenberg_marquardt(residual, start, rng, steps=steps, inner=inner):
        yield z
