"""local-steps: the client trains for a while and sends the difference of parameters."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, Self, final

from pydantic import Field, model_validator

from unbatch.defence import Defence, Round, Step
from unbatch.errors import UnbatchError
from unbatch.knowledge import PROTOCOL_FIELDS, Knowledge
from unbatch.protocol import Protocol, Update

KEPT = ("weight_decay", "mode", "rounds", "server_rate", "sends_buffers")  # of the protocol


@final
class LocalSteps(Defence):
    """Trains for several local steps and sends the difference of parameters (federated averaging).

    u = w_K - w_0 after K local steps (federated averaging) in place of one gradient; the numbers are public.

    Nothing is drawn, so it has no likelihood: attacks that know the numbers unroll the steps.
    Replaces what the round says of local training; weight decay, the mode of batch norm and the rounds of the same batch
    stay the round's.

    >>> import torch, unbatch
    >>> model, loss = torch.nn.Linear(2, 2), torch.nn.functional.cross_entropy
    >>> x, y = torch.ones(4, 2), torch.tensor([0, 1, 1, 0])
    >>> seen, truth = unbatch.observe(model, loss, x, y, defences="local-steps:steps=3,learning_rate=0.1")
    >>> seen.knowledge.local_steps, seen.knowledge.learning_rate
    (3, 0.1)
    """

    paper: ClassVar[str] = "McMahan et al., AISTATS 2017"
    identity: ClassVar[str] = "local-steps:steps=0"

    steps: Annotated[int, Field(ge=0, description="local optimiser steps; 0 leaves the round as it is")] = 4
    learning_rate: Annotated[float, Field(gt=0, description="of the local optimiser")] = 0.01
    epochs: Annotated[int | None, Field(ge=1, description="passes over the local data, instead of steps")] = None
    batch: Annotated[int | None, Field(ge=1, description="examples a local step takes; none takes all")] = None
    optimiser: Annotated[Literal["sgd", "adam", "adamw"], Field(description="local optimiser")] = "sgd"
    momentum: Annotated[float, Field(ge=0, lt=1, description="of SGD")] = 0.0

    @model_validator(mode="before")
    @classmethod
    def _epochs_replace_steps(cls, options: dict[str, Any]) -> dict[str, Any]:
        return options if options.get("epochs") is None else {"steps": 0} | options

    @model_validator(mode="after")
    def _one_count_of_steps(self) -> Self:
        if self.epochs and self.steps:
            raise UnbatchError("steps and epochs both say how long to train; give one of them")
        return self

    def wrap(self, step: Step) -> Step:
        def trained(round_: Round) -> Update:
            return step(replace(round_, protocol=self._protocol(round_.protocol)))

        return trained

    def public(self, known: Knowledge) -> Knowledge:
        """The numbers of local training; the others as they were known.

        Noise that private training within has told is that of one gradient, and does not hold for these steps.
        """
        if not (self.steps or self.epochs):
            return known
        numbers = self._protocol(Protocol())
        told = {k: v for k, v in numbers if v is not None and k not in KEPT}
        stale = PROTOCOL_FIELDS | ({"noise", "noise_within"} if "privacy" in known else set())
        return known.only(*(set(known) - stale), *KEPT) | Knowledge(**told)

    def _protocol(self, protocol: Protocol) -> Protocol:
        if not (self.steps or self.epochs):
            return protocol
        return Protocol(
            local_steps=0 if self.epochs else self.steps,
            epochs=self.epochs,
            local_batch_size=self.batch,
            optimiser=self.optimiser,
            learning_rate=self.learning_rate,
            momentum=self.momentum,
            **{name: getattr(protocol, name) for name in KEPT},
        )
