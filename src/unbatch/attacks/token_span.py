"""token-span: sentences, exactly, out of the spans of a transformer's gradients."""

from __future__ import annotations

from typing import Annotated, ClassVar, final

import torch
from pydantic import Field

from unbatch.attack import Attack, Cost, Demo, Guarantee
from unbatch.inversion.tokens.reading import sentences_read
from unbatch.inversion.view import View
from unbatch.knowledge import DOMAIN_FIELDS, PROTOCOL_FIELDS
from unbatch.reconstruction import Reconstruction


@final
class TokenSpan(Attack):
    """Recovers every sentence of a batch behind a transformer, token by token, checked against the whole update.

    Tokens are a dictionary: what a token at a position sends into the first layers is one of finitely many vectors, and a
    layer's gradient is a sum of delta x^T over those of the batch. So the ones that lie in its row space are the batch's
    tokens, up to pairs that follow from others (`docs/theory/tokens.md`). Behind the first attention a vector depends on
    all that stands before it, and the same test grows sentences; an encoder's are searched for, from tokens whose parts of
    the gradient are alike. Occurrences and labels follow from the gradient's being the sentences' sum. Of one sentence,
    where spans tell nothing (a step of AdamW in float32, more tokens than the width), the rows of trained tables of tokens
    and of positions are compared. Layers, dictionary and tolerance are found by running the network and from the gap of the
    singular values; no architecture is known by name.
    """

    family: ClassVar[str] = "span"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT
    cost: ClassVar[Cost] = Cost.SOLVES
    paper: ClassVar[str] = (
        "Petrov, Dimitrov, Baader, Müller, Vechev, DAGER, NeurIPS 2024; law of positions: this library"
    )
    needs: ClassVar[frozenset[str]] = frozenset({"input_shape"})
    uses: ClassVar[frozenset[str]] = (
        frozenset({"batch_size", "labels", "noise", "buffers", "clients"}) | DOMAIN_FIELDS | PROTOCOL_FIELDS
    )
    demo: ClassVar[Demo] = Demo(
        case="text:batch=2,width=64,depth=1", floors={"token-accuracy": 1.0, "label-accuracy": 1.0}
    )

    partial: Annotated[
        bool, Field(description="also return sentences that fit but are not certified, with an infinite bound")
    ] = False

    def run(self, view: View, rng: torch.Generator) -> Reconstruction:
        return sentences_read(view, rng, partial=self.partial)
