"""Certify: from a reconstruction to a bound on its error that the judge may hold it to."""

from __future__ import annotations

from dataclasses import replace

import torch

from unbatch.inversion.claims import judged
from unbatch.inversion.view import View
from unbatch.observation import Observation
from unbatch.reconstruction import Reconstruction


def certify(obs: Observation, found: Reconstruction) -> Reconstruction:
    """A reconstruction with a bound for every example that it holds, to which the judge will hold it.

    `bound` [k] is the largest |error| / |returned example| (l2), inf where nothing is claimed.

    An attack's own claim is kept where a second judge agrees: what the claimed examples send is computed again, from them
    and the exchange alone, and a claim that does not explain the update is withdrawn, with the reason in the trace
    (`unbatch.inversion.claims.judged`, which every attack's answer passes as well). A bound is never below the unit
    roundoff of the update, which no reading of it can beat. An example that came with no claim gets none. Where every
    example and label of a batch of known size is there, the trace holds the residual, |update - simulated update| /
    |update|: a small one is evidence, not a proof, since different batches can share a gradient.

    >>> import torch, unbatch
    >>> model, loss = torch.nn.Linear(4, 3), torch.nn.functional.cross_entropy
    >>> seen, truth = unbatch.observe(model, loss, torch.ones(1, 4), torch.tensor([2]))
    >>> guess = unbatch.Reconstruction(inputs=torch.zeros(1, 4), labels=torch.tensor([2]))
    >>> certified = certify(seen, guess)
    >>> certified.bound, certified.trace["residual"] > 0.1
    (tensor([inf], dtype=torch.float64), True)
    >>> claim = replace(guess, bound=torch.tensor([1e-6]))
    >>> certify(seen, claim).bound
    tensor([inf], dtype=torch.float64)
    """
    found = judged(View.of(obs), found)
    k = len(found)
    bound = found.bound if found.bound is not None else torch.full((k,), torch.inf, dtype=torch.float64)
    if found.inputs is not None and found.inputs.is_floating_point():  # tokens are equal, or they are not
        bound = bound.double().clamp_min(torch.finfo(obs.dtype).eps / 2)
    trace = dict(found.trace)
    whole = found.inputs is not None and found.labels is not None and not found.layer
    if whole and not obs.released and obs.knowledge.get("batch_size") == k and found.up_to <= {"permutation"}:
        trace["residual"] = obs.residual(found.inputs, found.labels)  # type: ignore[arg-type]
    return replace(found, bound=bound, trace=trace)
