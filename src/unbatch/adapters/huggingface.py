"""Hugging Face: models of transformers and PEFT as networks of one input, and the Trainer's own loss beside them.

The packages are an extra: pip install 'unbatch[transformers]'. They are imported when a model of theirs is handed over.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbatch.errors import MissingExtra, UnbatchError
from unbatch.network.dense import in_mode

IGNORED = -100  # the label that counts for nothing, in all of Hugging Face's losses
PROBE_TOKENS = 6  # of a row of the batch on which a model's own loss is compared with ours
AGREES = 1e-5  # relative difference of the two losses' values that float32 makes
DIFFERENTIABLE = ("eager", "sdpa")  # attention that runs, or can be made to run, by a kernel that differentiates twice
_RECOMPUTES = (
    "gradient_checkpointing",
    "activation_checkpointing",
)  # flags of layers that run again in the backward pass

Head = Literal["next token", "each token", "whole input"]
Side = Literal["left", "right", "both"]


@dataclass(frozen=True)
class TrainerLoss:
    """The loss that the Hugging Face Trainer takes of a model's logits, as a function of (outputs, labels).

    *next token* (AutoModelForCausalLM): outputs [n, V, T] and labels [n, T], the tokens themselves; the loss shifts them,
    so that position t is held against token t + 1. *each token* (token classification, masked language models): outputs
    [n, k, T], labels [n, T]. *whole input* (sequences and pictures): outputs [n, k], labels [n], or real numbers [n] or
    [n, k]: regression and several labels at once, as `problem` says, or as transformers guesses from the labels' type.

    A label of -100 counts for nothing, and the mean is over the labels that count. With `items` the sum is divided by that
    number: what the Trainer does with `num_items_in_batch`, the labels that count in all batches whose gradients it
    accumulates. Of one batch alone that number gives the mean, and so it is None.

    >>> loss = TrainerLoss("next token")
    >>> outputs, tokens = torch.zeros(1, 4, 3), torch.tensor([[1, 2, -100]])
    >>> loss(outputs, tokens)  # one of three positions has a target: log 4
    tensor(1.3863)
    """

    head: Head
    problem: str | None = None  # config.problem_type
    items: int | None = None

    def __call__(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The loss of outputs and labels, one number."""
        if self.head == "next token":
            return self._entropy(outputs.float()[..., :-1], labels[:, 1:])
        if self.head == "each token":
            return self._entropy(outputs.float(), labels)
        problem = self.problem or _problem_of(outputs, labels)
        if problem == "regression":
            return (
                F.mse_loss(outputs.squeeze(), labels.squeeze())
                if outputs.shape[-1] == 1
                else F.mse_loss(outputs, labels)
            )
        if problem == "multi_label_classification":
            return F.binary_cross_entropy_with_logits(outputs, labels)
        return self._entropy(outputs, labels)

    def _entropy(self, outputs: Tensor, labels: Tensor) -> Tensor:
        if self.items is None:
            return F.cross_entropy(outputs, labels, ignore_index=IGNORED)
        return F.cross_entropy(outputs, labels, ignore_index=IGNORED, reduction="sum") / self.items


def _problem_of(outputs: Tensor, labels: Tensor) -> str:
    """What transformers takes the problem for where the configuration does not say."""
    if outputs.shape[-1] == 1:
        return "regression"
    return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"


def of_hugging_face(model: object) -> bool:
    """Whether a model is one of transformers or PEFT that is still to be adapted; told by its classes, importing nothing.

    >>> of_hugging_face(nn.Linear(1, 1))
    False
    """
    kinds = {(kind.__module__.partition(".")[0], kind.__name__) for kind in type(model).__mro__}
    return bool(kinds & {("transformers", "PreTrainedModel"), ("peft", "PeftModel")}) and _adapted(model) is None


def one_input(
    model: nn.Module,
    *,
    pad_token_id: int | None = None,
    padding_side: Side | None = None,
    num_items_in_batch: int | None = None,
) -> tuple[nn.Module, TrainerLoss]:
    """A Hugging Face model as a network of one input, and the loss that the Trainer takes of its outputs.

    For every AutoModelFor{CausalLM, SequenceClassification, TokenClassification, MaskedLM, ImageClassification}, and for
    PEFT adapters on one. The network takes token ids [n, T] or pictures [n, c, h, w] and returns logits [n, k], or
    [n, k, T] of each token. It is the same model under another forward: its parameters and buffers are the same tensors by
    the same names, tied ones once, and what is frozen stays frozen. Caches are off. `model` itself is not changed.

    pad_token_id: by default the configuration's; tokens of that id at a row's end, or its beginning, are padding, and
    masked. padding_side: *both* by default, *right* where the padding token also begins sentences. Labels of padding are
    -100, which `labels_of` sets. num_items_in_batch: of a gradient accumulated over several batches (`TrainerLoss`).

    Attention that is neither *eager* nor *sdpa* runs by *sdpa*, and gradient checkpointing is off, both in a copy: the
    function is the same, and can be differentiated twice. Dropout draws in train mode, as the client's does.
    Raises UnbatchError: another kind of model, or one whose own loss is another on a random batch; MissingExtra.

    >>> one_input(nn.Linear(1, 1))
    Traceback (most recent call last):
    unbatch.errors.UnbatchError: Linear is no model of transformers or PEFT; audit it as it is.
    """
    if not of_hugging_face(model):
        raise UnbatchError(f"{type(model).__name__} is no model of transformers or PEFT; audit it as it is.")
    head = _head(model)
    model = _differentiable(model)
    base = _base(model)
    known = getattr(base.config, "pad_token_id", None)
    pad = known if pad_token_id is None else pad_token_id
    if pad != known and head == "whole input" and base.main_input_name == "input_ids":
        raise UnbatchError(
            f"pad_token_id={pad}, and {type(base).__name__} looks for the last token that is not {known} (its "
            "configuration's pad_token_id); set model.config.pad_token_id as in training."
        )
    begins = pad is not None and pad == getattr(base.config, "bos_token_id", None)
    adapted = _with_one_input(model, base, head, pad, padding_side or ("right" if begins else "both"))
    loss = TrainerLoss(head, getattr(base.config, "problem_type", None), num_items_in_batch)
    _check_loss(model, adapted, TrainerLoss(head, loss.problem))
    adapted.__dict__[_MARK].loss = loss
    return adapted, loss


def with_its_loss(model: nn.Module) -> tuple[nn.Module, TrainerLoss | None]:
    """A model as attacks take it, and the loss that comes with it: adapted where it is Hugging Face's, else as it is.

    >>> model = nn.Linear(1, 1)
    >>> with_its_loss(model) == (model, None)
    True
    """
    if of_hugging_face(model):
        return one_input(model)
    known = _adapted(model)
    return model, None if known is None else known.loss


def vit_of_random_parameters(*, side: int, patch: int, width: int, depth: int, classes: int, seed: int) -> nn.Module:
    """Hugging Face's ViT for pictures [n, 3, side, side], randomly initialised, as a network of one input: for benchmarks.

    Raises MissingExtra.
    """
    try:
        from transformers import ViTConfig, ViTForImageClassification
    except ImportError as error:
        raise MissingExtra.of("Hugging Face's ViT", "transformers", "transformers") from error
    own: dict[str, Any] = {"num_labels": classes}  # of every configuration
    config = ViTConfig(
        image_size=side,
        patch_size=patch,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=next(heads for heads in (3, 2, 1) if width % heads == 0),
        intermediate_size=4 * width,
        **own,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return one_input(ViTForImageClassification(config))[0].train()


def labels_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """The labels [n, T] that train a causal language model on tokens [n, T]: the tokens, and -100 where there is padding.

    model: from `one_input`. As DataCollatorForLanguageModeling gives them, but where the padding token also ends
    sentences: there the collator ignores every one of them, and this only those that are padding.
    Raises UnbatchError: the model was not adapted.
    """
    known = _adapted(model)
    if known is None:
        raise UnbatchError(f"{type(model).__name__} was not adapted; give the model that one_input returned.")
    return tokens.masked_fill(~tokens_mask(tokens, known.pad, known.side), IGNORED)


def own_labels(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """The labels that a model is trained on: of a causal language model those of its inputs, of others as given.

    >>> own_labels(nn.Linear(1, 1), torch.zeros(1, 1), torch.tensor([1]))
    tensor([1])
    """
    known = _adapted(model)
    causal = known is not None and known.loss is not None and known.loss.head == "next token"
    return labels_of(model, inputs) if causal else labels


def tokens_mask(tokens: Tensor, pad: int | None, side: Side = "both") -> Tensor:
    """True at the tokens [n, T] that are no padding: not among the `pad`s at the row's end (right) or beginning (left).

    >>> tokens_mask(torch.tensor([[0, 5, 0, 6, 0]]), pad=0, side="right").int()
    tensor([[1, 1, 1, 1, 0]], dtype=torch.int32)
    """
    if pad is None:
        return torch.ones_like(tokens, dtype=torch.bool)
    padded = (tokens == pad).long()
    ends = padded.flip(1).cumprod(1).flip(1) if side != "left" else torch.zeros_like(padded)
    begins = padded.cumprod(1) if side != "right" else torch.zeros_like(padded)
    return (ends + begins) == 0


def _with_one_input(model: nn.Module, base: Any, head: Head, pad: int | None, side: Side) -> nn.Module:
    """The same module with a forward of one input: of a class of its own, made of the model's."""
    kind = type(model)
    fixed: dict[str, Any] = {"return_dict": True}
    if "use_cache" in inspect.signature(base.forward).parameters:
        fixed["use_cache"] = False
    pictures = base.main_input_name != "input_ids"

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        given = {base_input: x} if pictures else {base_input: x, "attention_mask": tokens_mask(x, pad, side).long()}
        logits: Tensor = kind.forward(self, **given, **fixed).logits
        return logits if head == "whole input" else logits.transpose(1, 2)  # [n, k, T], as cross entropy takes them

    base_input = base.main_input_name
    adapted = copy.copy(model)
    adapted.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
    adapted.__dict__[_MARK] = _Adapted(pad, side)
    return adapted


@dataclass
class _Adapted:
    """What a model was adapted with, which it keeps."""

    pad: int | None
    side: Side
    loss: TrainerLoss | None = None


_MARK = "_unbatch_adapted"  # attribute of an adapted model


def _adapted(model: object) -> _Adapted | None:
    found: _Adapted | None = getattr(model, "__dict__", {}).get(_MARK)
    return found


def _base(model: Any) -> Any:
    """The model of transformers in it: itself, or what a PEFT adapter lies on."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _differentiable(model: nn.Module) -> nn.Module:
    """The same model, or where its attention or its layers cannot be differentiated twice, a copy where they can."""
    recomputing = [name for name in _RECOMPUTES for module in model.modules() if getattr(module, name, False)]
    if _base(model).config._attn_implementation in DIFFERENTIABLE and not recomputing:
        return model
    model = copy.deepcopy(model)
    for module in model.modules():
        for name in _RECOMPUTES:
            if hasattr(module, name):
                setattr(module, name, False)
    if _base(model).config._attn_implementation not in DIFFERENTIABLE:
        _base(model).set_attn_implementation("sdpa")
    return model


def _head(model: nn.Module) -> Head:
    """What the model's outputs are held against. Raises UnbatchError: a kind that has no single input and label."""
    known = _heads()
    names = [kind.__name__ for kind in type(_base(model)).__mro__]
    found = next((known[name] for name in names if name in known), None)
    if found is None:
        raise UnbatchError(
            f"{type(_base(model)).__name__} is no AutoModelForCausalLM, SequenceClassification, TokenClassification, "
            "MaskedLM or ImageClassification, whose loss is one of its logits and labels; wrap it in an nn.Module of one "
            "input that returns one tensor, and give its loss."
        )
    return found


@cache
def _heads() -> dict[str, Head]:
    """By class name, as transformers' Auto classes list them."""
    try:
        from transformers.models.auto import modeling_auto as auto
    except ImportError as error:
        raise MissingExtra.of("a Hugging Face model", "transformers", "transformers") from error
    kinds: dict[str, Head] = {
        "IMAGE_CLASSIFICATION": "whole input",
        "SEQUENCE_CLASSIFICATION": "whole input",
        "TOKEN_CLASSIFICATION": "each token",
        "MASKED_LM": "each token",
        "CAUSAL_LM": "next token",
    }
    found: dict[str, Head] = {}
    for kind, head in kinds.items():
        for names in getattr(auto, f"MODEL_FOR_{kind}_MAPPING_NAMES").values():
            found |= dict.fromkeys([names] if isinstance(names, str) else names, head)
    return found


def _check_loss(model: nn.Module, adapted: nn.Module, loss: TrainerLoss) -> None:
    """Raises UnbatchError where the model's own loss of a random batch is another one."""
    base, device, known = _base(model), next(model.parameters()).device, adapted.__dict__[_MARK]
    x, labels = _probe(base, loss, known.pad)
    x, labels = x.to(device), labels.to(device)
    with torch.no_grad(), in_mode(adapted, "eval"), _kept(base.config), torch.random.fork_rng(devices=[]):
        given = {base.main_input_name: x, "labels": labels}
        if base.main_input_name == "input_ids":
            given["attention_mask"] = tokens_mask(x, known.pad, known.side).long()
        own = float(type(model).forward(model, **given).loss)
        ours = float(loss(adapted(x), labels))
    if not abs(own - ours) <= AGREES * max(abs(own), 1.0):
        raise UnbatchError(
            f"the loss of {type(base).__name__} on a random batch is {own:.6g}, and that of its logits alone {ours:.6g}: "
            "it adds terms (as experts' auxiliary losses) or weights; wrap the model and its loss yourself."
        )


def _probe(base: Any, loss: TrainerLoss, pad: int | None) -> tuple[Tensor, Tensor]:
    """A random batch of two, with labels; the last token of the second is ignored, or padding."""
    rng, config, labels = torch.Generator().manual_seed(0), base.config, getattr(base.config, "num_labels", 2)
    if base.main_input_name == "input_ids":
        x = torch.randint(config.get_text_config().vocab_size, (2, PROBE_TOKENS), generator=rng)
        x = torch.where(x == pad, (x + 1) % config.get_text_config().vocab_size, x) if pad is not None else x
        x[1, -1] = pad if pad is not None else x[1, -1]
    else:
        side = config.image_size if isinstance(config.image_size, int) else max(config.image_size)
        high = config.image_size if not isinstance(config.image_size, int) else (side, side)
        x = torch.rand(2, config.num_channels, *high, generator=rng).to(base.dtype)
    if loss.head == "whole input":
        shape = (2,) if labels == 1 or (loss.problem or "single").startswith("single") else (2, labels)
        whole = torch.randint(max(labels, 2), shape, generator=rng)
        real = labels == 1 or (loss.problem or "") in ("regression", "multi_label_classification")
        return x, (whole % 2).to(base.dtype) if real else whole
    targets = x.clone() if loss.head == "next token" else torch.randint(labels, x.shape, generator=rng)
    targets[1, -1] = IGNORED
    return x, targets


@contextmanager
def _kept(config: Any) -> Iterator[None]:
    """The configuration's problem type is the same after the block: transformers guesses it once, from the first labels."""
    before = getattr(config, "problem_type", None)
    try:
        yield
    finally:
        config.problem_type = before
