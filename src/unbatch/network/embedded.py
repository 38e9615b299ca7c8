"""Where a model looks its tokens up: found by running it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from unbatch.network.dense import forward


class EmbeddingCalls(TorchFunctionMode):
    """Hears every F.embedding that runs in the block: `found` holds pairs of the numbers looked up and the table.

    F.embedding_bag, which adds up the vectors that it looks up, is heard too; `added` says whether one ran.

    >>> layer = nn.Embedding(5, 2)
    >>> with EmbeddingCalls() as heard:
    ...     _ = layer(torch.tensor([[3, 1]]))
    >>> numbers, table = heard.found[0]
    >>> numbers.tolist(), table is layer.weight
    ([[3, 1]], True)
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Tensor, Tensor]] = []
        self.added = False

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in (F.embedding, F.embedding_bag):
            call = dict(zip(("input", "weight"), args, strict=False)) | dict(kwargs or {})
            self.added |= func is F.embedding_bag
            self.found.append((call["input"], call["weight"]))
        return func(*args, **(kwargs or {}))


class EmbeddingsFed(TorchFunctionMode):
    """Feeds vectors [n, t, d] to a model that is run in the block, where it would look `tokens` [n, t] up.

    table: the shape [vocabulary, d] of the table that it would look them up in; other tables, as of positions, are left.
    The tokens still say which places are padding. A gradient passes to the vectors.

    >>> layer, tokens = nn.Embedding(5, 2), torch.tensor([[3, 1]])
    >>> with EmbeddingsFed(tokens, torch.ones(1, 2, 2), layer.weight.shape):
    ...     layer(tokens), layer(torch.tensor([[3]])).shape
    (tensor([[[1., 1.],
             [1., 1.]]]), torch.Size([1, 1, 2]))
    """

    def __init__(self, tokens: Tensor, vectors: Tensor, table: torch.Size) -> None:
        super().__init__()
        self.tokens, self.vectors, self.table = tokens, vectors, table

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.embedding:
            call = dict(zip(("input", "weight"), args, strict=False)) | dict(kwargs or {})
            if call["weight"].shape == self.table and torch.equal(call["input"], self.tokens):
                return self.vectors.to(call["weight"])
        return func(*args, **(kwargs or {}))


def token_table(model: nn.Module, input_shape: tuple[int, ...]) -> str | None:
    """The name of the parameter [vocabulary, width] in which a model looks its input tokens up; None where it has none.

    Raises UnbatchError: the forward fails on whole numbers of `input_shape`.

    >>> model = nn.Sequential(nn.Embedding(5, 2), nn.Flatten(), nn.Linear(6, 3))
    >>> token_table(model, (3,))
    '0.weight'
    """
    heard, tokens = _lookups(model, input_shape)
    names = {id(p): name for name, p in model.named_parameters()}  # a tied table by its first name
    tables = (names.get(id(table)) for numbers, table in heard.found if torch.equal(numbers, tokens))
    return next((name for name in tables if name is not None), None)


def adds_tokens_up(model: nn.Module, input_shape: tuple[int, ...]) -> bool:
    """Whether a model adds up the vectors of a text's tokens where it looks them up, as nn.EmbeddingBag does.

    Then it knows no order of them, and no layer sees one token at a time.

    Raises UnbatchError: the forward fails on whole numbers of `input_shape`.

    >>> adds_tokens_up(nn.Sequential(nn.EmbeddingBag(5, 2), nn.Linear(2, 3)), (3,))
    True
    """
    return _lookups(model, input_shape)[0].added


def _lookups(model: nn.Module, input_shape: tuple[int, ...]) -> tuple[EmbeddingCalls, Tensor]:
    """What a run looks up, and the tokens that it was given."""
    tokens = torch.ones(2, *input_shape, dtype=torch.long, device=next(model.parameters()).device)
    with EmbeddingCalls() as heard:
        forward(model, tokens)
    return heard, tokens
