"""Stand-in: inputs that a network takes, drawn where nobody gives any."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from unbatch.domain import domain_of
from unbatch.errors import UnbatchError
from unbatch.network.dense import forward

SIDES = (32, 28, 224, 64, 96, 16, 8)  # of pictures, the commonest first
TEXT = 16  # tokens


def stand_in_inputs(network: nn.Module, shape: tuple[int, ...] | None, n: int, rng: torch.Generator) -> Tensor:
    """Inputs [n, *shape] drawn from the prior of their kind; without a shape the commonest one that the network takes.

    Raises UnbatchError: the network takes none that was tried.

    >>> rng = torch.Generator().manual_seed(0)
    >>> stand_in_inputs(nn.Sequential(nn.Flatten(), nn.Linear(3072, 2)), None, 4, rng).shape
    torch.Size([4, 3, 32, 32])
    """
    parameter = next(network.parameters(), None)
    if parameter is None:
        raise UnbatchError("the model has no parameters, so there is no gradient.")
    table = next((module for module in network.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag)), None)
    said = ""
    for sides in [shape] if shape is not None else _shapes(network):
        for high in [None] if table is None else [None, table.num_embeddings]:
            proto = torch.zeros(2, *sides, dtype=torch.int64 if high else parameter.dtype, device=parameter.device)
            try:
                with torch.no_grad():
                    forward(network, proto)
            except Exception as error:  # the network's own: anything may go wrong in it
                said = f"{type(error).__name__}: {' '.join(str(error).split()[:30])}"
                continue
            if high:
                return torch.randint(high, (n, *sides), generator=rng)
            return domain_of(proto.cpu()).prior(n, rng).to(parameter.dtype)
    what = "none of the usual inputs" if shape is None else f"no input of shape {list(shape)}"
    raise UnbatchError(f"the model takes {what} ({said}). Give --shape, such as 3,32,32, or --data.")


def _shapes(network: nn.Module) -> Iterator[tuple[int, ...]]:
    """Shapes of one input, as the first layer with parameters suggests them."""
    first = next(
        (module for module in network.modules() if next(module.parameters(recurse=False), None) is not None), None
    )
    if isinstance(first, nn.Linear):
        d = first.in_features
        for channels in (3, 1):
            side = math.isqrt(d // channels)
            if side >= SIDES[-1] and channels * side * side == d:
                yield channels, side, side
        yield (d,)
    if isinstance(first, nn.Embedding | nn.EmbeddingBag):
        yield (TEXT,)
    depths = [first.in_channels] if isinstance(first, nn.Conv2d) else [3, 1]
    yield from ((depth, side, side) for side in SIDES for depth in depths)
    yield (TEXT,)
