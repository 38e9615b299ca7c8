"""Mixture: a dense layer's gradient in the coordinates of its own row space, and the equation that each example obeys.

With preactivations W x_i + b, the gradient of sum_i l(x_i, y_i) is A = [dL/dW, dL/db] = sum_i delta_i x~_i^T, delta_i =
dL/d(preactivation of i), x~ = (x, 1). Its singular value decomposition A = U S P leaves x~_i = P^T z_i with z_i [n]
unknown. If the z_i are independent there are dual vectors q_i, q_i . z_j = [i = j], and U S q_i = delta_i: each example
obeys U S q = F(z, y) by itself, F the model's own delta.

Where it is not known how much each example counts in the gradient, U S q = w F(z, y) with w as one more unknown of the
example: q . z = 1 then tells w = 1 / (F's own q . z), and what is left to solve for z is that F lies in the span of U.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Deltas = Callable[[Tensor, Tensor], Tensor]  # (preactivations [g, m], labels [g] or [g, k]) -> [g, m]


MOST_CLASSES = 128  # beyond which residuals have too many unknowns


@dataclass(frozen=True)
class Mixture:
    """A dense layer's gradient in few coordinates: the sum of one product for each example of the batch.

    U S = sum_i delta_i z_i^T. `deltas` is a gradient with respect to its first argument, example by example.

    >>> from unbatch.numerics.unmix.made import made_mixture
    >>> mixture, z, y = made_mixture(4)
    >>> mixture.n, mixture.before(z).shape, mixture.F(z, y).shape
    (4, torch.Size([4, 80]), torch.Size([4, 80]))
    >>> (mixture.dual(mixture.F(z, y)) @ z.T).round(decimals=6).diagonal()  # q_i . z_i = 1
    tensor([1., 1., 1., 1.], dtype=torch.float64)
    """

    U: Tensor  # [m, n] orthonormal columns
    S: Tensor  # [n] descending
    W: Tensor  # [n, m]: preactivations are z W + offset
    offset: Tensor | None  # [m]
    ones: Tensor | None  # [n]: z . ones = 1, where the bias sent its gradient
    deltas: Deltas
    classes: int  # 0: real targets; labels are 0 ... classes - 1
    targets: int  # entries of a real target, of which deltas are an affine function
    noise: float  # spectral norm of the error of A
    rounding: float  # relative error of a delta as the client computed it, which moves A within its span
    basis: Tensor  # [n, n0]: z basis are the coordinates in the whole mixture
    outside: float = 0.0  # what A has outside its row space, which is error alone (spectral norm); 0: as `noise`
    weighed: bool = True  # `deltas` have their true size; else how much each example counts is an unknown of its own

    @property
    def n(self) -> int:
        """How many examples are mixed."""
        return len(self.S)

    def before(self, z: Tensor) -> Tensor:
        """Preactivations [g, m] of z [g, n]."""
        return z @ self.W if self.offset is None else z @ self.W + self.offset

    def F(self, z: Tensor, y: Tensor) -> Tensor:  # noqa: N802
        """The deltas [g, m] of z [g, n] under the labels y."""
        return self.deltas(self.before(z), y).detach()

    def deltas_under(self, before: Tensor, label: int) -> Tensor:
        """The deltas [g, m] of preactivations [g, m], all of them of the class `label`."""
        y = torch.full((len(before),), label, dtype=torch.long, device=before.device)
        return self.deltas(before, y).detach()

    def dual(self, delta: Tensor) -> Tensor:
        """q [g, n] with U S q nearest to delta [g, m]."""
        return (delta @ self.U) / self.S

    def weights(self, F: Tensor, z: Tensor) -> Tensor:
        """How much examples z [g, n] with deltas F [g, m] count: w [g] such that w F has q . z = 1; 1 where known."""
        return torch.ones_like(F[:, 0]) if self.weighed else 1 / (self.dual(F) * z).sum(1)

    def sent(self, z: Tensor, y: Tensor) -> Tensor:
        """What the examples z [g, n] with labels y sent back [g, m]: their deltas, as much as they count."""
        F = self.F(z, y)
        return F if self.weighed else self.weights(F, z)[:, None] * F

    def unweighed(self, factor: float = 1.0) -> Mixture:
        """The same mixture where it is not known how much each example counts: about `factor` of what was assumed."""
        deltas = self.deltas
        return replace(self, weighed=False, deltas=lambda before, y: factor * deltas(before, y))

    def reweighed(self, factor: float) -> Mixture:
        """The same mixture where every example counts `factor` times as much as was assumed."""
        return replace(self.unweighed(factor), weighed=True)

    def evened(self) -> Mixture:
        """The same mixture with singular values the square roots of what they were, relative to the least.

        Preactivations in coordinates in which the deltas' largest directions are shorter: p T^-1 for p, T delta for delta
        with T = I - U (1 - (s_n / S)^(1/2)) U^T, a gradient as before. z, q and the solutions are the same ones. Where
        deltas are nearly parallel, as those of one class are, F lies near the span of U for every z: what tells examples
        apart is a larger share of T F.

        >>> from unbatch.numerics.unmix.made import made_mixture
        >>> mixture, z, y = made_mixture(4)
        >>> even = mixture.evened()
        >>> outside, excess, _ = misfits(even, z, y)
        >>> bool(outside.max() < 1e-10), bool(excess.abs().max() < 1e-10)
        (True, True)
        >>> bool(even.S[0] / even.S[-1] < (1 + 1e-10) * (mixture.S[0] / mixture.S[-1]) ** 0.5)
        True
        """
        shrink, deltas = (self.S[-1] / self.S).sqrt(), self.deltas

        def along(v: Tensor, factors: Tensor) -> Tensor:
            return v + (v @ self.U * (factors - 1)) @ self.U.T

        return replace(
            self,
            S=self.S * shrink,
            W=along(self.W, 1 / shrink),
            offset=None if self.offset is None else along(self.offset, 1 / shrink),
            deltas=lambda before, y: along(deltas(along(before, shrink), y), shrink),
        )

    def scaled(self, z: Tensor) -> Tensor:
        """z [g, n] on z . ones = 1."""
        return z if self.ones is None else z / (z @ self.ones)[:, None]

    def within(self, z: Tensor) -> Mixture:
        """The same mixture for examples that are combinations of the orthonormal rows z [r, n]: only z is reduced."""
        return replace(self, W=z @ self.W, ones=None if self.ones is None else z @ self.ones, basis=z @ self.basis)

    def without(self, delta: Tensor, z: Tensor) -> Mixture:
        """What is left after delta [f, m] and z [f, n] are subtracted: a mixture of n - f examples.

        Errors of what was subtracted show as further singular values and count as noise.
        """
        left = self.U * self.S - delta.T @ z  # [m, n]
        U, S, Vh = torch.linalg.svd(left, full_matrices=False)
        r = self.n - len(z)
        noise, outside = max(self.noise, float(S[r])), self.outside and max(self.outside, float(S[r]))
        return replace(self.within(Vh[:r]), U=U[:, :r], S=S[:r], noise=noise, outside=outside)

    def isolated(self, q: Tensor) -> Mixture:
        """What is left once the examples with dual vectors q [f, n] are projected out: deltas lose their part along theirs.

        The others are orthogonal to q, so nothing of them is lost in z; their deltas are no gradients any more.
        """
        if not len(q):
            return self
        found = torch.linalg.qr((q * self.S).T).Q.T  # [f, n]: the found deltas span U found^T
        basis: Tensor = torch.linalg.svd(q, full_matrices=True)[2][len(q) :]
        along, deltas = self.U @ found.T, self.deltas
        left = (self.U * self.S - along @ (found * self.S)) @ basis.T
        U, S, Vh = torch.linalg.svd(left, full_matrices=False)

        def projected(before: Tensor, y: Tensor) -> Tensor:
            F = deltas(before, y)
            outside: Tensor = F - (F @ along) @ along.T
            return outside

        return replace(self.within(Vh @ basis), U=U, S=S, deltas=projected)


def misfits(mixture: Mixture, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How badly candidates solve the equation of an example, in three measures.

    |F - U U^T F| / |F| [g], q . z - 1 [g], and how far A - F z~^T is from losing a rank [g], as a multiple of the noise.

    (A - F z^T) q = (1 - q . z) F - (F - U U^T F), so the least singular value of the difference is at most the last
    over |q|. A phantom (F near 0, or F not of this batch) fails one of the first two. The noise is that of A, and that of
    F over |q|. Where it is not known how much an example counts, F counts as much as makes q . z = 1.

    >>> from unbatch.numerics.unmix.made import made_mixture
    >>> mixture, z, y = made_mixture(4)
    >>> outside, excess, drop = misfits(mixture, z, y)
    >>> bool(outside.max() < 1e-10), bool(misfits(mixture, 1.1 * z, y)[0].min() > 1e-3)
    (True, True)
    """
    F = mixture.sent(z, y)
    q = mixture.dual(F)
    outside = F - (F @ mixture.U) @ mixture.U.T
    excess = (q * z).sum(1) - 1
    size = F.norm(dim=1) + 1e-300
    drop = (outside + excess[:, None] * F).norm(dim=1)
    return outside.norm(dim=1) / size, excess, drop / (mixture.noise * q.norm(dim=1) + mixture.rounding * size)


def label_misfits(mixture: Mixture, z: Tensor, classes: Tensor, *, chunk: int = 2**24) -> Tensor:
    """How badly candidates solve the equation under each class.

    |F - U U^T F| / |F| [g, k] of z [g, n] under each of the classes [k].

    >>> from unbatch.numerics.unmix.made import made_mixture
    >>> mixture, z, y = made_mixture(4)
    >>> bool((label_misfits(mixture, z, torch.arange(4)).argmin(1) == y).all())
    True
    """
    g, k, m = len(z), len(classes), mixture.U.shape[0]
    found = []
    for part in torch.split(z, max(1, chunk // (k * m))):
        F = mixture.F(part.repeat_interleave(k, 0), classes.repeat(len(part)))
        inside = (F @ mixture.U).square().sum(1)
        whole = F.square().sum(1) + 1e-300
        found.append((1 - inside / whole).clamp_min(0).sqrt().view(-1, k))
    return torch.cat(found) if found else z.new_zeros(g, k)
