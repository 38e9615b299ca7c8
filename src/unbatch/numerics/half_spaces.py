"""Sums of examples over half spaces and slabs: which examples they are of, one after the other, each proven.

A server that plants parallel or random rows in a dense layer of relu units, and makes all that lies above it linear and
nearly constant, is sent sums over those examples that a unit fires for, each with a weight that its label alone tells.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MOST_COUNTED = 4096  # examples in one sum, of which their number is told
COUNT_SLACK = 4.0  # times the error of a sum of weights, within which it is taken for one of a certain number


@dataclass(frozen=True)
class Sums:
    """Weighted sums over sets of examples, S_q = sum_{i in q} w_i (x_i, 1), where w_i is one of a few known values.

    Set q holds the examples with directions_q . x above its first threshold and not above its second: a slab, or a half
    space.

    >>> one, weight = torch.tensor([2.0, 0.0]).double(), 0.618034
    >>> sums = Sums(
    ...     values=weight * torch.tensor([[2.0, 0.0, 1.0]]).double(),
    ...     error=torch.full((1, 2), 1e-6).double(),
    ...     directions=torch.tensor([[1.0, 0.0]]).double(),
    ...     thresholds=torch.tensor([[1.0, torch.inf]]).double(),
    ...     group=torch.zeros(1),
    ...     owner=torch.zeros(1),
    ... )
    >>> sums.inside(one, 1e-6)
    (tensor([True]), tensor([False]))
    """

    values: Tensor  # [q, d + 1], float64
    error: Tensor  # [q, 2] of the first d entries together, l2, and of the last one
    directions: Tensor  # [q, d]
    thresholds: Tensor  # [q, 2], from .. to; inf: a half space
    group: Tensor  # [q], whole numbers: sets of one group have no example in common
    owner: Tensor  # [q], whose examples they are: sets of two owners have no example in common

    def inside(self, x: Tensor, off: float) -> tuple[Tensor, Tensor]:
        """Of one example [d] that is known to `off` (l2): the sets [q] that hold it, and those for which that is open."""
        h, size = self.directions @ x, self.directions.norm(dim=1)
        near = size * (off + 4 * torch.finfo(torch.float32).eps * x.norm())
        open_ = ((h[:, None] - self.thresholds).abs() <= near[:, None]).any(1)
        return (h > self.thresholds[:, 0]) & (h <= self.thresholds[:, 1]), open_

    def known_inside(self, q: int, inside: Tensor, open_: Tensor) -> tuple[Tensor, Tensor]:
        """What `inside` says of an example that set q holds for certain, and therefore no other set of its group."""
        apart = (self.group == self.group[q]) | (self.owner != self.owner[q])
        own = torch.arange(len(self.group)) == q
        return (inside & ~apart) | own, open_ & ~apart

    def only(self, chosen: Tensor) -> Sums:
        """The sums over the chosen sets [q] alone."""
        kept = (
            getattr(self, name)[chosen] for name in ("values", "error", "directions", "thresholds", "group", "owner")
        )
        return Sums(*kept)


@dataclass(frozen=True)
class Peeled:
    """Examples that came out of sums, in that order.

    >>> none = torch.zeros(0)
    >>> Peeled(torch.zeros(0, 3), weight=none, off=none, owner=none, left=torch.arange(2)).left.tolist()
    [0, 1]
    """

    x: Tensor  # [k, d]
    weight: Tensor  # [k] which of the possible values
    off: Tensor  # [k] largest error, l2
    owner: Tensor  # [k]
    left: Tensor  # [q], the sets that hold more examples than were read


def kind_of_one(sum_: float, error: float, weights: Tensor, most: int) -> int | None:
    """Which of the possible weights [v] a sum of up to `most` of them is, if it can be no sum of two or more; else None.

    All sums of m weights, m <= most, are looked at: exact for two different weights (m a + b (c - a)), which the golden
    ratio keeps apart, refused for more.

    >>> golden = torch.tensor([0.618034, -0.381966])
    >>> [kind_of_one(total, 1e-5, golden, 50) for total in (0.618034, -0.381966, 1.236068)]
    [0, 1, None]
    >>> kind_of_one(0.5, 1e-5, torch.tensor([0.5, -0.5]), 50)  # may as well be two of the one and one of the other
    """
    near = [k for k, w in enumerate(weights.tolist()) if abs(sum_ - w) <= COUNT_SLACK * error]
    if len(near) != 1 or most > MOST_COUNTED:
        return None
    high, low = float(weights.max()), float(weights.min())
    m = torch.arange(2, most + 1, dtype=torch.float64)
    gap = high - low
    if gap <= 0:
        nearest = (m * high - sum_).abs()
    else:
        b = ((m * high - sum_) / gap).round().clamp_min(0).minimum(m)
        nearest = (m * high - b * gap - sum_).abs()
    return near[0] if not len(m) or float(nearest.min()) > 2 * COUNT_SLACK * error else None


def peel(sums: Sums, weights: Tensor, most: int, keep_on: Callable[[int], bool] = lambda found: True) -> Peeled:
    """The examples that the sums give away one after the other: a set of one is read, and taken out of all others.

    `weights` [v] are the values that an example's weight may have, two at most, and `most` is the number of examples. An
    example is returned only where its set is proven to hold nothing else (`kind_of_one`), so that it is exact to `off`.

    >>> x = torch.tensor([[0.2, 0.9], [0.6, 0.1], [0.7, 0.3]], dtype=torch.float64)
    >>> w, eye = torch.tensor([0.618034, -0.381966, 0.618034]).double(), torch.eye(2).double()
    >>> wide = torch.cat([w[:, None] * x, w[:, None]], 1)
    >>> sets = torch.tensor([[1, 0, 0], [0, 1, 1], [0, 1, 0]]).double()  # x_1 < 1/2, x_1 > 1/2, x_2 < 1/5
    >>> sums = Sums(
    ...     values=sets @ wide,
    ...     error=torch.full((3, 2), 1e-9).double(),
    ...     directions=torch.stack([eye[0], eye[0], eye[1]]),
    ...     thresholds=torch.tensor([[-9, 0.5], [0.5, torch.inf], [-9, 0.2]]).double(),
    ...     group=torch.tensor([0, 0, 1]),
    ...     owner=torch.zeros(3),
    ... )
    >>> found = peel(sums, torch.tensor([0.618034, -0.381966]).double(), 3)
    >>> found.x
    tensor([[0.2000, 0.9000],
            [0.6000, 0.1000],
            [0.7000, 0.3000]], dtype=torch.float64)
    """
    values, error = sums.values.clone(), sums.error.clone()
    closed = torch.zeros(len(values), dtype=torch.bool)  # sets that are read
    doubts = [list[int]() for _ in range(len(values))]  # of each set, found examples that it may hold
    found, kinds, offs, owners = list[Tensor](), list[int](), list[float](), list[int]()
    waiting = values[:, -1].abs() > COUNT_SLACK * error[:, 1]
    queue = waiting.nonzero().flatten().tolist()
    queue.sort(
        key=lambda at: kind_of_one(float(values[at, -1]), float(error[at, 1]), weights, most) is None
    )  # as sent, first
    while queue and len(found) < most and keep_on(len(found)):
        q = queue.pop(0)
        kind = None if closed[q] else kind_of_one(float(values[q, -1]), float(error[q, 1]), weights, most)
        if kind is None:
            continue
        weight = float(weights[kind])
        x, off = values[q, :-1] / weight, float(error[q, 0]) / abs(weight)
        inside, open_ = sums.inside(x, off)
        if not bool(inside[q] | open_[q]):  # it would not be in its own set
            closed[q] = True
            continue
        if any(float((x - found[j]).norm()) <= off + offs[j] for j in doubts[q]):
            continue  # it may be one that was found already
        inside, open_ = sums.known_inside(q, inside, open_)
        inside &= ~open_
        for at in open_.nonzero().flatten().tolist():
            doubts[at].append(len(found))
        found.append(x)
        kinds.append(kind)
        offs.append(off)
        owners.append(int(sums.owner[q]))
        values[inside] -= weight * torch.cat([x, x.new_ones(1)])
        error[inside, 0] += abs(weight) * off
        error[inside, 1] += float(error[q, 1])
        closed[q] = True
        queue += [at for at in inside.nonzero().flatten().tolist() if at != q and not closed[at]]
    left = (values[:, -1].abs() > COUNT_SLACK * error[:, 1]) & ~closed
    d = values.shape[1] - 1
    return Peeled(
        torch.stack(found) if found else values.new_zeros(0, d),
        torch.tensor(kinds, dtype=torch.int64),
        torch.tensor(offs, dtype=torch.float64),
        torch.tensor(owners, dtype=torch.int64),
        left,
    )
