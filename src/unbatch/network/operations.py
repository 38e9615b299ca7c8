"""Operations: calls of functions as the layers that compute the same, so that rules for layers read them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbatch.network.graph import BatchSize, Call, Value, leaves, mapped

AFFINE_ROUNDINGS = 1e4  # by which an affine operation may miss the sum of its parts: of sums of many numbers
_RESHAPES = {
    getattr(home, name)
    for home in (torch, Tensor)
    for name in ["flatten", "reshape", "view", "view_as", "reshape_as", "squeeze", "unsqueeze", "unflatten"]
    if hasattr(home, name)
}
_CUTS = {Tensor.detach, torch.detach, Tensor.data.__get__}  # type: ignore[attr-defined]  # where the gradient ends


class Reshape(nn.Module):
    """The numbers of every example in another shape.

    >>> Reshape((2, 2))(torch.zeros(3, 4)).shape
    torch.Size([3, 2, 2])
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        """[n, ...] -> [n, *shape]."""
        return x.reshape(len(x), *self.shape)

    def extra_repr(self) -> str:
        """The shape."""
        return str(self.shape)


class _Here:
    """Stands for the operation's input among its arguments."""


class _Own(str):
    """Stands for the operation's tensor of that name."""

    __slots__ = ()


class Operation(nn.Module):
    """A function of one tensor with all its other arguments fixed, as a layer.

    call: one that ran, of one tensor fed by the network's input (`given`, however often) and otherwise parameters and
    constants. What works in place works on a copy here.

    >>> from unbatch.network.tracing import trace
    >>> class Double(nn.Module):
    ...     def forward(self, x: Tensor) -> Tensor:
    ...         return x.mul_(2)
    >>> graph = trace(Double(), (3,))
    >>> Operation(graph.calls[0], graph.input)(torch.ones(1, 3))
    tensor([[2., 2., 2.]])
    """

    def __init__(self, call: Call, given: Value) -> None:
        super().__init__()
        self.function = outplace(call.ran)
        self.names: dict[Value, _Own] = {}

        def held(leaf: Any) -> Any:
            if leaf is given:
                return _Here()
            return self._hold(leaf) if isinstance(leaf, Value) else leaf

        self.args, self.kwargs = mapped((call.args, call.kwargs), held)
        self.names = {}
        if self.kwargs.get("inplace"):
            self.kwargs["inplace"] = False

    def _hold(self, value: Value) -> _Own:
        if value not in self.names:
            name = _Own(f"operand{len(self.names)}")
            self.names[value] = name
            if isinstance(value.held, nn.Parameter):
                self.register_parameter(name, value.held)
            else:
                self.register_buffer(name, value.held)
        return self.names[value]

    def forward(self, x: Tensor) -> Tensor:
        """[n, ...] -> [n, ...]."""

        def filled(leaf: Any) -> Any:
            if isinstance(leaf, _Here):
                return x
            if isinstance(leaf, BatchSize):
                return leaf.times * len(x)
            return getattr(self, leaf) if isinstance(leaf, _Own) else leaf

        args, kwargs = mapped((self.args, self.kwargs), filled)
        found: Tensor = self.function(*args, **kwargs)
        return found

    def extra_repr(self) -> str:
        """The function and its other arguments."""
        fixed = [str(leaf) for leaf in leaves((self.args, self.kwargs)) if not isinstance(leaf, _Here)]
        return ", ".join([getattr(self.function, "__name__", "call"), *fixed])


class AffineOperation(Operation):
    """An operation that is affine in its input, as a mean over positions, a permutation or a multiple."""


def layer_of(call: Call, given: Value) -> nn.Module:
    """The layer that computes what a call of a function of one tensor did: one of torch.nn, a reshape, or an operation.

    given: the only value among its arguments that the network's input feeds.
    Whether an operation is affine is found by running it.

    >>> from unbatch.network.tracing import trace
    >>> class Net(nn.Module):
    ...     def forward(self, x: Tensor) -> Tensor:
    ...         return F.max_pool2d(torch.flatten(x, 0, 1)[:, None], 2).clamp(min=0).mean((2, 3))
    >>> [layer_of(call, call.given[0]) for call in trace(Net(), (1, 4, 4)).calls][2:]
    [MaxPool2d(kernel_size=2, stride=2, padding=0, dilation=1, ceil_mode=False), ReLU(), AffineOperation(mean, 2, 3)]
    """
    if isinstance(call.ran, nn.Module):
        return call.ran
    gave = call.gave[0]
    if call.ran in _RESHAPES and call.alone and given.each and gave.each and len(call.given) == 1:
        return Reshape(gave.shape[1:])
    if call.ran in _LAYERS and call.alone:
        names, build = _LAYERS[call.ran]
        found = build(_Arguments(call, names))
        if found is not None and next(iter(call.given)) is given:
            return found
    made = Operation(call, given)
    if call.alone and given.each and gave.each and call.ran not in _CUTS and _affine(made, given.shape):
        made.__class__ = AffineOperation
    return made


def recognised(layer: nn.Module) -> bool:
    """Whether a layer made of a function is more than the function: a layer of torch.nn, a reshape, or affine.

    >>> recognised(nn.ReLU()), recognised(Reshape((2,)))
    (True, True)
    """
    return type(layer) is not Operation


def outplace(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function that gives what another writes in place; a function that does not is its own.

    >>> outplace(Tensor.add_) is Tensor.add, outplace(torch.relu) is torch.relu
    (True, True)
    """
    if function is Tensor.__setitem__:
        return _written
    name = getattr(function, "__name__", "")
    if not name.endswith("_") or name.endswith("__"):
        return function
    home = Tensor if getattr(Tensor, name, None) is function else torch if getattr(torch, name, None) is function else F
    return getattr(home, name[:-1], function)


def _written(x: Tensor, index: Any, value: Any) -> Tensor:
    """A copy of x with values written at an index."""
    x = x.clone()
    x[index] = value
    return x


def _affine(layer: Operation, shape: tuple[int, ...]) -> bool:
    """Whether f(a) + f(b) = f(a + b) + f(0) and f(1000 a) - f(0) = 1000 (f(a) - f(0)), for a and b of all signs."""
    layer = copy.deepcopy(layer).double()
    tensor = next(iter((*layer.parameters(), *layer.buffers())), torch.zeros(0))
    draw = torch.randn(2, *shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(tensor.device)
    a, b = draw
    try:
        with torch.no_grad():
            zero, one, other, both, far = (layer(x) for x in (0 * a, a, b, a + b, 1000 * a))
    except (RuntimeError, ValueError, TypeError, IndexError):
        return False
    if not both.is_floating_point() or both.dtype != torch.float64:
        return False
    size = (
        AFFINE_ROUNDINGS * torch.finfo(torch.float64).eps * max(float(t.abs().max()) for t in (zero, one, other, both))
    )
    sums = float((one + other - zero - both).abs().max())
    return sums <= size and float(((far - zero) / 1000 - (one - zero)).abs().max()) <= size


class _Arguments:
    """A call's arguments by name."""

    def __init__(self, call: Call, names: tuple[str, ...]) -> None:
        self.call = call
        self.found: dict[str, Any] = dict(zip(names, call.args, strict=False)) | call.kwargs

    def __contains__(self, name: str) -> bool:
        return self.found.get(name) is not None

    def some(self, *names: str, **others: str) -> dict[str, Any]:
        """Those that were given, by the layer's names for them."""
        wanted = {name: name for name in names} | others
        return {own: self.found[name] for own, name in wanted.items() if self.found.get(name) not in (None, ())}

    def size(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return tuple(self.found[name].shape)

    def fill(self, layer: nn.Module, *names: str) -> nn.Module | None:
        """A layer with the parameters and buffers that the call was given; None where one is neither."""
        for name in names:
            value = self.found.get(name)
            if value is None:
                if name in layer._buffers:
                    layer._buffers[name] = None
                else:
                    layer.register_parameter(name, None)
            elif isinstance(value, Value) and name in layer._buffers and value.held is not None:
                layer._buffers[name] = value.held
            elif isinstance(value, Value) and isinstance(value.held, nn.Parameter):
                layer.register_parameter(name, value.held)
            else:
                return None
        return layer


Build = Callable[[_Arguments], nn.Module | None]
_LAYERS: dict[Any, tuple[tuple[str, ...], Build]] = {}


def _add(functions: list[Any], names: str, build: Build) -> None:
    _LAYERS.update({function: (tuple(names.split()), build) for function in functions})


def _homes(name: str) -> list[Any]:
    """A function of that name wherever torch has it, in place as well."""
    found = [getattr(home, each, None) for home in (F, torch, Tensor) for each in (name, f"{name}_")]
    return [function for function in found if function is not None]


def _plain(kind: type[nn.Module], *names: str) -> Build:
    """A layer without tensors, by those of its arguments that were given."""
    return lambda arguments: kind(**arguments.some(*names))


for _name, _names, _kind in (
    ("relu", "", nn.ReLU),
    ("relu6", "", nn.ReLU6),
    ("leaky_relu", "negative_slope", nn.LeakyReLU),
    ("elu", "alpha", nn.ELU),
    ("celu", "alpha", nn.CELU),
    ("selu", "", nn.SELU),
    ("silu", "", nn.SiLU),
    ("mish", "", nn.Mish),
    ("logsigmoid", "", nn.LogSigmoid),
    ("softsign", "", nn.Softsign),
    ("sigmoid", "", nn.Sigmoid),
    ("tanh", "", nn.Tanh),
    ("hardtanh", "min_val max_val", nn.Hardtanh),
    ("hardsigmoid", "", nn.Hardsigmoid),
    ("hardswish", "", nn.Hardswish),
    ("softplus", "beta threshold", nn.Softplus),
):
    _add(_homes(_name), f"input {_names}", _plain(_kind, *_names.split()))


def _gelu(arguments: _Arguments) -> nn.Module:
    return nn.GELU(**arguments.some("approximate"))


def _clamp(arguments: _Arguments) -> nn.Module | None:
    low, high = arguments.found.get("min"), arguments.found.get("max")
    if isinstance(low, int | float) and low == 0 and high is None:
        return nn.ReLU()
    ends = isinstance(low, int | float) and isinstance(high, int | float) and low < high
    return nn.Hardtanh(float(low), float(high)) if ends else None  # type: ignore[arg-type]


def _prelu(arguments: _Arguments) -> nn.Module | None:
    return arguments.fill(nn.PReLU(arguments.size("weight")[0], device="meta"), "weight")


def _soft(kind: type[nn.Softmax | nn.LogSoftmax]) -> Build:
    return lambda arguments: kind(arguments.found["dim"]) if "dim" in arguments and "dtype" not in arguments else None


def _linear(arguments: _Arguments) -> nn.Module | None:
    shape = arguments.size("weight")
    if len(shape) != 2:
        return None
    return arguments.fill(nn.Linear(shape[1], shape[0], "bias" in arguments, device="meta"), "weight", "bias")


def _conv(kind: Any, transposed: bool = False) -> Build:
    def build(arguments: _Arguments) -> nn.Module | None:
        shape, groups = arguments.size("weight"), arguments.found.get("groups", 1)
        into, out = (shape[0], shape[1] * groups) if transposed else (shape[1] * groups, shape[0])
        own = arguments.some("stride", "padding", "dilation", "groups", *(["output_padding"] if transposed else []))
        made = kind(into, out, shape[2:], bias="bias" in arguments, device="meta", **own)
        return arguments.fill(made, "weight", "bias")

    return build


def _max_pool(kind: Any) -> Build:
    own = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
    return lambda arguments: kind(**{"stride": None} | arguments.some(*own))


def _avg_pool(kind: Any, *own: str) -> Build:
    return lambda arguments: kind(**arguments.some("kernel_size", "stride", "padding", "ceil_mode", *own))


def _batch_norm(arguments: _Arguments) -> nn.Module | None:
    sides = len(arguments.found["input"].shape)
    kind: Any = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}.get(sides)
    if kind is None:
        return None
    kept, training = "running_mean" in arguments, bool(arguments.found.get("training", False))
    c = arguments.size("input")[1]
    made = kind(c, track_running_stats=kept, device="meta", **arguments.some("eps", "momentum"))
    names = ("weight", "bias", *(("running_mean", "running_var") if kept else ()))
    if kept:
        made.num_batches_tracked = torch.tensor(0)
    return arguments.fill(made.train(training), *names)


def _instance_norm(arguments: _Arguments) -> nn.Module | None:
    sides = len(arguments.found["input"].shape)
    kind: Any = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}.get(sides)
    if kind is None or "running_mean" in arguments:
        return None
    made = kind(arguments.size("input")[1], affine=True, device="meta", **arguments.some("eps"))
    return arguments.fill(made, "weight", "bias")


def _layer_norm(arguments: _Arguments) -> nn.Module | None:
    made = nn.LayerNorm(arguments.found["normalized_shape"], device="meta", **arguments.some("eps"))
    return arguments.fill(made, "weight", "bias")


def _group_norm(arguments: _Arguments) -> nn.Module | None:
    groups, c = arguments.found["num_groups"], arguments.size("input")[1]
    return arguments.fill(nn.GroupNorm(groups, c, device="meta", **arguments.some("eps")), "weight", "bias")


def _dropout(kind: Any, training: str) -> Build:
    def build(arguments: _Arguments) -> nn.Module:
        on = arguments.found.get(training, True)  # as torch's functions have it
        return kind(**arguments.some("p")).train(bool(on))  # type: ignore[no-any-return]

    return build


_add(_homes("gelu"), "input approximate", _gelu)
_add([*_homes("clamp"), *_homes("clip")], "input min max", _clamp)
_add(_homes("clamp_min"), "input min", _clamp)
_add(_homes("prelu"), "input weight", _prelu)
_add([*_homes("log_softmax")], "input dim _stacklevel dtype", _soft(nn.LogSoftmax))
_add([*_homes("softmax")], "input dim _stacklevel dtype", _soft(nn.Softmax))
_add([F.linear], "input weight bias", _linear)
_add([F.batch_norm], "input running_mean running_var weight bias training momentum eps", _batch_norm)
_add([F.instance_norm], "input running_mean running_var weight bias use_input_stats momentum eps", _instance_norm)
_add([F.layer_norm], "input normalized_shape weight bias eps", _layer_norm)
_add([F.group_norm], "input num_groups weight bias eps", _group_norm)
_add([F.dropout], "input p training inplace", _dropout(nn.Dropout, "training"))
_add([torch.dropout], "input p train", _dropout(nn.Dropout, "train"))
for _k in (1, 2, 3):
    _add([getattr(F, f"dropout{_k}d")], "input p training inplace", _dropout(getattr(nn, f"Dropout{_k}d"), "training"))
    _pooled = "input kernel_size stride padding"
    _add(
        [getattr(F, f"conv{_k}d")],
        "input weight bias stride padding dilation groups",
        _conv(getattr(nn, f"Conv{_k}d")),
    )
    _add(
        [getattr(F, f"conv_transpose{_k}d")],
        "input weight bias stride padding output_padding groups dilation",
        _conv(getattr(nn, f"ConvTranspose{_k}d"), True),
    )
    _maxima = [getattr(F, f"max_pool{_k}d"), getattr(torch, f"max_pool{_k}d")]
    _add(_maxima, f"{_pooled} dilation ceil_mode return_indices", _max_pool(getattr(nn, f"MaxPool{_k}d")))
    _divided = () if _k == 1 else ("divisor_override",)
    _add(
        [getattr(F, f"avg_pool{_k}d")],
        f"{_pooled} ceil_mode count_include_pad divisor_override",
        _avg_pool(getattr(nn, f"AvgPool{_k}d"), "count_include_pad", *_divided),
    )
    for _way in ("Avg", "Max"):
        _adaptive: Mapping[str, Any] = vars(nn)
        _add(
            [getattr(F, f"adaptive_{_way.lower()}_pool{_k}d")],
            "input output_size return_indices",
            _plain(_adaptive[f"Adaptive{_way}Pool{_k}d"], "output_size"),
        )
