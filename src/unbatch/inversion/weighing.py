"""Weighing: what multiple of a batch's gradient an update is, told from how much each example counts in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unbatch.knowledge import shares
from unbatch.loss import LossForm

MOST_TIMES = 3  # equal examples that one is taken to stand for, where the size of the batch is not known


@dataclass(frozen=True)
class Weighing:
    """How often each example found occurs in the batch, and what multiple of the batch's gradient the update is.

    An example counts w times its own gradient. In the mean gradient of n examples, times a factor c, w = c t / n for one
    that occurs t times: what an update shows is c t / n, and a known n tells c. Without it as few examples are taken to
    stand behind the update as explain it.

    >>> from unbatch.loss import identify
    >>> form = identify(torch.nn.functional.cross_entropy, (2, 3))
    >>> told = Weighing.of(torch.tensor([0.5, 0.5, 0.5, 0.5]), form, rank=4, n=4)
    >>> told.times.tolist(), told.factor, told.words
    ([1, 1, 1, 1], 2.0, 'The update is 2.000 times the mean gradient of these 4 examples.')
    >>> Weighing.of(torch.tensor([0.2, 0.2, 0.6]), form, rank=3, n=None).times.tolist()
    [1, 1, 3]
    """

    times: Tensor  # [f] int64
    factor: float
    size: int  # of the batch, as far as it was found
    words: str  # "" where the update is the batch's gradient itself
    even: bool = True  # else the weights are no whole numbers of any unit, and do not tell how often an example occurs

    @classmethod
    def of(
        cls, weights: Tensor, form: LossForm, *, rank: int, n: int | None, clients: int = 1, tolerance: float = 1e-3
    ) -> Weighing:
        """By how much each example found counts.

        weights [f]: of the examples' own gradients, in that of the loss; rank: of the layer's gradient, the number of
        different examples; n: the size of the batch, where it is known; clients: whose updates were added up;
        tolerance: relative error of the weights.
        """
        weights = weights.detach().double().cpu()
        mean, once = form.reduction == "mean", torch.ones(len(weights), dtype=torch.int64)
        if not len(weights):
            return cls(once, 1.0, n or rank, "")
        if mean and n is not None and _each_near(weights, [1 / s for s in shares(n, clients) if s], tolerance):
            told = "" if clients == 1 else f"The update is the sum of the mean gradients of {clients} clients."
            return cls(once, float(clients), n, told)
        unit = (clients / n if n else None) if mean else 1.0
        missing = rank - len(weights)  # each of which stands for one at least
        times = None if unit is None or n is None else _multiples(weights, unit, tolerance, n - missing)
        if times is None:
            least = float(weights[weights.abs().argmin()])
            most = n - missing if n is not None else MOST_TIMES * len(weights)
            times = _multiples(weights, least, tolerance, most)
        if times is None:
            low, high = weights[weights.abs().argmin()], weights[weights.abs().argmax()]
            return cls(
                once,
                float(weights.mean()) * (len(weights) if mean else 1),
                n or rank,
                f"The examples found count unequally in the update, {low:.4g} to {high:.4g} of their own gradients.",
                even=False,
            )
        size = n if n is not None else max(int(times.sum()), rank)
        unit = float((weights / times).median())
        factor = unit * size if mean else unit
        return cls(times, factor, size, _words(factor, size, len(weights) == rank, mean, n is None, unit, tolerance))


def _each_near(weights: Tensor, allowed: Sequence[float], tolerance: float) -> bool:
    """Whether every weight is one of those allowed."""
    gaps = (weights[:, None] / torch.tensor(allowed, dtype=torch.float64) - 1).abs()
    return bool((gaps.amin(1) <= tolerance).all())


def _multiples(weights: Tensor, unit: float, tolerance: float, most: int) -> Tensor | None:
    """Whole numbers [f] of units that the weights are, if they are, and together at most `most`."""
    times = weights / unit
    whole = times.round()
    alike = bool(((times - whole).abs() <= tolerance * times.abs()).all())
    return whole.long() if alike and bool((whole >= 1).all()) and int(whole.sum()) <= most else None


def _words(factor: float, size: int, whole: bool, mean: bool, unknown: bool, unit: float, tolerance: float) -> str:
    if abs(factor - 1) <= tolerance:
        return ""
    number = f"{factor:.3f}" if 0.01 <= abs(factor) < 100 else f"{factor:.4g}"
    batch = f"a batch of {size}" if not whole else "this one example" if size == 1 else f"these {size} examples"
    words = f"The update is {number} times the {'mean' if mean else 'summed'} gradient of {batch}."
    if mean and unknown:
        words += f" The size of the batch is not known: each example counts {unit:.4g}, which is factor over size."
    return words
