"""Trained: defences put on what was trained already, where a framework's hook sees no more than that."""

from __future__ import annotations

import torch
from torch import nn

from unbatch.defence import Round, Stack
from unbatch.errors import UnbatchError
from unbatch.protocol import Protocol, Update


def fresh_draws() -> torch.Generator:
    """Random numbers that nobody can draw again: a defence's noise is a secret."""
    rng = torch.Generator()
    rng.seed()
    return rng


def defended(stack: Stack, turn: Round, update: Update) -> Update:
    """What the defences make of an update that was trained already. Raises UnbatchError: one of them changes training.

    >>> model = nn.Linear(1, 1)
    >>> x, y, protocol = torch.ones(1, 1), torch.ones(1, 1), Protocol(local_steps=1)
    >>> turn = Round(
    ...     model=model, loss=nn.functional.mse_loss, inputs=x, labels=y, protocol=protocol, rng=fresh_draws()
    ... )
    >>> defended(Stack.of("clip:norm=1"), turn, {"bias": torch.tensor([5.0])})
    {'bias': tensor([1.])}
    """
    taken = list[Round]()

    def trained(round_: Round) -> Update:
        taken.append(round_)
        return update

    begun = Round(
        model=turn.model,
        loss=turn.loss,
        inputs=turn.inputs,
        labels=turn.labels,
        protocol=turn.protocol,
        rng=turn.rng,
        train=trained,
    )
    sent = stack.step(begun)
    if len(taken) != 1 or taken[0] is not begun:
        raise UnbatchError(
            f"{', '.join(map(str, stack.defences))}: a defence among these changes how a client trains, and here is only "
            "what training made. Build it into the client, and name it in `defences`; `defend` takes those that change "
            "what is sent (noise, clip, prune, quantise)."
        )
    return sent


def check_defences(stack: Stack) -> None:
    """Raises UnbatchError where the defences are no such that can be put on what was trained already.

    >>> check_defences(Stack.of(["clip:norm=1", "noise:sigma=0.1"]))
    """
    if not stack.defences:
        return
    model, rng = nn.Linear(2, 2), torch.Generator().manual_seed(0)
    turn = Round(
        model=model,
        loss=nn.functional.cross_entropy,
        inputs=torch.rand(4, 2, generator=rng),
        labels=torch.tensor([0, 1, 0, 1]),
        protocol=Protocol(local_steps=1),
        rng=rng,
    )
    defended(stack, turn, {name: torch.ones_like(p) for name, p in model.named_parameters()})
