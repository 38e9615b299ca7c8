"""Quiet: what lies above a planted dense layer made so that an example's label alone tells what is sent back."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbatch.errors import NotApplicable, UnbatchError
from unbatch.knowledge import Knowledge
from unbatch.network.dense import Dense, anatomy, forward, layer_inputs

GOLDEN = (5**0.5 - 1) / 2  # of the first output: sums of p and p - 1 then tell how many of each there are
STEADY = 1e-9  # the most by which examples move the output
REACH = 10.0  # times the norm of an input of typical size that is allowed for


def golden_logit(outputs: int) -> float:
    """The first logit, beside zeros, at which its class has the golden share of the probability.

    >>> f"{torch.tensor([golden_logit(3), 0, 0]).softmax(0)[0]:.4f}"
    '0.6180'
    """
    return math.log(GOLDEN / (1 - GOLDEN) * max(outputs - 1, 1))


def quieten(model: nn.Module, shape: tuple[int, ...], W: Tensor, b: Tensor, below: Collection[str] = ()) -> nn.Module:
    """A copy of `model` whose first dense layer has the weight W [m, d] and the bias b [m], and that is quiet above it.

    The first output is a constant and a tiny multiple of the sum of the layer's units; the others are zero. The gradient of
    cross entropy at the outputs is then p - 1 or p at the first one, with p golden, by the label alone. `below` names the
    parameters under the layer, which stay.
    Raises NotApplicable: the model does not begin with a dense layer with a bias, or not only relu and dense layers follow.
    """
    made = copy.deepcopy(model)
    first, *above = dense_layers(made, shape)
    parameters = dict(made.named_parameters(remove_duplicate=False))
    _dense_alone(first, above, parameters, below)
    with torch.no_grad():
        parameters[first.weight].copy_(W)
        parameters[first.bias or ""].copy_(b)
        for layer in above:
            parameters[layer.weight].zero_()
            if layer.bias:
                parameters[layer.bias].zero_()
        gain = quiet_gain(W, b)
        for layer, row in zip(above, [torch.full((len(b),), gain), *[torch.ones(1)] * len(above)], strict=False):
            parameters[layer.weight][0, : len(row)] = row.to(parameters[layer.weight])
        if above[-1].bias:
            parameters[above[-1].bias][0] = golden_logit(len(parameters[above[-1].weight]))
    _check(made, shape, W, b, gain)
    return made


def shape_known(known: Knowledge) -> tuple[int, ...]:
    """The shape of an input. Raises NotApplicable: it is not known."""
    if "input_shape" not in known:
        raise NotApplicable("input_shape must be known, to plant rows for such inputs.")
    shape: tuple[int, ...] = known.input_shape
    return shape


def dense_layers(model: nn.Module, shape: tuple[int, ...]) -> list[Dense]:
    """The dense layers of a model of real inputs. Raises NotApplicable: it takes none of that shape, such as one of tokens.

    >>> [layer.name for layer in dense_layers(nn.Sequential(nn.Linear(2, 3)), (2,))]
    ['0']
    """
    try:
        return list(anatomy(model, shape).layers)
    except UnbatchError as error:
        raise NotApplicable(f"rows are planted for inputs of real numbers, and {error}") from None


def plant_rows(model: nn.Module, shape: tuple[int, ...], rows: Callable[[int], tuple[Tensor, Tensor]]) -> nn.Module:
    """A copy of `model` with rows for inputs of the network in its first dense layer, and a quiet network above.

    `rows` gives W [m, d] and b [m] for a layer of m units: a unit is to fire where W x + b > 0.
    Raises NotApplicable: the network does not begin with a dense layer, or cannot be made quiet.
    """
    layers = dense_layers(model, shape)
    feeds = layers[0].feeds if layers else None
    if feeds is None:
        raise NotApplicable(
            "the network does not begin with a dense layer; imprint:bins=N puts a block in front of any network."
        )
    W, b = rows(len(model.get_parameter(layers[0].weight)))
    scale, shift = feeds.scale.to(W), feeds.shift.to(W)  # the layer receives scale x + shift
    return quieten(model, shape, W / scale, b - (W / scale) @ shift)


def quiet_gain(W: Tensor, b: Tensor) -> float:
    """By how much a unit of a layer W [m, d], b [m] may move the output, so that all of them together move it by STEADY."""
    m, d = W.shape
    reach = REACH * float(W.double().norm(dim=1).max()) * math.sqrt(d) + float(b.double().abs().max())
    return STEADY / (m * reach)


def _dense_alone(first: Dense, above: list[Dense], parameters: dict[str, nn.Parameter], below: Collection[str]) -> None:
    used = {name for layer in (first, *above) for name in (layer.weight, layer.bias) if name}
    odd = sorted(set(parameters) - used - set(below))
    if odd:
        raise NotApplicable(f"the network has more than dense layers: {odd[0]!r} is no part of one.")
    if (first.feeds is None and not below) or first.bias is None or not above or not above[-1].head:
        raise NotApplicable(
            "the network does not begin with a dense layer with a bias, and end with another dense layer."
        )


def _check(made: nn.Module, shape: tuple[int, ...], W: Tensor, b: Tensor, gain: float) -> None:
    """Raises NotApplicable unless the first output rises with the sum of the units, and nothing else moves."""
    rng = torch.Generator().manual_seed(0)
    double = copy.deepcopy(made).double()
    x = torch.rand(8, *shape, generator=rng, dtype=torch.float64)
    z = layer_inputs(double, anatomy(double, shape).layers[0].name, x).detach()
    units = F.relu(z @ W.to(z).T + b.to(z)).sum(1)
    seen = forward(double, x, "eval").flatten(1)
    rise, said = seen[:, 0] - seen[:1, 0], gain * (units - units[:1])
    if not torch.allclose(rise, said, rtol=1e-3, atol=1e-3 * float(said.abs().max()) + 1e-15) or bool(
        seen[:, 1:].any()
    ):
        raise NotApplicable("more than relu and dense layers lies above the first one, so it cannot be made quiet.")
