"""Text: English sentences behind a small transformer."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self, final

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from unbatch.case import Case, Examples
from unbatch.data.corpus import PADDING, TokenizerName, sentences, tokenizer
from unbatch.domain import Tokens
from unbatch.errors import UnbatchError
from unbatch.loss import Loss
from unbatch.models import small
from unbatch.models.transformer import PositionName, TransformerName, build_transformer

IGNORED = -100  # the label that cross entropy leaves out


@final
class Text(Case):
    """Sentences of Python's own help and of scikit-learn's descriptions of data, as tokens behind a small transformer.

    Inputs [length] are token numbers, 0 the padding of shorter sentences; longer ones are left out. The class is the part
    of the texts that a sentence is from; with `task=next` the model says at each place which token comes next, as
    language models are trained.

    >>> import unbatch
    >>> client = unbatch.cases.Text(batch=2, width=16).setting()
    >>> client
    <Setting text:batch=2,width=16: 2 tokens [16], Transformer of 50,022 parameters>
    """

    source: ClassVar[str] = (
        "sentences of Python's help (pydoc_data.topics, Python Software Foundation License) and of scikit-learn's "
        "descriptions of its data sets (BSD 3-Clause)"
    )

    model: Annotated[TransformerName, Field(description="decoder (gpt) or encoder (bert)")] = "gpt"  # type: ignore[assignment]
    depth: Annotated[int, Field(gt=0, description="layers of the transformer")] = 2
    width: Annotated[int, Field(gt=0, description="numbers a token")] = 256
    heads: Annotated[int, Field(gt=0, description="heads of attention a layer")] = 4
    positions: Annotated[PositionName, Field(description="how the model tells places apart")] = "learned"
    reads: Annotated[Literal["mean", "last", "first"], Field(description="tokens that a class is told from")] = "mean"
    task: Annotated[Literal["classify", "next"], Field(description="class of a sentence, or each next token")] = (
        "classify"
    )
    tokenizer: Annotated[TokenizerName, Field(description="words, or byte pairs by the package tokenizers")] = "word"
    vocabulary: Annotated[int, Field(ge=10, le=50_000, description="tokens at most")] = 4096
    length: Annotated[int, Field(ge=4, le=512, description="tokens of a sentence at most")] = 16
    frozen: Annotated[bool, Field(description="embeddings are not trained, and send nothing")] = False

    @model_validator(mode="after")
    def _task_as_it_is(self) -> Self:
        if self.task == "next" and (
            self.loss != "cross-entropy" or self.repeated_labels or "reads" in self.model_fields_set
        ):
            raise UnbatchError(
                "task=next has the cross entropy of every next token, so loss, repeated_labels and reads are of no use; "
                "leave them out"
            )
        if self.adapter is not None:
            raise UnbatchError(
                "adapters stand beside dense layers of networks of pictures and tables; leave adapter out"
            )
        return self

    def pool(self, rng: torch.Generator) -> Examples:
        held = tokenizer(self.tokenizer, self.vocabulary)
        found = {  # by their tokens: sentences that differ by capitals alone are one
            held.written[text]: label
            for label, texts in enumerate(sentences().values())
            for text in texts
            if len(held.written[text]) <= self.length
        }
        inputs, labels = torch.full((len(found), self.length), PADDING), torch.tensor(list(found.values()))
        for row, numbers in zip(inputs, found, strict=True):
            row[: len(numbers)] = torch.tensor(numbers)
        order = torch.randperm(len(inputs), generator=rng)
        size = len(held.vocabulary)
        return Examples(
            inputs=inputs[order],
            labels=labels[order] if self.task == "classify" else following(inputs[order]),
            classes=list(sentences()) if self.task == "classify" else held.vocabulary,
            domain=Tokens(
                shape=(self.length,),
                high=size - 1,
                vocabulary=held.vocabulary,
                glue="",
                padding=PADDING,
                frequency=held.frequency,
            ),
        )

    def unused(self) -> frozenset[str]:
        return frozenset({"norm"})

    def global_model(self, examples: Examples, outputs: int, rng: torch.Generator) -> nn.Module:
        network = build_transformer(
            self.model,
            self.length,
            int(examples.domain.high) + 1,
            outputs,
            depth=self.depth,
            width=self.width,
            heads=self.heads,
            activation=nn.GELU if self.activation is None else small.ACTIVATIONS[self.activation],
            bias=self.bias,
            positions=self.positions,
            reads="each" if self.task == "next" else self.reads,
            rng=rng,
        )
        if self.frozen:
            for table in (network.tokens, network.positions):
                if table is not None:
                    table.weight.requires_grad_(False)
        return network

    def training_loss(self) -> Loss:
        if self.task == "classify":
            return super().training_loss()
        reduction = self.reduction
        return lambda outputs, labels: F.cross_entropy(outputs, labels, ignore_index=IGNORED, reduction=reduction)


def following(tokens: Tensor) -> Tensor:
    """The token that comes after each one of sequences [n, t]; `IGNORED` at the last place, and where padding follows.

    >>> following(torch.tensor([[5, 3, 9, 0]]))
    tensor([[   3,    9, -100, -100]])
    """
    after = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], PADDING)], 1)
    return after.masked_fill(after == PADDING, IGNORED)
