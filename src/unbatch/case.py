"""Clients whose private batch is known, so that attacks on them can be judged."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Annotated, ClassVar, Literal, Self, final, get_args

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from unbatch.domain import Domain, Tokens, domain_of
from unbatch.errors import UnbatchError
from unbatch.knowledge import Knowledge
from unbatch.label_form import BROADCASTS, PROBES, LabelForm, label_words, loss_on_cpu, objection
from unbatch.loss import Loss, loss_named
from unbatch.models import small
from unbatch.models.channel_norm import NormName
from unbatch.models.parallel_adapter import adapted
from unbatch.network.embedded import token_table
from unbatch.network.unwrapped import unwrapped
from unbatch.plugin import Plugin
from unbatch.protocol import Protocol
from unbatch.training import Training


@dataclass(frozen=True, kw_only=True, repr=False)
class Setting:
    """One client: the global model, the loss, and the private batch that an audit tries to recover.

    Raises UnbatchError where they do not fit together: shapes, classes, values that are not finite, a failing forward.

    >>> Setting(
    ...     model=nn.Linear(4, 3),
    ...     loss=nn.functional.cross_entropy,
    ...     inputs=torch.zeros(2, 4),
    ...     labels=torch.tensor([0, 2]),
    ...     name="mine",
    ... )
    <Setting mine: 2 table [4], Linear of 15 parameters>
    """

    model: nn.Module
    loss: Loss
    inputs: Tensor  # [n, *input_shape]
    labels: Tensor  # [n, ...] as the loss takes them
    protocol: Protocol = field(default_factory=Protocol)
    training: Training | None = None  # to the end, after which the model is released; instead of the protocol's round
    knowledge: Knowledge = field(default_factory=Knowledge)  # beyond what the protocol makes known
    domain: Domain = None  # type: ignore[assignment]  # guessed from the inputs where not given
    classes: Sequence[str] = ()  # names of the labels
    notes: Sequence[str] = ()  # what was done to read the data, for the report
    name: str = "custom"

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", unwrapped(self.model))
        if not isinstance(self.inputs, Tensor) or not isinstance(self.labels, Tensor):
            several = isinstance(self.inputs, tuple | list | dict)
            raise UnbatchError(f"inputs and labels are tensors; {_SEVERAL if several else _CONVERT}")
        if self.inputs.ndim < 2 or not len(self.inputs):
            raise UnbatchError(f"inputs of shape {tuple(self.inputs.shape)} are no batch; give [n, ...] with n >= 1.")
        if len(self.labels) != len(self.inputs):
            raise UnbatchError(f"{len(self.labels)} labels for {len(self.inputs)} inputs; give one label an example.")
        bad = int((~self.inputs.isfinite()).sum()) if self.inputs.is_floating_point() else 0
        if bad:
            raise UnbatchError(f"inputs hold {bad} NaN or infinite values; clean the data first.")
        if self.domain is None:
            object.__setattr__(self, "domain", domain_of(self.inputs))
        self._try_forward()
        if isinstance(self.domain, Tokens) and not self.domain.bounded:
            object.__setattr__(self, "domain", _of_its_vocabulary(self.model, self.domain))

    def __repr__(self) -> str:
        size = sum(p.numel() for p in self.model.parameters())
        batch = f"{len(self.inputs)} {self.domain.name} {list(self.inputs.shape[1:])}"
        return f"<Setting {self.name}: {batch}, {type(self.model).__name__} of {size:,} parameters>"

    def _try_forward(self) -> None:
        shape = tuple(self.inputs.shape[1:])
        first = next(self.model.parameters(), None)
        if first is None:
            raise UnbatchError("the model has no parameters, so there is no gradient to audit.")
        bad = [name for name, tensor in self.model.state_dict().items() if _diverged(tensor)]
        if bad:
            more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
            raise UnbatchError(
                f"the model's {bad[0]!r}{more} holds NaN, as after training that diverged; give a "
                "model, or weights, of finite numbers."
            )
        flags = [(module, module.training) for module in self.model.modules()]
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                x = self.inputs[:2].to(first.device)
                x = x.to(first.dtype) if x.is_floating_point() else x
                given = x.clone()
                outputs = self.model.eval()(given)
        except Exception as error:
            words = (
                f"the model's forward fails on inputs of shape {shape}, {str(self.inputs.dtype).removeprefix('torch.')}"
            )
            said = f"{type(error).__name__}: {' '.join(str(error).split()).rstrip('.')}"
            mend = _rows_told(self.model, self.inputs) if isinstance(error, IndexError) else ""
            if isinstance(error, TypeError) and "required positional argument" in str(error):
                mend = _SEVERAL.capitalize()
            raise UnbatchError(f"{words}: {said}. {mend or 'Give inputs of the form that the model takes.'}") from error
        finally:
            for module, flag in flags:
                module.training = flag
        if not torch.equal(given, x):
            raise UnbatchError(
                "the model's forward writes into its own inputs (an in-place operation, such as x.mul_() or inplace=True, "
                "on what it is given), so that every pass would change the batch; let it work on a copy, x.clone()."
            )
        if not isinstance(outputs, Tensor):
            theirs = type(outputs).__module__.startswith("transformers.")
            mend = " unbatch.adapters.huggingface.one_input(model) does that, and gives its loss." if theirs else ""
            raise UnbatchError(
                f"the model returns {type(outputs).__name__}; wrap it so that it returns one tensor.{mend}"
            )
        object.__setattr__(self, "labels", _checked_labels(self.loss, outputs.detach(), self.labels))

    def label_name(self, label: Tensor) -> str:
        """A label in words, as the report shows it; by number where the classes have no names.

        A token a place, such as the next one of a text, is read as a text.
        """
        if isinstance(self.domain, Tokens) and label.shape == self.domain.shape and not label.is_floating_point():
            return self.domain.render(label.masked_fill(label < 0, self.domain.padding or 0))
        return label_words(label, self.classes)


_CONVERT = "convert them with torch.as_tensor."
_SEVERAL = (
    "a model of several inputs is audited on all of them, joined by unbatch.adapters.several_inputs.InputParts, or on one: "
    "wrap it in a module whose forward takes that one and holds the others."
)


def _of_its_vocabulary(model: nn.Module, domain: Tokens) -> Tokens:
    """The domain with as many tokens as the model looks up, which anybody who has the model knows; else as it was."""
    table = token_table(model, domain.shape)
    size = 0 if table is None else len(model.get_parameter(table))
    return replace(domain, high=size - 1.0, bounded=True) if size > domain.high else domain


def _diverged(tensor: object) -> bool:
    if not isinstance(tensor, Tensor) or is_lazy(tensor) or tensor.is_meta or not tensor.is_floating_point():
        return False
    return bool((tensor.float() if tensor.itemsize == 1 else tensor).isnan().any())


def _rows_told(model: nn.Module, inputs: Tensor) -> str:
    """What tokens [n, t] ask of embeddings, and how many rows these have; empty where there are none."""
    rows = dict.fromkeys(
        f"{m.num_embeddings:,}" for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)
    )
    if inputs.is_floating_point() or not rows:
        return ""
    return (
        f"Its embeddings have {' and '.join(rows)} rows, and tokens go up to {int(inputs.max()):,} in sequences of "
        f"{inputs.shape[-1]:,}: give fewer of them (the case text has options: vocabulary, length)."
    )


def _checked_labels(loss: Loss, outputs: Tensor, labels: Tensor) -> Tensor:
    """Labels that the loss takes beside the model's outputs [g, ...]: as given, or whole numbers in int64.

    Raises UnbatchError: the loss takes them in no way, or only by broadcasting; the message says what it takes.
    """
    n, shape = len(labels), tuple(outputs.shape[1:])
    beside = outputs[torch.arange(n, device=outputs.device) % len(outputs)]
    classes = shape[0] if shape and shape[0] > 1 and tuple(labels.shape[1:]) == shape[1:] else 0
    outside = bool(classes) and not labels.is_floating_point() and bool(((labels < 0) | (labels >= classes)).any())
    if outside and outputs.device.type != "cpu":  # a number that no class has ends a GPU's process
        loss, beside = loss_on_cpu(loss), beside.cpu()
    whole = not labels.is_floating_point() and labels.dtype != torch.int64
    why = list[str]()
    for given in (labels, labels.long()) if whole else (labels,):
        reason = _refusal(loss, beside, given.to(beside.device))
        if reason is None:
            return given
        why.append(reason)
    try:
        takes = f"it takes {LabelForm.of(loss, shape, device=beside.device).words()}"
    except Exception as error:  # whatever the user's own function raises
        raise UnbatchError(
            f"the loss fails on outputs {[n, *shape]} and labels {str(labels.dtype).removeprefix('torch.')} "
            f"{list(labels.shape)}: {why[0]}. It takes labels in no other form (class numbers, one-hot rows, bits, real "
            "targets) either, so look at the loss itself: called with (outputs, labels) it returns one finite number, as a "
            "tensor with its gradient (a mean or a sum, and no .item())."
        ) from error
    if outside:
        low, high = int(labels.min()), int(labels.max())
        why.append(f"labels run from {low} to {high}, but the model has {classes} classes, 0 to {classes - 1}")
    raise UnbatchError(
        f"labels {str(labels.dtype).removeprefix('torch.')} {list(labels.shape)} do not go with outputs "
        f"{[n, *shape]} under this loss: {'; '.join(dict.fromkeys(why))}. With such outputs {takes}; give labels so."
    )


def _refusal(loss: Loss, outputs: Tensor, labels: Tensor) -> str | None:
    """Why the loss does not take these labels beside these outputs, or only by broadcasting; None: it does."""
    try:
        with warnings.catch_warnings(), torch.no_grad(), torch.random.fork_rng(devices=[]):
            warnings.filterwarnings("error", message="Using a target size")
            value = loss(outputs, labels)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split()).rstrip('.')}"
    if not isinstance(value, Tensor) or value.numel() != 1:
        return (
            f"it gives {list(value.shape) if isinstance(value, Tensor) else type(value).__name__}, and not one number"
        )
    if bool(value.isnan()):
        return "its value is NaN (are all rows ignored?)"
    n = next(rows for rows in PROBES if rows not in outputs.shape)
    turn = (torch.arange(n, device=labels.device) % 2).view(-1, *[1] * (labels.ndim - 1))
    probe = torch.randn((n, *outputs.shape[1:]), generator=torch.Generator().manual_seed(0)).to(outputs)
    said = objection(loss, probe, turn.expand(n, *labels.shape[1:]).to(labels.dtype))
    return said if said is not None and said.startswith(BROADCASTS) else None


@dataclass(frozen=True, kw_only=True, repr=False)
class Examples:
    """All the data that a case deals out to its clients, with the names of the classes.

    >>> pictures = torch.zeros(2, 1, 8, 8)
    >>> Examples(
    ...     inputs=pictures, labels=torch.tensor([0, 1]), classes=["no tumour", "tumour"], domain=domain_of(pictures)
    ... )
    <Examples: 2 images [1, 8, 8], 2 classes>
    """

    inputs: Tensor  # [n, *shape]
    labels: Tensor  # [n]
    classes: Sequence[str]
    domain: Domain

    def __repr__(self) -> str:
        held = f"{len(self.inputs)} {self.domain.name} {list(self.inputs.shape[1:])}"
        return f"<Examples: {held}, {len(self.classes)} classes>"


class Case(Plugin, ABC):
    """A family of clients on real data that comes along, each with one of unbatch's own small models.

    A subclass gives `pool`. All clients of a case share the global model and hold different examples.

    >>> client = Case.parse("tables:dataset=iris,batch=2,width=16").setting()
    >>> client
    <Setting tables:batch=2,width=16,dataset=iris: 2 table [4], Sequential of 131 parameters>
    >>> [client.label_name(label) for label in client.labels]
    ['setosa', 'versicolor']
    """

    kind: ClassVar[str] = "case"
    folder: ClassVar[str] = "cases"

    source: ClassVar[str]  # of the data

    batch: Annotated[int, Field(gt=0, description="examples a client holds")] = 1
    clients: Annotated[int, Field(gt=0, description="clients, each with its own batch")] = 1
    seed: Annotated[int, Field(ge=0, description="of the draw of examples and parameters")] = 0
    model: Annotated[small.Name, Field(description="global model")] = "mlp"
    depth: Annotated[
        int, Field(gt=0, description="hidden layers of an mlp, blocks of a convnet or of a resnet's stage")
    ] = 1
    width: Annotated[
        int,
        Field(gt=0, description="hidden units of an mlp; channels of a convolutional network, which all scale with it"),
    ] = 64
    norm: Annotated[
        NormName | None, Field(description="normalisation of a resnet, a vgg or convnet8; none leaves it out")
    ] = "batch"
    activation: Annotated[
        small.ActivationName | None,
        Field(description="between layers; none takes the model's own, relu unless published"),
    ] = None
    bias: Annotated[bool, Field(description="layers with a bias")] = True
    adapter: Annotated[
        int | None,
        Field(
            gt=0, description="units of an adapter beside each hidden dense layer; all but these and the head is frozen"
        ),
    ] = None
    loss: Annotated[
        Literal["cross-entropy", "binary-cross-entropy", "squared-error"], Field(description="training loss")
    ] = "cross-entropy"
    reduction: Annotated[Literal["mean", "sum"], Field(description="over the batch")] = "mean"
    double: Annotated[bool, Field(description="gradients in float64")] = False
    near_duplicates: Annotated[
        int, Field(ge=0, description="examples 1%, or a token, away from another of the batch")
    ] = 0
    repeated_labels: Annotated[bool, Field(description="the whole batch from at most half as many classes")] = False

    @model_validator(mode="after")
    def _someone_to_repeat(self) -> Self:
        if self.near_duplicates >= self.batch:
            raise UnbatchError(f"near_duplicates={self.near_duplicates} must be below batch={self.batch}")
        return self

    @model_validator(mode="after")
    def _of_use(self) -> Self:
        for option in sorted(self.model_fields_set & self.unused()):
            takers = [name for name in get_args(small.Name) if option not in small.unused(name)]
            raise UnbatchError(f"{self.model} takes no {option}; leave it out. Models that do: {', '.join(takers)}")
        return self

    @abstractmethod
    def pool(self, rng: torch.Generator) -> Examples:
        """All examples that clients may hold, in random order; the same for the same state of `rng`."""

    def unused(self) -> frozenset[str]:
        """The options depth, width and norm that the chosen model has no use for: to give one is an error."""
        return small.unused(self.model)

    def global_model(self, examples: Examples, outputs: int, rng: torch.Generator) -> nn.Module:
        """The model that all clients share, for examples of that pool and with that many outputs, drawn from `rng`."""
        network = small.build(
            self.model,
            tuple(examples.inputs.shape[1:]),
            outputs,
            depth=self.depth,
            width=self.width,
            activation=self.activation,
            bias=self.bias,
            norm=self.norm,
            rng=rng,
        )
        return network if self.adapter is None else adapted(network, self.adapter, rng)

    def outputs(self, classes: int) -> int:
        """How many outputs the model has for so many classes."""
        return 1 if self.loss == "binary-cross-entropy" and classes == 2 else classes

    def completed(self, setting: Setting, pool: Examples, chosen: Tensor) -> Setting:
        """The client with what this case has besides: `chosen` are the numbers of the pool's examples that clients get."""
        return setting

    def training_loss(self) -> Loss:
        """The loss that clients train with."""
        return loss_named(self.loss, self.reduction)

    @final
    def setting(self, client: int = 0) -> Setting:
        """The client of that number, with its private batch: the same bits for the same spelling.

        The loss is on one output a class; binary cross entropy takes one output where there are two classes, and is
        summed over one output a class (one against the rest) where there are more.
        Raises UnbatchError: no such client, more examples asked for than there are, a model that cannot take them.
        """
        if not 0 <= client < self.clients:
            raise UnbatchError(f"{self}: there is no client {client}; they are numbered 0 to {self.clients - 1}.")
        pool = _drawn(self)
        chosen = self._choose(pool.labels)
        if self.clients * self.batch > len(chosen):
            raise UnbatchError(
                f"{self}: {self.clients} clients of {self.batch} examples each want more than the {len(chosen)} "
                "examples that this case has for them; lower batch or clients."
            )
        mine = chosen[client * self.batch : (client + 1) * self.batch]
        inputs, labels = self._repeat(pool.inputs[mine], pool.labels[mine], pool.domain, client)
        dtype = torch.float64 if self.double else torch.float32
        outputs = self.outputs(len(pool.classes))
        network = self.global_model(pool, outputs, torch.Generator().manual_seed(self.seed + 1))
        setting = Setting(
            model=network.to(dtype),
            loss=self.training_loss(),
            inputs=inputs.to(dtype) if inputs.is_floating_point() else inputs,
            labels=labels,
            domain=pool.domain,
            classes=pool.classes,
            name=str(self),
        )
        return self.completed(setting, pool, chosen)

    def _choose(self, labels: Tensor) -> Tensor:
        """Numbers of the examples that clients get, in the pool's order.

        A batch from at most half as many classes as examples holds two of one class (pigeonhole).
        """
        if not self.repeated_labels:
            return torch.arange(len(labels))
        kept = list(dict.fromkeys(labels.tolist()))[: max(1, self.batch // 2)]
        return torch.isin(labels, torch.tensor(kept)).nonzero().flatten()

    def _repeat(self, inputs: Tensor, labels: Tensor, domain: Domain, client: int) -> tuple[Tensor, Tensor]:
        """The last examples made near duplicates of the first ones: Gaussian noise of 1% of the example's norm.

        Of tokens, the first one is another.
        """
        rng = torch.Generator().manual_seed(self.seed + 2)  # the parameters have seed + 1, the pool seed
        if not inputs.is_floating_point():
            fresh = len(inputs) - self.near_duplicates
            for i in range(self.near_duplicates):
                inputs[fresh + i], labels[fresh + i] = inputs[i % fresh], labels[i % fresh]
                inputs[fresh + i, 0] = int(torch.randint(2, int(domain.high) + 1, (1,), generator=rng))
            return inputs, labels
        noise = torch.randn(self.clients, self.near_duplicates, *inputs.shape[1:], generator=rng)[client].to(inputs)
        fresh = len(inputs) - self.near_duplicates
        for i, shift in enumerate(noise):
            x = inputs[i % fresh]
            shift *= 0.01 * x.norm() / shift.norm()
            beyond = (x + shift < domain.low) | (x + shift > domain.high)
            inputs[fresh + i] = torch.where(beyond, x - shift, x + shift)  # within the range, at the same distance
            labels[fresh + i] = labels[i % fresh]
        return inputs, labels


@lru_cache(maxsize=1)
def _drawn(case: Case) -> Examples:
    """The pool of a case, drawn once for all its clients; they are handed copies."""
    return case.pool(torch.Generator().manual_seed(case.seed))
