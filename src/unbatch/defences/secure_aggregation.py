"""secure-aggregation: the server sees only the sum of several clients' updates."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, ClassVar, final

from pydantic import Field
from torch import Tensor

from unbatch.defence import Defence, Round, Step
from unbatch.errors import UnbatchError
from unbatch.knowledge import Knowledge
from unbatch.likelihood import Likelihood
from unbatch.network.per_client import for_client
from unbatch.protocol import Update


@final
class SecureAggregation(Defence):
    """Shows the server only the sum of several clients' updates.

    u = sum_c step(share c): the private batch is the union of the clients' shares, each of which runs the step.

    The shares follow the order of the batch, the first n mod clients of them one larger (torch.tensor_split). What is
    recovered belongs to somebody in the union. A server that cheats may send each client a model of its own
    (`unbatch.network.per_client.for_client`). Raises UnbatchError: more clients than examples.

    >>> import torch, unbatch
    >>> model, loss = torch.nn.Linear(2, 2), torch.nn.functional.cross_entropy
    >>> x, y = torch.ones(4, 2), torch.tensor([0, 1, 1, 0])
    >>> seen, truth = unbatch.observe(model, loss, x, y, defences="secure-aggregation:clients=2")
    >>> one, other = (unbatch.observe(model, loss, x[k], y[k])[0].update for k in (slice(2), slice(2, 4)))
    >>> torch.allclose(seen.update["weight"], one["weight"] + other["weight"])
    True
    """

    paper: ClassVar[str] = "Bonawitz et al., CCS 2017"
    identity: ClassVar[str] = "secure-aggregation:clients=1"

    clients: Annotated[int, Field(ge=1, description="clients that the private batch is dealt to")] = 2

    def wrap(self, step: Step) -> Step:
        def summed(round_: Round) -> Update:
            n = len(round_.inputs)
            if self.clients > n:
                raise UnbatchError(
                    f"{self} deals {n} examples to {self.clients} clients; give at most {n} clients or a larger batch."
                )
            shares = zip(
                round_.inputs.tensor_split(self.clients), round_.labels.tensor_split(self.clients), strict=True
            )
            total = dict[str, Tensor]()
            for number, (x, y) in enumerate(shares):  # added up one by one: a hundred updates fit no memory
                update = step(replace(round_, model=for_client(round_.model, number), inputs=x, labels=y))
                total = {name: total[name] + u if total else u for name, u in update.items()}
            return total

        return summed

    def public(self, known: Knowledge) -> Knowledge:
        if "clip" in known and self.clients > 1:  # of each client's own update
            known = known.after(f"clip:norm={known.clip:g}")
        if self.clients > 1:  # what changed each client's update does not act on the sum
            known = known.without("noise_within", "clip_within")
        summed = known | Knowledge(clients=self.clients)
        if "noise" not in known:
            return summed
        if "privacy" in known and self.clients > 1:  # dp-sgd within divides by each share's size; around, it is told
            return summed.without("noise")
        return summed | Knowledge(noise=known.noise * math.sqrt(self.clients))  # every client added its own

    def likelihood(self, inner: Likelihood | None, seen: Update) -> Likelihood | None:
        """A law of one client's update says nothing tractable of the sum of several."""
        return inner if self.clients == 1 else None
