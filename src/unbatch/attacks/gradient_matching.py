"""gradient-matching: inputs whose simulated update comes nearest to the one that was sent, by optimisation."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar, Literal, final

import torch
from pydantic import Field
from torch import Tensor

from unbatch.attack import Attack, Demo, Guarantee
from unbatch.loss import draw_labels, identify
from unbatch.network import dense_layers, forward
from unbatch.numerics import matching
from unbatch.numerics.label_counts import impulse, label_counts
from unbatch.numerics.least_squares import levenberg_marquardt, resized
from unbatch.numerics.softening import Softened, kinked
from unbatch.observation import PROTOCOL_FIELDS, Knowledge, Observation, Reconstruction
from unbatch.progress import tick

EVALUATIONS = {"default": 4000, "dlg": 6000, "inverting-gradients": 4800}  # of a restart; the papers' own
EXPLAINED = 1e-4  # share of |update|^2 left from which on the match alone decides between candidates
SHARPNESS = (2.0, 30.0, 100.0, 300.0, math.inf, 1000.0, math.inf)
SOLVED = 1e-9  # the same, for success: above the rounding of a float32 update, far below any wrong picture


@dataclass(frozen=True)
class Candidate:
    """A guess on the way; of one preset's candidates the one with the lowest loss is the best."""

    loss: float
    inputs: Tensor  # [n, *input_shape]
    labels: Tensor  # as the loss takes them
    restart: int = 0
    phase: str = ""
    fresh: bool = False  # its soft labels are still those of the start


@final
class GradientMatching(Attack):
    """argmin over inputs of the distance between the simulated and the observed update.

    default: |g(x) - g|^2 by Levenberg-Marquardt in float64 from near the middle of the range; on networks with kinks
    through ever sharper rounded ones; where that leaves a rest, signed Adam on cosine distance and total variation.
    dlg: |g(x) - g|^2 by L-BFGS from normal noise. inverting-gradients: cosine distance and total variation by signed
    Adam within the range, in units of a quarter of it. Guesses are chosen by the match (and total variation) alone.

    Labels are used where known, else counted from the head's gradient, else (dlg: always) optimised as soft ones.
    """

    family: ClassVar[str] = "matching"
    guarantee: ClassVar[Guarantee] = Guarantee.HEURISTIC
    paper: ClassVar[str] = "Zhu, Liu, Han, NeurIPS 2019 (dlg); Geiping et al., NeurIPS 2020 (inverting-gradients)"
    needs: ClassVar[frozenset[str]] = frozenset({"input_shape", "batch_size"})
    uses: ClassVar[frozenset[str]] = (
        frozenset({"labels", "input_range", "domain", "buffers", "clients"}) | PROTOCOL_FIELDS
    )
    demo: ClassVar[Demo] = Demo(
        case="digits:batch=2,activation=gelu,width=100", floors={"psnr": 60.0}, knows=("labels",)
    )

    preset: Annotated[
        Literal["default", "dlg", "inverting-gradients"], Field(description="ours, or a published method")
    ] = "default"
    iterations: Annotated[
        int | None, Field(gt=0, description="first-order steps a restart; none takes the preset's own")
    ] = None
    restarts: Annotated[int, Field(gt=0, description="starts; later ones only while none is exact")] = 1
    tv: Annotated[float, Field(ge=0, description="weight of total variation, for pictures only")] = 0.01

    def obstacle(self, obs: Observation) -> str | None:
        if obs.knowledge.get("domain") == "tokens":
            return "the inputs are tokens, which are no real numbers to optimise over."
        if not any(bool(tensor.any()) for tensor in obs.update.values()):
            return "the update is zero everywhere, so there is nothing to match."
        try:
            _Problem.of(obs, self.preset)
        except ValueError as error:
            return f"its guesses do not fit the model and the loss: {error}"
        return None

    def run(self, obs: Observation, rng: torch.Generator) -> Reconstruction:
        planned, count, begun = self.restarts * self._steps, 0, time.monotonic()
        best: Candidate | None = None
        history: list[float] = []
        finals: dict[int, float] = {}
        ends: dict[int, float] = {}
        for candidate in self.search(obs, rng):
            count += 1
            best = candidate if best is None or candidate.loss < best.loss else best
            finals[candidate.restart] = min(candidate.loss, finals.get(candidate.restart, math.inf))
            ends[candidate.restart] = time.monotonic() - begun
            history.append(best.loss)
            if not tick(min(count / planned, 1.0), best.loss):
                break
        assert best is not None  # every search yields its start
        problem = _Problem.of(obs, self.preset)
        residual = obs.residual(best.inputs, _like(best.labels, problem.seen[0].dtype))
        return Reconstruction(
            inputs=best.inputs,
            labels=None if best.fresh else problem.answer(best.labels),
            trace={
                "preset": self.preset,
                "iterations": count,
                "phase": best.phase,
                "loss": history[:: -(-len(history) // 200)],
                "restarts": list(finals.values()),
                "seconds": [end - start for start, end in zip([0.0, *ends.values()], ends.values(), strict=False)],
                "converged": residual**2 < SOLVED,
                "residual": residual,
                "labels": problem.source,
            },
        )

    def search(self, obs: Observation, rng: torch.Generator) -> Iterator[Candidate]:
        """Every guess as it is made, restart after restart."""
        for restart in range(self.restarts):
            best = math.inf
            for candidate in self._ours(obs, rng) if self.preset == "default" else self._published(obs, rng):
                best = min(best, candidate.loss)
                yield replace(candidate, restart=restart)
            if best < SOLVED:
                return

    @property
    def _steps(self) -> int:
        return self.iterations or EVALUATIONS[self.preset]

    def _published(self, obs: Observation, rng: torch.Generator) -> Iterator[Candidate]:
        problem = _Problem.of(obs, self.preset)
        start = problem.start(rng, 1.0)
        if self.preset == "dlg":
            found = matching.lbfgs(
                lambda v: matching.squared_difference(problem.update(v), problem.seen), start, steps=self._steps
            )
        else:
            found = matching.signed_adam(
                lambda v: self._distance(problem, v), start, steps=self._steps, box=problem.box
            )
        for loss, point in found:
            yield problem.candidate(loss, point, start, self.preset)

    def _ours(self, obs: Observation, rng: torch.Generator) -> Iterator[Candidate]:
        rough, fine = _Problem.of(obs, self.preset), _Problem.of(obs, self.preset, torch.float64)
        start = fine.start(rng, 0.1)
        yield fine.candidate(self._score(fine, start), start, start, "start")
        bent = kinked(fine.clean, start, rng, reach=0.1)
        ladder = [(fine, sharpness) for sharpness in SHARPNESS] if bent else [(rough, math.inf), (fine, math.inf)]
        if (yield from self._squares(ladder, start, start, rng, patience=0)) < EXPLAINED:
            return
        point = yield from self._adam(rough, start, soften=bent)
        yield from self._squares(ladder, point, start, rng, patience=1)

    def _squares(
        self,
        ladder: Sequence[tuple[_Problem, float]],
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
            for _, moved in levenberg_marquardt(residual, point, rng, steps=steps, gain=gain):
                if candidate is None or moved is not point:
                    phase = f"least squares, sharpness {sharpness:g}"
                    point, candidate = moved, problem.candidate(self._score(problem, moved), moved, start, phase)
                    best = min(best, candidate.loss)
                yield candidate
            if (best < SOLVED and problem is last) or (rung >= patience and best > entry / 4):
                break
        return best

    def _adam(self, problem: _Problem, start: Tensor, *, soften: bool) -> Generator[Candidate, None, Tensor]:
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

    def _distance(self, problem: _Problem, point: Tensor) -> Tensor:
        found = matching.cosine_distance(problem.update(point), problem.seen)
        return found + self.tv * matching.total_variation(problem.pictures(point)) if problem.image else found

    def _score(self, problem: _Problem, point: Tensor) -> float:
        """Share of |update|^2 left; above EXPLAINED, where it can be lowered by noise, cosine distance and variation."""
        found = problem.clean(point)
        rest = float(matching.squared_difference(found, problem.seen) / problem.size)
        if rest < EXPLAINED or not problem.image:
            return rest
        penalty = matching.cosine_distance(found, problem.seen)
        return EXPLAINED + float(penalty + self.tv * matching.total_variation(problem.pictures(point)))


@dataclass(frozen=True)
class _Problem:
    """What is unknown as a point [n, d + t], inputs in `scale` from `middle` beside t soft labels, and what it explains."""

    obs: Observation
    middle: float
    scale: float
    box: float | None
    labels: Tensor  # fixed, or an example of their form
    source: str  # "known", "counted" or "optimised"
    squash: Literal["softmax", "sigmoid", "none"] = "none"
    seen: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, obs: Observation, preset: str, dtype: torch.dtype | None = None) -> _Problem:
        """Raises ValueError: the model or the loss does not take such inputs or soft labels."""
        known, first = obs.knowledge, next(obs.model.parameters())
        dtype = dtype or first.dtype
        low, high = known.get("input_range", (-2.0, 2.0))
        unit = preset == "dlg" or not math.isfinite(high - low)
        middle, scale = (0.0, 1.0) if unit else ((low + high) / 2, (high - low) / 4)
        outputs = forward(obs.model, torch.full((known.batch_size, *known.input_shape), middle))
        labels, source = known.get("labels"), "known"
        if labels is None and preset != "dlg":
            labels, source = _counted(obs, middle, scale), "counted"
        squash: Literal["softmax", "sigmoid", "none"] = "none"
        if labels is None:
            labels, source = draw_labels(obs.loss, outputs, torch.Generator().manual_seed(0)), "optimised"
            form = identify(obs.loss, tuple(outputs.shape), device=outputs.device)
            if form is not None and form.name == "squared-error" and not labels.is_floating_point():
                labels = outputs  # it may as well have been real targets
            elif not labels.is_floating_point():
                labels, squash = outputs.softmax(1), "softmax"
            elif form is not None and form.name == "binary-cross-entropy":
                squash = "sigmoid"
            try:
                obs.loss(outputs, labels)
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                raise ValueError(f"the labels are unknown and the loss takes no soft ones ({error}).") from None
        model = copy.deepcopy(obs.model).to(dtype)
        if "buffers" in known:
            known = known | Knowledge(buffers={name: _like(b, dtype) for name, b in known.buffers.items()})
        update = {name: tensor.to(dtype) for name, tensor in obs.update.items()}
        moved = replace(obs, model=model, update=update, knowledge=known)
        box = None if unit or "input_range" not in known else 2.0
        return cls(moved, middle, scale, box, _like(labels.to(obs.device), dtype), source, squash, [*update.values()])

    @property
    def image(self) -> bool:
        domain = self.obs.knowledge.get("domain")
        return domain == "images" or (domain is None and len(self.obs.knowledge.input_shape) == 3)

    @property
    def size(self) -> Tensor:
        return torch.stack([tensor.square().sum() for tensor in self.seen]).sum()

    def start(self, rng: torch.Generator, spread: float) -> Tensor:
        """Normal noise of that spread."""
        d = math.prod(self.obs.knowledge.input_shape)
        t = self.labels[0].numel() if self.source == "optimised" else 0
        noise = torch.randn(self.obs.knowledge.batch_size, d + t, generator=rng, dtype=torch.float64)
        return (spread * noise).to(self.seen[0])

    def pictures(self, point: Tensor) -> Tensor:
        shape = self.obs.knowledge.input_shape
        return point[:, : math.prod(shape)].reshape(len(point), *shape)

    def targets(self, point: Tensor) -> Tensor:
        if self.source != "optimised":
            return self.labels
        free = point[:, math.prod(self.obs.knowledge.input_shape) :].reshape(self.labels.shape)
        return free.softmax(1) if self.squash == "softmax" else free.sigmoid() if self.squash == "sigmoid" else free

    def update(self, point: Tensor, *, create_graph: bool = True) -> list[Tensor]:
        inputs = self.middle + self.scale * self.pictures(point)
        return list(self.obs.simulate(inputs, self.targets(point), create_graph=create_graph).values())

    def clean(self, point: Tensor) -> list[Tensor]:
        return self.update(point, create_graph=False)

    def candidate(self, loss: float, point: Tensor, start: Tensor, phase: str) -> Candidate:
        inputs = self.middle + self.scale * self.pictures(point)
        inputs = inputs.clamp(*self.obs.knowledge.input_range) if "input_range" in self.obs.knowledge else inputs
        d = math.prod(self.obs.knowledge.input_shape)
        fresh = self.source == "optimised" and torch.equal(point[:, d:], start[:, d:].to(point))
        return Candidate(loss, inputs, self.targets(point), phase=phase, fresh=fresh)

    def answer(self, labels: Tensor) -> Tensor:
        """Labels as a user reads them: soft ones, and targets that are nearly one-hot, as the likeliest class."""
        if self.source != "optimised":
            return labels
        if self.squash == "none" and labels.ndim == 2 and labels.shape[1] > 1:
            likeliest = torch.nn.functional.one_hot(labels.argmax(1), labels.shape[1])
            return labels.argmax(1) if float((labels - likeliest).abs().max()) < 0.1 else labels
        return {"softmax": lambda: labels.argmax(1), "sigmoid": labels.round, "none": lambda: labels}[self.squash]()


def _counted(obs: Observation, middle: float, scale: float) -> Tensor | None:
    """The labels [n] that the head's gradient counts under cross entropy, in order of class; None where it cannot.

    Probabilities are estimated from the model's outputs on noise in the range.
    """
    known, protocol = obs.knowledge, obs.protocol
    n, steps = known.batch_size, protocol.steps(known.batch_size)
    head = next((layer for layer in dense_layers(obs.model, known.input_shape) if layer.head), None)
    if head is None or head.weight not in obs.update or (steps and protocol.optimiser != "sgd"):
        return None
    noise = torch.randn(64, *known.input_shape, generator=torch.Generator().manual_seed(0))
    outputs = forward(obs.model, middle + scale * noise)
    form = identify(obs.loss, tuple(outputs.shape), device=outputs.device)
    if form is None or form.name != "cross-entropy" or form.scale <= 0:
        return None
    decay, factor = 1.0, 1.0
    if steps:
        rates = {k: getattr(protocol, k) for k in ("learning_rate", "momentum", "weight_decay")}
        decay, kicks = impulse(steps, **rates)
        factor = float(kicks.sum())
    sent = {k: obs.update[k] / known.get("clients", 1) for k in (head.weight, head.bias) if k and k in obs.update}
    if steps:
        sent = {k: (decay - 1) * obs.model.get_parameter(k).detach() - tensor for k, tensor in sent.items()}
    batch = min(protocol.local_batch_size or n, n) if steps else n
    factor *= form.scale * (1 if form.reduction == "mean" else batch) / n
    expected = n * outputs.softmax(1).mean(0)
    weight, bias = sent[head.weight], sent.get(head.bias or "")
    estimate = label_counts(weight, bias, n, factor=factor, expected=expected, smoothing=form.smoothing)[2]
    return torch.arange(len(estimate)).repeat_interleave(estimate)


def _flat(update: list[Tensor]) -> Tensor:
    flat: Tensor = torch.cat([tensor.flatten() for tensor in update])
    return flat


def _like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
