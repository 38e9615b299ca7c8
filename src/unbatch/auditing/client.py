"""Client: the honest client's step, with defences wrapped round it."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from unbatch.case import Setting
from unbatch.defence import Defence, Round, Step
from unbatch.knowledge import Earlier, Knowledge
from unbatch.likelihood import Likelihood
from unbatch.loss import Loss
from unbatch.observation import Observation
from unbatch.plugin import OneOrMore
from unbatch.protocol import Protocol, Update
from unbatch.truth import Truth


def observe(
    model: nn.Module,
    loss: Loss,
    x: Tensor,
    y: Tensor,
    *,
    knowledge: Knowledge | None = None,
    protocol: Protocol | None = None,
    defences: OneOrMore[Defence] = (),
    seed: int = 0,
) -> tuple[Observation, Truth]:
    """Run one honest client's step on the private batch; return what the server sees, and the truth for the judge.

    With several rounds in the `protocol` it is run in each, with fresh draws, and what the server saw before is `earlier`.

    `knowledge` comes on top of what the round itself makes public: input_shape, batch_size, the protocol's numbers and
    what each defence publishes, its likelihood among it. Defences are applied in order, the first one outermost.
    Raises ValueError: inputs, labels and model do not fit together.
    """
    Setting(model=model, loss=loss, inputs=x, labels=y)  # refuses what does not fit
    protocol = protocol or Protocol()
    wrapped = Defence.several(defences)
    step: Step = honest_step
    for defence in reversed(wrapped):
        step = defence.wrap(step)
    first = next(model.parameters())
    inputs = x.to(first.device, first.dtype) if x.is_floating_point() else x.to(first.device)
    labels = y.to(first.device)
    bare = Knowledge(input_shape=tuple(x.shape[1:]), batch_size=len(x)) | published(protocol)
    rng, earlier = torch.Generator().manual_seed(seed), list[Earlier]()
    while True:
        before = copy.deepcopy(model)
        update = step(Round(model=model, loss=loss, inputs=inputs, labels=labels, protocol=protocol, rng=rng))
        seen = {name: tensor.detach().clone() for name, tensor in update.items()}
        public = told(wrapped, bare, seen)
        if len(earlier) + 1 >= (protocol.rounds or 1):
            break
        earlier.append(Earlier(state=before.state_dict(), update=seen))
        model = moved(before, seen, protocol.server_rate or 0.0, public)
    declared = loss
    for defence in wrapped:
        declared = defence.loss(declared)
    public |= Knowledge(earlier=tuple(earlier)) if earlier else Knowledge()
    observation = Observation(model=before, loss=declared, update=seen, knowledge=public | (knowledge or Knowledge()))
    return observation, Truth(inputs=inputs.detach().clone(), labels=labels.clone())


def moved(model: nn.Module, update: Update, rate: float, known: Knowledge) -> nn.Module:
    """A copy of `model` as the server moves it: down a gradient, along a difference of parameters."""
    model = copy.deepcopy(model)
    rate = rate if known.get("local_steps") or known.get("epochs") else -rate
    with torch.no_grad():
        for name, u in update.items():
            model.get_parameter(name).add_(u, alpha=rate)
    return model


def told(defences: Sequence[Defence], known: Knowledge, seen: Update) -> Knowledge:
    """What the server knows of an update that it has seen, with the defences' own likelihood, given the bare round."""
    law: Likelihood | None = None
    for defence in reversed(defences):
        known, law = defence.public(known), defence.likelihood(law, seen)
    hidden = {"altered", "privacy", "mixup", "clip"} & set(known)
    if law is None and known.get("clients", 1) > 1 and known.get("noise") and not hidden:
        law = Likelihood.gaussian(known.noise)  # of a sum whose clients noised their own updates
    return known if law is None else known | Knowledge(log_prob=law)


def honest_step(round_: Round) -> Update:
    """What a client sends whose defences have nothing left to add."""
    return round_.train(round_)


def published(protocol: Protocol) -> Knowledge:
    """The protocol's own numbers, which the server set."""
    return Knowledge(**{name: value for name, value in protocol if value is not None})
