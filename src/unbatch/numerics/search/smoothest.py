"""Smoothest: of all pictures that satisfy given equations, the one whose light and colours vary least."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.func import jacrev

from unbatch.numerics.callables import Apply, Tick
from unbatch.numerics.search.damped_gauss_newton import Damping, Stop, damped_gauss_newton, end_of

PictureShape = tuple[int, ...]  # channels, height, width
Range = tuple[float, float]

COLOUR_WEIGHTS = (1.0, 4.0, 6.0)  # weights of light, red - blue and red - 2 green + blue
SLOPE_WEIGHT = 0.6  # weight of first differences beside second ones
DIFFERENCE_PENALTY, FIRST_PENALTY, LAST_PENALTY = (
    1000.0,
    10.0,
    300.0,
)  # on copies: of the differences; of the picture, at first and at last
OVER_RELAXATION, STAGE_ROUNDS, EQUATIONS_AT_ONCE = (
    1.6,
    20,
    512,
)  # over-relaxation; rounds between two penalties; equations differentiated at once
SINGULAR_FLOORS = 0.1, 2e-6  # of the singular values that count, relative: at first and at last
ENDING_STEPS = 60  # Gauss-Newton steps at last, each of which halves |f|
LEAST_LEVEL, SHORTEST_SHARE, LAST_STEP = (
    1e-3,
    0.05,
    1e-3,
)  # least level, of |f| at mid-grey; share of a step; last step, of the box


class Variation:
    """How rough a picture is, in light and in colours.

    V(x) = sum over pixels and colours c of w_c (|H x_c| + SLOPE_WEIGHT |grad x_c|), for pictures x [d] of `shape`.

    H: second differences xx, yy and sqrt(2) xy, mirrored at the edges; x_c: for three channels light and two differences
    of colour, else a channel. Source: Lysaker, Lundervold and Tai, IEEE Trans. Image Processing 12, 2003 (second order);
    Condat and Mosaddegh, ICIP 2012 (light and colour apart).

    >>> variation = Variation((1, 4, 4), torch.zeros(0))
    >>> variation(torch.full((16,), 0.5)) < 1e-6
    True
    """

    def __init__(self, shape: PictureShape, like: Tensor) -> None:
        c, h, w = self.shape = shape
        self.colours = (cosines(3) if c == 3 else torch.eye(c)).to(like)
        self.rows, self.columns = cosines(h).to(like), cosines(w).to(like)
        self.down, self.across = (torch.diff(torch.eye(k), dim=0, append=torch.eye(k)[-1:]).to(like) for k in (h, w))
        curves = [2 - 2 * torch.cos(math.pi * torch.arange(k, dtype=torch.float64) / k) for k in (h, w)]
        total = curves[0][:, None] + curves[1]
        self.spectrum = (total.square() / 64 + total / 8).to(like)  # [h, w] of D^T D
        weights = torch.tensor(COLOUR_WEIGHTS if c == 3 else (1.0,) * c, dtype=torch.float64)
        self.weights = torch.stack([8 * weights, 8**0.5 * SLOPE_WEIGHT * weights])[..., None, None].to(
            like
        )  # [2, c, 1, 1]

    def push(self, x: Tensor) -> Tensor:
        """D x [5, c, h, w]: second differences / 8 and first / sqrt(8) of every colour, so that |D| is about 1."""
        z = torch.einsum("oc,chw->ohw", self.colours, x.view(self.shape))
        right, below = z @ self.across.T, self.down @ z
        bends = right @ self.across, self.down.T @ below, 2**0.5 * self.down @ right
        return torch.stack([*bends, 8**0.5 * right, 8**0.5 * below]) / 8

    def solve(self, u: Tensor, y: Tensor, rest: float) -> Tensor:
        """(DIFFERENCE_PENALTY D^T D + rest)^-1 (DIFFERENCE_PENALTY D^T u + y) [d], by cosine transforms."""
        right = u[0] @ self.across.T + 2**0.5 * self.down.T @ u[2] + 8**0.5 * u[3]
        back = right @ self.across + self.down.T @ (self.down @ u[1] + 8**0.5 * u[4])
        z = DIFFERENCE_PENALTY / 8 * back + torch.einsum("oc,chw->ohw", self.colours, y.view(self.shape))
        z = (
            self.rows.T
            @ ((self.rows @ z @ self.columns.T) / (DIFFERENCE_PENALTY * self.spectrum + rest))
            @ self.columns
        )
        return torch.einsum("oc,ohw->chw", self.colours, z).flatten()

    def shrink(self, u: Tensor) -> Tensor:
        """argmin over s [5, c, h, w] of V + DIFFERENCE_PENALTY |s - u|^2 / 2, V taken of the differences s."""
        scale = (1 - self.weights / DIFFERENCE_PENALTY / _lengths(u).clamp_min(1e-300)).clamp_min(0)
        return u * scale[[0, 0, 0, 1, 1]]

    def __call__(self, x: Tensor) -> float:
        return float((self.weights * _lengths(self.push(x))).sum())


def smoothest(
    x: Tensor,
    free: Apply,
    shape: PictureShape,
    box: Range = (0.0, 1.0),
    *,
    rounds: int = 160,
    tick: Tick = lambda share: True,
) -> Tensor:
    """The least rough of all pictures that satisfy linear equations.

    argmin V over x + null space of A within the box: [d], a solution of A x = b as exact as x [d] is.

    `free` takes v [k, d] to its part in the null space (`Solution.free`), also of float32, in which the rounds are, since
    they end far from its rounding; the last of them is float64's. The box holds to about 1e-3 of its width after
    160 rounds. By alternating directions (Boyd et al., Foundations and Trends in Machine Learning 3, 2011) on copies of
    D x, of x in the box and of x on the equations. Raises ValueError: x does not fit the shape, or no such box.

    >>> x = torch.rand(16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> found = smoothest(x, lambda v: v - v.mean(1, keepdim=True), (1, 4, 4))  # the mean alone is known
    >>> bool((found - x.mean()).abs().max() < 1e-3)
    True
    """
    low, unit = box[0], box[1] - box[0]
    if x.shape != (math.prod(shape),) or not bool(x.isfinite().all()) or not 0 < unit < math.inf:
        raise ValueError(f"x {tuple(x.shape)}, shape {shape}, box {box}: give c * h * w finite numbers and low < high.")
    exact = (x - low) / unit
    known, variation = exact.float(), Variation(shape, exact.float())
    copies = known.expand(2, -1)  # [2, d]: one for the box, one for the equations
    u = variation.push(copies[1])
    missed, left, rest = torch.zeros_like(u), torch.zeros_like(copies), FIRST_PENALTY
    for i in range(rounds):
        if i % STAGE_ROUNDS == 0:
            if not tick(i / rounds):
                break
            tighter = FIRST_PENALTY * (LAST_PENALTY / FIRST_PENALTY) ** min(1.0, i / (0.6 * rounds))
            left, rest = left * (rest / tighter), tighter
        y = variation.solve(u - missed, rest * (copies - left).sum(0), 2 * rest)
        missed, left = (
            missed + OVER_RELAXATION * variation.push(y) + (1 - OVER_RELAXATION) * u,
            left + OVER_RELAXATION * y + (1 - OVER_RELAXATION) * copies,
        )
        u, copies = variation.shrink(missed), torch.cat([left[:1].clamp(0, 1), known + free(left[1:] - known)])
        missed, left = missed - u, left - copies
    return x + unit * free((copies[1:] - known).to(x))[0]


def smoothest_root(
    f: Apply,
    start: Tensor,
    shape: PictureShape,
    box: Range = (0.0, 1.0),
    *,
    steps: int = 20,
    tick: Tick = lambda share: True,
) -> Tensor:
    """The least rough of the pictures near a start that satisfy equations which are not linear.

    A local minimum [d] of V over f(x) = 0 in the box, from `start` [d]; f: x [d] -> [e] has derivatives by torch.

    A step is the smoothest x' with J x' = J x - f(x), halved while |f| grows above a falling level; equations of singular
    values below a floor that falls with |f| wait, or they would fit the error of linearising. Gauss-Newton steps of least
    norm end it: equations go before the box. Source: Nocedal and Wright, Numerical Optimization, 2006, ch. 18.
    Raises ValueError: as `smoothest`, or f is not finite at the start.

    >>> def f(x):
    ...     return (x.square().sum() - 4).reshape(1)
    >>> start = torch.full((16,), 0.6, dtype=torch.float64)
    >>> smoothest_root(f, start, (1, 4, 4), steps=4)[:2].round(decimals=4)
    tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    x, floor, size = start, SINGULAR_FLOORS[0], float(f(start).norm())
    grey = max(size, float(f(torch.full_like(start, sum(box) / 2)).norm()), 1e-300)
    if not math.isfinite(size):
        raise ValueError("f is not finite at the start; begin from another picture.")
    for i in range(steps):
        if not tick(i / steps):
            break
        step, free = _least(f, x, floor)
        move, share = smoothest(x + step, free, shape, box, rounds=80) - x, 1.0
        most = max(size, grey * max(LEAST_LEVEL, 3.0**-i))
        while not (left := float(f(x + share * move).norm())) <= most and share > SHORTEST_SHARE:
            share /= 2
        if not math.isfinite(left):
            break
        x, size = x + share * move, left
        if size <= LEAST_LEVEL * grey and float(move.abs().max()) < LAST_STEP * (box[1] - box[0]):
            break
        floor = max(SINGULAR_FLOORS[1], min(floor / 3, 0.3 * size / grey)) if share == 1 else floor
    return _root(f, x)


def _root(f: Apply, x: Tensor) -> Tensor:
    """x [d] moved by Gauss-Newton steps of least norm as long as each halves |f|."""
    ending = damped_gauss_newton(
        lambda x, which: f(x[0]).detach()[None],
        lambda x, r, which: lambda damping, rows: iter([_least(f, x[0], SINGULAR_FLOORS[1])[0][None]]),
        x[None],
        damping=Damping(first=1.0, rise=1.0, fall=1.0),
        stop=Stop(steps=ENDING_STEPS, tries=1, gain=0.5),
        cost_of=lambda r: r.norm(dim=1),
    )
    return end_of(ending).x[0]


def _least(f: Apply, x: Tensor, floor: float) -> tuple[Tensor, Apply]:
    """-J^+ r at x [d], and the projector onto the null space of J; singular values below floor x the largest count as 0."""
    J, r = jacrev(f, chunk_size=EQUATIONS_AT_ONCE)(x).detach(), f(x).detach()
    wide = len(J) < len(x)
    values, vectors = torch.linalg.eigh(J @ J.T if wide else J.T @ J)
    kept = (values > floor**2 * values[-1:]) & (values > 0)
    V = J.T @ vectors[:, kept] / values[kept].sqrt() if wide else vectors[:, kept]
    rows = {x.dtype: torch.linalg.qr(V).Q.T}  # [rank, d]

    def free(v: Tensor) -> Tensor:
        Q = rows.setdefault(v.dtype, rows[x.dtype].to(v.dtype))
        part: Tensor = v - (v @ Q.T) @ Q
        return part

    return -V @ ((V.T @ (J.T @ r)) / values[kept]), free


def _lengths(u: Tensor) -> Tensor:
    """|second| and |first| differences [2, c, h, w] of u [5, c, h, w]."""
    return torch.stack([u[:3].norm(dim=0), u[3:].norm(dim=0)])


def cosines(n: int) -> Tensor:
    """The cosine transform, which tells slow waves from fast ones.

    The orthonormal cosine transform [n, n]; for n = 3 light, red - blue and red - 2 green + blue.

    >>> (cosines(4) @ cosines(4).T).round(decimals=6).diagonal()
    tensor([1., 1., 1., 1.], dtype=torch.float64)
    """
    k = torch.arange(n, dtype=torch.float64)
    rows = torch.cos(math.pi * k[:, None] * (k + 0.5) / n) * (2 / n) ** 0.5
    return torch.cat([rows[:1] / 2**0.5, rows[1:]])
