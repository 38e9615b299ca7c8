"""Proof: whether claimed examples are what a planted layer's sums are of, each alone beside others that are proven."""

from __future__ import annotations

import torch
from torch import Tensor

from unbatch.errors import NotApplicable
from unbatch.inversion.planted.balance import refuse_unbalanced
from unbatch.inversion.planted.still import as_one_pass
from unbatch.inversion.planted.sums import sums
from unbatch.inversion.view import View
from unbatch.network.dense import Dense, layer_inputs
from unbatch.numerics.half_spaces import COUNT_SLACK, kind_of_one
from unbatch.reconstruction import Reconstruction

BOUNDARY = 1e-5  # of a unit's addends, within which it is open whether it fires


def alone_in_sums(view: View, layer: Dense, found: Reconstruction, sure: Tensor, far: Tensor) -> Tensor:
    """Which claims [k] the sums of a planted layer prove, by what the model makes of the claimed examples.

    The model is run on the claims, which says for which units each fires, and so in which sums it is. A claim stands if one
    sum, less the claims in it that stand already, is that claim times a weight that some label sends back, within `far` [k]
    (l2) and rounding, and can by its weight be no sum of two or more examples.
    Raises NotApplicable: the network above the layer is not quiet, or something changed the update.
    """
    if found.inputs is None:
        raise NotApplicable("there are no inputs.")
    view, passes = as_one_pass(view)
    told, held = sums(view, layer, passes)
    kind = next(view.model.parameters()).dtype
    received = found.inputs.flatten(1)
    if not found.layer:
        if layer.feeds is None:
            raise NotApplicable(f"more than a normalisation lies between the inputs and {layer.name!r}.")
        received = layer_inputs(view.model, layer.name, found.inputs.to(view.obs.device, kind), view.protocol.mode)
    z = received.double().cpu()  # [k, d]
    for each in view.obs.exchanges:
        refuse_unbalanced(view.on(each).gradient, layer, float(z.norm(dim=1).max()))
    h = z @ held.directions.T  # [k, q]
    near = BOUNDARY * z.abs() @ held.directions.abs().T + far.cpu()[:, None]
    open_ = ((h[:, :, None] - held.thresholds).abs() <= near[:, :, None]).any(2)
    inside = (h > held.thresholds[:, 0]) & (h <= held.thresholds[:, 1])
    owners = torch.as_tensor(found.trace.get("owners", [0] * len(z)))  # a wrong one costs the claim, and proves nothing
    theirs = owners[:, None] == held.owner
    inside, open_ = inside & theirs, open_ & theirs
    values, error, stands = held.values.clone(), held.error.clone(), torch.zeros(len(z), dtype=torch.bool)
    sure = sure.cpu()
    n = int(view.knowledge.batch_size)
    open_, inside = open_ & sure[:, None], inside & sure[:, None]
    waiting, moved = set(sure.nonzero().flatten().tolist()), True
    apart = torch.cdist(z, z) > far.cpu()[:, None] + far.cpu()  # [k, k], which claims are of different examples
    while moved:
        moved = False
        for i in sorted(waiting):
            within = (
                inside[i] & ~open_[i] if passes > 1 else inside[i] | open_[i]
            )  # parts of several lie at a threshold
            mine = within & ~open_[stands & ~apart[i]].any(0)  # nothing that may be in it is the same
            at = _alone_in(mine.nonzero().flatten().tolist(), values, error, z[i], float(far[i]), told.values, n)
            if at is None:
                continue
            q, weight = at
            waiting.remove(i)
            stands[i] = moved = True
            inside[i], open_[i] = held.known_inside(q, inside[i], open_[i])
            inside[i] &= ~open_[i]
            values[inside[i]] -= weight * torch.cat([z[i], z.new_ones(1)])
            error[inside[i], 0] += abs(weight) * float(far[i])
    return stands.to(far.device)


def _alone_in(
    sets: list[int], values: Tensor, error: Tensor, z: Tensor, far: float, weights: Tensor, most: int
) -> tuple[int, float] | None:
    """Which of the sums is that of one example z [d] alone, and with which weight; None where none is."""
    for q in sets:
        kind = kind_of_one(float(values[q, -1]), float(error[q, 1]), weights, most)
        if kind is None:
            continue
        weight = float(weights[kind])
        gap = float((values[q, :-1] - weight * z).norm())
        if gap <= COUNT_SLACK * float(error[q, 0]) + abs(weight) * far:
            return q, weight
    return None
