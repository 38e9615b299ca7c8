"""Which dense layers a model runs, in which order, and what feeds them: found by running it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from unbatch.errors import NotApplicable, UnbatchError
from unbatch.network.precision import outputs_of


@contextmanager
def in_mode(model: nn.Module, mode: Literal["train", "eval"]) -> Iterator[nn.Module]:
    """Puts a model into training or evaluation mode inside the block, and every module's own flag back after it.

    >>> model = nn.Dropout()
    >>> with in_mode(model, "eval"):
    ...     model.training
    False
    >>> model.training
    True
    """
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

    Raises UnbatchError: the forward fails, or does not return one tensor. NotApplicable: it does not run in float64.

    >>> forward(nn.Linear(2, 3), torch.zeros(5, 2)).shape
    torch.Size([5, 3])
    """
    first = next(model.parameters(), inputs)
    x = inputs.to(first.device, first.dtype) if inputs.is_floating_point() else inputs.to(first.device)
    try:
        with torch.no_grad(), in_mode(model, mode):
            outputs = outputs_of(model, x)
    except NotApplicable:
        raise
    except Exception as error:  # the model is the user's: anything may go wrong in it
        raise UnbatchError(f"the model's forward fails on inputs of shape {tuple(x.shape[1:])}: {error}") from error
    if not isinstance(outputs, Tensor):
        raise UnbatchError(f"the model returns {type(outputs).__name__}; wrap it so that it returns one tensor.")
    return outputs


@dataclass(frozen=True)
class Normalisation:
    """The elementwise map by which the network's input reaches a dense layer: scale_j x_j + shift_j, x flattened.

    >>> seen = Normalisation(scale=torch.tensor([2.0, 4.0]), shift=torch.tensor([1.0, 0.0]))
    >>> seen.invert(torch.tensor([[5.0, 2.0]]))
    tensor([[2.0000, 0.5000]])
    """

    scale: Tensor  # [d]
    shift: Tensor  # [d]

    def invert(self, layer_input: Tensor) -> Tensor:
        """The flattened network inputs [n, d] behind the layer's inputs [n, d]."""
        return (layer_input - self.shift.to(layer_input)) / self.scale.to(layer_input)


@dataclass(frozen=True)
class Dense:
    """One dense layer as the model runs it, z = W x + b on one vector an example, by the names of its parameters.

    >>> first, head = anatomy(nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), (1, 2, 2)).layers
    >>> first.name, first.weight, first.bias, first.feeds is not None, first.head
    ('1', '1.weight', '1.bias', True, False)
    >>> head.feeds is None, head.head  # more than a normalisation lies before it, and its output is the network's
    (True, True)
    """

    name: str  # the module's, or the weight's without ".weight"
    weight: str  # parameter names
    bias: str | None
    feeds: Normalisation | None  # how the network's input reaches it, if nothing but a normalisation lies between
    head: bool  # its output is the network's


Call = Mapping[str, Any]  # of F.linear, its arguments by name: input, weight, bias


class LinearCalls(TorchFunctionMode):
    """Hears every F.linear that runs in the block, whatever module calls it, and may answer in its place.

    `hear(call, compute)` is given the arguments by name and what computes the call as it stands; what it returns is the
    call's result.

    >>> weight, seen = torch.eye(2), []
    >>> def hear(call, compute):
    ...     seen.append(call["input"].shape)
    ...     return 2 * compute()
    >>> with LinearCalls(hear):
    ...     nn.functional.linear(torch.ones(1, 2), weight)
    tensor([[2., 2.]])
    >>> seen
    [torch.Size([1, 2])]
    """

    def __init__(self, hear: Callable[[Call, Callable[[], Tensor]], Tensor]) -> None:
        super().__init__()
        self.hear = hear

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is not nn.functional.linear:
            return func(*args, **(kwargs or {}))
        call = dict(zip(("input", "weight", "bias"), args, strict=False)) | dict(kwargs or {})
        return self.hear(call, lambda: nn.functional.linear(**call))


@dataclass(frozen=True)
class Anatomy:
    """What one look at a running model tells: its dense layers in the order in which they run, and its outputs' shape.

    >>> found = anatomy(nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), (1, 2, 2))
    >>> [layer.name for layer in found.layers], found.outputs
    (['1', '3'], (2,))
    """

    layers: tuple[Dense, ...]  # applied to one vector an example, once; others are left out
    outputs: tuple[int, ...]  # the shape of one example's outputs


def anatomy(model: nn.Module, input_shape: tuple[int, ...], *, whole: bool = False) -> Anatomy:
    """The dense layers that a model runs and what feeds them, by running it on four probe inputs in eval mode.

    Two probes tell each layer's elementwise affine map from the network's input, scale_j x_j + shift_j; the others check
    it. Found by listening to F.linear, so custom modules count as well as nn.Linear. With `whole` the probes are whole
    numbers, 0 and 1, as a model of tokens takes them; no layer is then fed by an elementwise map.
    Raises UnbatchError: the forward fails on such inputs of `input_shape`.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> [(layer.name, layer.head) for layer in anatomy(model, (1, 2, 2)).layers]
    [('1', False), ('3', True)]
    """
    rng = torch.Generator().manual_seed(0)
    probes = torch.rand(4, *input_shape, generator=rng, dtype=torch.float64)
    probes[0], probes[1] = 0.0, 1.0
    probes = probes.round().long() if whole else probes
    calls, outputs = _heard(model, probes, "eval")
    used = [call.weight for call in calls]
    found = []
    for call in calls:
        if call.input.ndim != 2 or len(call.input) != len(probes) or used.count(call.weight) > 1:
            continue
        head = call.output.numel() == outputs.numel() and bool((call.output.flatten() == outputs.flatten()).all())
        feeds = None if whole else _affine(probes.to(call.input).flatten(1), call.input)
        found.append(Dense(_module(call.weight), call.weight, call.bias, feeds, head))
    return Anatomy(tuple(found), tuple(outputs.shape[1:]))


def layer_inputs(model: nn.Module, name: str, inputs: Tensor, mode: Literal["train", "eval"] = "eval") -> Tensor:
    """What the dense layer called `name` receives for `inputs` [n, ...]: its features [n, d].

    Raises UnbatchError: no dense layer of that name runs.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> features = layer_inputs(model, "2", torch.ones(5, 2))
    >>> features.shape, bool((features >= 0).all())  # what relu lets through
    (torch.Size([5, 3]), True)
    """
    model = copy.deepcopy(model)  # in train mode batch norm writes its statistics
    for call in _heard(model, inputs, mode)[0]:
        if _module(call.weight) == name:
            return call.input
    raise UnbatchError(f"no dense layer called {name!r} runs in this model.")


class DenseFeatures:
    """The inputs [n, d] of the dense layer called `name`, as a differentiable function of the model's inputs [n, ...].

    Raises UnbatchError on a call: no dense layer of that name runs.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> DenseFeatures(model, "2")(torch.ones(5, 2)).shape
    torch.Size([5, 3])
    """

    def __init__(self, model: nn.Module, name: str, mode: Literal["train", "eval"] = "eval") -> None:
        self.model, self.name, self.mode = model, name, mode
        self.weight = next((p for key, p in model.named_parameters() if _module(key) == name and p.ndim == 2), None)

    def __call__(self, inputs: Tensor) -> Tensor:
        """The features [n, d] of inputs [n, ...], with their graph."""
        seen: list[Tensor] = []

        def hear(call: Call, compute: Callable[[], Tensor]) -> Tensor:
            if call["weight"] is self.weight:
                seen.append(call["input"])
            return compute()

        with in_mode(self.model, self.mode), LinearCalls(hear):
            outputs_of(self.model, inputs, twice=True)
        if not seen:
            raise UnbatchError(f"no dense layer called {self.name!r} runs in this model.")
        return seen[-1]


@dataclass(frozen=True)
class _Heard:
    """One call of F.linear on a parameter of the model."""

    weight: str
    bias: str | None
    input: Tensor
    output: Tensor


def _heard(model: nn.Module, inputs: Tensor, mode: Literal["train", "eval"]) -> tuple[list[_Heard], Tensor]:
    names = {id(p): name for name, p in model.named_parameters(remove_duplicate=False)}
    calls: list[_Heard] = []

    def hear(call: Call, compute: Callable[[], Tensor]) -> Tensor:
        out, weight, bias = compute(), names.get(id(call["weight"])), call.get("bias")
        if weight is not None:
            name = None if bias is None else names.get(id(bias))
            calls.append(_Heard(weight, name, call["input"].detach().clone(), out.detach().clone()))
        return out

    with LinearCalls(hear):
        outputs = forward(model, inputs, mode)
    return calls, outputs


def _module(weight: str) -> str:
    return "" if weight == "weight" else weight.removesuffix(".weight")


def _affine(x: Tensor, seen: Tensor) -> Normalisation | None:
    if x.shape != seen.shape:
        return None
    shift, scale = seen[0], seen[1] - seen[0]
    expected = x[2:] * scale + shift
    tolerance = 64 * torch.finfo(seen.dtype).eps * (scale.abs() + shift.abs()).max()
    if not bool(((expected - seen[2:]).abs() <= tolerance).all()) or bool((scale == 0).any()):
        return None
    return Normalisation(scale.double(), shift.double())
