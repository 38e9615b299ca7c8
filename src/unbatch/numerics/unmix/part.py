"""Part: some examples of a piecewise linear network's batch, told without the others.

Where the network is linear between kinks, an example's own equation U S q = F(z, y) fixes its residual and hardly z, since
F moves with z through the k outputs alone. All n dual vectors together give Z = Q^-1. f of them leave each of the f
examples r = n - f unknowns: z_i = (q_i^+ + N^T t) / s, N the null space of the dual vectors, s their scale. What is left to
tell t are the example's outputs: F_i = J_i^T a_i, J_i the outputs' derivative, says the residual a_i, up to a factor and
k - 1 numbers of a softmax. With z . ones = 1 these tell r <= k - 1 unknowns. But with r = k - 1 nothing is left that must
agree: an update of another loss, or at another scale, has a solution as well, and that is no example. So what is claimed
is determined without the size of its delta, r <= k - 2, and its size has to agree. (Without a bias one fewer, since
nothing else tells the scale.)

To first order: with dF_i = beta_i F_i + B_i b_i, B_i a basis of what else F_i moves along, orthogonal to F_i,

    b_i = (P B_i)^+ (P w_i),                      P = I - U U^T: deltas stay in the range of the gradient;
    dz_i . q_j = k_ij - [i = j] beta_i - z_i . A^+ B_j b_j,     A^+ = S^-1 U^T: dual vectors isolate what was found;
    H_i W^T dz_i = beta_i F_i + B_i b_i,          deltas move as the network says,

with H_i the loss's second derivative; w and k are an error of the gradient, A^+ w_j . z_i = k_ij and w_j = E q_j + e_j, or
what the equations leave, with the sign changed. The first gives all b, and the others are r + 1 unknowns an example.

Source: this library.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unbatch.numerics.unmix.equation import complement
from unbatch.numerics.unmix.mixture import Mixture

NO_DIRECTION = 1e-9  # of the largest singular value of an example's own derivative, below which it does not move along
OPEN_SHARE = 1e-9  # least over largest singular value of an example's last equations, below which it is not determined


def left_open(Q: Tensor) -> Tensor:
    """The directions that an example may have, once other dual vectors are known.

    Orthonormal rows [f, n - f + 1, n] for each of f dual vectors [f, n]: what is orthogonal to all the others.

    >>> own = left_open(torch.eye(4)[:2])
    >>> own.shape, own[0].abs().sum(0)
    (torch.Size([2, 3, 4]), tensor([1., 0., 1., 1.]))
    """
    along = torch.nn.functional.normalize(torch.linalg.pinv(Q, rtol=1e-13).T, dim=1)
    return torch.cat([along[:, None], complement(Q, Q.shape[1]).expand(len(Q), -1, -1)], 1)


class KnownPart:
    """The first-order equations of examples z [f, n] with labels y [f], whatever the n - f missing ones are.

    `determined` [f]: those that these equations fix whatever factor of its own each delta was sent with.

    >>> from unbatch.numerics.unmix.made import made_mixture
    >>> mixture, z, y = made_mixture(6, torch.relu)
    >>> part = KnownPart(mixture, z[:4] + 1e-6 * (z[2:] - z[:4]), y[:4])  # of four classes, two missing
    >>> part.determined.tolist(), bool((z[:4] - part.z - part.newton()).norm() < 1e-10)
    ([True, True, True, True], True)
    >>> KnownPart(mixture, z[:3], y[:3]).determined.tolist()
    [False, False, False]
    """

    def __init__(self, mixture: Mixture, z: Tensor, y: Tensor) -> None:
        self.mixture, self.z = mixture, z
        U, f = mixture.U, len(z)
        before = mixture.before(z).detach().requires_grad_()
        graph = mixture.deltas(before, y)
        self.F: Tensor = graph.detach()

        def bent(v: Tensor) -> Tensor:  # H_i v_i [f, p, m] of v [f or 1, p, m]
            rows = [torch.autograd.grad(graph, before, w.expand_as(before), retain_graph=True)[0] for w in v.unbind(1)]
            return torch.stack(rows, 1)

        turn = torch.randn(mixture.targets + 1, mixture.n, generator=torch.Generator().manual_seed(0), dtype=z.dtype)
        moved = bent((turn.to(z) @ mixture.W)[None])  # [f, k + 1, m]; the last is a test
        size = self.F.norm(dim=1, keepdim=True) + 1e-300
        unit = self.F / size
        across = moved[:, :-1] - (moved[:, :-1] @ unit[:, :, None]) * unit[:, None]
        _, S, B = torch.linalg.svd(across, full_matrices=False)
        live = S > NO_DIRECTION * moved.flatten(1).norm(dim=1, keepdim=True)
        self.B = (B * live[:, :, None]).mT  # [f, m, k], columns of zeros where there is no direction
        basis = torch.cat([unit[:, None], self.B.mT], 1)  # [f, 1 + k, m]
        left = moved[:, -1] - ((basis @ moved[:, -1, :, None]).mT @ basis)[:, 0]
        told = left.norm(dim=1) <= 1e-6 * moved[:, -1].norm(dim=1)  # else F moves along more than the outputs
        outside = self.B - U @ (U.T @ self.B)
        self.inward = torch.linalg.pinv(outside, rtol=NO_DIRECTION)  # [f, k, m]
        self.q = mixture.dual(self.F)
        self.apart = torch.linalg.pinv(self.q, rtol=1e-13).T  # [f, n] q_i^+
        self.moves = bent(basis) @ mixture.W.T  # [f, 1 + k, n]
        steps = torch.cat([-self.apart[:, None], complement(self.q, mixture.n).expand(f, -1, -1)], 1)  # beta, t
        last = self.moves @ steps.mT  # [f, 1 + k, 1 + r]
        last[:, 0, 0] -= size[:, 0]
        self.lift = z.new_zeros(f, steps.shape[1])  # of z . ones, that of the step that undoes it
        free = torch.eye(steps.shape[1]).to(z).expand(f, -1, -1)
        if mixture.ones is not None:
            rise = steps @ mixture.ones
            self.lift = rise / rise.square().sum(1, keepdim=True)
            free = complement(rise[:, None], steps.shape[1])
        self.steps, self.last, self.free = steps, last, free
        within = last @ free.mT  # [f, 1 + k, r or r + 1]
        values = torch.linalg.svdvals(within[:, 1:])
        enough = values.shape[1] == within.shape[2]
        open_ = (
            values[:, -1] <= OPEN_SHARE * values[:, 0] if enough and values.shape[1] else values.new_zeros(f) == enough
        )
        self.determined = told & ~open_ & mixture.weighed & (mixture.classes > 0)
        self.within, self.solved = within, torch.linalg.pinv(within)
        self.unsized = torch.cat([torch.zeros_like(self.solved[:, :, :1]), torch.linalg.pinv(within[:, 1:])], 2)

    def solve(self, outside: Tensor, excess: Tensor, *, sized: bool = True) -> tuple[Tensor, Tensor]:
        """dz [f, n] that makes up for `outside` [f, m] of the deltas outside the range and `excess` [f, f] of z_i . q_j.

        By all equations, or by those that hold whatever factor of its own each example's delta was sent with; and by how
        much [f] all of them then disagree.
        """
        b = self.inward @ outside[:, :, None]
        told = excess - self.z @ self.mixture.dual((self.B @ b)[..., 0]).T
        fixed = told @ self.apart
        right = torch.cat([torch.zeros_like(b[:, :1]), b], 1)[..., 0] - (self.moves @ fixed[:, :, None])[..., 0]
        start = self.lift if self.mixture.ones is None else -self.lift * (fixed @ self.mixture.ones)[:, None]
        right = right - (self.last @ start[:, :, None])[..., 0]
        move = (self.solved if sized else self.unsized) @ right[:, :, None]
        x = start + (self.free.mT @ move)[..., 0]
        dz: Tensor = fixed + (self.steps.mT @ x[:, :, None])[..., 0]
        return dz, (self.within @ move - right[:, :, None])[..., 0].norm(dim=1)

    def wrong(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """The outside and the excess of deltas that are wrong by w [f, m]."""
        return w - (w @ self.mixture.U) @ self.mixture.U.T, self.z @ self.mixture.dual(w).T

    def seen(self) -> tuple[Tensor, Tensor]:
        """The outside and the excess that the deltas have."""
        out = self.F - (self.F @ self.mixture.U) @ self.mixture.U.T
        return -out, torch.eye(len(self.z)).to(self.z) - self.z @ self.q.T

    def newton(self) -> Tensor:
        """The step [f, n] to where the equations hold."""
        return self.solve(*self.seen())[0]
