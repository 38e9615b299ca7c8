"""Bag: which tokens a batch has, in no order, as far as the first layers' span or the embedding's rows tell."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unbatch.errors import NotApplicable
from unbatch.inversion.tokens.fronts import TokenReader
from unbatch.inversion.tokens.pairs import TokenPairs, token_pairs
from unbatch.inversion.view import View


@dataclass(frozen=True, eq=False)
class Bag:
    """The different tokens of a batch that anything depends on, and what tells them."""

    tokens: Tensor  # [a], ascending
    exact: bool  # they are those of the batch, all of them and no others; else the batch has no others
    pairs: TokenPairs | None  # what the first layers' span tells; None where it tells nothing
    rows: str  # the embedding whose rows name the tokens; empty where they do not


def bag_read(view: View) -> Bag:
    """The different tokens of the batch, by the rows of a trained embedding or the span of the first layers.

    A row of an embedding that nobody looked up has no gradient; one that was has one, unless nothing depends on it. Where
    noise was added no row is zero, and where the head is tied to it, none is either.
    Raises NotApplicable: neither tells anything; the message says why.
    """
    view = view.gradient
    reader = TokenReader.of(view)
    sure = "altered" not in view.knowledge  # what a defence changed may lack some
    pairs, why = None, ""
    try:
        pairs = token_pairs(reader)
    except NotApplicable as error:
        why = str(error)
    used = _looked_up(reader)
    if used is not None:
        tiny = reader.view.update[reader.embedding].dtype == torch.float16  # rows below its range are zero
        return Bag(used, sure and not tiny, pairs, reader.embedding)
    if pairs is None:
        raise NotApplicable(why)
    return Bag(torch.sort(pairs.tokens.cpu()).values, pairs.complete and sure, pairs, "")


def _looked_up(reader: TokenReader) -> Tensor | None:
    """The tokens whose rows of the embedding sent a gradient; None where it sent none, or all rows did."""
    sent = reader.view.update.get(reader.embedding)
    used = sent.any(1) if sent is not None and len(sent) == reader.vocabulary else None
    if used is None or reader.tied or bool(used.all()) or not bool(used.any()):
        return None
    tokens = used.nonzero().flatten().cpu()
    return tokens if reader.padding is None else tokens[tokens != reader.padding]
