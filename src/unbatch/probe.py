"""Probe: the one example at which an analysis looks, and whose it is."""

from __future__ import annotations

import torch
from torch import Tensor

from unbatch.domain import Images
from unbatch.loss import draw_labels
from unbatch.network import forward
from unbatch.observation import Observation


def probe(
    obs: Observation, at: tuple[Tensor, Tensor] | None, rng: torch.Generator | None
) -> tuple[Tensor, Tensor, str]:
    """x [1, *shape], y [1] and in words whose they are: the truth's first example, else a draw from the domain's prior."""
    if at is not None:
        return at[0][:1].to(obs.device), at[1][:1].to(obs.device), "the batch's first example"
    rng = rng or torch.Generator().manual_seed(0)
    shape, (low, high) = obs.knowledge.input_shape, obs.knowledge.get("input_range", (0.0, 1.0))
    if len(shape) == 3:
        x = Images(shape=shape, low=low, high=high).prior(1, rng)
    else:
        x = low + (high - low) * torch.rand(1, *shape, generator=rng)
    x = x.to(obs.device)
    y = draw_labels(obs.loss, forward(obs.model, x), rng)
    return x, y.to(obs.device), "an example drawn from the prior"
