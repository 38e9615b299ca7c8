"""Which model each client of a sum received: a server that cheats may send a different one to each."""

from __future__ import annotations

from torch import nn


def for_client(model: nn.Module, number: int) -> nn.Module:
    """The model that the client of that number receives: the model itself, unless it has one for each client.

    A module says so by a method `for_client(number)`; what that returns has the module's parameters, by name and shape.

    >>> class Louder(nn.Linear):
    ...     def for_client(self, number):
    ...         one = nn.Linear(1, 1, bias=False)
    ...         one.weight.data.fill_(float(number))
    ...         return one
    >>> for_client(Louder(1, 1, bias=False), 3).weight.item(), for_client(nn.Linear(1, 1), 3)
    (3.0, Linear(in_features=1, out_features=1, bias=True))
    """
    own = getattr(model, "for_client", None)
    return own(number) if callable(own) else model
