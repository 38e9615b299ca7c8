"""Curve: a run of layers that is not linear, read backward by Gauss and Newton."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from unbatch.inversion.backward.pullback import ROUNDING_FLOOR, Fit, Pullback
from unbatch.inversion.backward.reading import Known, Reading, Unreadable
from unbatch.network.chain import Link
from unbatch.numerics.bounds.prior import GaussianPrior
from unbatch.numerics.linear.linsys import MATRIX_ENTRIES
from unbatch.numerics.search.annealing import FIRST_SHARPNESS, annealed
from unbatch.numerics.search.softening import Softened
from unbatch.progress import tick

SPREAD = 0.25  # of a random point around the middle
DRAWN = 4  # starts of the prior
LEVELS = {True: 30, False: 12}  # of annealing, with kinks and without
OPEN = 6, 1e-3, 1  # levels, least deviation and steps of it without kinks, where a whole set of roots is left open
FITS = 10.0  # times what nearly the same updates change in a residual: no more than rounding
NEAR = 1e-8  # where there are none
Box = tuple[float, float]


def flat_roots(reading: Reading) -> bool:
    """Whether all roots near this one are one flat set, as where pixels reach no layer: then a search adds nothing."""
    if reading.pullback is None or not reading.fits or not reading.deficit:
        return False
    x = reading.x.flatten()
    draw = torch.rand(1, x.numel(), generator=torch.Generator().manual_seed(0), dtype=x.dtype).to(x) - 0.5
    moved = x + reading.solution.free(draw)[0]
    return float(reading.pullback(moved).norm()) <= FITS * max(float(reading.system.b.norm()), ROUNDING_FLOOR)


class Curve:
    """A run of links that is not linear, first to last, below what is known of its output; one example.

    `known` is what the update says of the output, and then what nearly the same updates say of it.
    """

    def __init__(self, links: list[Link], known: Sequence[Known]) -> None:
        self.links, self.known = links, known

    def equations(self, before: Sequence[Link] = ()) -> int:
        """Those of the run and the links `before` it."""
        names = tuple(f"{link.name}." for link in (*before, *self.links))
        output, _, update = self.known[0]
        sent = (t.isfinite().sum() for name, t in update.items() if name.startswith(names))
        return output.equations + int(sum(sent))

    def too_large(self, before: Sequence[Link] = ()) -> str:
        """Why the run cannot be followed down to the network's input, in words; empty where it can."""
        equations, unknowns = self.equations(before), [*before, *self.links][0].unknowns
        if equations * unknowns <= MATRIX_ENTRIES:
            return ""
        return f"the {equations:,} equations from there on for {unknowns:,} numbers are too many for Gauss and Newton"

    def determined(self, last: Link) -> Reading | None:
        """The reading of the run's input, the output of `last`, where the run alone determines it; None: it stays open."""
        unknowns = self.links[0].unknowns
        if not unknowns <= self.equations() <= MATRIX_ENTRIES / unknowns:
            return None
        zero = torch.zeros(1, *last.before, dtype=torch.float64, device=self.known[0][0].b.device)
        middle = float(last.module(zero).mean())
        at = middle + SPREAD * torch.randn(unknowns, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        system = self._pullbacks()[0].system(at.to(zero))
        if bool(system.b.isfinite().all()) and system.rank() < unknowns:  # and so nearly everywhere
            return None
        reading = self.solved(middle)
        return reading if reading.deficit == 0 else None

    def solved(self, middle: float, box: Box | None = None) -> Reading:
        """The root of least residual, by Gauss and Newton from a few starts: the first that fits is taken.

        The run's own output, if it has the input's shape, as in a residual block; grey; and for the network's input, in its
        `box`, what is likeliest by annealing, from grey and from draws of the prior.
        """
        pullbacks = self._pullbacks()
        shape, output = self.links[0].before, self.known[0][0]
        flat = torch.full(shape, middle, dtype=torch.float64, device=output.b.device)
        near: list[Callable[[Pullback], Tensor]] = [partial(_near, start=flat)]
        if output.unknowns == output.equations == flat.numel():
            near.insert(0, partial(_near, start=output.pull(output.b[None]).view(shape)))
        likely: list[Callable[[Pullback], Tensor]] = []
        open_ = self.equations() < flat.numel()  # whatever the root: then only the likeliest counts, and it comes first
        if box is not None:
            rng = torch.Generator().manual_seed(0)
            drawn = SPREAD * torch.randn(DRAWN, flat.numel(), generator=rng, dtype=torch.float64).to(flat)
            likely = [partial(_likeliest, z=z, box=box, open_=open_) for z in (torch.zeros_like(drawn[0]), *drawn)]
        found = list[Reading]()
        for start in (*likely, *near) if open_ else (*near, *likely):
            found.append(self._reading(pullbacks[0].solve(start(pullbacks[0]).view(shape), tick), pullbacks))
            enough = found[-1].deficit == 0 or start in likely or not likely or flat_roots(found[-1])
            if (found[-1].fits and enough) or not tick(0.0):
                break
        fits = [each for each in found if each.fits]
        return fits[-1] if fits else min(found, key=lambda each: float(each.system.b.norm()))

    def _pullbacks(self) -> list[Pullback]:
        try:
            return [Pullback(self.links, *known) for known in self.known]
        except ValueError as error:
            raise Unreadable(str(error)) from error

    def _reading(self, fit: Fit, pullbacks: Sequence[Pullback]) -> Reading:
        shape, x = fit.x.shape, fit.x.flatten()
        moved = [x - fit.solution.inverse(each(x).detach()) for each in pullbacks[1:]]
        r = pullbacks[0](x).detach()
        rounding = max((float((each(x).detach() - r).norm()) for each in pullbacks[1:]), default=NEAR)
        others = [
            (at.view(1, *shape), own.grad_input(at).view(1, *shape))
            for at, own in zip(moved, pullbacks[1:], strict=True)
        ]
        return Reading(
            tuple(self.links),
            fit.x[None],
            pullbacks[0].grad_input(x).view(1, *shape),
            pullbacks[0].system(x),
            fit.solution,
            tuple(others),
            pullbacks[0],
            fit.residual <= FITS * max(rounding, ROUNDING_FLOOR),
        )


def _near(pullback: Pullback, start: Tensor) -> Tensor:
    """Without the gradients first: what is left is continuous in x, while those jump at kinks."""
    return pullback.without_gradients().solve(start, tick).x


def _likeliest(pullback: Pullback, z: Tensor, box: Box, open_: bool) -> Tensor:
    """By annealing from the prior's z [d]."""
    prior = GaussianPrior(pullback.links[0].before, box)
    soft = Softened()

    def at(z: Tensor, sharpness: float) -> Tensor:
        """x, with the kinks rounded by what comes to them there."""
        x = prior.middle + prior.push(z)
        if soft.sharpness != sharpness:
            soft.sharpen(sharpness)
            with soft:
                pullback.output(x)
        return x

    def residual(z: Tensor, sharpness: float) -> Tensor:
        x = at(z, sharpness)
        with soft:
            return pullback(x).detach()

    def jacobian(z: Tensor, sharpness: float) -> Tensor:
        x = at(z, sharpness)
        with soft:
            return prior.pull(pullback.system(x).matrix())

    at(z, FIRST_SHARPNESS)
    search = partial(annealed, residual, jacobian, z, tick=tick)
    levels, tight, steps = OPEN
    if open_ and not soft.rounds:
        return prior.middle + prior.push(search(levels=levels, tight=tight, steps=steps))
    return prior.middle + prior.push(search(levels=LEVELS[soft.rounds]))
