"""decepticon: sentences out of a transformer whose feed-forward layers sort tokens into bins."""

from __future__ import annotations

import copy
import math
from typing import Annotated, ClassVar, cast, final

import torch
from pydantic import Field
from torch import Tensor, nn

from unbatch.attack import NOTHING, ActiveAttack, Cost, Demo, Guarantee
from unbatch.errors import NotApplicable
from unbatch.inversion.tokens.assembly import Batch, assembled
from unbatch.inversion.tokens.fronts import TokenReader
from unbatch.inversion.tokens.imprints import (
    PLACES,
    SPARE,
    TAGS,
    PlantedTransformer,
    bins_of,
    read_imprint,
    words_present,
)
from unbatch.inversion.tokens.next_tokens import next_tokens
from unbatch.inversion.view import View
from unbatch.knowledge import DOMAIN_FIELDS, PROTOCOL_FIELDS, Knowledge
from unbatch.models.transformer import Transformer, TransformerLayer
from unbatch.network.precision import in_double
from unbatch.reconstruction import Reconstruction

LOWEST = -8.0  # the first threshold, in standard deviations: below it lies no token


@final
class Decepticon(ActiveAttack):
    """Plants a transformer that keeps token, position and what a token sees apart, and sorts tokens into bins.

    Of the `width` numbers of a token the last eleven are cleared. Two tell the position; eight the tag: the first
    attention is made uniform, and its values are a random matrix, so that a tag is the mean of what the tokens that are
    seen send through it. Each feed-forward layer has rows that are all alike, v = m . z, and thresholds at the normal law's
    quantiles for biases; all write the same. So the difference of two neighbouring rows' gradients is
    sum delta (z, 1) over the tokens between their thresholds; where that is one, z is read off by division, and token,
    position and tag off z. Tokens that are known are taken out of bins with others.

    Tags put tokens into sentences: in a decoder each tells the one before it, in an encoder all of a sentence have the
    same, and up to two tokens in a row that no bin gave are told by them. How often sentences occur and their labels
    follow from the gradient's being their sum.

    Only sentences that are claimed are certain, and those are claimed where together they explain the whole update.
    """

    family: ClassVar[str] = "planted rows"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT
    cost: ClassVar[Cost] = Cost.SOLVES
    paper: ClassVar[str] = (
        "Fowl, Geiping, Reich, Wen, Czaja, Goldblum, Goldstein, Decepticons, ICLR 2023; tags that chain: this library"
    )
    needs: ClassVar[frozenset[str]] = frozenset({"input_shape"})
    uses: ClassVar[frozenset[str]] = frozenset({"batch_size", "labels", "clients"}) | DOMAIN_FIELDS | PROTOCOL_FIELDS
    demo: ClassVar[Demo] = Demo(
        case="text:batch=2,width=64,depth=1", floors={"token-accuracy": 1.0, "label-accuracy": 1.0}
    )

    sharpness: Annotated[
        float, Field(gt=0, description="of the thresholds: at 1 over it from one a unit is neither open nor shut")
    ] = 1e4

    def plant(self, model: nn.Module, rng: torch.Generator, known: Knowledge = NOTHING) -> nn.Module:
        """A copy of `model` with such tables, attention and feed-forward layers; its head is left as it was.

        Raises NotApplicable: it is no transformer of unbatch's own with learned positions and biases, or too narrow.
        """
        made = copy.deepcopy(model)
        if not isinstance(made, Transformer) or made.positions is None or made.head.bias is None:
            raise NotApplicable(
                "tokens are imprinted in unbatch's own transformers (unbatch.models.transformer) with learned positions "
                "and biases; this model is another."
            )
        width = made.tokens.weight.shape[1]
        if width < 2 * SPARE:
            raise NotApplicable(
                f"a token has {width} numbers, and {SPARE} of them are to be spared; {2 * SPARE} at least."
            )
        blocks = [cast("TransformerLayer", block) for block in made.blocks]
        every = blocks if made.reads in ("mean", "each") else blocks[:1]
        with torch.no_grad():
            self._tables(made, made.positions, width)
            self._attention(blocks[0], width, rng)
            for block in every:
                self._bins(block, width, rng)
            for block in every[1:]:  # tokens come through unmixed
                block.attention.out.weight.zero_()
                block.attention.out.bias.zero_()
        return made

    def _tables(self, made: Transformer, positions: nn.Embedding, width: int) -> None:
        made.tokens.weight[:, width - SPARE :] = 0.0
        positions.weight.zero_()
        t = len(positions.weight)
        angles = math.pi * torch.arange(t) / t
        places = slice(width - SPARE, width - SPARE + PLACES)
        positions.weight[:, places] = torch.stack([angles.cos(), angles.sin()], 1).to(positions.weight)

    def _attention(self, block: TransformerLayer, width: int, rng: torch.Generator) -> None:
        first = block.attention
        for part in (first.query, first.key, first.value, first.out):
            part.weight.zero_()
            part.bias.zero_()
        body = width - SPARE
        first.value.weight[:TAGS, :body] = (torch.randn(TAGS, body, generator=rng) / body**0.5).to(first.value.weight)
        tags = torch.arange(width - 1 - TAGS, width - 1)
        first.out.weight[tags, torch.arange(TAGS)] = 1.0

    def _bins(self, block: TransformerLayer, width: int, rng: torch.Generator) -> None:
        m = len(block.dense1.weight)
        way = torch.nn.functional.normalize(torch.randn(width - 1, generator=rng), dim=0)
        block.dense1.weight.zero_()
        block.dense1.weight[:, : width - 1] = self.sharpness * way.to(block.dense1.weight)
        shares = (torch.arange(m, dtype=torch.float64) / m).clamp_min(1e-12)
        edges = torch.special.ndtri(shares)
        edges[0] = LOWEST
        block.dense1.bias.copy_(-self.sharpness * edges)
        block.dense2.weight.zero_()
        block.dense2.weight[width - 1] = 1 / (self.sharpness * m)
        block.dense2.bias.zero_()

    def run(self, view: View, rng: torch.Generator) -> Reconstruction:
        view = view.gradient
        imprint, blocks = self._imprint(view)
        reader = TokenReader.of(view)
        eps = torch.finfo(view.obs.dtype).eps
        bins = bins_of(imprint, view.update, blocks, eps)
        nodes, sentences = read_imprint(imprint, bins, words_present(imprint, view.update, reader.words, eps))
        trace = {"bins that hold something": len(bins), "tokens read": len(nodes), "sentences": len(sentences)}
        if not sentences:
            raise NotApplicable(f"{len(nodes)} tokens were read out of {len(bins)} bins, and no sentence is whole.")
        inputs = self._padded(sentences, reader)
        try:
            batch = self._batch(reader, inputs, sentences)
        except NotApplicable as why:
            bound = torch.full((len(inputs),), torch.inf, dtype=torch.float64)
            return Reconstruction(inputs=inputs, bound=bound, trace=trace | {"open": str(why)})
        bound = torch.zeros(len(batch.inputs), dtype=torch.float64)
        return Reconstruction(inputs=batch.inputs, labels=batch.labels, bound=bound, trace=trace)

    def _imprint(self, view: View) -> tuple[PlantedTransformer, list[int]]:
        """The planted model and its planted blocks. Raises NotApplicable: it is none, or sent nothing of them."""
        model = view.model
        if not isinstance(model, Transformer):
            raise NotApplicable("this model is no transformer that this attack plants in.")
        blocks = list[int]()
        for i, block in enumerate(model.blocks):
            W = cast("TransformerLayer", block).dense1.weight.detach()
            names = [f"blocks.{i}.dense1.{part}" for part in ("weight", "bias")]
            if torch.equal(W, W[:1].expand_as(W)) and bool(W.any()) and set(names) <= set(view.update):
                blocks.append(i)
        if 0 not in blocks:
            raise NotApplicable("the rows of the first feed-forward layer are not alike, or it sent no gradient.")
        return PlantedTransformer(cast("Transformer", in_double(model)), view.knowledge.input_shape[0]), blocks

    def _padded(self, sentences: list[list[int]], reader: TokenReader) -> Tensor:
        fill = reader.padding if reader.padding is not None else 0
        return torch.tensor(
            [[*s, *[fill] * (reader.length - len(s))] for s in sentences], device=reader.view.obs.device
        )

    def _batch(self, reader: TokenReader, inputs: Tensor, sentences: list[list[int]]) -> Batch:
        """The batch that the update is of. Raises NotApplicable: these sentences do not add up to it."""
        if len(reader.view.outputs) == 1:
            return assembled(reader, inputs)
        begun = sorted({tuple(s[:k]) for s in sentences for k in range(1, len(s) + 1)}, key=len)
        padded = self._padded([list(b) for b in begun], reader)
        return next_tokens(reader, padded, torch.tensor([len(b) for b in begun], device=padded.device))
