"""Linearisation: how a mixture's gradient moves when its examples do, and the move that explains a given difference.

J is the Jacobian of (z, y) -> sum_i F(z_i, y_i) z_i^T, known by its products alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from unbatch.numerics.search.least_squares import conjugate_gradients
from unbatch.numerics.unmix.mixture import Mixture

GRAM_DIRECTIONS = 4  # directions that a preconditioner is averaged over
OPEN_GRAM = 1e-12  # eigenvalue of J^T J below which a move shows in nothing; measured: 3e-18, else 1e-2 and more
OPEN_MOVE_SHARE = 1e-3  # of such a move
GRAM_UNKNOWNS = 1024  # up to which J^T J itself is the preconditioner: products stall where deltas are nearly dependent


class Linearisation:
    """How the gradient moves when the examples do, by products alone.

    J at examples z [g, n] with labels y; steps v [g, n + k] move z on z . ones = 1 and real targets y, if y is real.

    J v = dF^T z + F^T dz, dF_i = H_i (W^T dz_i) + (dF / dy) dy_i, H_i the Hessian of the loss in the preactivations: delta
    is a gradient, so H_i is symmetric and reverse mode gives its products. Where it is not known how much each example
    counts, F is w F with one more unknown an example, the relative change of its w.

    >>> from unbatch.numerics.unmix.made import made_mixture
    >>> mixture, z, y = made_mixture(4)
    >>> at = Linearisation(mixture, z, y)
    >>> at.push(torch.ones(4, 4).double()).shape, bool(at.left().abs().max() < 1e-10)
    (torch.Size([80, 4]), True)
    """

    def __init__(self, mixture: Mixture, z: Tensor, y: Tensor, weights: Tensor | None = None) -> None:
        self.mixture, self.z, self.y = mixture, z, y
        self.ones = None if mixture.ones is None else torch.nn.functional.normalize(mixture.ones, dim=0)
        self.before = mixture.before(z).detach().requires_grad_()
        graph = mixture.deltas(self.before, y)
        self.counts = mixture.weights(graph.detach(), z) if weights is None else weights  # [g] how much each counts
        self.graph = self.counts[:, None] * graph
        self.F: Tensor = self.graph.detach()
        self.columns = self.F.new_zeros(*self.F.shape, 0)  # dF / dy [g, m, k]
        if mixture.classes == 0:
            self.columns = torch.stack([mixture.F(z, y + e) - self.F for e in torch.eye(y.shape[1]).to(self.F)], 2)
        if not mixture.weighed:
            self.columns = torch.cat([self.columns, self.F[:, :, None]], 2)
        self.weight = self.F.square().sum(1, keepdim=True) + 1e-300  # [g, 1]

    def left(self) -> Tensor:
        """U S - sum_i F_i z_i^T [m, n]."""
        return self.mixture.U * self.mixture.S - self.F.T @ self.z

    def tangent(self, v: Tensor) -> Tensor:
        """v without what leaves z . ones = 1."""
        if self.ones is None:
            return v
        n = self.mixture.n
        along = (v[:, :n] @ self.ones)[:, None] * self.ones
        return torch.cat([v[:, :n] - along, v[:, n:]], 1)

    def bent(self, v: Tensor) -> Tensor:
        """H_i v_i [g, m]."""
        found: Tensor = torch.autograd.grad(self.graph, self.before, v, retain_graph=True)[0]
        return found

    def push(self, v: Tensor) -> Tensor:
        """J v [m, n]."""
        n = self.mixture.n
        dF = self.bent(v[:, :n] @ self.mixture.W) + (self.columns @ v[:, n:, None])[..., 0]
        return dF.T @ self.z + self.F.T @ v[:, :n]

    def pull(self, E: Tensor) -> Tensor:
        """J^T E [g, n + k]."""
        dF = self.z @ E.T  # [g, m]
        to_z = self.bent(dF) @ self.mixture.W.T + self.F @ E
        return torch.cat([to_z, (self.columns.mT @ dF[:, :, None])[..., 0]], 1)

    def solve(self, E: Tensor, *, damping: float, inner: int, tolerance: float) -> Tensor:
        """The step v of least |J v - E|^2 + damping |F_i|^2 |v_i|^2, by conjugate gradients.

        Preconditioned by J^T J where the unknowns are few, else by an average of it over directions.
        """
        few = self.z.numel() + self.columns.shape[2] * len(self.z) <= GRAM_UNKNOWNS
        condition = self._inverse(damping) if few else self._mean_inverse(damping)

        def normal(v: Tensor) -> Tensor:
            return self.tangent(self.pull(self.push(self.tangent(v)))) + damping * self.weight * v

        downhill = self.tangent(self.pull(E))
        move = torch.zeros_like(downhill)
        for latest in conjugate_gradients(normal, downhill, condition, inner, tolerance):
            move = latest
        return move

    def left_open(self) -> Tensor:
        """Which examples [g] take part in a move that changes nothing beyond rounding, where the unknowns are few.

        Near copies behind one pattern of a kinked network, with weights that are not known, move along their line.

        >>> from unbatch.numerics.unmix.made import made_mixture
        >>> Linearisation(*made_mixture(4)).left_open()
        tensor([False, False, False, False])
        """
        g, k = len(self.z), self.mixture.n + self.columns.shape[2]
        if g * k > GRAM_UNKNOWNS:
            return torch.zeros(g, dtype=torch.bool, device=self.z.device)
        G = self.gram().reshape(g * k, g * k)
        size = G.diagonal().clamp_min(1e-300).sqrt()
        values, moves = torch.linalg.eigh(G / size[:, None] / size)
        none: Tensor = moves[:, values < OPEN_GRAM * values[-1]].view(g, k, -1)
        return none.square().sum((1, 2)).sqrt() > OPEN_MOVE_SHARE

    def _mean_inverse(self, damping: float) -> Callable[[Tensor], Tensor]:
        """The inverse of G (x) I, G_ij = <J (e_i u^T), J (e_j u^T)> averaged over random unit u [n].

        Deltas of one class are almost parallel, and that is most of the ill-conditioning.
        """
        n, rng = self.mixture.n, torch.Generator().manual_seed(0)
        G = self.F @ self.F.T + torch.diag(damping * self.weight[:, 0])
        for _ in range(GRAM_DIRECTIONS):
            u = torch.nn.functional.normalize(torch.randn(n, generator=rng, dtype=torch.float64), dim=0).to(self.z)
            h = self.bent((u @ self.mixture.W).expand_as(self.F))
            cross = (h @ self.F.T) * (self.z @ u)[:, None]
            G = G + ((h @ h.T) * (self.z @ self.z.T) + cross + cross.T) / GRAM_DIRECTIONS
        G.diagonal().mul_(1 + 1e-12)
        root = torch.linalg.cholesky_ex(G)[0]

        def condition(v: Tensor) -> Tensor:
            return torch.cat([torch.cholesky_solve(v[:, :n], root), v[:, n:] / self.weight], 1)

        return condition

    def _inverse(self, damping: float) -> Callable[[Tensor], Tensor]:
        """The inverse of J^T J + damping itself, as far as rounding lets it be one."""
        G = self.gram()
        g, k = G.shape[:2]
        G = G.view(g * k, g * k)
        G.diagonal().add_((damping * self.weight).expand(g, k).flatten())
        G.diagonal().mul_(1 + 1e-13)
        size = G.diagonal().sqrt()
        root, failed = torch.linalg.cholesky_ex(G / size[:, None] / size)
        if bool(failed):
            return self._mean_inverse(damping)

        def condition(v: Tensor) -> Tensor:
            found: Tensor = torch.cholesky_solve((v.flatten() / size)[:, None], root)[:, 0] / size
            return self.tangent(found.view(v.shape))  # which rounding leaves

        return condition

    def sides(self) -> tuple[Tensor, Tensor]:
        """Projections of the gradient's rows [m, m] and columns [n, n] of which J v is what is left, as their factors."""
        return self.F.new_zeros(self.F.shape[1], 0), self.z.new_zeros(0, self.mixture.n)

    def gram(self) -> Tensor:
        """J^T J [g, n + k, g, n + k] in the time of one of its columns' n-th part, since J (e_i e_a^T) has rank two.

        On z . ones = 1, and the identity across it.

        >>> from unbatch.numerics.unmix.made import made_mixture
        >>> mixture, z, y = made_mixture(4)
        >>> at = Linearisation(mixture, z, y)
        >>> v = at.tangent(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)).double())
        >>> torch.allclose(torch.tensordot(at.gram(), v, 2), at.tangent(at.pull(at.push(v))))
        True
        """
        (g, n), (U, V) = self.z.shape, self.sides()
        bent = torch.stack([self.bent(w.expand_as(self.F)) for w in self.mixture.W], 1)  # [g, n, m]
        D, F = torch.cat([bent, self.columns.mT], 1), self.F
        D, F = D - (D @ U) @ U.T, F - (F @ U) @ U.T
        across = torch.eye(n).to(self.z) - V.T @ V
        z, k = self.z @ across, D.shape[1]
        flat = D.reshape(g * k, -1)
        G = (flat @ flat.T).view(g, k, g, k) * (z @ z.T)[:, None, :, None]
        cross = (flat @ F.T).view(g, k, g)[..., None] * z[:, None, None]  # <D_ia z_i^T, F_j e_b^T>
        G[..., :n] += cross
        G[:, :n] += cross.permute(2, 3, 0, 1)
        G[:, :n, :, :n] += (F @ F.T)[:, None, :, None] * across[None, :, None]
        if self.ones is not None:
            for _ in range(2):
                G[:, :n] -= self.ones[:, None, None] * torch.tensordot(G[:, :n], self.ones, ([1], [0]))[:, None]
                G = G.permute(2, 3, 0, 1)
            scale = self.weight[:, 0, None, None] * torch.outer(self.ones, self.ones)
            for i in range(g):
                G[i, :n, i, :n] += scale[i]
        return G.contiguous()
