"""Judge: hold what an attack returned against the truth and against chance."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unbatch.case import Setting
from unbatch.domain import Domain, Images, Table, Tokens
from unbatch.label_form import label_words, one_hot_classes
from unbatch.metric import Matching, Metric, match
from unbatch.metrics.psnr import Psnr
from unbatch.metrics.ssim import Ssim
from unbatch.network.dense import layer_inputs
from unbatch.observation import Observation
from unbatch.reconstruction import Reconstruction
from unbatch.reporting.results import Example, Run
from unbatch.reporting.thresholds import COPY_ERROR
from unbatch.reporting.tiers import Tier, tier_of
from unbatch.truth import Truth


@dataclass(frozen=True)
class Judge:
    """Holds what attacks returned against the truth and against chance, by the metrics that mean something of the domain.

    Chance is what as many draws of the domain's prior score, matched in the same way.
    """

    domain: Domain
    metrics: Mapping[str, Metric]

    def fill(
        self, run: Run, found: Reconstruction, obs: Observation, truth: Truth | None, setting: Setting | None
    ) -> None:
        """Write into `run` what the reconstruction is worth; without a truth, what it is.

        Features of a deeper layer are held against the true features: they get an error, but no score as a picture.
        """
        run.guesses, run.layer, run.up_to = len(found), found.layer, sorted(found.up_to)
        run.trace = {key: _plain(value) for key, value in found.trace.items()}
        run.residual = found.trace.get("residual")
        run.words = run.words or str(
            found.trace.get("words", "")
        )  # what the attack says of its answer: why it is not whole, the factor
        if truth is None or setting is None:
            run.examples = [self._returned(found, i) for i in range(len(found))]
            return
        domain, shown = self.domain, not found.layer
        if found.layer:
            features, again = (layer_inputs(obs.model, found.layer, truth.inputs, obs.protocol.mode) for _ in range(2))
            if not torch.allclose(features, again, rtol=1e-2, atol=1e-3 * float(features.abs().max())):
                self._drawn_anew(run, found, len(truth))
                return
            truth = Truth(inputs=features, labels=truth.labels)
            domain = Table(shape=tuple(features.shape[1:]), low=float(features.min()), high=float(features.max()))
        rng = torch.Generator().manual_seed(run.seed)
        matching = match(found, truth, domain)
        guess = _guess(found, truth, domain, len(setting.classes), rng)
        by_chance = match(guess, truth, domain)
        scores, chance = dict[str, Scores](), dict[str, Scores]()
        for name, metric in self.metrics.items():
            try:  # one metric's defect must not cost the others their scores
                own = _scores(metric, found, truth, matching)
                if own is not None:
                    chance[name] = _scores(metric, guess, truth, by_chance) or [None] * len(truth)
                    scores[name] = own
            except Exception as error:
                run.unscored[name] = failure(error)
        errors, tiers = _errors(matching, truth, domain), _tiers(matching, by_chance, truth, domain)
        run.examples = [
            Example(
                index=j,
                scores={name: values[j] for name, values in scores.items()},
                chance={name: values[j] for name, values in chance.items()},
            )
            for j in range(len(truth))
        ]
        for pair, (i, j) in enumerate(zip(matching.found.tolist(), matching.true.tolist(), strict=True)):
            example = run.examples[j]
            example.bound, example.tier = _claim(found, i), tiers.get(j)
            if found.labels is not None:
                example.label = setting.label_name(found.labels[i])
            if matching.inputs is not None:
                x, true = matching.inputs[pair], truth.inputs[j].double().cpu()
                example.error = errors[j]
                example.picture = shown_by(domain.render, x) if shown else None
                example.difference = shown_by(domain.difference, x, true) if shown else None
                example.pieces = next(iter(pieces_by(domain, x[None])), []) if shown else []

    def _drawn_anew(self, run: Run, found: Reconstruction, n: int) -> None:
        """Features that are random, as behind dropout: those that the client drew are gone, so none is scored."""
        run.examples = [self._returned(found, i) if i < len(found) else Example(index=i) for i in range(n)]
        drawn = (
            f"the features at {found.layer!r} are drawn anew in every pass (dropout, or noise), so those of the client "
            "are not known to compare with."
        )
        run.words = f"{run.words} {drawn}".strip()

    def _returned(self, found: Reconstruction, i: int) -> Example:
        own = None if found.layer or found.inputs is None else found.inputs[i : i + 1]
        return Example(  # its tier follows from the bound
            index=i,
            bound=_claim(found, i),
            picture=None if own is None else shown_by(self.domain.render, own[0]),
            pieces=[] if own is None else next(iter(pieces_by(self.domain, own)), []),
            label=label_words(found.labels[i]) if found.labels is not None else None,
        )


Scores = list[float | None]  # by private example; None where it is not matched


def failure(error: Exception) -> str:
    """What failed, in a line of the report.

    >>> failure(ValueError("too small"))
    'ValueError: too small'
    """
    try:
        words = str(error)
    except Exception:  # an error of the user's own class, whose words are code of the user's
        words = "it has no words"
    return f"{type(error).__name__}: {words}"


def shown_by(render: Callable[..., str], *shown: object) -> str:
    """Examples as a domain renders them, or what else is shown; where that fails, why, in its place.

    >>> shown_by(lambda example: str(example.tolist()), torch.ones(1)), shown_by(lambda example: 1 / 0, torch.ones(1))
    ('[1.0]', 'not shown (ZeroDivisionError: division by zero)')
    """
    try:
        return render(*shown)
    except Exception as error:  # a domain's defect must not cost the example its scores
        return f"not shown ({failure(error)})"


def pieces_by(domain: Domain, examples: Tensor) -> list[list[str]]:
    """Examples [n, ...] in pieces, as a domain cuts them; none where that fails: they are rendered whole besides.

    >>> from unbatch.domain import Tokens
    >>> pieces_by(Tokens(shape=(2,), high=9), torch.tensor([[3, 1]]))
    [[' 3', ' 1']]
    """
    try:
        found = [domain.pieces(example) for example in examples]
    except Exception:  # a domain's defect must not cost the examples their scores
        return []
    return found if any(found) else []


def _scores(metric: Metric, found: Reconstruction, truth: Truth, matching: Matching) -> Scores | None:
    """A metric's score of every private example; None where it has nothing to score. One matching for all metrics."""
    if metric.subject == "labels":
        if found.labels is None:
            return None
        values = metric.score(found.labels.cpu()[matching.found], truth.labels.cpu()[matching.true])
    elif matching.inputs is None or found.layer:
        return None
    else:
        values = metric.score(matching.inputs, truth.inputs.double().cpu()[matching.true])
    held: Scores = [None] * len(truth)
    for j, value in zip(matching.true.tolist(), values.tolist(), strict=True):
        held[j] = value
    return held


def _guess(found: Reconstruction, truth: Truth, domain: Domain, classes: int, rng: torch.Generator) -> Reconstruction:
    """As many guesses as the attack made, drawn from the prior: what chance would score."""
    inputs = labels = None
    if found.inputs is not None:
        inputs = domain.prior(len(found), rng).to(truth.inputs.dtype)
    if found.labels is not None:
        hard = one_hot_classes(truth.labels) if truth.labels.ndim > 1 else None
        true = truth.labels if hard is None else hard
        k = max(classes, int(true.max()) + 1, 2) if not true.is_floating_point() else 2
        k = max(k, truth.labels.shape[1]) if hard is not None else k
        labels = torch.randint(k, (len(found), *true.shape[1:]), generator=rng)
    return Reconstruction(inputs=inputs, labels=labels, layer=found.layer, up_to=found.up_to)


def _tiers(matching: Matching, by_chance: Matching, truth: Truth, domain: Domain) -> dict[int, Tier]:
    """By private example that was matched, how near it came, whichever metrics were asked for."""
    if matching.inputs is None:
        return {}
    true = truth.inputs.double().cpu()
    errors, of_chance = _errors(matching, truth, domain), _errors(by_chance, truth, domain)
    if isinstance(domain, Tokens):
        return {j: _token_tier(off) for j, off in errors.items()}
    psnr, ssim, ssim_of_chance = dict[int, float](), dict[int, float](), dict[int, float]()
    if isinstance(domain, Images):
        psnr = _each(Psnr().on(domain), matching, true)
        if any(tier_of(error, psnr=psnr[j]).weight() < Tier.COPY.weight() for j, error in errors.items()):
            measure = Ssim().on(domain)
            ssim, ssim_of_chance = _each(measure, matching, true), _each(measure, by_chance, true)
    return {
        j: tier_of(
            error,
            chance=of_chance.get(j),
            psnr=psnr.get(j),
            ssim=ssim.get(j),
            ssim_of_chance=ssim_of_chance.get(j),
        )
        for j, error in errors.items()
    }


def _token_tier(off: float) -> Tier:
    """Of a sequence whose tokens are wrong by that share: all right, all but a hundredth, or more than half."""
    limits = ((0.0, Tier.EXACT), (COPY_ERROR, Tier.COPY), (0.5, Tier.RECOGNISABLE), (1.0, Tier.NONE))
    return next(tier for most, tier in limits if off <= most)


def _errors(matching: Matching, truth: Truth, domain: Domain) -> dict[int, float]:
    """By private example that was matched, the relative l2 error; of tokens, the share of them that are wrong."""
    if matching.inputs is None:
        return {}
    true = truth.inputs.double().cpu()
    pairs = list(zip(matching.inputs, matching.true.tolist(), strict=True))
    if isinstance(domain, Tokens):
        return {j: float(domain.distance(x[None], true[j][None])) for x, j in pairs}
    return {j: float((x - true[j]).norm() / (true[j].norm() or 1.0)) for x, j in pairs}


def _each(metric: Metric | None, matching: Matching, true: Tensor) -> dict[int, float]:
    if metric is None or matching.inputs is None or not len(matching.true):
        return {}
    values = metric.score(matching.inputs, true[matching.true]).tolist()
    return dict(zip(matching.true.tolist(), values, strict=True))


def _claim(found: Reconstruction, i: int) -> float | None:
    return float(found.bound[i]) if found.bound is not None and bool(found.bound[i].isfinite()) else None


def _plain(value: Any) -> Any:
    """A trace entry as JSON can hold it."""
    if isinstance(value, Tensor):
        return value.tolist() if value.numel() <= 1000 else f"{tuple(value.shape)} numbers"
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(v) for v in value]
    return value if isinstance(value, (str, int, float, bool)) or value is None else shown_by(str, value)
