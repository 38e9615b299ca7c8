"""The boundary: what the server sees of one exchange, what it knows besides, and what an attack returns."""

from __future__ import annotations

import copy
import difflib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn

from unbatch.loss import Loss
from unbatch.protocol import Protocol, Update, fit, flatten, local_update


class Unknown(AttributeError):  # noqa: N818 (a question that has no answer, named for it)
    """Read something of Knowledge that the attacker does not know."""


@dataclass(frozen=True, kw_only=True)
class Privacy:
    """The parameters of a client's differentially private step."""

    clip: float
    noise_multiplier: float
    sampling_rate: float
    steps: int
    delta: float
    epsilon: float | None = None  # None: nobody has accounted for it
    accountant: str = ""

    def __str__(self) -> str:
        spent = "epsilon not accounted for" if self.epsilon is None else f"epsilon {self.epsilon:.4g}"
        return (
            f"{spent} at delta {self.delta:g}, clip {self.clip:g}, noise multiplier {self.noise_multiplier:g}, "
            f"sampling rate {self.sampling_rate:g}, steps {self.steps}"
        )

    def deviation(self, sizes: Sequence[int]) -> float:
        """Of every entry of a sum of gradients, each noised by itself and divided by its batch's size."""
        return self.clip * self.noise_multiplier * math.sqrt(sum(1 / size**2 for size in sizes))


def shares(n: int, clients: int) -> list[int]:
    """Sizes of the shares that n examples are dealt in, as torch.tensor_split does."""
    return [n // clients + (i < n % clients) for i in range(clients)]


@dataclass(frozen=True, kw_only=True, repr=False)
class Earlier:
    """An earlier round in which the client sent an update of the same batch."""

    state: Mapping[str, Tensor]  # the global model's state_dict before it: parameters, and the buffers of the step
    update: Update

    def __repr__(self) -> str:
        return f"<an update of {len(self.update)} tensors>"


class Knowledge:
    """What the attacker knows besides the update: any subset, by keyword. Reading anything else raises Unknown."""

    input_shape: tuple[int, ...]  # of one example
    batch_size: int
    labels: Tensor
    input_range: tuple[float, float]
    domain: str
    local_steps: int
    epochs: int
    local_batch_size: int
    optimiser: str
    learning_rate: float
    momentum: float
    weight_decay: float
    mode: str  # "train" or "eval": batch norm and dropout during the client's step
    rounds: int  # in which the client sends an update of the same batch
    server_rate: float  # by which the server moves the model along each of them
    earlier: tuple[Earlier, ...]  # those of the rounds before this one that the server kept, first to last
    clients: int  # whose updates are summed, under secure aggregation
    clip: float  # l2 norm that the whole update is shortened to before its noise
    altered: str  # the defences that change the update in ways that no simulation of it follows
    noise_within: float  # standard deviation of every entry of the update before those changed it, looking at it alone
    clip_within: float  # l2 norm that the whole update was shortened to before that noise
    mixup: float  # alpha of the Beta law by which the client blends its examples
    buffers: Mapping[str, Tensor]  # batch norm statistics, where the protocol sends them: in train mode after the step
    noise: float  # standard deviation of each entry of the update as sent
    privacy: Privacy
    log_prob: Callable[[Update, Update], Tensor]  # the defence's likelihood (seen, clean)

    def __init__(self, **known: Any) -> None:
        for name in known:
            if name not in FIELDS:
                near = difflib.get_close_matches(name, FIELDS, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"Knowledge has no field {name!r}.{hint} Fields: {', '.join(FIELDS)}.")
        if "input_shape" in known:
            known["input_shape"] = tuple(int(side) for side in known["input_shape"])
            if min(known["input_shape"], default=1) < 1:
                raise ValueError(f"input_shape {known['input_shape']} has an empty side.")
        if "input_range" in known:
            low, high = known["input_range"] = tuple(float(end) for end in known["input_range"])
            if not low < high:
                raise ValueError(f"input_range ({low}, {high}) must be (low, high) with low < high.")
        if "earlier" in known:
            known["earlier"] = held = tuple(known["earlier"])
            if not held or not all(isinstance(past, Earlier) for past in held):
                raise ValueError(
                    f"earlier holds {len(held)} rounds; give one or more, as Earlier(state=..., update=...), or none of it."
                )
            if 1 + len(held) > known.get("rounds", math.inf):
                raise ValueError(f"rounds is {known['rounds']}, and with this one there are {1 + len(held)} of them.")
        if known.get("rounds", 1) < 1:
            raise ValueError(f"rounds is {known['rounds']}; it is at least 1.")
        if known.get("batch_size", 1) < 1:
            raise ValueError(f"batch_size is {known['batch_size']}; it is at least 1.")
        if "labels" in known:
            known["labels"] = torch.as_tensor(known["labels"])
            if known["labels"].ndim == 0 or len(known["labels"]) != known.get("batch_size", len(known["labels"])):
                shape = tuple(known["labels"].shape)
                raise ValueError(f"labels of shape {shape} do not fit batch_size {known.get('batch_size')}.")
        vars(self).update(known)

    def __getattr__(self, name: str) -> Any:
        raise Unknown(f"the attacker does not know {name!r}; known: {', '.join(self) or 'nothing'}.")

    def __contains__(self, name: str) -> bool:
        return name in vars(self)

    def __iter__(self) -> Iterator[str]:
        return iter(vars(self))

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a field, or `default` where it is not known."""
        return vars(self).get(name, default)

    def only(self, *names: str) -> Knowledge:
        """The part of this knowledge that `names` names."""
        return Knowledge(**{name: value for name, value in vars(self).items() if name in names})

    def after(self, defence: str, *, alone: bool = False) -> Knowledge:
        """The same once `defence` has changed the update in a way that `Observation.simulate` does not follow.

        `alone`: it looked at nothing but the update (and drew its own random numbers). What it makes of a noisy update
        tells no more of the batch than that one, whose noise and clip therefore stay known.
        """
        told = ", ".join([*([self.altered] if "altered" in self else []), defence])
        within = ("noise", "clip") if alone and self.get("noise") and "altered" not in self else ()
        kept = {f"{name}_within": self.get(name) for name in within if name in self}
        return self.only(*(set(self) - {"clip"})) | Knowledge(altered=told, **kept)

    def without(self, *names: str) -> Knowledge:
        """All but what `names` name."""
        return self.only(*(set(self) - set(names)))

    def __or__(self, more: Knowledge) -> Knowledge:
        """Both; where both know a field, the right one's."""
        return Knowledge(**(vars(self) | vars(more)))

    def __repr__(self) -> str:
        return f"Knowledge({', '.join(f'{k}={_brief(v)}' for k, v in vars(self).items())})"


FIELDS: tuple[str, ...] = tuple(get_type_hints(Knowledge))
PROTOCOL_FIELDS: frozenset[str] = frozenset(Protocol.model_fields)


@dataclass(frozen=True, kw_only=True)
class Observation:
    """One exchange as the server sees it.

    `model` is the global model before the client's step. `update` is keyed as `named_parameters()` and may hold any
    subset of them (frozen layers send nothing): the gradient, or after local steps the difference of parameters.
    Earlier rounds of the same batch are knowledge (`earlier`), and each an exchange of its own in `exchanges`.
    Raises ValueError where an update does not belong to the model.
    """

    model: nn.Module
    loss: Loss
    update: Update
    knowledge: Knowledge = field(default_factory=Knowledge)

    def __post_init__(self) -> None:
        check_update(self.model, self.update)
        for number, past in enumerate(self.knowledge.get("earlier", ()), 1):
            try:
                check_round(self.model, self.update, past)
            except ValueError as error:
                raise ValueError(f"earlier round {number}: {error}") from None

    @property
    def protocol(self) -> Protocol:
        """The client's protocol as far as it is known; the rest at its defaults, batch norm as the model's own mode."""
        known = {name: self.knowledge.get(name) for name in PROTOCOL_FIELDS if name in self.knowledge}
        return Protocol(**({"mode": "train" if self.model.training else "eval"} | known))

    @property
    def device(self) -> torch.device:
        return next(iter(self.update.values())).device

    @property
    def dtype(self) -> torch.dtype:
        """The least precise floating type in the update."""
        return max((t.dtype for t in self.update.values()), key=lambda dtype: torch.finfo(dtype).eps)

    @property
    def exchanges(self) -> tuple[Observation, ...]:
        """Every round of this batch that is known, as an exchange by itself, this one last.

        Rounds at one state share a model. Buffers that are known besides the model's are those of this round's step.
        """
        known = set(self.knowledge) - {"earlier"}
        found, last = list[Observation](), self.only(*known)
        for past in self.knowledge.get("earlier", ()):
            like = [o for o in (last, *found[-1:]) if _at(o.model, past.state) and "buffers" not in o.knowledge]
            model = like[0].model if like else copy.deepcopy(self.model)
            if not like:
                model.load_state_dict(dict(past.state))
            update = {name: past.update[name].to(self.device) for name in self.update}
            found.append(replace(last, model=model, update=update, knowledge=self.knowledge.only(*known - {"buffers"})))
        return (*found, last)

    def only(self, *names: str) -> Observation:
        """The same exchange for an attacker who knows only the named fields."""
        return replace(self, knowledge=self.knowledge.only(*names))

    def simulate(self, inputs: Tensor, labels: Tensor, *, create_graph: bool = False) -> dict[str, Tensor]:
        """The update that this protocol's honest client would have sent for these inputs and labels."""
        shares = self.knowledge.get("clients", 1)  # under secure aggregation, the sum over the clients' shares
        each = [
            local_update(
                self.model,
                self.loss,
                x,
                y,
                self.protocol,
                trained=list(self.update),
                buffers=self.knowledge.get("buffers"),
                create_graph=create_graph,
            )
            for x, y in zip(inputs.tensor_split(shares), labels.tensor_split(shares), strict=True)
            if len(x)
        ]
        return each[0] if len(each) == 1 else {k: torch.stack([u[k] for u in each]).sum(0) for k in each[0]}

    def residual(self, inputs: Tensor, labels: Tensor) -> float:
        """|update - simulated| / |update|, l2 over all entries, summed in float64. 0: they explain the update."""
        u, s = self._flat(inputs, labels)
        size = float(u.norm())
        return float((u - s).norm()) / size if size else float(s.any())

    def fit(self, inputs: Tensor, labels: Tensor) -> tuple[float, float]:
        """The factor c that fits best, and |update - c simulated| / |update|: what the residual is up to scale.

        Clipping, a learning rate and a sign are such factors.
        """
        return fit(*self._flat(inputs, labels))

    def _flat(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        dtype = next(self.model.parameters()).dtype
        again = self.simulate(inputs.to(self.device, dtype), labels.to(self.device))
        return flatten(self.update, self.update), flatten(again, self.update)

    def save(self, path: str | Path) -> None:
        """Write a bundle (docs/bundle-format.md). Callables, such as a likelihood, are not written."""
        from unbatch.bundle import write

        write(self, Path(path))

    @classmethod
    def load(cls, path: str | Path, *, model: nn.Module, loss: Loss) -> Observation:
        """Read a bundle; the parameters and buffers in it are loaded into a copy of `model`."""
        from unbatch.bundle import read

        return read(Path(path), model=model, loss=loss)


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """What an attack read out of an observation: k examples, which need not be as many as the batch has."""

    inputs: Tensor | None  # [k, *shape]; None for an attack on labels alone
    labels: Tensor | None = None  # [k]
    layer: str = ""  # the module whose inputs these are; "" = the network's own
    up_to: frozenset[str] = frozenset({"permutation"})  # also "sign", "scale": what cannot be known
    bound: Tensor | None = None  # [k] largest |error| / |returned example|, l2; inf = a guess, no claim
    trace: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        held = self.inputs if self.inputs is not None else self.labels
        return 0 if held is None else len(held)


def certified(found: Reconstruction) -> Reconstruction:
    """The examples with a finite bound."""
    if found.inputs is None or found.bound is None:
        return found
    sure = found.bound.isfinite()
    labels = None if found.labels is None else found.labels[sure.to(found.labels.device)]
    return replace(found, inputs=found.inputs[sure.to(found.inputs.device)], labels=labels, bound=found.bound[sure])


def check_update(model: nn.Module, update: Update) -> None:
    """Raise ValueError, saying what is off, unless `update` has the names and shapes of the model's parameters."""
    parameters = dict(model.named_parameters())
    if not update:
        raise ValueError("the update is empty; it maps parameter names to tensors, as named_parameters() does.")
    extra = [name for name in update if name not in parameters]
    if extra:
        prefixes = ("module.", "model.", "_orig_mod.", "_module.")
        cut = next((p for p in prefixes if any(name.removeprefix(p) in parameters for name in extra)), None)
        hint = f" Strip the prefix {cut!r} from its names." if cut else ""
        missing = [name for name in parameters if name not in update]
        raise ValueError(
            f"the update has names that the model has not: {_some(extra)}; the model also has {_some(missing)}.{hint} "
            "Key the update as dict(model.named_parameters())."
        )
    for name, tensor in update.items():
        shape = tuple(parameters[name].shape)
        if tuple(tensor.shape) != shape:
            hint = " It is the transpose." if tuple(tensor.shape) == shape[::-1] else ""
            raise ValueError(f"the update's {name!r} has shape {tuple(tensor.shape)}, the model's {shape}.{hint}")
        if not tensor.is_floating_point():
            raise ValueError(f"the update's {name!r} is {tensor.dtype}; updates are floating point.")
        bad = int((~tensor.isfinite()).sum())
        if bad:
            raise ValueError(
                f"the update's {name!r} holds {bad} NaN or infinite entries of {tensor.numel()}; "
                "look for a diverged step or a half-precision overflow in the capture."
            )


def check_round(model: nn.Module, update: Update, past: Earlier) -> None:
    """Raise ValueError, saying what is off, unless the round's state is one of `model`, and its update like `update`."""
    check_update(model, past.update)
    if set(past.update) != set(update):
        raise ValueError(f"it holds the tensors {_some(list(past.update))}, this round {_some(list(update))}.")
    own = model.state_dict()
    if set(past.state) != set(own):
        odd = sorted(set(past.state) ^ set(own))
        raise ValueError(f"its state and the model's differ in {_some(odd)}; give the model's whole state_dict().")
    for name, tensor in past.state.items():
        if tensor.shape != own[name].shape:
            raise ValueError(
                f"its state's {name!r} has shape {tuple(tensor.shape)}, the model's {tuple(own[name].shape)}."
            )
        if not tensor.isfinite().all():
            raise ValueError(f"its state's {name!r} holds NaN or infinite entries.")


def _at(model: nn.Module, state: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(tensor, state[name].to(tensor)) for name, tensor in model.state_dict().items())


def _some(names: list[str], most: int = 4) -> str:
    shown = ", ".join(map(repr, names[:most])) or "none else"
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


def _brief(value: object) -> str:
    return f"<{value.dtype} {tuple(value.shape)}>" if isinstance(value, Tensor) else repr(value)
