"""Membership: whether a vector lies in the row space of a gradient, in units of what the gradient's rounding explains."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unbatch.numerics.linear.span import rank_tolerance

CUT = 8.0  # times the distance that rounding explains, up to which a vector counts as a member
DRAWN_CUT = 3.0  # the same for errors that are drawn, whose lengths hardly vary
DRAWN_SLACK = 1.1  # times the largest singular value of errors that are drawn, which varies with the draw
ROW_ROUNDINGS = 16.0  # of a vector on its way through a network's first layers, relative, in the client's precision
BETTER = 64.0  # times which most sums round better than the tolerance allows for
LEAST_GAP = 4.0  # between the singular values of the signal and of rounding, where a tolerance lies between them


@dataclass(frozen=True, eq=False)
class RowSpace:
    """The row space of a gradient, with what its rounding does to it.

    For a gradient G = A + E of rank r, a member x = sum_k a_k v_k of the row space of A lies about
    e |a / sigma| off the one of G, e the length of a row of E outside of it, per unit of the left singular vectors.

    >>> space = row_space(torch.tensor([[1.0, 1.0, 0.0], [2.0, 2.0, 0.0]]), eps=1e-7)
    >>> space.members(torch.tensor([[3.0, 3.0, 0.0], [1.0, 0.0, 0.0]]))
    tensor([ True, False])
    """

    rows: Tensor  # [r, d] orthonormal
    values: Tensor  # [r] singular values, descending
    error: float  # e
    below: float  # the largest singular value of what counts as rounding
    outputs: int  # rows of the gradient
    own: float  # relative error of the vectors themselves

    @property
    def rank(self) -> int:
        """How many independent vectors the gradient's rows are made of."""
        return len(self.values)

    @property
    def saturated(self) -> bool:
        """Whether the rank is as large as the gradient's sides let it be, so that more vectors may have entered.

        A norm before or behind the layer takes one direction from its vectors or its derivatives.
        """
        return self.rank >= min(self.outputs, self.rows.shape[1]) - 1

    @property
    def gap(self) -> float:
        """The smallest singular value of the signal over the largest one of rounding."""
        return float(self.values[-1]) / max(self.below, 1e-300) if self.rank else 0.0

    def offness(self, x: Tensor) -> Tensor:
        """How far vectors [n, d] are off the row space, in units of what rounding explains: a member has about 1.

        Vectors without length are never members.
        """
        size = x.norm(dim=1, keepdim=True)
        unit = x / size.clamp_min(1e-300)
        inside = unit @ self.rows.T.to(x)  # [n, r]
        distance = (unit - inside @ self.rows.to(x)).norm(dim=1)
        explained = self.error * (inside / self.values.to(x)).norm(dim=1)
        found: Tensor = distance / (explained.square() + self.own**2).sqrt().clamp_min(1e-300)
        return found.masked_fill(size[:, 0] == 0, torch.inf)

    @property
    def farthest(self) -> float:
        """The largest distance at which a vector of length 1 can count as a member."""
        return CUT * ((self.error / float(self.values[-1])) ** 2 + self.own**2) ** 0.5 if self.rank else 0.0

    def outside(self, count: int) -> Tensor:
        """At most `count` orthonormal directions [q, d] that the row space has nothing of.

        What a vector has along them is less than its distance, so that few of them sort most vectors out.
        """
        d = self.rows.shape[1]
        rng = torch.Generator().manual_seed(0)
        drawn = torch.randn(min(count, d - self.rank), d, generator=rng, dtype=torch.float64).to(self.rows)
        drawn = drawn - drawn @ self.rows.T @ self.rows
        found: Tensor = torch.linalg.qr((drawn - drawn @ self.rows.T @ self.rows).T).Q.T
        return found

    def members(self, x: Tensor) -> Tensor:
        """Which vectors [n, d] lie in the row space as far as rounding lets them."""
        return self.offness(x) <= CUT


def row_space(gradient: Tensor, *, eps: float, own: float | None = None, drawn: Tensor | None = None) -> RowSpace:
    """The row space of a gradient [m, d] whose entries carry relative error `eps`, and independent errors if `drawn`.

    The rank is that of the singular values above `rank_tolerance`, and goes on below it down to the widest gap where
    that is clear: tolerances allow for the worst sum, and most sums round better. The size of the error is read off the
    singular values that are left, and is never taken below what rounding alone gives. `own` is the relative error of the
    vectors that are asked for: ROW_ROUNDINGS of `eps` where nothing else is said.

    `drawn` [m, d] are the standard deviations of errors of the entries that are independent, as those of noise and of
    one rounding to a coarser type are. Rows are then taken in units of their own error, the tolerance is the largest
    singular value of such errors, which are drawn once, and as their lengths hardly vary, vectors are members up to
    DRAWN_CUT times what they explain: distances are returned in that unit.

    >>> rng = torch.Generator().manual_seed(0)
    >>> X = torch.randn(3, 8, generator=rng, dtype=torch.float64)
    >>> space = row_space(torch.randn(20, 3, generator=rng, dtype=torch.float64) @ X, eps=1e-16)
    >>> space.rank, space.members(torch.cat([X, torch.eye(8, dtype=torch.float64)])).int().tolist()
    (3, [1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0])
    >>> coarse = (torch.randn(50, 3, generator=rng, dtype=torch.float64) @ X).bfloat16().double()
    >>> space = row_space(coarse, eps=1e-16, drawn=half_rounding(coarse, torch.bfloat16))
    >>> space.rank, space.members(torch.cat([X, torch.eye(8, dtype=torch.float64)])).int().tolist()
    (3, [1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0])
    """
    G, tolerance, unit = gradient.double(), 0.0, 1.0
    if drawn is not None:
        size = drawn.to(G).square().mean(1).sqrt()
        kept = (size > 0) & G.any(1)
        G, drawn = G[kept] / size[kept, None], drawn.to(G)[kept] / size[kept, None]
        sample = torch.randn(G.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(G)
        tolerance, unit = DRAWN_SLACK * float(torch.linalg.matrix_norm(sample * drawn, 2)), DRAWN_CUT / CUT
    m, d = G.shape
    S, Vh = torch.linalg.svd(G, full_matrices=False)[1:]
    rounding = rank_tolerance(G, eps)
    rank = _rank(S, rounding + tolerance, rounding / BETTER + tolerance)
    left = S[rank:]
    spread = float(left.square().sum() / max(m - rank, 1)) ** 0.5
    size_of_all = float(S.square().sum()) ** 0.5
    least = (eps * size_of_all / (m * d) ** 0.5) * max(d - rank, 1) ** 0.5 / 8
    least = max(least, torch.finfo(torch.float64).eps * float(S[0]) if len(S) else 0.0)
    below = float(left[0]) if len(left) else rounding + tolerance
    own = ROW_ROUNDINGS * eps if own is None else own
    return RowSpace(Vh[:rank], S[:rank], unit * max(spread, least), below, m, unit * own)


def half_rounding(values: Tensor, kind: torch.dtype) -> Tensor:
    """The standard deviation of the error of each number that was rounded once to `kind`: its last place over sqrt 12.

    >>> half_rounding(torch.tensor([1.0, 1.5, 2.0, 0.0]), torch.bfloat16).mul(12**0.5 * 2**7).round(decimals=4)
    tensor([1., 1., 2., 0.], dtype=torch.float64)
    """
    info, size = torch.finfo(kind), values.detach().double().abs()
    place = info.eps * torch.exp2(torch.floor(torch.log2(size.clamp_min(info.smallest_normal))))
    return place / 12**0.5


def _rank(S: Tensor, tolerance: float, least: float) -> int:
    """How many of the values S, descending, are signal: all above the tolerance, and down to `least` to the widest gap."""
    high, low = int((S > tolerance).sum()), int((S > least).sum())
    if high == low or low == len(S):
        return high
    ratios = S[high:low] / S[high + 1 : low + 1].clamp_min(1e-300)
    widest = int(ratios.argmax())
    return high + widest + 1 if float(ratios[widest]) > LEAST_GAP else high
