"""Stationarity: what the one example that an informed adversary does not know adds to a gradient that is zero.

A training that ended at a stationary point of the mean loss over k known examples and one unknown + decay / 2 |theta|^2
leaves sum_known g_i + g + (k + 1) decay theta = 0, so that the unknown example's own gradient g is known at the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unbatch.errors import NotApplicable
from unbatch.inversion.view import View
from unbatch.network.dense import in_mode
from unbatch.network.precision import loss_value, outputs_of

ROUNDINGS = 64.0  # of the sums of which little is left


@dataclass(frozen=True)
class Remainder:
    """The gradient of the unknown example's own loss, by parameter, and how far rounding may be off in each entry."""

    gradient: Mapping[str, Tensor]
    off: Mapping[str, float]  # standard size of an entry's error
    known: int  # examples

    def norm(self) -> float:
        """Its size over all parameters, l2."""
        return float(torch.stack([g.square().sum() for g in self.gradient.values()]).sum().sqrt())


def remainder(view: View) -> Remainder:
    """What the known examples and weight decay leave of a gradient that is zero as a whole.

    Raises NotApplicable: it is not known how the model was trained, or on what; or examples are seen together (batch norm).

    >>> import unbatch
    >>> spec = "trained:known=9,threat=informed,task=classes,depth=0,start=1,weight_decay=0.1"
    >>> client = unbatch.Case.parse(spec).setting()
    >>> told = {"knowledge": client.knowledge, "training": client.training}
    >>> seen, truth = unbatch.observe(client.model, client.loss, client.inputs, client.labels, **told)
    >>> left, own = remainder(View.of(seen)), own_gradient(View.of(seen), truth.inputs, truth.labels)
    >>> all(torch.allclose(left.gradient[name], own[name], atol=1e-12) for name in own)
    True
    """
    known = view.knowledge
    missing = [name for name in ("known_inputs", "known_labels", "recipe") if name not in known]
    if missing:
        raise NotApplicable(f"{', '.join(missing)} must be known, of the examples and of the training.")
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training for module in view.model.modules()):
        raise NotApplicable("batch norm sees examples together, so that none has a gradient of its own.")
    x, y = known.known_inputs.to(view.obs.device), known.known_labels.to(view.obs.device)
    decay, k = float(known.recipe.get("weight_decay", 0.0)), len(x)
    sums = own_gradient(view, x, y) if k else None
    found, off = dict[str, Tensor](), dict[str, float]()
    for name, p in view.model.named_parameters():
        theta, g = p.detach().double(), sums[name] if sums is not None else torch.zeros_like(p).double()
        pull = (k + 1) * decay * theta
        found[name] = -k * g - pull
        eps = torch.finfo(p.dtype).eps
        entry = (k * g.norm() + pull.norm()) / max(theta.numel(), 1) ** 0.5 + found[name].abs().max()
        off[name] = float(eps * entry)
    return Remainder(found, off, k)


def own_gradient(view: View, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The gradient of the mean loss of these examples at the released parameters, in float64."""
    held = {name: p.detach().double().requires_grad_() for name, p in view.model.named_parameters()}
    rest = {name: b.detach().double() if b.is_floating_point() else b for name, b in view.model.named_buffers()}
    x = inputs.double() if inputs.is_floating_point() else inputs
    y = labels.double() if labels.is_floating_point() else labels
    with torch.enable_grad(), in_mode(view.model, view.protocol.mode):
        value = loss_value(view.loss, outputs_of(view.model, x, {**held, **rest}), y)
        grads = torch.autograd.grad(value, list(held.values()), materialize_grads=True)
    return {name: g.detach() for name, g in zip(held, grads, strict=True)}
