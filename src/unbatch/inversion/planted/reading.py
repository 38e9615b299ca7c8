"""Reading: the examples that a planted dense layer's sums give away, with what is claimed of them."""

from __future__ import annotations

import torch
from torch import Tensor

from unbatch.errors import NotApplicable
from unbatch.inversion.planted.sums import sums
from unbatch.inversion.view import View
from unbatch.network.dense import Dense
from unbatch.numerics.half_spaces import peel
from unbatch.progress import tick
from unbatch.reconstruction import Reconstruction


def read_sums(view: View, layer: Dense, passes: int = 1) -> Reconstruction:
    """The examples that come out of the planted layer's sums one after the other, each proven to be alone in one.

    `passes` is how often local steps took each example.
    Raises NotApplicable: the network above is not quiet, the update was changed on its way, or no sum is of one example.
    """
    told, held = sums(view, layer, passes)
    n = int(view.knowledge.batch_size)
    found = peel(held, told.values, n, lambda k: tick(k / n))
    if not len(found.x):
        raise NotApplicable(f"no sum that {layer.name!r} sent is of one example alone.")
    bound = found.off / found.x.norm(dim=1).clamp_min(1e-300) * 2
    inputs, bound, name = view.undo(layer, found.x.to(view.obs.device), bound)
    labels = None if told.labels is None else told.labels[found.weight].to(view.obs.device)
    trace = {"planted layer": layer.name, "sums left": int(found.left.sum()), "read": len(found.x), "of": n}
    trace["owners"] = found.owner.tolist()  # of each example, the client
    return Reconstruction(inputs=inputs, labels=labels, layer=name, bound=bound, trace=trace)


def open_slabs(view: View, layer: Dense) -> Tensor:
    """From where to where [s, 2] along the one direction of the planted rows examples lie that no sum gives away yet.

    Disjoint, the narrowest first; none once the whole batch is read, whatever rounding leaves in the sums.
    Raises NotApplicable: as `read_sums`.
    """
    told, held = sums(view, layer)
    n = int(view.knowledge.batch_size)
    found = peel(held, told.values, n)
    if len(found.x) == n:
        return held.thresholds[:0]
    left = held.thresholds[found.left]
    chosen = list[Tensor]()
    for slab in left[(left[:, 1] - left[:, 0]).argsort()]:
        if all(bool((slab[1] <= other[0]) | (slab[0] >= other[1])) for other in chosen):
            chosen.append(slab)
    return torch.stack(chosen) if chosen else left


def planted_layer(view: View) -> Dense:
    """The first dense layer, with a bias, of a view whose gradient was sent whole. Raises NotApplicable: there is none."""
    layer = view.layers[0] if view.layers else None
    if layer is None or layer.bias is None or not {layer.weight, layer.bias} <= set(view.update):
        raise NotApplicable("the first dense layer sent no gradient of its weight and bias.")
    if "batch_size" not in view.knowledge:
        raise NotApplicable("batch_size must be known, to tell how many examples a sum holds.")
    return layer
