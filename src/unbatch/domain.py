"""Domain: what kind of thing an example is; its distance, a prior draw, and how to show it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from unbatch.errors import UnbatchError
from unbatch.knowledge import Knowledge
from unbatch.raster import curves, has_sides, png, tiles

UNSEEN = 1e-6  # of a column's unit, below which a value is shown as 0
MANY_COLUMNS, SHOWN_COLUMNS = 200, 100  # a longer row is not shown whole, so many columns of it are


@dataclass(frozen=True, kw_only=True, repr=False)
class Domain(ABC):
    """What kind of thing the examples are: how far two are apart, what one looks like unseen, how to show it.

    `shape` is that of one example, `low` and `high` the range of its entries, as the model takes them. Where that range is
    not `bounded`, nobody knows it: it is a scale for errors, and no draw is cut to it.
    """

    name: ClassVar[str]
    shape: tuple[int, ...]
    low: float = 0.0
    high: float = 1.0
    bounded: bool = True

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={self.shape}, low={self.low}, high={self.high})"

    @abstractmethod
    def prior(self, n: int, rng: torch.Generator) -> Tensor:
        """n draws [n, *shape] that look like examples and know nothing of the private ones.

        What chance is, and what stands in wherever a batch is wanted and none is known.
        """

    @abstractmethod
    def render(self, example: Tensor) -> str:
        """One example [*shape] for people: a PNG as a data URI where it is a picture, else text."""

    def public(self) -> Knowledge:
        """What the server knows of the task itself: the kind, and the range where it is [0, 1].

        Any other range was read off the private batch, or may have been, and is not told.
        """
        told, unit = Knowledge(domain=self.name), self.bounded and (self.low, self.high) == (0.0, 1.0)
        return told | Knowledge(input_range=(0.0, 1.0)) if unit else told

    def distance(self, found: Tensor, true: Tensor) -> Tensor:
        """Mean squared difference of every pair: [k, *shape], [n, *shape] -> [k, n]."""
        a = found.detach().double().cpu().reshape(len(found), -1)
        b = true.detach().double().cpu().reshape(len(true), -1)
        return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square() / max(b.shape[1], 1)

    def difference(self, found: Tensor, true: Tensor) -> str:
        """What separates a recovered example from the private one, rendered; empty where it has no picture."""
        return ""

    def pieces(self, example: Tensor) -> list[str]:
        """One example [*shape] in pieces that stand beside those of another one; empty where it has none."""
        return []


@dataclass(frozen=True, kw_only=True, repr=False)
class Images(Domain):
    """Pictures [c, h, w] with one or three channels."""

    name: ClassVar[str] = "images"

    def prior(self, n: int, rng: torch.Generator) -> Tensor:
        """Random smooth pictures: octaves of noise, weighted like natural images (amplitude 1 / frequency)."""
        c, h, w = self.shape
        picture = torch.zeros(n, c, h, w)
        if n == 0:
            return picture
        side = 2
        while side <= max(h, w):
            noise = torch.randn(n, c, side, side, generator=rng)
            picture += F.interpolate(noise, size=(h, w), mode="bicubic", align_corners=False) / side
            side *= 2
        picture = 0.5 + 0.25 * picture / picture.flatten(1).std(1).clamp_min(1e-9).view(n, 1, 1, 1)
        return self.low + (self.high - self.low) * picture.clamp(0, 1)

    def render(self, example: Tensor) -> str:
        return png((example.detach().double().cpu() - self.low) / (self.high - self.low))

    def difference(self, found: Tensor, true: Tensor) -> str:
        gap = (found.detach().double().cpu() - true.detach().double().cpu()) / (self.high - self.low)
        return png(gap.abs())


@dataclass(frozen=True, kw_only=True, repr=False)
class Table(Domain):
    """Rows of numbers [d] with named columns, or numbers of any other shape that are no pictures.

    `categories` are the groups of columns that stand for one category each: a 1 in one of them, 0 in the others; their
    names are "column=value". Of the others a value in words is centre + spread * entry, as `units` say of each column.

    >>> people = Table(
    ...     shape=(3,), columns=("age", "job=clerk", "job=cook"), categories=((1, 2),), units=((40.0, 10.0), (0, 1), (0, 1))
    ... )
    >>> people.render(torch.tensor([-0.1, 0.2, 0.7]))  # a guess, rounded to the nearest category
    'age = 39, job = cook'
    """

    name: ClassVar[str] = "table"
    columns: Sequence[str] = ()
    categories: tuple[tuple[int, ...], ...] = ()
    units: Sequence[tuple[float, float]] = ()

    def public(self) -> Knowledge:
        """What the server knows of the task: the kind, the range where it is [0, 1], and which columns are one category."""
        told = super().public()
        return told | Knowledge(categories=self.categories) if self.categories else told

    def prior(self, n: int, rng: torch.Generator) -> Tensor:
        """Standard normal rows, cut to a range that is known: what standardised columns look like; categories valid.

        Uniform in a range that does not hold a standard deviation on both sides of 0: its columns are not standardised.

        >>> rows = Table(shape=(1000,), bounded=False).prior(1, torch.Generator().manual_seed(0))
        >>> [round(float(number), 1) for number in (rows.mean(), rows.std())]
        [0.0, 1.0]
        >>> unit = Table(shape=(1000,)).prior(1, torch.Generator().manual_seed(0))
        >>> [round(float(number), 1) for number in (unit.mean(), unit.min(), unit.max())]
        [0.5, 0.0, 1.0]
        """
        rows = self._numbers(n, rng)
        for group in self.categories:
            rows[:, group] = torch.eye(len(group))[torch.randint(len(group), (n,), generator=rng)]
        return rows

    def _numbers(self, n: int, rng: torch.Generator) -> Tensor:
        if not self.bounded:
            return torch.randn(n, *self.shape, generator=rng)
        if self.low <= -1 and self.high >= 1:
            return torch.randn(n, *self.shape, generator=rng).clamp(self.low, self.high)
        return self.low + (self.high - self.low) * torch.rand(n, *self.shape, generator=rng)

    def render(self, example: Tensor) -> str:
        """A row in words, the first hundred where it is long; a signal [c, t] as a curve, a block [..., h, w] as slices."""
        if self._shown == "words":
            return ", ".join(self._words(example.detach().double().flatten().cpu()))
        values = example.detach().double().cpu()
        low, high = (self.low, self.high) if self.bounded else (float(values.min()), float(values.max()))
        values = (values - low) / ((high - low) or 1.0)
        return png(curves(values) if self._shown == "curves" else tiles(values))

    def difference(self, found: Tensor, true: Tensor) -> str:
        """Slices of what separates two blocks of numbers; rows in words and signals have no such picture."""
        if self._shown != "slices":
            return ""
        return png(tiles((found.detach().double().cpu() - true.detach().double().cpu()).abs() / (self.high - self.low)))

    @property
    def _shown(self) -> Literal["words", "curves", "slices"]:
        if self.columns or len(self.shape) < 2 or min(self.shape) < 1:
            return "words"
        if len(self.shape) == 2 and self.shape[0] < 8 and self.shape[1] >= MANY_COLUMNS:
            return "curves"
        return "slices" if has_sides(self.shape, 8) else "words"

    def _words(self, values: Tensor) -> list[str]:
        """A part "name = value" for each number and each category, in order; of many the first, and a count."""
        names = self.columns or [f"x{i}" for i in range(len(values))]
        units = self.units or [(0.0, 1.0)] * len(values)
        group_of = {i: group for group in self.categories for i in group}
        parts = list[str]()
        for i, name in enumerate(names):
            group = group_of.get(i, ())
            if not group:
                value = units[i][0] + units[i][1] * float(values[i])
                own = bool(self.units) and not units[i][0]  # a file's values as they stand, however small
                unseen = abs(value) < UNSEEN * abs(units[i][1]) and not own
                parts.append(f"{name} = {0 if unseen else value:.4g}")
            elif i == group[0]:
                parts.append(self._category(group, names, int(values[list(group)].argmax())))
        if len(parts) <= MANY_COLUMNS:
            return parts
        left = len(parts) - SHOWN_COLUMNS
        return [*parts[:SHOWN_COLUMNS], f"and {left} more columns = {values.min():.4g} to {values.max():.4g} in all"]

    def _category(self, group: Sequence[int], names: Sequence[str], chosen: int) -> str:
        title, equals, word = names[group[chosen]].partition("=")
        return f"{title} = {word}" if equals else f"{names[group[0]]} to {names[group[-1]]} = {names[group[chosen]]}"


@dataclass(frozen=True, kw_only=True, repr=False)
class Tokens(Domain):
    """Sequences of token numbers [length]; `high` is the vocabulary's last number.

    `vocabulary` is each token in words, and `glue` what stands before each of them in a text; without a vocabulary tokens
    are shown as numbers. `padding` is the number that fills short sequences up: it says nothing, and is never shown.
    `frequency` is how often each token occurs in texts that anybody can read.

    >>> said = Tokens(shape=(4,), high=3, vocabulary=["", "to", "be", "not"], padding=0)
    >>> said.render(torch.tensor([3, 1, 2, 0])), Tokens(shape=(4,), high=3).render(torch.tensor([3, 1, 2, 0]))
    ('not to be', '3 1 2 0')
    """

    name: ClassVar[str] = "tokens"
    vocabulary: Sequence[str] = ()
    glue: str = " "
    padding: int | None = None
    frequency: Sequence[float] = ()

    def public(self) -> Knowledge:
        """What the server knows of the task: that it is of tokens, the padding, and how many there are.

        The vocabulary comes with the model; where its size was read off a batch, it is not told.
        """
        told = Knowledge(domain=self.name)
        if self.bounded:
            told |= Knowledge(input_range=(0.0, self.high))
        return told if self.padding is None else told | Knowledge(padding=self.padding)

    def prior(self, n: int, rng: torch.Generator) -> Tensor:
        """Tokens of the vocabulary, as often as they occur, or each as likely as any other; padded to any length.

        >>> drawn = Tokens(shape=(9,), high=5, padding=0).prior(50, torch.Generator().manual_seed(0))
        >>> int((drawn != 0).sum(1).min()), int((drawn != 0).sum(1).max())
        (1, 9)
        """
        size = int(self.high) + 1
        weights = torch.as_tensor(self.frequency, dtype=torch.float64) if self.frequency else torch.ones(size).double()
        if self.padding is not None and self.padding < size:
            weights[self.padding] = 0.0
        count = math.prod(self.shape)
        drawn = torch.multinomial(weights, max(n * count, 1), replacement=True, generator=rng)[: n * count].view(
            n, count
        )
        if self.padding is not None:
            lengths = torch.randint(1, count + 1, (n, 1), generator=rng)
            drawn = drawn.masked_fill(torch.arange(count) >= lengths, self.padding)
        return drawn.view(n, *self.shape)

    def distance(self, found: Tensor, true: Tensor) -> Tensor:
        """Share of positions whose token differs: [k, length], [n, length] -> [k, n].

        Positions that are padding in both count for nothing.
        """
        a, b = found.detach().cpu().flatten(1).round().long(), true.detach().cpu().flatten(1).round().long()
        differs, counted = a[:, None] != b[None], torch.ones(len(a), len(b), a.shape[1], dtype=torch.bool)
        if self.padding is not None:
            counted = (a[:, None] != self.padding) | (b[None] != self.padding)
        return differs.double().sum(2) / counted.double().sum(2).clamp_min(1)

    def render(self, example: Tensor) -> str:
        """The text of a sequence, without its padding; the numbers of its tokens where no vocabulary is known."""
        return "".join(self.pieces(example)).strip()

    def pieces(self, example: Tensor) -> list[str]:
        """The tokens of a sequence [length] one by one as they stand in its text, spaces included, padding at its end not.

        >>> said = Tokens(shape=(4,), high=3, vocabulary=["", "to", "be", "not"], padding=0)
        >>> said.pieces(torch.tensor([3, 0, 2, 0]))
        [' not', ' [padding]', ' be']
        """
        numbers = [round(token) for token in example.detach().double().flatten().tolist()]
        while numbers and numbers[-1] == self.padding:
            numbers.pop()
        return [self._piece(number) for number in numbers]

    def _piece(self, number: int) -> str:
        if number == self.padding:
            return " [padding]"
        known = 0 <= number < len(self.vocabulary)
        return self.glue + self.vocabulary[number] if known else f" {number}"


def domain_of(inputs: Tensor) -> Domain:
    """The domain that a batch [n, ...] looks like: pictures with 1 or 3 channels, tokens, else a table.

    Entries within [0, 1] are taken to have that range; others the batch's own extremes, widened to be distinct.

    >>> domain_of(torch.zeros(2, 3, 8, 8)), domain_of(torch.tensor([[-1.0, 2.0]]))
    (Images(shape=(3, 8, 8), low=0.0, high=1.0), Table(shape=(2,), low=-1.0, high=2.0))
    """
    shape = tuple(inputs.shape[1:])
    low, high = (float(inputs.min()), float(inputs.max())) if inputs.numel() else (0.0, 1.0)
    low, high = (0.0, 1.0) if low >= 0 and high <= 1 else (low, max(high, low + 1.0))
    if not inputs.is_floating_point():
        return Tokens(shape=shape, low=0.0, high=high, bounded=False)
    if len(shape) == 3 and shape[0] in (1, 3):
        return Images(shape=shape, low=low, high=high)
    return Table(shape=shape, low=low, high=high)


def domain_told(knowledge: Knowledge) -> Domain:
    """The domain of an exchange as far as the attacker knows it: every stand-in for its batch is drawn from its prior.

    The kind is `knowledge.domain`, else what an input's shape looks like: a picture with 1 or 3 channels, else a table.
    The range is `knowledge.input_range`, else [0, 1]; of a table it is then not bounded, and its prior standard normal.
    Raises UnbatchError: no domain has that name, or images have another shape than [channels, height, width].

    >>> domain_told(Knowledge(input_shape=(4,), domain="table")).bounded
    False
    >>> domain_told(Knowledge(input_shape=(3, 8, 8), input_range=(-1, 1)))
    Images(shape=(3, 8, 8), low=-1.0, high=1.0)
    """
    shape: tuple[int, ...] = knowledge.get("input_shape", ())
    low, high = knowledge.get("input_range", (0.0, 1.0))
    kinds: dict[str, type[Domain]] = {kind.name: kind for kind in (Images, Table, Tokens)}
    guess = "images" if len(shape) == 3 and shape[0] in (1, 3) else "table"
    name = knowledge.get("domain", guess)
    if name not in kinds:
        raise UnbatchError(f"unknown domain {name!r}; known: {', '.join(kinds)}.")
    if name == "images" and len(shape) not in (0, 3):
        raise UnbatchError(
            f"images are [channels, height, width], and the input's shape is {shape}; say domain='table'."
        )
    more: dict[str, Any] = {"categories": knowledge.get("categories", ())} if name == "table" else {}
    more |= {"padding": knowledge.get("padding")} if name == "tokens" else {}
    return kinds[name](shape=shape, low=low, high=high, bounded=name != "table" or "input_range" in knowledge, **more)
