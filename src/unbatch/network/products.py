"""Which products with a parameter a model runs, and the vectors that enter them, heard where torch multiplies matrices."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from unbatch.errors import UnbatchError
from unbatch.network.dense import in_mode
from unbatch.network.precision import outputs_of

_ATEN = torch.ops.aten
_SECOND = {_ATEN.mm.default: 0, _ATEN.bmm.default: 0, _ATEN.addmm.default: 1, _ATEN.baddbmm.default: 1}


@dataclass(frozen=True, eq=False)
class Product:
    """One product of vectors with a parameter, as the model ran it.

    Each row x of `rows` is multiplied by the weight, or by the part of it that `outputs` names: of an nn.Linear summed over
    its second side (`side` 1), of a weight that is kept the other way round over its first (`side` 0).
    """

    weight: str  # the parameter's name
    side: int
    outputs: slice  # of the other side
    rows: Tensor  # [r, d]

    @property
    def layer(self) -> tuple[str, int, int | None, int | None]:
        """What tells the product from others of the same model, whatever rows enter it."""
        return self.weight, self.side, self.outputs.start, self.outputs.stop

    def gradient(self, update: Mapping[str, Tensor]) -> Tensor:
        """The part [m, d] of an update that is the sum of delta x^T over its rows."""
        whole = update[self.weight].double()
        return whole[self.outputs] if self.side == 1 else whole[:, self.outputs].T


@dataclass(frozen=True, eq=False)
class Lookup:
    """One look-up of rows of a parameter by whole numbers."""

    weight: str
    indices: Tensor


@dataclass(frozen=True, eq=False)
class Multiplied:
    """What one run of a model multiplied by parameters, and looked up in them, in order."""

    products: tuple[Product, ...]
    lookups: tuple[Lookup, ...]
    outputs: Tensor | None  # None where the run was ended before


class _EndedError(UnbatchError):
    """Ends a run whose rest nobody asked for."""


class _Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Hears matrix products below autograd, where nn.Linear, x @ W and fused attention look the same."""

    def __init__(self, model: nn.Module, wanted: Collection[tuple[Any, ...]] | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held = {p.untyped_storage().data_ptr(): (name, p) for name, p in model.named_parameters()}
        self.wanted = None if wanted is None else set(wanted)
        self.products: list[Product] = []
        self.lookups: list[Lookup] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _SECOND:
            first, second = args[_SECOND[func] : _SECOND[func] + 2]
            self._multiplied(first, second)
        elif func is _ATEN.embedding.default and (held := self._parameter(args[0])):
            self.lookups.append(Lookup(held[0], args[1].clone()))
        return func(*args, **(kwargs or {}))

    def _parameter(self, tensor: Tensor) -> tuple[str, nn.Parameter] | None:
        return self.held.get(tensor.untyped_storage().data_ptr())

    def _multiplied(self, first: Tensor, second: Tensor) -> None:
        held = self._parameter(second)
        if held is None or held[1].ndim != 2:
            return
        if second.ndim == 3:
            if second.stride(0) and len(second) > 1:
                return
            second, first = second[0], first.flatten(0, 1)
        name, whole = held
        (d, m), wide = second.shape, whole.shape[1]
        if second.stride() == (1, wide) and d == wide and second.storage_offset() % wide == 0:
            side, start = 1, second.storage_offset() // wide
        elif second.stride() == (wide, 1) and d == whole.shape[0] and second.storage_offset() + m <= wide:
            side, start = 0, second.storage_offset()
        else:
            return
        product = Product(name, side, slice(start, start + m), first)
        ends = self.wanted == {product.layer}
        if self.wanted is None or product.layer in self.wanted:  # what is written in place later would change the rows
            self.products.append(product if ends else replace(product, rows=first.clone()))
        if self.wanted is not None:
            self.wanted.discard(product.layer)
        if ends:
            raise _EndedError


def multiplied(
    model: nn.Module,
    inputs: Tensor,
    mode: Literal["train", "eval"] = "eval",
    wanted: Collection[tuple[Any, ...]] | None = None,
) -> Multiplied:
    """What a model multiplies by its parameters on inputs [n, ...], which vectors enter, and what it looks up in them.

    Heard where torch multiplies matrices, so that nn.Linear, a weight that is kept transposed, x @ W in a forward of its
    own and the joint weight of nn.MultiheadAttention are all found. With `wanted` (layers as `Product.layer` names them)
    only these are kept, and the run ends at the last of them.
    Raises UnbatchError: the forward fails.

    >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3))
    >>> run = multiplied(model, torch.tensor([[1, 2]]))
    >>> [(one.weight, one.side, tuple(one.rows.shape)) for one in run.products], run.lookups[0].weight
    ([('1.weight', 1, (2, 4))], '0.weight')
    """
    listening = _Products(model, wanted)
    outputs = None
    try:
        with torch.no_grad(), in_mode(model, mode), listening:
            outputs = outputs_of(model, inputs, twice=True)  # attention written out, and not fused
    except _EndedError:
        pass
    except Exception as error:  # the model is the user's: anything may go wrong in it
        raise UnbatchError(
            f"the model's forward fails on inputs of shape {tuple(inputs.shape[1:])}: {error}"
        ) from error
    return Multiplied(tuple(listening.products), tuple(listening.lookups), outputs)
