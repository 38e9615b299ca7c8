"""Precision: a network and a loss run in float64, whatever they cast to, and by kernels that differentiate twice."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from unbatch.errors import NotApplicable
from unbatch.label_form import in_dtype

T = TypeVar("T")

LACKS_DERIVATIVE = re.compile(  # as PyTorch says it
    r"derivative for (?:aten::)?(\w+) is not implemented|forward AD with (\w+) that does not support it"
)
ONE_VALUE = "Expected more than 1 value per channel when training"  # as it says of batch norm

LOWER = (torch.float32, torch.float16, torch.bfloat16)  # than float64
CASTS = (Tensor.float, Tensor.half, Tensor.bfloat16)
WRITERS = ("__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__", "__ifloordiv__", "__imod__", "__setitem__")


class Lifted(TorchFunctionMode):
    """Computes in float64 what runs in the block, though it casts to less or meets tensors of less.

    A cast is left out, and a tensor of lower precision (a constant that is no buffer, zeros made in the forward) is taken
    as the numbers that it holds, in float64. `lifted` says whether there was any of them.

    >>> x, constant = torch.ones(1, dtype=torch.float64) / 3, torch.ones(1)
    >>> with Lifted() as mode:
    ...     y = x.float() * constant
    >>> y.dtype, bool(y == x), mode.lifted
    (torch.float64, True, True)
    """

    def __init__(self) -> None:
        super().__init__()
        self.lifted = False

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in CASTS or (func is Tensor.type and _names_lower(args, kwargs)):
            self.lifted = True
            return args[0].double()
        if any(_tensors(args)) or any(_tensors(list(kwargs.values()))):
            name = getattr(func, "__name__", "")
            written = name in WRITERS or (name.endswith("_") and not name.endswith("__"))
            kept = 1 if written or func is Tensor.view else 0  # what is written into must stay itself
            keep_type = func is Tensor.view  # which reads bits as of another type
            args = (*args[:kept], *(v if keep_type else self._up(v) for v in args[kept:]))
            kwargs = {k: v if k == "out" or keep_type else self._up(v) for k, v in kwargs.items()}
        return self._up(func(*args, **kwargs))

    def _up(self, value: Any) -> Any:
        """The value in float64 where it is a tensor or a type of lower precision; in what holds several, each of them."""
        if isinstance(value, Tensor):
            if value.dtype not in LOWER:
                return value
            self.lifted = True
            return value.double()
        if isinstance(value, torch.dtype):
            self.lifted |= value in LOWER
            return torch.float64 if value in LOWER else value
        if isinstance(value, (list, tuple)):
            each = [self._up(v) for v in value]
            if all(a is b for a, b in zip(each, value, strict=True)):
                return value
            named = hasattr(value, "_fields")
            return type(value)(*each) if named else type(value)(each)
        return value


@dataclass
class _Habits:
    """What is known of a network or a loss once it ran: whether it casts in each mode, and which kernels it may call."""

    casts: dict[bool, bool]  # by whether it is in train mode
    attention: bool = False
    recurrent: bool = False


_SEEN: WeakKeyDictionary[Any, _Habits] = WeakKeyDictionary()
_OPEN: ContextVar[bool] = ContextVar(
    "open", default=False
)  # whether a block of `Lifted` is: an inner one would do nothing


def in_double(model: nn.Module) -> nn.Module:
    """A copy of a model in float64, which `outputs_of` runs.

    >>> next(in_double(nn.Linear(2, 3)).parameters()).dtype
    torch.float64
    """
    copied = copy.deepcopy(model).double()
    for held in (*copied.parameters(), *copied.buffers()):  # in the plain layout: forward mode takes no other
        held.data = held.data.clone(memory_format=torch.contiguous_format)
    copied.__dict__["_own_precision"] = _own_precision(model)
    return copied


def outputs_of(
    model: nn.Module, inputs: Tensor, state: Mapping[str, Tensor] | None = None, *, twice: bool = False
) -> Any:
    """What a model gives for inputs [n, ...], with the parameters and buffers `state` where given, as attacks run it.

    Where these are float64, so is all that it computes, though it casts (`Lifted`). There, and where it is differentiated
    `twice`, attention and recurrent layers run by kernels that can be differentiated twice, and forward.
    Raises NotApplicable: it runs in its own precision and not in float64, and why; what the model itself raises otherwise.

    >>> class Casting(nn.Linear):
    ...     def forward(self, x):
    ...         return super().forward(x.float())
    >>> outputs_of(in_double(Casting(2, 3)), torch.zeros(1, 2, dtype=torch.float64)).dtype
    torch.float64
    """
    habits = _habits(model)

    def compute() -> Any:
        return model(inputs) if state is None else functional_call(model, dict(state), (inputs,))

    double = _precision(model if state is None else state) == torch.float64
    with _twice_differentiable(habits) if double or twice else nullcontext():
        if not double:
            return compute()
        try:
            return _lifting(habits, model.training, compute)
        except NotApplicable:
            raise
        except (RuntimeError, TypeError) as error:
            own = _own_precision(model)
            if own == torch.float64 or model.training in habits.casts:
                raise
            raise NotApplicable(
                f"attacks compute in float64, and the model's forward runs in {str(own).removeprefix('torch.')} alone: "
                f"{error}"
            ) from error


def loss_value(loss: Callable[[Tensor, Tensor], Tensor], outputs: Tensor, labels: Tensor) -> Tensor:
    """The loss's value, in float64 where the outputs are, though it casts them or weighs classes in float32.

    >>> weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0]))
    >>> loss_value(weighted, torch.zeros(1, 2).double(), torch.tensor([1]))
    tensor(0.6931, dtype=torch.float64)
    """
    if outputs.dtype != torch.float64:
        return in_dtype(loss, outputs.dtype)(outputs, labels)
    try:
        habits = _SEEN.setdefault(loss, _Habits({}))
    except TypeError:  # a loss that cannot be remembered
        habits = _Habits({})
    try:
        return _lifting(habits, False, lambda: loss(outputs, labels))
    except RuntimeError:
        if False in habits.casts:
            raise
        return in_dtype(loss, outputs.dtype)(outputs, labels)  # operations of its own, that are not lifted


@contextmanager
def _twice_differentiable(habits: _Habits) -> Iterator[None]:
    """A block in which attention runs by the mathematical kernel, and recurrent layers without cuDNN or oneDNN.

    Both compute a recurrent layer as one operation, in which no product is heard and some have no second derivative.
    """
    with ExitStack() as stack:
        if habits.attention:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            fast = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)
            stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        if habits.recurrent:
            (enabled, *_) = torch.backends.mkldnn.set_flags(False)  # type: ignore[no-untyped-call]
            stack.callback(torch.backends.mkldnn.set_flags, enabled)
            if torch.cuda.is_available():
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield


def _lifting(habits: _Habits, training: bool, compute: Callable[[], T]) -> T:
    """Computes in `Lifted`, unless it is known that there is nothing to lift, or a block of it is open."""
    if _OPEN.get() or habits.casts.get(training) is False:
        return compute()
    outer = _OPEN.set(True)
    try:
        with Lifted() as mode:
            found = compute()
    finally:
        _OPEN.reset(outer)
    habits.casts[training] = habits.casts.get(training, False) or mode.lifted
    return found


def _habits(model: nn.Module) -> _Habits:
    held = _SEEN.get(model)
    if held is None:
        own = [m for m in model.modules() if not type(m).__module__.startswith("torch.nn.") or "forward" in vars(m)]
        held = _Habits(casts={} if own else {True: False, False: False})
        held.attention = bool(own) or any(isinstance(m, nn.MultiheadAttention) for m in model.modules())
        held.recurrent = any(isinstance(m, nn.RNNBase) for m in model.modules())
        _SEEN[model] = held
    return held


def _precision(held: nn.Module | Mapping[str, Tensor]) -> torch.dtype | None:
    tensors = held.parameters() if isinstance(held, nn.Module) else held.values()
    return next((t.dtype for t in tensors if t.is_floating_point()), None)


def _own_precision(model: nn.Module) -> torch.dtype | None:
    held = vars(model).get("_own_precision")
    return cast("torch.dtype | None", held) if held is not None else _precision(model)


def _tensors(values: Sequence[Any]) -> Iterator[bool]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _tensors(value)
        else:
            yield isinstance(value, Tensor)


def _names_lower(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of Tensor.type asks for a lower precision by name."""
    wanted = args[1] if len(args) > 1 else kwargs.get("dtype")
    words = wanted if isinstance(wanted, str) else getattr(wanted, "__name__", "")
    return any(words.endswith(kind) for kind in ("FloatTensor", "HalfTensor", "BFloat16Tensor"))


def in_our_words(error: Exception) -> NotApplicable | None:
    """What torch says where it has no derivative of an operation, or batch norm has one example alone; None of all else.

    Gradients are differentiated again by whoever searches for inputs, and some losses and kernels can be once alone.

    >>> outputs = torch.zeros(1, 3, requires_grad=True)
    >>> value = nn.functional.multi_margin_loss(outputs, torch.tensor([0]))
    >>> (slope,) = torch.autograd.grad(value, outputs, create_graph=True)
    >>> try:
    ...     slope.sum().backward()
    ... except RuntimeError as error:
    ...     print(str(in_our_words(error)).partition(",")[2].partition(",")[0].strip())
    and PyTorch has no derivative of multi_margin_loss_backward
    """
    if ONE_VALUE in str(error):
        return NotApplicable(
            "one example is looked at by itself, and batch norm in train mode takes the mean over several: alone it has "
            "none."
        )
    lacking = LACKS_DERIVATIVE.search(str(error))
    if lacking is None and "ZeroTensors are immutable" not in str(error):  # what forward mode says of recurrent cells
        return None
    what = lacking[1] or lacking[2] if lacking else "a recurrent cell in forward mode"
    return NotApplicable(
        "it differentiates what the client computes once more than the client does, and PyTorch has no derivative of "
        f"{what}, which the model or the loss calls; write that one in other operations."
    )
