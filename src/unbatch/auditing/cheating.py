"""Cheating: the rounds of a server that chooses the model, played with an honest client."""

from __future__ import annotations

import torch
from torch import nn

from unbatch.attack import ActiveAttack
from unbatch.auditing.client import observe, published
from unbatch.case import Setting
from unbatch.defence import Defence, Stack
from unbatch.knowledge import Knowledge
from unbatch.observation import Observation
from unbatch.plugin import OneOrMore
from unbatch.truth import Truth


def planted_exchange(
    attack: ActiveAttack,
    setting: Setting,
    *,
    knowledge: Knowledge | None = None,
    defences: OneOrMore[Defence] = (),
    seed: int = 0,
    server_seed: int = 0,
) -> tuple[Observation, Truth]:
    """What a server sees that plants by `attack`, of a client who takes honest steps on what it is sent; and the truth.

    `knowledge` is what the server knows beyond the round itself; the attack is handed what it declares of it. `seed` draws
    for the client's defences, `server_seed` for the server.
    Raises NotApplicable: the attack's parameters do not fit the client's model; the message says why.

    >>> from unbatch.case import Case
    >>> from unbatch.attacks import TensorMomentDeep
    >>> client = Case.parse("tables:dataset=iris,depth=3,width=40").setting()
    >>> seen, truth = planted_exchange(TensorMomentDeep(), client)
    >>> torch.equal(seen.model.dense1.weight[:8, :4], torch.cat([torch.eye(4), -torch.eye(4)]))
    True
    """
    rng, declared = torch.Generator().manual_seed(server_seed), attack.needs | attack.uses
    known = Stack.of(defences).public(published(setting.inputs, setting.protocol)) | (knowledge or Knowledge())

    def replant(seen: Observation) -> nn.Module | None:
        return attack.replant(seen.only(*declared), rng)

    return observe(
        attack.plant(setting.model, rng, known.only(*declared)),
        setting.loss,
        setting.inputs,
        setting.labels,
        knowledge=knowledge,
        protocol=setting.protocol,
        defences=defences,
        seed=seed,
        replant=replant,
    )
