"""Diagnosis: an update that does not fit its model, said in words: sign, scale, mode, optimiser, number of steps."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from unbatch.observation import Observation
from unbatch.protocol import Protocol, fit, flatten, local_update

LARGEST_FIT_RESIDUAL = 0.02  # relative residual up to which an explanation holds


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

    Each candidate protocol (the declared one; the gradient in train and eval mode; 1 to 8 local steps of SGD, with and
    without momentum; 1 to 3 of Adam) is simulated and fitted by one factor c = <u, s> / <s, s>.

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
    x, y = inputs.to(first.device, first.dtype), labels.to(first.device)
    rate = obs.protocol.learning_rate
    declared = obs.protocol
    candidates = [declared, *(Protocol(mode=mode) for mode in ("train", "eval"))]
    for steps in (2, 3, 4, 5, 6, 8):
        candidates += [
            Protocol(local_steps=steps, learning_rate=rate, momentum=m, mode=declared.mode) for m in (0.0, 0.9)
        ]
    candidates += [
        Protocol(local_steps=steps, optimiser="adam", learning_rate=rate, mode=declared.mode) for steps in (1, 2, 3)
    ]
    tried = []
    for protocol in dict.fromkeys(candidates):
        try:
            again = local_update(obs.model, obs.loss, x, y, protocol, trained=list(obs.update))
        except (RuntimeError, ValueError):  # batch norm refuses one example in train mode
            continue
        tried.append(Explanation(protocol, *fit(flatten(obs.update, obs.update), flatten(again, obs.update))))
    return sorted(tried, key=lambda e: e.residual)


def diagnose(obs: Observation, inputs: Tensor | None = None, labels: Tensor | None = None) -> list[str]:
    """What is off with a captured update (sign, scale, mode, optimiser, steps), in sentences; empty where nothing is.

    With inputs and labels that the update should come from (your own test batch, or an exact attack's find) the
    readings of `explanations` are compared. Without them, only what the head's gradient alone proves is said.

    >>> import torch, unbatch
    >>> model, loss = torch.nn.Linear(4, 3), torch.nn.functional.cross_entropy
    >>> x, y = torch.eye(4)[:2], torch.tensor([0, 2])
    >>> seen, truth = unbatch.observe(model, loss, x, y)
    >>> flipped = {name: -tensor for name, tensor in seen.update.items()}
    >>> captured = unbatch.Observation(model=model, loss=loss, update=flipped)
    >>> diagnose(captured, x, y)
    ['The sign is flipped (the descent direction instead of the gradient): multiply the update by -1.']
    """
    notes = _sizes(obs)
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
