"""Fronts: what a network makes of tokens on their way to each dense layer, run on any sentences one likes.

What reaches a dense layer at a position depends on the token there alone, on the sentence up to it, or on all of it. Which
of them is found by changing one token and looking where the layer's inputs change; no architecture is known by name.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from unbatch.errors import NotApplicable, UnbatchError
from unbatch.inversion.view import View
from unbatch.network.dense import in_mode
from unbatch.network.embedded import adds_tokens_up
from unbatch.network.precision import in_double, outputs_of
from unbatch.network.products import Product, multiplied
from unbatch.numerics.dictionary.membership import CUT, ROW_ROUNDINGS, RowSpace, half_rounding, row_space
from unbatch.protocol import Update

Reach = Literal["token", "prefix", "sentence"]
COMPUTED_IN = (torch.float32, torch.float64)  # coarser types round once what was computed in these
SUMMED_TO = torch.finfo(
    torch.float32
).eps  # relative, what sums of products are rounded to where their terms are coarser
OF_SUMS = 4.0  # roundings of a tensor's entries that its own tolerance allows for
SAME_TO = 1e-10  # relative, in float64: below it nothing has reached a vector
MOST_NUMBERS = 2**22  # of the vectors of one run of a front
SCREENS = 16  # directions outside of a span by which most candidates are sorted out
SCREEN_ROUNDING = 1e-5  # of a vector of length 1 along them, in float32
SHORT_RUNS = 3  # lengths at which a network is asked whether it takes sentences cut short


@dataclass(frozen=True, eq=False)
class Front:
    """The way from a sentence to the vectors that enter some dense layers, one at each position."""

    layers: tuple[tuple[Any, ...], ...]  # products that the same vectors enter, as `Product.layer`
    reach: Reach  # what of the sentence a vector depends on
    positioned: bool  # whether it depends on where it stands
    position_first: bool  # whether the vectors are kept position by position, and not sentence by sentence
    width: int
    products: tuple[Product, ...] = field(repr=False)  # of these layers, without their rows
    update: Update = field(repr=False)
    eps: float  # relative error of the update's entries as they were computed
    own: float  # relative error of the vectors themselves
    noise: tuple[
        float, ...
    ]  # standard deviation of each entry, by product: what was added, and what a difference rounds

    @property
    def gradient(self) -> Tensor:
        """The gradients [m, d] of the layers in float64, each scaled to the same size."""
        return torch.cat([g / g.norm() for g in self._each if bool(g.any())])

    @property
    def _each(self) -> list[Tensor]:
        return [p.gradient(self.update) for p in self.products]

    @cached_property
    def space(self) -> RowSpace:
        """The row space of the layers' gradient."""
        return row_space(self.gradient, eps=self.eps, own=self.own, drawn=self._drawn)

    @property
    def coarse(self) -> bool:
        """Whether noise, or being sent in half precision, is more than the rounding of what was computed."""
        kinds = (self.update[p.weight].dtype for p in self.products)
        return any(self.noise) or any(torch.finfo(kind).eps > self.eps for kind in kinds)

    @property
    def _drawn(self) -> Tensor | None:
        """The standard deviation of the errors of the gradient's entries by noise, and by being sent in half precision."""
        if not self.coarse:
            return None
        kinds, found = [self.update[p.weight].dtype for p in self.products], list[Tensor]()
        for g, kind, noise in zip(self._each, kinds, self.noise, strict=True):
            if bool(g.any()):
                rounding = half_rounding(g, kind) if torch.finfo(kind).eps > self.eps else torch.zeros_like(g)
                found.append((rounding.square() + noise**2).sqrt() / g.norm())
        return torch.cat(found)

    @property
    def name(self) -> str:
        """The first of its layers."""
        return str(self.layers[0][0]).removesuffix(".weight")


@dataclass(frozen=True, eq=False)
class TokenReader:
    """A network that reads token numbers, run as far as its fronts on sentences of one's own."""

    view: View
    model: nn.Module  # in float64
    length: int
    vocabulary: int
    embedding: str  # the parameter that tokens are looked up in
    padding: int | None

    @classmethod
    def of(cls, view: View) -> TokenReader:
        """The reader of an exchange's network. Raises NotApplicable: it looks up no token numbers."""
        shape = view.knowledge.input_shape
        if len(shape) != 1:
            raise NotApplicable(f"the inputs have the shape {shape}, and sentences of tokens have one side.")
        model = in_double(view.model)
        probe = torch.arange(2 * shape[0], device=view.obs.device).reshape(2, -1) % 2 + 1
        try:
            run = multiplied(model, probe, view.protocol.mode)
        except UnbatchError as error:
            raise NotApplicable(f"the network is run on token numbers, and {error}") from error
        tokens = [
            each for each in run.lookups if each.indices.shape == probe.shape and torch.equal(each.indices, probe)
        ]
        if not tokens and adds_tokens_up(model, shape):
            raise NotApplicable(
                "the network adds up the vectors of a text's tokens where it looks them up (nn.EmbeddingBag): it knows no "
                "order of them, and no layer sees one token at a time."
            )
        if not tokens:
            raise NotApplicable("the network looks its inputs up in no embedding, so they are no token numbers.")
        name = tokens[0].weight
        return cls(view, model, shape[0], len(model.get_parameter(name)), name, view.knowledge.get("padding"))

    @property
    def mode(self) -> Literal["train", "eval"]:
        """As the client ran it."""
        return self.view.protocol.mode

    @cached_property
    def tied(self) -> bool:
        """Whether vectors are also multiplied by the embedding, as by a head that scores the next token."""
        run = multiplied(self.model, self.draw(1, torch.Generator().manual_seed(0)), self.mode)
        return any(product.weight == self.embedding for product in run.products)

    @cached_property
    def words(self) -> Tensor:
        """Every token number but the padding's."""
        every = torch.arange(self.vocabulary, device=self.view.obs.device)
        return every if self.padding is None else every[every != self.padding]

    def draw(self, n: int, rng: torch.Generator) -> Tensor:
        """Random sentences [n, length] without padding."""
        which = torch.randint(len(self.words), (n, self.length), generator=rng)
        return self.words[which.to(self.words.device)]

    def padded(self, sentences: Tensor) -> Tensor:
        """Sentences [n, t] filled up to the whole length, by padding or, where none is known, by their last token."""
        missing = self.length - sentences.shape[1]
        if not missing:
            return sentences
        last = sentences[:, -1:] if self.padding is None else torch.full_like(sentences[:, :1], self.padding)
        return torch.cat([sentences, last.expand(-1, missing)], 1)

    @cached_property
    def quick(self) -> nn.Module:
        """The network in float32, for looking at many sentences."""
        return copy.deepcopy(self.view.model).float()

    def rows(self, front: Front, sentences: Tensor, *, quick: bool = False) -> Tensor:
        """The vectors [n, t, d] that sentences [n, t] send into a front's layers, in float64 or, `quick`, float32."""
        model = self.quick if quick else self.model
        at_once = max(1, MOST_NUMBERS // (sentences.shape[1] * front.width))
        parts = []
        for some in torch.split(sentences, at_once):
            run = multiplied(model, some, self.mode, wanted=front.layers[:1])
            parts.append(_by_sentence(run.products[0].rows, some, front.position_first))
        return torch.cat(parts)

    def offness_at(self, front: Front, sentences: Tensor, position: int) -> Tensor:
        """How far off a front's span the vectors of sentences [n, t] are at one position [n].

        Looked at in float32 first, along a few directions outside of the span: that is less than the distance, and where it
        is too far already, it is returned in place of it.
        """
        space = front.space
        screens, limit = space.outside(SCREENS).float(), space.farthest + SCREEN_ROUNDING
        found = torch.full((len(sentences),), torch.inf, dtype=torch.float64, device=sentences.device)
        at_once = max(1, MOST_NUMBERS // (sentences.shape[1] * front.width))
        for k in range(0, len(sentences), at_once):
            some = sentences[k : k + at_once]
            rows = self.rows(front, some, quick=True)[:, position]
            along = (rows @ screens.T).norm(dim=1) / rows.norm(dim=1).clamp_min(1e-30)
            found[k : k + at_once] = along.double() * CUT / limit
            near = (along <= limit).nonzero().flatten()
            if len(near):
                found[k + near] = space.offness(self.rows(front, some[near])[:, position])
        return found

    def sees_all(self, front: Front) -> bool:
        """Whether outputs that depend on every position send something back to a front's layers from each of them.

        Queries, for one, hear nothing from a first position that attends to itself alone. One random sentence tells: the
        vectors of all its positions have to lie in the span of the layers' gradient under a random slope at the outputs.
        """
        rng = torch.Generator().manual_seed(0)
        sentence = self.draw(1, rng)
        held = {p.weight: self.model.get_parameter(p.weight).detach().requires_grad_() for p in front.products}
        with torch.enable_grad(), in_mode(self.model, self.mode):
            outputs = outputs_of(self.model, sentence, held, twice=True)
            slope = torch.randn(outputs.shape, generator=rng, dtype=torch.float64).to(outputs)
            sent = torch.autograd.grad((outputs * slope).sum(), list(held.values()), materialize_grads=True)
        each = [p.gradient(dict(zip(held, sent, strict=True))) for p in front.products]
        stacked = torch.cat([g / g.norm() for g in each if bool(g.any())] or each)
        space = row_space(stacked, eps=torch.finfo(torch.float64).eps)
        return bool(space.members(self.rows(front, sentence)[0]).all())

    @cached_property
    def takes_short(self) -> bool:
        """Whether sentences cut short enter the layers as the beginnings of whole ones do, where nothing looks ahead."""
        front = next((f for f in self.fronts if f.reach != "sentence"), None)
        if front is None:
            return False
        whole = self.draw(2, torch.Generator().manual_seed(0))
        full = self.rows(front, whole)
        for t in sorted({1, self.length // 2, self.length - 1} - {0})[:SHORT_RUNS]:
            try:
                cut = self.rows(front, whole[:, :t])
            except UnbatchError:
                return False
            if not _same(cut, full[:, :t]).all():
                return False
        return True

    @cached_property
    def fronts(self) -> tuple[Front, ...]:
        """The ways into all dense layers that sent a gradient and see one vector a position, in the order of running.

        Raises NotApplicable: the network draws at random as it runs, so that nobody can run it again.
        """
        rng = torch.Generator().manual_seed(0)
        sentences = self.draw(1, rng).repeat(4, 1)
        moved = sorted({0, self.length // 2, self.length - 1})
        for k, j in enumerate(moved, 1):
            sentences[k, j] = self._another(sentences[0, j])
        sentences = torch.cat([sentences[: len(moved) + 1], sentences[:1, :1].expand(1, self.length)])
        run = multiplied(self.model, sentences, self.mode)
        alone = multiplied(self.model, sentences[:1], self.mode)
        again = multiplied(self.model, sentences[:1], self.mode)
        drawn = any(not _same(a.rows, b.rows).all() for a, b in zip(alone.products, again.products, strict=True))
        if drawn or len(run.products) != len(alone.products):
            raise NotApplicable(
                "the network draws at random as it runs (dropout), so that its layers' inputs are open. A client whose "
                "dropout is off is audited with the protocol mode=eval."
            )
        found = list[Front]()
        for group in _alike(run.products, alone.products):
            front = self._front([one for one, _ in group], group[0][1], sentences, moved)
            if front is not None:
                found.append(front)
        return tuple(found)

    def _another(self, token: Tensor) -> Tensor:
        here = int((self.words == token).nonzero()[0])
        return self.words[(here + 1) % len(self.words)]

    def _front(
        self, products: Sequence[Product], alone: Product, sentences: Tensor, moved: Sequence[int]
    ) -> Front | None:
        """The front of products that the same vectors enter; None where these are not one a position, or sent nothing."""
        first = products[0]
        if len(first.rows) != sentences.numel() or len(alone.rows) != self.length:
            return None
        sent = [p for p in products if p.weight in self.view.update and bool(self.view.update[p.weight].any())]
        sent = [p for p in sent if p.weight != self.embedding]
        if not sent:
            return None
        orders = (rows for rows in (False, True))
        order = next((o for o in orders if _same(_by_sentence(first.rows, sentences, o)[0], alone.rows).all()), None)
        if order is None:
            return None
        rows = _by_sentence(first.rows, sentences, order)
        reach: Reach = "token"
        for k, j in enumerate(moved, 1):
            changed = ~_same(rows[k], rows[0])
            changed[j] = False
            if bool(changed[:j].any()):
                reach = "sentence"
            elif bool(changed.any()) and reach == "token":
                reach = "prefix"
        positioned = not bool(_same(rows[-1], rows[-1, :1].expand_as(rows[-1])).all())
        layers = tuple(p.layer for p in sent)
        kept = tuple(replace(p, rows=p.rows[:0].clone()) for p in sent)
        noise = tuple(self._noise(p.weight) for p in sent)
        width, eps = rows.shape[2], self._eps
        if all(self.view.update[p.weight].dtype in COMPUTED_IN for p in sent):
            eps = max(eps, *(torch.finfo(self.view.update[p.weight].dtype).eps for p in sent))
        own = ROW_ROUNDINGS * eps + self._drift(first, sentences) + self._rounded(first, sentences)
        return Front(layers, reach, positioned, order, width, kept, self.view.update, eps, own, noise)

    def _noise(self, name: str) -> float:
        """The standard deviation of the errors of a tensor's entries by known noise and by parameters being rounded."""
        u, w = self.view.update[name].double(), self.view.model.get_parameter(name).detach()
        rounded = float(self.view.obs.grain.get(name, 0.0))
        if self.view.steps > 1:
            rounded = float(half_rounding(w, w.dtype).square().mean()) ** 0.5 * self.view.steps**0.5
        if rounded <= OF_SUMS * torch.finfo(w.dtype).eps * float(u.square().mean()) ** 0.5:
            rounded = 0.0
        return math.hypot(float(self.view.knowledge.get("noise", 0.0)), rounded)

    def _drift(self, product: Product, sentences: Tensor) -> float:
        """How far, relative, the vectors that enter a layer move within the client's local steps; 0 of a gradient.

        The server knows the parameters before and after them: vectors between are nearer than their ends, to first order.
        """
        if self.moved is None:
            return 0.0
        after = multiplied(self.moved, sentences, self.mode, wanted=[product.layer]).products[0].rows
        off = (after - product.rows).norm(dim=1) / product.rows.norm(dim=1).clamp_min(1e-300)
        return float(off.max()) if float(off.max()) > SAME_TO else 0.0

    def _rounded(self, product: Product, sentences: Tensor) -> float:
        """How far, relative, the vectors that enter a layer are off in a network that computes in half precision; else 0.

        Every operation rounds there: the network is run as the client runs it, and in float64.
        """
        model = self.view.model
        if not any(p.dtype not in COMPUTED_IN for p in model.parameters()):
            return 0.0
        own = multiplied(model, sentences, self.mode, wanted=[product.layer]).products[0].rows.double()
        off = (own - product.rows).norm(dim=1) / product.rows.norm(dim=1).clamp_min(1e-300)
        return float(off.max())

    @cached_property
    def moved(self) -> nn.Module | None:
        """The network after the client's local steps; None where it took none, or one that is told as a gradient."""
        if self.view.steps < 2:
            return None
        after = copy.deepcopy(self.model)
        with torch.no_grad():
            for name, p in after.named_parameters():
                if name in self.view.update:
                    p.add_(self.view.update[name].to(p))
        return after

    @cached_property
    def _eps(self) -> float:
        """Relative rounding of the network's own sums, which are kept in float32 where their terms are coarser."""
        return min(max(torch.finfo(p.dtype).eps for p in self.view.model.parameters()), SUMMED_TO)


def _by_sentence(rows: Tensor, sentences: Tensor, position_first: bool) -> Tensor:
    n, t = sentences.shape
    return rows.reshape(t, n, rows.shape[1]).transpose(0, 1) if position_first else rows.reshape(n, t, rows.shape[1])


def _same(a: Tensor, b: Tensor) -> Tensor:
    """Which vectors [..., d] are the same ones, rounding aside."""
    if a.shape != b.shape:
        return torch.zeros(a.shape[:-1], dtype=torch.bool)
    found: Tensor = (a - b).norm(dim=-1) <= SAME_TO * (a.norm(dim=-1) + b.norm(dim=-1))
    return found


def _alike(run: Sequence[Product], alone: Sequence[Product]) -> list[list[tuple[Product, Product]]]:
    """The products of two runs, those together that the same vectors enter."""
    groups = list[list[tuple[Product, Product]]]()
    for pair in zip(run, alone, strict=True):
        rows = pair[0].rows
        same = (g for g in groups if g[0][0].rows.shape == rows.shape and torch.equal(g[0][0].rows, rows))
        group = next(same, None)
        if group is None:
            groups.append([pair])
        else:
            group.append(pair)
    return groups
