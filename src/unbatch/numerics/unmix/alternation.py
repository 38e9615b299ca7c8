"""Alternation: guesses brought near examples by what is known of their deltas and of their preactivations, in turn.

With one hidden layer delta_j = g(p_j) (on_j . a), p the preactivations, g the activation's derivative and a the residual.
Two linear spaces are known: the delta lies in the range of U, the preactivations in that of W^T. What ties them together is
the graph of g alone, entry by entry. Alternating between the spaces and the graph costs O(m n) a step and guess, where a
step of Gauss and Newton costs O(m n^2), and kinks of g do not stop it.

Source: this library; alternation with a damped dual: Luke, Relaxed averaged alternating reflections for diffraction
imaging, Inverse Problems 2005; Boyd et al., Distributed optimization and statistical learning via ADMM, FnT ML 2011.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unbatch.numerics.unmix.mixture import MOST_CLASSES, Mixture, misfits

TABLE_POINTS = 4097  # of the tabulated slope; 0, where kinks are, is one
TABLE_REACH = 4.0  # times the largest preactivation of the middle guess, up to which it is tabulated
ALIKE_SLOPES = 1e-9  # relative difference of neurons' slopes that is rounding
SLOPE_JUMP = 0.02  # of the slope's range, from one point to the next, above which it jumps: patterns are the way then
ALTERNATIONS = 200
DUAL_DAMPING = 0.95  # of the dual: without it guesses wander off, and below .9 they stay where they are
RESIDUAL_STEPS = 5  # steps between two looks at the residual
PREACTIVATION_WEIGHT = 2.0  # weight of preactivations against deltas
NEARER_SHARE = 1 / 3  # of a guess's misfit, to which an example's falls far below, and one's that went astray hardly
GRAPH_STEPS = 2  # steps of an entry towards the graph


@dataclass(frozen=True)
class Slopes:
    """How each neuron's delta follows from its preactivation, tabulated.

    delta_j = g(p_j) (on_j . a), g tabulated between -reach and reach and constant beyond.

    >>> told = Slopes(on=torch.ones(3, 1), slope=torch.linspace(-1, 1, TABLE_POINTS), reach=2.0)
    >>> told(torch.tensor([1.0]))  # g and g'
    (tensor([0.5000]), tensor([0.5000]))
    """

    on: Tensor  # [m, k - 1]
    slope: Tensor  # [TABLE_POINTS]: g
    reach: float

    def __call__(self, p: Tensor) -> tuple[Tensor, Tensor]:
        """g(p) and g'(p), of the shape of p."""
        unit, table = (TABLE_POINTS - 1) / (2 * self.reach), self.slope.to(p)
        at = ((p + self.reach) * unit).nan_to_num().clamp(0, TABLE_POINTS - 1.001)
        left = at.floor()
        rise = table.diff().take(left.long())
        return table.take(left.long()) + (at - left) * rise, rise * unit

    def drive(self, mixture: Mixture, p: Tensor, y: Tensor) -> Tensor:
        """on a [g, m], a the residual that the model has at preactivations p [g, m] under the labels y; of size 1, rms."""
        g, F, k = self(p)[0], mixture.deltas(p, y).detach(), self.on.shape[1]
        pairs = (self.on[:, :, None] * self.on[:, None]).flatten(1)
        H = (g.square() @ pairs).view(len(p), k, k)
        H = H + 1e-9 * H.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(k).to(H)
        a = torch.linalg.solve_ex(H, ((g * F) @ self.on)[:, :, None])[0][..., 0]
        found: Tensor = a.nan_to_num() @ self.on.T
        found /= found.square().mean(1, keepdim=True).sqrt() + 1e-300
        return found


def slopes(mixture: Mixture, z: Tensor, rng: torch.Generator) -> Slopes | None:
    """The table of slopes of a network with one hidden layer and a smooth activation.

    The slopes for guesses about as large as z [g, n]; None where deltas are no such product, or g jumps.

    The difference of two labels' deltas then is one function of each neuron's preactivation alone, up to a factor.

    >>> from unbatch.numerics.unmix.made import made_mixture
    >>> rng = torch.Generator().manual_seed(0)
    >>> mixture, z, y = made_mixture(4)
    >>> slopes(mixture, z, rng) is None, slopes(made_mixture(4, torch.relu)[0], z, rng) is None
    (False, True)
    """
    if not 2 <= mixture.classes <= MOST_CLASSES or not len(z):
        return None
    m = mixture.U.shape[0]
    reach = TABLE_REACH * float(mixture.before(z).abs().amax(1).median())
    grid = torch.linspace(-reach, reach, TABLE_POINTS, dtype=torch.float64).to(z)
    rows = torch.nn.functional.pad(grid, (0, -TABLE_POINTS % m)).view(-1, m)
    level = torch.linspace(-reach, reach, 9, dtype=torch.float64)[:, None].expand(-1, m)
    mixed = reach / TABLE_REACH * torch.randn(8, m, generator=rng, dtype=torch.float64)
    before = torch.cat([level.to(z), mixed.to(z), rows])
    seen = torch.stack([mixture.deltas_under(before, c) for c in range(1, mixture.classes)], 2)
    seen = seen - mixture.deltas_under(before, 0)[:, :, None]  # [p, m, k - 1]
    on = seen[int(seen[: len(level)].square().sum((1, 2)).argmax())]
    power = on.square().sum(1)
    ratio = (seen * on).sum(2) / power  # [p, m]: g, if they are
    slope = ratio[-len(rows) :].flatten()[:TABLE_POINTS]
    found, size = Slopes(on, slope, reach), float(slope.abs().max())
    alone = bool(((seen - ratio[:, :, None] * on).norm(dim=2) <= ALIKE_SLOPES * power.sqrt() * max(size, 1.0)).all())
    if not alone or float(slope.diff().abs().max()) > SLOPE_JUMP * float(slope.max() - slope.min()):
        return None  # as is a layer with a neuron that no residual reaches, whose ratio is NaN
    alike = (ratio - found(before)[0]).abs().max() <= SLOPE_JUMP * size
    return found if bool(alike) else None


def approach(mixture: Mixture, slopes: Slopes, z: Tensor, y: Tensor, *, steps: int = ALTERNATIONS) -> Tensor:
    """Rough guesses moved near to examples.

    z [g, n] moved towards examples with the labels y [g], often to within a few per cent of one; in float32.

    Some go astray: what does not come to fit its equation several times better stays as it was.

    >>> from unbatch.numerics.unmix.made import made_mixture
    >>> rng = torch.Generator().manual_seed(0)
    >>> mixture, z, y = made_mixture(4)
    >>> guesses = mixture.scaled(z + 0.1 * torch.randn(4, 4, generator=rng, dtype=torch.float64))
    >>> moved = approach(mixture, slopes(mixture, z, rng), guesses, y)
    >>> bool((moved - z).norm() <= (guesses - z).norm())
    True
    """
    if not len(z):  # a start may have no guess
        return z
    offset = torch.zeros_like(mixture.W[0]) if mixture.offset is None else mixture.offset
    U, Q, back = mixture.U.float(), torch.linalg.qr(mixture.W.T).Q, torch.linalg.pinv(mixture.W)  # [m, n] each
    ruler = None if mixture.ones is None else (Q @ (Q.T @ (back @ mixture.ones))).float()  # [m]: z . ones by z W
    Q, shift, p = Q.float(), offset.float(), mixture.before(z)
    drive, p = slopes.drive(mixture, p, y).float(), p.float()
    slope = slopes(p)[0]
    weight = (
        PREACTIVATION_WEIGHT * slope.std(1, keepdim=True) / (p.std(1, keepdim=True) + 1e-30)
    )  # an error of p against one of g(p)
    gu, gp, du, dp = drive * slope, p, torch.zeros_like(p), torch.zeros_like(p)
    for step in range(steps):
        u, p = ((gu - du) @ U) @ U.T, ((gp - dp - shift) @ Q) @ Q.T
        if ruler is not None:
            p = p + (1 - p @ ruler)[:, None] * ruler / (ruler @ ruler)
        p = p + shift
        if step % RESIDUAL_STEPS == 0 and step:
            drive = slopes.drive(mixture, p.double(), y).float()
        gu, gp = _graph(slopes, drive, u + du, p + dp, weight)
        du, dp = DUAL_DAMPING * (du + u - gu), DUAL_DAMPING * (dp + p - gp)
    moved = mixture.scaled((gp.double() - offset) @ back)
    nearer = misfits(mixture, moved, y)[0] < NEARER_SHARE * misfits(mixture, z, y)[0]
    return torch.where(nearer[:, None], moved, z)


def _graph(slopes: Slopes, drive: Tensor, u: Tensor, p: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest (drive g(t), t) to (u, p), entry by entry: min (drive g(t) - u)^2 + weight^2 (t - p)^2 over t."""
    t = p
    best, least = p, torch.full_like(p, torch.inf)
    for step in range(GRAPH_STEPS + 1):
        g, bend = slopes(t)
        off, far, rate = drive * g - u, weight.square() * (t - p), drive * bend
        cost = off.square() + far * (t - p)
        best, least = torch.where(cost < least, t, best), torch.minimum(cost, least)
        if step < GRAPH_STEPS:
            t = t - (rate * off + far) / (rate.square() + weight.square())
    return drive * slopes(best)[0], best
