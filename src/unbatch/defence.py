"""Defence: middleware round the client's step."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self, final

import torch
from torch import Tensor, nn

from unbatch.knowledge import Knowledge
from unbatch.likelihood import Likelihood
from unbatch.loss import Loss
from unbatch.plugin import OneOrMore, Plugin
from unbatch.protocol import Protocol, Update, local_update


def plain_update(round_: Round) -> Update:
    """The update by plain training: every gradient as it is, `local_update` of the round's protocol."""
    return local_update(round_.model, round_.loss, round_.inputs, round_.labels, round_.protocol)


@dataclass(frozen=True, kw_only=True, repr=False)
class Round:
    """One round of training as the client runs it; a defence may hand on a changed copy (dataclasses.replace)."""

    model: nn.Module
    loss: Loss
    inputs: Tensor  # [n, *input_shape]
    labels: Tensor  # [n]
    protocol: Protocol
    rng: torch.Generator
    train: Callable[[Round], Update] = (
        plain_update  # what the innermost step computes, where training itself is private
    )

    def __repr__(self) -> str:
        batch = f"{len(self.inputs)} examples {list(self.inputs.shape[1:])}"
        return f"<Round of {type(self.model).__name__}: {batch}; {self.protocol}>"


Step = Callable[[Round], Update]


def honest_step(round_: Round) -> Update:
    """What a client sends whose defences have nothing left to add."""
    return round_.train(round_)


EFFECTS = ("adds_noise", "clips", "sums_clients")  # properties of a defence by which an audit is flagged


class Defence(Plugin, ABC):
    """Something between a client's training and the server: it wraps the client's step, and may change all of it.

    Of several the first one given is the outermost: it is the last to touch the update. A third party's subclass gives
    `paper`, `identity` and `wrap`, and says what it does: in `public` what the protocol makes known of it, in `loss` the
    loss that it declares, in `log_prob`, `expected` and `spread` its law. Attacks know a defence by these alone, and
    flags by `adds_noise`, `clips` and `sums_clients`.

    >>> Defence.parse("noise:sigma=0.1").public(Knowledge(batch_size=4))
    Knowledge(batch_size=4, noise=0.1)
    """

    kind: ClassVar[str] = "defence"
    folder: ClassVar[str] = "defences"

    paper: ClassVar[str]
    random: ClassVar[bool] = False  # whether its update differs from draw to draw
    identity: ClassVar[str]  # the spelling at zero strength, which changes nothing (a contract test)

    def __str__(self) -> str:
        """The full spelling: a record of an audit must show a defence's strength, default or not."""
        return self._spelt(dict(self))

    @abstractmethod
    def wrap(self, step: Step) -> Step:
        """A step with the defence round it; may call `step` never, once or many times."""

    def public(self, known: Knowledge) -> Knowledge:
        """What the server knows of an update with this defence round it, given what it knows of the update within."""
        return known

    def loss(self, loss: Loss) -> Loss:
        """The loss that the protocol declares with this defence in it, where it changes the loss for good."""
        return loss

    @property
    def adds_noise(self) -> bool:
        """Whether what is sent carries noise of its making, at its strength.

        By default: whether it makes `noise` or noisy `privacy` known. Override it where it does not tell.
        """
        told = self.public(Knowledge(batch_size=1))
        return bool(told.get("noise")) or ("privacy" in told and told.privacy.noise_multiplier > 0)

    @property
    def clips(self) -> bool:
        """Whether it shortens the update, or each example's gradient, to a norm.

        By default: whether it makes `clip` or `privacy` known. Override it where it does not tell.
        """
        told = self.public(Knowledge(batch_size=1))
        return "clip" in told or "privacy" in told

    @property
    def sums_clients(self) -> bool:
        """Whether the server sees the sum of several clients' updates alone.

        By default: whether it makes more than one of `clients` known. Override it where it does not tell.
        """
        return bool(self.public(Knowledge(batch_size=1)).get("clients", 1) > 1)

    @final
    def effects(self) -> list[str]:
        """What it says of itself that it does: an audit records it, and asks nothing else for its flags.

        >>> Defence.parse("dp-sgd").effects(), Defence.parse("noise:sigma=0").effects()
        (['adds_noise', 'clips'], [])
        """
        return [name for name in EFFECTS if getattr(self, name)]

    def tells(self, known: Knowledge, loss: Loss) -> list[str]:
        """The fields of knowledge that it makes known by itself; "loss" where the protocol declares another for it.

        >>> Defence.parse("local-steps").tells(Knowledge(), lambda outputs, labels: outputs.sum())
        ['learning_rate', 'local_steps', 'momentum', 'optimiser']
        """
        bare = Knowledge(batch_size=known.get("batch_size", 1))
        told = self.public(bare)
        fields = [k for k in told if k not in bare or told.get(k) != bare.get(k)]
        return sorted(fields + (["loss"] if self.loss(loss) is not loss else []))

    def log_prob(self, seen: Update, clean: Update) -> Tensor | None:
        """Log-likelihood [] of the update as sent given the clean one, up to a constant: the adaptive attack's loss.

        Differentiable with respect to `clean`. None: it has no tractable likelihood, or does nothing; so of every update.
        """
        return None

    def expected(self, clean: Update) -> Update:
        """What it makes of a clean update without its draws, differentiably: what a defence outside of it is handed."""
        return clean

    def spread(self, seen: Update) -> Mapping[str, float]:
        """The standard deviation that its draws and its rounding give each entry of a tensor."""
        return dict.fromkeys(seen, 0.0)

    def likelihood(self, inner: Likelihood | None, seen: Update) -> Likelihood | None:
        """The law of an update with this defence round it, given that of the update within; None where there is none.

        It is the outermost law there is, about what the defences within make of a clean update: the draws of those are left
        out of it, but not of the spread.
        """
        within = inner.expected if inner else dict
        if self.log_prob(seen, seen) is not None:
            return Likelihood(self._law, within, _both(self.spread, inner.spread) if inner else self.spread)
        return replace(inner, expected=lambda clean: self.expected(within(clean))) if inner else None

    @final
    def _law(self, seen: Update, clean: Update) -> Tensor:
        found = self.log_prob(seen, clean)
        if found is None:
            raise TypeError(
                f"{self} gives a likelihood of one update and none of another; log_prob is of all or of none."
            )
        return found


@dataclass(frozen=True)
class Stack:
    """All defences of a client as one: its whole step, the loss that it declares, and what the server knows of it.

    The first one is the outermost. The client, its guard and the measure of its utility all run this one.

    >>> stack = Stack.of(["clip:norm=0.5", "local-steps:steps=3"])
    >>> stack.public(Knowledge(batch_size=4)).only("clip", "local_steps")
    Knowledge(local_steps=3, clip=0.5)
    """

    defences: tuple[Defence, ...] = ()

    @classmethod
    def of(cls, defences: OneOrMore[Defence]) -> Self:
        """The stack of one or several defences, each spelt or built. Raises UnbatchError: a spelling is wrong."""
        return cls(tuple(Defence.several(defences)))

    @property
    def step(self) -> Step:
        """The client's step with every defence round it."""
        step: Step = honest_step
        for defence in reversed(self.defences):
            step = defence.wrap(step)
        return step

    def loss(self, loss: Loss) -> Loss:
        """The loss that the protocol declares, given the one that the client starts from."""
        for defence in self.defences:
            loss = defence.loss(loss)
        return loss

    def public(self, known: Knowledge) -> Knowledge:
        """What the server knows of the update before it has seen it, given what the bare round makes known."""
        for defence in reversed(self.defences):
            known = defence.public(known)
        return known

    def told(self, known: Knowledge, seen: Update) -> Knowledge:
        """What the server knows of the update that it has seen: `public`, and the defences' own likelihood."""
        known, law = self.public(known), self._likelihood(seen)
        hidden = {"altered", "privacy", "mixup", "clip"} & set(known)
        if law is None and known.get("clients", 1) > 1 and known.get("noise") and not hidden:
            law = Likelihood.gaussian(known.noise)  # of a sum whose clients noised their own updates
        return known if law is None else known | Knowledge(log_prob=law)

    def _likelihood(self, seen: Update) -> Likelihood | None:
        law: Likelihood | None = None
        for defence in reversed(self.defences):
            law = defence.likelihood(law, seen)
        return law


def _both(
    first: Callable[[Update], Mapping[str, float]], second: Callable[[Update], Mapping[str, float]]
) -> Callable[[Update], dict[str, float]]:
    return lambda seen: {k: math.hypot(a, second(seen)[k]) for k, a in first(seen).items()}
