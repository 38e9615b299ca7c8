"""The batch behind a two-layer network's gradient, from moment tensors over its neurons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from unbatch.errors import NotApplicable
from unbatch.inversion.last_two_layers import LayerPair, last_two_layers
from unbatch.inversion.view import View
from unbatch.numerics.linear.span import Span, leading_span
from unbatch.numerics.moments.cp import compress, diagonalise, misfit, response, tangent_misfit
from unbatch.numerics.moments.moments import (
    GROUPS,
    Moment,
    first_moments,
    head_moments,
    moment_subspace,
    non_gaussianity,
    whitened,
)
from unbatch.reconstruction import Reconstruction

# of the measured error: 20 groups measure it within a third, and errors of few dimensions have tails
BOUND_IN_SIGMAS = 3.5
LEAST_HERMITE_SHARE = 1e-8  # share of the activation below which a Hermite coefficient is rounding
LARGEST_LABEL_GAP = 1.0  # distance of a residual from what any class would leave: it is of no example
FACTOR_GAIN = 0.3  # of the labels' gap, to which a fitted factor must bring it down to be believed
LARGEST_NON_GAUSSIANITY = 0.1  # non-Gaussianity of the weights above which Stein's identity is not relied on


@dataclass(frozen=True, kw_only=True)
class TensorMoments:
    """Reads the batch of a two-layer network with random weights out of the moments of its gradient over the neurons.

    The attack tensor-moment, whose options these are and where the method is described, for whoever has such a network.

    >>> import unbatch
    >>> from unbatch.models.small import build
    >>> rng = torch.Generator().manual_seed(0)
    >>> model = build("mlp", (3,), 3, width=500, activation="gelu", rng=rng)
    >>> x, y = torch.rand(2, 3, generator=rng), torch.tensor([0, 2])
    >>> seen, truth = unbatch.observe(model, nn.functional.cross_entropy, x, y)
    >>> found = TensorMoments().run(View.of(seen), rng)
    >>> found.trace["examples"], found.trace["order"], bool(found.bound.max() < 0.01)
    (2, 4, True)
    """

    gradient: Literal["auto", "first", "head", "both"] = "auto"
    order: Literal["auto", "2", "3", "4"] = "auto"
    subspace: Literal["span", "moment"] = "span"
    estimate: Literal["regression", "stein"] = "regression"
    norm: float | None = None

    def run(self, view: View, rng: torch.Generator) -> Reconstruction:
        """The inputs of the whole batch, with residuals, labels and bounds.

        Raises NotApplicable: the network is none of two layers, or moments do not separate these inputs; it says why.
        """
        view = view.gradient
        pair = last_two_layers(view, self.norm or 1.0)
        obs, update = view.obs, view.update
        A = pair.stacked(obs) if pair.first.weight in update else None  # [m, d']
        span, n, (order, why) = self._counted(pair, view, A, rng)
        g = update[pair.head.weight].double().T if pair.head.weight in update else None  # [m, k]
        seen = A if A is not None else g
        if seen is None:
            raise NotApplicable("neither the first layer nor the head sent its gradient.")
        head_only = self.gradient == "head" or A is None
        of_head = g if head_only or self.gradient == "both" or (self.gradient == "auto" and len(pair.V) > 1) else None
        of_first = None if head_only else A
        trace: dict[str, Any] = {"layer": pair.first.name, "examples": n, "order": order, "why": why}
        if self.subspace == "span" and span is not None:
            P, floor, drift = span.rows, span.noise, torch.zeros(GROUPS, n, pair.width).to(pair.V)
            trace["singular values"] = span.values.tolist()
        else:
            orders = [p for p in (2, 3) if pair.shares()[p] > LEAST_HERMITE_SHARE]
            Y = seen if of_head is None else of_head
            route: Literal["first", "head"] = "first" if of_head is None else "head"
            P, values, drift = moment_subspace(Y, pair.V.T, pair.whitened_weights(), n, orders, rng, route=route)
            lost = len(values) > n and not values[n] < values[n - 1] / 2  # in the noise: no claim
            floor = torch.inf if lost else 0.0
            trace |= {"orders of the subspace": orders, "its eigenvalues": values[: n + 1].tolist()}
        U, L = _whiten(pair.projected_weights(P))  # [m, n], [n, n]
        trace["non-Gaussianity of the weights"] = off = non_gaussianity(U, rng)
        if off > LARGEST_NON_GAUSSIANITY and (n > 1 or self.subspace == "moment"):
            raise NotApplicable(
                f"the weights of {pair.first.name!r} are too far from Gaussian for Stein's identity (their normalised "
                f"third and fourth moments along the inputs are {off:.2g} off, at most "
                f"{LARGEST_NON_GAUSSIANITY:g}): a trained network?"
            )
        V, changes = torch.ones(1, 1).to(U), torch.zeros(GROUPS, 1, 1).to(U)
        if n > 1:
            projected = None if of_first is None else of_first @ P.T @ L  # [m, n]
            V, changes, told = self._separate(pair, of_head, projected, U, order, rng)
            bias = pair.m**0.5 * off  # by which weights that are not Gaussian shift moments, over the moments' noise
            changes *= max(1.0, told["misfit over noise"], (1 + bias**2) ** 0.5)
            trace |= told | {"bias of the moments over their noise": bias}
        back = torch.linalg.inv(L)  # v = L^T z
        X = V.T @ back @ P  # [n, d'] up to scale
        dX = changes.mT @ back @ P + V.T @ back @ drift  # [groups, n, d']
        by: Literal["first", "head"] = "first" if A is not None else "head"
        return _finish(view, pair, X, dX, seen, by, floor, self.norm, trace)

    def _counted(
        self, pair: LayerPair, view: View, A: Tensor | None, rng: torch.Generator
    ) -> tuple[Span | None, int, tuple[int, str]]:
        """The span of the first layer's gradient where it was sent, the number of examples, and the order of the tensors.

        Raises NotApplicable: what these options read was not sent, or moments do not separate so many examples.
        """
        first, head, update = pair.first, pair.head, view.update
        if head.weight not in update and self.gradient == "head":
            raise NotApplicable(f"the head {head.name!r} sent no gradient; use gradient=first.")
        if first.weight not in update and (self.gradient == "first" or self.subspace == "span"):
            raise NotApplicable(f"the first layer {first.name!r} sent no gradient; use gradient=head,subspace=moment.")
        n, most = view.knowledge.get("batch_size"), min(pair.m, pair.d + (pair.b is not None))
        if n is not None and n > most:
            raise NotApplicable(
                f"the batch of {n} exceeds the layer's {pair.d} inputs or {pair.m} neurons; n > d cannot be separated."
            )
        order, why = self._order(pair)
        if order == 0 and n is not None and n > 1:
            raise NotApplicable(why)
        if n is not None and n > 1 and pair.m < GROUPS:
            raise NotApplicable(
                f"the {pair.m} neurons of {first.name!r} are fewer than the {GROUPS} groups of them whose averages tell "
                "how far the moments are off."
            )
        span = None
        if A is not None:
            eps, guess = torch.finfo(view.obs.dtype).eps, view.knowledge.get("batch_size", 8) + 8
            names = [name for name in (first.weight, first.bias) if name is not None and name in update]
            coarse = max(view.obs.grain.get(name, 0.0) for name in names) * max(pair.spread, pair.spread_b)
            span = leading_span(A, rng, eps=eps, guess=guess, noise=coarse)
            rank = len(span.values)
            if n is not None and rank < n:
                raise NotApplicable(
                    f"the gradient of {first.name!r} has rank {rank} for {n} examples: inputs (or their deltas) are "
                    "linearly dependent, and moments separate independent ones only."
                )
            if n is None and rank == most:
                raise NotApplicable(
                    "the gradient has full rank (noise, or more examples than inputs) and batch_size is not known."
                )
            n = n or rank
            span = span.leading(n)
        if n is None:
            raise NotApplicable("neither dL/dW nor batch_size is known, so the number of examples is not.")
        if order == 0 and not (n == 1 and self.subspace == "span"):
            raise NotApplicable(why)
        return span, n, (1, "one example needs no moments") if n == 1 else (order, why)

    def _separate(
        self, pair: LayerPair, g: Tensor | None, G: Tensor | None, U: Tensor, order: int, rng: torch.Generator
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Directions [n, n], their changes a group of neurons, and how they were found."""
        fit = self.estimate == "regression"
        found = head_moments(g, U, order, fit=fit) if g is not None else []
        found += first_moments(G, pair.V.T, U, order, fit=fit) if G is not None else []
        used = [q for q in found if 2 <= q.order and (fit or q.order == order)]
        V, changes, excess = _diagonalised(used, rng)
        noise = {f"{q.route}, order {q.order}": q.noise for q in used}
        return V, changes, {"estimate": self.estimate, "noise of the moments": noise, "misfit over noise": excess}

    def _order(self, pair: LayerPair) -> tuple[int, str]:
        """The highest order of tensors to use and why, in words; order 0 where none separates the inputs."""
        share, outputs = pair.shares(), whitened(pair.V.T).shape[1]
        zero = [part <= LEAST_HERMITE_SHARE for part in share]
        values = [0.0 if none else c for none, c in zip(zero, pair.hermite(), strict=True)]
        words = "E s^(p) for p = 1 ... 4: " + ", ".join(f"{c:.3g}" for c in values[1:])
        if all(zero[2:]):
            return 0, "the activation is linear here, so the gradient leaks only the weighted sum of the inputs."
        if all(zero[3:]) and outputs == 1:
            return 0, "the activation is quadratic here, so the gradient leaks only the span of the inputs."
        if self.order == "2" and (zero[2] or outputs == 1):
            why = "E s'' is exactly 0" if zero[2] else "of one output it gives only the span"
            return 0, f"order 2 does not separate the inputs: {why}; use order {4 if zero[3] else 3}."
        if self.order in ("3", "4") and zero[int(self.order)]:
            primes, other = "'" * int(self.order), 2 if all(zero[3:]) else 7 - int(self.order)
            return 0, f"E s{primes} is exactly 0 for this activation: use order {other}."
        if self.order != "auto":
            return int(self.order), f"as asked; {words}"
        best = 2 if all(zero[3:]) else 3 if share[3] >= share[4] else 4
        return best, f"the largest of the orders that separate inputs; {words}"


def _whiten(U: Tensor) -> tuple[Tensor, Tensor]:
    """u = mean + L w with w at mean 0 and covariance I over the neurons: w [m, n], L [n, n]."""
    centred = U - U.mean(0)
    L = torch.linalg.cholesky(centred.T @ centred / len(U))
    return torch.linalg.solve_triangular(L, centred.T, upper=False).T, L


def _diagonalised(moments: Sequence[Moment], rng: torch.Generator) -> tuple[Tensor, Tensor, float]:
    """Directions V [n, n], their changes [groups, n, n] a group of neurons, and the misfit over its expectation.

    The expectation is what the groups' changes leave after the parameters have followed them.
    """
    n = moments[0].n
    E, C = compress(torch.cat([q.slices(q.value) for q in moments]), n)
    V = diagonalise(E, rng)
    spread = []
    for group in range(GROUPS):
        family = torch.cat([q.slices(q.shares[group]) for q in moments])
        spread.append((C @ family.flatten(1)).view_as(E))
    dE = torch.stack(spread)  # [groups, n, n, n]
    dV = response(E, V, dE)
    expected = sum(tangent_misfit(E, V, change) for change in dE)
    excess = (misfit(E, V) / expected) ** 0.5 if n > 2 and expected else 1.0  # two components always fit
    return V, dV, excess


def _finish(
    view: View,
    pair: LayerPair,
    X: Tensor,
    dX: Tensor,
    seen: Tensor,
    by: Literal["first", "head"],
    floor: float,
    norm: float | None,
    trace: dict[str, Any],
) -> Reconstruction:
    """Scale, sign, residuals, labels and bound for directions X [n, d'] and their changes [groups, n, d'].

    `seen` is the gradient of the first layer [m, d'] or, with `by` head, of the head [m, k].
    """
    obs = view.obs
    t: Tensor | None = None  # X @ t is the last coordinate of (x, 1), by the bias's gradient
    rows = torch.zeros(len(X)).to(X)
    if by == "first":
        seen = seen @ torch.linalg.pinv(X)  # [m, n] the deltas
        rows = torch.linalg.pinv(seen).norm(dim=1)  # [n] error of X per unit of error in the gradient
        if pair.first.bias and pair.first.bias in obs.update:
            t = (
                torch.linalg.pinv(X)
                @ torch.linalg.lstsq(seen, obs.update[pair.first.bias].double()[:, None]).solution[:, 0]
            )
    elif pair.spread_b:
        t = torch.zeros(X.shape[1]).to(X)
        t[-1] = 1 / pair.spread_b

    def scaled(X: Tensor) -> Tensor:
        x = X[..., : pair.d] / pair.spread
        return x / (X @ t)[..., None] if t is not None else (norm or 1.0) * x / x.norm(dim=-1, keepdim=True)

    x = scaled(X)  # [n, d]
    error = (scaled(X + dX) - x).square().sum((0, 2)).sqrt() * BOUND_IN_SIGMAS / x.norm(dim=1)
    stretch = 1 / X[:, : pair.d].norm(dim=1) + (t.norm() / (X @ t).abs() if t is not None else 0.0)
    error = error + torch.nan_to_num(floor * rows * stretch, nan=torch.inf)  # the span's own error
    factor = X @ t if t is not None else X[:, : pair.d].norm(dim=1) / pair.spread / (norm or 1.0)
    seen = seen * factor if by == "first" else seen  # dL/dz, now that the scale is known
    sign, R, unsure = _signs(view, pair, x, seen, by, fixed=t is not None)
    x = sign[:, None] * x
    found = _labels(view, pair, x, R)
    others = [(factor, _labels(view, pair, x, R / factor)) for factor in _factors(view, pair, x, R)]
    factor, nearest = min(others, key=lambda each: float(each[1][1].max()), default=(1.0, found))
    if float(nearest[1].max()) < FACTOR_GAIN * float(found[1].max()):
        found, R = nearest, R / factor
        trace["factor"] = factor
        trace["words"] = (
            f"The update is {factor:.2f} times the gradient of these {len(x)} examples, by their residuals."
        )
    apart = 1 / torch.linalg.pinv(x / x.norm(dim=1, keepdim=True)).norm(dim=0)  # [n] from the span of the others
    told = (error < apart / 2) & ((found[1] < LARGEST_LABEL_GAP) | found[1].isinf())  # else first order does not hold
    up_to = {"permutation"} | ({"sign"} if unsure else set()) | ({"scale"} if t is None and norm is None else set())
    bound = torch.where(told & (error < 1), error, torch.inf).cpu()
    trace |= {"predicted error": error, "residuals": R}
    inputs, bound, name = view.undo(pair.first, x, bound)
    return Reconstruction(inputs=inputs, labels=found[0], layer=name, up_to=frozenset(up_to), bound=bound, trace=trace)


def _signs(
    view: View, pair: LayerPair, x: Tensor, seen: Tensor, by: Literal["first", "head"], *, fixed: bool
) -> tuple[Tensor, Tensor, bool]:
    """Signs [n], residuals [n, k] at these signs, and whether a sign is left open.

    s' tells x from -x unless it is even or odd. If it is even, the loss does, where it allows few values of the residuals,
    or the head's bias, whose gradient is their sum; if it is odd, so that s is even, nothing does.
    """
    ones = torch.ones(len(x)).to(x)
    R, gap = _residuals(pair, x, seen, by)
    if fixed:
        return ones, R, False
    other, gap_other = _residuals(pair, -x, -seen if by == "first" else seen, by)
    z = pair.before(x)
    slope, mirrored = pair.s.derivative(z), pair.s.derivative(pair.before(-x))
    even, odd = (bool((slope + c * mirrored).abs().max() <= 1e-9 * slope.abs().max()) for c in (-1, 1))
    if even:
        gap, gap_other = _labels(view, pair, x, R)[1], _labels(view, pair, -x, other)[1]
    elif by == "head":
        H = torch.cat([pair.s(z), pair.s(pair.before(-x))]).T  # [m, 2 n]
        both = torch.linalg.lstsq(H, seen).solution.norm(dim=1)
        gap, gap_other = both[len(x) :], both[: len(x)]
    sign = torch.where(gap_other < gap, -ones, ones)
    told = torch.minimum(gap, gap_other) < 0.5 * torch.maximum(gap, gap_other)  # false where both are infinite
    unsure = odd or (even and not bool(told.all()))
    total = view.update.get(pair.head.bias) if pair.head.bias else None
    if unsure and even and total is not None and len(x) <= 12:  # 2^n sums
        signs = torch.cartesian_prod(*[torch.tensor([1.0, -1.0]).to(x)] * len(x)).reshape(-1, len(x))  # [2^n, n]
        gaps = (signs @ R - total.to(R)).norm(dim=1)
        best, second = gaps.sort().values[:2].tolist()
        if best < second / 2:
            sign, unsure = signs[gaps.argmin()], False
    if by == "head":
        return sign, _residuals(pair, sign[:, None] * x, seen, by)[0], unsure
    return sign, torch.where((sign > 0)[:, None], R, other), unsure


def _residuals(pair: LayerPair, x: Tensor, seen: Tensor, by: Literal["first", "head"]) -> tuple[Tensor, Tensor]:
    """r [n, k] and misfits [n], least squares in delta_i = s'(z_i) V^T r_i of the first layer's deltas [m, n].

    By the head's gradient [m, k] in sum_i r_i s(z_i), which always fits.
    """
    z = pair.before(x)  # [n, m]
    if by == "head":
        return torch.linalg.lstsq(pair.s(z).T, seen).solution, torch.zeros(len(x)).to(x)
    D = pair.s.derivative(z)[:, :, None] * pair.V.T  # [n, m, k]
    R = (torch.linalg.pinv(D) @ seen.T[:, :, None])[..., 0]
    return R, ((D @ R[:, :, None])[..., 0] - seen.T).norm(dim=1)


def _factors(view: View, pair: LayerPair, x: Tensor, R: Tensor) -> list[float]:
    """A positive and a negative c at which residuals R [n, k] are near to c times those of classes, in the median example.

    None where labels are no classes, or the loss is not cross entropy: any residual is then that of some target.
    """
    form = view.form
    if form is None or not form.classes or form.name != "cross-entropy":
        return []
    r = R / (form.scale / len(x) if form.reduction == "mean" else form.scale)
    o = pair.s(pair.before(x)) @ pair.V.T + pair.c  # [n, k]
    k = o.shape[1]
    ideal = (1 - form.smoothing) * torch.eye(k).to(o) + form.smoothing / k
    own = o.softmax(1)[:, None] - ideal  # [n, k, k]: the residual that each class would leave
    along = (own * r[:, None]).sum(2)
    cosine = along / (own.norm(dim=2) * r.norm(dim=1, keepdim=True) + 1e-300)
    best = [(sign * cosine).argmax(1, keepdim=True) for sign in (1, -1)]
    medians = [float((along.gather(1, j) / own.square().sum(2).gather(1, j)).median()) for j in best]
    return [factor for factor in medians if factor]


def _labels(view: View, pair: LayerPair, x: Tensor, R: Tensor) -> tuple[Tensor | None, Tensor]:
    """Labels that residuals R [n, k] at inputs x [n, d] mean under the loss, and how far they are from fitting [n].

    cross entropy: r / c = softmax(o) - y; binary: sigmoid(o) - y; squared error: 2 (o - y), o the outputs.
    """
    free = torch.full((len(x),), torch.inf).to(x)
    form = view.form
    if form is None or form.name == "additive" or form.weights is not None:
        return None, free
    r = R / (form.scale / len(x) if form.reduction == "mean" else form.scale)
    o = pair.s(pair.before(x)) @ pair.V.T + pair.c  # [n, k]
    squared = form.name == "squared-error"
    y = o - r / 2 if squared else (o.softmax(1) if form.name == "cross-entropy" else o.sigmoid()) - r
    if form.classes:
        labels = y.argmax(1)
        ideal = nn.functional.one_hot(labels, y.shape[1]) * (1 - form.smoothing) + form.smoothing / y.shape[1]
        return labels, (y - ideal).norm(dim=1)
    if squared:
        return y.reshape(-1, *pair.outputs), free
    bits = (y > 0.5).to(y)
    return bits.reshape(-1, *pair.outputs), (y - bits).norm(dim=1)
