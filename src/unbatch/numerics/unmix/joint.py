"""Joint refinement: all examples of a mixture at once, by Gauss-Newton steps without matrices."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from unbatch.numerics.search.damped_gauss_newton import Damping, Steps, Stop, damped_gauss_newton, end_of
from unbatch.numerics.unmix.linearisation import Linearisation
from unbatch.numerics.unmix.mixture import Mixture

SETTLED_POWER = 1e-5  # of the power that noise can have: what is left then moves nothing


def refine_jointly(
    mixture: Mixture,
    z: Tensor,
    y: Tensor,
    *,
    others: int = 0,
    steps: int = 8,
    inner: int = 200,
    tolerance: float = 1e-3,
) -> tuple[Tensor, Tensor, float]:
    """All examples found, improved together on the whole gradient.

    Minimise |U S - sum_i F(z_i, y_i) z_i^T|^2 from z [g, n]: z, y (moved where real) and |.| / |U S|. Where it is not
    known how much each example counts, that is found as well.

    This is least squares on every entry of the gradient: under equal independent noise it is the likelihood's maximum.
    With `others` the remainder may be any matrix of that rank, of examples not found yet: what counts is its tail.
    `steps` linear solves at most, each by up to `inner` products to a relative residual of `tolerance`.

    >>> from unbatch.numerics.unmix.made import made_mixture
    >>> mixture, z, y = made_mixture(4)
    >>> rng = torch.Generator().manual_seed(0)
    >>> near = mixture.scaled(z + 0.01 * torch.randn(4, 4, generator=rng, dtype=torch.float64))
    >>> found, labels, left = refine_jointly(mixture, near, y)
    >>> torch.allclose(found, z), left < 1e-9
    (True, True)
    """
    problem = _Together(mixture, z, y, others, inner, tolerance)
    last = end_of(
        damped_gauss_newton(
            problem.residuals,
            problem,
            problem.start,
            damping=Damping(first=1e-6, rise=100.0, fall=100.0, least=1e-12, most=1.0),
            stop=Stop(
                steps=steps, solves=steps, target=SETTLED_POWER * mixture.n * mixture.noise**2, gain=0.01, once=True
            ),
        )
    )
    return *problem.apart(last.x), (float(last.cost) / float(mixture.S.square().sum())) ** 0.5


class _Together:
    """All examples as the unknowns [1, g, n + k] of one problem, and its linear solver.

    Beside z stand real targets, or, where it is not known how much each example counts, log |w|.
    """

    def __init__(self, mixture: Mixture, z: Tensor, y: Tensor, others: int, inner: int, tolerance: float) -> None:
        self.mixture, self.y, self.others, self.inner, self.tolerance = mixture, y, others, inner, tolerance
        self.latest = _Tail(mixture, z, y, others)
        self.sign = self.latest.counts.sign()
        beside = [y] if mixture.classes == 0 else [] if mixture.weighed else [self.latest.counts.abs().log()[:, None]]
        self.start = torch.cat([z, *beside], 1)[None]
        self.x = self.start

    def apart(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """z and y of the unknowns."""
        n = self.mixture.n
        return x[0, :, :n], x[0, :, n:] if self.mixture.classes == 0 else self.y

    def at(self, x: Tensor) -> _Tail:
        """The linearisation at x; the latest is kept, since the point that a step leads to is linearised next."""
        if x is not self.x:
            weights = None if self.mixture.weighed else self.sign * x[0, :, -1].exp()
            self.x, self.latest = x, _Tail(self.mixture, *self.apart(x), self.others, weights)
        return self.latest

    def residuals(self, x: Tensor, which: Tensor) -> Tensor:
        return self.at(x).tail[None]

    def __call__(self, x: Tensor, r: Tensor, which: Tensor) -> Steps:
        at = self.at(x)

        def steps(damping: Tensor, rows: Tensor) -> Iterator[Tensor]:
            yield at.solve(at.tail, damping=float(damping), inner=self.inner, tolerance=self.tolerance)[None]

        return steps


class _Tail(Linearisation):
    """The linearisation seen beside the leading singular spaces, of dimension `others`, of what is left."""

    def __init__(self, mixture: Mixture, z: Tensor, y: Tensor, others: int, weights: Tensor | None = None) -> None:
        super().__init__(mixture, z, y, weights)
        self.tail = self.left()  # [m, n]
        self.U, self.V = self.tail[:, :0], self.tail[:0]
        if others:
            U, S, Vh = torch.linalg.svd(self.tail, full_matrices=False)
            self.tail = (U[:, others:] * S[others:]) @ Vh[others:]
            self.U, self.V = U[:, :others], Vh[:others]

    def sides(self) -> tuple[Tensor, Tensor]:
        return self.U, self.V

    def push(self, v: Tensor) -> Tensor:
        E = super().push(v)
        E = E - self.U @ (self.U.T @ E)
        return E - (E @ self.V.T) @ self.V
