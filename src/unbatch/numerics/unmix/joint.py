"""Joint refinement: all examples of a mixture at once, by Gauss-Newton steps without matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from unbatch.numerics.unmix.linearisation import Linearisation
from unbatch.numerics.unmix.mixture import Mixture

EXPLAINED = 1e-5  # of the power that noise can have: what is left then moves nothing


def refine(
    mixture: Mixture,
    z: Tensor,
    y: Tensor,
    *,
    others: int = 0,
    steps: int = 8,
    inner: int = 200,
    tolerance: float = 1e-3,
) -> tuple[Tensor, Tensor, float]:
    """Minimise |U S - sum_i F(z_i, y_i) z_i^T|^2 from z [g, n]: z, y (moved where real) and |.| / |U S|.

    This is least squares on every entry of the gradient: under equal independent noise it is the likelihood's maximum.
    With `others` the remainder may be any matrix of that rank, of examples not found yet: what counts is its tail.
    Levenberg-Marquardt, its steps by conjugate gradients.
    """
    at, damping = _Tail(mixture, z, y, others), 1e-6
    for _ in range(steps):
        tried = _Tail(mixture, *at.moved(at.solve(at.tail, damping=damping, inner=inner, tolerance=tolerance)), others)
        if not tried.cost < at.cost:
            damping *= 100
            if damping > 1:
                break
            continue
        gain = 1 - tried.cost / at.cost
        at, damping = tried, max(damping / 100, 1e-12)
        if gain < 0.01 or at.cost < EXPLAINED * mixture.n * mixture.noise**2:
            break
    return at.z, at.y, (at.cost / float(mixture.S.square().sum())) ** 0.5


class _Tail(Linearisation):
    """The linearisation seen beside the leading singular spaces, of dimension `others`, of what is left."""

    def __init__(self, mixture: Mixture, z: Tensor, y: Tensor, others: int) -> None:
        super().__init__(mixture, z, y)
        self.tail = self.left()  # [m, n]
        self.U, self.V = self.tail[:, :0], self.tail[:0]
        if others:
            U, S, Vh = torch.linalg.svd(self.tail, full_matrices=False)
            self.tail = (U[:, others:] * S[others:]) @ Vh[others:]
            self.U, self.V = U[:, :others], Vh[:others]
        self.cost = float(self.tail.square().sum())

    def push(self, v: Tensor) -> Tensor:
        E = super().push(v)
        E = E - self.U @ (self.U.T @ E)
        return E - (E @ self.V.T) @ self.V
