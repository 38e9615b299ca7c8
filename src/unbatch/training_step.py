"""Training step: one step of a PyTorch training loop, watched from outside, as the server would see it."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from unbatch.adapters.huggingface import with_its_loss
from unbatch.adapters.opacus import PrivateStep, private_step, without_opacus_hooks
from unbatch.defence import Defence, Stack
from unbatch.errors import UnbatchError
from unbatch.knowledge import Knowledge
from unbatch.loss import Loss
from unbatch.network.unwrapped import unwrapped
from unbatch.observation import Observation
from unbatch.plugin import OneOrMore
from unbatch.protocol import ADAM_EPS, Protocol, Update, fit, flatten
from unbatch.update import as_update, some

Sent = Literal["gradient", "difference"]

INNER = {"AcceleratedOptimizer": "optimizer", "DPOptimizer": "original_optimizer"}  # wrapper -> the optimiser within
LEAST_FACTOR_ERROR = 16  # roundings of a gradient's own type, within which two gradients are multiples of each other


@contextmanager
def capture(model: nn.Module, optimiser: torch.optim.Optimizer, *, scaler: Any = None) -> Iterator[CapturedStep]:
    """Watches one step of a training loop, and gives what a server that is sent it would see: an update to audit.

    Put the block round one step: forward passes, backward passes, whatever is done to the gradient, `optimiser.step()`.
    Nothing of the loop changes. After the block the step has the `gradient` as the optimiser used it, the `difference` of
    the parameters, the buffers before and after, the optimiser's settings, how many backward passes were accumulated, and
    how the gradient was changed between backward and step; `observation(loss)` is what `unbatch.audit` takes.

    model: the one that is trained, bare or wrapped (DataParallel, torch.compile, Opacus, PEFT). optimiser: its optimiser,
    or what Opacus or Accelerate wrap round it. scaler: the GradScaler of mixed precision, if there is one; its factor is
    taken off. A copy of the model and two of the gradient are kept while the block runs.

    Raises UnbatchError, at the block's end: no step was taken (or a GradScaler left it out), or several; no gradient came.
    At its beginning: the optimiser is none, or has no parameter of this model.

    >>> model, x, y = nn.Linear(2, 2), torch.tensor([[1.0, 2.0]]), torch.tensor([0])
    >>> optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> with capture(model, optimiser) as step:
    ...     nn.functional.cross_entropy(model(x), y).backward()
    ...     optimiser.step()
    >>> step
    <CapturedStep of Linear: SGD, learning rate 0.1; 1 backward pass; 6 entries>
    >>> step.observation(nn.functional.cross_entropy).knowledge
    Knowledge(input_shape=(2,), batch_size=1, mode='train')
    """
    inner, scaler, private = _within(optimiser, scaler)
    watch = _Watch(model, inner, scaler, private)
    step = CapturedStep()
    with ExitStack() as hooks:
        watch.hook(hooks)
        yield step
    vars(step)["_record"] = watch.record()


@dataclass(repr=False)
class CapturedStep:
    """One step of training as it was watched by `capture`; there is something in it once the block is over.

    Reading it before raises UnbatchError.
    """

    _record: _Record | None = None

    def __repr__(self) -> str:
        if self._record is None:
            return "<CapturedStep: its block is not over>"
        entries = sum(tensor.numel() for tensor in self.gradient.values())
        rates = sorted({group["lr"] for group in self.settings})
        passes = f"{self.passes} backward pass{'es' * (self.passes > 1)}"
        return (
            f"<CapturedStep of {type(self.model).__name__}: {self.optimiser}, learning rate "
            f"{' and '.join(f'{rate:g}' for rate in rates)}; {passes}; {entries:,} entries>"
        )

    @property
    def model(self) -> nn.Module:
        """A copy of the model from before the block, without what wrapped it."""
        return self._taken.model

    @property
    def gradient(self) -> Update:
        """The gradient that the optimiser used, by parameter name: after scaling, accumulation, clipping and noise."""
        return self._taken.gradient

    @property
    def difference(self) -> Update:
        """What the step did to the parameters, after minus before, by name."""
        return self._taken.difference

    @property
    def optimiser(self) -> str:
        """The name of the optimiser's class."""
        return self._taken.optimiser

    @property
    def settings(self) -> list[dict[str, Any]]:
        """The optimiser's settings at the step, one dictionary for each of its groups of parameters, without these."""
        return self._taken.settings

    @property
    def passes(self) -> int:
        """How many backward passes the gradient was accumulated over."""
        return self._taken.passes

    @property
    def factor(self) -> float | None:
        """The gradient at the step over that which backward left, the scaler's factor taken off.

        1: as it was; below 1: it was clipped, or divided. None: it was changed in another way.
        """
        return self._taken.factor

    @property
    def buffers_before(self) -> dict[str, Tensor]:
        """The model's buffers (running statistics) before the block."""
        return {name: tensor.detach() for name, tensor in self.model.named_buffers()}

    @property
    def buffers(self) -> dict[str, Tensor]:
        """The model's buffers after the step."""
        return self._taken.buffers

    @property
    def notes(self) -> list[str]:
        """What there is to know of this step before it is audited, in sentences."""
        return self._taken.notes()

    def observation(
        self,
        loss: Loss | None = None,
        *,
        sent: Sent = "gradient",
        input_shape: tuple[int, ...] | None = None,
        batch_size: int | None = None,
        buffers: bool = False,
        defences: OneOrMore[Defence] = (),
        knowledge: Knowledge | None = None,
    ) -> Observation:
        """The step as an exchange that `unbatch.audit` takes, where the client sends its gradient or its new parameters.

        loss: (outputs, labels) -> the loss of the whole batch, of all accumulated passes together; models of Hugging Face
        come with their own. sent: *gradient*, that
        which the optimiser used, whichever optimiser it is; *difference* of the parameters, after the first step of SGD,
        Adam or AdamW from a new state, with its settings known. input_shape, batch_size: of the forward passes in the
        block, where they are not given. buffers: whether the client sends its buffers after the step as well. defences:
        what changed the gradient between backward and step, where it was declared; without them what is seen is taken for
        it: a clipping to the norm of what came out, Opacus' own clipping and noise, or else an unknown change.
        knowledge: what the server knows besides.

        A server that knows the optimiser's settings works out the plain step behind a difference, and so does this: the
        learning rates of groups of parameters are made equal, and weight decay is taken off (but Adam's own).

        Raises UnbatchError: the block is not over; a difference that no server can read, and why.
        """
        taken = self._taken
        if sent not in get_args(Sent):
            raise UnbatchError(f"sent is {sent!r}; give one of {', '.join(map(repr, get_args(Sent)))}.")
        model, own = with_its_loss(copy.deepcopy(taken.model))
        loss = loss or own
        if loss is None:
            raise UnbatchError(
                "the loss is not given; give observation(loss), a function of the outputs and the labels."
            )
        update, known = (dict(taken.gradient), Knowledge()) if sent == "gradient" else taken.step_of_the_parameters()
        known |= taken.seen_of_the_batch(input_shape, batch_size)
        known |= Knowledge(buffers=taken.buffers) if buffers else Knowledge()
        declared = Stack.of(defences)
        if not declared.defences:
            update, declared, altered = taken.done_to_the_gradient(update, known, sent)
            known |= Knowledge(altered=altered) if altered else Knowledge()
        known = declared.told(known, update) | (knowledge or Knowledge())
        return Observation(model=model, loss=declared.loss(loss), update=update, knowledge=known)

    @property
    def _taken(self) -> _Record:
        if self._record is None:
            raise UnbatchError(
                "the step is read while its block still runs, or the block failed; read it after `with capture(...)` ended."
            )
        return self._record


@dataclass(kw_only=True)
class _Record:
    """What was seen of a step."""

    model: nn.Module
    optimiser: str
    kind: type[torch.optim.Optimizer]
    settings: list[dict[str, Any]]
    group_of: dict[str, int]  # parameter name -> which of the settings
    fresh: bool  # the optimiser had no state from earlier steps
    gradient: Update
    left: Update  # the gradient as backward left it, the scaler's factor taken off
    difference: Update
    buffers: dict[str, Tensor]
    passes: int
    scale: float | None  # that was taken off; None: there was no scaler
    private: PrivateStep | None
    mode: str
    shapes: list[tuple[int, ...]]  # of the forward passes' inputs
    tokens: bool
    autocast: str
    strangers: list[str]
    factor: float | None = field(init=False)

    guessed: bool = False  # the scaler was not given, and its factor is read off the gradient

    def __post_init__(self) -> None:
        self._compare()
        if self.scale is None and self.factor and self.factor < 1 and math.frexp(self.factor)[0] == 0.5:
            self.scale, self.guessed = 1 / self.factor, True
            self.left = {name: tensor * self.factor for name, tensor in self.left.items()}
            self._compare()

    def _compare(self) -> None:
        """The factor by which the gradient at the step is that which backward left."""
        if set(self.left) != set(self.gradient) or self.private:
            self.factor = None
            return
        seen, again = flatten(self.gradient, self.gradient), flatten(self.left, self.gradient)
        factor, off = fit(seen, again)
        eps = max(torch.finfo(tensor.dtype).eps for tensor in self.gradient.values())
        within = LEAST_FACTOR_ERROR * eps
        power = (
            2.0 ** round(math.log2(factor)) if factor > 0 else 0.0
        )  # of a scaler, exact but for the fit's own rounding
        factor = power if abs(factor - power) <= 1e-12 * power else factor
        self.factor = None if off > within else 1.0 if abs(factor - 1) <= within else factor

    @property
    def cut(self) -> float | None:
        """The size that no entry is above, where all that were above it were set to it: clipping by value."""
        if self.private or self.factor is not None or set(self.left) != set(self.gradient):
            return None
        seen, again = flatten(self.gradient, self.gradient), flatten(self.left, self.gradient)
        most = float(seen.abs().max())
        eps = max(torch.finfo(tensor.dtype).eps for tensor in self.gradient.values())
        same = torch.allclose(seen, again.clamp(-most, most), rtol=LEAST_FACTOR_ERROR * eps, atol=0)
        return most if same else None

    def seen_of_the_batch(self, input_shape: tuple[int, ...] | None, batch_size: int | None) -> Knowledge:
        """Shape, number and kind of the inputs, as given or else as the forward passes had them; the model's mode."""
        shapes = {shape[1:] for shape in self.shapes}
        told: dict[str, Any] = {"mode": self.mode}
        if input_shape is None and len(shapes) == 1:
            input_shape = next(iter(shapes))
        if batch_size is None and self.shapes:
            batch_size = sum(shape[0] for shape in self.shapes)
        given = {"input_shape": input_shape, "batch_size": batch_size, "domain": "tokens" if self.tokens else None}
        return Knowledge(**{name: value for name, value in given.items() if value is not None}, **told)

    def step_of_the_parameters(self) -> tuple[dict[str, Tensor], Knowledge]:
        """The difference as one of a step with one learning rate and weight decay, and the protocol that it is of."""
        protocols = [_protocol(self.kind, group, self.fresh) for group in self.settings]
        first = protocols[self.group_of[next(iter(self.gradient))]]
        of = {name: protocols[self.group_of[name]] for name in self.difference}
        update = {name: t * (first.learning_rate / of[name].learning_rate) for name, t in self.difference.items()}
        decays = {protocol.weight_decay for protocol in of.values()}
        if self.kind is torch.optim.Adam and len(decays) > 1:
            raise UnbatchError(
                f"Adam adds {' and '.join(f'{d:g}' for d in sorted(decays))} of the weights to its groups' gradients, and "
                "divides by the sum's size, so that no step of one weight decay is the same; take sent='gradient'."
            )
        if self.kind is not torch.optim.Adam and any(decays):
            before = dict(self.model.named_parameters())
            for name, tensor in update.items():
                shrunk = first.learning_rate * of[name].weight_decay
                update[name] = tensor + shrunk * before[name].detach().to(tensor)
            first = first.model_copy(update={"weight_decay": 0.0})
        numbers = {name: value for name, value in first if value not in (None, 0.0) and name != "mode"}
        return update, Knowledge(**numbers)

    def done_to_the_gradient(
        self, update: dict[str, Tensor], known: Knowledge, sent: Sent
    ) -> tuple[dict[str, Tensor], Stack, str]:
        """What was done between backward and step: the update, the defences that do it, or words where none does."""
        if self.private is not None:
            scale, spelt, altered = self.private.told(known.get("batch_size"))
            if sent == "difference" and self.kind is not torch.optim.SGD:
                altered = altered or "clipping and noise within a step of Adam"
            scaled = {name: tensor * scale for name, tensor in update.items()} if scale != 1 else update
            return scaled, Stack.of(spelt), altered
        if self.factor == 1:
            return update, Stack(), ""
        if self.factor is not None and 0 < self.factor < 1:
            if sent == "difference" and self.kind is not torch.optim.SGD:
                return update, Stack(), "clipping of the gradient within a step of Adam"
            return update, Stack.of(f"clip:norm={float(flatten(update, update).norm())}"), ""
        return update, Stack(), self._change()

    def _change(self) -> str:
        """What was done to the gradient that is no clipping by its norm, in words."""
        if self.factor is not None:
            return f"a factor of {self.factor:.4g}"
        return f"clipping of each entry to {cut:.4g}" if (cut := self.cut) else "an unknown change of the gradient"

    def notes(self) -> list[str]:
        """What there is to know of this step, in sentences."""
        said = list[str]()
        if self.passes > 1:
            said.append(
                f"The gradient is the sum of {self.passes} backward passes. Where the loop does not divide each loss by "
                f"{self.passes}, give observation() the loss times {self.passes}. Batch statistics were each pass's own."
            )
        if self.scale is not None:
            said.append(
                f"The gradient was divided by {self.scale:g} between backward and step, as a GradScaler does, and taken so."
                if self.guessed
                else f"The scaler's factor of {self.scale:g} was taken off."
            )
        if self.autocast:
            said.append(f"The forward pass ran in {self.autocast}, and the gradient is as coarse as that.")
        said += self.private.notes if self.private else []
        if not self.private and self.factor != 1:
            size = float(flatten(self.gradient, self.gradient).norm())
            said.append(
                f"Between backward and step the gradient was shortened by {self.factor:.4g}, to the norm {size:.4g}."
                if self.factor is not None and 0 < self.factor < 1
                else f"Between backward and step there was {self._change()}."
            )
        if not self.fresh:
            said.append(
                f"{self.optimiser} had a state from earlier steps, which is in the difference of parameters as well."
            )
        missing = [n for n, p in self.model.named_parameters() if p.requires_grad and n not in self.group_of]
        if missing:
            said.append(f"No parameters of the optimiser, and not in the update: {some(missing)}.")
        if self.strangers:
            said.append(f"The optimiser moved parameters that are not the model's, too: {', '.join(self.strangers)}.")
        return said


class _Watch:
    """The hooks on a loop, and what they saw."""

    def __init__(
        self, model: nn.Module, inner: torch.optim.Optimizer, scaler: Any, private: PrivateStep | None
    ) -> None:
        self.model, self.inner, self.scaler, self.private = model, inner, scaler, private
        own = {id(p): name for name, p in model.named_parameters()}
        held = [(number, p) for number, group in enumerate(inner.param_groups) for p in group["params"]]
        self.trained = {own[id(p)]: p for _, p in held if id(p) in own}
        self.groups = {own[id(p)]: number for number, p in held if id(p) in own}
        self.strangers = [f"{tuple(p.shape)}" for _, p in held if id(p) not in own]
        if not self.trained:
            raise UnbatchError(
                f"none of the {len(held)} parameters of the optimiser is one of {type(model).__name__}'s: it was made for "
                "another model, or before this one's parameters were replaced. Give a model and its own optimiser."
            )
        self.before = copied(model)
        self.passes = dict[str, int]()
        self.left, self.gradient = dict[str, Tensor](), dict[str, Tensor]()
        self.after, self.buffers = dict[str, Tensor](), dict[str, Tensor]()
        self.shapes, self.tokens, self.autocast = list[tuple[int, ...]](), False, ""
        self.steps, self.passes_before, self.evaluations, self.fresh = 0, 0, 0, True
        self.scale: float | None = None
        self.mode = "train" if model.training else "eval"
        self.settings = list[dict[str, Any]]()

    def hook(self, hooks: ExitStack) -> None:
        """Hang on to the model and the optimiser until `hooks` is closed."""
        for name, p in self.trained.items():
            if p.requires_grad:
                handle = p.register_post_accumulate_grad_hook(lambda p, name=name: self._backward(name, p))
                hooks.callback(handle.remove)
        for handle in (
            self.model.register_forward_pre_hook(self._forward, with_kwargs=True),
            self.inner.register_step_pre_hook(self._before_the_step),
            self.inner.register_step_post_hook(self._after_the_step),
        ):
            hooks.callback(handle.remove)

    def _forward(self, _: nn.Module, args: tuple[Any, ...], given: Mapping[str, Any]) -> None:
        if self.steps or not torch.is_grad_enabled():
            return
        first = next((t for t in (*args, *given.values()) if isinstance(t, Tensor)), None)
        if first is not None and first.ndim:
            self.shapes.append(tuple(first.shape))
            self.tokens = not first.is_floating_point()
        self.mode = "train" if self.model.training else "eval"
        if first is not None and hasattr(torch, "get_autocast_dtype") and torch.is_autocast_enabled(first.device.type):
            self.autocast = str(torch.get_autocast_dtype(first.device.type)).removeprefix("torch.")

    def _backward(self, name: str, parameter: Tensor) -> None:
        if not self.steps and parameter.grad is not None:
            self.passes[name] = self.passes.get(name, 0) + 1
            self.left[name] = parameter.grad.detach().clone()

    def _before_the_step(self, inner: torch.optim.Optimizer, *_: Any) -> None:
        if self.steps:
            return
        self.passes_before = max(self.passes.values(), default=0)
        self.settings = [{key: _number(v) for key, v in g.items() if key != "params"} for g in inner.param_groups]
        if self.private:
            self.private.at_the_step()
        self.fresh = not any(_used(inner.state.get(p, {})) for p in self.trained.values())
        held = getattr(inner, "grad_scale", None)  # fused optimisers take the scaler's factor off themselves
        if self.scaler is not None and self.scaler.is_enabled():
            self.scale = float(self.scaler.get_scale())
        elif held is not None:
            self.scale = float(held)
        self._keep(1.0 if held is None else float(held))

    def _keep(self, scale: float) -> None:
        self.gradient = {
            name: (p.grad / scale if scale != 1 else p.grad).detach().clone()
            for name, p in self.trained.items()
            if p.grad is not None
        }

    def _after_the_step(self, inner: torch.optim.Optimizer, *_: Any) -> None:
        self.steps += 1
        if self.steps > 1:
            return
        if float(getattr(inner, "found_inf", None) or 0.0):  # a fused optimiser that left the step out
            self.steps, self.left = 0, {name: torch.full_like(t, torch.inf) for name, t in self.left.items()}
            return
        self.evaluations = max(self.passes.values(), default=0) - self.passes_before
        if self.evaluations:  # a closure ran in the step
            self._keep(1.0)
        self.after = {name: p.detach().clone() for name, p in self.trained.items()}
        self.buffers = {name: t.detach().clone() for name, t in self.model.named_buffers()}

    def record(self) -> _Record:
        """What was seen. Raises UnbatchError: not one step, or one without a gradient."""
        self._check()
        model = self.before
        scale = self.scale or 1.0
        names = dict(model.named_parameters())
        held = {
            name: names[name].detach() for name in as_update(model, {n: p.detach() for n, p in self.trained.items()})
        }
        gradient = as_update(model, self.gradient)
        buffers = {name.rpartition("_module.")[2]: t for name, t in self.buffers.items()}
        return _Record(
            model=model,
            optimiser=type(self.inner).__name__,
            kind=type(self.inner),
            settings=self.settings,
            group_of=dict(zip(held, self.groups.values(), strict=True)),
            fresh=self.fresh,
            gradient=gradient,
            left={name: t / scale if scale != 1 else t for name, t in as_update(model, self.left).items()},
            difference={n: t for n, t in as_update(model, self.after, before=held).items() if n in gradient},
            buffers=buffers,
            passes=max(1, max(self.passes.values(), default=1) // (self.private.backwards if self.private else 1)),
            scale=self.scale,
            private=self.private,
            mode=self.mode,
            shapes=self.shapes,
            tokens=self.tokens,
            autocast=self.autocast,
            strangers=self.strangers,
        )

    def _check(self) -> None:
        if self.steps > 1:
            raise UnbatchError(
                f"the block took {self.steps} steps, and capture is of one; put a block round each. What several steps "
                "send together is as_update(model, after, before=before), with Knowledge(local_steps=...)."
            )
        if not self.steps and not self.passes:
            raise UnbatchError(
                "no step was taken in the block, and no backward pass ran; put loss.backward() and optimiser.step() in it."
            )
        if not self.steps and not all(bool(t.isfinite().all()) for t in self.left.values()):
            raise UnbatchError(
                "no step was taken in the block: its gradients hold NaN or infinite entries, and a GradScaler then leaves "
                "the step out. Capture a step after the scale has settled."
            )
        if not self.steps:
            raise UnbatchError(
                f"no step was taken in the block by the optimiser that was given ({type(self.inner).__name__}), though "
                "backward ran; put optimiser.step() in the block, and give capture the optimiser that steps. While "
                "gradients are accumulated, put the block round all passes up to the step."
            )
        if self.evaluations > 1:
            raise UnbatchError(
                f"{type(self.inner).__name__} ran its closure {self.evaluations} times in one step, so that there is no "
                "gradient of the step; what it sends is as_update(model, after, before=before)."
            )
        if not self.gradient:
            raise UnbatchError(
                "the step was taken without a gradient: p.grad is None of every parameter. Put loss.backward() before "
                "optimiser.step(), and optimiser.zero_grad() before both."
            )


def copied(model: nn.Module) -> nn.Module:
    """A copy of a model without what wraps it, its gradients and Opacus' hooks. Raises UnbatchError: it cannot be copied.

    >>> model = nn.Linear(1, 1)
    >>> copied(nn.DataParallel(model))
    Linear(in_features=1, out_features=1, bias=True)
    """
    try:
        return without_opacus_hooks(copy.deepcopy(unwrapped(model)))
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise UnbatchError(
            f"the model cannot be copied ({' '.join(str(error).split())[:160]}), and capture keeps it as it was before the "
            "step. Tensors that a forward pass left in its modules are in the way (as by the old weight_norm; "
            "torch.nn.utils.parametrizations has one without), or handles of other libraries: take them out first."
        ) from error


def _within(optimiser: Any, scaler: Any) -> tuple[torch.optim.Optimizer, Any, PrivateStep | None]:
    """The optimiser in what wraps it, the scaler, as given or as a wrapper has it, and what Opacus does in its step."""
    private: PrivateStep | None = None
    while found := next((INNER[kind.__name__] for kind in type(optimiser).__mro__ if kind.__name__ in INNER), None):
        scaler = scaler or getattr(optimiser, "scaler", None)
        private = private_step(optimiser) or private
        optimiser = getattr(optimiser, found)
    if not isinstance(optimiser, torch.optim.Optimizer):
        raise UnbatchError(
            f"the optimiser is a {type(optimiser).__name__}, and no torch.optim.Optimizer, whose steps can be watched."
        )
    return optimiser, scaler, private


def _number(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else value


def _used(state: Mapping[str, Any]) -> bool:
    """Whether an optimiser's state of a parameter is one that an earlier step left."""
    held = [v for key, v in state.items() if key != "step" and isinstance(v, Tensor)]
    return float(state.get("step", 0)) > 0 or any(bool(tensor.any()) for tensor in held)


def _protocol(kind: type[torch.optim.Optimizer], group: Mapping[str, Any], fresh: bool) -> Protocol:
    """The protocol of a first step with one group's settings. Raises UnbatchError: it is none, and why."""
    instead = "take sent='gradient', which is what the optimiser was given"
    if kind not in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
        raise UnbatchError(f"a step of {kind.__name__} is none of SGD, Adam or AdamW, which are simulated; {instead}.")
    if not fresh:
        raise UnbatchError(
            f"{kind.__name__} had a state from earlier steps, which this exchange does not tell, so that the difference of "
            f"parameters is not that of a first step; capture the first step of a new optimiser, or {instead}."
        )
    rate = float(group["lr"])
    if not rate > 0:
        raise UnbatchError(
            f"the learning rate of this step is {rate:g} (a warm-up?), so that nothing moved; {instead}."
        )
    if group.get("maximize"):
        raise UnbatchError(f"the optimiser maximises the loss; give its negative to one that minimises, or {instead}.")
    decay = float(group.get("weight_decay", 0.0))
    if kind is torch.optim.SGD:
        # v = g in a first step, whatever the dampening; Nesterov's step is g + momentum v.
        rate *= 1 + group["momentum"] if group.get("nesterov") else 1
        return Protocol(local_steps=1, learning_rate=rate, weight_decay=decay)
    if group["eps"] != ADAM_EPS:
        raise UnbatchError(
            f"{kind.__name__} has eps={group['eps']:g}, and steps are simulated at {ADAM_EPS:g}; {instead}."
        )
    # Of a first step betas and amsgrad make no difference: both moments are corrected to g and g^2.
    adam: Literal["adam", "adamw"] = "adamw" if kind is torch.optim.AdamW else "adam"
    return Protocol(local_steps=1, optimiser=adam, learning_rate=rate, weight_decay=decay)
