"""Patch batches: the pictures of a batch behind a vision transformer's gradient, token by token."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from unbatch.errors import NotApplicable
from unbatch.inversion.patches import ROUNDINGS, amplified, unit_rows
from unbatch.network.dense_pair import DensePair
from unbatch.network.patches import FirstDenseLayers, PatchEmbedding
from unbatch.numerics.linear.span import rank_tolerance
from unbatch.numerics.search.two_spans import Layer, TwoSpans
from unbatch.observation import Observation
from unbatch.progress import tick

SPARE = 3  # equations of a token beyond its unknowns, at least: one for its spread, and two that tell its place
ROUNDS = 20  # of sorting tokens into pictures


@dataclass(frozen=True, eq=False)
class BatchWindows:
    """The windows of every picture of a batch, as their embedding was given them, and how far each picture's may be off."""

    values: Tensor  # [n, T, p]
    errors: Tensor  # [n] l2
    trace: dict[str, Any]


def by_dense_pair(
    obs: Observation,
    front: PatchEmbedding,
    first: FirstDenseLayers,
    pair: DensePair,
    rng: torch.Generator,
    n: int | None = None,
) -> BatchWindows:
    """The windows of all n pictures from the gradients of three dense layers of the first block, of however many pictures.

    1. The row spaces of dL/dW of the `lower` and the `upper` layer are the spans of the (h_j, 1) and of the
       (act(W h_j + b), 1), j = 1 to n T' tokens. The vectors of the one that the layer takes into the other are the
       tokens themselves, found one after the other (`TwoSpans`).
    2. Of each, s_j (h_j - offset) / gain = C (E x_j + c_t + V o_j + v) with C taking the mean off. Its spread s_j, its
       window x_j and o_j, which lies in the row space of the `mixed` layer's gradient, enter linearly. At the token's own
       place t the system has a solution, at others it has none: places, windows and o_j are solved for.
    3. o_j is a mean over its picture: tokens of each place are sorted into n pictures by it.

    Counts: n T' < width, and p + n T' + 2 < width for the second step, where width is that of a token.
    `n` is the number of pictures where it is told. Errors are to first order: what rounding and known noise do to the three
    row spaces, through the two systems. Raises NotApplicable: the counts or the spans do not allow it.
    """
    spans = _Spans(obs, pair, len(first.rows) + first.others, n)
    system = _TokenSystem(obs, front, first, pair, spans.mixed)
    alpha, problem = _told_apart(pair, spans, float(system.gain.norm()), rng)
    h, off = problem.vectors(alpha), spans.token_errors(problem, alpha)
    at = system.places(h, spans.n)  # [n, T] tokens
    x, o, error = system.solved(h[at], off[at], spans.mixed)
    order = _sorted_into_pictures(o)
    which = torch.arange(at.shape[1])
    values, error = x[order, which], error[order, which]
    trace = {
        "by": f"the row spaces of {pair.lower[0]!r}, {pair.upper[0]!r} and {pair.mixed[0]!r}",
        "free dimensions of a patch": 0,
        "tokens": spans.tokens,
        "rank gap": spans.gap,
        "equations to spare": system.spare,
    }
    return BatchWindows(values, ROUNDINGS * error.square().sum(1).sqrt(), trace)


@dataclass(frozen=True, eq=False)
class _RowSpace:
    """The span of what a dense layer read: leading rows V with values S of the unit rows of its gradient."""

    S: Tensor  # [r]
    V: Tensor  # [r, columns]
    beyond: Tensor  # [columns - r, columns]
    error: float
    weight: Tensor  # [m, columns], with its bias where that sent its gradient too
    gradient: Tensor  # [m, columns]
    biased: bool

    @classmethod
    def of(cls, obs: Observation, layer: tuple[str, str | None]) -> _RowSpace:
        H, error = unit_rows(obs, [layer])
        _, S, V = torch.linalg.svd(H, full_matrices=True)
        r = int((S > max(rank_tolerance(H, 0.0), 2 * error)).sum())
        parameters = dict(obs.model.named_parameters(remove_duplicate=False))
        weight, gradient = (each[layer[0]].detach().double() for each in (parameters, obs.update))
        biased = layer[1] is not None
        if layer[1] is not None:
            weight, gradient = (
                torch.cat([one, each[layer[1]].detach().double()[:, None]], 1)
                for one, each in ((weight, parameters), (gradient, obs.update))
            )
        return cls(S[:r], V[:r], V[r:], error, weight, gradient, biased)

    def off(self, vectors: Tensor) -> Tensor:
        """How far vectors [k, columns] that were read may lie outside, l2."""
        return self.error * amplified(vectors, self.S, self.V)


class _Spans:
    """The three row spaces, whose ranks are counted."""

    def __init__(self, obs: Observation, pair: DensePair, per_picture: int, n: int | None) -> None:
        self.lower = _RowSpace.of(obs, pair.lower)
        self.tokens, columns = len(self.lower.S), self.lower.V.shape[1]
        name = pair.lower[0]
        if not self.lower.biased:
            raise NotApplicable(f"{name!r} has no bias, whose gradient would tell the size of a token.")
        if self.tokens >= columns - 1:
            raise NotApplicable(
                f"the gradient of {name!r} has full rank {self.tokens}: pictures of {per_picture} tokens leave nothing out."
            )
        wanted = None if n is None else n * per_picture
        if self.tokens % per_picture or wanted not in (None, self.tokens):
            raise NotApplicable(
                f"the gradient of {name!r} has rank {self.tokens}, which is no whole number of pictures of {per_picture} "
                "tokens: some send back too little beside its rounding, or some are the same."
                if wanted is None
                else f"the gradient of {name!r} has rank {self.tokens}, and {n} pictures of {per_picture} tokens have "
                f"{wanted}: some send back too little beside its rounding, or some are the same."
            )
        self.n = self.tokens // per_picture
        self.upper, self.mixed = _RowSpace.of(obs, pair.upper), _RowSpace.of(obs, pair.mixed)
        if len(self.upper.S) != self.tokens:
            raise NotApplicable(
                f"the gradients of {pair.upper[0]!r} and {name!r} have ranks {len(self.upper.S)} and {self.tokens}: beside "
                "their rounding they do not show the same tokens."
            )
        self.gap = float(min(self.lower.S[-1] / self.lower.error, self.upper.S[-1] / self.upper.error))

    def allowed(self, problem: TwoSpans, alpha: Tensor) -> float:
        """What may lie outside the upper span of what follows one alpha [r], relative."""
        h, after = (alpha @ problem.lower.rows)[None], problem.after(alpha[None])
        off = self.upper.off(after) + problem.steep * self.lower.off(h)
        return ROUNDINGS * float(off / after.norm())

    def token_errors(self, problem: TwoSpans, alpha: Tensor) -> Tensor:
        """How far each h [r] may be off, l2, to first order."""
        h = alpha @ problem.lower.rows
        below = self.lower.off(h)
        above = self.upper.off(problem.after(alpha))
        found = [problem.moved(*each) for each in zip(alpha, above.tolist(), below.tolist(), strict=True)]
        return torch.tensor(found, dtype=torch.float64).to(h)


def _told_apart(pair: DensePair, spans: _Spans, size: float, rng: torch.Generator) -> tuple[Tensor, TwoSpans]:
    lower, upper = (Layer(each.weight, each.gradient, each.V, each.beyond) for each in (spans.lower, spans.upper))
    problem = TwoSpans(lower, upper, pair.act)
    found = problem.middle.new_zeros(0, spans.tokens)
    for found in problem.searched(rng, size=size, allowed=partial(spans.allowed, problem)):
        if not tick(len(found) / spans.tokens):
            break
    if len(found) < spans.tokens:
        raise NotApplicable(f"{len(found)} of the {spans.tokens} tokens were told apart.")
    return found, problem


class _TokenSystem:
    """s h = C (E x + c_t + V o + v) of one token, linear in (s, x, o): the same matrix for all but for h."""

    def __init__(
        self, obs: Observation, front: PatchEmbedding, first: FirstDenseLayers, pair: DensePair, mixed: _RowSpace
    ) -> None:
        parameters = dict(obs.model.named_parameters(remove_duplicate=False))
        E = parameters[front.weight].detach().double().flatten(1)
        V = parameters[pair.mixed[0]].detach().double()
        added = first.added
        if pair.mixed[1] is not None:
            added = added + parameters[pair.mixed[1]].detach().double()
        width, self.p = E.shape
        self.offset = pair.offset
        self.gain = torch.ones_like(E[:, 0]) if pair.gain is None else pair.gain
        if not bool(self.gain.all()):
            raise NotApplicable("the layer norm after attention takes numbers away.")
        if mixed.biased:
            last = mixed.V[:, -1]
            middle = last @ mixed.V / last.square().sum()
            ways = torch.linalg.svd(last[None], full_matrices=True)[2][1:] @ mixed.V
            self.middle, self.ways = middle[:-1], ways[:, :-1]
        else:
            self.middle, self.ways = mixed.V.new_zeros(mixed.V.shape[1]), mixed.V
        self.spare = width - 1 - self.p - len(self.ways)
        if self.spare < SPARE:
            raise NotApplicable(
                f"a token of width {width} gives {width - 1} equations, and patches of {self.p} numbers beside what "
                f"attention adds to them, of {len(self.ways)} directions, leave {max(self.spare, 0)} to spare of {SPARE}."
            )
        self.steep = float(torch.linalg.matrix_norm(V, 2))
        self.common = _centred(torch.cat([E, V @ self.ways.T], 1).T).T  # [width, p + ways]
        self.right = _centred(added + V @ self.middle)  # [T, width]
        U = torch.linalg.svd(self.common, full_matrices=True)[0]
        self.over = _centred(U[:, self.common.shape[1] :].T)  # [width - p - ways, width]
        self.undone = torch.linalg.pinv(self.common)  # [p + ways, width]

    def places(self, h: Tensor, n: int) -> Tensor:
        """Which n of all tokens [k, width] are at each place [n, T]: those that its system can be solved for."""
        nearest = self._off(h).sort(0).indices[:n]
        if len(torch.unique(nearest)) < nearest.numel():
            raise NotApplicable("the tokens that were told apart do not tell their places.")
        return nearest

    def solved(self, h: Tensor, off: Tensor, mixed: _RowSpace) -> tuple[Tensor, Tensor, Tensor]:
        """Windows [n, T, p] and o [n, T, d] of tokens [n, T, width] at places 0 to T - 1, and how far windows may be off.

        `off` [n, T] is how far the tokens may be, l2, and so is what is returned.
        """
        s, x, o = self._parts(h, torch.arange(len(self.right)))
        if not bool((s > 0).all()):
            raise NotApplicable("what was told apart is no tokens: the spread of some would be negative.")
        read = torch.cat([o, torch.ones_like(o[..., :1])], 2)[..., : mixed.V.shape[1]]
        own = self._normed(h)
        beside = s * off / float(self.gain.abs().min()) + self.steep * mixed.off(read.flatten(0, 1)).view_as(s)
        spread = beside / (own @ self.over.T).norm(dim=2)
        least = float(torch.linalg.matrix_norm(self.undone[: self.p], 2))
        return x, o, least * (beside + spread * own.norm(dim=2))

    def _normed(self, h: Tensor) -> Tensor:
        return (h if self.offset is None else h - self.offset) / self.gain

    def _off(self, h: Tensor) -> Tensor:
        """How far the system of each place is from a solution for tokens [k, width]: [k, T], between 0 and 1."""
        own, wanted = (
            torch.nn.functional.normalize(each @ self.over.T, dim=1) for each in (self._normed(h), self.right)
        )
        return torch.stack([(own - (own @ w)[:, None] * w).norm(dim=1) for w in wanted], 1)

    def _parts(self, h: Tensor, place: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Spreads, windows and o of tokens [..., k, width] at these places [k]."""
        own, right = self._normed(h), self.right[place]
        seen = own @ self.over.T
        s = (seen * (right @ self.over.T)).sum(-1) / seen.square().sum(-1)
        made = (s[..., None] * own - right) @ self.undone.T
        return s, made[..., : self.p], self.middle + made[..., self.p :] @ self.ways


def _centred(rows: Tensor) -> Tensor:
    return rows - rows.mean(-1, keepdim=True)


def _sorted_into_pictures(o: Tensor) -> Tensor:
    """Which of the n tokens at each place is of picture i [n, T], such that what a picture's tokens saw differs little."""
    n, T, _ = o.shape
    order = torch.arange(n)[:, None].repeat(1, T)
    places = torch.arange(T)
    centre = o[:, 0]
    for _ in range(ROUNDS):
        new = torch.stack([_assigned(torch.cdist(centre, o[:, t])) for t in range(T)], 1)
        if torch.equal(new, order):
            break
        order, centre = new, o[new, places].mean(1)
    return order


def _assigned(cost: Tensor) -> Tensor:
    """The column of each row [n] of a square matrix, each once, with the least sum."""
    from scipy.optimize import linear_sum_assignment

    return torch.from_numpy(linear_sum_assignment(cost.cpu().numpy())[1])
