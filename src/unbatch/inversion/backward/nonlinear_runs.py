"""Nonlinear runs: layers that have no linear way back, or not enough equations alone, read together by Gauss and Newton."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from unbatch.inversion.backward.pullback import ROUNDING_FLOOR, Fit, Pullback
from unbatch.inversion.backward.reading import KnownEquations, Reading, Unreadable
from unbatch.network.chain import Link
from unbatch.numerics.bounds.prior import GaussianPrior
from unbatch.numerics.linear.linsys import MATRIX_ENTRIES
from unbatch.numerics.search.annealing import FIRST_SHARPNESS, annealed
from unbatch.numerics.search.softening import Softened
from unbatch.progress import tick

START_DEVIATION = 0.25  # of a random point around the middle
PRIOR_STARTS = 4  # draws of the prior from which annealing begins
KINKED_LEVELS, SMOOTH_LEVELS = 30, 12  # of annealing, with kinks and without
OPEN_LEVELS, OPEN_DEVIATION, OPEN_STEPS = 6, 1e-3, 1  # without kinks, where a whole set of roots is left open
ROOT_ROUNDINGS = 10.0  # times what nearly the same updates change in a residual: no more than rounding
LONE_RESIDUAL = 1e-8  # what counts as that where there are no such updates
Box = tuple[float, float]  # least and greatest value of the network's inputs


def flat_roots(reading: Reading) -> bool:
    """Whether all inputs near a reading's that solve its equations form one flat set: a search among them adds nothing.

    So it is where pixels reach no layer. Told by one random step along what the equations leave open: they still hold.
    """
    if reading.pullback is None or not reading.fits or not reading.deficit:
        return False
    x = reading.x.flatten()
    draw = torch.rand(1, x.numel(), generator=torch.Generator().manual_seed(0), dtype=x.dtype).to(x) - 0.5
    moved = x + reading.solution.free(draw)[0]
    return float(reading.pullback(moved).norm()) <= ROOT_ROUNDINGS * max(float(reading.system.b.norm()), ROUNDING_FLOOR)


@dataclass(frozen=True)
class OpenRun:
    """Layers that are read together, one example at a time, because no linear system gives their input.

    Equations are known of their output, and the gradients of their weights; their input is where Gauss and Newton find
    both to hold (`Pullback`). The fold makes one where a run has no linear way back or is deficient, and takes the runs
    before into it until their equations suffice.

    >>> from torch import nn
    >>> from unbatch.network.chain import chain
    >>> links = chain(nn.Sequential(nn.Conv2d(1, 2, 1), nn.MaxPool2d(2)).double(), (1, 4, 4))
    >>> output = torch.ones(8, dtype=torch.float64)
    >>> from unbatch.inversion.backward.affine_runs import everything
    >>> run = OpenRun((links[1],), (KnownEquations(everything(output), output, {}),), (0.0, 1.0))
    >>> run.equations(), run.links[0].unknowns, [link.name for link in run.after((links[0],)).links]
    (8, 32, ['0', '1'])
    """

    links: tuple[Link, ...]  # first to last; none yet, if the equations are on the next run's output
    known: tuple[KnownEquations, ...]  # of the output: by the update, then by nearly the same ones
    box: Box  # range of the network's inputs

    def after(self, links: tuple[Link, ...]) -> OpenRun:
        """With the layers before it taken in."""
        return replace(self, links=links + self.links)

    def equations(self, before: Sequence[Link] = ()) -> int:
        """How many equations it has, and the layers `before` it."""
        whole = (*before, *self.links)
        names = {link.called(own) for link in whole for own, _ in link.module.named_parameters()}
        sent = (t.isfinite().sum() for name, t in self.known[0].update.items() if name in names)
        return self.known[0].system.equations + int(sum(sent))

    def too_large(self, before: Sequence[Link] = ()) -> str:
        """Why it cannot be followed down to the network's input, in words; empty where it can."""
        equations, unknowns = self.equations(before), [*before, *self.links][0].unknowns
        if equations * unknowns <= MATRIX_ENTRIES:
            return ""
        return f"the {equations:,} equations from there on for {unknowns:,} numbers are too many for Gauss and Newton"

    def determined(self, last: Link) -> Reading | None:
        """The reading of its input, the output of the activation `last`, where it determines that; None: it stays open.

        Raises Unreadable: a layer draws at random.
        """
        unknowns = self.links[0].unknowns
        if not unknowns <= self.equations() <= MATRIX_ENTRIES / unknowns:
            return None
        zero = torch.zeros(1, *last.before, dtype=torch.float64, device=self.known[0].system.b.device)
        middle = float(last.module(zero).mean())
        draw = torch.randn(unknowns, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        pullbacks = self._pullbacks()
        system = pullbacks[0].system((middle + START_DEVIATION * draw).to(zero))
        if bool(system.b.isfinite().all()) and system.rank() < unknowns:  # and so nearly everywhere
            return None
        reading = self._root(pullbacks, middle, likely=False)
        return reading if reading.deficit == 0 else None

    def likeliest(self) -> Reading:
        """The reading of the network's input, in its box: where equations leave it open, the likeliest picture.

        Raises Unreadable: a layer draws at random.
        """
        return self._root(self._pullbacks(), sum(self.box) / 2, likely=True)

    def _root(self, pullbacks: Sequence[Pullback], middle: float, *, likely: bool) -> Reading:
        """The root of least residual, by Gauss and Newton from a few starts: the first that fits is taken.

        The run's own output, if it has the input's shape, as in a residual block; grey; and if asked for, what is likeliest
        by annealing, from grey and from draws of the prior.
        """
        shape, output = self.links[0].before, self.known[0].system
        flat = torch.full(shape, middle, dtype=torch.float64, device=output.b.device)
        near: list[Callable[[Pullback], Tensor]] = [partial(_near, start=flat)]
        if output.unknowns == output.equations == flat.numel():
            near.insert(0, partial(_near, start=output.pull(output.b[None]).view(shape)))
        prior: list[Callable[[Pullback], Tensor]] = []
        open_ = self.equations() < flat.numel()  # whatever the root: then only the likeliest counts, and it comes first
        if likely:
            rng = torch.Generator().manual_seed(0)
            drawn = START_DEVIATION * torch.randn(PRIOR_STARTS, flat.numel(), generator=rng, dtype=torch.float64).to(
                flat
            )
            prior = [partial(_likeliest, z=z, box=self.box, open_=open_) for z in (torch.zeros_like(drawn[0]), *drawn)]
        found = list[Reading]()
        for start in (*prior, *near) if open_ else (*near, *prior):
            found.append(self._reading(pullbacks[0].solve(start(pullbacks[0]).view(shape), tick), pullbacks))
            enough = found[-1].deficit == 0 or start in prior or not prior or flat_roots(found[-1])
            if (found[-1].fits and enough) or not tick(0.0):
                break
        fits = [each for each in found if each.fits]
        return fits[-1] if fits else min(found, key=lambda each: float(each.system.b.norm()))

    def _pullbacks(self) -> list[Pullback]:
        try:
            return [Pullback(self.links, known.system, known.grad, known.update) for known in self.known]
        except ValueError as error:
            raise Unreadable(str(error)) from error

    def _reading(self, fit: Fit, pullbacks: Sequence[Pullback]) -> Reading:
        shape, x = fit.x.shape, fit.x.flatten()
        moved = [x - fit.solution.inverse(each(x).detach()) for each in pullbacks[1:]]
        r = pullbacks[0](x).detach()
        rounding = max((float((each(x).detach() - r).norm()) for each in pullbacks[1:]), default=LONE_RESIDUAL)
        others = [
            (at.view(1, *shape), own.grad_input(at).view(1, *shape))
            for at, own in zip(moved, pullbacks[1:], strict=True)
        ]
        return Reading(
            self.links,
            fit.x[None],
            pullbacks[0].grad_input(x).view(1, *shape),
            pullbacks[0].system(x),
            fit.solution,
            tuple(others),
            pullbacks[0],
            fit.residual <= ROOT_ROUNDINGS * max(rounding, ROUNDING_FLOOR),
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
    if open_ and not soft.rounds:
        found = search(levels=OPEN_LEVELS, tight=OPEN_DEVIATION, steps=OPEN_STEPS)
    else:
        found = search(levels=KINKED_LEVELS if soft.rounds else SMOOTH_LEVELS)
    return prior.middle + prior.push(found)
