"""token-capacity: how many words and sentences a gradient of this model has room to tell, and how much of it is used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, final

import torch
from torch import Tensor

from unbatch.analysis import Analysis, Verdict
from unbatch.errors import NotApplicable
from unbatch.inversion.tokens.fronts import Front, TokenReader
from unbatch.inversion.view import View


@final
class TokenCapacity(Analysis):
    """Up to how many words and sentences `token-span` is exact behind this model, and how full the batch makes its spans.

    A layer of width d, or an adapter of rank r, behind a norm tells at most d - 1, or r - 1, different vectors apart: with
    learned positions tokens + positions - components are needed for the bag, and one for each different beginning of a
    sentence behind the first attention (of an encoder one for each token of each different sentence). A span that is full
    tells nothing, so a batch is safe from this attack by adapters of a rank that its vectors fill. That says nothing of
    other attacks, nor of trained embeddings, whose rows name the words (`docs/theory/tokens.md`).
    """

    paper: ClassVar[str] = (
        "Petrov, Dimitrov, Baader, Müller, Vechev, DAGER, NeurIPS 2024; law of positions: this library"
    )

    def run(self, view: View, at: tuple[Tensor, Tensor] | None, rng: torch.Generator) -> Sequence[Verdict]:
        if not view.takes_tokens:
            raise NotApplicable("the inputs are no tokens.")
        reader = TokenReader.of(view.gradient)
        single = [front for front in reader.fronts if front.reach == "token"]
        if not single:
            raise NotApplicable("no dense layer that sent a gradient sees one token at a time.")
        first = max(single, key=lambda f: (not f.space.saturated, f.space.rank, f.width))
        behind = [f for f in reader.fronts if f.reach != "token"]
        said = [_words(first, reader.length)]
        if behind:
            said.append(_sentences(max(behind, key=lambda f: (not f.space.saturated, f.space.rank)), reader.length))
        return [*said, _safe_rank(first)]


def _most(front: Front) -> int:
    """How many different vectors a layer tells apart at most."""
    return min(front.space.outputs, front.space.rows.shape[1]) - 1


def _used(front: Front) -> str:
    """How many the batch has, out of how many there is room for."""
    most, rank = _most(front), front.space.rank
    least = "at least " * (front.space.saturated or front.coarse)  # noise hides some of them
    return f"{least}{most if front.space.saturated else rank} of at most {most}"


def _words(front: Front, length: int) -> Verdict:
    room = _most(front) - length + 1 if front.positioned else _most(front)
    over = f" over {length} places" if front.positioned else ""
    words = (
        f"different words that the batch may have for its bag to be exact, however many sentences it has{over}; the "
        f"span of {front.name!r} is filled to {_used(front)}."
    )
    return Verdict(name="room for words", value=float(max(room, 0)), words=words)


def _sentences(front: Front, length: int) -> Verdict:
    room, most = _most(front) // length, _used(front)
    what = "distinct prefixes" if front.reach == "prefix" else "distinct tokens of sentences"
    more = "more where sentences begin alike" if front.reach == "prefix" else "more where they are shorter"
    end = " The span is full, and tells no sentence." if front.space.saturated else ""
    words = (
        f"sentences of {length} tokens that {front.name!r} tells apart whatever their words, and {more}; "
        f"{what} {most}.{end}"
    )
    return Verdict(name="room for sentences", value=float(room), words=words)


def _safe_rank(front: Front) -> Verdict:
    least = "at least " * (front.space.saturated or front.coarse)
    safe = front.space.rank + 1
    words = (
        f"rank up to which an adapter's gradient would tell `token-span` no word of this batch, which has {least}"
        f"{front.space.rank} independent vectors in {front.name!r}: its span would be full. Words are told apart reliably "
        f"from rank {front.space.rank + 4} on. Embeddings that are trained beside it name the words all the same."
    )
    return Verdict(name="safe adapter rank", value=float(safe), words=words)
