"""Pattern: which neurons an example switches on, found from a rough guess by linear programs.

An exact pattern gives the example exactly, since the network is linear as long as no neuron switches. Few guesses are good
enough to have it, but a guess with one neuron in six on the wrong side leads to it, in three steps: each neuron's odds to
be on are read off the guess; a linear program finds the pattern that suits these odds best among all that the gradient
allows; least absolute deviations and rounding mend the last neurons.

Why a program: behind one layer of switches (relu, leaky relu, hardtanh) every row of a delta is one of two values,
off_j . a or on_j . a, with a the residual: off a + s (on - off) a with s in {0, 1}^m. It lies in the range of U, which has
n of m dimensions;
a generic subspace of n < m / 2 dimensions would hold of the cube but its corner 0, so what it does hold, the examples'
patterns span. Hence maximise sum_j l_j s_j over the cube, l the log odds that a guess gives the neurons: a linear program,
whose maximum is about an example's pattern even where one sign in six of the guess is wrong. The pattern is also that of
preactivations, which lie in n of m dimensions as well: by turns the program is run and the guess brought to agree with what
it ended at. Least absolute deviations and rounding make the pattern exact.

Source: this library; a subspace and an orthant: Wendel, A problem in geometric probability, 1962; cubes: Donoho,
Tanner, Counting the faces of randomly-projected hypercubes and orthants, DCG 2010; the program's solution: Boyd et al.,
Distributed optimization and statistical learning via ADMM, FnT ML 2011; the probit model: Dempster, Laird,
Rubin, Maximum likelihood from incomplete data via the EM algorithm, JRSS B 1977.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from unbatch.numerics.unmix.mixture import MOST_CLASSES, Mixture
from unbatch.numerics.unmix.sign_certain import deviations, exact_rows

GUESS_SPREAD = 0.5  # error of a guess's preactivations, in their own standard deviation
PROGRAM_PENALTY = 10.0
BISECTIONS = 60
FAR_DEVIATIONS = 6.0  # deviations of an error beyond which it makes no difference
TURNS = 4  # of programs; between them guesses are brought to agree with their patterns
AGREEMENT_STEPS = 3  # steps of that
INSIDE_STEPS = 100  # of it from nothing, where the pattern is exact
AGREEMENT_SPREAD = 0.3  # error of a guess's preactivations in it
FIRST_PROGRAMS = (
    6,
    15,
)  # linear programs and steps: each has the last one's answer for its guess, and the residual to it
SHORT_PROGRAMS = (3, 15)  # of a turn, for all guesses
LONG_PROGRAMS = (6, 50)  # of a turn, for the few that are to be finished
PATTERN_RESTARTS = 3  # times that least absolute deviations begin anew from the pattern that they led to
SURE_SHARE = 0.9  # share of rows that fit a dual vector of which the pattern is known: an example's are .98 and more
FINAL_ROUNDINGS = 3  # of roundings of what least absolute deviations leave
PATTERNS_AT_ONCE = 64  # patterns finished at a time
NEAR_PATTERN = 0.06  # share of rows up to which two patterns are mostly of one example
ZERO_LENGTH = 0.05  # length of a delta, over that of all neurons on, up to which the program has ended at 0
ROUGH_DISTANCE = 0.15  # relative distance to a pattern's delta above which what the program ends at is no pattern


@dataclass(frozen=True)
class Switches:
    """The two values that each neuron's delta takes: with the neuron off, and with it on.

    The two values of the deltas' rows: off_j . a and on_j . a, a [k] a residual.

    >>> from unbatch.numerics.unmix.made import made_mixture
    >>> mixture, z, y = made_mixture(4, torch.relu)
    >>> rng = torch.Generator().manual_seed(0)
    >>> two = switches(mixture, rng)
    >>> two.at(torch.tensor([[-1.0] * 80, [1.0] * 80]).double()).double().mean(1)  # relu: on above 0
    tensor([0., 1.], dtype=torch.float64)
    """

    off: Tensor  # [m, k]
    on: Tensor  # [m, k]
    low: Tensor  # [m]: a neuron is on where its preactivation lies between
    high: Tensor  # [m]

    def at(self, before: Tensor) -> Tensor:
        """Whether the neurons [g, m] are on."""
        return (before > self.low) & (before < self.high)

    def chance(self, before: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
        """P that neurons with preactivations N(before, spread^2) [g, m] are on, and E[x; on] of the x = N(0, 1) in it."""
        low, high = (
            ((edge - before) / spread).clamp(-FAR_DEVIATIONS, FAR_DEVIATIONS) for edge in (self.low, self.high)
        )
        inside = 0.5 * (torch.erfc(low / 2**0.5) - torch.erfc(high / 2**0.5))
        slope = ((-0.5 * low.square()).exp() - (-0.5 * high.square()).exp()) / (2 * math.pi) ** 0.5
        return inside, slope

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
    """What a layer of switches does, found by trying; None where the activation is no switch.

    The two values, if the difference of two labels' deltas has two values a row and no more, whatever other rows do.

    >>> from unbatch.numerics.unmix.made import made_mixture
    >>> rng = torch.Generator().manual_seed(0)
    >>> switches(made_mixture(4)[0], rng) is None, switches(made_mixture(4, torch.relu)[0], rng) is None
    (True, False)
    """
    if not 2 <= mixture.classes <= MOST_CLASSES:
        return None
    m = mixture.U.shape[0]
    level = 10.0 ** torch.arange(-3, 4, dtype=torch.float64)
    level = torch.cat([-level.flip(0), level])  # ascending
    mixed = level[torch.randint(len(level), (8, m), generator=rng)]
    before = torch.cat([level[:, None].expand(-1, m), mixed]).to(mixture.U)
    first = mixture.deltas_under(before, 0)
    seen = torch.stack([mixture.deltas_under(before, c) - first for c in range(1, mixture.classes)], 2)  # [p, m, k - 1]
    size = seen.norm(dim=2)
    rows = torch.arange(m, device=size.device)
    on, off = seen[size.argmax(0), rows], seen[size.argmin(0), rows]
    to_on, to_off = (seen - on).norm(dim=2), (seen - off).norm(dim=2)
    two = bool((torch.minimum(to_on, to_off) <= 1e-9 * (on.norm(dim=1) + 1e-300)).all())
    two = two and float((on - off).norm()) > 1e-3 * float(on.norm())
    lit = (to_on < to_off)[: len(level)]  # [p, m]
    crossed = lit[1:] != lit[:-1]
    if not two or bool((crossed.sum(0) > 2 - (lit[0] | lit[-1]).int()).any()):
        return None

    def edge(rising: bool) -> Tensor:
        here = crossed & (lit[1:] == rising)
        low, high = (level.to(mixture.U)[here.int().argmax(0) + k] for k in (0, 1))
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            value = (mixture.deltas_under(middle[None], 1) - mixture.deltas_under(middle[None], 0))[0]
            beyond = ((value - on[:, 0]).abs() < (value - off[:, 0]).abs()) == rising
            low, high = torch.where(beyond, low, middle), torch.where(beyond, middle, high)
        return torch.where(here.any(0), high, -torch.inf if rising else torch.inf)

    return Switches(off, on, edge(True), edge(False))


@dataclass(frozen=True)
class Corners:
    """Patterns of on and off that guesses led to.

    Corners of the cube that programs ended near, one a guess.

    >>> none = torch.zeros(0, 5)
    >>> len(Corners(none.bool(), none, none.sum(1), torch.zeros(0, 2)).pattern)
    0
    """

    pattern: Tensor  # [g, m]
    delta: Tensor  # [g, m] what the programs ended at
    off: Tensor  # [g] distance between that and the pattern's own delta, relative: small where the corner is an example
    x: Tensor  # [g, r] the guesses

    def __getitem__(self, which: Tensor) -> Corners:
        return Corners(self.pattern[which], self.delta[which], self.off[which], self.x[which])


def relax(mixture: Mixture, rest: Mixture, two: Switches, z: Tensor, y: Tensor) -> Corners:
    """The patterns of on and off to which guesses lead.

    Corners near the patterns of guesses z [g, n] with labels y; `rest` is the mixture less the examples found.

    >>> from unbatch.numerics.unmix.made import made_mixture
    >>> mixture, z, y = made_mixture(4, torch.relu)
    >>> rng = torch.Generator().manual_seed(0)
    >>> corners = relax(mixture, mixture, switches(mixture, rng), z, y)
    >>> bool((corners.pattern == (mixture.before(z) > 0)).double().mean() > 0.95)
    True
    """
    if not len(z):  # a start may have no guess
        none = z.new_zeros(0, len(mixture.U))
        return Corners(none.bool(), none, none.sum(1), z @ rest.basis.T)

    def ends(i: Tensor) -> Corners:
        before = mixture.before(z[i])
        a = two.residual(two.at(before), mixture.F(z[i], y[i]))
        pattern, delta, off, _ = _programs(mixture, two, a, before, *FIRST_PROGRAMS)
        return Corners(pattern, delta, off, z[i] @ rest.basis.T)

    return _in_parts(ends, len(z))


def turned(mixture: Mixture, rest: Mixture, two: Switches, corners: Corners, programs: tuple[int, int]) -> Corners:
    """The same patterns, after the guesses were brought to agree with them a few times.

    Corners that the same guesses lead to by TURNS more of `programs`, rounds and steps.

    Programs know the deltas' space alone, and end at examples that are found, too. In between the guesses are brought to
    agree with their patterns in the space of the others' preactivations.

    >>> from unbatch.numerics.unmix.made import made_mixture
    >>> mixture, z, y = made_mixture(4, torch.relu)
    >>> rng = torch.Generator().manual_seed(0)
    >>> two = switches(mixture, rng)
    >>> later = turned(mixture, mixture, two, relax(mixture, mixture, two, z, y), SHORT_PROGRAMS)
    >>> bool((later.pattern == (mixture.before(z) > 0)).double().mean() > 0.9)
    True
    """
    if not len(corners.x):
        return corners

    def ends(i: Tensor) -> Corners:
        pattern, delta, off, x = (part[i] for part in (corners.pattern, corners.delta, corners.off, corners.x))
        a = two.residual(pattern, delta)
        for _ in range(TURNS):
            x, before = agreeing(rest, two, pattern, x)
            pattern, delta, off, a = _programs(mixture, two, a, before, *programs)
        return Corners(pattern, delta, off, x)

    return _in_parts(ends, len(corners.x))


def own(two: Switches, before: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """The patterns that guesses have as they are.

    Patterns of preactivations [g, m] and the deltas [g, m] with them that are nearest to given ones.

    >>> from unbatch.numerics.unmix.made import made_mixture
    >>> mixture, z, y = made_mixture(4, torch.relu)
    >>> rng = torch.Generator().manual_seed(0)
    >>> pattern, delta = own(switches(mixture, rng), mixture.before(z), mixture.F(z, y))
    >>> torch.equal(pattern, mixture.before(z) > 0), torch.allclose(delta, mixture.F(z, y))
    (True, True)
    """
    pattern = two.at(before)
    off, on = two.ends(two.residual(pattern, delta))
    return pattern, torch.where(pattern, on, off)


def _in_parts(ends: Callable[[Tensor], Corners], g: int, chunk: int = 512) -> Corners:
    parts = [ends(i) for i in torch.split(torch.arange(g), chunk)]
    return Corners(
        torch.cat([part.pattern for part in parts]),
        torch.cat([part.delta for part in parts]),
        torch.cat([part.off for part in parts]),
        torch.cat([part.x for part in parts]),
    )


def agreeing(rest: Mixture, two: Switches, pattern: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Guesses moved towards examples that have a given pattern of on and off.

    x [g, r] in the rest, and its preactivations [g, m], moved towards those that have the pattern [g, m].

    Expectation and maximisation of a probit model: preactivations are x W with a normal error of AGREEMENT_SPREAD
    deviations, and what is known of them is the pattern, right or wrong. One product with the same matrix a step for all.

    >>> from unbatch.numerics.unmix.made import made_mixture
    >>> mixture, z, y = made_mixture(4, torch.relu)
    >>> rng = torch.Generator().manual_seed(0)
    >>> x, before = agreeing(mixture, switches(mixture, rng), mixture.before(z) > 0, z)
    >>> x.shape, before.shape
    (torch.Size([4, 4]), torch.Size([4, 80]))
    """
    G = rest.W @ rest.W.T
    G.diagonal().add_(1e-9 * G.diagonal().mean() + 1e-300)
    onto = torch.linalg.solve(G, rest.W).T  # [m, r]
    along = None if rest.ones is None else torch.linalg.solve(G, rest.ones)
    for _ in range(AGREEMENT_STEPS):
        x = x + _pull(two, pattern, rest.before(x)) @ onto
        if along is not None and rest.ones is not None:
            x = x + ((1 - x @ rest.ones) / (along @ rest.ones))[:, None] * along
    return x, rest.before(x)


def inside(mixture: Mixture, two: Switches, pattern: Tensor, own: Tensor) -> Tensor:
    """Points that have exact patterns of on and off, or nearly.

    z [f, n] in the span of each one's own rows [f, r, n] that suit the patterns [f, m] best, in the sense of `agreeing`.

    >>> from unbatch.numerics.unmix.made import made_mixture
    >>> mixture, z, y = made_mixture(4, torch.relu)
    >>> pattern = mixture.before(z) > 0
    >>> found = inside(mixture, switches(mixture, torch.Generator()), pattern, mixture.basis.expand(4, -1, -1))
    >>> bool(((mixture.before(found) > 0) == pattern).double().mean() > 0.95)
    True
    """
    W = own @ mixture.W  # [f, r, m]
    G = W @ W.mT
    G.diagonal(dim1=1, dim2=2).add_(1e-9 * G.diagonal(dim1=1, dim2=2).mean(1, keepdim=True) + 1e-300)
    onto = torch.linalg.solve(G, W).mT  # [f, m, r]
    x = own.new_zeros(own.shape[:2])
    if mixture.ones is None:
        x = (torch.where(pattern, 1.0, -1.0)[:, None].to(W) @ onto)[:, 0]
    else:
        ones = own @ mixture.ones
        along = torch.linalg.solve(G, ones)
        along = along / (along * ones).sum(1, keepdim=True)
        x = along
    for _ in range(INSIDE_STEPS):
        x = x + (_pull(two, pattern, mixture.before((x[:, None] @ own)[:, 0]))[:, None] @ onto)[:, 0]
        if mixture.ones is not None:
            x = x + (1 - (x * ones).sum(1, keepdim=True)) * along
    z: Tensor = (x[:, None] @ own)[:, 0]
    return z


def _pull(two: Switches, pattern: Tensor, before: Tensor) -> Tensor:
    """By how much preactivations [g, m] are expected to be off, under a normal error, where their pattern is given."""
    spread = AGREEMENT_SPREAD * before.std(1, keepdim=True)
    share, slope = two.chance(before, spread)
    return spread * torch.where(pattern, slope / share.clamp_min(1e-12), -slope / (1 - share).clamp_min(1e-12))


def _programs(
    mixture: Mixture, two: Switches, a: Tensor, before: Tensor, rounds: int, steps: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pattern, delta, how far it is off, and residual that programs end at from a residual and preactivations."""
    U, odds = mixture.U.float(), _odds(two, before).float()
    v: Tensor | None = None
    for _ in range(rounds):
        off, on = two.ends(a)
        size = (on - off).square().mean(1, keepdim=True).sqrt() + 1e-300
        a, off, on = a / size, (off / size).float(), (on / size).float()
        gap = on - off
        gap = torch.where(gap < 0, gap.clamp_max(-0.05), gap.clamp_min(0.05))
        start = off + odds.sigmoid() * (on - off) if v is None else v
        u, v = _program(U, odds / gap / PROGRAM_PENALTY, off, on, start, steps)
        s = (u - off) / gap
        pattern, odds = s > 0.5, 8 * (s.clamp(-0.1, 1.1) - 0.5)
        length = u.norm(dim=1)
        far = (u - torch.where(pattern, on, off)).norm(dim=1) / length
        far = torch.where(length > ZERO_LENGTH * gap.norm(dim=1), far, torch.inf)
        a = two.residual(pattern, u.to(a), a)
    return pattern, u.to(a), far.to(a), a


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


def _odds(two: Switches, before: Tensor) -> Tensor:
    """Log odds [g, m] that the neurons are on, under an error of the preactivations."""
    share = two.chance(before, GUESS_SPREAD * before.std(1, keepdim=True))[0]
    return ((share + 0.01) / (1.01 - share)).log()


def finish(mixture: Mixture, two: Switches, pattern: Tensor, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rough patterns made exact, and with them the dual vectors of examples.

    Dual vectors q [g, n] beside rough patterns and deltas [g, m], their own patterns, and the share [g] of exact rows.

    Least absolute deviations mend most of the wrong rows. Then the pattern is what U S q rounds to, and its residual
    the one with which its delta lies in the range of U: the least singular vector of (I - U U^T) columns(pattern). Where
    not SURE_SHARE of the rows are exact then, deviations begin anew from that pattern.

    >>> from unbatch.numerics.unmix.made import made_mixture
    >>> mixture, z, y = made_mixture(4, torch.relu)
    >>> rng = torch.Generator().manual_seed(0)
    >>> q, pattern, share = finish(mixture, switches(mixture, rng), mixture.before(z) > 0, mixture.F(z, y))
    >>> bool((share > SURE_SHARE).all()), torch.equal(pattern, mixture.before(z) > 0)
    (True, True)
    """
    c, pattern, share = _finish(mixture, two, pattern, delta @ mixture.U)
    for _ in range(PATTERN_RESTARTS):
        left = (share < SURE_SHARE).nonzero()[:, 0]
        new = _finish(mixture, two, pattern[left], c[left])
        better = new[2] > share[left]
        left = left[better]
        c[left], pattern[left], share[left] = (each[better] for each in new)
        if not len(left):
            break
    return c / mixture.S, pattern, share


def _finish(mixture: Mixture, two: Switches, pattern: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    c, _ = deviations(mixture, partial(two.columns, pattern), c)
    parts = torch.split(torch.arange(len(c), device=c.device), PATTERNS_AT_ONCE)
    if not len(c):
        return c, pattern, c.new_zeros(0)
    found = [_rounded(mixture, two, pattern[i], c[i]) for i in parts]
    c, pattern, share = (torch.cat(each) for each in zip(*found, strict=True))
    return c, pattern, share


def _rounded(mixture: Mixture, two: Switches, pattern: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    U, every = mixture.U, torch.arange(len(pattern), device=pattern.device)
    a, error = two.residual(pattern, c @ U.T), c @ U.T
    for _ in range(FINAL_ROUNDINGS):
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


def apart(corners: Corners, known: Tensor, most: int, *, near: float = NEAR_PATTERN) -> Corners:
    """The best of the patterns that are not of one example.

    Up to `most` corners, the least far off first, near neither a known pattern [f, m] nor each other.

    >>> pattern = torch.tensor([[True] * 50, [True] * 50, [False] * 50])
    >>> corners = Corners(pattern, pattern.double(), torch.tensor([0.02, 0.01, 0.03]), torch.zeros(3, 2))
    >>> apart(corners, pattern[:0], 3).off
    tensor([0.0100, 0.0300])
    """
    rows, off = corners.pattern.float(), corners.off
    kept: list[int] = []
    gone = ~(off <= ROUGH_DISTANCE)
    for row in known.float():
        gone |= (rows - row).abs().mean(1) < near
    for i in off.argsort().tolist():
        if len(kept) == most:
            break
        if not gone[i]:
            kept.append(i)
            gone |= (rows - rows[i]).abs().mean(1) < near
    return corners[torch.tensor(kept, dtype=torch.long, device=off.device)]
