"""Division: one example behind a dense layer with a bias, by the ratio of the layer's two gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from unbatch.errors import NotApplicable
from unbatch.inversion.label_fit import label_behind
from unbatch.inversion.view import View
from unbatch.network.dense import Dense
from unbatch.observation import Observation
from unbatch.reconstruction import Reconstruction


def divided(view: View, tol: float | None = None) -> Reconstruction:
    """The one example x = (dL/dW)^T (dL/db) / |dL/db|^2 that a dense layer received, with its bound, as `bias-ratio` says.

    `tol` is the relative rank-one residual that is accepted; none takes the update's rounding.
    Raises NotApplicable: no dense layer with a bias sent both, or what it sent is not of one example.
    """
    view.refuse_tokens()
    view = view if view.protocol.optimiser == "sgd" else view.gradient
    layer = _layer(view)
    rounding = _rounding(view.obs, layer)
    if rounding > 0.1:
        raise NotApplicable(
            f"the parameters' own rounding ({rounding:.1e}, relative) drowns the update of {layer.name!r}."
        )
    z, residual = _fit(view.obs, layer)  # [1, d]
    allowed = tol if tol is not None else 16 * rounding
    if residual > allowed:
        raise NotApplicable(
            f"the gradient of {layer.name!r} is not of rank one (relative residual {residual:.1e}, tol "
            f"{allowed:.1e}): more than one example, noise, pruning or weight decay."
        )
    e = max(residual, rounding)
    bound = torch.tensor([e * (1 + (1 + residual**2) ** 0.5) / (1 - e) if e < 1 else torch.inf], dtype=torch.float64)
    inputs, bound, name = view.undo(layer, z, bound)
    label, explained, trace = None, None, {"layer": layer.name, "rank-one residual": residual}
    if not name:
        label = label_behind(view, inputs)
        explained = view.obs.residual(inputs, label) if label is not None else None
        trace["residual with the label found"] = explained
    bound = _claim(view.obs, bound, explained)
    return Reconstruction(inputs=inputs, labels=label, layer=name, bound=bound, trace=trace)


def _layer(view: View) -> Dense:
    """The first dense layer whose weight and bias were sent, one on the network's input before all others.

    Raises NotApplicable: its bias gradient is none to divide by, or the update is no multiple of one gradient.
    """
    n, protocol = view.knowledge.get("batch_size", 1), view.protocol
    if n > 1:
        raise NotApplicable(
            f"the batch has {n} examples, and the ratio of weight and bias gradient is a mixture of them."
        )
    if view.steps and protocol.optimiser != "sgd":
        raise NotApplicable(view.no_gradient)
    if view.steps and protocol.weight_decay:
        raise NotApplicable(
            "weight decay adds the parameters themselves to the update, so it is no multiple of the input."
        )
    sent = [layer for layer in view.layers if layer.bias and {layer.weight, layer.bias} <= set(view.update)]
    layer = next((layer for layer in sent if layer.feeds is not None), sent[0] if sent else None)
    if layer is None:
        raise NotApplicable("no dense layer with a bias sent its gradient, so there is nothing to divide by.")
    if not bool(view.update[layer.bias or ""].any()):
        raise NotApplicable(f"the bias gradient of {layer.name!r} is zero: the example does not reach that layer.")
    return layer


def _claim(obs: Observation, bound: Tensor, explained: float | None) -> Tensor:
    """Parallel deltas make a mixture look like one example; only n = 1 known, or the whole update, rules that out."""
    certain = "batch_size" in obs.knowledge or (explained is not None and explained <= 1e-3)
    return bound if certain else torch.full_like(bound, torch.inf)


def _rounding(obs: Observation, layer: Dense) -> float:
    """Relative error of the update's entries: a few roundings, or after local steps those of the parameters."""
    eps, sent = torch.finfo(obs.dtype).eps, [name for name in (layer.weight, layer.bias) if name]
    if obs.protocol.steps(1) == 0:
        sizes = {k: float(obs.update[k].double().square().mean().sqrt()) for k in sent}
        return 4 * (eps + max(float(obs.grain.get(k, 0.0)) / sizes[k] for k in sent))
    parameters = dict(obs.model.named_parameters())
    ratios = [float(parameters[k].detach().double().norm() / obs.update[k].double().norm()) for k in sent]
    return 4 * eps * (1 + obs.protocol.steps(1) * max(ratios))


def _fit(obs: Observation, layer: Dense) -> tuple[Tensor, float]:
    """The layer's input [1, d] and |dW - db x^T| / |dW|, in float64."""
    W, b = obs.update[layer.weight].double(), obs.update[layer.bias or ""].double()  # [m, d], [m]
    x = (b @ W) / (b @ b)
    size = torch.linalg.matrix_norm(W)
    return x[None], float(torch.linalg.matrix_norm(W - torch.outer(b, x)) / size) if size > 0 else 0.0
