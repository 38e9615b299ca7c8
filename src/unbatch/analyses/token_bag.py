"""token-bag: which words a batch of texts has, whether or not its sentences can be put together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, final

import torch
from torch import Tensor

from unbatch.analysis import TOKENS_PROVEN, Analysis, Verdict
from unbatch.errors import NotApplicable
from unbatch.inversion.tokens.bag import Bag, bag_read
from unbatch.inversion.tokens.pairs import TokenPairs
from unbatch.inversion.view import View

MOST_LISTED = 4096  # tokens


@final
class TokenBag(Analysis):
    """Which tokens the texts of a batch are made of, in no order, where the sentences themselves may stay open.

    What a token at a position sends into the first layers is one of finitely many vectors, and these layers' gradient spans
    those of the batch: so each word of the vocabulary is in the batch or it is not. With learned positions the span has
    rank tokens + positions - components; where the gradient has that rank, the tokens that fit are those of the batch, all
    of them and no others. That holds of an update as the client computed it: nothing but the truth recomputes it, since the
    sentences that would be simulated are open. It is exact for many more texts than sentences are
    (`docs/theory/tokens.md`). What nothing depends on does not show: padding, and the last word of a text that is trained
    on next words.
    """

    paper: ClassVar[str] = (
        "Petrov, Dimitrov, Baader, Müller, Vechev, DAGER, NeurIPS 2024; law of positions: this library"
    )

    def run(self, view: View, at: tuple[Tensor, Tensor] | None, rng: torch.Generator) -> Sequence[Verdict]:
        if not view.takes_tokens:
            raise NotApplicable("the inputs are no tokens.")
        found = bag_read(view)
        said = [_tokens(found)]
        if found.pairs is not None and found.pairs.front.positioned:
            said.append(_places(found.pairs))
        return said


def _tokens(found: Bag) -> Verdict:
    how = list[str]()
    if found.rows:
        how.append(f"rows of {found.rows!r} that are not zero")
    if found.pairs is not None:
        front, expected = found.pairs.front, found.pairs.expected_rank
        by_law = front.space.rank == expected
        law = "as these tokens have by the law" if by_law else f"where these tokens have {expected}"
        how.append(f"the gradient of {front.name!r} has rank {front.space.rank} at width {front.width}, {law}")
    exact = "if nothing altered it, the batch is made of them, all of them and no others that anything depends on."
    fit = "if nothing altered it, the batch is made of no others, but single ones of them may be missing in it."
    if found.pairs is not None and found.pairs.front.coarse and not found.rows:
        fit = "noise or half precision may hide what little depends on, so that the batch may have others as well."
    elif found.pairs is not None and not found.pairs.sees_all and not found.rows:
        fit = "the layer does not hear from every position, so that the batch may have others there."
    return Verdict(
        name=TOKENS_PROVEN if found.exact else "tokens that fit",
        value=float(len(found.tokens)),
        words=f"{'; '.join(how)}: {exact if found.exact else fit}",
        tokens=found.tokens.tolist()[:MOST_LISTED],
    )


def _places(pairs: TokenPairs) -> Verdict:
    fit, sure = int(pairs.allowed.sum()), len(pairs.proven())
    count = pairs.parts.count
    words = (
        f"of {fit:,} (token, place) pairs that fit; the others follow from each other, in {count} "
        f"component{'s' * (count != 1)}, and no tolerance tells which of them occur."
    )
    return Verdict(name="places proven", value=float(sure), words=words)
