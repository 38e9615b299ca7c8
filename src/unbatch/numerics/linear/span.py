"""Numerical rank and row space of a gradient matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def rank_tolerance(A: Tensor, eps: float) -> float:
    """How large a singular value of a gradient can be that is rounding alone.

    The largest singular value that rounding alone gives a matrix A [p, q] whose entries carry relative error `eps`.

    Errors eps |A_ij| that are independent have spectral norm about eps |A|_F (sqrt p + sqrt q) / sqrt(p q) (Bai-Yin);
    the factor 8 covers sums over the batch that are rounded term by term. The SVD, in float64, adds its own
    max(p, q) eps_64 |A|.

    >>> rank_tolerance(torch.ones(10, 10), torch.finfo(torch.float32).eps) < 1e-4
    True
    """
    p, q = A.shape
    size = float(torch.linalg.matrix_norm(A.double()))
    own = max(p, q) * torch.finfo(torch.float64).eps
    return size * float(8 * eps * (p**0.5 + q**0.5) / (p * q) ** 0.5 + own)


def numerical_rank(A: Tensor, *, eps: float | None = None) -> int:
    """How many independent rows a gradient has, rounding aside.

    Number of singular values of A [p, q] above `rank_tolerance`; `eps` defaults to the unit roundoff of A's dtype.

    >>> numerical_rank(torch.outer(torch.arange(1.0, 5.0), torch.arange(1.0, 4.0)))
    1
    """
    eps = torch.finfo(A.dtype).eps if eps is None else eps
    S = torch.linalg.svdvals(A.double())
    return int((S > rank_tolerance(A, eps)).sum())


@dataclass(frozen=True)
class Span:
    """The directions that a gradient's rows span, and what rounding has added to it.

    The leading part of a matrix A [p, q], columns diag(values) rows, and the size of what lies outside.

    >>> A = torch.diag(torch.tensor([3.0, 2.0, 0.0]))
    >>> leading_span(A, torch.Generator().manual_seed(0)).values.round(decimals=6)
    tensor([3., 2.], dtype=torch.float64)
    """

    columns: Tensor  # [p, r] orthonormal
    rows: Tensor  # [r, q] orthonormal
    values: Tensor  # [r] singular values, descending
    noise: float  # spectral norm that is left unexplained: rounding, or the next singular value where that is larger
    beyond: float = 0.0  # the next singular value
    arithmetic: float = 0.0  # |A rows^T - columns values|, spectral: what the decomposition itself adds

    def leading(self, rank: int) -> Span:
        """Its first `rank` directions; the largest value among the others then lies beyond."""
        if rank >= len(self.values):
            return self
        beyond = float(self.values[rank])
        return Span(
            self.columns[:, :rank],
            self.rows[:rank],
            self.values[:rank],
            max(self.noise, beyond),
            beyond,
            self.arithmetic,
        )


def leading_span(
    A: Tensor,
    rng: torch.Generator,
    *,
    rank: int | None = None,
    eps: float | None = None,
    noise: float = 0.0,
    guess: int = 16,
) -> Span:
    """The directions that a gradient's rows span, at a cost that grows with their number alone.

    Row space of A [p, q] by a randomised range finder: O(p q r), where an SVD costs O(p q min(p, q)).

    With `rank` its leading rows, else as many as the numerical rank, which is looked for among `guess` directions, then
    twice as many, and so on; `eps` as for `numerical_rank`, `noise` the standard deviation of each entry's error. Two
    power iterations separate the leading directions from a noise floor. Columns A rows^T / values of such rows would be
    orthonormal to eps (values_1 / values_r)^2 only, so the leading part is decomposed once more.
    Source: Halko, Martinsson, Tropp, SIAM Review 2011.

    >>> rng = torch.Generator().manual_seed(0)
    >>> A = torch.randn(40, 3, generator=rng) @ torch.randn(3, 50, generator=rng)
    >>> leading_span(A, rng).rows.shape
    torch.Size([3, 50])
    """
    eps = torch.finfo(A.dtype).eps if eps is None else eps
    A = A.double()
    size, tolerance = min(A.shape), rank_tolerance(A, eps) + noise * (A.shape[0] ** 0.5 + A.shape[1] ** 0.5)
    most = min(size, max(guess, (rank or 0) + 8))
    while True:
        probe = torch.randn(A.shape[1], most, generator=rng, dtype=torch.float64).to(A.device)
        Q = torch.linalg.qr(A @ probe).Q  # [p, most]
        for _ in range(2):
            Q = torch.linalg.qr(A @ torch.linalg.qr(A.T @ Q).Q).Q
        _, S, Vh = torch.linalg.svd(Q.T @ A, full_matrices=False)
        r = _gap(S, tolerance) if rank is None else min(rank, len(S))
        if rank is not None or r < most or most == size:
            break
        most = min(size, 2 * most)
    beyond = float(S[r]) if r < len(S) else 0.0
    least = float(S[r - 1]) if r else torch.inf
    columns, values, turn = torch.linalg.svd(A @ Vh[:r].T, full_matrices=False)
    rows = turn @ Vh[:r]
    arithmetic = float(torch.linalg.matrix_norm(A @ rows.T - columns * values, 2)) if r else 0.0
    return Span(columns, rows, values, max(tolerance if least > tolerance else 0.0, beyond), beyond, arithmetic)


def rounding_noise(dtype: torch.dtype) -> float:
    """The error of the smallest numbers of a type, which are rounded to its last place.

    Standard deviation of the rounding of entries too small for relative precision: what float16 does to gradients.

    >>> f"{rounding_noise(torch.float16):.1e}"
    '1.7e-08'
    """
    info = torch.finfo(dtype)
    return float(info.smallest_normal * info.eps / 12**0.5)


def _gap(S: Tensor, tolerance: float) -> int:
    """Numerical rank by values S, descending, some of which may lie between the tolerance and what one rounding gives.

    The tolerance allows for sums rounded term by term, 32 times what rounding a finished sum does. Values between are
    signal down to the widest gap, if it is fourfold: the leading direction of rounding stands out of the rest by up to 3.
    """
    high, low = int((S > tolerance).sum()), int((S > tolerance / 16).sum())
    if high == low or low == len(S):
        return high
    ratios = S[high : low + 1] / S[high + 1 : low + 2] if low + 1 < len(S) else S[high:low] / S[high + 1 : low + 1]
    widest = int(ratios.argmax())
    return high + widest + 1 if float(ratios[widest]) > 4 else high
