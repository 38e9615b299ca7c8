"""Determined: how much of one example a gradient determines, to first order around it, for any differentiable model."""

from __future__ import annotations

import copy
import math
from collections.abc import Container
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.modules.dropout import _DropoutNd

from unbatch.loss import Loss
from unbatch.numerics.prior import GaussianPrior

ROUNDINGS = 4  # of a tensor's root mean square: the error of its entries
ROWS = 2  # of the Jacobian, for each unknown and tensor, into which longer gradients are summed with random signs
COLUMNS = 64  # of the Jacobian that are computed at once


@dataclass(frozen=True)
class Determined:
    """What remains open of an example whose prior is Gaussian, when the gradient around it is known to rounding."""

    share: float  # 1 - tr(posterior covariance) / tr(prior covariance)
    psnr: float  # -10 log10(tr(posterior covariance) / d), in units of the input's range


def determined(
    model: nn.Module,
    loss: Loss,
    x: Tensor,
    y: Tensor,
    *,
    box: tuple[float, float] = (0.0, 1.0),
    mode: Literal["train", "eval"] = "eval",
    eps: float = float(torch.finfo(torch.float32).eps),
    noise: float = 0.0,
    sent: Container[str] | None = None,
    rng: torch.Generator | None = None,
) -> Determined:
    """1 - tr (C^-1 + J^T S^-1 J)^-1 / tr C at the example x [1, *shape], y [1].

    J [e, d] is the Jacobian with respect to x of dL/dW, of all parameters or those `sent`; S the variance of rounding and
    of `noise` that was added: the square of four times `eps` times a tensor's root mean square, plus noise^2. C is the
    covariance of `GaussianPrior`. To first order: whether a search finds the place is not asked. Dropout drops nothing. A
    tensor of more than two entries an unknown is summed into so many by random signs (a count sketch), which leaves its
    part of J^T S^-1 J as it is on average.

    Source: the Bayesian Cramer-Rao bound of van Trees (1968) with a Gaussian prior;
    Clarkson and Woodruff, J. ACM 63, 2017 (sketch). Raises ValueError: the gradient is not finite there.
    """
    shape, rng = tuple(x.shape[1:]), rng or torch.Generator().manual_seed(0)
    model = copy.deepcopy(model).double().train(mode == "train")
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.eval()
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    state = {name: tensor.detach().clone() for name, tensor in state.items()}
    own = [name for name, _ in model.named_parameters() if sent is None or name in sent]
    y = y.double() if y.is_floating_point() else y
    sketch: dict[str, tuple[Tensor, Tensor, int]] = {}  # weight and place of every entry, and how many places

    def value(weights: dict[str, Tensor], at: Tensor) -> Tensor:
        buffers = {k: v.clone() for k, v in state.items() if k not in weights}  # batch norm in train mode writes them
        return loss(functional_call(model, {**weights, **buffers}, (at.view(1, *shape),)), y)

    def update(at: Tensor) -> Tensor:
        found = grad(value)({name: state[name] for name in own}, at)
        parts = [at.new_zeros(k).index_add(0, to, found[name].flatten() * w) for name, (w, to, k) in sketch.items()]
        return torch.cat(parts)

    at = x.double().flatten()
    gradient = grad(value)({name: state[name] for name in own}, at)
    most = ROWS * len(at)
    for name, tensor in gradient.items():
        size, e = float(tensor.square().mean().sqrt()), tensor.numel()
        if not math.isfinite(size):
            raise ValueError(f"the gradient of {name!r} is not finite at the example.")
        if size > 0:
            signs = 2.0 * torch.randint(2, (e,), generator=rng) - 1 if e > most else torch.ones(e)
            to = torch.randint(most, (e,), generator=rng) if e > most else torch.arange(e)
            error = ((ROUNDINGS * eps * size) ** 2 + noise**2) ** 0.5
            sketch[name] = (signs.to(at) / error, to.to(at.device), min(e, most))
    eye = torch.eye(len(at), dtype=torch.float64)
    root = GaussianPrior(shape, box).push(eye).T.to(at)  # C = root root^T, root [d, d]
    whole = open_ = float(root.square().sum())
    if sketch:
        parts = torch.split(root.T.contiguous(), COLUMNS)
        rows = torch.cat([vmap(lambda v: jvp(update, (at,), (v,))[1])(part).detach() for part in parts])  # (J root)^T
        U, S, _ = torch.linalg.svd(rows, full_matrices=False)
        spread = (root @ U).square().sum(0)  # of the prior along each direction
        unseen = max(0.0, whole - float(spread.sum())) if len(S) < len(at) else 0.0
        open_ = unseen + float((spread / (1 + S.square())).sum())
    unit = box[1] - box[0]
    return Determined(1 - open_ / whole, -10 * math.log10(max(open_ / len(at) / unit**2, 1e-300)))
