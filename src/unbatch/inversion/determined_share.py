"""Determined share: how much of one example a gradient determines, to first order around it, for any model."""

from __future__ import annotations

import math
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import grad, jvp, vmap
from torch.utils.flop_counter import FlopCounterMode

from unbatch.errors import UnbatchError
from unbatch.loss import Loss
from unbatch.network.chain import Chained
from unbatch.network.dense import Call, LinearCalls
from unbatch.network.dropout import WithoutDropout
from unbatch.network.precision import in_double, loss_value, outputs_of
from unbatch.numerics.bounds.prior import GaussianPrior
from unbatch.observation import Observation
from unbatch.progress import afford_or_leave, tick_or_leave

ENTRY_ROUNDINGS = 4  # of a tensor's root mean square: the error of its entries
ROWS_AN_UNKNOWN = (
    2  # of the Jacobian, for each unknown and tensor, into which longer gradients are summed with random signs
)
JACOBIAN_ENTRIES = (
    2**23
)  # of the Jacobian: where it has more, all tensors share its rows, `ROWS_AN_UNKNOWN` for each unknown at least
SCATTER_OPERATIONS = 60.0  # operations in the time that a scattered sum takes for an entry
COLUMNS_AT_ONCE = 64  # of the Jacobian that are computed at once
ENTRIES_AT_ONCE = 2**26  # of their gradients, beyond which there are fewer columns: 512 MiB
SHARE_NAME = "determined share"  # by what name views keep it (`View.once`)
OUTER_PRODUCT_ERROR = 1e-9  # relative, up to which a gradient is the outer product that it must be


@dataclass(frozen=True)
class Determined:
    """What remains open of an example whose prior is Gaussian, when the gradient around it is known to rounding."""

    share: float  # 1 - tr(posterior covariance) / tr(prior covariance)
    psnr: float  # -10 log10(tr(posterior covariance) / d), in units of the input's range


def share(obs: Observation, x: Tensor, y: Tensor, model: nn.Module | None = None) -> Determined:
    """`determined` as the exchange has it: range, mode, precision, noise and what is sent; of its model, or another one.

    The parameters of a `Chained` model go by the names of its links. Raises as `determined`.
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
    """Floating-point operations that `determined` takes, about: two gradients an unknown, summed, and the factors.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    >>> work(model, nn.functional.cross_entropy, torch.zeros(1, 1, 4, 4), torch.tensor([1])) > 1e4
    True
    """
    model = in_double(model).eval().requires_grad_()
    dense: dict[int, int] = {}  # numbers that hold a dense layer's gradient, by its weight

    def hear(call: Call, compute: Callable[[], Tensor]) -> Tensor:
        dense[id(call["weight"])] = sum(call["weight"].shape) + 1
        return compute()

    with FlopCounterMode(display=False) as counter, torch.enable_grad(), LinearCalls(hear):
        value = loss_value(loss, outputs_of(model, x.double()), y.double() if y.is_floating_point() else y)
        value.backward()  # type: ignore[no-untyped-call]
    entries, d = sum(min(p.numel(), dense.get(id(p), p.numel())) for p in model.parameters()), x.numel()
    rows = min(entries, max(ROWS_AN_UNKNOWN * d, JACOBIAN_ENTRIES // d))
    return 2.0 * d * float(counter.get_total_flops()) + SCATTER_OPERATIONS * d * entries + 2.0 * d**2 * (rows + d)


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
    """How much of one example its gradient determines, to first order around it: 1 all of it, 0 nothing beyond a prior.

    1 - tr (C^-1 + J^T S^-1 J)^-1 / tr C at the example x [1, *shape], y [1].

    J [e, d] is the Jacobian with respect to x of dL/dW, of all parameters or those `sent`; S the variance of rounding and
    of `noise` that was added: the square of four times `eps` times a tensor's root mean square, plus noise^2. C is the
    covariance of `GaussianPrior` for inputs in the range `box`. To first order: whether a search finds the place is not
    asked. Dropout drops nothing.

    A dense layer's dL/dW = delta a^T changes by delta' a^T + delta a'^T, which p + q + 1 numbers hold without loss (its
    weight has p q). Another tensor of more than two entries an unknown is summed into so many by random signs of `rng` (a
    count sketch), and all tensors together where that is still too much: it leaves J^T S^-1 J as it is on average.

    With C = R R^T and [S^-1/2 J R; 1] = Q T, T triangular: tr (C^-1 + J^T S^-1 J)^-1 = |R T^-1|^2.
    Source: the Bayesian Cramer-Rao bound of van Trees (1968) with a Gaussian prior;
    Clarkson and Woodruff, J. ACM 63, 2017 (sketch). Raises UnbatchError: the gradient is not finite there; NotApplicable:
    it was cut short.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).requires_grad_()
    >>> at = torch.full((1, 1, 2, 2), 0.5), torch.tensor([1])
    >>> round(determined(model, nn.functional.cross_entropy, *at).share, 3)
    1.0
    """
    seen = _Gradient(model, loss, x, y, mode, sent)
    rng = rng or torch.Generator().manual_seed(0)
    rows = seen.weigh(eps, noise, rng)
    prior, d = GaussianPrior(tuple(x.shape[1:]), box), x.numel()
    whole = open_ = float(prior.variances.sum())
    if rows:
        afford_or_leave(2.0 * d**2 * (rows + d), f"a matrix of {rows + d:,} x {d:,} was factored")
        system = seen.at.new_zeros(rows + d, d)
        system[rows:] = eye = torch.eye(d).to(seen.at)
        columns = max(1, min(COLUMNS_AT_ONCE, ENTRIES_AT_ONCE // sum(map(len, seen.weights.values()))))
        for k, part in enumerate(torch.split(prior.push(eye), columns)):
            tick_or_leave(k * columns / d, f"{d - k * columns:,} of the {d:,} unknowns were looked at")
            system[:rows, k * columns : k * columns + len(part)] = seen.moved(part).T
        afford_or_leave(2.0 * d**2 * (rows + d), f"a matrix of {rows + d:,} x {d:,} was factored")
        T = torch.linalg.qr(system, mode="r").R
        inverse = torch.linalg.solve_triangular(T, eye, upper=True)
        open_ = float((prior.variances.to(seen.at) * inverse.square().sum(1)).sum())
    unit = box[1] - box[0]
    return Determined(1 - open_ / whole, -10 * math.log10(max(open_ / d / unit**2, 1e-300)))


@dataclass(frozen=True)
class _Outer:
    """A dense layer that takes one vector a [q]: its weight's gradient is delta a^T, delta [p]."""

    delta: Tensor  # at the example
    a: Tensor

    @property
    def rows(self) -> int:
        return len(self.delta) + len(self.a) + 1

    def compressed(self, delta: Tensor, a: Tensor) -> Tensor:
        """As many numbers [p + q + 1] as hold delta' a^T + delta a'^T, of the same norm, of the changes delta' and a'."""
        long, wide = self.delta.norm(), self.a.norm()
        u, v = self.delta / long, self.a / wide
        across, along = u @ delta, v @ a
        both = wide * across + long * along
        return torch.cat([wide * (delta - across * u), long * (a - along * v), both[None]])


class _Gradient:
    """dL/dW of one example as a function of its inputs, in the rows that `weigh` chooses."""

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        x: Tensor,
        y: Tensor,
        mode: Literal["train", "eval"],
        sent: Container[str] | None,
    ) -> None:
        self.model, self.loss, self.shape = in_double(model).train(mode == "train"), loss, x.shape
        state = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        self.state = {name: tensor.detach().clone() for name, tensor in state.items()}
        self.own = [name for name, _ in self.model.named_parameters() if sent is None or name in sent]
        self.y = y.double() if y.is_floating_point() else y
        self.at = x.double().flatten()
        self.taps: dict[str, Tensor] = {}  # zeros that are added to the outputs of dense layers, by the weight's name
        self.gradient = grad(self._value)({name: self.state[name] for name in self.own}, {}, self.at)
        self.outer = self._outer()
        self.weights: dict[str, Tensor] = {}  # of every row of a tensor, before they are summed
        self.places: Tensor | None = None  # of the rows to be summed; none: each stays by itself
        self.rows = 0

    def _value(self, weights: dict[str, Tensor], taps: dict[str, Tensor], at: Tensor) -> Tensor:
        return self._heard(weights, taps, at)[0]

    def _heard(
        self, weights: dict[str, Tensor], taps: dict[str, Tensor], at: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and what the dense layers that are tapped receive [1, q]."""
        buffers = {k: v.clone() for k, v in self.state.items() if k not in weights and k not in taps}
        whole = {**weights, **buffers, **{name: self.state[name] for name in taps}}
        names = {id(whole[name]): name for name in taps}
        inputs: dict[str, Tensor] = {}

        def hear(call: Call, compute: Callable[[], Tensor]) -> Tensor:
            name = names.get(id(call["weight"]))
            if name is None:
                return compute()
            inputs[name] = call["input"]
            return compute() + taps[name]

        with WithoutDropout(), LinearCalls(hear):
            return loss_value(self.loss, outputs_of(self.model, at.view(self.shape), whole), self.y), inputs

    def _outer(self) -> dict[str, _Outer]:
        """The dense layers whose weight is met once, with one vector, so that its gradient is an outer product."""
        taken: dict[str, int] = {}
        names = {id(self.state[name]): name for name in self.own}

        def hear(call: Call, compute: Callable[[], Tensor]) -> Tensor:
            out, name = compute(), names.get(id(call["weight"]))
            if name is not None:
                alone = out.ndim == 2 and len(out) == 1 and name not in taken
                taken[name] = out.shape[1] if alone else 0
            return out

        copied = {k: self.state[k] if k in self.own else v.clone() for k, v in self.state.items()}
        with WithoutDropout(), LinearCalls(hear):
            outputs_of(self.model, self.at.view(self.shape), copied)
        taps = {name: self.at.new_zeros(1, p) for name, p in taken.items() if p}
        deltas, inputs = grad(self._heard, argnums=1, has_aux=True)({}, taps, self.at) if taps else ({}, {})
        found = {}
        for name, delta in deltas.items():
            each, G = _Outer(delta[0], inputs[name][0].detach()), self.gradient[name]
            far = (torch.outer(each.delta, each.a) - G).norm()
            if each.rows < G.numel() and float(far) <= OUTER_PRODUCT_ERROR * float(G.norm()):
                found[name] = each
        self.taps = {name: taps[name] for name in found}
        return found

    def weigh(self, eps: float, noise: float, rng: torch.Generator) -> int:
        """Choose the rows, each divided by its error; how many. Raises UnbatchError: a gradient is not finite."""
        d, places = len(self.at), list[Tensor]()
        most = ROWS_AN_UNKNOWN * d
        for name, tensor in self.gradient.items():
            size = float(tensor.square().mean().sqrt())
            e = self.outer[name].rows if name in self.outer else tensor.numel()
            if not math.isfinite(size):
                raise UnbatchError(f"the gradient of {name!r} is not finite at the example.")
            if size > 0:
                signs = 2.0 * torch.randint(2, (e,), generator=rng) - 1 if e > most else torch.ones(e)
                to = torch.randint(most, (e,), generator=rng) if e > most else torch.arange(e)
                error = ((ENTRY_ROUNDINGS * eps * size) ** 2 + noise**2) ** 0.5
                self.weights[name] = signs.to(self.at) / error
                places.append(self.rows + to.to(self.at.device))
                self.rows += min(e, most)
        if self.rows > (few := max(most, JACOBIAN_ENTRIES // d)):
            again = torch.randint(few, (self.rows,), generator=rng).to(self.at.device)
            signs = (2.0 * torch.randint(2, (self.rows,), generator=rng) - 1).to(self.at)
            self.weights = {
                name: weight * signs[to] for (name, weight), to in zip(self.weights.items(), places, strict=True)
            }
            places, self.rows = [again[to] for to in places], few
        if self.rows < sum(map(len, places)):
            self.places = torch.cat(places)
        return self.rows

    def _update(self, at: Tensor) -> Tensor:
        """The rows [rows] at an input [d]."""
        plain = {name: self.state[name] for name in self.weights if name not in self.outer}
        (found, deltas), inputs = grad(self._heard, argnums=(0, 1), has_aux=True)(plain, self.taps, at)
        parts = list[Tensor]()
        for name, weight in self.weights.items():
            if name in self.outer:
                parts.append(self.outer[name].compressed(deltas[name][0], inputs[name][0]) * weight)
            else:
                parts.append(found[name].flatten() * weight)
        weighed = torch.cat(parts)
        return weighed if self.places is None else at.new_zeros(self.rows).index_add(0, self.places, weighed)

    def moved(self, directions: Tensor) -> Tensor:
        """How the rows change along each of `directions` [k, d]: [k, rows]."""
        found: Tensor = vmap(lambda v: jvp(self._update, (self.at,), (v,))[1])(directions)
        return found.detach()
