"""Guard: a client's last look at its own update before it is sent."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from unbatch.attack import Attack
from unbatch.auditing.client import published
from unbatch.auditing.inspection import before_of, signs_of
from unbatch.auditing.run import audit
from unbatch.defence import Defence, Stack
from unbatch.domain import domain_of
from unbatch.errors import UnbatchError
from unbatch.inversion.received import Received
from unbatch.knowledge import Knowledge
from unbatch.loss import Loss
from unbatch.network.dense import forward
from unbatch.observation import Observation
from unbatch.plugin import OneOrMore
from unbatch.protocol import Protocol, Update
from unbatch.reporting.inspection import SignRead
from unbatch.reporting.results import Audit, Status
from unbatch.reporting.thresholds import NEAR_CHANCE
from unbatch.reporting.tiers import Outcome, Tier
from unbatch.truth import Truth
from unbatch.update import as_update

_RELATIVE = "relative-leakage"  # the metric
PLANTED = ("refuse", "freeze", "ignore")  # what to do with a model that looks planted
UNEXPLAINED = 0.01  # of an undefended update, beyond which another batch or protocol is behind it


class Leak(UnbatchError, RuntimeError):  # noqa: N818 (what happened, named for it)
    """The update must not be sent: `examples` (numbers in the batch) leak, or nothing could be tried; `audit` has all."""

    def __init__(self, words: Sequence[str], examples: Sequence[int], audit: Audit) -> None:
        super().__init__("this update must not be sent: " + " ".join(words))
        self.words, self.examples, self.audit = list(words), list(examples), audit

    def __reduce__(self) -> tuple[type[Leak], tuple[list[str], list[int], Audit]]:
        return type(self), (self.words, self.examples, self.audit)  # it may have to leave a client's process


def guard(
    update: Update | Iterable[Any],
    *,
    model: nn.Module,
    loss: Loss,
    inputs: Tensor,
    labels: Tensor,
    protocol: Protocol | None = None,
    defences: OneOrMore[Defence] = (),
    knowledge: Knowledge | None = None,
    max_psnr: float = 20.0,
    max_relative_leakage: float | None = None,
    attacks: OneOrMore[Attack] | None = None,
    seconds: float = 30.0,
    seed: int = 0,
    planted: Literal["refuse", "ignore"] = "refuse",
    before: nn.Module | Mapping[str, Any] | None = None,
) -> Audit:
    """Attack a client's own update before it is sent; raise Leak where it gives away more than the threshold.

    `update` is given in any form that `as_update` takes. `model` is the global model before the client's step, `inputs`
    [n, ...] and `labels` the private batch behind the update. `protocol`, `defences` and `knowledge` say what the server
    knows; the defences are in the update already. An example leaks if an attack recovers it exactly, or to more than
    `max_psnr` dB and 3 dB above what prior draws score; of what has no PSNR, also as a copy. Pictures also leak beyond a
    `max_relative_leakage` (metric `relative-leakage`; the filter of Hatamizadeh et al. has 1), where one is given.
    `attacks` default to all that only look, cheapest first, and share `seconds`. Where no defence changed the update, the
    batch must explain it: attacks are judged by it, and one that is not behind the update would let every leak pass.

    Where the model has signs of being planted (`unbatch.inspect`), the update must not be sent either, unless the layers
    that have them were frozen and did not move. `before` is the model of the round before or its state, by which a layer
    that was put in its place shows. `planted="ignore"` looks at no signs.

    Returns the audit where nothing leaks. Its runs say which attacks were cut short or left out: seconds are on the clock,
    and on a busy machine less is tried in them. That these attacks failed is no proof that others do: only a bound for any
    attacker or a privacy accountant is (analyses, dp-sgd). To import it takes torch, numpy, pydantic and safetensors
    alone; to run it, what its attacks and metrics take as well (scipy, torchmetrics; unmix scikit-learn).
    Raises UnbatchError: what is given does not fit together. Leak: also where no attack could run, or one failed.

    >>> model, x, y = nn.Linear(4, 2), Tensor([[0.1, 0.2, 0.3, 0.4]]), Tensor([0]).long()
    >>> loss = nn.functional.cross_entropy
    >>> loss(model(x), y).backward()
    >>> gradient = {name: p.grad for name, p in model.named_parameters()}
    >>> try:
    ...     audit = guard(gradient, model=model, loss=loss, inputs=x, labels=y, attacks="bias-ratio")
    ... except Leak as leak:
    ...     print(leak)
    this update must not be sent: Example 0 is recovered exactly.
    """
    _check(inputs, labels, max_psnr, max_relative_leakage, seconds, planted)
    protocol = protocol or Protocol()
    stack = Stack.of(defences)
    sent = as_update(model, update)
    known = stack.told(published(inputs, protocol) | domain_of(inputs).public(), sent) | (knowledge or Knowledge())
    obs, truth = (
        Observation(model=model, loss=stack.loss(loss), update=sent, knowledge=known),
        Truth(inputs=inputs, labels=labels),
    )
    record = audit(obs, truth=truth, attacks=attacks, analyses=(), seeds=(seed,), total_budget=seconds)
    if not stack.defences:
        refuse_other_batch(record.clients[0].residual, model, inputs, protocol)
    words, examples = _leaks(record, max_psnr, max_relative_leakage)
    words += _not_known(record, by_default=attacks is None)
    if planted == "refuse":
        moved = {name for name, tensor in sent.items() if bool(tensor.any())}  # what is frozen gives nothing away
        words += planted_words(s for s in planted_signs(model, loss, inputs, labels, before) if moved & set(s.weights))
    if words:
        raise Leak(words, examples, record)
    return record


def _check(
    inputs: Tensor, labels: Tensor, max_psnr: float, max_relative_leakage: float | None, seconds: float, planted: str
) -> None:
    """Raises UnbatchError: what is asked of the guard would let everything pass, or is no question."""
    if not (isinstance(inputs, Tensor) and isinstance(labels, Tensor)):
        raise UnbatchError(f"inputs and labels are tensors, not {type(inputs).__name__} and {type(labels).__name__}.")
    if max_relative_leakage is not None and (math.isnan(max_relative_leakage) or domain_of(inputs).name != "images"):
        raise UnbatchError(
            f"max_relative_leakage is {max_relative_leakage}; give a number such as 1.0, and of pictures."
        )
    if math.isnan(max_psnr) or not 0 < seconds < math.inf:
        raise UnbatchError(f"max_psnr is {max_psnr} and seconds {seconds}; give a number of dB, and a time above 0.")
    check_planted(planted, ("refuse", "ignore"))


def _not_known(record: Audit, *, by_default: bool) -> list[str]:
    """What failed or could not run, so that the guard does not know; `by_default` no attack was named."""
    words = list[str]()
    failed = sorted({run.attack for run in record.runs if run.status == Status.FAILED})
    if failed:
        words.append(f"{', '.join(failed)} failed, so what it would have found is not known.")
    unscored = sorted({name for run in record.runs for name in run.unscored})
    if unscored:
        words.append(f"{', '.join(unscored)} failed, so how near the attacks came is not known.")
    ran = [run for run in record.runs if run.ran]
    if not ran or (by_default and record.outcome is Outcome.NOTHING_RAN):
        why = " ".join(dict.fromkeys(run.words for run in record.runs if run.words and not run.ran))
        what = "for its examples could run" if ran else "could run on it"
        words.append(f"No attack {what}, so nothing is known" + (f": {why}" if why else "."))
    return words


def planted_signs(
    model: nn.Module,
    loss: Loss,
    inputs: Tensor | None = None,
    labels: Tensor | None = None,
    before: nn.Module | Mapping[str, Any] | None = None,
) -> list[SignRead]:
    """The signs of planting that a received model raises; without a batch by its weights alone.

    >>> model = nn.Linear(16, 8)
    >>> with torch.no_grad():
    ...     _ = model.weight.fill_(1 / 16)
    >>> sorted({name for sign in planted_signs(model, nn.functional.cross_entropy) for name in sign.weights})
    ['bias', 'weight']
    """
    earlier = None if before is None else before_of(model, before)
    signs, _ = signs_of(Received.of(model, before=earlier, inputs=inputs, labels=labels, loss=loss))
    return [sign for sign in signs if sign.raised]


def planted_words(signs: Iterable[SignRead]) -> list[str]:
    """A sentence for each sign.

    >>> planted_words(planted_signs(nn.Linear(4, 2), nn.functional.cross_entropy))
    []
    """
    return [f"The model looks planted: {sign}." for sign in signs]


def check_planted(planted: str, known: Sequence[str]) -> None:
    """Raises UnbatchError where nobody could tell what is to be done with a model that looks planted.

    >>> check_planted("freeze", PLANTED)
    """
    if planted not in known:
        raise UnbatchError(f"planted={planted!r} is not known; it is one of {', '.join(known)}.")


def refuse_other_batch(residual: float | None, model: nn.Module, inputs: Tensor, protocol: Protocol) -> None:
    """Raises UnbatchError where a batch leaves more of an update unexplained than a batch that is behind it can.

    `residual` is |update - simulated| / |update| of an update that no defence changed; None, or a model that draws random
    numbers in its forward, tells nothing.

    >>> try:
    ...     refuse_other_batch(0.4, nn.Linear(2, 2), torch.ones(1, 2), Protocol())
    ... except UnbatchError as error:
    ...     print(str(error).partition(" Give")[0])
    this batch is not behind this update: it would send one that is 40% off.
    """
    if residual is not None and residual > UNEXPLAINED and not _random(model, inputs, protocol):
        raise UnbatchError(
            f"this batch is not behind this update: it would send one that is {residual:.0%} off. Give the inputs, labels "
            "and model of this step, its protocol, and the defences that changed the update."
        )


def _random(model: nn.Module, inputs: Tensor, protocol: Protocol) -> bool:
    """Whether two runs of the model on the same inputs differ, as with dropout; found by running it."""
    model = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        return not torch.equal(*(forward(model, inputs, protocol.mode) for _ in range(2)))


def _leaks(record: Audit, max_psnr: float, most: float | None) -> tuple[list[str], list[int]]:
    """What leaks of each example, and the examples; pictures also beyond a relative leakage of `most`, if it is given."""
    words, examples = _recovered(record, max_psnr)
    if most is None:
        return words, examples
    more, which = _relative_leaks(record, most)
    return words + more, sorted({*examples, *which})


def _recovered(record: Audit, max_psnr: float) -> tuple[list[str], list[int]]:
    exact = {index for _, index in record.recovered()}
    words = [f"Example {i} is recovered exactly." for i in sorted(exact)]
    near: dict[int, tuple[float, str]] = {}
    scored = set[int]()
    for run in record.runs:
        for e in run.examples:
            score, chance = e.scores.get("psnr"), e.chance.get("psnr")
            scored |= set() if score is None else {e.index}
            if score is None or e.index in exact or score <= max_psnr or score <= (chance or 0.0) + NEAR_CHANCE:
                continue
            near[e.index] = max(near.get(e.index, (0.0, "")), (score, run.attack))
    words += [f"Example {i} is recovered to {score:.1f} dB by {attack}." for i, (score, attack) in sorted(near.items())]
    copies = {i for (_, i), tier in record.tiers().items() if tier is Tier.COPY and i not in scored}
    words += [f"Example {i} is recovered as a copy." for i in sorted(copies)]
    return words, sorted(exact | copies | set(near))


def _relative_leaks(record: Audit, most: float) -> tuple[list[str], list[int]]:
    """Examples that are recovered exactly not among them: `_leaks` names those."""
    exact, worst = {index for _, index in record.recovered()}, dict[int, tuple[float, str]]()
    for run in record.runs:
        for e in run.examples:
            score = e.scores.get(_RELATIVE)
            if score is not None and score > most and e.index not in exact:
                worst[e.index] = max(worst.get(e.index, (-math.inf, "")), (score, run.attack))
    words = [
        f"Example {i} has a relative leakage of {score:.2f} by {name}." for i, (score, name) in sorted(worst.items())
    ]
    return words, sorted(worst)
