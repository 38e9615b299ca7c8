"""The two dense layers that end a model and the activation between them, found by running it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from unbatch.errors import NotApplicable
from unbatch.inversion.view import View
from unbatch.network.dense import Call, Dense, LinearCalls, in_mode
from unbatch.network.precision import outputs_of
from unbatch.numerics.moments.hermite import coefficients
from unbatch.observation import Observation

ROWS_AT_A_TIME = 4096  # of a matrix that is brought to float64 at a time


@dataclass
class LayerPair:
    """The two dense layers that end a model, the elementwise activation between them, and what the attack reads of them.

    z = W x + b and outputs = V s(z) + c, for inputs x [d] of about the l2 norm `norm`. Where b is random it counts as one
    more weight, of an input that is 1.

    >>> import unbatch
    >>> from unbatch.models.small import build
    >>> rng = torch.Generator().manual_seed(0)
    >>> model, x, y = build("mlp", (4,), 3, width=8, rng=rng), torch.rand(1, 4, generator=rng), torch.tensor([2])
    >>> seen, truth = unbatch.observe(model, nn.functional.cross_entropy, x, y)
    >>> pair = last_two_layers(View.of(seen), norm=1.0)
    >>> pair.W.shape, pair.V.shape, pair.width
    (torch.Size([8, 4]), torch.Size([3, 8]), 5)
    >>> torch.allclose(pair.before(x.double()).float(), model.dense1(x))
    True
    """

    first: Dense
    head: Dense
    s: MiddleActivation
    W: Tensor  # [m, d] as stored
    b: Tensor | None  # [m]
    V: Tensor  # [k, m] float64
    c: Tensor  # [k]
    outputs: tuple[int, ...]  # shape of one example's output
    norm: float  # of a typical input

    def __post_init__(self) -> None:
        self.m, self.d = self.W.shape
        self.spread = float(self.W.std())
        spread = float(self.b.double().std()) if self.b is not None and self.m > 1 else 0.0
        self.spread_b = spread if spread > 1e-3 * self.spread else 0.0  # a constant bias shifts s and is no weight

    @property
    def width(self) -> int:
        """The number d' of weights of a neuron: d + 1 where a random bias counts as one more weight, else d."""
        return self.d + bool(self.spread_b)

    def whitened_weights(self) -> Tensor:
        """The first layer's weights, and its bias if that is random, scaled to unit variance: [m, d'], float64."""
        return self._joined(self.W, self.b, 1 / self.spread, 1 / (self.spread_b or 1.0))

    def projected_weights(self, P: Tensor) -> Tensor:
        """The whitened weights times P^T, [m, r] for P [r, d'], without a copy of them in float64."""
        U = _product(self.W, P[:, : self.d]) / self.spread
        return U + torch.outer(self.b.double() / self.spread_b, P[:, -1]) if self.b is not None and self.spread_b else U

    def stacked(self, obs: Observation, *, step: int = 1) -> Tensor:
        """The first layer's gradient in units in which the whitened weights count: [m, d'], float64.

        Its rows are sums of (spread x_i, spread_b), for every `step`-th neuron.
        """
        of_bias = obs.update[self.first.bias][::step] if self.first.bias and self.spread_b else None
        return self._joined(obs.update[self.first.weight][::step], of_bias, self.spread, self.spread_b)

    def _joined(self, W: Tensor, b: Tensor | None, by: float, by_b: float) -> Tensor:
        """[W by, b by_b] in float64, b where it counts; filled in place, as W may be most of the memory."""
        whole = torch.empty(len(W), self.width, dtype=torch.float64, device=W.device)
        whole[:, : self.d] = W
        whole[:, : self.d] *= by
        if b is not None and self.spread_b:
            whole[:, -1] = b.double() * by_b
        return whole

    def hermite(self) -> list[float]:
        """The activation's Hermite coefficients E s^(p) at a typical preactivation, p = 0 ... 4."""
        return [float(c) for c in coefficients(self.s, scale=self._scale(), mean=self._mean())]

    def shares(self) -> list[float]:
        """How much of the activation each Hermite order makes at a typical preactivation, p = 0 ... 4.

        |E s He_p| / sqrt(p!), relative to those of p = 1 ... 4 together.
        """
        parts = [abs(c) * self._scale() ** p / math.factorial(p) ** 0.5 for p, c in enumerate(self.hermite())]
        whole = math.hypot(*parts[1:]) or 1.0
        return [part / whole for part in parts]

    def before(self, x: Tensor) -> Tensor:
        """The preactivations z = W x + b [n, m] of inputs x [n, d], float64."""
        z = _product(self.W, x).T
        return z + self.b.double() if self.b is not None else z

    def _scale(self) -> float:
        return math.hypot(self.spread * self.norm, self.spread_b)

    def _mean(self) -> float:
        return float(self.b.double().mean()) if self.b is not None and not self.spread_b else 0.0


def _product(W: Tensor, P: Tensor) -> Tensor:
    """W P^T [m, r] in float64 for W [m, d] of any precision, a part of the rows at a time."""
    return torch.cat([rows.double() @ P.T for rows in torch.split(W, ROWS_AT_A_TIME)])


def last_two_layers(view: View, norm: float) -> LayerPair:
    """The two dense layers that end the model, for inputs of typical l2 norm `norm`.

    Raises NotApplicable: the network does not end in two, or more than an elementwise activation lies between them.

    >>> import unbatch
    >>> from unbatch.models.small import build
    >>> rng = torch.Generator().manual_seed(0)
    >>> model, x, y = build("mlp", (4,), 3, width=8, rng=rng), torch.rand(1, 4, generator=rng), torch.tensor([2])
    >>> seen, truth = unbatch.observe(model, nn.functional.cross_entropy, x, y)
    >>> pair = last_two_layers(View.of(seen), norm=1.0)
    >>> pair.first.name, pair.head.name
    ('dense1', 'head')
    """
    obs, layers = view.obs, view.layers
    if view.steps:
        raise NotApplicable(view.no_gradient)
    if len(layers) < 2 or not layers[-1].head:
        raise NotApplicable("the network does not end in two dense layers.")
    first, head = layers[-2], layers[-1]
    parameters = {name: p.detach() for name, p in obs.model.named_parameters(remove_duplicate=False)}
    W, V = parameters[first.weight], parameters[head.weight].double()
    s = MiddleActivation(obs.model, first, head, obs.knowledge.input_shape)
    if V.shape[1] != len(W) or not s.elementwise(obs.protocol.mode):
        raise NotApplicable(
            f"between {first.name!r} and {head.name!r} lies more than an elementwise activation (dropout, a norm?)."
        )
    if first.bias and first.weight in obs.update and first.bias not in obs.update:
        raise NotApplicable(f"the bias of {first.name!r} sent no gradient.")
    if not bool(W.std() > 0):
        raise NotApplicable(f"all weights of {first.name!r} are equal, so its neurons all say the same.")
    c = parameters[head.bias].double() if head.bias else torch.zeros(len(V)).to(V)
    b = parameters[first.bias] if first.bias else None
    return LayerPair(first, head, s, W, b, V, c, view.outputs, norm)


class MiddleActivation:
    """The activation between two dense layers, as a function that can be asked at any numbers.

    The model is run with the first layer's output replaced, and the head's input is read, so that any module or function
    between the two counts, whatever its name.

    >>> from unbatch.network.dense import anatomy
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> s = MiddleActivation(model, *anatomy(model, (2,)).layers, (2,))
    >>> s(torch.tensor([-1.0, 0.5, 2.0])).tolist(), s.elementwise("train")
    ([0.0, 0.5, 2.0], True)
    """

    def __init__(self, model: nn.Module, first: Dense, head: Dense, input_shape: tuple[int, ...]) -> None:
        self.model, self.shape = model, input_shape
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        self.state = {
            k: t.detach().double() if t.is_floating_point() else t for k, t in tensors.items() if k != first.weight
        }
        self.m = len(tensors[first.weight])
        self.state[first.weight] = torch.zeros(1).to(tensors[first.weight]).double().expand(tensors[first.weight].shape)
        self.watched = (first.weight, head.weight)

    def __call__(self, t: Tensor, mode: Literal["train", "eval"] = "eval") -> Tensor:
        """s(t), elementwise, in float64 and differentiable, for t of any shape."""
        where = self.state[self.watched[0]].device
        rows = -(-t.numel() // self.m)
        flat = torch.cat([t.flatten(), t.new_zeros(rows * self.m - t.numel())]).view(rows, self.m).to(where).double()
        first, head = (self.state[name] for name in self.watched)
        x = torch.zeros(rows, *self.shape, dtype=torch.float64, device=where)
        seen: list[Tensor] = []

        def hear(call: Call, compute: Callable[[], Tensor]) -> Tensor:
            if call["weight"] is head:
                seen.append(call["input"])
            return flat + 0 if call["weight"] is first else compute()  # an activation may write in place

        with in_mode(self.model, mode), torch.random.fork_rng(devices=[]), LinearCalls(hear):
            outputs_of(self.model, x, self.state, twice=True)
        return seen[-1].flatten()[: t.numel()].view(t.shape).to(t.device)

    def derivative(self, t: Tensor) -> Tensor:
        """The activation's slope s'(t) at t of any shape."""
        with torch.enable_grad():
            live = t.detach().clone().requires_grad_()
            (slope,) = torch.autograd.grad(self(live).sum(), live)
        return slope

    def elementwise(self, mode: Literal["train", "eval"]) -> bool:
        """Whether the activation acts on each number alone, and in the client's mode as in evaluation mode.

        False of dropout, of a norm, and of anything else that mixes units or examples.
        """
        rng = torch.Generator().manual_seed(0)
        t = torch.randn(3 * self.m, generator=rng, dtype=torch.float64)
        order = torch.randperm(len(t), generator=rng)
        try:
            with torch.no_grad():
                values, moved, again = self(t), self(t[order]), self(t, mode)
        except (RuntimeError, ValueError):
            return False
        return torch.allclose(values[order], moved, atol=1e-12) and torch.allclose(values, again, atol=1e-12)
