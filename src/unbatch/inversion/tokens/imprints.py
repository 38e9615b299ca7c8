"""Imprints: tokens read out of bins that a server planted in a transformer's feed-forward layers, and put in their order.

The planted model keeps three things apart in the numbers of a token: the token, its position on a half circle, and a tag,
a mean of what the tokens that it sees send through a random matrix. The rows of a feed-forward layer are all alike and
differ in their bias, so neighbouring rows' gradients differ by the tokens between two thresholds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from unbatch.models.transformer import Transformer, TransformerLayer
from unbatch.protocol import Update

PLACES = 2  # numbers of a token that tell its position
TAGS = 8  # numbers of a token that tell what it sees
SPARE = PLACES + TAGS + 1  # and one that the feed-forward layers write into
LONE = 0.999  # cosine from which on a bin holds the token that is nearest, and no other
EMPTY = 64.0  # roundings of a row's gradient, below which nothing lies in its bin
SAME_TAG = 2e-2  # of a tag's length, by which two of the same tokens may differ
MOST_BESIDE = 4  # tokens that are taken out of a bin to find one more
LEAST_TAG = 0.1  # of a tag's length, in which its error is measured
MOST_MISSING = 2  # tokens in a row that tags tell where no bin gave them
MOST_TRIED = 1024  # tokens of which pairs are tried
TURNS = 4  # of reading bins and filling in


@dataclass(frozen=True, eq=False)
class Node:
    """A token at its place, with the tag of what it sees."""

    token: int
    place: int
    tag: Tensor  # [TAGS]


@dataclass(frozen=True, eq=False)
class PlantedTransformer:
    """A planted transformer, and how the numbers that enter its feed-forward layers are told apart."""

    model: Transformer  # in float64
    length: int

    @property
    def width(self) -> int:
        return int(self.model.tokens.weight.shape[1])

    @property
    def body(self) -> slice:
        """The numbers that tell the token."""
        return slice(0, self.width - SPARE)

    @property
    def places(self) -> slice:
        """Those that tell its position."""
        return slice(self.width - SPARE, self.width - SPARE + PLACES)

    @property
    def tags(self) -> slice:
        """Those that tell what it sees."""
        return slice(self.width - SPARE + PLACES, self.width - 1)

    def block(self, i: int) -> TransformerLayer:
        """One of the transformer's layers."""
        return cast("TransformerLayer", self.model.blocks[i])

    def matrix(self) -> Tensor:
        """The random matrix [TAGS, width] by which tokens enter tags."""
        return self.block(0).attention.value.weight.detach()[:TAGS]

    @property
    def circle(self) -> Tensor:
        """What tells the positions [length, PLACES]."""
        return self._positions()[:, self.places]

    def _positions(self) -> Tensor:
        return cast("nn.Embedding", self.model.positions).weight.detach()

    def entering(self, tokens: Tensor, places: Tensor) -> Tensor:
        """What tokens [p] at places [p] are before the first attention, as it reads them [p, width]."""
        raw = self.model.tokens.weight.detach()[tokens] + self._positions()[places]
        return torch.nn.functional.layer_norm(raw, (self.width,))

    def marks(self, tokens: Tensor, places: Tensor) -> Tensor:
        """What tokens [p] at places [p] put into the tags of those that see them [p, TAGS]."""
        return self.entering(tokens, places) @ self.matrix().T

    def spread(self, token: int, place: int) -> float:
        """What a token's numbers are divided by before the first attention; 1 where norms come first."""
        if self.model.causal:
            return 1.0
        raw = self.model.tokens.weight.detach()[token] + self._positions()[place]
        return float((raw.var(unbiased=False) + 1e-5).sqrt())

    def sends(self, node: Node) -> Tensor:
        """The numbers that enter the first feed-forward layer for a node [width]."""
        at = torch.tensor([node.token]), torch.tensor([node.place])
        x = self.model.tokens.weight.detach()[at[0]] + self._positions()[at[1]]
        x = x[0] if self.model.causal else self.entering(*at)[0]
        x = x.clone()
        x[self.tags] += node.tag.to(x)
        return torch.nn.functional.layer_norm(x, (self.width,))


@dataclass(frozen=True, eq=False)
class Bin:
    """The part of a feed-forward layer's gradient that is of the tokens between two thresholds."""

    weight: Tensor  # [width]
    bias: float
    block: int
    low: float
    high: float


def bins_of(imprint: PlantedTransformer, update: Update, blocks: Sequence[int], eps: float) -> list[Bin]:
    """The bins of the planted blocks that hold something, above the rounding of the rows that they are differences of."""
    found = list[Bin]()
    for block in blocks:
        layer = imprint.block(block).dense1
        W, b = (update[f"blocks.{block}.dense1.{part}"].double() for part in ("weight", "bias"))
        scale = layer.weight.detach().norm(dim=1).mean()
        edges = -layer.bias.detach() / scale  # [m], rising
        zero = torch.zeros(1, W.shape[1], dtype=W.dtype)
        dW, db = W - torch.cat([W[1:], zero]), b - torch.cat([b[1:], zero[:, 0]])
        size = torch.cat([W, b[:, None]], 1).norm(dim=1)
        noise = EMPTY * eps * torch.maximum(size, torch.cat([size[1:], size[:1] * 0]))
        held = (torch.cat([dW, db[:, None]], 1).norm(dim=1) > noise) & (db.abs() > noise / W.shape[1] ** 0.5)
        high = torch.cat([edges[1:], torch.full((1,), math.inf).to(edges)])
        for i in held.nonzero().flatten().tolist():
            found.append(Bin(dW[i], float(db[i]), block, float(edges[i]), float(high[i])))
    return found


def read_imprint(imprint: PlantedTransformer, bins: Sequence[Bin], words: Tensor) -> tuple[list[Node], list[list[int]]]:
    """The tokens that bins hold, and the sentences that they make, by turns: what tags fill in is taken out of bins."""
    nodes, sentences = list[Node](), list[list[int]]()
    for _ in range(TURNS):
        before = len(nodes)
        nodes = nodes_of(imprint, bins, words, nodes)
        sentences = sentences_of(imprint, nodes, words)
        if len(nodes) == before:
            break
    return nodes, sentences


def words_present(imprint: PlantedTransformer, update: Update, words: Tensor, eps: float) -> Tensor:
    """The tokens of the batch by the rows of the embedding's gradient that are not zero; all where it was not sent."""
    name = "tokens.weight"
    if name not in update or imprint.model.head.weight is imprint.model.tokens.weight:
        return words
    sizes = update[name].double()[words].norm(dim=1)
    return words[sizes > EMPTY * eps * sizes.max()]


def nodes_of(imprint: PlantedTransformer, bins: Sequence[Bin], words: Tensor, known: Sequence[Node] = ()) -> list[Node]:
    """The tokens that are alone in a bin, and those that are once others which are known were taken out of it."""
    reader = _BinReader(imprint, words)
    found, open_ = list(known), list[Bin]()
    for one in bins:
        node = reader.alone(one, [])
        if node is None:
            open_.append(one)
        else:
            _add(found, node)
    for _ in range(MOST_BESIDE):
        rest = list[Bin]()
        there = list(found)
        values = reader.values(there)
        for one in open_:
            beside = reader.inside(one, there, values)
            node = reader.alone(one, beside) if 0 < len(beside) <= MOST_BESIDE else None
            if node is None:
                rest.append(one)
            else:
                _add(found, node)
        open_ = rest
        if len(found) == len(there):
            break
    return found


class _BinReader:
    """Tokens out of bins, by the table of all tokens."""

    def __init__(self, imprint: PlantedTransformer, words: Tensor) -> None:
        self.imprint, self.words = imprint, words
        self.table = imprint.model.tokens.weight.detach()[words][:, imprint.body]  # [v, body]
        first = imprint.block(0).dense1.weight.detach()[0]
        self.direction = first / first.norm()

    def alone(self, one: Bin, beside: Sequence[Node]) -> Node | None:
        """The token of a bin once those of `beside` are taken out, whatever they weigh; None: more than one are left."""
        body = self.imprint.body
        ones = torch.ones(len(one.weight[body]), 1, dtype=torch.float64)
        known = torch.stack([self.imprint.sends(node) for node in beside], 1) if beside else ones[:, :0]
        columns = torch.cat([ones, known[body] if beside else ones[:, :0]], 1)
        Q = torch.linalg.qr(columns)[0]
        left = one.weight[body] - Q @ (Q.T @ one.weight[body])
        table = self.table - (self.table @ Q) @ Q.T
        cosines = (table @ left) / (table.norm(dim=1) * left.norm()).clamp_min(1e-300)
        best = int(cosines.abs().argmax())
        if float(cosines[best].abs()) < LONE:
            return None
        solved = torch.linalg.lstsq(
            torch.cat([self.table[best][:, None], columns], 1), one.weight[body][:, None]
        ).solution[:, 0]
        slope, level, weights = solved[0], solved[1], solved[2:]
        mass = one.bias - float(weights.sum())
        rest = one.weight - (known @ weights if beside else 0.0)
        if not mass or float(slope) / mass <= 0:  # a token's numbers are divided by a spread, which is positive
            return None
        return self._node(int(self.words[best]), rest, float(slope), float(level))

    def _node(self, token: int, rest: Tensor, slope: float, level: float) -> Node | None:
        """The place and the tag of a token from its numbers, which are slope x + level but for the tag."""
        here = (rest[self.imprint.places] - level) / slope
        gaps = (self.imprint.circle - here).norm(dim=1)
        place = int(gaps.argmin())
        if len(gaps) > 1 and float(gaps[place]) > 0.25 * float(
            (self.imprint.circle[0] - self.imprint.circle[1]).norm()
        ):
            return None
        tag = (rest[self.imprint.tags] - level) / slope / self.imprint.spread(token, place)
        return Node(token, place, tag)

    def values(self, nodes: Sequence[Node]) -> list[float]:
        """Where nodes lie between the thresholds of the first block."""
        return [float(self.imprint.sends(node) @ self.direction) for node in nodes]

    def inside(self, one: Bin, nodes: Sequence[Node], values: Sequence[float]) -> list[Node]:
        """The nodes that lie in a bin of the first block, or at its edge."""
        if one.block:
            return []
        slack = 0.25 * min(one.high - one.low, 1.0)
        return [node for node, v in zip(nodes, values, strict=True) if one.low - slack < v < one.high + slack]


def _add(nodes: list[Node], node: Node) -> None:
    if not any(_same(node, other) for other in nodes):
        nodes.append(node)


def _same(a: Node, b: Node) -> bool:
    return (a.token, a.place) == (b.token, b.place) and near(a.tag, b.tag)


def near(a: Tensor, b: Tensor) -> bool:
    """Whether two tags are those of the same tokens."""
    return float((a - b).norm()) <= SAME_TAG * max(float(a.norm()), float(b.norm()), LEAST_TAG)


def sentences_of(imprint: PlantedTransformer, nodes: list[Node], words: Tensor) -> list[list[int]]:
    """The sentences that nodes are of, whole ones only; up to two tokens in a row that no bin gave are told by tags.

    What is filled in comes to the `nodes`.
    """
    grown = _chains(imprint, nodes, words) if imprint.model.causal else _groups(imprint, nodes, words)
    return [list(s) for s in dict.fromkeys(map(tuple, grown))]


@dataclass(frozen=True, eq=False)
class _Beginning:
    """A sentence up to one of its places, and the sum of its tokens' marks."""

    tokens: tuple[int, ...]
    total: Tensor  # [TAGS]


def _chains(imprint: PlantedTransformer, nodes: list[Node], words: Tensor) -> list[list[int]]:
    """The sentences of a decoder: a tag is the mean of the marks up to its token, so that it tells what stands before."""
    root = _Beginning((), torch.zeros(TAGS, dtype=torch.float64))
    known, used = [root], set[tuple[int, ...]]()
    for node in sorted(nodes, key=lambda node: node.place):
        i = node.place
        total = (i + 1) * node.tag
        left = total - imprint.marks(torch.tensor([node.token]), torch.tensor([i]))[0]
        slack = SAME_TAG * (i + 1) * max(float(node.tag.norm()), LEAST_TAG)
        for gap in range(MOST_MISSING + 1):
            parents = [b for b in known if len(b.tokens) == i - gap]
            fits = [(b, _filling(imprint, left - b.total, range(i - gap, i), words, slack)) for b in parents]
            found = next(((b, filling) for b, filling in fits if filling is not None), None)
            if found is not None:
                begun = _filled_in(imprint, *found, nodes)
                known.append(_Beginning((*begun.tokens, node.token), total))
                used |= {known[-1].tokens[:k] for k in range(i + 1)}
                break
    return [list(b.tokens) for b in known if b.tokens and b.tokens not in used]


def _filled_in(imprint: PlantedTransformer, begun: _Beginning, filling: Sequence[int], nodes: list[Node]) -> _Beginning:
    """A beginning with tokens added, which come to the nodes."""
    for token in filling:
        place = len(begun.tokens)
        total = begun.total + imprint.marks(torch.tensor([token]), torch.tensor([place]))[0]
        _add(nodes, Node(token, place, total / (place + 1)))
        begun = _Beginning((*begun.tokens, token), total)
    return begun


def _filling(
    imprint: PlantedTransformer, left: Tensor, places: Sequence[int], words: Tensor, slack: float
) -> tuple[int, ...] | None:
    """The tokens at these places whose marks add up to what is left [TAGS]; None where there are none."""
    if not len(places):
        return () if float(left.norm()) <= slack else None
    if len(places) > 1 and len(words) > MOST_TRIED:
        return None
    marks = [imprint.marks(words, torch.full_like(words, i)) for i in places]  # [v, TAGS] each
    if len(marks) == 1:
        gaps = (marks[0] - left).norm(dim=1)
        best = int(gaps.argmin())
        return (int(words[best]),) if float(gaps[best]) <= slack else None
    gaps = torch.cdist(left - marks[0], marks[1], compute_mode="donot_use_mm_for_euclid_dist")
    first, second = divmod(int(gaps.argmin()), len(words))
    return (int(words[first]), int(words[second])) if float(gaps.min()) <= slack else None


def _groups(imprint: PlantedTransformer, nodes: list[Node], words: Tensor) -> list[list[int]]:
    """The sentences of an encoder: all tokens of one have the same tag, the mean of their marks."""
    groups = list[list[Node]]()
    for node in nodes:
        group = next((g for g in groups if near(g[0].tag, node.tag)), None)
        if group is None:
            groups.append([node])
        else:
            group.append(node)
    found = list[list[int]]()
    for group in groups:
        places = {node.place: node.token for node in group}
        if len(places) < len(group):
            continue
        tag = torch.stack([node.tag for node in group]).mean(0)
        held = torch.tensor(list(places.values())), torch.tensor(list(places))
        marks = imprint.marks(*held).sum(0)
        for t in range(max(places) + 1, min(max(places) + 1 + MOST_MISSING, imprint.length) + 1):
            missing = [i for i in range(t) if i not in places]
            slack = SAME_TAG * t * max(float(tag.norm()), LEAST_TAG)
            filling = (
                _filling(imprint, t * tag - marks, missing, words, slack) if len(missing) <= MOST_MISSING else None
            )
            if filling is not None:
                whole = places | dict(zip(missing, filling, strict=True))
                for i, token in zip(missing, filling, strict=True):
                    _add(nodes, Node(token, i, tag))
                found.append([whole[i] for i in range(t)])
                break
    return found
