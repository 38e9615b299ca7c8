"""Prefixes: sentences of a decoder grown token by token, by the span of layers that see what stands before."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from unbatch.errors import NotApplicable
from unbatch.inversion.tokens.fronts import Front, TokenReader
from unbatch.inversion.tokens.pairs import TokenPairs
from unbatch.numerics.dictionary.membership import CUT, DRAWN_CUT
from unbatch.progress import tick

FRONTS = 3  # layers whose spans are asked
COARSE_FRONTS = 8  # that are asked together under noise or half precision
LEAST_APART = 1.05  # times as far off as the batch's own beginnings, at least, is the nearest that is none
MEMBER = 1.25 * DRAWN_CUT  # up to which nothing tells a vector from a member
HIDDEN_CUT = 3 * CUT  # beyond which a vector is no member, whatever directions are hidden
LEAST_RANK = 0.5  # of the largest one of all fronts, which those have that see all positions
CONTROLS = 32  # random sentences that no test may let pass
MOST_PREFIXES = 8  # times the rank of a span that is no longer a test


@dataclass(frozen=True, eq=False)
class Grown:
    """Sentences found, and all their beginnings that passed."""

    leaves: Tensor  # [m, t], padded: those that nothing extends
    inner: Tensor  # [k, t], padded: beginnings of others
    lengths: Tensor  # [m + k] of both
    fronts: tuple[Front, ...]
    nearest: float  # how far off the nearest beginning is that does not pass
    farthest: float
    whole: bool  # whether growing came to its end

    @property
    def prefixes(self) -> int:
        """How many different beginnings passed."""
        return len(self.leaves) + len(self.inner)

    @property
    def lawful(self) -> bool:
        """Whether the gradient has as many independent vectors as different beginnings passed."""
        return self.prefixes == self.fronts[0].space.rank


def prefix_fronts(reader: TokenReader) -> list[Front]:
    """The first fronts whose vectors depend on the sentence so far, and whose spans tell sentences apart.

    A span that random sentences lie in tells nothing. Deeper layers see no more vectors that matter than shallower ones
    (the last one below a head that reads the last token sees one a sentence), so those are taken that have as many as the
    first.
    """
    controls = reader.draw(CONTROLS, torch.Generator().manual_seed(1))
    usable = list[Front]()
    if any(front.coarse for front in reader.fronts):
        return _coarse_fronts(reader, controls)
    for front in reader.fronts:
        if front.reach != "prefix" or front.space.saturated:
            continue
        if usable and front.space.rank < usable[0].space.rank:
            break
        off = front.space.offness(reader.rows(front, controls)[:, 1:].flatten(0, 1))
        if len(off) and float((off <= CUT).double().mean()) < 1 / CONTROLS:
            usable.append(front)
        if len(usable) == FRONTS:
            break
    return usable


def _coarse_fronts(reader: TokenReader, controls: Tensor) -> list[Front]:
    """The fronts that are asked together where noise or half precision hide some directions of each one's span."""
    fronts = [f for f in reader.fronts if f.reach == "prefix" and f.space.rank and not f.space.saturated]
    told = [(float(_at_last(reader, f, controls).log().median()), f) for f in fronts]
    most = max((f.space.rank for f in fronts), default=0)
    clear = [(far, f) for far, f in told if far > math.log(CUT) and f.space.rank >= LEAST_RANK * most]
    return [f for _, f in sorted(clear, key=lambda pair: pair[0], reverse=True)[:COARSE_FRONTS]]


def _at_last(reader: TokenReader, front: Front, sentences: Tensor) -> Tensor:
    """How far the last vectors of sentences [c, i] are off a span [c], in the arithmetic of float32."""
    return front.space.offness(reader.rows(front, sentences, quick=True)[:, -1].double())


def sentences_grown(reader: TokenReader, pairs: TokenPairs) -> Grown:
    """Every sentence whose beginnings all lie in the span of what layers behind the first attention received.

    Breadth-first over positions: each beginning that passed is continued by every token that may stand there.
    Raises NotApplicable: no layer's span tells beginnings apart.
    """
    fronts = prefix_fronts(reader)
    if not fronts:
        ranks = [f.space.rank for f in reader.fronts if f.reach == "prefix"]
        raise NotApplicable(
            "no layer's gradient tells the beginnings of sentences apart: "
            + (f"their ranks are {min(ranks)} to {max(ranks)}, as full as they can be." if ranks else "none sees them.")
        )
    device = reader.view.obs.device
    frontier = torch.zeros(1, 0, dtype=torch.long, device=device)
    leaves, inner = list[Tensor](), list[Tensor]()
    nearest, farthest, whole = torch.inf, 0.0, True
    for i in range(reader.length):
        following = pairs.at(i)
        tried = torch.cat(
            [frontier.repeat_interleave(len(following), 0), following.repeat(len(frontier))[:, None]], 1
        )  # [p a, i + 1]
        off = _offness(reader, fronts, tried)
        passes = off <= (_edge(off, reader.view.knowledge.get("batch_size")) if fronts[0].coarse else CUT)
        if bool((~passes).any()):
            nearest = min(nearest, float(off[~passes].min()))
        if bool(passes.any()):
            farthest = max(farthest, float(off[passes].max()))
        extended = (
            passes.view(len(frontier), len(following)).any(1) if len(following) else passes.new_zeros(len(frontier))
        )
        if i:
            leaves.append(frontier[~extended])
            inner.append(frontier[extended])
        frontier = tried[passes]
        if not len(frontier):
            break
        if len(frontier) > MOST_PREFIXES * fronts[0].space.rank or not tick((i + 1) / reader.length):
            whole = False
            break
    leaves.append(frontier)
    if not any(part.numel() for part in (*leaves, *inner)):
        raise NotApplicable(
            f"no word begins a sentence by the span of {fronts[0].name!r}, which sees fewer vectors than there are."
        )
    lengths = [torch.full((len(part),), part.shape[1], device=device) for part in (*leaves, *inner)]
    ends, begins = (
        torch.cat([reader.padded(part) for part in parts if part.shape[1]] or [leaves[0].new_zeros(0, reader.length)])
        for parts in (leaves, inner)
    )
    return Grown(ends, begins, torch.cat(lengths), tuple(fronts), nearest, farthest, whole)


def _edge(off: Tensor, n: int | None) -> float:
    """How far off the spans [c] beginnings of one length may be, where some directions of the spans are hidden.

    A batch of n has at most n of them, so that all but the n nearest are of no batch: what belongs to it is nearer than the
    nearest of those, by more than they differ among themselves. What cannot be told from a member passes in any number,
    as lone words that are repeated do.
    """
    if n is None or len(off) <= n:
        return CUT
    nearest = off.sort().values
    others = nearest[n : 2 * n + 2]
    edge = float(others[0]) / max(LEAST_APART, float(others[-1] / others[0]))
    return min(max(edge, MEMBER), HIDDEN_CUT)


def _offness(reader: TokenReader, fronts: list[Front], tried: Tensor) -> Tensor:
    """How far the last vectors of beginnings [c, i] are off the spans, the farthest of all fronts; [c].

    Noise and half precision hide directions of a span, each front's others: there it is the geometric mean of all.
    """
    last, c = tried.shape[1] - 1, len(tried)
    if not c:  # not every network runs on no sentence
        return torch.zeros(0, dtype=torch.float64, device=tried.device)
    sentences = tried if reader.takes_short else reader.padded(tried)
    if fronts[0].coarse:
        rows = (reader.rows(f, sentences, quick=True)[:, last].double() for f in fronts)
        each = torch.stack([f.space.offness(x).clamp_min(DRAWN_CUT) for f, x in zip(fronts, rows, strict=True)])
        return each.log().mean(0).exp()
    off = torch.zeros(c, dtype=torch.float64, device=tried.device)
    left = torch.arange(c, device=tried.device)
    for front in fronts:
        if not len(left):
            break
        off[left] = torch.maximum(off[left], reader.offness_at(front, sentences[left], last))
        left = left[off[left] <= CUT]
    return off
