"""Prior: what examples look like before anything is known of them, as a Gaussian that is cheap to draw and to invert."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from unbatch.numerics.search.smoothest import cosines

CONTRAST = 0.25  # standard deviation of an entry, of its range
COLOUR_SHARES = (0.9, 0.05, 0.05)  # shares of the variance: light, red - blue, red - 2 green + blue


class GaussianPrior:
    """Random examples to compare attacks with: for pictures smooth ones, as Gaussian as can be reckoned with.

    x = middle + R z, z standard normal [d]: for pictures [c, h, w] amplitudes fall as 1 / frequency and colours vary
    less than light; else entries are independent. `variances` [d] are the eigenvalues of R R^T, R^T R is diagonal.

    Source: Field, J. Opt. Soc. Am. A 4, 1987 (amplitudes of natural images).

    >>> prior = GaussianPrior((3, 8, 8))
    >>> prior.draw(2, torch.Generator().manual_seed(0)).shape
    torch.Size([2, 3, 8, 8])
    >>> round(float(prior.variances.mean()), 4)  # CONTRAST squared
    0.0625
    """

    def __init__(self, shape: tuple[int, ...], box: tuple[float, float] = (0.0, 1.0)) -> None:
        self.shape, self.d, self.unit = shape, math.prod(shape), box[1] - box[0]
        self.middle = sum(box) / 2
        self.variances = torch.full((self.d,), (CONTRAST * self.unit) ** 2, dtype=torch.float64)
        self.bases: tuple[Tensor, ...] = ()
        if len(shape) == 3:
            c, h, w = shape
            frequency = (torch.arange(h)[:, None] / h).square() + (torch.arange(w) / w).square()
            power = 1 / (frequency.double() + 1 / (h * w))
            power /= power.mean()
            colours = torch.tensor(COLOUR_SHARES if c == 3 else (1 / c,) * c, dtype=torch.float64) * c
            self.variances = self.variances * (colours[:, None] * power.flatten()).flatten()
            self.bases = cosines(c) if c == 3 else torch.eye(c).double(), cosines(h), cosines(w)

    def __str__(self) -> str:
        law = "amplitudes that fall as 1 / frequency" if self.bases else "independent entries"
        low, high = self.middle - self.unit / 2, self.middle + self.unit / 2
        return f"inputs of a Gaussian prior ({law}, range {low:g} to {high:g})"

    def push(self, z: Tensor) -> Tensor:
        """R z [..., d]."""
        scaled = z * self.variances.to(z).sqrt()
        if not self.bases:
            return scaled
        found = torch.einsum("...chw,co,hi,wj->...oij", scaled.view(*z.shape[:-1], *self.shape), *self._on(z))
        return found.reshape(z.shape)

    def pull(self, x: Tensor) -> Tensor:
        """R^T x [..., d]."""
        if self.bases:
            found = torch.einsum("...oij,co,hi,wj->...chw", x.view(*x.shape[:-1], *self.shape), *self._on(x))
            x = found.reshape(x.shape)
        return x * self.variances.to(x).sqrt()

    def draw(self, n: int, rng: torch.Generator) -> Tensor:
        """n examples [n, *shape]; entries may lie outside the box."""
        z = torch.randn(n, self.d, generator=rng, dtype=torch.float64)
        return self.middle + self.push(z).view(n, *self.shape)

    def _on(self, like: Tensor) -> tuple[Tensor, ...]:
        return tuple(basis.to(like) for basis in self.bases)
