"""Domain: what kind of thing an example is; its distance, a prior draw, and how to show it."""

from __future__ import annotations

import base64
import io
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from unbatch.errors import UnbatchError
from unbatch.knowledge import Knowledge


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
        return _png((example.detach().double().cpu() - self.low) / (self.high - self.low))

    def difference(self, found: Tensor, true: Tensor) -> str:
        gap = (found.detach().double().cpu() - true.detach().double().cpu()) / (self.high - self.low)
        return _png(gap.abs())


@dataclass(frozen=True, kw_only=True, repr=False)
class Table(Domain):
    """Rows of numbers [d] with named columns, or numbers of any other shape that are no pictures."""

    name: ClassVar[str] = "table"
    columns: Sequence[str] = ()

    def prior(self, n: int, rng: torch.Generator) -> Tensor:
        """Standard normal rows, cut to a range that is known: what standardised columns look like.

        Uniform in a range that does not hold a standard deviation on both sides of 0: its columns are not standardised.

        >>> rows = Table(shape=(1000,), bounded=False).prior(1, torch.Generator().manual_seed(0))
        >>> [round(float(number), 1) for number in (rows.mean(), rows.std())]
        [0.0, 1.0]
        >>> unit = Table(shape=(1000,)).prior(1, torch.Generator().manual_seed(0))
        >>> [round(float(number), 1) for number in (unit.mean(), unit.min(), unit.max())]
        [0.5, 0.0, 1.0]
        """
        if not self.bounded:
            return torch.randn(n, *self.shape, generator=rng)
        if self.low <= -1 and self.high >= 1:
            return torch.randn(n, *self.shape, generator=rng).clamp(self.low, self.high)
        return self.low + (self.high - self.low) * torch.rand(n, *self.shape, generator=rng)

    def render(self, example: Tensor) -> str:
        values = example.detach().flatten().tolist()
        names = self.columns or [f"x{i}" for i in range(len(values))]
        return ", ".join(f"{name} = {value:.4g}" for name, value in zip(names, values, strict=True))


@dataclass(frozen=True, kw_only=True, repr=False)
class Tokens(Domain):
    """Sequences of token numbers [length]; `high` is the vocabulary's last number."""

    name: ClassVar[str] = "tokens"
    vocabulary: Sequence[str] = ()

    def prior(self, n: int, rng: torch.Generator) -> Tensor:
        """Tokens of the vocabulary, each as likely as any other."""
        return torch.randint(int(self.high) + 1, (n, *self.shape), generator=rng)

    def distance(self, found: Tensor, true: Tensor) -> Tensor:
        """Share of positions whose token differs: [k, length], [n, length] -> [k, n]."""
        return (found[:, None].round() != true[None]).flatten(2).double().mean(2)

    def render(self, example: Tensor) -> str:
        numbers = [int(token) for token in example.flatten().tolist()]
        return " ".join(self.vocabulary[i] for i in numbers) if self.vocabulary else " ".join(map(str, numbers))


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
        return Tokens(shape=shape, low=0.0, high=high)
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
    return kinds[name](shape=shape, low=low, high=high, bounded=name != "table" or "input_range" in knowledge)


def _png(picture: Tensor) -> str:
    """[c, h, w] in [0, 1] as a PNG data URI."""
    from PIL import Image

    pixels = (picture.clamp(0, 1) * 255).round().to(torch.uint8)
    array = pixels[0].numpy() if len(pixels) == 1 else pixels[:3].permute(1, 2, 0).contiguous().numpy()
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
