"""Vocabulary: the tokenizer that belongs to a model, so that an audit shows its tokens as the text that they are."""

from __future__ import annotations

from typing import Any

from unbatch.domain import Tokens
from unbatch.errors import UnbatchError


def tokens_of(tokenizer: Any, length: int) -> Tokens:
    """The domain of texts of `length` tokens in the words of a tokenizer, of transformers or of the package tokenizers.

    Hand it to a `Setting` beside the model. Each token is taken as it stands behind another one, by the tokenizer's own
    `decode`. Padding is the tokenizer's; where it has none, or fills sequences up at their beginning, nothing is padding.
    Raises UnbatchError: something else, that decodes no numbers.

    >>> class Three:
    ...     pad_token_id = 0
    ...     def __len__(self):
    ...         return 3
    ...     def decode(self, numbers, skip_special_tokens):
    ...         return "".join(["<pad>", " play", "ing"][number] for number in numbers).strip()
    >>> import torch
    >>> tokens_of(Three(), 4).render(torch.tensor([1, 2, 1, 0]))
    'playing play'
    """
    size = len(tokenizer) if hasattr(tokenizer, "__len__") else getattr(tokenizer, "get_vocab_size", lambda: 0)()
    if not hasattr(tokenizer, "decode") or not size:
        raise UnbatchError(
            f"{type(tokenizer).__name__} is no tokenizer of transformers or of the package tokenizers; give one of those, "
            "or the vocabulary itself as unbatch.Tokens(shape=(length,), high=last, vocabulary=words)."
        )

    def said(*numbers: int) -> str:
        return str(tokenizer.decode(list(numbers), skip_special_tokens=False))

    before = next((number for number in range(size) if said(number).strip().isalpha()), 0)
    start, pad = said(before), _padding(tokenizer)
    behind = (said(before, number) for number in range(size))
    pieces = [text[len(start) :] if text.startswith(start) else f" {text}" for text in behind]
    if pad is not None and pad < size:
        pieces[pad] = ""
    return Tokens(shape=(length,), high=size - 1.0, vocabulary=pieces, glue="", padding=pad)


def _padding(tokenizer: Any) -> int | None:
    if getattr(tokenizer, "padding_side", "right") == "left":
        return None
    own = getattr(tokenizer, "pad_token_id", None)
    if own is None and isinstance(getattr(tokenizer, "padding", None), dict):  # of the package tokenizers
        own = tokenizer.padding.get("pad_id")
    return None if own is None else int(own)
