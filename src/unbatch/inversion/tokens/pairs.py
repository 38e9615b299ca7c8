"""Pairs: which tokens stand at which positions, by the span of the first layers that see one position at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unbatch.errors import NotApplicable
from unbatch.inversion.tokens.fronts import SCREEN_ROUNDING, SCREENS, Front, TokenReader
from unbatch.numerics.dictionary.bipartite import Components, components, proven
from unbatch.numerics.dictionary.membership import CUT
from unbatch.progress import tick

WORDS_AT_ONCE = 2**21  # numbers of one run over words


@dataclass(frozen=True, eq=False)
class TokenPairs:
    """The tokens that pass the test of the first layers' span, and where."""

    tokens: Tensor  # [a], those that pass anywhere
    allowed: Tensor  # [a, t], bool
    front: Front
    nearest: float  # how far off the nearest one is that does not pass, in units of what rounding explains
    farthest: float  # and the farthest one that does
    sees_all: bool  # whether the front hears from every position, and not from some alone

    @property
    def parts(self) -> Components:
        """The components of the graph between tokens and positions; of one position where positions do not enter."""
        return components(self.allowed.cpu() if self.front.positioned else self.allowed[:, :1].cpu())

    @property
    def expected_rank(self) -> int:
        """The rank that a batch has that uses every one of these tokens."""
        return self.parts.rank if self.front.positioned else len(self.tokens)

    @property
    def lawful(self) -> bool:
        """Whether the gradient's rank is the one that the tokens and positions have by the law, so that all are used.

        Where noise or half precision hide what is small, so is the part of a token that little depends on, and a rank
        proves nothing.
        """
        return not self.front.coarse and self.front.space.rank == self.expected_rank

    @property
    def complete(self) -> bool:
        """Whether these tokens are all that the batch has: used, every one, and the layer hears from every position."""
        return self.lawful and self.sees_all

    def proven(self) -> Tensor:
        """The (token, position) pairs [k, 2] that every batch with this span has."""
        if not self.front.positioned or not self.lawful:
            return torch.zeros(0, 2, dtype=torch.long)
        sure = proven(self.allowed.cpu()).nonzero()
        return torch.stack([self.tokens.cpu()[sure[:, 0]], sure[:, 1]], 1)

    def at(self, position: int) -> Tensor:
        """The tokens that may stand at a position."""
        return self.tokens[self.allowed[:, position]]


def token_pairs(reader: TokenReader) -> TokenPairs:
    """The (token, position) pairs whose vectors lie in the span of the first layers' gradient.

    Every word at every position is a candidate: a sentence that repeats a word shows it at all of them at once. Of several
    fronts that see one position at a time the one with the most independent vectors is taken (a query's adapter, say,
    never sees the first position), and the others where they are no poorer.
    Raises NotApplicable: there is no such front; or its span is full, so that every word passes.
    """
    fronts = [f for f in reader.fronts if f.reach == "token"]
    if not fronts:
        raise NotApplicable("no dense layer that sent a gradient sees one token at a time.")
    likely = _likely(reader)
    sorted_out = len(likely) < len(reader.words)
    front = max(fronts, key=lambda f: (not f.space.saturated, f.space.rank, f.width))
    full = NotApplicable(
        f"the first layers' gradient has {front.space.rank} independent directions at width {front.width}, and any word "
        "fits their span: the batch has too many different tokens for this width."
    )
    if front.space.saturated and not sorted_out:
        raise full
    words, off = _offness(reader, front, likely)
    passes = off <= CUT
    if int(passes.any(1).sum()) > front.space.rank and not sorted_out:
        raise full
    if not bool(passes.any()):
        raise NotApplicable(
            "no word fits the span of the first layers' gradient: it was altered, or is of something else."
        )
    kept = passes.any(1)
    nearest = float(off[~passes].min()) if bool((~passes).any()) else torch.inf
    return TokenPairs(words[kept], passes[kept], front, nearest, float(off[passes].max()), reader.sees_all(front))


def _likely(reader: TokenReader) -> Tensor:
    """The words that can be in the batch: where the embedding sent rows of zeros, the others; else all."""
    sent = reader.view.update.get(reader.embedding)
    if sent is None or len(sent) != reader.vocabulary:
        return reader.words
    used = sent.any(1)
    return reader.words[used[reader.words]] if bool(used[reader.words].any()) else reader.words


def _offness(reader: TokenReader, front: Front, words: Tensor) -> tuple[Tensor, Tensor]:
    """The words [c] and how far each is off the span at each position [c, t]; inf where a quick look was enough."""
    t, space = reader.length, front.space
    off = torch.full((len(words), t), torch.inf, dtype=torch.float64)
    if not front.positioned:
        missing = -len(words) % t
        packed = torch.cat([words, words[:1].expand(missing)]).reshape(-1, t)
        rows = reader.rows(front, packed).flatten(0, 1)[: len(words)]
        return words, space.offness(rows)[:, None].expand(-1, t).cpu()
    screens = space.outside(SCREENS).float()
    limit = space.farthest + SCREEN_ROUNDING
    at_once = max(1, WORDS_AT_ONCE // (t * front.width))
    for k in range(0, len(words), at_once):
        if not tick(k / len(words)):
            raise NotApplicable(f"its time ended when {k:,} of {len(words):,} words had been tried.")
        some = words[k : k + at_once]
        rows = reader.rows(front, some[:, None].expand(-1, t), quick=True)
        flat = rows.flatten(0, 1)
        along = ((flat @ screens.T).norm(dim=1) / flat.norm(dim=1).clamp_min(1e-30)).view(len(some), t)
        near = (along <= limit).nonzero()
        off[k : k + len(some)] = (along.double() * CUT / limit).cpu()  # at least so far, where it is beyond the cut
        if len(near):
            which, inverse = near[:, 0].unique(return_inverse=True)
            exact = reader.rows(front, some[which][:, None].expand(-1, t))
            off[k + near[:, 0].cpu(), near[:, 1].cpu()] = space.offness(exact[inverse, near[:, 1]]).cpu()
    return words, off
