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
from torch.utils.flop_counter import FlopCounterMode

from unbatch.errors import UnbatchError
from unbatch.loss import Loss
from unbatch.network.chain import Chained
from unbatch.numerics.bounds.prior import GaussianPrior
from unbatch.observation import Observation

ROUNDINGS = 4  # of a tensor's root mean square: the error of its entries
ROWS = 2  # of the Jacobian, for each unknown and tensor, into which longer gradients are summed with random signs
ENTRIES = 2**23  # of the Jacobian: where it has more, all tensors share its rows, `ROWS` for each unknown at least
SCATTERED = 60.0  # operations in the time that a scattered sum takes for an entry
COLUMNS = 64  # of the Jacobian that are computed at once


@dataclass(frozen=True)
class Determined:
    """What remains open of an example whose prior is Gaussian, when the gradient around it is known to rounding."""

    share: float  # 1 - tr(posterior covariance) / tr(prior covariance)
    psnr: float  # -10 log10(tr(posterior covariance) / d), in units of the input's range


def share(obs: Observation, x: Tensor, y: Tensor, model: nn.Module | None = None) -> Determined:
    """`determined` as the exchange has it: range, mode, precision, noise and what is sent; of its model, or another one.

    The parameters of a `Chained` model go by the names of its links. Raises ValueError: as `determined`.
    """
    model = obs.model if model is None else model
    own = model.named() if isinstance(model, Chained) else {name: name for name, _ in model.named_parameters()}
    return determined(
        model,
        obs.loss,
        x,
        y,
        box=obs.knowledge.get("input_range", (0.0, 1.0)),
        mode=obs.protocol.mode,
        eps=float(torch.finfo(obs.dtype).eps),
        noise=float(obs.knowledge.get("noise", 0.0)),
        sent={name for name, sent in own.items() if sent in obs.update},
    )


def work(model: nn.Module, loss: Loss, x: Tensor, y: Tensor) -> float:
    """Floating-point operations that `determined` takes, about: two gradients an unknown, summed, and the factors."""
    model = copy.deepcopy(model).double().eval().requires_grad_()
    with FlopCounterMode(display=False) as counter, torch.enable_grad():
        loss(model(x.double()), y.double() if y.is_floating_point() else y).backward()  # type: ignore[no-untyped-call]
    entries, d = sum(p.numel() for p in model.parameters()), x.numel()
    rows = min(entries, max(ROWS * d, ENTRIES // d))
    return 2.0 * d * float(counter.get_total_flops()) + SCATTERED * d * entries + 2.0 * d**2 * (rows + d)


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
    tensor of more than two entries an unknown is summed into so many by random signs (a count sketch), and all tensors
    together where that is still too much: it leaves J^T S^-1 J as it is on average.

    With C = R R^T and [S^-1/2 J R; 1] = Q T, T triangular: tr (C^-1 + J^T S^-1 J)^-1 = |R T^-1|^2.
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
    sketch: dict[str, tuple[Tensor, Tensor]] = {}  # weight and row of every entry
    rows = 0

    def value(weights: dict[str, Tensor], at: Tensor) -> Tensor:
        buffers = {k: v.clone() for k, v in state.items() if k not in weights}  # batch norm in train mode writes them
        return loss(functional_call(model, {**weights, **buffers}, (at.view(1, *shape),)), y)

    def update(at: Tensor) -> Tensor:
        found = grad(value)({name: state[name] for name in own}, at)
        weighed = torch.cat([found[name].flatten() * weight for name, (weight, _) in sketch.items()])
        return at.new_zeros(rows).index_add(0, places, weighed)

    at = x.double().flatten()
    d = len(at)
    gradient = grad(value)({name: state[name] for name in own}, at)
    most = ROWS * d
    for name, tensor in gradient.items():
        size, e = float(tensor.square().mean().sqrt()), tensor.numel()
        if not math.isfinite(size):
            raise UnbatchError(f"the gradient of {name!r} is not finite at the example.")
        if size > 0:
            signs = 2.0 * torch.randint(2, (e,), generator=rng) - 1 if e > most else torch.ones(e)
            to = torch.randint(most, (e,), generator=rng) if e > most else torch.arange(e)
            error = ((ROUNDINGS * eps * size) ** 2 + noise**2) ** 0.5
            sketch[name] = signs.to(at) / error, rows + to.to(at.device)
            rows += min(e, most)
    prior = GaussianPrior(shape, box)
    whole = open_ = float(prior.variances.sum())
    if sketch:
        places = torch.cat([to for _, to in sketch.values()])
        if rows > (few := max(most, ENTRIES // d)):
            again = torch.randint(few, (rows,), generator=rng).to(at.device)
            signs = (2.0 * torch.randint(2, (rows,), generator=rng) - 1).to(at)
            sketch = {name: (weight * signs[to], to) for name, (weight, to) in sketch.items()}
            places, rows = again[places], few
        system = at.new_zeros(rows + d, d)
        system[rows:] = eye = torch.eye(d).to(at)
        for k, part in enumerate(torch.split(prior.push(eye), COLUMNS)):
            moved = vmap(lambda v: jvp(update, (at,), (v,))[1])(part).detach()
            system[:rows, k * COLUMNS : k * COLUMNS + len(part)] = moved.T
        T = torch.linalg.qr(system, mode="r").R
        inverse = torch.linalg.solve_triangular(T, eye, upper=True)
        open_ = float((prior.variances.to(at) * inverse.square().sum(1)).sum())
    unit = box[1] - box[0]
    return Determined(1 - open_ / whole, -10 * math.log10(max(open_ / d / unit**2, 1e-300)))
