"""Unmix: single examples out of a mixture, by starts, polishing and peeling.

Source: this library. The span and its mixing matrix: Kariyappa et al., Cocktail Party Attack, ICML 2023; the dual
vectors and their sparsity under ReLU: Dimitrov et al., SPEAR, NeurIPS 2024.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from unbatch.numerics.callables import Tick
from unbatch.numerics.search.softening import Softened
from unbatch.numerics.unmix.alternation import approach, slopes
from unbatch.numerics.unmix.certificate import mixture_radius
from unbatch.numerics.unmix.descent import Descent
from unbatch.numerics.unmix.equation import (
    accept,
    choose_labels,
    choose_targets,
    explained,
    placed,
    polish,
)
from unbatch.numerics.unmix.joint import refine_jointly
from unbatch.numerics.unmix.mixture import Mixture, label_misfits, misfits
from unbatch.numerics.unmix.part import KnownPart, left_open
from unbatch.numerics.unmix.pattern import (
    LONG_PROGRAMS,
    NEAR_PATTERN,
    SHORT_PROGRAMS,
    SURE_SHARE,
    Switches,
    apart,
    finish,
    inside,
    own,
    relax,
    switches,
    turned,
)
from unbatch.numerics.unmix.sign_certain import (
    RESIDUAL_COLUMNS,
    isolate,
    layered,
    piecewise_linear,
    some_labels,
    zeroed,
)

GuessMaker = Callable[[Mixture, torch.Generator], Tensor]  # what is left, of r examples -> guesses [g, r]

KINK_SHARPNESS = (8.0, 16.0)  # of a rounded kink, in its layer's spreads
# The same where no delta is zero, so that signs isolate nothing: until what is left of the rounding moves no sign.
RISING_SHARPNESS = (16.0, 64.0, 256.0, 1024.0, 4096.0)
RISING_STEPS = 6  # of each, of one example and of all together
RISEN_MISFIT = 0.05  # of the equation, relative, above which a polished guess is in no example's basin
SHARP_MISFIT = 1e-4  # up to which no kink that moves the delta is passed: measured 2e-5 and less, else 5e-4 and more
ALIKE_RISEN = 3e-4  # 1 - cosine below which deltas are one example's, whose last digits are not there yet
PART_STEPS = 3  # of Newton, of examples that are told in part
DESCENT_SHARPNESS = 1.0  # the same in a descent, in the spreads near the origin, a tenth of the later ones
# Relative radius above which an example that fits is not subtracted: its error would stay in the rest.
LOOSE_RADIUS = 0.02
# Polished in a round, or a quarter as many as examples are left: more would often end at the same ones.
POLISHED_GUESSES = 64
FEW_EXAMPLES = 64  # examples left up to which all guesses are polished as they are
SAME_COSINE = 0.995  # cosine above which two guesses are one
# Noise over the least singular value that needs no refinement of the found ones before the next round.
QUIET_NOISE = 1e-5
SETTLING_ROUNDS = 8  # rounds over all dual vectors at once
FREE_SHARE = 0.1  # examples left over neurons up to which the patterns of the guesses themselves are finished, too
LAST_EXAMPLES = 8  # examples left up to which this goes for guesses that no program has moved
DEEPER_TURNS = 2  # times that all guesses take more turns, while they lead to less than half of the examples left
OPPOSITE_LABELS = 0.1  # spread of the weights under the opposite labels, over that under the labels, that tells them
FEW_AT_FIRST = 8  # examples left over those that the first guesses led to, from which on these are few
LABELS_TRIED = 10  # tried with every guess, those that fit it best


@dataclass
class Separation:
    """What an unmixing found.

    Examples that fit, in the whole mixture's coordinates, and what was left.

    >>> Separation(torch.zeros(0, 4), torch.zeros(0)).joint
    False
    """

    z: Tensor  # [f, n]
    labels: Tensor  # [f] or [f, k]
    log: list[dict[str, object]] = field(default_factory=list)
    guesses: Tensor | None = None  # [g, n] of what was not found
    joint: bool = False  # found together: no example's equation determines it alone
    weighed: bool = True  # every example counts as assumed; else how much each does was found with it


def unmix(
    mixture: Mixture,
    starts: Sequence[tuple[str, GuessMaker | Descent]],
    rng: torch.Generator,
    *,
    classes: Tensor | None = None,
    attempts: int = 3,
    tick: Tick = lambda share: True,
) -> Separation:
    """Every example of a mixture, from rough guesses.

    Examples of the mixture: guess, polish, accept, subtract, and again with the rest.

    `starts` are tried in turn, from the first one again after each success, until all of them failed `attempts` times.
    What is not found under the assumption that every example counts as much as its deltas say is looked for without it:
    examples that occur twice count twice, and a gradient may be any multiple of a batch's.

    >>> from unbatch.numerics.unmix.made import made_mixture
    >>> rng = torch.Generator().manual_seed(0)
    >>> def random(mixture, rng):
    ...     return torch.randn(40, mixture.n, generator=rng, dtype=torch.float64)
    >>> mixture, z, y = made_mixture(3)
    >>> found = unmix(mixture, [("random", random)], rng)
    >>> bool(torch.cdist(z, found.z).amin(1).max() < 1e-6)
    True
    """
    if classes is None:
        classes = torch.arange(mixture.classes, device=mixture.U.device)
    return named_alike(mixture, _separation(mixture, starts, rng, classes, attempts, tick))


def _separation(
    mixture: Mixture,
    starts: Sequence[tuple[str, GuessMaker | Descent]],
    rng: torch.Generator,
    classes: Tensor,
    attempts: int,
    tick: Tick,
) -> Separation:
    """By the way that suits the network."""
    if not piecewise_linear(mixture, rng):
        return by_polish(mixture, starts, rng, classes, attempts, tick)
    if _needed(mixture) > 0.9:  # too few rows to tell the exact ones by, and so few kinks that polishing gets past them
        return replace(by_polish(mixture, starts, rng, classes, attempts, tick), joint=True)
    found = list[Separation]()
    signs = zeroed(mixture, rng) or not (mixture.classes > RESIDUAL_COLUMNS or layered(mixture, rng))
    two = switches(mixture, rng) if mixture.n > 1 else None
    ways: list[Callable[..., Separation]] = [by_signs] * attempts  # dual vectors that clash seldom come again
    if mixture.n > 1 and not signs and _rounds(mixture, rng):
        ways = [by_rising]
    elif two is not None:
        ways.insert(0, partial(by_patterns, two=two))
    for way in ways:
        found.append(way(mixture, starts=starts, rng=rng, classes=classes, attempts=attempts, tick=tick))
        if 0 < len(found[-1].z) < mixture.n:
            found[-1] = _with_the_rest(mixture, found[-1], starts, rng, classes, attempts, tick)
        if len(found[-1].z) == mixture.n or not tick(0.0):
            break
    best = _longest(*found)
    for entry in (entry for each in found if each is not best for entry in each.log):
        entry["lost"] = True
    return replace(best, log=[entry for each in found for entry in each.log])


def _with_the_rest(
    whole: Mixture,
    found: Separation,
    starts: Sequence[tuple[str, GuessMaker | Descent]],
    rng: torch.Generator,
    classes: Tensor,
    attempts: int,
    tick: Tick,
) -> Separation:
    """What was found in part, and what its subtraction leaves: a mixture of its own, with as many rows and few examples."""
    rest = whole.without(whole.sent(found.z, found.labels), found.z)

    def begun(start: GuessMaker) -> GuessMaker:
        return lambda left, rng: start(replace(left, basis=left.basis @ rest.basis), rng)

    ways = [(name, begun(start)) for name, start in starts if not isinstance(start, Descent)]
    alone = replace(rest, basis=torch.eye(rest.n).to(rest.U))
    more = _separation(alone, ways, rng, classes, attempts, tick)
    found.log.extend(more.log)
    z, y = torch.cat([found.z, more.z @ rest.basis]), torch.cat([found.labels, more.labels])
    if len(z) == whole.n:
        return _longest(found, _whole(whole, z, classes, found.log))
    kept = accept(whole, z, y).sort().values
    return _longest(found, replace(found, z=z[kept], labels=y[kept]))


def _longest(*found: Separation) -> Separation:
    return max(found, key=lambda each: len(each.z))


def named_alike(mixture: Mixture, found: Separation) -> Separation:
    """The examples of a mixture of two classes under the labels by which they count most alike.

    Two classes have parallel deltas of opposite signs, so that where it is not known how much each example counts, both
    labels fit it, one with a positive weight and one with a negative. True weights all have one sign, so there are two ways
    to label a batch: that under which the weights differ least is taken, if it is clear, whatever labels were met with.

    >>> from unbatch.numerics.unmix.made import made_mixture
    >>> mixture, z, y = made_mixture(4, classes=2)
    >>> free = mixture.unweighed(-3.0)
    >>> bool((named_alike(free, Separation(z, torch.tensor([1, 0, 0, 0]), weighed=False)).labels == y).all())
    True
    """
    if found.weighed or mixture.classes != 2 or len(found.z) < 2:
        return found
    free = mixture.unweighed()
    each = [free.weights(free.F(found.z, y), found.z) for y in (torch.zeros_like(found.labels), found.labels * 0 + 1)]
    ways = list[tuple[float, Tensor]]()
    for labels in ((each[0] < each[1]).to(found.labels), (each[0] > each[1]).to(found.labels)):  # positive, negative
        size = torch.where(labels == 0, each[0], each[1]).abs().log()
        ways.append((float(size.max() - size.min()), labels))
    (least, best), (most, _) = sorted(ways, key=lambda way: way[0])
    met = any(torch.equal(labels, found.labels) for _, labels in ways)
    return replace(found, labels=best) if least < OPPOSITE_LABELS * most or not met else found


def by_polish(
    whole: Mixture,
    starts: Sequence[tuple[str, GuessMaker | Descent]],
    rng: torch.Generator,
    classes: Tensor,
    attempts: int,
    tick: Tick,
) -> Separation:
    """Every example of a smooth network's mixture, one after the other.

    The smooth way: every accepted example is subtracted, which leaves a smaller mixture of the same form. How much each
    counts is left open as soon as guesses lead to examples without that assumption only, and after every start has failed.

    >>> from unbatch.numerics.unmix.made import made_mixture
    >>> rng = torch.Generator().manual_seed(0)
    >>> def random(mixture, rng):
    ...     return torch.randn(40, mixture.n, generator=rng, dtype=torch.float64)
    >>> mixture, z, y = made_mixture(3)
    >>> found = by_polish(mixture, [("random", random)], rng, torch.arange(4), 3, lambda share: True)
    >>> bool(torch.cdist(z, found.z).amin(1).max() < 1e-6)
    True
    """
    rest, z, y = whole, whole.U.new_zeros(0, whole.n), None
    log: list[dict[str, object]] = []
    guesses, misses = z, 0
    factor: float | None = None  # by which those left are taken to count as well, once it was read off those found
    while rest.n and tick(1 - rest.n / whole.n):
        if misses == len(starts) and (whole.weighed or factor is not None) and whole.classes:
            whole, misses, factor = whole.unweighed(), 0, None
            rest = whole.without(whole.sent(z, y), z) if y is not None else whole
        if misses == attempts * len(starts):
            break
        name, start = starts[misses % len(starts)]
        if isinstance(start, Descent):
            left = start.labels(z, _no_labels(whole, classes) if y is None else y)
            begun = rest.scaled(start(rest, left, rng, partial(tick, 1 - rest.n / whole.n)))
            spare = begun[:0]
        else:
            begun, spare = _guessed(rest, start, classes, rng)
        tried, labels, chosen = _polished(rest, begun, classes, rng)
        few = len(chosen) < rest.n and len(chosen) <= max(1, rest.n // FEW_AT_FIRST)
        if y is None and few and whole.weighed and whole.classes:  # those few may be phantoms of a wrong assumption
            again = _polished(rest.unweighed(), begun, classes, rng)
            if len(again[2]) > len(chosen):
                tried, labels, chosen = again
                whole, factor = whole.unweighed(), 1.0
        log.append({"start": name, "left": rest.n, "guesses": len(tried), "found": len(chosen)})
        guesses, misses = torch.cat([tried, spare]) @ rest.basis, misses + 1
        if len(chosen):
            misses = 0
            z = torch.cat([z, guesses[chosen]])
            y = labels[chosen] if y is None else torch.cat([y, labels[chosen]])
            rest = whole.without(whole.sent(z, y), z)
            if rest.n and rest.noise > max(2 * whole.noise, QUIET_NOISE * float(rest.S[-1])):
                z, y, _ = refine_jointly(whole, z, y, others=rest.n, steps=4)
                rest = whole.without(whole.sent(z, y), z)
            log[-1]["noise"] = rest.noise / whole.noise
            if factor is not None:
                factor = float(whole.weights(whole.F(z, y), z).median())
                rest = rest.reweighed(factor)
    if y is None:
        return Separation(z, _no_labels(whole, classes), log, guesses)
    if not rest.n:
        finest, last, _ = refine_jointly(whole, z, y)
        if explained(whole, finest, last) or len(accept(whole, finest, last)) == len(z):
            z, y = finest, last
        guesses = guesses[:0]
    return Separation(z, y, log, guesses, weighed=whole.weighed)


def _polished(rest: Mixture, tried: Tensor, classes: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Guesses [g, n] after polishing, their labels, and the numbers of those that are examples.

    Where that leads to none and some examples must share a label: on the evened mixture, along straight steps.
    """
    labels = choose_labels(rest, tried, classes) if rest.classes else choose_targets(rest, tried)
    better, named, _ = polish(rest, tried, labels, steps=40, gain=0.002)
    chosen = accept(rest, better, named)
    if not len(chosen) and len(torch.unique(labels, dim=0)) < rest.n:
        better, named, _ = polish(rest.evened(), tried, labels, steps=40, gain=0.002, geodesic=False)
        chosen = accept(rest, better, named)
    if len(chosen):  # to the last digit, since what they are off by stays in the rest
        best = polish(rest, better[chosen], named[chosen], steps=8, damping=1e-9, target=0.0, gain=0.5)
        better[chosen], named[chosen] = best[:2]
        reach = mixture_radius(rest, better[chosen], named[chosen], rng) / better[chosen].norm(dim=1)
        chosen = chosen[reach < LOOSE_RADIUS]
    return better, named, chosen


def _guessed(rest: Mixture, start: GuessMaker, classes: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """A start's guesses [g, n] that are to be polished, and those beyond."""
    tried = rest.scaled(start(rest, rng))
    tried = placed(rest, tried, classes) if rest.ones is None else tried
    if rest.n > FEW_EXAMPLES and (ties := slopes(rest, tried, rng)) is not None:
        tried = best_apart(rest, approach(rest, ties, tried, choose_labels(rest, tried, classes)), classes)
    polished, spare = tried.tensor_split([max(POLISHED_GUESSES, rest.n // 4)])
    return polished, spare


def best_apart(mixture: Mixture, z: Tensor, classes: Tensor) -> Tensor:
    """The best guesses, and of guesses that are almost alike the best alone.

    Guesses z [g, n], those that some label fits best first; of two that are nearly parallel the better one.

    >>> from unbatch.numerics.unmix.made import made_mixture
    >>> mixture, z, y = made_mixture(4)
    >>> len(best_apart(mixture, torch.cat([z, 1.001 * z]), torch.arange(4)))
    4
    """
    z = z[z.isfinite().all(1)]
    order = label_misfits(mixture, z, classes).amin(1).argsort()
    unit, gone = torch.nn.functional.normalize(z, dim=1), torch.zeros(len(z), dtype=torch.bool, device=z.device)
    kept = []
    for i in order.tolist():
        if not gone[i]:
            kept.append(i)
            gone |= (unit @ unit[i]).abs() > SAME_COSINE
    return z[kept]


def by_signs(
    whole: Mixture,
    starts: Sequence[tuple[str, GuessMaker | Descent]],
    rng: torch.Generator,
    classes: Tensor,
    attempts: int,
    tick: Tick,
) -> Separation:
    """Every example of a relu network's mixture, by exact dual vectors.

    The piecewise linear way: exact dual vectors one by one; all of them together give the examples, Z = Q^-1.

    Examples not found yet are orthogonal to the dual vectors that are, which makes the next guesses easier.

    >>> from unbatch.numerics.unmix.made import made_mixture
    >>> rng = torch.Generator().manual_seed(0)
    >>> def random(mixture, rng):
    ...     return torch.randn(40, mixture.n, generator=rng, dtype=torch.float64)
    >>> mixture, z, y = made_mixture(3, torch.relu)
    >>> found = by_signs(mixture, [("random", random)], rng, torch.arange(4), 3, lambda share: True)
    >>> bool(torch.cdist(z, found.z).amin(1).max() < 1e-6)
    True
    """
    n = whole.n
    many = whole.classes > RESIDUAL_COLUMNS and zeroed(
        whole, rng
    )  # residuals of so many unknowns fit anything but rows of zeros
    need, zeros = _needed(whole, 0 if many else RESIDUAL_COLUMNS), many or layered(whole, rng)
    need += max((0.5 if zeros else 1.0) - need, 0.0) / 4  # towards an example's share: mixtures lie just above chance
    Q, Z = whole.U.new_zeros(0, n), whole.U.new_zeros(0, n)  # dual vectors found, and the guesses that led to them
    log: list[dict[str, object]] = []
    misses, settles, settled = 0, 0, False
    guesses = Q
    if n == 1:  # a line: nothing to isolate
        Q, Z = whole.U.new_ones(1, 1), whole.scaled(whole.U.new_ones(1, 1))
    while n > 1 and misses < attempts * len(starts) and tick(len(Q) / n):
        if len(Q) == n or (misses and not settled and len(Q) > n / 2):
            Q, Z, done = settle(whole, Q, Z, zeros)
            log.append({"start": "settle", "left": n - len(Q), "guesses": len(Z), "found": len(Q)})
            settled, settles = True, settles + 1
            if done or settles == 2 * attempts:
                break
            continue
        name, start = starts[misses % len(starts)]
        rest = whole.isolated(Q)
        if isinstance(start, Descent):
            labels = choose_labels(whole, Z, classes) if len(Z) else _no_labels(whole, classes)
            proceed = partial(tick, len(Q) / n)
            tried = start(rest, start.labels(Z, labels), rng, proceed, softened(rest, DESCENT_SHARPNESS)) @ rest.basis
            q, tried, chosen = _isolated(whole, rest, whole.scaled(tried), Q, classes, need, zeros)
        else:
            begun = start(rest, rng) @ rest.basis
            open_ = whole.weighed and whole.classes and not len(Q) and whole.ones is not None
            for mixture in (whole, whole.unweighed()) if open_ else (whole,):
                rest = mixture.isolated(Q)
                tried = (
                    torch.cat([begun, -begun])
                    if whole.ones is None
                    else placed(mixture, begun, classes, within=rest.basis)
                )
                q, tried, chosen = _isolated(mixture, rest, tried, Q, classes, need, zeros)
                if len(chosen):
                    whole = mixture
                    break
        log.append({"start": name, "left": n - len(Q), "guesses": len(tried), "found": len(chosen)})
        misses, settled = (0, False) if len(chosen) else (misses + 1, settled)
        guesses = tried
        Q, Z = torch.cat([Q, q[chosen]]), torch.cat([Z, tried[chosen]])
    if len(Q) < n:
        return in_part(whole, Q, Z, classes, log, guesses)
    return _whole(whole, Z, classes, log)


def _isolated(
    whole: Mixture, rest: Mixture, tried: Tensor, Q: Tensor, classes: Tensor, need: float, zeros: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Dual vectors q [g, n] beside guesses [g, n], and which of them are new examples'; once more from softened guesses."""
    most, (q, share) = whole.n - len(Q), isolate(whole, tried, zeros=zeros)
    order = _fitting(share, need)
    chosen = distinct(Q * whole.S, q * whole.S, order)[:most]
    if len(chosen) < rest.n / 4:
        sharper = soften(whole, tried, classes, rest.basis)
        again, share = isolate(whole, sharper, zeros=zeros)
        q, tried = torch.cat([q[chosen], again]), torch.cat([tried[chosen], sharper])
        order = torch.cat([torch.arange(len(chosen)).to(order), len(chosen) + _fitting(share, need)])
        chosen = distinct(Q * whole.S, q * whole.S, order)[:most]
    return q, tried, chosen


def _whole(whole: Mixture, z: Tensor, classes: Tensor, log: list[dict[str, object]]) -> Separation:
    """All examples z [n, n] at once: their labels, refined, and held against the whole gradient.

    At first as if each counted as assumed; where that leaves something, how much each does is found as well.
    """
    best = Separation(z[:0], _no_labels(whole, classes), log, z[:0], joint=True)
    for mixture in [whole, whole.unweighed()] if whole.weighed and whole.classes else [whole]:
        found = z if mixture.ones is not None else placed(mixture, z, classes, finer=8)
        y = choose_labels(mixture, found, classes) if mixture.classes else choose_targets(mixture, found)
        found, y, _ = refine_jointly(mixture, found, y, steps=20)
        if explained(mixture, found, y):
            return replace(best, z=found, labels=y, weighed=mixture.weighed)
        kept = accept(mixture, found, y)
        if len(kept) > len(best.z):
            best = replace(best, z=found[kept], labels=y[kept], weighed=mixture.weighed)
    return best


def by_patterns(
    whole: Mixture,
    two: Switches,
    starts: Sequence[tuple[str, GuessMaker | Descent]],
    rng: torch.Generator,
    classes: Tensor,
    attempts: int,
    tick: Tick,
) -> Separation:
    """Every example of the mixture of a network with one layer of switches, by their patterns.

    One layer of switches: every guess under every label leads to a pattern, and the patterns to exact dual vectors.

    Examples not found yet are orthogonal to the dual vectors that are; their patterns are not known ones.

    >>> from unbatch.numerics.unmix.made import made_mixture
    >>> rng = torch.Generator().manual_seed(0)
    >>> def random(mixture, rng):
    ...     return torch.randn(40, mixture.n, generator=rng, dtype=torch.float64)
    >>> mixture, z, y = made_mixture(3, torch.relu)
    >>> two = switches(mixture, rng)
    >>> found = by_patterns(mixture, two, [("random", random)], rng, torch.arange(4), 3, lambda share: True)
    >>> bool(torch.cdist(z, found.z).amin(1).max() < 1e-6)
    True
    """
    n, Q, misses = whole.n, whole.U.new_zeros(0, whole.n), 0
    known = torch.zeros(0, whole.U.shape[0], dtype=torch.bool, device=whole.U.device)
    log: list[dict[str, object]] = []
    ways = [(name, start) for name, start in starts if not isinstance(start, Descent)]
    while len(Q) < n and misses < attempts * len(ways) and tick(len(Q) / n):
        name, start = ways[misses % len(ways)]
        rest = whole.isolated(Q)
        tried = start(rest, rng) @ rest.basis
        tried = torch.cat([tried, -tried]) if whole.ones is None else placed(whole, tried, classes, within=rest.basis)
        best = label_misfits(whole, tried, classes).topk(min(LABELS_TRIED, len(classes)), largest=False).indices
        guesses, labels = tried.repeat_interleave(best.shape[1], 0), classes[best].flatten()
        corners = relax(whole, rest, two, guesses, labels)
        for deeper in range(DEEPER_TURNS + 1):
            if deeper:
                corners = turned(whole, rest, two, corners, SHORT_PROGRAMS)
            near = apart(corners, known, rest.n, near=NEAR_PATTERN / 4**misses)  # at last even of twins
            near = apart(turned(whole, rest, two, near, LONG_PROGRAMS), known, rest.n, near=NEAR_PATTERN / 4**misses)
            if len(near.x) > rest.n / 2:
                break
        ends = [(near.pattern, near.delta)]
        if rest.n <= len(whole.U) * FREE_SHARE:  # few unknowns for as many signs: then guesses are better than programs
            ends.append(own(two, rest.before(near.x), near.delta))
        if rest.n <= LAST_EXAMPLES:
            ends.append(own(two, whole.before(guesses), whole.F(guesses, labels)))
        q, pattern, share = finish(whole, two, *(torch.cat(each) for each in zip(*ends, strict=True)))
        chosen = distinct(Q * whole.S, q * whole.S, _fitting(share, max(SURE_SHARE, _needed(whole))))[: n - len(Q)]
        count = sum(len(each) for each, _ in ends)
        log.append({"start": name, "left": rest.n, "guesses": len(guesses), "near": count, "found": len(chosen)})
        misses = 0 if len(chosen) else misses + 1
        Q, known = torch.cat([Q, q[chosen]]), torch.cat([known, pattern[chosen]])
    if len(Q) < n:
        Z = inside(whole, two, known, left_open(Q)) if len(Q) else Q
        return in_part(whole, Q / (Q * Z).sum(1, keepdim=True), Z, classes, log)
    return _whole(whole, whole.scaled(torch.linalg.pinv(Q, rtol=1e-13).T), classes, log)


def by_rising(
    whole: Mixture,
    starts: Sequence[tuple[str, GuessMaker | Descent]],
    rng: torch.Generator,
    classes: Tensor,
    attempts: int,
    tick: Tick,
) -> Separation:
    """Every example of the mixture of a deep leaky relu network, by kinks that are rounded less and less.

    Where no delta is zero and kinks above change every row, signs isolate nothing. But between its kinks the network is
    smooth: polished on networks that come near it, examples end on the right side of nearly every kink, so that deltas
    are right, while z itself is open (the deltas see it through the outputs alone). All deltas together give it, Z =
    Q^-1, and all examples are polished together in the same way.

    >>> from unbatch.numerics.unmix.made import made_mixture
    >>> rng = torch.Generator().manual_seed(0)
    >>> def random(mixture, rng):
    ...     return torch.randn(20, mixture.n, generator=rng, dtype=torch.float64)
    >>> mixture, z, y = made_mixture(3, torch.nn.functional.leaky_relu)
    >>> found = by_rising(mixture, [("random", random)], rng, torch.arange(4), 3, lambda share: True)
    >>> bool(torch.cdist(z, found.z).amin(1).max() < 1e-6)
    True
    """
    n, misses = whole.n, 0
    Q, Z = whole.U.new_zeros(0, n), whole.U.new_zeros(0, n)
    blunt = near = Z  # guesses still to be sharpened, and the dual vectors they have
    log: list[dict[str, object]] = []
    ways = [(name, start) for name, start in starts if not isinstance(start, Descent)]
    while len(Q) < n and misses < attempts * len(ways) and tick(len(Q) / n):
        rest = whole.isolated(Q)
        if again := len(blunt) > 0:  # what is found leaves their guesses fewer directions
            name, tried = "again", whole.scaled(blunt @ rest.basis.T @ rest.basis)
        else:
            name, start = ways[misses % len(ways)]
            tried = whole.scaled(start(rest, rng) @ rest.basis)
            tried = (best_apart(whole, tried, classes) if whole.classes else tried)[: max(POLISHED_GUESSES, n)]
            tried = placed(whole, tried, classes, within=rest.basis) if whole.ones is None else tried
        tried, labels = risen(whole, tried, classes, rest.basis, RISING_SHARPNESS[again:])
        q, order = _ranked(whole, tried, labels)
        outside = misfits(whole, tried, labels)[0]
        chosen = distinct(Q * whole.S, q * whole.S, order[outside[order] < SHARP_MISFIT], alike=ALIKE_RISEN)[
            : n - len(Q)
        ]
        log.append({"start": name, "left": n - len(Q), "guesses": len(tried), "found": len(chosen)})
        Q, Z = torch.cat([Q, q[chosen]]), torch.cat([Z, tried[chosen]])
        near = distinct(Q * whole.S, q * whole.S, order, alike=ALIKE_RISEN)
        blunt, near = (tried[near], q[near]) if len(chosen) else (Z[:0], q[near])
        if len(chosen):
            misses, few = 0, min(len(Q), n - 1)  # the last ones are the least sure
            if few and n - few <= max(1, whole.targets // 2):
                found = in_part(whole, Q[:few], Z[:few], classes, log)
                if len(found.z):
                    return found
            continue
        misses += not again
        if n - len(Q) <= len(near):  # blunt ones are all there is of some
            best = _risen_together(whole, torch.cat([Q, near])[:n], classes, log)
            if len(best.z) == n:
                return best
    return _risen_together(whole, Q, classes, log) if len(Q) == n else in_part(whole, Q, Z, classes, log)


def _ranked(whole: Mixture, tried: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Dual vectors [g, n] of polished guesses, and the numbers of those that are in an example's basin, best first."""
    F = whole.F(tried, labels)
    outside, excess, _ = misfits(whole, tried, labels)
    good = (outside < RISEN_MISFIT) & (excess.abs() < RISEN_MISFIT)
    order = outside.argsort()
    return whole.dual(F) / (whole.dual(F) * tried).sum(1, keepdim=True), order[good[order]]


def in_part(
    whole: Mixture,
    Q: Tensor,
    Z: Tensor,
    classes: Tensor,
    log: list[dict[str, object]],
    guesses: Tensor | None = None,
) -> Separation:
    """Those of a piecewise linear network's examples that their dual vectors Q [f, n] and their outputs tell.

    From guesses Z [f, n] of them, where two fewer of the n are missing than there are classes: each then has its own few
    unknowns, and is polished on networks whose kinks are rounded less and less. None where more are missing.

    >>> from unbatch.numerics.unmix.made import made_mixture
    >>> mixture, z, y = made_mixture(6, torch.relu)
    >>> Q = mixture.dual(mixture.F(z, y))
    >>> near = z + 0.01 * torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> found = in_part(mixture, Q[:4], near[:4], torch.arange(4), [])
    >>> torch.allclose(found.z, z[:4]), len(in_part(mixture, Q[:3], near[:3], torch.arange(4), []).z)
    (True, 0)
    """
    spare = Z if guesses is None else torch.cat([Z, guesses])
    none = Separation(Z[:0], _no_labels(whole, classes), log, spare, joint=True)
    held = (Q.isfinite() & Z.isfinite()).all(1)  # a guess may be orthogonal to its own dual vector
    Q, Z = Q[held], Z[held]
    while len(Q) and whole.n - len(Q) <= whole.targets and whole.weighed and whole.classes:
        inverse, own = torch.linalg.pinv(Q, rtol=1e-13), left_open(Q)
        z = whole.scaled(Z + (torch.eye(len(Q)).to(Q) - Z @ Q.T) @ inverse.T)
        z = risen(whole, z, classes, own)[0]
        z, y, _ = polish(
            whole, z, choose_labels(whole, z, classes), damping=1e-9, target=0.0, within=own, geodesic=False
        )
        outside, excess, _ = misfits(whole, z, y)
        sharp = (outside < SHARP_MISFIT) & (excess.abs() < RISEN_MISFIT)
        sharp[accept(whole, z, y)] = True  # as sharp as a coarse gradient is
        near = sharp.nonzero()[:, 0]
        found, y = z[near], y[near]
        for _ in range(PART_STEPS):  # by which dual vectors that are nearly right become so
            if not len(found) or not bool((part := KnownPart(whole, found, y)).determined.all()):
                found, y = found[:0], y[:0]
                break
            found = found + part.newton()
        kept = accept(whole, found, y).sort().values
        if len(found) and len(kept) == len(found):
            return replace(none, z=found, labels=y, guesses=guesses)
        if len(near) == len(Q) and not 0 < len(kept) < len(Q):
            break
        near = near[kept] if len(kept) else near
        Q, Z = Q[near], z[near]
    return none


def risen(
    whole: Mixture, z: Tensor, classes: Tensor, basis: Tensor, rising: Sequence[float] = RISING_SHARPNESS
) -> tuple[Tensor, Tensor]:
    """Guesses z [g, n] polished one by one on networks whose kinks are rounded less and less, and their labels.

    >>> from unbatch.numerics.unmix.made import made_mixture
    >>> mixture, z, y = made_mixture(3, torch.nn.functional.leaky_relu)
    >>> bool((risen(mixture, z, torch.arange(4), mixture.basis)[1] == y).all())
    True
    """
    labels = _no_labels(whole, classes)
    for sharpness in rising:
        soft = softened(whole, sharpness)
        labels = choose_labels(soft, z, classes) if whole.classes else choose_targets(soft, z)
        z, labels, _ = polish(soft, z, labels, steps=RISING_STEPS, within=basis, geodesic=False)
    return z, labels


def _rounds(mixture: Mixture, rng: torch.Generator) -> bool:
    """Whether the network's kinks are of a kind that can be rounded."""
    z = mixture.scaled(torch.randn(2, mixture.n, generator=rng, dtype=torch.float64).to(mixture.U))
    y = some_labels(mixture, 2)
    return not torch.equal(softened(mixture, DESCENT_SHARPNESS).F(z, y), mixture.F(z, y))


def _risen_together(whole: Mixture, Q: Tensor, classes: Tensor, log: list[dict[str, object]]) -> Separation:
    """All examples of nearly right dual vectors Q [n, n]."""
    z = whole.scaled(torch.linalg.pinv(Q, rtol=1e-13).T)
    for sharpness in RISING_SHARPNESS[2:]:
        soft = softened(whole, sharpness)
        labels = choose_labels(soft, z, classes) if whole.classes else choose_targets(soft, z)
        z, labels, _ = refine_jointly(soft, z, labels, steps=RISING_STEPS)
    return _whole(whole, z, classes, log)


def soften(whole: Mixture, z: Tensor, classes: Tensor, basis: Tensor) -> Tensor:
    """Guesses improved on a network whose kinks are rounded off.

    z [g, n] polished on the equation of the network with its kinks rounded, more sharply step by step.

    >>> from unbatch.numerics.unmix.made import made_mixture
    >>> mixture, z, y = made_mixture(3, torch.relu)
    >>> soften(mixture, z, torch.arange(4), mixture.basis).shape
    torch.Size([3, 3])
    """
    for sharpness in KINK_SHARPNESS:
        soft = softened(whole, sharpness)
        labels = choose_labels(soft, z, classes) if whole.classes else choose_targets(soft, z)
        z = polish(soft, z, labels, steps=8, within=basis, geodesic=False)[0]  # the true z solves it only roughly
    return z


def settle(whole: Mixture, Q: Tensor, Z: Tensor, zeros: bool) -> tuple[Tensor, Tensor, bool]:
    """Dual vectors and guesses made consistent with each other.

    Dual vectors Q and guesses Z [f, n] held against each other until they stand still; those that clash are dropped.

    q_j . z_i = [i = j] corrects the guesses (gives them, if f = n), and better guesses have better signs: a mixture of
    two examples that share most signs passes for one only until the others are known. Third: whether all n stand.

    >>> from unbatch.numerics.unmix.made import made_mixture
    >>> mixture, z, y = made_mixture(3, torch.relu)
    >>> Q, found, whole = settle(mixture, mixture.dual(mixture.F(z, y)), z, zeros=False)
    >>> whole, torch.allclose(found, z)
    (True, True)
    """
    n, noise = whole.n, 10 * whole.noise / float(whole.S[-1])
    for _ in range(SETTLING_ROUNDS):
        inverse = torch.linalg.pinv(Q, rtol=1e-13)  # [n, f]
        z = whole.scaled(Z + (torch.eye(len(Q)).to(Q) - Z @ Q.T) @ inverse.T)
        q, share = isolate(whole, z, zeros=zeros)
        kept = distinct(Q[:0], q * whole.S, share.argsort(descending=True))
        kept = kept[share[kept] > (0.6 if zeros else 0.9) * share.median()]  # the share of zeros differs by example
        still = len(kept) == len(Z) and float((z - Z).norm()) < (1e-9 + noise) * float(Z.norm())
        Q, Z = q[kept], z[kept]
        if still or len(kept) < len(z):
            break
    return Q, Z, len(Q) == n and still


def _no_labels(mixture: Mixture, classes: Tensor) -> Tensor:
    return classes[:0] if mixture.classes else mixture.U.new_zeros(0, mixture.targets)


def _needed(mixture: Mixture, columns: int = RESIDUAL_COLUMNS) -> float:
    """Share of rows that must fit a dual vector exactly to be more than its unknowns can reach."""
    m, n = mixture.U.shape
    return (n + min(mixture.targets, columns) + 20) / m


def _fitting(share: Tensor, need: float) -> Tensor:
    """Numbers of the candidates whose share of fitting rows is above what chance gives, best first."""
    order = share.argsort(descending=True)
    return order[share[order] > need]


def softened(mixture: Mixture, sharpness: float) -> Mixture:
    """A mixture seen through rounded kinks.

    The same mixture seen through a network whose kinks are rounded.

    >>> from unbatch.numerics.unmix.made import made_mixture
    >>> mixture, z, y = made_mixture(4, torch.relu)
    >>> bool((softened(mixture, 8.0).F(z, y) - mixture.F(z, y)).abs().max() > 1e-6)
    True
    """
    mode, deltas = Softened(sharpness), mixture.deltas

    def rounded(before: Tensor, y: Tensor) -> Tensor:
        with mode:
            return deltas(before, y)

    return replace(mixture, deltas=rounded)


def distinct(known: Tensor, tried: Tensor, order: Tensor, *, alike: float = 1e-6) -> Tensor:
    """Which vectors are new.

    Those of tried [g, n] numbered in `order` that are parallel neither to a known row [f, n] nor to one before them;
    `alike` is 1 - the cosine of those that are.

    >>> distinct(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1]))
    tensor([1])
    """
    rows = [torch.nn.functional.normalize(known, dim=1)] if len(known) else []
    unit, kept = torch.nn.functional.normalize(tried, dim=1), []
    for i in order.tolist():
        if not rows or float((torch.cat(rows) @ unit[i]).abs().max()) < 1 - alike:
            kept.append(i)
            rows.append(unit[i : i + 1])
    return torch.tensor(kept, dtype=torch.long, device=tried.device)
