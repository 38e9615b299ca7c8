"""Margin: training inputs out of the hidden units of a network that was trained until its margin grew no more.

A network x -> sum_k v_k relu(w_k . x + b_k) that descends on a logistic loss ends in a direction in which its margin is
stationary (Lyu and Li, ICLR 2020). There, with the numbers c_i of the examples on the margin, c_i y_i >= 0,
(w_k, b_k) = v_k sum_i c_i [unit k fires on x_i] (x_i, 1). So each unit's (w_k, b_k) / v_k is a sum of some of the same
few vectors c_i (x_i, 1), and which of them, the sum itself says: those on which it fires. Besides, every f(x_i) is the
same up to its sign. This is what is searched for here, in the span of the units: for directions, since units that lag
behind are shorter than the rule says, but point where it says.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

ABOVE_NOISE = 1.2  # singular values of the units, over the bulk's edge
LEAST_BULK = 3  # singular values in the last eighth that tell a bulk
ROUNDED = 1e-9  # singular values, over the largest, that are rounding
SURE_ROW = 20.0  # a unit's length, over that of its start, from which on its direction is one
SAME_DIRECTION = 0.004  # relative distance of two units' directions up to which they are one
PARTS = (0.8, 0.9, 1.0, 1.1, 1.2)  # of one unit that are taken off another for a start
SLOPES = 20.0, 300.0  # of a unit's firing, first to last, in typical lengths of a point
HEAVY = 0.25  # power of a direction's weight that it counts by: small groups of units tell as much as large ones
RATE = 0.02  # of Adam
STAGES, LAST_STARTS = 5, 8  # after each the better third of the starts goes on, down to so many
FAR = 1.5  # lengths of a start, over the median


@dataclass(frozen=True, eq=False)
class Units:
    """The hidden units of a network as a few directions, in coordinates of their span.

    `rows` [p, k] are unit vectors along (w, b) / v, `signs` [p] those of v and `weights` [p] the sums of |v| |(w, b)| over
    the units of a direction, so that f(z) = sum_p signs_p weights_p relu(signs_p rows_p . z). `basis` [k, d + 1] takes
    coordinates to inputs with a one behind them.

    >>> held = Units(torch.eye(2), signs=torch.tensor([1.0, -1.0]), weights=torch.ones(2), basis=torch.eye(2))
    >>> held.outputs(torch.tensor([[3.0, 0.0], [0.0, 2.0], [0.0, -2.0]]))
    tensor([ 3.,  0., -2.])
    """

    rows: Tensor
    signs: Tensor
    weights: Tensor
    basis: Tensor

    @property
    def ones(self) -> Tensor:
        """What a point's last entry is, as a product with its coordinates [k]."""
        return self.basis[:, -1]

    def outputs(self, z: Tensor) -> Tensor:
        """The network's outputs [...] at points [..., k]."""
        return (self.signs * (z @ self.rows.T)).clamp_min(0) @ (self.signs * self.weights)

    def scaled(self, z: Tensor) -> Tensor:
        """Points [..., k] divided by their last entry, so that it is one; by no less than .1."""
        last = z @ self.ones
        return z / torch.where(last.abs() < 0.1, 0.1, last)[..., None]

    def inputs(self, z: Tensor) -> Tensor:
        """Inputs [..., d] of points."""
        return self.scaled(z) @ self.basis[:, :-1]


def units(weight: Tensor, bias: Tensor, outward: Tensor) -> Units:
    """The directions of hidden units with weights [m, d], biases [m] and outgoing weights [m], above their start's noise.

    What a small random start leaves in every unit shows as a bulk of equal singular values; the span is what stands above.

    >>> rng = torch.Generator().manual_seed(0)
    >>> x = torch.rand(2, 5, generator=rng, dtype=torch.float64)
    >>> weight = torch.cat([x[:1].repeat(40, 1), 2 * x[1:].repeat(40, 1)])
    >>> found = units(weight, torch.ones(80).double(), torch.ones(80).double())
    >>> found.rows.shape, found.weights.sum() > 0
    (torch.Size([2, 2]), tensor(True))
    """
    rows = torch.cat([weight, bias[:, None]], 1)  # [m, d + 1]
    basis, each = above_noise(rows)
    k, near = len(basis), rows @ basis.T
    noise = each * k**0.5
    found: list[Tensor] = []
    signs: list[Tensor] = []
    weights: list[float] = []
    for i in near.norm(dim=1).argsort(descending=True, stable=True).tolist():
        length, sign = float(near[i].norm()), outward[i].sign()
        if length <= SURE_ROW * noise or not sign:
            break
        row = near[i] * sign
        limit = 3 * noise + SAME_DIRECTION * length
        for p, mean in enumerate(found):
            along = row @ mean / mean.norm()
            if signs[p] == sign and along > 0 and (row - along * mean / mean.norm()).norm() < limit:
                found[p] = mean + row * length
                weights[p] += length * float(outward[i].abs())
                break
        else:
            found.append(row * length)
            signs.append(sign)
            weights.append(length * float(outward[i].abs()))
    held = torch.stack(found) if found else near[:0]
    sides = torch.stack(signs) if signs else near[:0, 0]
    return Units(held / held.norm(dim=1, keepdim=True), sides, torch.tensor(weights).to(held), basis)


def above_noise(rows: Tensor) -> tuple[Tensor, float]:
    """What rows [m, d] span beside the bulk of a small random start [k, d], and the standard deviation of that in an entry.

    >>> basis, noise = above_noise(torch.eye(4).double()[:, :2] @ torch.ones(2, 6).double())
    >>> basis.shape, noise < 1e-15
    (torch.Size([1, 6]), True)
    """
    _, sizes, axes = torch.linalg.svd(rows, full_matrices=False)
    k = _above_noise(sizes, len(rows))
    noise = float((sizes[k:].square().sum() / (len(rows) * max(1, rows.shape[1] - k))).sqrt())
    return axes[:k], noise


def _above_noise(sizes: Tensor, m: int) -> int:
    """How many singular values [r] of m units stand above the bulk that a random start makes; all, where r is too few.

    Those of a random matrix lie between 1 - q and 1 + q of their middle, q^2 = r / m (Marchenko and Pastur).
    """
    at = 7 * len(sizes) // 8
    if len(sizes) - at < LEAST_BULK:
        return int((sizes > ROUNDED * sizes[0]).sum())
    q = min(1.0, len(sizes) / m) ** 0.5
    edge = ABOVE_NOISE * (1 + q) / (1 - 0.7 * q) * sizes[at]
    return max(1, int((sizes > edge.clamp_min(ROUNDED * sizes[0])).sum()))


@dataclass(frozen=True)
class MarginWeights:
    """MarginWeights of what the search adds to sum_p h_p (1 - cos(rows_p, sum_i c_i y_i fire_pi (x_i, 1))).

    margin: of the mean of (|f(x_i)| / t - 1)^2 weighed by c_i, t found with the points; inside: of the mean square by which
    inputs leave their range. h_p are the units' weights to the power of 1/4, fire is a sigmoid that becomes ever steeper.

    >>> MarginWeights().margin
    1.0
    """

    margin: float = 1.0
    inside: float = 0.1


@dataclass(frozen=True, eq=False)
class Attempt:
    """One step of a search from s starts: points [s, c, k], strengths c_i >= 0 [s, c], and the loss of each start [s].

    >>> two = torch.tensor([0.5, 0.1])
    >>> attempt = Attempt(torch.zeros(2, 3, 4), strengths=torch.ones(2, 3), losses=two, margin_off=torch.zeros(2))
    >>> int(attempt.losses.argmin())
    1
    """

    points: Tensor
    strengths: Tensor
    losses: Tensor
    margin_off: Tensor  # [s] root mean square of |f| / margin - 1, weighed by strength


def search(
    held: Units,
    count: int,
    rng: torch.Generator,
    *,
    starts: int,
    steps: int,
    box: tuple[float, float] | None = None,
    weights: MarginWeights | None = None,
) -> Iterator[Attempt]:
    """`count` points from each of many starts, whose sums point where the units point, all on one margin; by Adam.

    After each fifth of the steps the better third of the starts goes on, down to LAST_STARTS: most end early in mixtures,
    and what they have lost does not come back. It begins at differences of two rows, which are one example where the two
    units fire on the same but for it.

    >>> eye = torch.eye(2, dtype=torch.float64)
    >>> held = Units(eye, signs=torch.tensor([1.0, -1.0]).double(), weights=torch.ones(2).double(), basis=eye)
    >>> [*_, last] = search(held, 2, torch.Generator().manual_seed(0), starts=3, steps=10)
    >>> last.points.shape, len(last.losses)
    (torch.Size([3, 2, 2]), 3)
    """
    weights = weights or MarginWeights()
    z = _starts(held, count, rng, starts)
    size = float(z.norm(dim=-1).median())
    signs = held.outputs(z).sign()
    logs = 0.5 * torch.randn(starts, count, generator=rng, dtype=torch.float64).to(z) - 1
    level = held.outputs(z).abs().median(1, keepdim=True).values.log()
    stages = [steps // STAGES] * (STAGES - 1) + [steps - steps // STAGES * (STAGES - 1)]
    done = 0
    for stage, length in enumerate(stages):
        held_out = z.clone().requires_grad_(), logs.clone().requires_grad_(), level.clone().requires_grad_()
        groups = [
            {"params": [held_out[0]], "lr": RATE * size / z.shape[-1] ** 0.5},
            {"params": held_out[1:], "lr": RATE},
        ]
        adam = torch.optim.Adam(groups)
        full = [group["lr"] for group in groups]
        last = stage == len(stages) - 1
        for step in range(length + last):
            share = (done + step) / max(1, steps)
            losses, attempt = _losses(held, *held_out, signs, share, size, box, weights)
            yield attempt
            if step == length:
                return
            adam.zero_grad()
            losses.sum().backward()  # type: ignore[no-untyped-call]
            for group, rate in zip(adam.param_groups, full, strict=True):
                group["lr"] = rate * (1 + math.cos(math.pi * share)) / 2
            adam.step()
        done += length
        kept = losses.detach().argsort(stable=True)[: max(LAST_STARTS, len(z) // 3)] if length else torch.arange(len(z))
        z, logs, level, signs = (t.detach()[kept] for t in (*held_out, signs))


def _losses(
    held: Units,
    z: Tensor,
    logs: Tensor,
    level: Tensor,
    signs: Tensor,
    share: float,
    size: float,
    box: tuple[float, float] | None,
    weights: MarginWeights,
) -> tuple[Tensor, Attempt]:
    """The loss of each start [s], with its graph, and the step as it stands; the sigmoid is as steep as at that share."""
    slope = SLOPES[0] * (SLOPES[1] / SLOPES[0]) ** share / size
    heavy = held.weights**HEAVY
    points = held.scaled(z)
    before = points @ (held.rows * held.signs[:, None]).T  # [s, c, p]
    strengths = logs.exp()
    sums = (torch.sigmoid(slope * before) * (strengths * signs)[..., None]).transpose(1, 2) @ points  # [s, p, k]
    along = (sums * held.rows).sum(-1) / sums.norm(dim=-1).clamp_min(1e-12)
    off = (signs * (before.clamp_min(0) @ (held.signs * held.weights)) / level.exp() - 1).square()
    spread = (strengths * off).sum(-1) / strengths.sum(-1)
    losses = ((heavy / heavy.sum()) * (1 - along)).sum(-1) + weights.margin * spread
    losses = losses + 0.01 * (z @ held.ones - 1).square().mean(-1)
    if box is not None:
        x = points @ held.basis[:, :-1]
        losses = losses + weights.inside * ((x - x.clamp(*box)) / (box[1] - box[0])).square().mean((-1, -2))
    return losses, Attempt(points.detach(), strengths.detach(), losses.detach(), spread.detach().sqrt())


def _starts(held: Units, count: int, rng: torch.Generator, starts: int) -> Tensor:
    """Differences of rows drawn for each start, moved a little [s, c, k]."""
    rows = held.rows
    parts = torch.tensor(PARTS).to(rows)
    pairs = rows[:, None, None] - parts[:, None] * rows[None, :, None]  # [p, p, t, k]
    z = torch.cat([pairs[~torch.eye(len(rows), dtype=torch.bool)].flatten(0, 1), rows])
    last = z @ held.ones
    z = z[last.abs() > 1e-3] / last[last.abs() > 1e-3, None]
    length = z.norm(dim=1)
    z = z[length < FAR * length.median()]
    drawn = z[torch.randint(len(z), (starts, count), generator=rng).to(z.device)]
    noise = torch.randn(drawn.shape, generator=rng, dtype=torch.float64).to(drawn)
    moved: Tensor = drawn + 0.1 * z.norm(dim=1).median() / drawn.shape[-1] ** 0.5 * noise
    return moved


def strongest(points: Tensor, strengths: Tensor, count: int, *, same: float = 0.98) -> tuple[Tensor, Tensor]:
    """At most `count` points [c, k] that are not the same as a stronger one, strongest first, and their strengths.

    Strength is c_i |z_i|, the length of what a point puts into the sums. Those with a cosine above `same` are one.

    >>> z = torch.tensor([[1.0, 0.0], [1.0, 0.01], [0.0, 1.0]])
    >>> strongest(z, torch.tensor([2.0, 1.0, 3.0]), 2)
    (tensor([[0., 1.],
            [1., 0.]]), tensor([3., 2.]))
    """
    size = strengths * points.norm(dim=1)
    kept: list[int] = []
    unit = points / points.norm(dim=1, keepdim=True).clamp_min(1e-300)
    for i in size.argsort(descending=True, stable=True).tolist():
        if len(kept) < count and (not kept or float((unit[kept] @ unit[i]).max()) < same):
            kept.append(i)
    return points[kept], size[kept]


def told_apart(held: Units, points: Tensor) -> Tensor:
    """How far each point is told apart by which units fire on it [c]: 1 fully, 0 where others always fire beside it.

    The diagonal of S^+ S, S [p, c] saying on which points a direction's units fire: below 1 some combination of points can
    be exchanged for another without a change in any unit.

    >>> eye = torch.eye(2, dtype=torch.float64)
    >>> held = Units(eye, signs=torch.ones(2).double(), weights=torch.ones(2).double(), basis=eye)
    >>> told_apart(held, torch.tensor([[2.0, 1.0], [-1.0, 1.0]]).double()).round(decimals=6)
    tensor([1., 1.], dtype=torch.float64)
    """
    fires = (held.signs * (held.scaled(points) @ held.rows.T) > 0).to(points).T  # [p, c]
    told: Tensor = (torch.linalg.pinv(fires) @ fires).diagonal()
    return told
