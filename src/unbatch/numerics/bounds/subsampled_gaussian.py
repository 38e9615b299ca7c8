"""Subsampled Gaussian: what T noisy sums tell of one example that enters each with probability q.

One step releases N(0, z^2) without the example and N(1, z^2) with it, in units of the clipping norm: z is the noise
multiplier. An example of a smaller gradient, or another direction in every step, tells no more.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LEAST_DRAWS = 100  # draws beyond a threshold from which its place is told
RATIO_DRAWS = 2**17
MOST_NORMALS = 2**24  # drawn at most, all steps together


def information(z: float, q: float = 1.0, steps: int = 1) -> float:
    """How many nats differentially private training tells of one example, at most.

    Nats that `steps` releases tell of the example at most: steps KL((1 - q) N(0, z^2) + q N(1, z^2) | N(0, z^2)).

    For any reference Q, I(x; U) <= E KL(P(U | x) | Q); Q is the release without the example, all other examples known.
    q = 1: steps / (2 z^2), the rho of zero-concentrated differential privacy (add or remove one example).

    Source: Bun and Steinke, TCC 2016. Raises ValueError: z not positive, q not in [0, 1], or fewer than 0 steps.

    >>> information(2.0)  # 1 / (2 z^2)
    0.125
    >>> information(2.0, q=0.01, steps=100) < 100 * 0.01 * information(2.0)
    True
    """
    from scipy.integrate import quad

    _check(z, q, steps)
    if q in (0.0, 1.0):
        return q * steps / (2 * z * z)

    def integrand(t: float) -> float:  # t normal under either component
        ratio = _log_ratio
        told = q * ratio(1 + z * t, z, q) + (1 - q) * ratio(z * t, z, q)
        return told * math.exp(-t * t / 2) / math.sqrt(2 * math.pi)

    found = quad(integrand, -12, 12, limit=500, epsrel=1e-10)[0]
    return float(steps * max(found, 0.0))


def replacement_divergence(z: float, q: float = 1.0, steps: int = 1) -> float:
    """How far apart training with one example is from training with another, at most.

    Renyi divergence of order 2 between releases with one example and with another, at most.

    P = (1 - q) N(0) + q N(x), P' the same with x', |x| and |x'| <= 1. As P' - P = q (N(x') - N(x)) and 1 / P is convex,
    chi^2 <= q^2 [(1 - q) (2 exp(1/z^2) - 2 exp(-1/z^2)) + q (exp(4/z^2) - 1)], at x' = -x; the divergence is
    steps log(1 + chi^2). q = 1: 4 steps / z^2.

    Raises ValueError: as `information`.

    >>> replacement_divergence(2.0)
    1.0
    """
    _check(z, q, steps)
    s = 1 / (z * z)
    if q == 1 or s > 150:  # beyond, exp overflows; q^3 exp(4 s) leads
        return steps * (4 * s + 3 * math.log(q)) if q > 0 and s > 150 else steps * 4 * s * q
    return steps * math.log1p(q * q * ((1 - q) * 4 * math.sinh(s) + q * math.expm1(4 * s)))


class Robustness:
    """How much likelier an attack becomes by differentially private training, at most.

    How probable an event can become when an example joins `steps` releases, given how probable it is without.

    The event is that of the likelihood ratio above a threshold (Neyman and Pearson). q = 1: Phi(Phi^-1(chance) +
    sqrt(steps) / z), without error. Else by Monte Carlo: the threshold from draws without the example, placed on the safe
    side by three standard errors, its probability from draws with it. A chance below LEAST_DRAWS draws is raised to them:
    the answer is then larger, and safe.

    Source: Hayes, Mahloujifar and Balle, NeurIPS 2023, theorem 2 and algorithm 2. Raises ValueError: as `information`.

    >>> robust = Robustness(1.0)
    >>> probability, error = robust.success(math.log(1e-6))
    >>> round(probability, 6), error  # a guess that is right once in a million times
    (8.7e-05, 0.0)
    """

    def __init__(self, z: float, q: float = 1.0, steps: int = 1, rng: torch.Generator | None = None) -> None:
        _check(z, q, steps)
        self.shift = q * math.sqrt(steps) / z if q in (0.0, 1.0) else None
        if self.shift is not None:
            return
        rng = rng or torch.Generator().manual_seed(0)
        count = max(32 * LEAST_DRAWS, min(RATIO_DRAWS, MOST_NORMALS // max(steps, 1)))
        without, self.within = torch.zeros(2, count, dtype=torch.float64)
        for _ in range(steps):
            normal = z * torch.randn(2, count, generator=rng, dtype=torch.float64)
            enters = torch.rand(count, generator=rng, dtype=torch.float64) < q
            without += _log_ratios(normal[0], z, q)
            self.within += _log_ratios(normal[1] + enters, z, q)
        self.without = without.sort(descending=True).values

    def success(self, log_chance: float) -> tuple[float, float]:
        """The largest probability with the example of an event of probability exp(log_chance) without; standard error.

        Raises ValueError: log_chance above 0.
        """
        if not log_chance <= 0:
            raise ValueError(f"log_chance is {log_chance}; a logarithm of a probability is at most 0.")
        if self.shift is not None:
            from scipy.special import ndtr, ndtri_exp

            return float(ndtr(float(ndtri_exp(log_chance)) + self.shift)), 0.0
        count = len(self.within)
        k = max(LEAST_DRAWS, math.exp(log_chance) * count)
        place = math.ceil(k + 3 * math.sqrt(k))
        found = float((self.within >= self.without[place - 1]).double().mean()) if place < count else 1.0
        return found, math.sqrt(found * (1 - found) / count)


def _log_ratio(w: float, z: float, q: float) -> float:
    """log of ((1 - q) N(w; 0, z^2) + q N(w; 1, z^2)) / N(w; 0, z^2)."""
    a, b = math.log1p(-q), math.log(q) + (2 * w - 1) / (2 * z * z)
    return max(a, b) + math.log1p(math.exp(-abs(a - b)))


def _log_ratios(w: Tensor, z: float, q: float) -> Tensor:
    return torch.logaddexp(torch.tensor(math.log1p(-q)).to(w), math.log(q) + (2 * w - 1) / (2 * z * z))


def _check(z: float, q: float, steps: int) -> None:
    if not (z > 0 and 0 <= q <= 1 and steps >= 0):
        raise ValueError(
            f"noise multiplier {z}, sampling rate {q}, steps {steps}: give z > 0, 0 <= q <= 1 and steps >= 0."
        )
