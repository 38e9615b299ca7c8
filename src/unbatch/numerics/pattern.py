"""Pattern: which neurons an example switches on, from a rough guess, by a convex relaxation.

Behind one layer of switches (relu, leaky relu, hardtanh) every row of a delta is one of two values, off_j . a or on_j . a,
with a the residual: off a + s (on - off) a with s in {0, 1}^m. It lies in the range of U, which has n of m dimensions;
a generic subspace of n < m / 2 dimensions would hold of the cube but its corner 0, so what it does hold, the examples'
patterns span. Hence maximise sum_j l_j s_j over the cube, l the log odds that a guess gives the neurons: a linear program,
whose maximum is about an example's pattern even where one sign in six of the guess is wrong. Least absolute deviations and
rounding make it exact.

Source: this library; a subspace and an orthant: Wendel, A problem in geometric probability, 1962; cubes: Donoho,
Tanner, Counting the faces of randomly-projected hypercubes and orthants, DCG 2010; the program's solution: Boyd et al.,
Distributed optimization and statistical learning via ADMM, FnT ML 2011.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from unbatch.numerics.mixture import Mixture
from unbatch.numerics.sign_certain import deviations, exact_rows

CLASSES = 128  # beyond which residuals have too many unknowns
SPREAD = 0.5  # error of a guess's preactivations, in their own standard deviation
PENALTY = 10.0
SHORT = (
    6,
    15,
)  # linear programs and steps: each has the last one's answer for its guess, and the residual that fits it
LONG = (12, 50)  # the same for the few that are to be finished
AGAIN = 3  # times that least absolute deviations begin anew from the pattern that they led to
SURE = 0.9  # share of rows that fit a dual vector of which the pattern is known: an example's are .98 and more
FINAL = 3  # of roundings of what least absolute deviations leave
PART = 64  # patterns finished at a time
NEAR = 0.06  # share of rows up to which two patterns are mostly of one example
NOTHING = 0.05  # length of a delta, over that of all neurons on, up to which the program has ended at 0
ROUGH = 0.15  # relative distance to a pattern's delta above which what the program ends at is no pattern


@dataclass(frozen=True)
class Switches:
    """The two values of the deltas' rows: off_j . a and on_j . a, a [k] a residual."""

    off: Tensor  # [m, k]
    on: Tensor  # [m, k]

    def columns(self, pattern: Tensor, which: Tensor) -> Tensor:
        """[q, m, k] of the patterns [g, m] numbered [q]: what `a` combines to their deltas."""
        return torch.where(pattern[which][:, :, None], self.on, self.off)

    def ends(self, a: Tensor) -> tuple[Tensor, Tensor]:
        """off a and on a [g, m] of residuals [g, k]."""
        return a @ self.off.T, a @ self.on.T

    def residual(self, pattern: Tensor, delta: Tensor, prior: Tensor | None = None) -> Tensor:
        """a [g, k] that fits delta [g, m] best under the pattern, held to a prior [g, k] by a hundredth of the power."""
        k, p = self.on.shape[1], pattern.to(self.on)
        on, off = ((E[:, :, None] * E[:, None]).flatten(1) for E in (self.on, self.off))
        H = (p @ on + (1 - p) @ off).view(-1, k, k)
        right = (p * delta) @ self.on + ((1 - p) * delta) @ self.off
        size = H.diagonal(dim1=1, dim2=2).mean(1) + 1e-300
        ridge = (1e-12 if prior is None else 1e-2) * size
        H = H + ridge[:, None, None] * torch.eye(k).to(H)
        right = right if prior is None else right + ridge[:, None] * prior
        a: Tensor = torch.linalg.solve_ex(H, right[:, :, None])[0][..., 0].nan_to_num()
        return a


def switches(mixture: Mixture, rng: torch.Generator) -> Switches | None:
    """The two values, if the difference of two labels' deltas has two values a row and no more, whatever other rows do."""
    if not 2 <= mixture.classes <= CLASSES:
        return None
    m = mixture.U.shape[0]
    level = 10.0 ** torch.arange(-3, 4, dtype=torch.float64)
    probes = torch.cat([level, -level])[:, None].expand(-1, m)
    mixed = torch.randn(8, m, generator=rng, dtype=torch.float64) * level[:, None].repeat(2, 1)[:8]
    before = torch.cat([probes, mixed]).to(mixture.U)
    first = mixture.deltas(before, torch.zeros(len(before), dtype=torch.long, device=before.device)).detach()
    seen = torch.stack([_deltas(mixture, before, c) - first for c in range(1, mixture.classes)], 2)  # [p, m, k - 1]
    size = seen.norm(dim=2)
    rows = torch.arange(m, device=size.device)
    on, off = seen[size.argmax(0), rows], seen[size.argmin(0), rows]
    far = torch.minimum((seen - on).norm(dim=2), (seen - off).norm(dim=2))
    two = bool((far <= 1e-9 * (on.norm(dim=1) + 1e-300)).all()) and float((on - off).norm()) > 1e-3 * float(on.norm())
    return Switches(off, on) if two else None


def relax(mixture: Mixture, two: Switches, z: Tensor, y: Tensor, *, chunk: int = 512) -> tuple[Tensor, Tensor, Tensor]:
    """Patterns [g, m] near those of guesses z [g, n] with labels y, the programs' deltas [g, m], how far these are off [g].

    The distance is between the delta and the pattern's own, relative; small where the cube's corner is an example.
    """
    if not len(z):  # a start may have no guess
        return z.new_zeros(0, len(mixture.U), dtype=torch.bool), z.new_zeros(0, len(mixture.U)), z.new_zeros(0)
    parts = []
    for i in torch.split(torch.arange(len(z), device=z.device), chunk):
        before = mixture.before(z[i])
        a = two.residual(_on(mixture, two, before), mixture.F(z[i], y[i]))
        parts.append(_programs(mixture, two, a, _odds(mixture, two, before).float(), *SHORT))
    patterns, deltas, off = (torch.cat(found) for found in zip(*parts, strict=True))
    return patterns, deltas, off


def sharpen(mixture: Mixture, two: Switches, pattern: Tensor, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same from patterns and deltas [g, m] that `relax` ended at, by longer programs."""
    a = two.residual(pattern, delta)
    off, on = two.ends(a)
    odds = 8 * (((delta - off) / (on - off)).nan_to_num().clamp(-0.1, 1.1) - 0.5)
    return _programs(mixture, two, a, odds.float(), *LONG)


def _programs(
    mixture: Mixture, two: Switches, a: Tensor, odds: Tensor, rounds: int, steps: int
) -> tuple[Tensor, Tensor, Tensor]:
    U = mixture.U.float()
    v: Tensor | None = None
    for _ in range(rounds):
        off, on = two.ends(a)
        size = (on - off).square().mean(1, keepdim=True).sqrt() + 1e-300
        a, off, on = a / size, (off / size).float(), (on / size).float()
        gap = on - off
        gap = torch.where(gap < 0, gap.clamp_max(-0.05), gap.clamp_min(0.05))
        start = off + odds.sigmoid() * (on - off) if v is None else v
        u, v = _program(U, odds / gap / PENALTY, off, on, start, steps)
        s = (u - off) / gap
        pattern, odds = s > 0.5, 8 * (s.clamp(-0.1, 1.1) - 0.5)
        length = u.norm(dim=1)
        far = (u - torch.where(pattern, on, off)).norm(dim=1) / length
        far = torch.where(length > NOTHING * gap.norm(dim=1), far, torch.inf)
        a = two.residual(pattern, u.to(a), a)
    return pattern, u.to(a), far.to(a)


def _program(U: Tensor, slope: Tensor, off: Tensor, on: Tensor, v: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """u [g, m] in the range of U and v between off and on, one at last, that maximise slope . u: ADMM, penalty 1."""
    least, most = torch.minimum(off, on), torch.maximum(off, on)
    dual = torch.zeros_like(v)
    for _ in range(steps):
        u = ((v - dual) @ U) @ U.T
        w = u + dual
        v = torch.minimum(torch.maximum(w + slope, least), most)
        dual = w - v
    return u, v


def _deltas(mixture: Mixture, before: Tensor, label: int) -> Tensor:
    y = torch.full((len(before),), label, dtype=torch.long, device=before.device)
    return mixture.deltas(before, y).detach()


def _on(mixture: Mixture, two: Switches, before: Tensor) -> Tensor:
    """Whether the neurons [g, m] are on, by the difference of two labels."""
    seen = _deltas(mixture, before, 1) - _deltas(mixture, before, 0)
    return (seen - two.on[:, 0]).abs() < (seen - two.off[:, 0]).abs()


def _odds(mixture: Mixture, two: Switches, before: Tensor, draws: int = 16) -> Tensor:
    """Log odds [g, m] that the neurons are on, under an error of the preactivations."""
    step = SPREAD * before.std(1, keepdim=True)
    normal = torch.special.ndtri((torch.arange(draws).to(before) + 0.5) / draws)
    share = torch.stack([_on(mixture, two, before + float(e) * step).to(before) for e in normal]).mean(0)
    return ((share + 0.01) / (1.01 - share)).log()


def finish(mixture: Mixture, two: Switches, pattern: Tensor, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Dual vectors q [g, n] beside rough patterns and deltas [g, m], their own patterns, and the share [g] of exact rows.

    Least absolute deviations mend most of the wrong rows. Then the pattern is what U S q rounds to, and its residual
    the one with which its delta lies in the range of U: the least singular vector of (I - U U^T) columns(pattern).
    """
    c, pattern, share = _finish(mixture, two, pattern, delta @ mixture.U)
    for _ in range(AGAIN):
        left = (share < SURE).nonzero()[:, 0]
        new = _finish(mixture, two, pattern[left], c[left])
        better = new[2] > share[left]
        left = left[better]
        c[left], pattern[left], share[left] = (each[better] for each in new)
        if not len(left):
            break
    return c / mixture.S, pattern, share


def _finish(mixture: Mixture, two: Switches, pattern: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    c, _ = deviations(mixture, partial(two.columns, pattern), c)
    parts = torch.split(torch.arange(len(c), device=c.device), PART)
    if not len(c):
        return c, pattern, c.new_zeros(0)
    found = [_rounded(mixture, two, pattern[i], c[i]) for i in parts]
    c, pattern, share = (torch.cat(each) for each in zip(*found, strict=True))
    return c, pattern, share


def _rounded(mixture: Mixture, two: Switches, pattern: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    U, every = mixture.U, torch.arange(len(pattern), device=pattern.device)
    a, error = two.residual(pattern, c @ U.T), c @ U.T
    for _ in range(FINAL):
        off, on = two.ends(a)
        pattern = (c @ U.T - off) * (on - off) > 0.5 * (on - off).square()
        columns = two.columns(pattern, every)  # [g, m, k]
        inside = U.T @ columns
        outside = columns - U @ inside
        a = torch.linalg.eigh(outside.mT @ outside)[1][..., 0]
        new = (inside @ a[:, :, None])[..., 0]
        turn = torch.where((new * c).sum(1, keepdim=True) < 0, -1.0, 1.0)
        a, c, error = turn * a, turn * new, (outside @ a[:, :, None])[..., 0]
    return c, pattern, exact_rows(mixture, c, error)


def apart(pattern: Tensor, off: Tensor, known: Tensor, most: int, *, near: float = NEAR) -> Tensor:
    """Numbers of up to `most` patterns [g, m], the least far off first, near neither a known one nor each other."""
    rows = pattern.float()
    kept: list[int] = []
    gone = ~(off <= ROUGH)
    for row in known.float():
        gone |= (rows - row).abs().mean(1) < near
    for i in off.argsort().tolist():
        if len(kept) == most:
            break
        if not gone[i]:
            kept.append(i)
            gone |= (rows - rows[i]).abs().mean(1) < near
    return torch.tensor(kept, dtype=torch.long, device=pattern.device)
