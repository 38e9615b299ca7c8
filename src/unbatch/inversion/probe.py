"""Probe: the examples at which an analysis looks, and whose they are."""

from __future__ import annotations

import torch
from torch import Tensor

from unbatch.domain import domain_told
from unbatch.loss import draw_labels
from unbatch.network.dense import forward
from unbatch.observation import Observation


def probe(
    obs: Observation, at: tuple[Tensor, Tensor] | None, rng: torch.Generator | None, *, whole: bool = False
) -> tuple[Tensor, Tensor, str]:
    """x [1, *shape], y [1] and in words whose they are: the truth's first example, else a draw from the domain's prior.

    With `whole` as many as the batch has.
    """
    if at is not None:
        n = len(at[0]) if whole else 1
        whose = "the batch" if whole else "the batch's first example"
        return at[0][:n].to(obs.device), at[1][:n].to(obs.device), whose
    n = obs.knowledge.batch_size if whole else 1
    rng = rng or torch.Generator().manual_seed(0)
    x = domain_told(obs.knowledge).prior(n, rng).to(obs.device)
    y = draw_labels(obs.loss, forward(obs.model, x), rng)
    return x, y.to(obs.device), "a batch drawn from the prior" if whole else "an example drawn from the prior"
