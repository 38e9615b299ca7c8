"""tensor-moment-deep: a server that plants parameters which carry the inputs of a deep network to its last hidden layer."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor, nn

from unbatch.attack import NOTHING, ActiveAttack, Cost, Demo, Guarantee
from unbatch.errors import NotApplicable
from unbatch.inversion.last_two_layers import MiddleActivation
from unbatch.inversion.tensor_moments import TensorMoments
from unbatch.inversion.view import View
from unbatch.knowledge import PROTOCOL_FIELDS, Knowledge
from unbatch.network.dense import Dense, anatomy
from unbatch.observation import Observation
from unbatch.reconstruction import Reconstruction

# of an entry of typical size in the first layer, where activations bend: nearly straight, far from rounding
FIRST_LAYER_PREACTIVATION = 0.25
# of preactivations in the last hidden layer: high orders, which are noise, fall off fastest where it is low
LAST_LAYER_SPREAD = 0.1


@final
class TensorMomentDeep(ActiveAttack):
    """Recovers the inputs of a deep dense network whose parameters the server chose for that.

    The server plants parameters that carry every input to the last hidden layer; the moments of the last two layers'
    gradients then give the inputs away.

    For relu and leaky relu (s(c t) = c s(t), c > 0): W_1 = [I, -I, 0]^T, identity middle layers, and every row of the last
    hidden layer [z, -z, 0], z ~ N(0, I) over the typical norm of an input. With L layers below, z . (s^L(x) - s^L(-x)) is
    proportional to z . x. Other activations are inverted: the middle layers pass on c (s(t) - s(-t)), which is t for gelu,
    silu and softplus and bends for tanh and sigmoid; the bent map is undone entry by entry. All hidden layers below the
    last need 2 d units. The last two layers are a two-layer network with Gaussian weights, attacked by `tensor-moment`.

    With `bias_trick` = M the head's bias is 2 M: under squared error all residuals then lie in [M, 3 M] for targets and
    outputs within M / 2, so that no example is without one.

    Bound: that of `tensor-moment`, stretched by the steepest entry of the inverse.

    >>> import torch, unbatch
    >>> from unbatch.models.small import build
    >>> rng, attack = torch.Generator().manual_seed(0), unbatch.attacks.TensorMomentDeep()
    >>> model = attack.plant(build("mlp", (3,), 3, depth=2, width=500, activation="tanh", rng=rng), rng)
    >>> x, y = torch.rand(2, 3, generator=rng), torch.tensor([0, 2])
    >>> seen, truth = unbatch.observe(model, torch.nn.functional.cross_entropy, x, y)
    >>> found = attack(seen)
    >>> torch.allclose(found.inputs[found.labels.argsort()], x.double(), atol=0.02)
    True
    """

    family: ClassVar[str] = "tensor"
    guarantee: ClassVar[Guarantee] = Guarantee.BOUNDED
    cost: ClassVar[Cost] = Cost.SOLVES
    paper: ClassVar[str] = "Wang, Lee, Lei, Reconstructing Training Data from Model Gradient, Provably, AISTATS 2023"
    needs: ClassVar[frozenset[str]] = frozenset({"input_shape"})
    uses: ClassVar[frozenset[str]] = frozenset({"batch_size"}) | PROTOCOL_FIELDS
    demo: ClassVar[Demo] = Demo(
        case="tables:batch=3,depth=3,width=1500,activation=tanh", floors={"l2-error": 0.2, "label-accuracy": 1.0}
    )

    bias_trick: Annotated[
        float, Field(ge=0, description="M; the head's bias is 2 M, so that under squared error no residual is near 0")
    ] = 0.0
    norm: Annotated[
        float | None,
        Field(gt=0, description="l2 norm of the inputs, or a typical one where a bias tells; none: sqrt(d)/2"),
    ] = None

    def plant(self, model: nn.Module, rng: torch.Generator, known: Knowledge = NOTHING) -> nn.Module:
        """A copy of `model` with the parameters that carry an input through to the last hidden layer.

        Raises NotApplicable: the model is no chain of dense layers, or one of them is too narrow.
        """
        made = copy.deepcopy(model)
        shape = _shape(made)
        chain = _chain(made, shape, anatomy(made, shape).layers)
        parameters = dict(made.named_parameters(remove_duplicate=False))
        if self.bias_trick and chain.layers[-1].bias is None:
            raise NotApplicable("bias_trick raises the head's bias, and this head has none.")
        typical = self._typical(chain.d)
        with torch.no_grad():
            for layer in chain.layers:
                parameters[layer.weight].zero_()
                if layer.bias:
                    parameters[layer.bias].zero_()
            straight = all(_homogeneous(s) for s in chain.between[:-1])
            first = parameters[chain.layers[0].weight]
            _pairs(
                first, chain.d, 1.0 if straight else FIRST_LAYER_PREACTIVATION * chain.d**0.5 / typical, through=False
            )
            for layer, s in zip(chain.layers[1:-2], chain.between, strict=False):
                if straight:
                    parameters[layer.weight].fill_diagonal_(1.0)
                    parameters[layer.weight][2 * chain.d :] = 0.0
                else:
                    _pairs(parameters[layer.weight], chain.d, 1 / _odd_slope(s), through=True)
            last, head = parameters[chain.layers[-2].weight], parameters[chain.layers[-1].weight]
            m = len(last)
            Z = LAST_LAYER_SPREAD * _normal((m, chain.d), rng) / (_Map(made, chain).slope * typical)
            last[:, : chain.d], last[:, chain.d : 2 * chain.d] = Z.to(last), -Z.to(last)
            head.copy_(torch.full((1, m), 1 / m) if len(head) == 1 else _normal(tuple(head.shape), rng) / m**0.5)
            if chain.layers[-1].bias:
                parameters[chain.layers[-1].bias].fill_(2 * self.bias_trick)
        return made

    def run(self, view: View, rng: torch.Generator) -> Reconstruction:
        obs = view.obs
        chain = _chain(obs.model, obs.knowledge.input_shape, view.layers)
        last = chain.layers[-2]
        W = dict(obs.model.named_parameters(remove_duplicate=False))[last.weight].detach()
        if not torch.equal(W[:, : chain.d], -W[:, chain.d : 2 * chain.d]) or not bool(W.any()):
            raise NotApplicable(
                f"the rows of {last.name!r} are not [z, -z, 0]: these parameters were not planted by this attack."
            )
        missing = [layer.name for layer in chain.layers[-2:] if layer.weight not in obs.update]
        if missing:
            raise NotApplicable(
                f"{', '.join(map(repr, missing))} sent no gradient; this attack reads the last two layers' both."
            )
        through, typical = _Map(obs.model, chain), self._typical(chain.d)
        if not through.straight and last.bias is None and self.norm is None:
            raise NotApplicable("no bias fixes the scale at which these activations are to be inverted; give norm.")
        found = TensorMoments().run(View.of(self._two_layers(obs, chain)), rng)
        if found.inputs is None or found.bound is None:
            return found
        seen = found.inputs.double() * typical * through.slope  # [n, d] what the last hidden layer's pairs differ by
        known = {"scale", "sign"} - found.up_to
        x = through.invert(seen)
        if "scale" not in known and self.norm is not None:
            for _ in range(20):  # a scale at which the inverse has that norm
                seen = seen * (self.norm / x.norm(dim=1, keepdim=True))
                x = through.invert(seen)
        steep = through.steepness(x)  # [n] largest |dx / d seen| of an entry
        bound = found.bound * (steep * seen.norm(dim=1) / x.norm(dim=1)).cpu()
        first = chain.layers[0]
        up_to = found.up_to - ({"scale"} if self.norm is not None else set())
        trace = {**found.trace, "layer": chain.layers[-2].name, "planted": "straight" if through.straight else "bent"}
        inputs, bound, name = view.undo(first, x, bound)
        return replace(found, inputs=inputs, layer=name, bound=bound, up_to=up_to, trace=trace)

    def _typical(self, d: int) -> float:
        return self.norm or d**0.5 / 2

    def _two_layers(self, obs: Observation, chain: _Chain) -> Observation:
        """The exchange of the two-layer network that the last two layers are, of inputs of about unit norm.

        z . v with z normal and v = (s^L(x) - s^L(-x)) / (slope typical norm): dL/dz is the difference of the
        gradients of the pairs, over the same factor.
        """
        last, head = chain.layers[-2:]
        factor = _Map(obs.model, chain).slope * self._typical(chain.d)
        parameters = dict(obs.model.named_parameters(remove_duplicate=False))
        W, G = parameters[last.weight].detach(), obs.update[last.weight]
        model = _TwoLayers(chain.between[-1], W[:, : chain.d] * factor, parameters, last, head)
        update = {
            "first.weight": (G[:, : chain.d] - G[:, chain.d : 2 * chain.d]) / factor,
            "head.weight": obs.update[head.weight],
        }
        if last.bias and last.bias in obs.update:
            update["first.bias"] = obs.update[last.bias]
        kept = {name: obs.knowledge.get(name) for name in obs.knowledge if name != "input_shape"}
        knowledge = Knowledge(input_shape=(chain.d,), **kept)
        return Observation(model=model, loss=obs.loss, update=update, knowledge=knowledge)


class _TwoLayers(nn.Module):
    """head(s(first(v))), with the planted parameters."""

    def __init__(
        self, s: MiddleActivation, Z: Tensor, parameters: dict[str, nn.Parameter], last: Dense, head: Dense
    ) -> None:
        super().__init__()
        self.s: Callable[[Tensor], Tensor] = s
        k, m = parameters[head.weight].shape
        with torch.device("meta"):
            self.first = nn.Linear(Z.shape[1], m, bias=last.bias is not None)
            self.head = nn.Linear(m, k, bias=head.bias is not None)
        self.first.weight = nn.Parameter(Z)
        self.head.weight = nn.Parameter(parameters[head.weight].detach())
        if last.bias:
            self.first.bias = nn.Parameter(parameters[last.bias].detach())
        if head.bias:
            self.head.bias = nn.Parameter(parameters[head.bias].detach())

    def forward(self, v: Tensor) -> Tensor:
        """[n, d] -> [n, k]."""
        out: Tensor = self.head(self.s(self.first(v)).to(v))
        return out


@dataclass(frozen=True)
class _Chain:
    """A network of dense layers, one after the other, with an elementwise activation between each two."""

    layers: Sequence[Dense]
    between: Sequence[MiddleActivation]
    d: int


def _chain(model: nn.Module, shape: tuple[int, ...], layers: Sequence[Dense]) -> _Chain:
    """The model as a chain of dense layers. Raises NotApplicable: the construction does not fit it; the words say why."""
    parameters = dict(model.named_parameters())
    used = {name for layer in layers for name in (layer.weight, layer.bias) if name}
    if len(layers) < 3 or not layers[-1].head:
        raise NotApplicable(
            f"the construction is for three dense layers or more; this network runs {len(layers)}: see tensor-moment."
        )
    if set(parameters) - used:
        odd = sorted(set(parameters) - used)[0]
        raise NotApplicable(f"the network has more than dense layers: {odd!r} is no part of one.")
    sizes = [tuple(parameters[layer.weight].shape) for layer in layers]
    d = sizes[0][1]
    if any(before[0] != after[1] for before, after in pairwise(sizes)):
        raise NotApplicable(f"the dense layers are no chain: their shapes are {', '.join(map(str, sizes))}.")
    narrow = [layer.name for layer, (m, _) in zip(layers[:-2], sizes, strict=False) if m < 2 * d]
    if narrow:
        raise NotApplicable(
            f"{', '.join(map(repr, narrow))} has fewer than {2 * d} units, twice the {d} inputs to be carried through."
        )
    between = [MiddleActivation(model, a, b, shape) for a, b in pairwise(layers)]
    for (a, b), s in zip(pairwise(layers), between, strict=True):
        if not s.elementwise("train" if model.training else "eval"):
            raise NotApplicable(
                f"between {a.name!r} and {b.name!r} lies more than an elementwise activation (dropout, a norm?)."
            )
    return _Chain(layers, between, d)


class _Map:
    """What the pairs of units carry: t -> u_L(t) - u_L(-t) for an entry t of the first layer's input, odd and rising."""

    def __init__(self, model: nn.Module, chain: _Chain) -> None:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self.steps = []
        for layer, s in zip(chain.layers[:-2], chain.between, strict=False):
            W = parameters[layer.weight].detach()
            self.steps.append((float(W[0, 0]), float(W[0, chain.d]) if W.shape[1] > chain.d else 0.0, s))
        probes = torch.tensor([1e-3, 0.3, 1.0, 4.0], dtype=torch.float64)
        rise = self(probes) / probes
        self.slope = float(rise[0])
        self.straight = bool((rise / self.slope - 1).abs().max() < 1e-9)

    def __call__(self, t: Tensor) -> Tensor:
        """Elementwise, float64."""
        gain, _, s = self.steps[0]
        up, down = s(gain * t), s(-gain * t)
        for own, other, s in self.steps[1:]:
            up, down = s(own * up + other * down), s(own * down + other * up)
        return up - down

    def invert(self, seen: Tensor) -> Tensor:
        """t with self(t) = seen, by bisection; beyond its reach the end of the bracket."""
        if self.straight:
            return seen / self.slope
        low, high = (sign * 8 / abs(self.steps[0][0]) * torch.ones_like(seen) for sign in (-1, 1))
        for _ in range(64):
            middle = (low + high) / 2
            over = self(middle) > seen
            low, high = torch.where(over, low, middle), torch.where(over, middle, high)
        return (low + high) / 2

    def steepness(self, t: Tensor) -> Tensor:
        """Largest entry [n] of 1 / (the map's slope) at t [n, d]."""
        if self.straight:
            return torch.full((len(t),), 1 / self.slope).to(t)
        step = 1e-4 * t.abs().clamp_min(1e-2)
        rise = (self(t + step) - self(t - step)) / (2 * step)
        return (1 / rise.clamp_min(1e-12)).amax(1)


def _pairs(W: Tensor, d: int, gain: float, *, through: bool) -> None:
    """gain [I, -I]^T, or with `through` gain [[I, -I], [-I, I]], in the corner of W [m, .], which is 0."""
    eye = gain * torch.eye(d, dtype=W.dtype, device=W.device)
    W[:d, :d], W[d : 2 * d, :d] = eye, -eye
    if through:
        W[:d, d : 2 * d], W[d : 2 * d, d : 2 * d] = -eye, eye


def _homogeneous(s: MiddleActivation) -> bool:
    """s(c t) = c s(t) for c > 0, and rising: relu and leaky relu."""
    t = torch.tensor([-2.0, -0.5, 0.5, 2.0], dtype=torch.float64)
    return torch.allclose(s(3 * t), 3 * s(t), atol=1e-9) and bool(s(t[2:] * 1.0).min() > 0)


def _odd_slope(s: MiddleActivation) -> float:
    """Slope of s(t) - s(-t) at 0. Raises NotApplicable: it does not rise, so an even activation loses the sign."""
    t = torch.tensor([1e-4, 1.0], dtype=torch.float64)
    odd = s(t) - s(-t)
    if not bool((odd > 1e-8).all()):
        raise NotApplicable("s(t) - s(-t) does not rise for this activation: nothing carries the inputs through.")
    return float(odd[0] / t[0])


def _normal(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=rng, dtype=torch.float64)


def _shape(model: nn.Module) -> tuple[int, ...]:
    """A shape of inputs that the model takes, of as many entries as its first matrix has columns."""
    first = next((p for p in model.parameters() if p.ndim >= 2), None)
    if first is None or first.ndim != 2:
        raise NotApplicable("the construction is for dense layers only; the first layer here is none.")
    d = first.shape[1]
    shapes: list[tuple[int, ...]] = [(d,)]
    shapes += [(c, side, side) for c in (1, 3) for side in (math.isqrt(d // c),) if c * side**2 == d]
    for shape in shapes:
        try:
            anatomy(model, shape)
        except ValueError:
            continue
        return shape
    raise NotApplicable(f"the model takes inputs of none of the shapes {', '.join(map(str, shapes))}.")
