"""Likeliest: inputs that explain a noisy update best, from a guess near them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from unbatch.information import deviation, doubled, sent
from unbatch.numerics.least_squares import levenberg_marquardt
from unbatch.observation import Observation, Reconstruction

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


def refined(obs: Observation, found: Reconstruction, rng: torch.Generator) -> Reconstruction:
    """`found`, all inputs of a batch with their labels, moved to the likeliest ones unless one leaves its own bound."""
    if found.inputs is None or found.labels is None or found.bound is None or not len(found):
        return found
    moved = likeliest(obs, found.inputs, found.labels, rng)
    step = (moved - found.inputs).flatten(1).norm(dim=1).cpu()
    near = step <= found.bound * found.inputs.flatten(1).norm(dim=1).cpu()
    return replace(found, inputs=moved) if bool(near.all()) else found


def certified(found: Reconstruction) -> Reconstruction:
    """The examples with a finite bound."""
    if found.inputs is None or found.bound is None:
        return found
    sure = found.bound.isfinite()
    labels = None if found.labels is None else found.labels[sure.to(found.labels.device)]
    return replace(found, inputs=found.inputs[sure.to(found.inputs.device)], labels=labels, bound=found.bound[sure])
