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
_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")  # which drop between their layers, by the one float that they take


class WithoutDropout(TorchFunctionMode):
    """Inside the block dropout gives what it is given, in train mode too.

    >>> with WithoutDropout():
    ...     F.dropout(torch.ones(3), 0.9, training=True)
    tensor([1., 1., 1.])
    >>> cell, x = torch.nn.LSTM(2, 3, num_layers=2, dropout=0.5), torch.ones(4, 1, 2)
    >>> with WithoutDropout():
    ...     torch.equal(cell(x)[0], cell(x)[0])
    True
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _DROPS:
            return args[0] if args else kwargs["input"]
        if getattr(func, "__name__", "") in _RECURRENT:
            args = tuple(0.0 if isinstance(value, float) else value for value in args)
        return func(*args, **kwargs)
