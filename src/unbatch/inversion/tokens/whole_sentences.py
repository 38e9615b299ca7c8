"""Whole sentences: those of an encoder, whose vectors behind the first attention depend on every token, by a search."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unbatch.errors import NotApplicable
from unbatch.inversion.tokens.fronts import Front, TokenReader
from unbatch.inversion.tokens.likely_places import LikelyPlaces, likely_places, sentences_alike
from unbatch.inversion.tokens.pairs import TokenPairs
from unbatch.inversion.tokens.prefixes import CONTROLS
from unbatch.numerics.dictionary.membership import CUT, row_space
from unbatch.numerics.dictionary.sharing import Shares, token_shares
from unbatch.progress import tick

FRONTS = 4  # layers that are asked
MOST_TRIED = 4096  # sentences up to which all are tried
STARTS = 40  # random sentences that a search begins with
MENDED = 0.75  # share of a found sentence's tokens that a start has which is not tried
LEAST_ALIKE = 0.2  # what stands at a position behind a sentence's end has less in common with it
LIKELIEST = 6  # tokens of a position that are tried together with those of another one
SPAN_EPS = 1e-12  # relative error of the vectors of sentences that were found


@dataclass(frozen=True, eq=False)
class SentencesFound:
    """Sentences all of whose vectors lie in the span of a layer that sees them whole."""

    sentences: Tensor  # [m, t], padded
    front: Front
    complete: bool  # their vectors span all that the gradient does


def sentences_searched(reader: TokenReader, pairs: TokenPairs, rng: torch.Generator) -> SentencesFound:
    """The sentences of an encoder's batch, as far as a search finds them.

    Tokens are tried where they are likely to stand, first. Every sentence of them is tried where they are few;
    else the mean distance of a sentence's vectors from the span is brought down, one token or two at a time, from starts
    that this span and the first layers' gradient tell (`_starts`), then from random ones, of all tokens. Changes of two
    tokens take most of the time, and are tried from a start only when all have been tried without. It ends when the
    vectors of the sentences found span what the gradient spans: then none is missing.
    Raises NotApplicable: no layer tells whole sentences apart, or none was found.
    """
    seen = likely_places(reader, pairs, _fronts(reader))
    front = seen.front
    told = _told(reader, pairs)
    search = _Search(reader, pairs, front, seen.likely.cpu(), None if told is None else told.share)
    found = dict[tuple[int, ...], None]()
    count = math.prod(max(1, len(search.choice(i))) for i in range(reader.length))
    complete = False
    if count <= MOST_TRIED:
        every = search.every()
        good = search.fits(every)
        found |= dict.fromkeys(map(tuple, every[good].tolist()))
        complete = _spanned(reader, front, found)
    starts = [] if complete or count <= MOST_TRIED else _starts(reader, pairs, told, search, seen)
    wide = replace(search, places=pairs.allowed.cpu())  # if what seemed unlikely was in the batch
    tries = [(start, search, twice) for twice in (False, True) for start in starts]
    all_tried = count <= MOST_TRIED and torch.equal(search.places, wide.places)
    tries += [(wide.start(rng), wide, True) for _ in range(0 if complete or all_tried else STARTS)]
    for k, (start, search, twice) in enumerate(tries):
        if not tick(k / len(tries)):
            break
        if any(sum(x == y for x, y in zip(start.tolist(), one, strict=True)) > MENDED * len(one) for one in found):
            continue
        one = search.descended(start, twice=twice)
        if bool(search.fits(one[None])) and tuple(one.tolist()) not in found:
            found[tuple(one.tolist())] = None
            complete = _spanned(reader, front, found)
        if complete:
            break
    if not found:
        raise NotApplicable(
            f"no sentence was found whose vectors lie in the span of {front.name!r}, among "
            f"{count if count < 10**6 else f'10^{math.log10(count):.0f}'} that its tokens and positions allow."
        )
    return SentencesFound(torch.tensor(list(found), device=reader.view.obs.device), front, complete)


def _told(reader: TokenReader, pairs: TokenPairs) -> Shares | None:
    """What the first layers' gradient tells of each token at each position; None where positions do not enter."""
    front = pairs.front
    if not front.positioned or int(pairs.allowed.any(0).sum()) < 2:
        return None
    x = reader.rows(front, pairs.tokens[:, None].expand(-1, reader.length))
    return token_shares(x, pairs.allowed.to(x.device), front.gradient)


def _starts(
    reader: TokenReader, pairs: TokenPairs, told: Shares | None, search: _Search, seen: LikelyPlaces
) -> list[Tensor]:
    """Sentences [t] of tokens that are off a span alike, or whose parts of the first layers' gradient are.

    One of each about each token, the nearest to the span first.
    """
    found = sentences_alike(reader, pairs, seen)
    if told is not None:
        found += _starts_told(reader, pairs, told)
    if not found:
        return []
    distinct = torch.unique(torch.stack(found), dim=0)
    return list(distinct[search.off(distinct).argsort()])


def _starts_told(reader: TokenReader, pairs: TokenPairs, told: Shares) -> list[Tensor]:
    """Sentences [t] of tokens whose parts of the first layers' gradient are alike.

    A query's delta is a mixture of its sentence's keys, and so the deltas of one sentence's queries are alike, and those of
    two sentences are not. Which of a layer's parts are queries is not known: each third of a joint layer, and each layer of
    several, is asked by itself.
    """
    front = pairs.front
    likely = told.share.clamp(0, 1)  # [a, t]
    found = list[Tensor]()
    for part in torch.split(told.sums, front.gradient.shape[0] // _thirds(front), dim=1):
        unit = torch.nn.functional.normalize(part, dim=1)
        alike = unit @ unit.T  # [r, r]
        for a in range(len(pairs.tokens)):
            i = int(likely[a].argmax())
            to = alike[told.row[a, i]][told.row.clamp_min(0)]  # [a, t]
            score = torch.where(told.row >= 0, likely * to.clamp_min(0), -1.0)
            best, which = score.max(0)
            sentence = pairs.tokens[which]
            ends = reader.length
            while reader.padding is not None and ends > i + 1 and float(best[ends - 1]) < LEAST_ALIKE:
                ends -= 1
            found.append(reader.padded(sentence[None, :ends])[0])
    return found


def _thirds(front: Front) -> int:
    """How many parts a front's layers have: the layers, or queries, keys and values in one."""
    return len(front.layers) if len(front.layers) > 1 or len(front.gradient) % 3 else 3


def _fronts(reader: TokenReader) -> list[Front]:
    """The first layers that see whole sentences, and whose spans tell them apart."""
    controls = reader.draw(CONTROLS, torch.Generator().manual_seed(1))
    fronts = [f for f in reader.fronts if f.reach == "sentence"]
    if not fronts:
        raise NotApplicable("no layer that sees more than one token sent a gradient of one vector at each position.")
    usable = []
    for front in itertools.islice((f for f in fronts if not f.space.saturated), FRONTS):
        off = front.space.offness(reader.rows(front, controls).flatten(0, 1))
        if float((off <= CUT).double().mean()) < 1 / CONTROLS:
            usable.append(front)
    if not usable:
        raise NotApplicable(
            "no layer's gradient tells whole sentences apart: the batch has too many tokens for this width."
        )
    return usable


def _spanned(reader: TokenReader, front: Front, found: dict[tuple[int, ...], None]) -> bool:
    """Whether the vectors of the sentences found are as many independent ones as the gradient has."""
    if not found:
        return False
    sentences = torch.tensor(list(found), device=reader.view.obs.device)
    rows = reader.rows(front, sentences)
    there = sentences != reader.padding if reader.padding is not None else torch.ones_like(sentences, dtype=torch.bool)
    unit = torch.nn.functional.normalize(rows[there], dim=1)
    return row_space(unit, eps=SPAN_EPS).rank >= front.space.rank


@dataclass(frozen=True, eq=False)
class _Search:
    """Descent on the mean squared distance of a sentence's vectors from a span."""

    reader: TokenReader
    pairs: TokenPairs
    front: Front
    places: Tensor  # [a, t], bool: which tokens are likely to stand where at all
    likely: Tensor | None = None  # [a, t], how likely each token stands at each position

    def at(self, position: int) -> Tensor:
        """The tokens that are tried at a position: the likely ones, or all that fit where none is."""
        chosen = self.places[:, position] & self.pairs.allowed[:, position].cpu()
        return self.pairs.tokens[chosen.to(self.pairs.tokens.device)] if bool(chosen.any()) else self.pairs.at(position)

    def choice(self, position: int) -> Tensor:
        """The tokens that may stand at a position; from the second one on the padding as well, where it is known."""
        words = self.at(position)
        padding = self.reader.padding
        ends = position and padding is not None
        return torch.cat([words, words.new_full((1,), padding)]) if ends or not len(words) else words  # type: ignore[arg-type]

    def every(self) -> Tensor:
        """All sentences that end once."""
        return self._ending_once(torch.cartesian_prod(*(self.choice(i) for i in range(self.reader.length))))

    def start(self, rng: torch.Generator) -> Tensor:
        """A random sentence, as long as any may be."""
        chosen = []
        for i in range(self.reader.length):
            words = self.at(i) if len(self.at(i)) else self.choice(i)
            chosen.append(words[int(torch.randint(len(words), (1,), generator=rng))])
        return torch.stack(chosen)

    def off(self, sentences: Tensor) -> Tensor:
        """The mean squared distance of the vectors of sentences [n, t] from the span [n]."""
        rows, there = self.reader.rows(self.front, sentences), self._there(sentences)
        unit = torch.nn.functional.normalize(rows, dim=2)
        space = self.front.space.rows.to(unit)
        left = (unit - unit @ space.T @ space).square().sum(2)
        return (left * there).sum(1) / there.sum(1)

    def fits(self, sentences: Tensor) -> Tensor:
        """Whether all vectors of sentences [n, t] are members of the span [n]."""
        rows = self.reader.rows(self.front, sentences)
        members = self.front.space.members(rows.flatten(0, 1)).view(rows.shape[:2])
        return (members | ~self._there(sentences)).all(1)

    def descended(self, sentence: Tensor, *, twice: bool) -> Tensor:
        """The sentence [t] that no change of one token brings nearer to the span; with `twice`, nor of two likely ones.

        The best of all changes is made, so that a sentence with one wrong token is mended at once.
        """
        best = float(self.off(sentence[None]))
        while best > self.front.space.own**2 / 16:
            before = best
            changed = [self._changed(sentence[None], i, self.choice(i)) for i in range(len(sentence))]
            every = torch.cat([*changed, self._cut(sentence)])
            sentence, best = self._better(sentence, best, every)
            if twice and best >= before * (1 - 1e-9):
                sentence, best = self._better(sentence, best, self._changed_twice(sentence))
            if best >= before * (1 - 1e-9):
                break
        return sentence

    def _better(self, sentence: Tensor, best: float, others: Tensor) -> tuple[Tensor, float]:
        if not len(others):
            return sentence, best
        off = self.off(others)
        k = int(off.argmin())
        return (others[k], float(off[k])) if float(off[k]) < best else (sentence, best)

    def _changed(self, sentences: Tensor, i: int, words: Tensor) -> Tensor:
        other = sentences.repeat_interleave(len(words), 0)
        other[:, i] = words.repeat(len(sentences))
        return self._ending_once(other)

    def _cut(self, sentence: Tensor) -> Tensor:
        """The sentence ended at each place, where padding is known."""
        if self.reader.padding is None:
            return sentence[None][:0]
        places = torch.arange(len(sentence), device=sentence.device)
        return sentence.expand(len(sentence) - 1, -1).masked_fill(places > places[:-1, None], self.reader.padding)

    def _changed_twice(self, sentence: Tensor) -> Tensor:
        found, t = list[Tensor](), len(sentence)
        words = [self._likeliest(i) for i in range(t)]
        for i in range(t):
            for j in range(i + 1, t):
                if len(words[i]) and len(words[j]):
                    found.append(self._changed(self._changed(sentence[None], i, words[i]), j, words[j]))
        return torch.cat(found) if found else sentence[None][:0]

    def _likeliest(self, position: int) -> Tensor:
        """The few tokens that most likely stand at a position."""
        if self.likely is None or int(self.places[:, position].sum()) <= LIKELIEST:
            return self.at(position)[:LIKELIEST]
        allowed = self.pairs.allowed[:, position]
        order = self.likely[:, position].masked_fill(~allowed.to(self.likely.device), -1).argsort(descending=True)
        return self.pairs.tokens[order[: min(LIKELIEST, int(allowed.sum()))]]

    def _there(self, sentences: Tensor) -> Tensor:
        padding = self.reader.padding
        return torch.ones_like(sentences, dtype=torch.bool) if padding is None else sentences != padding

    def _ending_once(self, sentences: Tensor) -> Tensor:
        there = self._there(sentences)
        return sentences[(there[:, :-1] | ~there[:, 1:]).all(1)]
