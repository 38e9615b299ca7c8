"""Vectors that two dense layers saw one after the other, told apart from the sums that the layers' gradients are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from unbatch.numerics.search.damped_gauss_newton import Damping, Reached, Steps, Stop, damped_gauss_newton

STEPS, TRIES = 80, 8  # of one search
SOLVED = 1e-9  # what may lie outside the upper span of what follows a vector, relative, whatever the spans' errors
MOST_FAILED = 24  # searches in a row that find nothing new
MOST_OFF = 1e-3  # whatever they are
NEW = 1e-6  # of a vector's own size, by which it is to stand out of those found before


@dataclass(frozen=True, eq=False)
class Layer:
    """One dense layer of the two: its weight, its gradient, and the span of what it read, a 1 last where it has a bias.

    >>> Layer(torch.eye(2), torch.eye(2), torch.eye(2)[:1], torch.eye(2)[1:]).rows
    tensor([[1., 0.]])
    """

    weight: Tensor  # [m, d], or [m, d + 1] with its bias
    gradient: Tensor  # of the same shape
    rows: Tensor  # [r, d (+ 1)] orthonormal
    beyond: Tensor  # [d (+ 1) - r, d (+ 1)] orthonormal, the complement


class TwoSpans:
    """The r vectors h_j behind dL/dW = sum_j e_j (h_j, 1)^T and dL/dV = sum_j f_j (s(W (h_j, 1)), 1)^T.

    W [m, d + 1] is the lower layer with its bias, V [k, m] the upper one and s an elementwise function between them, so
    e_j = (V^T f_j) * s'(W (h_j, 1)). Both gradients have rank r. With h_j = alpha_j rows, those that are known leave, by
    a basis P of what is orthogonal to their alpha, the columns dL/dW rows^T P, whose span A holds the e_j of all others,
    and of no known one; and so does B of the upper gradient their f_j. One of the others is then a solution of

        A a = (V^T B b) * s'(W (alpha rows)),    |b| = 1,

    m equations for its r - 1 numbers alpha, a and b. For the last one A and B are one direction each, and s' is nearly
    linear: it is a linear system, but for its curvature. Each is found by damped Gauss-Newton from a random start, and
    then moved to where what follows it lies in the upper span, N (s(W (h, 1)), 1) = 0, which is the proof that it is one.

    >>> rng = torch.Generator().manual_seed(0)
    >>> H, W = torch.randn(3, 8, generator=rng).double(), torch.randn(40, 9, generator=rng).double() / 3
    >>> V, f, one = torch.randn(6, 40, generator=rng).double(), torch.randn(3, 6, generator=rng).double(), torch.ones(3, 1)
    >>> below = torch.cat([H, one.double()], 1)
    >>> after = torch.tanh(below @ W.T)
    >>> e = (f @ V) * (1 - after.square())
    >>> layers = []
    >>> for weight, gradient in ((W, e.T @ below), (V, f.T @ after)):
    ...     rows = torch.linalg.svd(gradient)[2]
    ...     layers.append(Layer(weight, gradient, rows[:3], rows[3:]))
    >>> problem = TwoSpans(*layers, torch.tanh)
    >>> *_, found = problem.searched(rng, size=8**0.5)
    >>> float(torch.cdist(problem.vectors(found), H).min(0).values.max()) < 1e-6
    True
    """

    def __init__(self, lower: Layer, upper: Layer, act: Callable[[Tensor], Tensor]) -> None:
        self.lower, self.upper, self.act = lower, upper, act
        m = len(lower.weight)
        last = lower.rows[:, -1]
        self.middle = last / last.square().sum()  # [r]
        self.ways = torch.linalg.svd(last[None], full_matrices=True)[2][1:]  # [r - 1, r]: alpha = middle + beta ways
        self.constant = lower.weight @ (self.middle @ lower.rows)  # [m]
        self.slopes = lower.weight @ (self.ways @ lower.rows).T  # [m, r - 1]
        self.left, self.right = upper.beyond[:, :m], upper.beyond[:, m:].sum(1)  # N
        self.sent = lower.gradient @ lower.rows.T, upper.gradient @ upper.rows.T  # [m, r], [k, r]
        self.steep = float(torch.linalg.matrix_norm(lower.weight, 2))

    def vectors(self, found: Tensor) -> Tensor:
        """The h [k, d] of alpha [k, r]."""
        return found @ self.lower.rows[:, :-1]

    def after(self, found: Tensor) -> Tensor:
        """What the upper layer reads of alpha [k, r], with its 1 where it has a bias."""
        made = self.act(self.constant + (found - self.middle) @ self.ways.T @ self.slopes.T)
        return torch.cat([made, torch.ones_like(made[:, :1])], 1)[:, : self.upper.rows.shape[1]]

    def searched(
        self, rng: torch.Generator, *, size: float, allowed: Callable[[Tensor], float] = lambda alpha: 0.0
    ) -> Iterator[Tensor]:
        """The alpha [k, r] that are found so far, after every step; ends when all r are, or many searches found none.

        `size` is the l2 norm of a typical h. `allowed` says of an alpha [r] how much of what follows it may lie outside the
        upper span, relative, by the errors of the two spans.
        """
        r, found, failed = len(self.lower.rows), self.middle.new_zeros(0, len(self.lower.rows)), 0
        while len(found) < r and failed < MOST_FAILED:
            beta = self.ways @ self.middle
            for at in self._search(found, rng, size):
                beta = at
                yield found
            alpha = self.middle + beta @ self.ways
            far = alpha - alpha @ torch.linalg.pinv(found) @ found if len(found) else alpha
            most = max(SOLVED, min(allowed(alpha), MOST_OFF))
            sure = self._off(beta) <= most and float(far.norm()) > max(NEW, most) * float(alpha.norm())
            failed = 0 if sure else failed + 1
            found = torch.cat([found, alpha[None]]) if sure else found
        yield found

    def moved(self, alpha: Tensor, over: float, under: float) -> float:
        """How far one h may be off, l2, to first order, where both spans are.

        `over` is how far what follows it lies outside the upper span, `under` how far (h, 1) lies outside the lower.
        """
        slope, _ = self._slopes_of_act(self.constant + self.slopes @ (self.ways @ (alpha - self.middle)))
        J = (self.left * slope) @ self.slopes
        least = float(torch.linalg.eigvalsh(J.T @ J)[0].clamp_min(1e-300).sqrt()) if J.numel() else torch.inf
        return under + (over + float(slope.abs().max()) * self.steep * under) / least

    def _off(self, beta: Tensor) -> float:
        """What lies outside the upper span, relative."""
        after = self.act(self.constant + self.slopes @ beta)
        return float((self.left @ after + self.right).norm() / after.norm())

    def _slopes_of_act(self, before: Tensor) -> tuple[Tensor, Tensor]:
        """s' and s'' of the elementwise function."""
        with torch.enable_grad():
            at = before.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.act(at).sum(), at, create_graph=True)
            bend = torch.zeros_like(before)
            if slope.requires_grad:
                bend = torch.autograd.grad(slope.sum(), at, allow_unused=True)[0]
        return slope.detach(), torch.zeros_like(before) if bend is None else bend

    def _search(self, found: Tensor, rng: torch.Generator, size: float) -> Iterator[Tensor]:
        """Ever better beta [r - 1] of one search, first by what is sent back and then by what follows."""
        back = _SentBack(self, found)
        beta = (found.mean(0) - self.middle) @ self.ways.T if len(found) else torch.zeros_like(self.slopes[0])
        way = torch.randn(len(beta), generator=rng, dtype=torch.float64).to(beta)
        share = float(torch.rand((), generator=rng, dtype=torch.float64))
        beta = beta + share * size / float((way @ self.ways @ self.lower.rows[:, :-1]).norm()) * way
        b = torch.randn(back.k, generator=rng, dtype=torch.float64).to(beta)
        stop = Stop(steps=STEPS, tries=TRIES, target=1e-24, gain=1e-4, patience=3)
        for at in _gauss_newton(back.residuals, back.jacobian, back.start(beta, b / b.norm()), stop):
            beta = at.x[0, : len(beta)]
            yield beta
        for at in _gauss_newton(self._residuals, self._jacobian, beta, Stop(steps=8, tries=2)):
            yield at.x[0]

    def _residuals(self, beta: Tensor) -> Tensor:
        return self.left @ self.act(self.constant + self.slopes @ beta) + self.right

    def _jacobian(self, beta: Tensor) -> Tensor:
        found: Tensor = (self.left * self._slopes_of_act(self.constant + self.slopes @ beta)[0]) @ self.slopes
        return found


class _SentBack:
    """A a = (V^T B b) * s'(W (alpha rows)) and |b| = 1 at y = (beta, a, b), for what some alpha [k, r] leave."""

    def __init__(self, problem: TwoSpans, found: Tensor) -> None:
        self.problem = problem
        of_lower, of_upper = problem.sent
        after = problem.after(found) @ problem.upper.rows.T
        self.A = torch.linalg.qr(of_lower @ _complement(found)).Q  # [m, k]
        B = torch.linalg.qr(of_upper @ _complement(after)).Q
        V = problem.upper.weight[:, : len(self.A)]
        VB = V.T @ B  # [m, k]
        self.k = VB.shape[1]
        self.VB = VB / VB.norm() * self.k**0.5
        self.r = len(problem.slopes[0])

    def start(self, beta: Tensor, b: Tensor) -> Tensor:
        slope, _ = self.problem._slopes_of_act(self.problem.constant + self.problem.slopes @ beta)
        return torch.cat([beta, self.A.T @ ((self.VB @ b) * slope), b])

    def residuals(self, y: Tensor) -> Tensor:
        beta, a, b = torch.split(y, [self.r, self.k, self.k])
        slope, _ = self.problem._slopes_of_act(self.problem.constant + self.problem.slopes @ beta)
        return torch.cat([self.A @ a - (self.VB @ b) * slope, (b @ b - 1)[None]])

    def jacobian(self, y: Tensor) -> Tensor:
        beta, _, b = torch.split(y, [self.r, self.k, self.k])
        slope, bend = self.problem._slopes_of_act(self.problem.constant + self.problem.slopes @ beta)
        of_beta = -((self.VB @ b) * bend)[:, None] * self.problem.slopes
        length = torch.cat([torch.zeros_like(y[: self.r + self.k]), 2 * b])
        return torch.cat([torch.cat([of_beta, self.A, -self.VB * slope[:, None]], 1), length[None]])


def _complement(rows: Tensor) -> Tensor:
    """An orthonormal basis [r, r - k] of what is orthogonal to rows [k, r]."""
    return (
        torch.linalg.svd(rows, full_matrices=True)[2][len(rows) :].T if len(rows) else torch.eye(rows.shape[1]).to(rows)
    )


def _gauss_newton(
    residuals: Callable[[Tensor], Tensor], jacobian: Callable[[Tensor], Tensor], start: Tensor, stop: Stop
) -> Iterator[Reached]:
    """Damped Gauss-Newton of one problem [d] with a Jacobian [e, d]."""

    def solver(x: Tensor, r: Tensor, which: Tensor) -> Steps:
        J = jacobian(x[0])
        gram, downhill = J.T @ J, J.T @ r[0]
        eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device) * gram.diagonal().mean()
        return lambda damping, rows: iter([-torch.linalg.solve(gram + float(damping[0]) * eye, downhill)[None]])

    rule = Damping(first=0.1, rise=4.0, fall=5.0, least=1e-13)
    return damped_gauss_newton(lambda x, which: residuals(x[0])[None], solver, start[None], damping=rule, stop=stop)
