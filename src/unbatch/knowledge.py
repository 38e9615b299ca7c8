"""Knowledge: what the attacker knows besides the update."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints

import torch
from torch import Tensor

from unbatch.errors import UnbatchError, Unknown
from unbatch.privacy import Privacy
from unbatch.protocol import Protocol, Update


def shares(n: int, clients: int) -> list[int]:
    """How many of n examples each client gets: as even as can be, the first ones one more (torch.tensor_split).

    >>> shares(5, 2)
    [3, 2]
    """
    return [n // clients + (i < n % clients) for i in range(clients)]


@dataclass(frozen=True, kw_only=True, repr=False)
class Earlier:
    """An earlier round in which the client sent an update of the same batch, as the server kept it."""

    state: Mapping[str, Tensor]  # the global model's state_dict before it: parameters, and the buffers of the step
    update: Update

    def __repr__(self) -> str:
        return f"<Earlier: an update of {len(self.update)} tensors>"


class Knowledge:
    """What the attacker knows besides the update: any subset of the fields below, by keyword.

    Reading a field that is not known raises Unknown; a name that is no field raises UnbatchError wherever it is used.
    `a | b` is both, where both know a field the right one's.

    >>> known = Knowledge(batch_size=4, input_shape=(3, 8, 8))
    >>> known.batch_size, "labels" in known
    (4, False)
    >>> try:
    ...     known.labels
    ... except Unknown as error:
    ...     print(error)
    the attacker does not know 'labels'; known: batch_size, input_shape.
    """

    input_shape: tuple[int, ...]  # of one example
    batch_size: int
    labels: Tensor
    public: Tensor  # [p, *input_shape] examples like the private ones, which anybody has
    public_labels: Tensor  # theirs [p, ...]
    input_range: tuple[float, float]  # of tokens: 0 and the vocabulary's last number
    padding: int  # of tokens: the number that fills short sequences up behind their end, and says nothing
    domain: str
    categories: tuple[tuple[int, ...], ...]  # of a table: columns that are one category, a 1 in one of them
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
    sends_buffers: bool  # whether the client sends its buffers after its steps, too
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
    initial: Mapping[str, Tensor]  # of a released model: its parameters before training, by name
    known_inputs: Tensor  # of a released model: training examples [k, *input_shape] besides the private batch
    known_labels: Tensor  # theirs [k, ...]
    recipe: Mapping[str, Any]  # of the training, such as {"weight_decay": 0.01}: see `Training.recipe`
    candidates: Tensor  # examples [c, *input_shape] of which it is asked whether the model was trained on them

    def __init__(self, **known: Any) -> None:
        check_fields(known)
        for name in known:
            _hold(name, known[name])
        if "input_shape" in known:
            known["input_shape"] = tuple(int(side) for side in known["input_shape"])
            if min(known["input_shape"], default=1) < 1:
                raise UnbatchError(f"input_shape {known['input_shape']} has an empty side.")
            if math.prod(known["input_shape"]) > MOST_ENTRIES:
                raise UnbatchError(f"input_shape {known['input_shape']} is of more entries than fit any memory.")
        if "input_range" in known:
            low, high = known["input_range"] = tuple(float(end) for end in known["input_range"])
            if not low < high:
                raise UnbatchError(f"input_range ({low}, {high}) must be (low, high) with low < high.")
        if "categories" in known:
            known["categories"] = _groups(known["categories"], known.get("input_shape"))
        if "earlier" in known:
            known["earlier"] = held = tuple(known["earlier"])
            if not held or not all(isinstance(past, Earlier) for past in held):
                raise UnbatchError(
                    f"earlier holds {len(held)} rounds; give one or more, as Earlier(state=..., update=...), or none of it."
                )
            if 1 + len(held) > known.get("rounds", math.inf):
                raise UnbatchError(f"rounds is {known['rounds']}, and with this one there are {1 + len(held)} of them.")
        if "labels" in known:
            known["labels"] = torch.as_tensor(known["labels"])
            if known["labels"].ndim == 0 or len(known["labels"]) != known.get("batch_size", len(known["labels"])):
                shape = tuple(known["labels"].shape)
                raise UnbatchError(f"labels of shape {shape} do not fit batch_size {known.get('batch_size')}.")
        _hold_examples(known)
        vars(self).update(known)

    def __getattr__(self, name: str) -> Any:
        if name in FIELDS:
            raise Unknown(f"the attacker does not know {name!r}; known: {', '.join(self) or 'nothing'}.")
        raise Unknown(_no_field(name))

    def __contains__(self, name: str) -> bool:
        check_fields([name])
        return name in vars(self)

    def __iter__(self) -> Iterator[str]:
        return iter(vars(self))

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a field, or `default` where it is not known. Raises UnbatchError: there is no such field.

        >>> Knowledge(batch_size=4).get("clients", 1)
        1
        """
        check_fields([name])
        return vars(self).get(name, default)

    def only(self, *names: str) -> Knowledge:
        """The part of this knowledge that `names` names. Raises UnbatchError: one of them is no field.

        >>> Knowledge(batch_size=4, mode="eval").only("mode", "labels")
        Knowledge(mode='eval')
        """
        check_fields(names)
        return Knowledge(**{name: value for name, value in vars(self).items() if name in names})

    def after(self, defence: str, *, alone: bool = False) -> Knowledge:
        """What is known once `defence` (its spelling) has changed the update in a way that no simulation of it follows.

        `altered` names the defence, and `clip` is not known any more: the update as sent need not be that short. With
        `alone` the defence looked at nothing but the update, and drew its own random numbers. Whatever it makes of a noisy
        update then tells no more of the batch than the noisy update did, so a bound for that one still holds: its noise
        and clip stay known, as `noise_within` and `clip_within`.

        >>> Knowledge(noise=0.1, clip=2.0).after("prune:share=0.5", alone=True)
        Knowledge(noise=0.1, altered='prune:share=0.5', noise_within=0.1, clip_within=2.0)
        """
        told = ", ".join([*([self.altered] if "altered" in self else []), defence])
        within = ("noise", "clip") if alone and self.get("noise") and "altered" not in self else ()
        kept = {f"{name}_within": self.get(name) for name in within if name in self}
        return self.only(*(set(self) - {"clip"})) | Knowledge(altered=told, **kept)

    def without(self, *names: str) -> Knowledge:
        """All but what `names` name. Raises UnbatchError: one of them is no field.

        >>> Knowledge(batch_size=4, mode="eval").without("batch_size")
        Knowledge(mode='eval')
        """
        check_fields(names)
        return self.only(*(set(self) - set(names)))

    def server_sign(self) -> float:
        """The sign with which the server moves its parameters along the update: +1 or -1.

        It adds a difference of parameters, which local steps send, and subtracts a gradient.

        >>> Knowledge(local_steps=4).server_sign(), Knowledge(local_steps=0).server_sign()
        (1.0, -1.0)
        """
        return 1.0 if self.get("local_steps") or self.get("epochs") else -1.0

    def __or__(self, more: Knowledge) -> Knowledge:
        """Both; where both know a field, the right one's."""
        return Knowledge(**(vars(self) | vars(more)))

    def __repr__(self) -> str:
        return f"Knowledge({', '.join(f'{k}={_brief(v)}' for k, v in vars(self).items())})"


FIELDS: tuple[str, ...] = tuple(get_type_hints(Knowledge))
PROTOCOL_FIELDS: frozenset[str] = frozenset(Protocol.model_fields)
DOMAIN_FIELDS: frozenset[str] = frozenset({"domain", "input_range", "categories", "padding"})  # what the inputs are


def check_fields(names: Iterable[str]) -> None:
    """Hold names to be fields of Knowledge: what an attacker knows must not hang on a slip of the pen.

    Raises UnbatchError: one of them is not; the message names the nearest field.

    >>> try:
    ...     check_fields(["labels", "lables"])
    ... except UnbatchError as error:
    ...     print(str(error).partition(" Fields")[0])
    Knowledge has no field 'lables'. Did you mean 'labels'?
    """
    for name in names:
        if name not in FIELDS:
            raise UnbatchError(_no_field(name))


MOST_ENTRIES = 10**10  # of one example: 40 GB in float32
_LEAST = {
    "batch_size": 1,
    "padding": 0,
    "local_steps": 0,
    "epochs": 1,
    "local_batch_size": 1,
    "rounds": 1,
    "clients": 1,
}
_SIZES = ("noise", "noise_within", "clip", "clip_within", "mixup", "momentum", "weight_decay", "server_rate")
_TEXTS = ("domain", "optimiser", "mode", "altered")
_EXAMPLES = {"known_inputs": "known_labels", "public": "public_labels", "candidates": ""}  # and labels
_TENSORS = {name for pair in _EXAMPLES.items() for name in pair if name}
_WEIGHT_DECAY = "weight_decay"  # of a recipe, the one number that the objective depends on


def _hold(name: str, value: Any) -> None:
    """Raises UnbatchError unless the value can be one of that field: off a file or a command line it may be anything."""
    wanted, good = "", True
    if name in _LEAST:
        wanted, good = (
            f"a whole number of at least {_LEAST[name]}",
            _is_number(value) and value == int(value) >= _LEAST[name],
        )
    elif name in _SIZES:
        wanted, good = "a number from 0 on", _is_number(value, inf=True) and value >= 0
    elif name == "learning_rate":
        wanted, good = "a finite number", _is_number(value)
    elif name == "sends_buffers":
        wanted, good = "true or false", isinstance(value, bool)
    elif name in _TEXTS:
        wanted, good = "a text", isinstance(value, str)
    elif name == "input_shape":
        wanted, good = "the sides of one example, whole numbers", _are_numbers(value)
    elif name == "input_range":
        wanted, good = "two numbers (low, high)", _are_numbers(value) and len(value) == 2
    elif name == "categories":
        wanted = "groups of columns, whole numbers"
        good = isinstance(value, Iterable) and not isinstance(value, str | Mapping) and all(map(_are_numbers, value))
    elif name == "labels":
        wanted = "numbers, one or a row for each example"
        good = isinstance(value, Tensor) or _is_tensor(value)
    elif name == "public":
        wanted, good = "examples [p, *input_shape], as a tensor", isinstance(value, Tensor) and value.ndim >= 2
    elif name == "privacy":
        wanted, good = "a Privacy", isinstance(value, Privacy)
    elif name in ("buffers", "initial"):
        wanted, good = "a mapping from names to tensors", isinstance(value, Mapping)
    elif name in _TENSORS:
        wanted, good = "a tensor, a row for each example", isinstance(value, Tensor) and value.ndim > 0
    elif name == "recipe":
        wanted = 'a mapping from names to numbers or words, such as {"weight_decay": 0.01}'
        good = isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
        decay = value.get(_WEIGHT_DECAY, 0.0) if good else 0.0
        good = good and _is_number(decay) and decay >= 0
    elif name == "earlier":
        wanted, good = "rounds as Earlier(state=..., update=...)", isinstance(value, Iterable)
    elif name == "log_prob":
        wanted, good = "a function (seen, clean) -> logarithm of a likelihood", callable(value)
    if not good:
        shown = repr(value)
        raise UnbatchError(f"{name} is {shown if len(shown) <= 60 else type(value).__name__}; give {wanted}.")


def _hold_examples(known: Mapping[str, Any]) -> None:
    """Raises UnbatchError unless examples that are known have the shape of an input, and a label each."""
    for name, labels in _EXAMPLES.items():
        if name not in known:
            continue
        shape, given = tuple(known[name].shape), known.get("input_shape")
        if given is not None and shape[1:] != given:
            raise UnbatchError(
                f"{name} has the shape {shape}, and inputs have {given}: give [k, {', '.join(map(str, given))}]."
            )
        if labels in known and len(known[labels]) != shape[0]:
            raise UnbatchError(
                f"{name} are {shape[0]} examples, and {labels} has {len(known[labels])} rows; give one each."
            )


def _is_number(value: Any, *, inf: bool = False) -> bool:
    if isinstance(value, str | bytes | bool | Mapping):
        return False
    try:
        return math.isfinite(value) or (inf and math.isinf(value))
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return False


def _are_numbers(value: Any) -> bool:
    return not isinstance(value, str | Mapping) and isinstance(value, Iterable) and all(map(_is_number, value))


def _is_tensor(value: Any) -> bool:
    try:
        torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return False
    return True


def _groups(given: Iterable[Iterable[int]], shape: tuple[int, ...] | None) -> tuple[tuple[int, ...], ...]:
    groups = tuple(tuple(int(column) for column in group) for group in given)
    columns = [column for group in groups for column in group]
    most = math.prod(shape) if shape is not None else math.inf
    if not all(groups) or len(set(columns)) < len(columns) or not all(0 <= column < most for column in columns):
        raise UnbatchError(f"categories {groups} must be groups of columns of an input, none of them twice.")
    return groups


def _no_field(name: str) -> str:
    near = difflib.get_close_matches(name, FIELDS, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"Knowledge has no field {name!r}.{hint} Fields: {', '.join(FIELDS)}."


def _brief(value: object) -> str:
    if isinstance(value, Tensor):
        return f"<{value.dtype} {tuple(value.shape)}>"
    if isinstance(value, Mapping):
        plain = value and not any(isinstance(v, Tensor) for v in value.values())
        return str(dict(value)) if plain else f"<{len(value)} tensors>"
    if isinstance(value, tuple) and value and isinstance(value[0], Earlier):
        return f"<{len(value)} earlier round{'s' * (len(value) > 1)}>"
    return "<a function>" if callable(value) else repr(value)
