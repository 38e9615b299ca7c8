"""Descent: all examples of a mixture searched for at once, where it is known how often each label occurs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from unbatch.numerics.search.least_squares import PointResidual, minimise_by_products
from unbatch.numerics.unmix.mixture import Mixture

DESCENT_SOLVES = 400  # linear solves
SOLVE_PRODUCTS = 50  # products with J in each
HALVING_PRODUCTS = 500  # products within which the cost is to halve: each example by itself is faster then


@dataclass(frozen=True)
class Descent:
    """A way to begin: all examples at once, with the labels that are left for them.

    A start for every example left: `labels` gives those of the rest, in any order, from the z [f, n] and y [f] found.

    A few wrong labels do little harm: the other examples end near the truth, and each is then relabelled by itself.

    >>> from unbatch.numerics.unmix.made import made_mixture
    >>> rng = torch.Generator().manual_seed(0)
    >>> mixture, z, y = made_mixture(2)
    >>> start = Descent(labels=lambda found, named: y)
    >>> start(mixture, y, rng, tick=lambda: True).shape
    torch.Size([2, 2])
    """

    labels: Callable[[Tensor, Tensor], Tensor]
    enough: float = 3e-4

    def __call__(
        self,
        mixture: Mixture,
        y: Tensor,
        rng: torch.Generator,
        tick: Callable[[], bool],
        smooth: Mixture | None = None,
    ) -> Tensor:
        """z [n, n] of the mixture under the labels y [n]; `smooth` is its neighbour, if the mixture's own deltas jump."""
        point, costs = beginning(mixture, rng), []
        for cost, z in descend(mixture, point, y, rng, smooth):
            point = z
            costs.append(cost)
            slow = len(costs) % HALVING_PRODUCTS == 0 and cost > 0.5 * costs[-HALVING_PRODUCTS]
            if slow or cost < self.enough**2 or not tick():
                break
        return point


def beginning(mixture: Mixture, rng: torch.Generator, *, spread: float = 0.1) -> Tensor:
    """Where a descent begins: near an input of zeros.

    Points [n, n] near the input 0, a tenth of the inputs' size apart, |dL/dW| / |dL/db|.

    >>> from unbatch.numerics.unmix.made import made_mixture
    >>> mixture, z, y = made_mixture(4)
    >>> rng = torch.Generator().manual_seed(0)
    >>> beginning(mixture, rng).shape
    torch.Size([4, 4])
    """
    n, noise = mixture.n, torch.randn(mixture.n, mixture.n, generator=rng, dtype=torch.float64).to(mixture.U)
    if mixture.ones is None:
        before = (noise @ mixture.W).square().mean().sqrt() + 1e-300
        return spread * noise / before
    size = mixture.S.norm() / ((mixture.U * mixture.S) @ mixture.ones).norm()
    found: Tensor = mixture.ones / mixture.ones.square().sum() + spread * size * noise / n**0.5
    return found


def descend(
    mixture: Mixture, start: Tensor, y: Tensor, rng: torch.Generator, smooth: Mixture | None = None
) -> Iterator[tuple[float, Tensor]]:
    """All examples at once, fitted to the whole gradient.

    Minimise |U S - sum_i F(z_i, y_i) z_i^T|^2 / |U S|^2 over z [n, n]: the cost and z after every product with J.

    From near the origin the deltas of all examples of a class are almost alike, and the examples part one after the other
    as they grow: networks of a thousand neurons give up a hundred examples this way, whatever the data. Where deltas
    jump, J is that of the `smooth` mixture.

    >>> from unbatch.numerics.unmix.made import made_mixture
    >>> rng = torch.Generator().manual_seed(0)
    >>> mixture, z, y = made_mixture(2)
    >>> costs = [cost for cost, point in descend(mixture, beginning(mixture, rng), y, rng)]
    >>> costs[-1] < 1e-3 * costs[0]
    True
    """
    B = mixture.U * mixture.S
    size = B.norm()

    def of(mixture: Mixture) -> PointResidual:
        def residual(z: Tensor, /, *, create_graph: bool = False) -> Tensor:
            before = mixture.before(z)
            if not create_graph:
                before = before.detach()
            left: Tensor = (mixture.deltas(before, y).T @ z - B) / size
            return left.flatten()

        return residual

    surrogate = None if smooth is None else of(smooth)
    return minimise_by_products(
        of(mixture), start, rng, steps=DESCENT_SOLVES, inner=SOLVE_PRODUCTS, surrogate=surrogate
    )
