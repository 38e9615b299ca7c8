"""Copies: how unlike the examples can be that show as one which counts several times.

Examples z + e_1, ..., z + e_t around their mean z send back nearly what one that counts t times does,

    sum_j F(z + e_j) (z + e_j)^T = t F(z) z^T + J C + ...,    C = sum_j e_j e_j^T,    J = dF / dz,

so that a copy shows from a near copy by the square of what lies between them: what is 1e-4 apart is one example twice in an
update of eight digits. Of J e e^T shows what J e has outside the deltas' span: all of it where e lies outside the span of
the examples, else as much as e has along an example's dual vector, in whose equation it is left. An e with J e = 0, which
moves no output of a network that is linear about z, shows in nothing, and no bound holds for it; those here are for
directions like the ones that are tried.

Source: this library.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

from unbatch.numerics.bounds.first_order import ERROR_SIGMAS, LARGEST_RADIUS
from unbatch.numerics.unmix.equation import NOISE_SLACK
from unbatch.numerics.unmix.linearisation import Linearisation
from unbatch.numerics.unmix.mixture import Mixture


def radius_with_copies(mixture: Mixture, z: Tensor, y: Tensor, reach: Tensor, times: Tensor, along: Tensor) -> Tensor:
    """How far off examples can be, some of which are said to occur several times: bounds [f] in place of `reach` [f].

    What near copies hide from their own equation they leave in those of the others: up to what acceptance lets pass, in a
    direction that may be the weakest. Of an average one and the noise itself `reach` has ERROR_SIGMAS / sqrt(m), so that
    bounds grow by NOISE_SLACK sqrt(m) / ERROR_SIGMAS; those of copies by `copies_radius` as well.

    >>> from unbatch.numerics.unmix.made import made_mixture
    >>> mixture, z, y = made_mixture(4)
    >>> steps = torch.randn(8, 80, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> once, reach = torch.ones(4, dtype=torch.int64), torch.full((4,), 1e-9, dtype=torch.float64)
    >>> torch.equal(radius_with_copies(mixture, z, y, reach, once, steps), reach)
    True
    """
    if not bool((times > 1).any()):
        return reach
    found = reach * NOISE_SLACK * math.sqrt(len(mixture.U)) / ERROR_SIGMAS + copies_radius(mixture, z, y, times, along)
    far: Tensor = found.masked_fill(~(found < LARGEST_RADIUS * z.norm(dim=1)), torch.inf)
    return far


def copies_radius(mixture: Mixture, z: Tensor, y: Tensor, times: Tensor, along: Tensor) -> Tensor:
    """How far off those examples can be of which one is said to occur several times.

    Largest |e_j| [f], l2 in R^d, of examples around z [f, n] that occur `times` [f] in all: sqrt((t - 1) v / g) with v what
    acceptance lets pass of the gradient and g the least of it that a unit step twice over changes. Tried are steps outside
    the examples' span, of preactivations `along` [s, m], and those towards each other example of z and across all of them.
    0 where t is 1; inf where some step changes nothing.

    >>> from unbatch.numerics.unmix.made import made_mixture
    >>> mixture, z, y = made_mixture(4)
    >>> steps = torch.randn(8, 80, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> found = copies_radius(mixture, z, y, torch.tensor([1, 1, 2, 5]), steps)
    >>> bool(found[0] == 0), bool(found[3] > found[2] > 10 * mixture.noise)
    (True, True)
    """
    found, which = z.new_zeros(len(z)), (times > 1).nonzero()[:, 0].to(z.device)
    if not len(which):
        return found
    at = Linearisation(mixture, z[which], y[which])
    duals = normalize(mixture.dual(mixture.sent(z, y)), dim=1)

    def left(step: Tensor) -> Tensor:
        """What J e has outside the deltas' span [g], by the preactivations [g, m] of e."""
        changed = at.bent(step)
        outside: Tensor = changed - (changed @ mixture.U) @ mixture.U.T
        size: Tensor = outside.norm(dim=1)
        return size

    least = torch.stack([left(step.expand_as(at.F)) for step in along]).amin(0)
    mixed = torch.randn(len(along), len(z), generator=torch.Generator().manual_seed(0), dtype=z.dtype).to(z)
    for toward in torch.cat([torch.eye(len(z)).to(z), mixed]):
        step = toward @ z - toward.sum() * z[which]  # on step . ones = 0
        size = step.norm(dim=1, keepdim=True)
        step = step / size.clamp_min(1e-300)
        seen = left(step @ mixture.W) * (step @ duals.T).abs().amax(1)
        least = torch.where(size[:, 0] > 0, torch.minimum(least, seen), least)  # none is toward itself
    size = at.F.norm(dim=1) * z[which].norm(dim=1)
    hidden = NOISE_SLACK * (max(mixture.outside, mixture.noise) + mixture.rounding * size)
    found[which] = ((times.to(z)[which] - 1) * hidden / least).sqrt()
    return found
