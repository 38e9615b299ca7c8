"""Likeliest: inputs that explain a noisy update best, from a guess near them."""

from __future__ import annotations

import torch
from torch import Tensor

from unbatch.information import deviation, doubled, sent
from unbatch.numerics.least_squares import levenberg_marquardt
from unbatch.observation import Observation

STEPS, INNER = 8, 60


def likeliest(obs: Observation, x: Tensor, y: Tensor, rng: torch.Generator) -> Tensor:
    """argmin over x [n, *shape] of |update - simulated(x, y)|^2 over every entry, from all inputs x of known labels.

    Under equal independent Gaussian noise it is the likelihood's maximum, which meets the Cramer-Rao bound where noise is
    small. x itself where no noise is known. By Levenberg-Marquardt without matrices.
    """
    sigma = deviation(obs)
    if not sigma > 0:
        return x
    double = doubled(obs)
    seen = torch.cat([u.flatten() for u in double.update.values()])

    def residual(point: Tensor, /, *, create_graph: bool = False) -> Tensor:
        return (sent(double, point.view_as(x), y, create_graph=create_graph) - seen) / sigma

    best, start = x, x.double().flatten(1)
    for _, point in levenberg_marquardt(
        residual, start, rng, steps=STEPS, inner=INNER, damping=1e-6, tolerance=1e-3, gain=1e-6
    ):
        best = point.view_as(x)
    return best
