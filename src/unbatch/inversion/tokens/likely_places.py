"""Places: which token stands where in an encoder's sentences, whatever else does, by how near a span its vector comes.

Behind the first attention a vector is made of its own token and of a mean over the sentence, and the former is much the
larger. Averaged over random sentences, the vectors of the tokens of a batch lie near the span of the batch's own, off it by
the sentence's mean alone, and all other tokens' lie far. Those of one sentence are off it alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from unbatch.inversion.tokens.fronts import Front, TokenReader
from unbatch.inversion.tokens.pairs import TokenPairs

CONTEXTS = 16  # random sentences over which each token at each position is averaged
DIRECTIONS = 96  # outside of a span, along which vectors are looked at
CLEAR = 1.25  # the gap in the distances, as a ratio, between tokens of the batch and others
LEAST_PAIRS = 0.5  # different pairs of a batch, by its vectors
DOUBTED = 2  # times as many pairs as there are vectors, which are kept where there is no such gap


@dataclass(frozen=True, eq=False)
class LikelyPlaces:
    """The (token, position) pairs that are likely in the batch, and where outside of the span each points to."""

    front: Front
    likely: Tensor  # [a, t], bool
    off: Tensor  # [a, t, q], along directions outside of the span
    gap: float  # the ratio of the distances between the last likely pair and the next one


def likely_places(reader: TokenReader, pairs: TokenPairs, fronts: list[Front]) -> LikelyPlaces:
    """The likely pairs by the front that tells them apart best."""
    found = [_places(reader, pairs, front) for front in fronts]
    return max(found, key=lambda each: each.gap)


def _places(reader: TokenReader, pairs: TokenPairs, front: Front) -> LikelyPlaces:
    a, t = pairs.allowed.shape
    rng = torch.Generator().manual_seed(3)
    directions = front.space.outside(DIRECTIONS).float()
    mean = torch.zeros(a, t, len(directions), device=directions.device)
    every = torch.arange(t)
    for _ in range(CONTEXTS):  # each token once at each position
        order = torch.stack([torch.randperm(a, generator=rng) for _ in range(t)], 1)  # [a, t]
        rows = reader.rows(front, pairs.tokens[order.to(pairs.tokens.device)], quick=True)
        unit = torch.nn.functional.normalize(rows, dim=2) @ directions.T
        mean[order, every[None].expand(a, -1)] += unit / CONTEXTS
    allowed = pairs.allowed.to(mean.device)
    size = mean.norm(dim=2).masked_fill(~allowed, torch.inf)
    sizes = size[allowed].sort().values
    rank = front.space.rank  # as many vectors as the batch has: as many pairs, less those that sentences share
    least, most = max(t, math.ceil(LEAST_PAIRS * rank)), min(rank, len(sizes) - 1)
    if len(sizes) <= rank or most < least:
        return LikelyPlaces(front, allowed, mean, float(len(sizes) <= rank))
    ratios = sizes[least : most + 1] / sizes[least - 1 : most].clamp_min(1e-30)
    gap, k = float(ratios.max()), least - 1 + int(ratios.argmax())
    if gap < CLEAR:
        k = min(DOUBTED * rank, len(sizes)) - 1
    return LikelyPlaces(front, size <= sizes[k], mean, gap)


def sentences_alike(reader: TokenReader, pairs: TokenPairs, found: LikelyPlaces) -> list[Tensor]:
    """Sentences [t] of likely tokens that are off the span alike, one about each likely pair."""
    sentences = []
    for a, i in found.likely.nonzero().tolist():
        far = (found.off - found.off[a, i]).norm(dim=2).masked_fill(~found.likely, torch.inf)  # [a, t]
        best, which = far.min(0)
        sentence = pairs.tokens[which.to(pairs.tokens.device)].clone()
        sentence[i] = pairs.tokens[a]
        known = best.isfinite()
        ends = len(known) if bool(known.all()) else int((~known).nonzero()[0])
        if ends > i:
            sentences.append(reader.padded(sentence[None, :ends])[0])
    return sentences
