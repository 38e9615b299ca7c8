"""Matching: the search for inputs whose simulated update comes nearest to the one that was sent."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from unbatch.errors import NotApplicable, Unknown
from unbatch.inversion.batch_statistics import heard_statistics
from unbatch.inversion.rounds import sharpened
from unbatch.inversion.search_point import Candidate, Unknowns, in_precision
from unbatch.inversion.view import View
from unbatch.numerics.search import matching
from unbatch.numerics.search.least_squares import minimise_by_products, resized
from unbatch.numerics.search.softening import Softened, has_kinks
from unbatch.progress import tick
from unbatch.reconstruction import Reconstruction

STEPS_A_RESTART = {  # first-order ones; the papers' own
    "default": 4000,
    "dlg": 6000,
    "inverting-gradients": 4800,
    "batch-norm-inversion": 40_000,
}
PRIOR_DRAWS = 64  # of the prior, whose mean a batch-norm-inversion starts from
EXPLAINED_SHARE = 1e-4  # share of |update|^2 left from which on the match alone decides between candidates
LARGEST_DRAWN_SHARE = 0.1  # the same at most, where noise is known to make it
SOLVED_SHARE = 1e-9  # the same, for success: above the rounding of a float32 update, far below any wrong picture
# sharpness of the rounded kinks, rung by rung; inf is the network itself
SHARPNESS_LADDER = (2.0, 30.0, 100.0, 300.0, math.inf, 1000.0, math.inf)
GENTLE_SHARPNESS_LADDER = (10.0, 30.0, 100.0, 300.0, 1000.0, math.inf)
STARTS_IN_SPAN = 16  # in the span of the first layer's update, where one takes about a second

Preset = Literal["default", "dlg", "inverting-gradients", "batch-norm-inversion"]


@dataclass(frozen=True, kw_only=True)
class InversionTerms:
    """Weights of the terms that batch-norm-inversion adds up; by default as published.

    match (sum over tensors of |update - simulated|) + statistics (`BatchStatistics.misfit`) + variation (`rough_length`)
    + size (|x|), the last two of pictures in units of a quarter of their range.

    >>> InversionTerms(match=0.0).statistics
    0.1
    """

    match: float = 1e-3
    statistics: float = 0.1
    variation: float = 1e-4
    size: float = 1e-5


@dataclass(frozen=True, kw_only=True)
class UpdateMatching:
    """Searches for a whole batch whose simulated update is the one that was sent, as the attack gradient-matching does.

    `preset`: ours, or a published method. `iterations`: first-order steps a restart, None for the preset's own.
    `restarts`: starts, later ones only while none is exact. `tv`: weight of total variation, for pictures only.
    `statistics`: weight of the misfit of batch statistics in what first-order steps minimise, where running averages were
    sent; None for the preset's own, which is 0 but for batch-norm-inversion. `terms`: the other weights of that preset.

    >>> import unbatch
    >>> from unbatch.models.small import build
    >>> rng = torch.Generator().manual_seed(0)
    >>> model = build("mlp", (6,), 3, width=20, activation="gelu", rng=rng)
    >>> x, y = torch.rand(2, 6, generator=rng), torch.tensor([0, 2])
    >>> seen, truth = unbatch.observe(model, torch.nn.functional.cross_entropy, x, y)
    >>> found = UpdateMatching().run(View.of(seen), rng)
    >>> torch.allclose(found.inputs, x.double(), atol=1e-3), found.trace["labels"], found.trace["residual"] < 1e-5
    (True, 'counted', True)
    """

    preset: Preset = "default"
    iterations: int | None = None
    restarts: int = 1
    tv: float = 0.01
    statistics: float | None = None
    terms: InversionTerms = InversionTerms()

    def run(self, view: View, rng: torch.Generator) -> Reconstruction:
        """Searches until its steps or its time are spent, and returns the best guess.

        The trace tells how well it matches (`residual`), whether that is a solution (`converged`), and whence labels come.
        Raises NotApplicable: nothing can be matched here, or no batch statistics where they are asked for; the message says
        why.
        """
        problems = self.problems(view)
        problem = problems[0]
        if self._weighs_statistics:
            _ = problem.statistics  # raises in words before any search
        planned, count, begun = len(problems) * self.restarts * self._steps, 0, time.monotonic()
        best: Candidate | None = None
        history: list[float] = []
        finals: dict[int, float] = {}
        ends: dict[int, float] = {}
        for candidate in self._guesses(problems, rng):
            count += 1
            best = candidate if best is None or candidate.loss < best.loss else best
            finals[candidate.restart] = min(candidate.loss, finals.get(candidate.restart, math.inf))
            ends[candidate.restart] = time.monotonic() - begun
            history.append(best.loss)
            if not tick(min(count / planned, 1.0), best.loss):
                break
        if best is None:
            raise RuntimeError("a search ended without its start; this is a defect of unbatch.")
        residual = view.obs.residual(best.inputs, in_precision(best.labels, problem.seen[0].dtype))
        solved = (best.loss if problem.law else residual**2) < _solved(problem)
        found = Reconstruction(
            inputs=best.inputs,
            labels=None if best.fresh else best.read_labels(view.labels, solved),
            trace={
                "preset": self.preset,
                "iterations": count,
                "phase": best.phase,
                "loss": history[:: -(-len(history) // 200)],
                "restarts": list(finals.values()),
                "seconds": [end - start for start, end in zip([0.0, *ends.values()], ends.values(), strict=False)],
                "converged": solved,
                "residual": residual,
                "labels": best.source,
            },
        )
        if (
            best.phase in ("signed Adam", "batch-norm-inversion") or best.source == "optimised"
        ):  # its prior counts for more than the match
            return found
        box = view.knowledge.get("input_range", (-math.inf, math.inf))
        inputs = sharpened(view.obs, found, rng).inputs
        return found if inputs is None else replace(found, inputs=inputs.clamp(*box))

    def problem(self, view: View, dtype: torch.dtype | None = None) -> Unknowns:
        """What is unknown and to be matched, in the model's precision or `dtype`: the first of `problems`."""
        return self.problems(view, dtype)[0]

    def problems(self, view: View, dtype: torch.dtype | None = None) -> list[Unknowns]:
        """What is unknown and to be matched: one problem, or one for each way to label the batch if those are tried.

        Raises NotApplicable: the inputs are tokens, nothing was sent, or no guesses fit the model and the loss.
        """
        if view.takes_tokens:
            raise NotApplicable(
                "the inputs are tokens, which are no real numbers to optimise over; the presets tag and lamp search over "
                "the vectors that the model looks up for them."
            )
        if not any(bool(tensor.any()) for tensor in view.update.values()):
            raise NotApplicable("the update is zero everywhere, so there is nothing to match.")
        try:
            return Unknowns.each(view, self.preset, dtype)
        except (Unknown, NotApplicable):  # it read what it did not declare: a defect, and nothing about the exchange
            raise
        except ValueError as error:
            raise NotApplicable(f"its guesses do not fit the model and the loss: {error}") from error

    def search(self, view: View, rng: torch.Generator) -> Iterator[Candidate]:
        """Every guess as it is made, restart after restart, for a caller who measures progress.

        Raises NotApplicable as `run` does.
        """
        return self._guesses(self.problems(view), rng)

    def _guesses(self, problems: Sequence[Unknowns], rng: torch.Generator) -> Iterator[Candidate]:
        glances = [(0, problem, True) for problem in problems if len(problems) > 1 and self.preset == "default"]
        whole = [(r, problem, False) for r, problem in itertools.product(range(self.restarts), problems)]
        for restart, problem, glance in (*glances, *whole):
            best = math.inf
            ours = self.preset == "default"
            for candidate in self._ours(problem, rng, glance=glance) if ours else self._published(problem, rng):
                best = min(best, candidate.loss)
                yield replace(candidate, restart=restart)
            if best < SOLVED_SHARE:
                return

    @property
    def _weighs_statistics(self) -> bool:
        return bool(self._terms.statistics if self.preset == "batch-norm-inversion" else self.statistics)

    @property
    def _terms(self) -> InversionTerms:
        return self.terms if self.statistics is None else replace(self.terms, statistics=self.statistics)

    @property
    def _steps(self) -> int:
        return self.iterations or STEPS_A_RESTART[self.preset]

    def _published(self, problem: Unknowns, rng: torch.Generator) -> Iterator[Candidate]:
        start = problem.start(rng, 1.0)
        if self.preset == "batch-norm-inversion":
            start = _of_the_prior(problem, start)
            found = matching.noisy_adam(
                lambda v: self._inversion(problem, v), start, rng, steps=self._steps, box=problem.box
            )
        elif self.preset == "dlg":
            found = matching.lbfgs(
                lambda v: matching.squared_difference(problem.update(v), problem.seen), start, steps=self._steps
            )
        else:
            found = matching.signed_adam(
                lambda v: self._distance(problem, v), start, steps=self._steps, box=problem.box
            )
        for loss, point in found:
            yield problem.candidate(loss, point, start, self.preset)

    def _ours(self, rough: Unknowns, rng: torch.Generator, *, glance: bool = False) -> Iterator[Candidate]:
        """Least squares in the span and outside, and where they fail signed Adam before them; a `glance` ends there."""
        fine = _finest(rough)
        start = fine.start(rng, 0.1)
        yield fine.candidate(self._score(fine, start), start, start, "start")
        bent = has_kinks(fine.clean, start, rng, reach=0.1)
        inside = fine.reduced(rng)
        enough = _explained(fine)
        if inside is not None and (yield from self._in_span(inside, rng, bent)) < enough:
            return
        ladder = [(fine, sharpness) for sharpness in SHARPNESS_LADDER] if bent else [(fine, math.inf)]
        if not bent and rough.seen[0].dtype not in (torch.float16, torch.bfloat16):  # no least squares in three digits
            ladder.insert(0, (rough, math.inf))
        if (yield from self._squares(ladder, start, start, rng, patience=0)) < enough or glance:
            return
        if (yield from self._softly(rough, ladder, rng)):
            return
        point = yield from self._adam(rough, start, soften=bent)
        yield from self._squares(ladder, point, start, rng, patience=1)

    def _softly(
        self, rough: Unknowns, ladder: Sequence[tuple[Unknowns, float]], rng: torch.Generator
    ) -> Generator[Candidate, None, bool]:
        """The first least squares again, for probabilities in place of counted classes; returns whether that solves it.

        More freedom fits more, so nothing that leaves more than rounding counts.
        """
        soft = rough.softened()
        if soft is None or soft.law is not None:
            return False
        fine = soft.to(torch.float64)
        own = torch.Generator().manual_seed(rng.initial_seed())  # what comes after draws as if this had not been tried
        start = fine.start(own, 0.1)
        rungs = [(fine if problem.seen[0].dtype == torch.float64 else soft, b) for problem, b in ladder]
        solved = False
        for candidate in self._squares(rungs, start, start, own, patience=0):
            solved = solved or candidate.loss < _solved(fine)
            yield candidate if candidate.loss < _solved(fine) else replace(candidate, loss=math.inf)
        return solved

    def _in_span(self, problem: Unknowns, rng: torch.Generator, bent: bool) -> Generator[Candidate, None, float]:
        """Least squares from start after start, each from its own sharpness; returns the best score."""
        best = math.inf
        for number in range(STARTS_IN_SPAN if bent and problem.in_span else 2):
            start = problem.start(rng, 0.1)
            rungs = (SHARPNESS_LADDER, GENTLE_SHARPNESS_LADDER)[number % 2] if bent else (math.inf,)
            score = yield from self._squares([(problem, b) for b in rungs], start, start, rng, patience=len(rungs))
            best = min(best, score)
            if best < _solved(problem):
                break
        return best

    def _squares(
        self,
        ladder: Sequence[tuple[Unknowns, float]],
        point: Tensor,
        start: Tensor,
        rng: torch.Generator,
        *,
        patience: int,
    ) -> Generator[Candidate, None, float]:
        """Levenberg-Marquardt, rung by rung on networks with their kinks rounded less; returns the best score.

        Given up after the first rung from `patience` on that leaves more than a quarter of the score.
        """
        last = ladder[-1][0]
        entry = best = self._score(last, point.to(last.seen[0]))
        for rung, (problem, sharpness) in enumerate(ladder):
            soft, seen, candidate = Softened(sharpness), _flat(problem.seen), None
            size, point = seen.norm(), point.to(seen)

            def residual(v: Tensor, /, *, create_graph: bool = False) -> Tensor:
                with soft:  # noqa: B023 (used within this rung only)
                    found = problem.update(v, create_graph=create_graph)  # noqa: B023
                off: Tensor = (_flat(found) - seen) / size  # noqa: B023
                return off

            point = resized(residual, point) if rung else point
            steps, gain = (6, 0.1) if math.isfinite(sharpness) else (60, 1e-3)
            for _, moved in minimise_by_products(residual, point, rng, steps=steps, gain=gain):
                if candidate is None or moved is not point:
                    phase = f"least squares, sharpness {sharpness:g}"
                    point, candidate = moved, problem.candidate(self._score(problem, moved), moved, start, phase)
                    best = min(best, candidate.loss)
                yield candidate
            if (best < _solved(problem) and problem is last) or (rung >= patience and best > entry / 4):
                break
        return best

    def _adam(self, problem: Unknowns, start: Tensor, *, soften: bool) -> Generator[Candidate, None, Tensor]:
        """Signed Adam on cosine distance and total variation, kinks rounded ever less; returns the last point."""
        soft, last = Softened(), int(0.7 * self._steps)
        candidate, point = None, start.to(problem.seen[0])

        def distance(v: Tensor) -> Tensor:
            with soft:
                return self._distance(problem, v)

        found = matching.signed_adam(distance, point, steps=self._steps, box=problem.box)
        for step, (_, point) in enumerate(found):
            if soften and step % 50 == 0:
                soft.sharpen(10.0 ** (1 + step / last) if step < last else math.inf)
            if candidate is None or step % 20 == 0 or step == self._steps:
                candidate = problem.candidate(self._score(problem, point), point, start, "signed Adam")
            yield candidate
        return point

    def _distance(self, problem: Unknowns, point: Tensor) -> Tensor:
        with heard_statistics(problem.obs.model) as heard:
            found = matching.cosine_distance(problem.update(point), problem.seen, problem.size)
        if self.statistics:
            found = found + self.statistics * problem.statistics.misfit(heard)
        return found + self.tv * matching.total_variation(problem.pictures(point)) if problem.image else found

    def _inversion(self, problem: Unknowns, point: Tensor) -> Tensor:
        """The objective of batch-norm-inversion: its terms, the match among them, added up."""
        terms, pictures = self._terms, problem.pictures(point)
        with heard_statistics(problem.obs.model) as heard:
            found = problem.update(point)
        off = [torch.linalg.vector_norm(a - b) for a, b in zip(found, problem.seen, strict=True)]
        value = terms.match * torch.stack(off).sum()
        if terms.statistics:
            value = value + terms.statistics * problem.statistics.misfit(heard)
        if terms.variation and problem.image:
            value = value + terms.variation * matching.rough_length(pictures)
        whole: Tensor = value + terms.size * torch.linalg.vector_norm(pictures)
        return whole

    def _score(self, problem: Unknowns, point: Tensor) -> float:
        """Share of |update|^2 left; above what explains it, where noise can lower it, cosine distance and variation."""
        found = problem.clean(point)
        rest = float(matching.squared_difference(found, problem.seen) / problem.size)
        enough = _explained(problem)
        if rest < enough or problem.in_span or not problem.image:
            return rest
        penalty = matching.cosine_distance(found, problem.seen)
        return enough + float(penalty + self.tv * matching.total_variation(problem.pictures(point)))


def _of_the_prior(problem: Unknowns, point: Tensor) -> Tensor:
    """The point with every input the mean of what the prior draws."""
    view = problem.view
    mean = view.stand_in(PRIOR_DRAWS, torch.Generator().manual_seed(0)).mean(0).to(point)
    d = mean.numel()
    start = point.clone()
    start[:, :d] = ((mean - problem.middle) / problem.scale).flatten()
    return start


def _explained(problem: Unknowns) -> float:
    """The share left from which on the match alone decides: half more than what is drawn, where that is known and small."""
    return max(EXPLAINED_SHARE, min(1.5 * problem.drawn, LARGEST_DRAWN_SHARE))


def _solved(problem: Unknowns) -> float:
    return max(SOLVED_SHARE, min(1.1 * problem.drawn, LARGEST_DRAWN_SHARE))


def _finest(problem: Unknowns) -> Unknowns:
    """The problem in float64; in its own precision, where the model does not run in another."""
    fine = problem.to(torch.float64)
    try:
        fine.clean(fine.start(torch.Generator().manual_seed(0), 0.0))
    except NotApplicable:
        return problem
    return fine


def _flat(update: list[Tensor]) -> Tensor:
    flat: Tensor = torch.cat([tensor.flatten() for tensor in update])
    return flat
