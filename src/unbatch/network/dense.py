"""Network: which dense layers a model runs, and what feeds them, found by running it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


@contextmanager
def in_mode(model: nn.Module, mode: Literal["train", "eval"]) -> Iterator[nn.Module]:
    """The model in that mode inside the block; every module's own flag is put back after it."""
    train = mode == "train"
    others = [module for module in model.modules() if module.training != train]
    try:
        for module in others:
            module.training = train
        yield model
    finally:
        for module in others:
            module.training = not train


def forward(model: nn.Module, inputs: Tensor, mode: Literal["train", "eval"] = "eval") -> Tensor:
    """The model's outputs in that mode, on its parameters' device and in their precision, without a graph.

    Raises ValueError: the forward fails, or does not return one tensor.
    """
    first = next(model.parameters(), inputs)
    x = inputs.to(first.device, first.dtype) if inputs.is_floating_point() else inputs.to(first.device)
    try:
        with torch.no_grad(), in_mode(model, mode):
            outputs = model(x)
    except Exception as error:  # the model is the user's: anything may go wrong in it
        raise ValueError(f"the model's forward fails on inputs of shape {tuple(x.shape[1:])}: {error}") from error
    if not isinstance(outputs, Tensor):
        raise ValueError(f"the model returns {type(outputs).__name__}; wrap it so that it returns one tensor.")
    return outputs


@dataclass(frozen=True)
class Affine:
    """Entry j of a layer's input is scale_j * x_j + shift_j, x the flattened network input (a normalisation)."""

    scale: Tensor  # [d]
    shift: Tensor  # [d]

    def invert(self, layer_input: Tensor) -> Tensor:
        """The flattened network inputs [n, d] behind the layer's inputs [n, d]."""
        return (layer_input - self.shift.to(layer_input)) / self.scale.to(layer_input)


@dataclass(frozen=True)
class Dense:
    """One dense layer as the model runs it: z = W x + b on one vector an example."""

    name: str  # the module's, or the weight's without ".weight"
    weight: str  # parameter names
    bias: str | None
    feeds: Affine | None  # how the network's input reaches it, if nothing but a normalisation lies between
    head: bool  # its output is the network's


class _Linears(TorchFunctionMode):
    """Records every F.linear on a parameter of the model, however it is called."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self.names = names
        self.calls: list[tuple[str, str | None, Tensor, Tensor]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is nn.functional.linear:
            given = dict(zip(("input", "weight", "bias"), args, strict=False)) | dict(kwargs or {})
            weight = self.names.get(id(given["weight"]))
            if weight is not None:
                bias = given.get("bias")
                name = None if bias is None else self.names.get(id(bias))
                self.calls.append((weight, name, given["input"].detach().clone(), out.detach().clone()))
        return out


def dense_layers(model: nn.Module, input_shape: tuple[int, ...]) -> list[Dense]:
    """The dense layers in the order in which they run; layers applied at several positions or times are left out.

    The model runs in eval mode on four probe inputs: two tell each layer's elementwise affine map from the network's
    input, the others check it. Found by watching F.linear, so custom modules count as well as nn.Linear.
    Raises ValueError: the forward fails on `input_shape`.
    """
    rng = torch.Generator().manual_seed(0)
    probes = torch.rand(4, *input_shape, generator=rng, dtype=torch.float64)
    probes[0], probes[1] = 0.0, 1.0
    calls, outputs = _watched(model, probes, "eval")
    used = [call[0] for call in calls]
    found = []
    for weight, bias, seen, out in calls:
        if seen.ndim != 2 or len(seen) != len(probes) or used.count(weight) > 1:
            continue
        head = out.numel() == outputs.numel() and bool((out.flatten() == outputs.flatten()).all())
        feeds = _affine(probes.to(seen).flatten(1), seen)
        found.append(Dense(_module(weight), weight, bias, feeds, head))
    return found


def layer_inputs(model: nn.Module, name: str, inputs: Tensor, mode: Literal["train", "eval"] = "eval") -> Tensor:
    """What the dense layer called `name` receives for `inputs` [n, ...]: its features [n, d].

    Raises ValueError: no dense layer of that name runs.
    """
    model = copy.deepcopy(model)  # in train mode batch norm writes its statistics
    for weight, _, seen, _ in _watched(model, inputs, mode)[0]:
        if _module(weight) == name:
            return seen
    raise ValueError(f"no dense layer called {name!r} runs in this model.")


class Features(TorchFunctionMode):
    """The inputs [n, d] of the dense layer called `name`, as a differentiable function of the model's inputs [n, ...].

    Raises ValueError on a call: no dense layer of that name runs.
    """

    def __init__(self, model: nn.Module, name: str, mode: Literal["train", "eval"] = "eval") -> None:
        super().__init__()
        self.model, self.name, self.mode = model, name, mode
        self.weight = next((p for key, p in model.named_parameters() if _module(key) == name and p.ndim == 2), None)
        self.seen: Tensor | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is nn.functional.linear:
            given = dict(zip(("input", "weight"), args, strict=False)) | dict(kwargs or {})
            if given["weight"] is self.weight:
                self.seen = given["input"]
        return func(*args, **(kwargs or {}))

    def __call__(self, inputs: Tensor) -> Tensor:
        self.seen = None
        with in_mode(self.model, self.mode), self:
            self.model(inputs)
        if self.seen is None:
            raise ValueError(f"no dense layer called {self.name!r} runs in this model.")
        return self.seen


def _watched(
    model: nn.Module, inputs: Tensor, mode: Literal["train", "eval"]
) -> tuple[list[tuple[str, str | None, Tensor, Tensor]], Tensor]:
    watch = _Linears({id(p): name for name, p in model.named_parameters(remove_duplicate=False)})
    with watch:
        outputs = forward(model, inputs, mode)
    return watch.calls, outputs


def _module(weight: str) -> str:
    return "" if weight == "weight" else weight.removesuffix(".weight")


def _affine(x: Tensor, seen: Tensor) -> Affine | None:
    if x.shape != seen.shape:
        return None
    shift, scale = seen[0], seen[1] - seen[0]
    expected = x[2:] * scale + shift
    tolerance = 64 * torch.finfo(seen.dtype).eps * (scale.abs() + shift.abs()).max()
    if not bool(((expected - seen[2:]).abs() <= tolerance).all()) or bool((scale == 0).any()):
        return None
    return Affine(scale.double(), shift.double())
