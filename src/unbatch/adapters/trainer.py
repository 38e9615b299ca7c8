"""Trainer: a callback for the Hugging Face Trainer that captures one of its optimiser steps.

The package is an extra: pip install 'unbatch[transformers]'.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from unbatch.errors import MissingExtra, UnbatchError
from unbatch.loss import Loss
from unbatch.observation import Observation
from unbatch.training_step import CapturedStep, capture

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise MissingExtra.of("the Trainer's callback", "transformers", "transformers") from error


class StepCallback(TrainerCallback):
    """A callback of the Hugging Face Trainer that captures one of its optimiser steps, as `unbatch.capture` does a loop's.

    `Trainer(..., callbacks=[callback])`, train, and `callback.observation()` is the exchange, with the model's own loss:
    accumulated batches are counted, mixed precision is undone, and clipping is seen.

    number: which of the optimiser steps, from 1 on. A difference of parameters is that of a first step alone.
    Raises UnbatchError: a number below 1; from what reads the step, that training ended before it.

    >>> StepCallback()
    <StepCallback of step 1: not yet taken>
    """

    def __init__(self, number: int = 1) -> None:
        if number < 1:
            raise UnbatchError(f"number is {number}; steps are counted from 1.")
        self.number, self.seen = number, 0
        self._block: AbstractContextManager[CapturedStep] | None = None
        self._step: CapturedStep | None = None

    def __repr__(self) -> str:
        told = "not yet taken" if self._step is None or self._block is not None else repr(self._step)
        return f"<StepCallback of step {self.number}: {told}>"

    @property
    def step(self) -> CapturedStep:
        """The step. Raises UnbatchError: training has not come to it."""
        if self._step is None or self._block is not None:
            raise UnbatchError(
                f"the Trainer has taken {self.seen} steps since the callback was given, and step {self.number} was to be "
                "captured; train for longer, or capture an earlier one."
            )
        return self._step

    def observation(self, loss: Loss | None = None, **how: Any) -> Observation:
        """The step as an exchange that `unbatch.audit` takes; arguments as of `CapturedStep.observation`.

        loss: the Trainer's own, unless it was given another (`compute_loss_func`, label smoothing).
        """
        return self.step.observation(loss, **how)

    def on_step_begin(self, args: Any, state: Any, control: Any, **of: Any) -> None:
        """Begin to watch, where the next optimiser step is the one."""
        self.seen += 1
        if self.seen == self.number:
            self._block = capture(of["model"], of["optimizer"])
            self._step = self._block.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **of: Any) -> None:
        """The step is taken. Raises UnbatchError: it was left out, as a GradScaler does."""
        if self._block is not None:
            block, self._block = self._block, None
            block.__exit__(None, None, None)
