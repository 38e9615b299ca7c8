"""A change of weights as one gradient: what training leaves where a network stays linear in its parameters.

While f(x; theta) = f(x; theta0) + (theta - theta0) . grad f(x; theta0), every step of descent on whatever loss of the
outputs adds to theta the gradients grad f(x_i; theta0), each times a number, so that at the end theta - theta0 = sum_i a_i
grad f(x_i; theta0) with numbers a_i of any sign (Loo et al., ICLR 2024). That is one step of descent at theta0 under the
squared error towards targets f(x_i) + const a_i: whatever reads a gradient of a batch with unknown real targets reads it.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn

from unbatch.errors import NotApplicable
from unbatch.inversion.view import View
from unbatch.knowledge import DOMAIN_FIELDS, Knowledge
from unbatch.network.dense import forward
from unbatch.network.tangent import TangentMap

NO_START = "the weights before training must be known, to take them off: Knowledge(initial=...)."
DECAYED = (
    "weight decay pulls on the starting weights as well, so that their change is no sum of gradients alone. Without it the "
    "change would be one."
)
RANK_DROP = 1e-13  # of the largest eigenvalue of the examples' kernel, below which they depend on each other


def as_one_step(view: View) -> View:
    """A released model and its starting weights as one step of descent at these, under the squared error.

    What is known is the input's shape, the number of examples and what inputs are like. Raises NotApplicable: the starting
    weights are not known, or are those at the end; or the training had weight decay.

    >>> import unbatch
    >>> spec = "trained:batch=4,width=40,steps=50,start=1,task=regression,method=linearised,threat=start"
    >>> client = unbatch.Case.parse(spec).setting()
    >>> told = {"knowledge": client.knowledge, "training": client.training}
    >>> seen, truth = unbatch.observe(client.model, client.loss, client.inputs, client.labels, **told)
    >>> step = as_one_step(View.of(seen))
    >>> duals, left = duals_of(step, truth.inputs)
    >>> duals.shape, left < 1e-12
    (torch.Size([4, 1]), True)
    """
    known = view.knowledge
    if "initial" not in known:
        raise NotApplicable(NO_START)
    if known.get("recipe", {}).get("weight_decay", 0.0):
        raise NotApplicable(DECAYED)
    after = {name: p.detach() for name, p in view.model.named_parameters()}
    model = copy.deepcopy(view.model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(known.initial[name])
    change = {name: p - known.initial[name].to(p) for name, p in after.items()}
    change = {name: moved for name, moved in change.items() if bool(moved.any())}
    if not change:
        raise NotApplicable("the weights are as they were before training.")
    told = known.only("input_shape", "batch_size", *DOMAIN_FIELDS) | Knowledge(local_steps=1, learning_rate=1.0)
    return View.of(replace(view.obs, model=model, loss=nn.functional.mse_loss, update=change, knowledge=told))


def duals_of(step: View, inputs: Tensor) -> tuple[Tensor, float]:
    """The numbers a [k, outputs] of theta - theta0 = sum_i a_i grad f(x_i), and the share of the change that they leave.

    By least squares over all parameters, in float64.
    """
    obs = step.obs
    model, x = copy.deepcopy(obs.model).double(), inputs.to(obs.device).double()
    tangent = TangentMap.of(model, x, list(obs.update))
    change = {name: u.double() for name, u in obs.update.items()}
    seen = tangent.pushed(change).flatten()[:, None]
    duals = torch.linalg.lstsq(tangent.kernel(), seen, rcond=RANK_DROP, driver="gelsd").solution
    duals = duals.view(len(x), -1)
    again = tangent.pulled(duals)
    off = torch.stack([(u - again[name]).square().sum() for name, u in change.items()]).sum().sqrt()
    size = torch.stack([u.square().sum() for u in change.values()]).sum().sqrt()
    return duals, float(off / size)


def targets_of(step: View, inputs: Tensor) -> tuple[Tensor, float]:
    """The targets [k, outputs] under which one step on these inputs is the change, and the share that it leaves of it."""
    duals, left = duals_of(step, inputs)
    with torch.no_grad():
        outputs = forward(copy.deepcopy(step.model).double(), inputs.to(step.obs.device).double(), "eval").flatten(1)
    return outputs + duals * (outputs.numel() / 2), left
