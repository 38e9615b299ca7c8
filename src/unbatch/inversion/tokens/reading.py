"""Reading: sentences of a batch out of a transformer's gradient, from the dictionary of its tokens to the whole update."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unbatch.errors import NotApplicable
from unbatch.inversion.tokens.assembly import Batch, assembled, in_order
from unbatch.inversion.tokens.fronts import TokenReader
from unbatch.inversion.tokens.last_tokens import last_tokens
from unbatch.inversion.tokens.next_tokens import labelled, next_tokens
from unbatch.inversion.tokens.pairs import TokenPairs, token_pairs
from unbatch.inversion.tokens.prefixes import Grown, sentences_grown
from unbatch.inversion.tokens.table_rows import sentence_by_rows
from unbatch.inversion.tokens.token_labels import labelled_tokens, labels_each_token
from unbatch.inversion.tokens.whole_sentences import SentencesFound, sentences_searched
from unbatch.inversion.view import View
from unbatch.reconstruction import Reconstruction

SHOWN_TOKENS = 4096  # of a bag that a trace lists
MOST_FITTING = 2.0  # times the rank of a span, and
FEWEST_REFUSED = 512  # sentences at least, are so many that they are no sentences of the batch: the span is no test


def sentences_read(view: View, rng: torch.Generator, *, partial: bool) -> Reconstruction:
    """The sentences of the batch with their labels, from the spans of the gradient, claimed where they are its sum.

    With `partial` sentences that passed every span, but do not add up to the gradient, are returned as guesses.
    Raises NotApplicable: the network reads no tokens, no layer sees one at a time, spans are full, or sentences are
    missing; the message says how far it came.
    """
    view = view.gradient
    reader = TokenReader.of(view)
    try:
        return _by_spans(reader, rng, partial=partial)
    except NotApplicable as why:
        try:
            batch = sentence_by_rows(reader)
        except NotApplicable:
            raise why from None
        return Reconstruction(
            inputs=batch.inputs,
            labels=batch.labels,
            bound=torch.zeros(1, dtype=torch.float64),
            trace={"by": "the rows of the tables of tokens and of positions", "not by spans": str(why)},
        )


def _by_spans(reader: TokenReader, rng: torch.Generator, *, partial: bool) -> Reconstruction:
    """The sentences by the spans of the layers' gradients."""
    view = reader.view
    pairs = token_pairs(reader)
    trace = _of_pairs(pairs)
    if view.steps > 1:
        trace["local steps"] = (
            f"{view.steps}: the update is read as a mean of gradients, and proven by running the steps"
        )
    leaves: Tensor | None = None
    try:
        if any(f.reach == "prefix" for f in reader.fronts):
            found = sentences_grown(reader, pairs)
            _check_few(len(found.leaves), found.fronts[0].space.rank)
            leaves, trace = found.leaves, trace | _of_beginnings(found)
            batch = _batch(reader, found)
        else:
            searched = sentences_searched(reader, pairs, rng)
            leaves, trace = searched.sentences, trace | _of_search(searched)
            batch = labelled_tokens(reader, leaves) if labels_each_token(reader) else assembled(reader, leaves)
    except NotApplicable as why:
        if partial and leaves is not None and len(leaves):
            open_bound = torch.full((len(leaves),), torch.inf)
            return Reconstruction(inputs=leaves, bound=open_bound, trace=trace | {"open": str(why)})
        raise NotApplicable(f"{_said(pairs)}, but not the sentences: {why}") from why
    batch = in_order(view.obs, batch)
    return Reconstruction(
        inputs=batch.inputs, labels=batch.labels, bound=torch.zeros(len(batch.inputs), dtype=torch.float64), trace=trace
    )


def _check_few(sentences: int, rank: int) -> None:
    """Raises NotApplicable: more sentences fit a span than it can be of, so that it tells nothing of them."""
    if sentences > max(MOST_FITTING * rank, FEWEST_REFUSED):
        raise NotApplicable(
            f"{sentences:,} sentences fit a span of rank {rank}: it is too full to tell which of them are the batch's."
        )


def _batch(reader: TokenReader, found: Grown) -> Batch:
    """The batch that the sentences add up to; where those that nothing extends do not, some that others begin with are."""
    if labels_each_token(reader):
        return labelled_tokens(reader, found.leaves)
    try:
        return next_tokens(reader, torch.cat([found.leaves, found.inner]), found.lengths)
    except NotApplicable as why:
        if len(reader.view.outputs) > 1:
            try:
                return labelled(reader, last_tokens(reader, found))
            except NotApplicable as also:
                raise NotApplicable(f"{why} And by the whole gradient: {also}") from also
    try:
        return assembled(reader, found.leaves)
    except NotApplicable:
        if reader.padding is None or not len(found.inner):
            raise
        return assembled(reader, torch.cat([found.leaves, found.inner]))


def _said(pairs: TokenPairs) -> str:
    """What the first layers tell, in words."""
    many = f"{len(pairs.tokens)} tokens"
    if pairs.front.coarse:
        return f"the first layers tell {many} that fit, beside which noise or half precision may hide others"
    if not pairs.sees_all:
        return f"the layer {pairs.front.name!r}, which does not hear from every position, tells {many}"
    sure = "are exactly those of the batch" if pairs.complete else "are all that the batch can have"
    return f"the first layers tell that its {many} {sure}"


def _of_pairs(pairs: TokenPairs) -> dict[str, Any]:
    """What the first layers tell, for the record."""
    found: dict[str, Any] = {
        "layer of single tokens": pairs.front.name,
        "rank": pairs.front.space.rank,
        "width": pairs.front.width,
        "tokens": sorted(pairs.tokens.tolist())[:SHOWN_TOKENS],
        "bag exact": pairs.complete,
        "pairs that fit": int(pairs.allowed.sum()) if pairs.front.positioned else len(pairs.tokens),
        "pairs proven": len(pairs.proven()),
        "nearest token that does not fit": pairs.nearest,
    }
    if pairs.front.positioned:
        found["components"] = pairs.parts.count
    return found


def _of_search(found: SentencesFound) -> dict[str, Any]:
    """What a layer that sees whole sentences tells, for the record."""
    front = found.front
    return {
        "layer of sentences": front.name,
        "rank of sentences": front.space.rank,
        "sentences that fit": len(found.sentences),
        "sentences span the gradient": found.complete,
    }


def _of_beginnings(found: Grown) -> dict[str, Any]:
    """What the layers behind the first attention tell, for the record."""
    front = found.fronts[0]
    return {
        "layer of beginnings": front.name,
        "distinct prefixes": f"{found.prefixes} of at most {front.width - 1}",
        "rank of beginnings": front.space.rank,
        "sentences that fit": len(found.leaves),
        "nearest beginning that does not fit": found.nearest,
    }
