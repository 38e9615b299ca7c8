"""Clients for tests: a network, a batch drawn for it, and what the server sees of their exchange."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from unbatch.auditing.client import observe
from unbatch.case import Case
from unbatch.knowledge import Knowledge
from unbatch.loss import Loss, loss_named
from unbatch.models import small
from unbatch.observation import Observation
from unbatch.protocol import Protocol

Network = Callable[[torch.Generator], nn.Module]  # a model drawn from that generator
Exchange = Callable[..., tuple[Observation, Tensor, Tensor]]  # the fixture `exchange`


def exchanged(
    client: str | nn.Module | Network,
    loss: str | Loss | None = None,
    x: Tensor | None = None,
    y: Tensor | None = None,
    *,
    shape: tuple[int, ...] = (3, 8, 8),
    n: int = 1,
    normal: bool = False,
    seed: int = 1,
    dtype: torch.dtype | None = None,
    defences: Sequence[str] = (),
    tell: bool = False,
    **facts: Any,
) -> tuple[Observation, Tensor, Tensor]:
    """The server's view of one honest client, the client's inputs in float64 [n, *shape], and its labels [n].

    `client` is a case as it is spelt, a model, or a function that draws a model. What is not given is drawn, one thing
    after the other from one generator: the model, inputs uniform in [0, 1) or normal, and classes. `dtype` is the
    client's; without it the model's. `tell` tells the server the labels. `facts` are rules of the protocol, whose mode
    is eval unless they say otherwise, and whatever else the server knows, by name.
    """
    rng = torch.Generator().manual_seed(seed)
    if isinstance(client, str):
        case = Case.parse(client).setting()
        model, loss, known = case.model, loss or case.loss, case.knowledge
        x, y = case.inputs if x is None else x, case.labels if y is None else y
    else:
        model, known = client if isinstance(client, nn.Module) else client(rng), Knowledge()
    model = copy.deepcopy(model)
    model = model if dtype is None else model.to(dtype)
    x = (torch.randn if normal else torch.rand)(n, *shape, generator=rng, dtype=torch.float64) if x is None else x
    if y is None:
        with torch.no_grad():
            outputs = copy.deepcopy(model).eval()(x[:1].to(next(model.parameters()).dtype))
        y = torch.randint(outputs.shape[1], (len(x),), generator=rng)
    rules = {name: facts.pop(name) for name in Protocol.model_fields if name in facts}
    loss = loss or "cross-entropy"
    obs, truth = observe(
        model,
        loss_named(loss) if isinstance(loss, str) else loss,
        x,
        y,
        knowledge=known | Knowledge(**({"labels": y} if tell else {}), **facts),
        protocol=Protocol(**({"mode": "eval"} | rules)),
        defences=defences,
        seed=seed,
    )
    return obs, truth.inputs.double(), truth.labels


def perceptron(shape: tuple[int, ...], classes: int, **options: Any) -> Network:
    """A multilayer perceptron of the library, still to be drawn."""
    return lambda rng: small.build("mlp", shape, classes, rng=rng, **options)


def linear(d: int = 4, k: int = 3) -> nn.Module:
    """Two dense layers with 5 neurons between them, every parameter normal."""
    rng = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(d, 5), nn.Tanh(), nn.Linear(5, k))
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=rng)
    return model


def normal(*layers: nn.Module) -> nn.Sequential:
    """The layers in a row, every parameter normal over the root of the numbers that it weighs."""
    model, rng = nn.Sequential(*layers), torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=rng) / max(p[0].numel(), 1) ** 0.5
    return model
