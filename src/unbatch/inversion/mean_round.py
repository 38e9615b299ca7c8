"""Mean round: all rounds of a batch at the same parameters, read as one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unbatch.observation import Observation
from unbatch.protocol import Update


def still(obs: Observation) -> bool:
    """Whether all rounds that are known are at the same parameters."""
    return all(one.model is obs.model for one in obs.exchanges)


def mean_round(obs: Observation, weights: Sequence[Update] | None = None) -> dict[str, Tensor]:
    """The mean update of all rounds that are known, in float64, tensor by tensor.

    sum_t w_t u_t / sum_t w_t in every entry, w_t the `weights` of the rounds, 1 where none are given; 0 where no round has
    any. It stands for the rounds where they are `still`: a mean over other parameters is no update of any.
    """
    rounds, found = obs.exchanges, dict[str, Tensor]()
    for name in obs.update:
        seen = torch.stack([one.update[name] for one in rounds]).double()  # [T, *shape]
        w = torch.ones_like(seen) if weights is None else torch.stack([each[name] for each in weights]).double()
        found[name] = (w * seen).sum(0) / w.sum(0).clamp_min(1e-300)
    return found
