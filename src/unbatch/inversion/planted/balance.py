"""Balance: whether what was sent of a dense layer's weights, of its biases and of the next layer's is of one rate."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import functional_call

from unbatch.errors import NotApplicable
from unbatch.inversion.planted.sums import weights
from unbatch.inversion.view import View
from unbatch.network.dense import Dense, in_mode

ROUNDINGS = 4.0  # of each term of the balance that are allowed for; a fifth of one was the most seen
LARGEST_OPEN = 0.02  # of a layer's balances, together: with more they would not show another rate
SYMMETRY = 1e-9  # relative change of outputs in float64 that counts as none


def refuse_unbalanced(view: View, layer: Dense, size: float) -> None:
    """Holds a layer's gradients to a law that every honest batch obeys, whatever its examples, labels and loss.

    A relu unit's weights and bias doubled and what reads it halved leave the network as it was, so that for each unit
    <W_u, dW_u> + b_u db_u = <V_u, dV_u>, V_u its column in the layer above. Weights and biases at two rates, a pruned
    layer or columns in another order break it. `size` is the largest norm of what enters the layer.
    Raises NotApplicable: it is broken, or nothing ties the layer's weights to its biases.
    """
    W, b = (view.model.get_parameter(name).detach().double() for name in (layer.weight, layer.bias or ""))
    above = _reader(view, layer, W, b)
    if above is None or above not in view.update:
        raise NotApplicable(f"no layer that sent its gradient reads {layer.name!r} by relu, to hold its rates against.")
    V, dV = view.model.get_parameter(above).detach().double(), view.update[above].double()
    dW, db = (view.update[name].double() for name in (layer.weight, layer.bias or ""))
    kinds = (view.update[layer.weight].dtype, next(view.model.parameters()).dtype)
    eps = max(torch.finfo(kind).eps for kind in kinds)
    weighed, biased, read = (W * dW).sum(1), b * db, (V * dV).sum(0)
    terms = (W * dW).abs().sum(1) + biased.abs() + (V * dV).abs().sum(0)
    total = _sent(view, layer).to(b) * (
        W.norm(dim=1) * size + b.abs()
    )  # of what examples send that cancels in the sums
    allowed = ROUNDINGS * eps * (terms + total)
    if bool(((weighed + biased - read).abs() > allowed).any()):
        raise NotApplicable(
            f"what was sent of {layer.name!r}'s weights, of its biases and of {above!r} is of no one batch: their rates "
            "differ, or a part was taken out."
        )
    if float(allowed.norm()) > LARGEST_OPEN * float(weighed.norm()):
        raise NotApplicable(f"the update is too coarse to show whether {layer.name!r}'s rates differ.")


def _sent(view: View, layer: Dense) -> Tensor:
    """The most [m] that all examples of a client together send back to each unit, by its size."""
    told = weights(view, layer)
    each = int(view.knowledge.batch_size) // int(view.knowledge.get("clients", 1))
    return each * float(told.values.abs().max()) * told.gains


def _reader(view: View, layer: Dense, W: Tensor, b: Tensor) -> str | None:
    """The weight [k, m] that reads the layer's units by relu: it halved and they doubled, the outputs stay."""
    own = {name: p.detach().double() for name, p in view.model.named_parameters()}
    rest = {name: t.double() if t.is_floating_point() else t for name, t in view.model.named_buffers()}
    x = view.stand_in(2, torch.Generator().manual_seed(0)).double()

    def outputs(changed: dict[str, Tensor]) -> Tensor:
        held: Tensor = functional_call(view.model, {**own, **rest, **changed}, (x,))
        return held

    with torch.no_grad(), in_mode(view.model, view.protocol.mode), torch.random.fork_rng(devices=[]):
        plain, doubled = outputs({}), {layer.weight: 2 * W, layer.bias or "": 2 * b}
        for name, held in own.items():
            if held.ndim != 2 or held.shape[1] != len(W) or name == layer.weight:
                continue
            again = outputs(doubled | {name: held / 2})
            if torch.allclose(plain, again, rtol=SYMMETRY, atol=SYMMETRY * float(plain.abs().max())):
                return name
    return None
