"""Diagnosis: an update that does not fit its model, said in words: sign, scale, mode, optimiser, number of steps."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from unbatch.auditing.compression import compression
from unbatch.auditing.relations import (
    Relations,
    equal_sizes,
    orders,
    parameters_themselves,
    too_large,
    worst,
    wrong_sign,
)
from unbatch.observation import Observation
from unbatch.protocol import Protocol, fit, flatten, local_update

LARGEST_FIT_RESIDUAL = 0.02  # relative residual up to which an explanation holds
UNREAD = 0.5  # relative residual of the nearest guess from which on nothing says that a captured update was read right
# Knowledge of what was done to an update after, or beside, the step that the protocol says.
DEFENDED = frozenset({"noise", "noise_within", "altered", "privacy", "log_prob", "mixup", "clip"})


@dataclass(frozen=True)
class Explanation:
    """One reading of the update: what was sent, by which protocol, times which factor, and how well that fits."""

    protocol: Protocol
    factor: float
    residual: float  # |update - factor * simulated| / |update|

    @property
    def fits(self) -> bool:
        return self.residual <= LARGEST_FIT_RESIDUAL


def explanations(obs: Observation, inputs: Tensor, labels: Tensor) -> list[Explanation]:
    """Which protocol an update of known inputs [n, ...] and labels fits, by which factor: every reading, the best first.

    Each candidate protocol (the declared one; the gradient in train and eval mode; 2 to 8 local steps of SGD, with and
    without momentum; 1 to 3 of Adam) is simulated and fitted by one factor c = <u, s> / <s, s>. Where a gradient is
    declared, steps are tried at the rate that the gradient's own factor tells, and those of Adam at their largest move.

    >>> import torch, unbatch
    >>> model, loss = torch.nn.Linear(4, 3), torch.nn.functional.cross_entropy
    >>> x, y = torch.eye(4)[:2], torch.tensor([0, 2])
    >>> seen, truth = unbatch.observe(model, loss, x, y)
    >>> flipped = {name: -tensor for name, tensor in seen.update.items()}
    >>> captured = unbatch.Observation(model=model, loss=loss, update=flipped)
    >>> best = explanations(captured, x, y)[0]
    >>> round(best.factor, 3), best.fits
    (-1.0, True)
    """
    first = next(obs.model.parameters())
    kind = first.dtype if inputs.is_floating_point() else inputs.dtype  # tokens stay whole numbers
    x, y = inputs.to(first.device, kind), labels.to(first.device)
    rate = obs.protocol.learning_rate
    declared = obs.protocol
    candidates = [declared, *(Protocol(mode=mode) for mode in ("train", "eval"))]
    tried = _tried(obs, x, y, candidates)
    # Where no step was declared, its rate is not known either: the gradient's factor, or Adam's largest move, tells it.
    factor = next((e.factor for e in tried if not e.protocol.steps(len(x))), 0.0)
    largest = max(float(tensor.detach().abs().max()) for tensor in obs.update.values())
    candidates = []
    for steps, m in itertools.product((2, 3, 4, 5, 6, 8), (0.0, 0.9)):
        moves = sum((1 - m**t) / (1 - m) for t in range(1, steps + 1))  # in units of the rate, while the gradient stays
        rates = [rate] if declared.steps(len(x)) or factor >= 0 else [rate, float(f"{-factor / moves:.3g}")]
        candidates += [Protocol(local_steps=steps, learning_rate=r, momentum=m, mode=declared.mode) for r in rates]
    for steps in (1, 2, 3):
        rates = [rate] if declared.steps(len(x)) or not largest else [rate, float(f"{largest / steps:.3g}")]
        candidates += [
            Protocol(local_steps=steps, optimiser="adam", learning_rate=r, mode=declared.mode) for r in rates
        ]
    return sorted([*tried, *_tried(obs, x, y, candidates)], key=lambda e: e.residual)


def _tried(obs: Observation, x: Tensor, y: Tensor, candidates: Sequence[Protocol]) -> list[Explanation]:
    """Each of these protocols with the factor that fits best; without those that cannot run."""
    found = []
    for protocol in dict.fromkeys(candidates):
        try:
            again = local_update(obs.model, obs.loss, x, y, protocol, trained=list(obs.update))
        except (RuntimeError, ValueError):  # batch norm refuses one example in train mode
            continue
        found.append(Explanation(protocol, *fit(flatten(obs.update, obs.update), flatten(again, obs.update))))
    return found


def diagnose(
    obs: Observation, inputs: Tensor | None = None, labels: Tensor | None = None, *, certified: bool = False
) -> list[str]:
    """What is off with a captured update (sign, scale, mode, optimiser, steps), in sentences; empty where nothing is.

    With inputs and labels that the update should come from (your own test batch, or an exact attack's find) the
    readings of `explanations` are compared. Without them, only what the head's gradient alone proves is said. Inputs that
    are `certified` are behind the update, whatever else was done to the rest of it.

    >>> import torch, unbatch
    >>> model, loss = torch.nn.Linear(4, 3), torch.nn.functional.cross_entropy
    >>> x, y = torch.eye(4)[:2], torch.tensor([0, 2])
    >>> seen, truth = unbatch.observe(model, loss, x, y)
    >>> flipped = {name: -tensor for name, tensor in seen.update.items()}
    >>> captured = unbatch.Observation(model=model, loss=loss, update=flipped)
    >>> diagnose(captured, x, y)
    ['The sign is flipped (the descent direction instead of the gradient): multiply the update by -1.']
    """
    notes = [*_sizes(obs), *(f"The update was compressed: {words}" for words in compression(obs.update))]
    missing = [k for k, p in obs.model.named_parameters() if p.requires_grad and k not in obs.update]
    if missing:
        notes.append(
            f"The update lacks {len(missing)} trainable parameters ({', '.join(missing[:4])}): frozen, or lost?"
        )
    if inputs is None or labels is None:
        return notes
    ranked = explanations(obs, inputs, labels)
    if not ranked:
        return [*notes, "The model fails on these inputs in train and in eval mode."]
    fitting = [e for e in ranked if e.residual <= 10 * ranked[0].residual + 1e-6]
    # Of the readings that fit equally well, one without a factor is better, then the declared one, then the closest.
    best = min(
        fitting, key=lambda e: (abs(e.factor - 1) > LARGEST_FIT_RESIDUAL, e.protocol != obs.protocol, e.residual)
    )
    if not best.fits and certified:
        return [
            *notes,
            "The certified examples come out of one layer's gradient; no reading explains the rest of the update by them "
            f"(best: {best.protocol}, relative residual {best.residual:.2g}): they count unequally, or the other tensors "
            "were changed each by itself.",
        ]
    if not best.fits:
        return [
            *notes,
            f"No reading explains the update by these inputs (best: {best.protocol}, relative residual "
            f"{best.residual:.2g}): other data, other parameters, or a defence.",
        ]
    n = len(inputs)
    if best.protocol != obs.protocol:
        notes.append(f"The update is that of {best.protocol}; declared was {obs.protocol}.")
    return notes + _factor(best, n)


def unreadable(obs: Observation, inputs: Tensor | None = None, labels: Tensor | None = None) -> str:
    """Why an update cannot be audited as it was captured, with the readings that were tried, in words; empty where it can.

    With inputs and labels that it should come from, it can where they explain it as declared. Without, where it obeys what
    every update of this network obeys (`relations`). What a defence that is known did to an update is no misreading.

    >>> import torch, unbatch
    >>> model, loss = torch.nn.Linear(6, 8), torch.nn.functional.cross_entropy
    >>> seen, truth = unbatch.observe(model, loss, torch.rand(2, 6), torch.tensor([0, 5]))
    >>> told = {"model": model, "loss": loss, "knowledge": seen.knowledge}
    >>> weights = unbatch.Observation(update=dict(model.named_parameters()), **told)
    >>> unreadable(seen), unreadable(weights).partition(":")[0]
    ('', "it is the model's own parameters to 0%, and no difference of them")
    """
    if DEFENDED & set(obs.knowledge):
        return ""
    if not any(bool(tensor.any()) for tensor in obs.update.values()):
        return "it is all zeros: nothing was trained, or nothing captured."
    if inputs is None or labels is None:
        return _by_structure(obs)
    return _by_batch(obs, inputs, labels)


def unexplained(obs: Observation, residual: float, inputs: Tensor | None, labels: Tensor | None) -> str:
    """Why an update cannot be audited of which what was found leaves most unexplained; empty behind a known defence.

    Other readings of it are tried with the inputs [n, ...] and labels that come nearest.
    """
    if DEFENDED & set(obs.knowledge):
        return ""
    told = f"the nearest of what attacks returned leaves {residual:.2g} of it unexplained"
    tried = "Readings tried without the batch: as declared, sign, scale, difference, order, optimiser"
    if inputs is not None and labels is not None:
        tried += "; with what came nearest: sign, scale, mode, optimiser, number of steps"
        if any(each.fits for each in explanations(obs, inputs, labels)):
            return f"{told}. {' '.join(diagnose(obs, inputs, labels))} {tried}."
    return f"{told}, so that nothing tells a wrong capture from one that is hard to read. {tried}."


def _by_structure(obs: Observation) -> str:
    tried = "Readings tried without the batch: as declared, sign, scale, difference, order, optimiser."
    for look in (parameters_themselves, equal_sizes):
        if words := look(obs):
            return f"{words}. {tried}"
    relations = Relations.of(obs)
    if broken := worst(relations, obs.update):
        fitting = next((words for words, update in orders(obs) if not worst(relations, update)), "")
        hint = f" It would fit if {fitting}." if fitting else ""
        return (
            f"no batch has such an update of this model: {broken.words} in every one, and here is off by "
            f"{broken.breach:.0%}; other parameters, a defence, or tensors mixed up?{hint} {tried}"
        )
    if words := wrong_sign(obs):
        return (
            f"its sign is flipped, since {words}. It is before minus after, or a step and not the gradient: multiply it by "
            f"-1, or say what was sent (local_steps, learning_rate). {tried}"
        )
    if words := too_large(obs):
        return f"{words}. {tried}"
    return ""


def _by_batch(obs: Observation, inputs: Tensor, labels: Tensor) -> str:
    """The same where the batch that should be behind it is known."""
    try:
        again, once_more = obs.simulate(inputs, labels), obs.simulate(inputs, labels)
        seen, expected = flatten(obs.update, obs.update), flatten(again, obs.update)
    except (RuntimeError, ValueError):
        return ""
    if not flatten(once_more, obs.update).allclose(expected):  # a model that draws at random explains nothing twice
        return ""
    factor, left = fit(seen, expected)
    if left <= LARGEST_FIT_RESIDUAL and abs(factor - 1) <= LARGEST_FIT_RESIDUAL:
        return ""
    tried = (
        "Readings tried with the batch: as declared, sign, scale, difference, order, mode, optimiser, number of steps."
    )
    if words := parameters_themselves(obs):
        return f"{words}. {tried}"
    if any(each.fits for each in explanations(obs, inputs, labels)):
        return f"the batch does not explain it as declared. {' '.join(diagnose(obs, inputs, labels))} {tried}"
    for words, update in orders(obs):
        if fit(flatten(update, obs.update), expected)[1] <= LARGEST_FIT_RESIDUAL:
            return f"its tensors are mixed up: {words}. {tried}"
    return f"the batch does not explain it. {' '.join(diagnose(obs, inputs, labels))} {tried}"


def _factor(best: Explanation, n: int) -> list[str]:
    c, steps = best.factor, best.protocol.steps(n)
    if abs(c - 1) <= LARGEST_FIT_RESIDUAL:
        return []
    if abs(c + 1) <= LARGEST_FIT_RESIDUAL:
        what = "before minus after" if steps else "the descent direction instead of the gradient"
        return [f"The sign is flipped ({what}): multiply the update by -1."]
    if n > 1 and abs(c - n) <= LARGEST_FIT_RESIDUAL * n:
        return [f"The update is {n} times too large: a sum over the batch where the loss takes the mean."]
    if n > 1 and abs(c * n - 1) <= LARGEST_FIT_RESIDUAL:
        return [f"The update is {n} times too small: a mean over the batch where the loss takes the sum."]
    if c < 0 and not steps:
        return [
            f"The update is {c:.4g} times the gradient: a step of SGD with learning rate {-c:.4g}, not the gradient. "
            f"Divide by {c:.4g}, or declare local_steps=1 and learning_rate={-c:.4g}."
        ]
    if steps:
        return [
            f"The update is {c:.4g} times the declared step's: the learning rate is {c:.4g} times what was declared."
        ]
    return [f"The update is {c:.4g} times the gradient: a scale by clipping, averaging or weighting."]


def _sizes(obs: Observation) -> list[str]:
    zero = [name for name, tensor in obs.update.items() if not tensor.any()]
    if len(zero) == len(obs.update):
        return ["The update is all zeros: nothing was trained, or nothing captured."]
    if zero:
        shown = ", ".join(zero[:4])
        return [f"{len(zero)} parameters have an update of exactly zero ({shown}): frozen, unused, or pruned."]
    return []
