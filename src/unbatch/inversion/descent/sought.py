"""Sought: the inputs of a batch behind a tensor that was told, by searches, Gauss and Newton, each with its bound."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unbatch.inversion.descent.back import Back
from unbatch.inversion.descent.pictures import MOST_SKETCHED, Answers, Misfit, damped, newton, searched
from unbatch.inversion.descent.walk import Told
from unbatch.numerics.bounds.first_order import ERROR_SIGMAS, LARGEST_RADIUS
from unbatch.progress import tick

FOUND = 2e-2  # misfit, relative, of absolute values, below which a search has found its valley
NOISES = 10.0  # times the equations' own noise that may be left over
DRAWS = (
    2,
    8,
)  # of the equations' noise, which show how far it moves the inputs: the more where few directions take it all
ALIKE = 0.1  # cosine of an input's first two moves, above which few directions take it all
RESPONSE_TOLERANCES = 1e-3, 1e-5, 1e-6  # of the linear systems that show it, relative: the next where a probe is lost
RESPONSE_PRODUCTS = 640  # with the Jacobian, at most
LOST_SHARE = 0.05  # of a random direction that the equations may fail to give back
AT_ONCE = 4  # examples that are searched for in one piece, where each has equations of its own


Shaken = Callable[[Tensor, torch.Generator], Tensor]  # inputs -> an error of what the network below gives


@dataclass(eq=False)
class Sought:
    """Inputs [n, *shape] that were sought, the misfits [n] at which their search ended, and their bounds [n].

    A bound is infinite where nothing is claimed; done [n] says whose search is over: Newton's steps ended exactly.
    """

    inputs: Tensor
    misfits: Tensor
    bounds: Tensor
    done: Tensor
    left_over: float = 0.0  # the largest misfit after Newton's steps of those that are done
    noise: float = 0.0  # of the equations, the largest

    @classmethod
    def nothing(cls, start: Tensor) -> Sought:
        """Nothing found yet, and the inputs from which the first search begins."""
        n = len(start)
        endless = torch.full((n,), torch.inf, dtype=torch.float64)
        return cls(start.double(), endless, endless.clone(), torch.zeros(n, dtype=torch.bool))


@dataclass(frozen=True, eq=False)
class Search:
    """What a search goes by: the network `below` the tensor that is `told`, and the spread of its inputs.

    `begin` draws inputs [n, *shape] to begin at, for so many; `shares` are those of the work before and after it. Where
    `below` itself is known up to an error, `shaken` draws by how much what it gives may be off. `few`: the tensor has fewer
    equations than the inputs have numbers, so that nothing is found without the gradients below.
    """

    below: nn.Module
    told: Told
    scale: float
    begin: Callable[[int], Tensor]
    shares: tuple[float, float]
    rng: torch.Generator
    shaken: Shaken | None = None
    few: bool = False

    @property
    def apart(self) -> bool:
        """Whether each example has equations of its own."""
        mixes = any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in self.below.modules())
        return self.told.rows is None and not mixes

    def sought(self, steps: int, attempts: int, back: Back | None) -> Sought:
        """The inputs, after up to so many searches; each has twice the steps of the one before.

        Examples that have equations of their own are sought a few at a time, and those that were not found again. Where
        none was found, or equations mix the examples, all are sought together, and by the gradients `back` below, too.
        """
        n = len(self.told.noise) if self.told.rows is None else self.told.shape[0]
        found = Sought.nothing(self.begin(n))
        for attempt in range(attempts):
            left = (~found.done).nonzero().flatten().tolist()
            helped = back if (attempt or self.few) and len(left) == n else None  # it takes three times as long
            at_once = AT_ONCE if self.apart and helped is None else n
            for at in range(0, len(left), at_once):
                self._some(found, left[at : at + at_once], steps * 2**attempt, helped, (attempt, at / len(left)))
                if not tick(self._share(attempt, (at + at_once) / len(left))):
                    return found
            if bool(found.done.all()):
                break
        return found

    def _share(self, attempt: int, part: float) -> float:
        before, after = self.shares
        return before + (after - before) * (1 - 0.5**attempt * (1 - 0.5 * min(part, 1.0)))

    def _some(
        self, found: Sought, examples: list[int], steps: int, back: Back | None, where: tuple[int, float]
    ) -> None:
        """One search for some of the examples, and Newton's steps for those whose valley it found."""
        told = self.told.of(examples) if self.apart else self.told
        misfit = Misfit(self.below, told)
        point = self.begin(len(examples)).to(told.seen.device)
        values = torch.full((len(examples),), torch.inf)
        for values, point in searched(  # noqa: B007, B020
            misfit.single(), point, self.scale, steps=steps, back=None if back is None else back.single()
        ):
            if not tick(self._share(*where), float(values.max())):
                break
        values = values.cpu().double().expand(len(examples))
        for j, i in enumerate(examples):
            if values[j] < found.misfits[i]:
                found.misfits[i], found.inputs[i] = values[j], point[j].to(found.inputs)
        groups = [[j] for j in range(len(examples))] if self.apart else [list(range(len(examples)))]
        for group in groups:
            if not self.few and all(float(values[j]) < FOUND for j in group):
                part = told.of(group) if self.apart else told
                self._finished(found, [examples[j] for j in group], part, point[group].double())
        near = self.few or all(float(value) < FOUND for value in values)
        if (
            back is not None
            and near
            and point.numel() <= MOST_SKETCHED
            and not told.blur
            and not bool(found.done.any())
        ):
            self._solved(found, examples, Misfit(self.below, told, back=back.weighed(point)), point.double())

    def _finished(self, found: Sought, examples: list[int], told: Told, point: Tensor) -> None:
        """Newton's steps to where the equations' own noise is left, and the bounds there.

        The tensor's scale is left to the other equations first, if it is known worse than they are; where these leave the
        inputs open, it counts like them, as it does where norms are blind to the size of what they are given.
        """
        self._solved(found, examples, Misfit(self.below, told), point)
        if told.blur and not bool(found.bounds[examples].isfinite().all()):
            self._solved(found, examples, Misfit(self.below, told, scale_counts=True), point)

    def _solved(self, found: Sought, examples: list[int], misfit: Misfit, point: Tensor) -> None:
        told, size, noise = misfit.told, torch.inf, misfit.noise
        if self.shaken is not None:
            noise = float(torch.tensor(noise).hypot(self.shaken(point, self.rng).norm().cpu() / told.seen.norm().cpu()))
        steps = newton if misfit.back is None else damped
        for size, point in steps(misfit, point):  # noqa: B007, B020
            if not tick(self.shares[1], size) or size <= noise:
                break
        found.noise = max(found.noise, noise)
        if size <= NOISES * noise:
            found.inputs[examples] = point.to(found.inputs)
            found.done[examples], found.left_over = True, max(found.left_over, size)
            if told.blur < LARGEST_RADIUS:
                found.bounds[examples] = _bound(misfit, told, point, size / noise, self.rng, self.shaken)


def _bound(misfit: Misfit, told: Told, x: Tensor, excess: float, rng: torch.Generator, shaken: Shaken | None) -> Tensor:
    """The largest relative error of each input [n], from how far the equations' noise moves it; inf where that is open."""
    answers = Answers(misfit, x)

    def drawn(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=rng, dtype=torch.float64).to(like)

    probe, moves = drawn(x), list[Tensor]()
    seen, lost, tolerance = answers.exact(probe), torch.ones(len(x)), RESPONSE_TOLERANCES[0]
    for tolerance in RESPONSE_TOLERANCES:
        back = answers(seen, products=RESPONSE_PRODUCTS, tolerance=tolerance) - probe
        lost = back.flatten(1).norm(dim=1) / probe.flatten(1).norm(dim=1)
        if bool((lost < LOST_SHARE).all()):
            break

    def answer(r: Tensor) -> Tensor:
        return answers(r, products=RESPONSE_PRODUCTS, tolerance=tolerance).flatten(1)

    while len(moves) < DRAWS[0] or (len(moves) < DRAWS[1] and _alike(moves)):
        draw = _noise(told, drawn)
        draw = misfit.drawn(draw if shaken is None else draw + shaken(x, rng).view_as(draw), drawn)
        unit = float(draw.norm())
        moves.append(answer(draw / unit) * unit)
    off = misfit(x).detach()
    left = answer(off / off.norm()) * float(off.norm())
    spread = torch.stack(moves).square().sum(2).mean(0).sqrt()
    scaled = torch.zeros_like(left)  # one direction among thousands: it is asked for by itself
    if told.blur and told.rows is None:
        scaled = answer(told.seen.flatten() / misfit.size) * misfit.surely * told.blur
    far = (
        ERROR_SIGMAS * (max(1.0, excess) * spread + scaled.norm(dim=1))
        + 2 * left.norm(dim=1)
        + torch.finfo(torch.float64).eps * x.flatten(1).norm(dim=1)
    )
    relative = far / x.flatten(1).norm(dim=1).clamp_min(1e-300)
    return torch.where((lost < LOST_SHARE) & (relative < LARGEST_RADIUS), relative, torch.inf).cpu()


def _noise(told: Told, drawn: Callable[[Tensor], Tensor]) -> Tensor:
    """A draw of what a tensor's noise may be, from a standard normal one of any tensor's shape.

    Where norms blur its scale, whole channels are off as much again: a norm's statistic is rounded once for all that it
    divides.
    """
    found = drawn(told.noise) * told.noise
    if told.blur and told.rows is None:
        channels = told.seen.new_ones(*told.seen.shape[:2], *[1] * (told.seen.dim() - 2))
        found += told.noise.norm() / told.seen.norm() * drawn(channels) * told.seen
    return found


def _alike(moves: list[Tensor]) -> bool:
    """Whether the first two moves of an input go nearly the same way: then two draws do not tell how far a third goes."""
    return bool((torch.cosine_similarity(moves[0], moves[1]).abs() > ALIKE).any())
