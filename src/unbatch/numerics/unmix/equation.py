"""Equation: what each example of a mixture obeys by itself, labels and targets that fit it, its solution, its acceptance.

U S q = F(z, y): some combination q of the gradient's columns is the example's own delta.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unbatch.numerics.search.small_problems import minimise_each
from unbatch.numerics.unmix.mixture import Mixture, label_misfits, misfits

MANY_CLASSES = 64  # classes above which every scale under every label takes too long
NOISE_SLACK = 30.0  # times the noise up to which what is left counts as noise
JACOBIAN_ENTRIES = 2**25  # of a Jacobian held at once: 256 MiB


class Equation:
    """The equation that each example obeys by itself, its residuals and their derivatives.

    Residuals ((I - U U^T) F / |F|, q . z - 1) of candidates z [g, n], and their derivative; q is eliminated.

    The first part cannot be made small by making F small, the second fixes the scale. Unknowns are steps along the rows
    `free` from z: those of z . ones = 1 in the span of the orthonormal rows `within` [r, n], or of each candidate's own
    [g, r, n]; real targets y are unknowns too.
    Where it is not known how much an example counts, the second part says nothing of z and is left out (zero).

    >>> from unbatch.numerics.unmix.made import made_mixture
    >>> mixture, z, y = made_mixture(4)
    >>> equation = Equation(mixture, z, y)
    >>> bool(equation.residual(equation.start(), torch.arange(4)).abs().max() < 1e-10)
    True
    """

    def __init__(self, mixture: Mixture, z: Tensor, y: Tensor, within: Tensor | None = None) -> None:
        self.mixture, self.z, self.y, self.real = mixture, z, y, mixture.classes == 0
        free = torch.eye(mixture.n).to(z) if within is None else within
        if mixture.ones is not None:
            free = complement((free @ mixture.ones)[..., None, :], free.shape[-2]) @ free
        self.free, self.directions, self.steps = free, free @ mixture.W, free.shape[-2]
        self.unknowns = self.steps + (y.shape[1] if self.real else 0)
        if self.real:  # a unit of a target moves F by about the share that a unit of z does
            F = mixture.F(z, y)
            rates = torch.stack([(mixture.F(z, y + e) - F).norm(dim=1) for e in torch.eye(y.shape[1]).to(z)], 1)
            size = z.norm(dim=1, keepdim=True) + 1e-300
            self.units = F.norm(dim=1, keepdim=True) / (rates * size + 1e-300)  # [g, k]

    def start(self) -> Tensor:
        """Where the search begins, [g, unknowns]."""
        step = self.z.new_zeros(len(self.z), self.steps)
        return torch.cat([step, torch.zeros_like(self.y)], 1) if self.real else step

    def at(self, x: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        """z and y of candidates `which` at the unknowns x."""
        r = self.steps
        y, z = self.y[which], self.z[which] + _along(self._own(self.free, which).mT, x[:, :r])
        return z, y + x[:, r:] * self.units[which] if self.real else y

    def residual(self, x: Tensor, which: Tensor) -> Tensor:
        """The residuals [q, m + 1] of candidates `which` [q] at the unknowns x [q, unknowns]."""
        z, y = self.at(x, which)
        F = self.mixture.F(z, y)
        return self._residual(F, F @ self.mixture.U, z)

    def _residual(self, F: Tensor, c: Tensor, z: Tensor) -> Tensor:
        out = (F - c @ self.mixture.U.T) / (F.norm(dim=1, keepdim=True) + 1e-300)
        excess = (c / self.mixture.S * z).sum(1) - 1
        return torch.cat([out, (excess if self.mixture.weighed else 0 * excess)[:, None]], 1)

    def linearise(self, x: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        """The residual [q, m + 1] and its derivative [q, unknowns, m + 1]."""
        F, r, H, cH, scale = self._bent(x, which)
        size = F.norm(dim=1, keepdim=True) + 1e-300  # [q, 1]
        along = H @ (F / size)[:, :, None]  # [q, p, 1] d|F|
        J = (H - cH @ self.mixture.U.T - along * r[:, None, :-1]) / size[:, :, None]
        return r, torch.cat([J, scale[:, :, None]], 2)

    def normal(self, x: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        """J J^T [q, unknowns, unknowns] and J r of what `linearise` gives, in half its time: J itself is not formed."""
        F, r, H, cH, scale = self._bent(x, which)
        size = F.norm(dim=1, keepdim=True) + 1e-300
        outer, last = r[:, :-1], r[:, -1:]
        along, to_r = (H @ torch.stack([F / size, outer], 2)).unbind(
            2
        )  # [q, p] each; r = P F / |F|, so P H . r = H . r
        square = outer.square().sum(1, keepdim=True)
        cross = (to_r - along * square / 2)[:, :, None] * along[:, None]
        gram = (H @ H.mT - cH @ cH.mT - cross - cross.mT) / size[:, :, None].square()
        return gram + scale[:, :, None] * scale[:, None], (to_r - along * square) / size + scale * last

    def pull(self, x: Tensor, which: Tensor, u: Tensor) -> Tensor:
        """J^T u [q, unknowns] of u [q, m + 1], by one pass backwards."""
        mixture = self.mixture
        z, y = self.at(x, which)
        before = mixture.before(z).detach().requires_grad_()
        graph = mixture.deltas(before, y)
        F, (outer, last) = graph.detach(), (u[:, :-1], u[:, -1:] * self.mixture.weighed)
        size = F.norm(dim=1, keepdim=True) + 1e-300
        outside = F / size - (F / size) @ mixture.U @ mixture.U.T
        back = outer - outer @ mixture.U @ mixture.U.T - (outside * outer).sum(1, keepdim=True) * F / size
        back = back / size + last * (z / mixture.S) @ mixture.U.T  # u in terms of dF
        out = _along(self._own(self.directions, which), torch.autograd.grad(graph, before, back)[0])
        out += last * _along(self._own(self.free, which), mixture.dual(F))
        if not self.real:
            return out
        rates = torch.stack([mixture.F(z, y + e * self.units[which]) - F for e in torch.eye(y.shape[1]).to(F)], 1)
        return torch.cat([out, (rates @ back[:, :, None])[..., 0]], 1)

    def _bent(self, x: Tensor, which: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """F, the residual, and the derivatives of F [q, unknowns, m], of c = F U, and of q . z."""
        mixture = self.mixture
        z, y = self.at(x, which)
        before = mixture.before(z).detach().requires_grad_()
        graph = mixture.deltas(before, y)
        F, r = graph.detach(), self.steps
        H = F.new_empty(len(F), self.unknowns, F.shape[1])
        # delta is a gradient, so its derivative is symmetric: reverse mode gives the product with a direction
        for i, w in enumerate(self._own(self.directions, which).unbind(-2)):
            H[:, i] = torch.autograd.grad(graph, before, w.expand_as(F), retain_graph=True)[0]
        if self.real:
            for i, e in enumerate(torch.eye(y.shape[1]).to(F)):
                H[:, r + i] = mixture.F(z, y + e * self.units[which]) - F
        c, cH = F @ mixture.U, H @ mixture.U
        scale = (cH @ (z / mixture.S)[:, :, None])[..., 0]
        scale[:, :r] += _along(self._own(self.free, which), c / mixture.S)
        scale *= mixture.weighed
        return F, self._residual(F, c, z), H, cH, scale

    @staticmethod
    def _own(rows: Tensor, which: Tensor) -> Tensor:
        """The rows [r, .] that candidates `which` share, or those of each [q, r, .]."""
        return rows if rows.dim() == 2 else rows[which]

    def chunk(self) -> int:
        """Candidates that are linearised at a time."""
        return max(1, JACOBIAN_ENTRIES // (max(self.unknowns, 1) * (self.mixture.U.shape[0] + 1)))


def _along(rows: Tensor, v: Tensor) -> Tensor:
    """Products [q, r] of v [q, n] with rows [r, n] that all share, or [q, r, n] of its own."""
    return v @ rows.T if rows.dim() == 2 else (rows @ v[:, :, None])[..., 0]


def choose_labels(mixture: Mixture, z: Tensor, classes: Tensor) -> Tensor:
    """The label that fits each candidate best.

    The class [g] whose delta lies nearest to the span of the gradient's columns.

    Two classes have parallel deltas of opposite signs, so where two fit alike that with q . z > 0 is chosen.

    >>> from unbatch.numerics.unmix.made import made_mixture
    >>> mixture, z, y = made_mixture(4)
    >>> bool((choose_labels(mixture, z, torch.arange(4)) == y).all())
    True
    """
    outside = label_misfits(mixture, z, classes)
    if len(classes) < 2 or not len(z):
        return classes[outside.argmin(1)]
    least, best = outside.topk(2, largest=False)  # [g, 2]
    first, second = classes[best[:, 0]], classes[best[:, 1]]
    alike = least[:, 1] <= 1.01 * least[:, 0] + 1e-6
    apart = (mixture.dual(mixture.F(z, first)) * z).sum(1) < 0
    return torch.where(alike & apart & ((mixture.dual(mixture.F(z, second)) * z).sum(1) > 0), second, first)


def choose_targets(mixture: Mixture, z: Tensor) -> Tensor:
    """The regression target that fits each candidate best.

    Real targets [g, k] that fit z [g, n] best: F is affine in y, so a linear least-squares problem with q . z = 1.

    >>> from unbatch.numerics.unmix.made import made_mixture
    >>> from dataclasses import replace
    >>> mixture, z, _ = made_mixture(4)
    >>> deltas = lambda before, y: (1 - before.tanh() ** 2) * (y @ torch.ones(2, before.shape[1]).double())
    >>> choose_targets(replace(mixture, deltas=deltas, classes=0, targets=2), z).shape
    torch.Size([4, 2])
    """
    k = mixture.targets
    zero = z.new_zeros(len(z), k)
    F0 = mixture.F(z, zero)
    columns = torch.stack([mixture.F(z, zero + e) - F0 for e in torch.eye(k).to(z)], 2)  # [g, m, k]
    U, size = mixture.U, columns.square().sum((1, 2)).sqrt() + 1e-300

    def equations(F: Tensor) -> Tensor:  # [g, m, c] -> [g, m + 1, c]
        inside = U.T @ F
        scale = ((inside / mixture.S[:, None]) * z[:, :, None]).sum(1, keepdim=True)
        return torch.cat([(F - U @ inside) / size[:, None, None], scale], 1)

    right = -equations(F0[:, :, None])
    right[:, -1] += 1
    y: Tensor = torch.linalg.lstsq(equations(columns), right).solution[..., 0]
    return y


def placed(mixture: Mixture, z: Tensor, classes: Tensor, *, finer: int = 1, within: Tensor | None = None) -> Tensor:
    """Directions given the size and the sign that fit best.

    Directions z [g, n] on the scale and with the sign that fit the equation best; in the span of the rows `within`.

    z . ones = 1 alone is a poor ruler for rough directions, since ones is short where inputs have no mean: z may move along
    ones as well. Factors of 2^(j / 2) about the inputs' size |dL/dW| / |dL/db| are tried; without a bias, where the loss
    alone tells the scale, 2^(j / finer) about preactivations of size 1.

    >>> from unbatch.numerics.unmix.made import made_mixture
    >>> mixture, z, y = made_mixture(4)
    >>> again = placed(mixture, -3 * z, torch.arange(4))
    >>> torch.allclose(again, z)
    True
    """
    if not len(z) or (mixture.ones is not None and len(classes) > MANY_CLASSES):
        return mixture.scaled(z)
    tries: list[Tensor] = []
    if mixture.ones is None:
        z = z / (z @ mixture.W).square().mean(1, keepdim=True).sqrt()
        tries += [sign * 2 ** (j / finer) * z for sign in (1.0, -1.0) for j in range(-6 * finer, 4 * finer + 1)]
    else:
        ones = mixture.ones if within is None else mixture.ones @ within.T @ within
        along = ones / (ones @ mixture.ones)
        size = mixture.S.norm() / ((mixture.U * mixture.S) @ mixture.ones).norm()
        tries.append(mixture.scaled(z))
        for sign in (1.0, -1.0):
            for j in range(-4, 5):
                tried = sign * 2 ** (j / 2) * size * torch.nn.functional.normalize(z, dim=1)
                tries.append(tried + (1 - tried @ mixture.ones)[:, None] * along)
    best, least = tries[0], torch.full((len(z),), torch.inf).to(z)
    for tried in tries:
        y = choose_labels(mixture, tried, classes) if mixture.classes else choose_targets(mixture, tried)
        outside, excess, _ = misfits(mixture, tried, y)
        cost = outside.square() + (excess / (1 + excess.abs())).square()
        best = torch.where((cost < least)[:, None], tried, best)
        least = torch.minimum(cost, least)
    return best


def polish(
    mixture: Mixture,
    z: Tensor,
    y: Tensor,
    *,
    steps: int = 15,
    damping: float = 1e-2,
    target: float = 1e-28,
    gain: float = 0.02,
    within: Tensor | None = None,
    geodesic: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Candidates improved, each by its own equation.

    Levenberg-Marquardt on the equation of every candidate, along the geodesic: z [g, n], y, and the costs [g].

    >>> from unbatch.numerics.unmix.made import made_mixture
    >>> mixture, z, y = made_mixture(4)
    >>> rng = torch.Generator().manual_seed(0)
    >>> near = mixture.scaled(z + 0.01 * torch.randn(4, 4, generator=rng, dtype=torch.float64))
    >>> found, labels, costs = polish(mixture, near, y)
    >>> torch.allclose(found, z)
    True
    """
    equation = Equation(mixture, z, y, within)
    x, costs = minimise_each(
        equation.residual,
        equation.normal,
        equation.start(),
        pull=equation.pull if geodesic else None,
        steps=steps,
        damping=damping,
        target=target,
        gain=gain,
        chunk=equation.chunk(),
    )
    return *equation.at(x, torch.arange(len(z), device=z.device)), costs


def accept(mixture: Mixture, z: Tensor, y: Tensor) -> Tensor:
    """Which candidates are examples.

    Numbers [f] of the candidates that are examples of this mixture, best first, no example twice.

    Accepted are those whose subtraction lowers the rank of A by one to within NOISE_SLACK times its noise, with |out| and
    |q . z - 1| small in themselves, so that noise cannot hide a phantom; two with q_i . z_j away from 0 are one.

    >>> from unbatch.numerics.unmix.made import made_mixture
    >>> mixture, z, y = made_mixture(4)
    >>> accept(mixture, torch.cat([z, mixture.scaled(z + 1)]), torch.cat([y, y])).sort().values
    tensor([0, 1, 2, 3])
    """
    outside, excess, drop = misfits(mixture, z, y)
    good = (outside < 0.05) & (excess.abs() < 0.05) & (drop < NOISE_SLACK) & z.isfinite().all(1)
    order = drop.argsort()
    q = mixture.dual(mixture.sent(z, y))
    cross = (q @ z.T).abs()
    kept: list[int] = []
    for i in order[good[order]].tolist():
        if all(float(cross[i, j]) < 0.1 and float(cross[j, i]) < 0.1 for j in kept):
            kept.append(i)
    return torch.tensor(kept, dtype=torch.long, device=z.device)


def explained(mixture: Mixture, z: Tensor, y: Tensor) -> bool:
    """Whether the examples found leave nothing of the gradient but noise.

    Whether all n examples together leave of A what noise leaves: |A - F^T Z| is within NOISE_SLACK times the noise's.

    >>> from unbatch.numerics.unmix.made import made_mixture
    >>> mixture, z, y = made_mixture(4)
    >>> explained(mixture, z, y), explained(mixture, z[:3], y[:3])
    (True, False)
    """
    F = mixture.sent(z, y)
    left = float((mixture.U * mixture.S - F.T @ z).norm())
    rounding = mixture.rounding * float((F.norm(dim=1) * z.norm(dim=1)).square().sum().sqrt())
    return len(z) == mixture.n and left < NOISE_SLACK * (mixture.noise * mixture.n**0.5 + rounding)


def complement(Q: Tensor, n: int) -> Tensor:
    """The directions orthogonal to given ones.

    Orthonormal rows [..., n - f, n] orthogonal to those of Q [..., f, n].

    >>> complement(torch.tensor([[1.0, 0.0, 0.0]]), 3).shape
    torch.Size([2, 3])
    """
    if not Q.shape[-2]:
        return torch.eye(n).to(Q)
    rest: Tensor = torch.linalg.svd(Q, full_matrices=True)[2][..., Q.shape[-2] :, :]
    return rest
