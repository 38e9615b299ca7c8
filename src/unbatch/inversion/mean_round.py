"""Mean round: all rounds of a batch at the same parameters, read as one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unbatch.observation import Observation
from unbatch.protocol import Update


def still(obs: Observation) -> bool:
    """Whether all rounds that are known are at the same parameters.

    >>> import torch, unbatch
    >>> model, loss = torch.nn.Linear(2, 2), torch.nn.functional.cross_entropy
    >>> x, y = torch.ones(4, 2), torch.tensor([0, 1, 1, 0])
    >>> twice = unbatch.Protocol(rounds=2)  # of the same batch, at the same parameters
    >>> seen, truth = unbatch.observe(model, loss, x, y, protocol=twice, defences="noise:sigma=0.1")
    >>> still(seen)
    True
    """
    return all(one.model is obs.model for one in obs.exchanges)


def mean_round(obs: Observation, weights: Sequence[Update] | None = None) -> dict[str, Tensor]:
    """The mean update of all rounds that are known, in float64, tensor by tensor.

    sum_t w_t u_t / sum_t w_t in every entry, w_t the `weights` of the rounds, 1 where none are given; 0 where no round has
    any. It stands for the rounds where they are `still`: a mean over other parameters is no update of any.

    >>> import torch, unbatch
    >>> model, loss = torch.nn.Linear(2, 2), torch.nn.functional.cross_entropy
    >>> x, y = torch.ones(4, 2), torch.tensor([0, 1, 1, 0])
    >>> twice = unbatch.Protocol(rounds=2)  # of the same batch, at the same parameters
    >>> seen, truth = unbatch.observe(model, loss, x, y, protocol=twice, defences="noise:sigma=0.1")
    >>> one, other = (exchange.update["weight"].double() for exchange in seen.exchanges)
    >>> torch.allclose(mean_round(seen)["weight"], (one + other) / 2)
    True
    """
    rounds, found = obs.exchanges, dict[str, Tensor]()
    for name in obs.update:
        seen = torch.stack([one.update[name] for one in rounds]).double()  # [T, *shape]
        w = torch.ones_like(seen) if weights is None else torch.stack([each[name] for each in weights]).double()
        found[name] = (w * seen).sum(0) / w.sum(0).clamp_min(1e-300)
    return found
