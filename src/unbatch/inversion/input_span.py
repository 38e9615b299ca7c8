"""An exchange with its inputs written in the span that the first dense layer's update gives away.

With W [m, d] the first layer's weight, its gradient is sum_i delta_i x_i^T, so the rows of the update, also after local
steps of SGD, span the inputs: x_i = P^T z_i, P [r, d] orthonormal. As W x = (W P^T) z, the same network with W P^T in
place of W, fed with z, trains on z as the network trains on x: its update is the same one, times P^T in W. A search over
[n, d] becomes one over [n, n] on a network d / n times smaller.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from unbatch.errors import UnbatchError
from unbatch.inversion.view import View
from unbatch.knowledge import Earlier, Knowledge
from unbatch.network.dense import forward
from unbatch.numerics.linear.span import leading_span, rank_tolerance
from unbatch.observation import Observation


@dataclass(frozen=True)
class SpanReduction:
    """An exchange that was made smaller by writing its inputs in a few directions, and the way back from its inputs.

    >>> import unbatch
    >>> from unbatch.models.small import build
    >>> rng = torch.Generator().manual_seed(0)
    >>> model, x, y = build("mlp", (6,), 3, width=8, rng=rng), torch.rand(2, 6, generator=rng), torch.tensor([0, 2])
    >>> seen, truth = unbatch.observe(model, nn.functional.cross_entropy, x, y)
    >>> small = in_input_span(View.of(seen), rng)
    >>> small.rows.shape, small.shape
    (torch.Size([2, 6]), (6,))
    >>> torch.allclose(small.inputs(x.double() @ small.rows.T), x.double(), atol=1e-5)  # there and back
    True
    """

    obs: Observation  # with inputs z [n, r]
    rows: Tensor  # P [r, d], float64
    shape: tuple[int, ...]  # of one input of the whole network
    exact: bool  # the update has no other rows than these, beyond rounding

    def inputs(self, z: Tensor) -> Tensor:
        """The whole network's inputs x = z P [n, *shape] behind inputs z [n, r] of the smaller one."""
        return (z @ self.rows.to(z)).reshape(-1, *self.shape)


def in_input_span(view: View, rng: torch.Generator) -> SpanReduction | None:
    """The same exchange for inputs in the span of the first dense layer's update: `batch_size` unknowns an example, not d.

    None where inputs do not reach a dense layer as they are, and after Adam or weight decay, whose updates have other rows
    than the inputs.

    >>> import unbatch
    >>> from unbatch.models.small import build
    >>> rng = torch.Generator().manual_seed(0)
    >>> model, x, y = build("mlp", (6,), 3, width=8, rng=rng), torch.rand(2, 6, generator=rng), torch.tensor([0, 2])
    >>> seen, truth = unbatch.observe(model, nn.functional.cross_entropy, x, y)
    >>> small = in_input_span(View.of(seen), rng)
    >>> small.obs.knowledge.input_shape, small.exact
    ((2,), True)
    """
    obs, known, protocol = view.obs, view.knowledge, view.protocol
    n = known.batch_size
    if protocol.optimiser != "sgd" or protocol.weight_decay:
        return None
    first = view.layers[0] if view.layers else None
    if first is None or first.feeds is None or first.weight not in obs.update:
        return None
    W = torch.cat([one.update[first.weight] for one in obs.exchanges])  # each round's rows span the same inputs
    if len(W.T) <= n or not bool(W.any()):
        return None
    span = leading_span(W, rng, rank=n, guess=n + 8)
    P = span.rows  # [r, d]
    model = copy.deepcopy(obs.model)
    path, _, leaf = first.weight.rpartition(".")
    whole = model.get_parameter(first.weight)
    small = nn.Parameter((whole.detach().double() @ P.T).to(whole), whole.requires_grad)
    setattr(model.get_submodule(path), leaf, small)
    z = torch.randn(2, len(P), generator=rng, dtype=torch.float64).to(P)
    try:
        again = forward(model, z)
    except UnbatchError:  # its inputs are reshaped or normalised on their way
        return None
    made = forward(obs.model, (z @ P).reshape(-1, *known.input_shape))
    if not torch.allclose(again, made, rtol=1e-3, atol=1e-3 * float(made.abs().max())):
        return None

    def cut(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {k: (t.double() @ P.T).to(t) if k == first.weight else t for k, t in tensors.items()}

    shape = known.input_shape
    past = [Earlier(state=cut(one.state), update=cut(one.update)) for one in known.get("earlier", ())]
    told = Knowledge(input_shape=(len(P),), **({"earlier": past} if past else {}))
    moved = replace(obs, model=model, update=cut(obs.update), knowledge=known | told)
    exact = span.noise <= 2 * rank_tolerance(W, torch.finfo(W.dtype).eps)
    return SpanReduction(moved, P, tuple(shape), exact)
