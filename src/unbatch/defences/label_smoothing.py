"""label-smoothing: the client trains on labels that are not quite certain."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor

from unbatch.defence import Defence, Round, Step
from unbatch.errors import UnbatchError
from unbatch.loss import Loss
from unbatch.protocol import Update


@final
class LabelSmoothing(Defence):
    """Trains on softened labels: a share of each is spread over all classes.

    L(o, y) -> (1 - epsilon) L(o, y) + (epsilon / K) sum_k L(o, k), over the K classes (or the bits 0 and 1) that the loss
    does not ignore.

    The loss is declared, so attacks compute with it, and there is no likelihood of its own.
    For cross entropy and binary cross entropy this is training on smoothed targets.
    Raises UnbatchError: labels that are neither classes nor bits.

    >>> import torch, unbatch
    >>> model, loss = torch.nn.Linear(2, 2), torch.nn.functional.cross_entropy
    >>> x, y = torch.ones(4, 2), torch.tensor([0, 1, 1, 0])
    >>> seen, truth = unbatch.observe(model, loss, x, y, defences="label-smoothing:epsilon=0.1")
    >>> print(unbatch.inversion.view.View.of(seen).form)
    cross-entropy (mean, label smoothing 0.1)
    """

    paper: ClassVar[str] = "Szegedy et al., CVPR 2016"
    identity: ClassVar[str] = "label-smoothing:epsilon=0"

    epsilon: Annotated[float, Field(ge=0, lt=1, description="weight of the uniform label")] = 0.1

    def wrap(self, step: Step) -> Step:
        def smoothed(round_: Round) -> Update:
            if not self.epsilon:
                return step(round_)
            labels = round_.labels
            if labels.is_floating_point() and not bool(((labels == 0) | (labels == 1)).all()):
                raise UnbatchError(
                    f"{self} smooths class numbers or bits; these labels are real numbers, leave it out."
                )
            return step(replace(round_, loss=self.loss(round_.loss)))

        return smoothed

    def loss(self, loss: Loss) -> Loss:
        if not self.epsilon:
            return loss

        def smoothed(outputs: Tensor, y: Tensor) -> Tensor:
            k = 2 if y.is_floating_point() or outputs.ndim < 2 else max(outputs.shape[1], 2)
            taken = [c for c in range(k) if not _ignored(loss, outputs, y, c)]
            uniform = torch.stack([loss(outputs, torch.full_like(y, c)) for c in taken]).mean()
            return (1 - self.epsilon) * loss(outputs, y) + self.epsilon * uniform

        return smoothed


def _ignored(loss: Loss, outputs: Tensor, y: Tensor, label: int) -> bool:
    """Whether the mean over rows of that class alone is none, since the loss ignores it."""
    blank = torch.zeros(1, *outputs.shape[1:], dtype=outputs.dtype, device=outputs.device)
    with torch.no_grad():
        return bool(loss(blank, torch.full((1, *y.shape[1:]), label, dtype=y.dtype, device=y.device)).isnan())
