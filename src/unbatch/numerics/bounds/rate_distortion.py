"""Rate distortion: the least mean squared error with which a Gaussian can be told from limited information."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def distortion(variances: Tensor, nats: float) -> float:
    """The least squared error that anyone can reach who has learnt at most so many nats about a Gaussian.

    min sum_i E (x_i - x^_i)^2 over all x^ with I(x; x^) <= `nats`, for independent Gaussians of `variances` [d].

    Reverse water-filling: sum_i min(v_i, t), the level t such that sum_i log(v_i / t)+ / 2 = nats. At many nats it is
    Shannon's d exp(2 (h - nats) / d) / (2 pi e), h the differential entropy; at few nats that formula lies below it.

    Source: Cover and Thomas, Elements of Information Theory, 2006, theorem 10.3.3. Raises ValueError: nats below 0.

    >>> distortion(torch.tensor([4.0, 1.0]), 0.0)  # nothing learnt: the variances themselves
    5.0
    >>> round(distortion(torch.tensor([4.0, 1.0]), math.log(2)), 6)  # a bit, which goes to the larger one
    2.0
    """
    level = water_level(variances, nats)
    return float(variances.double().clamp(max=level).sum())


def water_level(variances: Tensor, nats: float) -> float:
    """The squared error per entry that reverse water-filling leaves where there is more to leave.

    The t of reverse water-filling, sum_i log(v_i / t)+ / 2 = nats. Raises ValueError: nats below 0.

    >>> round(water_level(torch.tensor([4.0, 1.0]), math.log(2)), 6)
    1.0
    """
    if not nats >= 0:
        raise ValueError(f"nats is {nats}; information is at least 0.")
    logs = variances.double().clamp_min(1e-300).log().sort(descending=True).values
    count = torch.arange(1, len(logs) + 1, dtype=torch.float64, device=logs.device)
    levels = (logs.cumsum(0) - 2 * nats) / count  # of the first r components alone
    return float(levels[int((logs >= levels).nonzero()[-1])].exp())


def level(variances: Tensor, nats: float) -> float:
    """The level at which a bound by traces comes nearest to `distortion`.

    The t at which sum_i v_i t / (v_i + t) - t nats / 2, which is below `distortion` for every t, is largest.

    By duality distortion = max_s sum_i f(v_i) - 2 s nats, f(v) = v up to s and s (1 + log(v / s)) beyond; f is concave, and
    above 4 s v / (v + 4 s). t = 4 s. Unlike f, the trace of (V^-1 + I / t)^-1 is told from products with V^-1. Infinite
    at 0 nats.

    >>> v = torch.tensor([4.0, 1.0])
    >>> t = level(v, math.log(2))
    >>> float((v * t / (v + t)).sum()) - t * math.log(2) / 2 < distortion(v, math.log(2))
    True
    """
    if nats <= 0:
        return math.inf
    v = variances.double()
    ts = torch.logspace(-9, 6, 1501, dtype=torch.float64, device=v.device) * v.max()
    found = (v * ts[:, None] / (v + ts[:, None])).sum(1) - ts * nats / 2
    return float(ts[found.argmax()])


def guessing_radius(variances: Tensor, log_chance: float) -> float:
    """How near a guess can come to a Gaussian by luck, at a given probability.

    A radius e such that no guess lies within e of a Gaussian x of `variances` [d] with probability above the chance.

    The ball about the mean is the likeliest of its size (Anderson), and P(|x|^2 <= e^2) <= exp(t e^2) prod_i
    (1 + 2 t v_i)^(-1/2) for every t > 0 (Chernoff): the largest e at which some t makes that at most exp(log_chance).

    Source: Anderson, Proc. AMS 6, 1955. Raises ValueError: log_chance above 0.

    >>> radius = guessing_radius(torch.ones(100), math.log(1e-6))
    >>> 4 < radius < 10  # a typical draw lies 10 from the mean
    True
    """
    if not log_chance <= 0:
        raise ValueError(f"log_chance is {log_chance}; a logarithm of a probability is at most 0.")
    v = variances.double()
    ts = torch.logspace(-6, 12, 400, dtype=torch.float64, device=v.device) / v.sum()
    squares = (log_chance + 0.5 * torch.log1p(2 * ts[:, None] * v).sum(1)) / ts
    return float(squares.max().clamp_min(0).sqrt())
