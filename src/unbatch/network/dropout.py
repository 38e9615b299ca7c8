"""Dropout: switched off while a block runs, whether a module or a forward itself calls it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_DROPS = {
    F.dropout,
    F.dropout1d,
    F.dropout2d,
    F.dropout3d,
    F.alpha_dropout,
    F.feature_alpha_dropout,
    torch.dropout,
    torch.dropout_,
}


class WithoutDropout(TorchFunctionMode):
    """Inside the block dropout gives what it is given, in train mode too.

    >>> with WithoutDropout():
    ...     F.dropout(torch.ones(3), 0.9, training=True)
    tensor([1., 1., 1.])
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _DROPS:
            return args[0] if args else kwargs["input"]
        return func(*args, **kwargs)
