"""lone-units: units that fire for one example of many."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, final

from unbatch.inversion.received import ALONE, Received
from unbatch.sign import Sign, SignReading

FEWEST_EXAMPLES, FEWEST_UNITS = 32, 8


@final
class LoneUnits(Sign):
    """Units to which one example of the batch comes back alone.

    The value is the share of a layer's units where one of at least 32 examples makes up 99% of what comes back; a layer is
    read if something comes back to 8 units or more. Such a unit's gradient is that example, times a number. In honest
    models a few units are like that; where rows or thresholds were made so that a unit fires with probability 1 / n, about
    a third is.

    >>> import torch
    >>> from unbatch.inversion.received import Received
    >>> from unbatch.signs import LoneUnits
    >>> rng = torch.Generator().manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(9, 64), torch.nn.ReLU(), torch.nn.Linear(64, 3))
    >>> x, y = torch.randn(64, 9, generator=rng), torch.arange(64) % 3
    >>> with torch.no_grad():
    ...     _ = model[0].bias.copy_(-2.15 * model[0].weight.norm(dim=1))
    >>> LoneUnits()(Received.of(model, inputs=x, labels=y)).value > LoneUnits.limit
    True
    """

    paper: ClassVar[str] = "what Boenisch et al., EuroS&P 2023, and QBI, arXiv 2406.18745, aim for; the count is ours"
    honest: ClassVar[float] = 0.0936
    limit: ClassVar[float] = 0.2

    def read(self, received: Received) -> Iterator[SignReading]:
        for layer in received.each_running():
            energy = layer.energy
            whole = energy.sum(0)
            reached = whole > 1e-12 * whole.max()
            if len(energy) < FEWEST_EXAMPLES or int(reached.sum()) < FEWEST_UNITS:
                continue
            share = float((energy.amax(0)[reached] > ALONE * whole[reached]).double().sum() / len(whole))
            words = f"{share:.0%} of its units hear one of {len(energy)} examples alone"
            yield SignReading(layer.matrix.layer, share, words)
