"""The first two dense layers with an elementwise function between them that tokens pass after they saw one another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from unbatch.errors import NotApplicable, UnbatchError
from unbatch.network.dense import in_mode
from unbatch.network.precision import in_double, outputs_of

AGREES = 1e-9  # of numbers that are to be the same, relative, in float64


@dataclass(frozen=True, eq=False)
class DensePair:
    """What a token passes after it saw the others: h = gain (u - mean u) / s + offset, u = z + V o + c, then two layers.

    z is the token as the embedding made it, o what the dense layer `mixed` was given for it, s the spread of u. `lower`
    reads h, `upper` reads act(W h + b). Names are those of weight and bias.

    >>> from unbatch.models.vision_transformer import build_vision_transformer
    >>> net = build_vision_transformer((1, 8, 8), 3, depth=1, width=12, rng=torch.Generator().manual_seed(0))
    >>> found = dense_pair(net, "embed.weight", (1, 8, 8))
    >>> found.mixed[0], found.lower[0], found.upper[0]
    ('blocks.0.attention.out.weight', 'blocks.0.dense1.weight', 'blocks.0.dense2.weight')
    >>> found.act(torch.tensor([-1.0, 0.0, 1.0]))  # GELU
    tensor([-0.1587,  0.0000,  0.8413])
    """

    mixed: tuple[str, str | None]
    lower: tuple[str, str | None]
    upper: tuple[str, str | None]
    act: Callable[[Tensor], Tensor]
    gain: Tensor | None
    offset: Tensor | None


def dense_pair(model: nn.Module, embedding: str, input_shape: tuple[int, ...]) -> DensePair:
    """The pair above the layer whose weight is called `embedding`, found by running the model and listening.

    Raises NotApplicable: tokens under a layer norm, with what one dense layer gave added, and then under a second norm,
    do not enter two dense layers with an elementwise function between them.
    """
    double = in_double(model)
    device = next(double.parameters()).device
    x = torch.rand(2, *input_shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(device)
    heard = _Pairs(double, embedding)
    with torch.no_grad(), in_mode(double, "eval"), heard, suppress(_Enough):
        outputs_of(double, x)
    if heard.found is None:
        raise NotApplicable(
            "no two dense layers with an elementwise function between them read the tokens under a second layer norm, once "
            "a dense layer added to them what they saw of one another."
        )
    return heard.found


@dataclass(frozen=True, eq=False)
class _Linear:
    weight: str
    bias: str | None
    given: Tensor
    gave: Tensor


@dataclass(frozen=True, eq=False)
class _Norm:
    given: Tensor
    gave: Tensor
    gain: Tensor | None
    offset: Tensor | None


class _Enough(UnbatchError):  # noqa: N818 (no error)
    """What a run was for is heard; nobody sees it."""


class _Pairs(TorchFunctionMode):
    """Hears dense layers on tokens [n, T, d], layer norms, and functions of what a dense layer gave, up to the pair."""

    def __init__(self, model: nn.Module, embedding: str) -> None:
        super().__init__()
        self.names = {id(p): name for name, p in model.named_parameters(remove_duplicate=False)}
        self.embedding, self.open = embedding, False
        self.layers, self.norms = list[_Linear](), list[_Norm]()
        self.bent = list[tuple[Callable[[Tensor], Tensor], Tensor]]()  # of what the last layer gave
        self.found: DensePair | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (F.linear, F.conv2d):
            call = dict(zip(("input", "weight", "bias"), args, strict=False)) | dict(kwargs or {})
            name = self.names.get(id(call["weight"]))
            if self.open and func is F.linear and name is not None and call["input"].ndim == 3:
                self._dense(_Linear(name, self.names.get(id(call.get("bias"))), call["input"], out))
            self.open = self.open or name == self.embedding
        elif self.open and func is F.layer_norm:
            call = dict(zip(("input", "shape", "weight", "bias"), args, strict=False)) | dict(kwargs or {})
            self.norms.append(_Norm(call["input"], out, call.get("weight"), call.get("bias")))
        elif self.layers and args and args[0] is self.layers[-1].gave:
            self._function(func, args[1:], dict(kwargs or {}), out)
        return out

    def _function(self, func: Any, rest: Sequence[Any], named: Mapping[str, Any], out: Any) -> None:
        alone = not any(isinstance(each, Tensor) for each in rest)
        if alone and isinstance(out, Tensor) and out.shape == self.layers[-1].gave.shape:
            self.bent.append((partial(_of_first, func, rest, named), out))

    def _dense(self, layer: _Linear) -> None:
        if self.layers:
            act = next((act for act, out in self.bent if _same(out, layer.given)), None)
            if act is not None and _elementwise(act):
                self.found = self._pair(self.layers[-1], layer, act)
                if self.found is not None:
                    raise _Enough
        self.layers.append(layer)
        self.bent = []

    def _pair(self, lower: _Linear, upper: _Linear, act: Callable[[Tensor], Tensor]) -> DensePair | None:
        first = next((norm for norm in self.norms if _same(norm.gave, self.layers[0].given)), None)
        second = next((norm for norm in self.norms if _same(norm.gave, lower.given)), None)
        if first is None or second is None or second is first or first.given.shape != second.given.shape:
            return None
        came = second.given - first.given
        mixed = next((layer for layer in self.layers if _same(layer.gave, came)), None)
        if mixed is None:
            return None
        gain, offset = (None if each is None else each.detach() for each in (second.gain, second.offset))
        names = [(layer.weight, layer.bias) for layer in (mixed, lower, upper)]
        return DensePair(names[0], names[1], names[2], act, gain, offset)


def _of_first(func: Callable[..., Tensor], rest: Sequence[Any], named: Mapping[str, Any], first: Tensor) -> Tensor:
    return func(first.clone(), *rest, **named)  # it may write in place


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and float((one - other).abs().max()) <= AGREES * float(other.abs().max())


def _elementwise(act: Callable[[Tensor], Tensor]) -> bool:
    """Whether a function does to each number of a tensor the same, whatever stands around it."""
    probe = torch.linspace(-3.0, 3.0, 24, dtype=torch.float64)
    whole = act(probe)
    return whole.shape == probe.shape and torch.allclose(act(probe.flip(0).view(2, 3, 4)).flatten().flip(0), whole)
