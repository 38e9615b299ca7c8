"""Several inputs: a model that takes two tensors, or a mapping of them, as a network of one, so that it can be audited."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unbatch.errors import UnbatchError

Parts = Mapping[str, Tensor] | Sequence[Tensor]


@dataclass(frozen=True)
class InputParts:
    """What a model of several inputs takes, joined into one vector an example and split again.

    An example is recovered whole: all of its parts, one behind the other, as [n, d] with d the sum of their sizes.

    shapes: of one example's parts, without the batch; by name where the model is called with keywords or a mapping, else in
    the order of its arguments. Every part holds real numbers; token numbers beside them are refused by `joined`.

    >>> class Both(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.head = nn.Linear(7, 3)
    ...
    ...     def forward(self, picture, age):
    ...         return self.head(torch.cat([picture.flatten(1), age], 1))
    >>> parts = InputParts({"picture": (1, 2, 3), "age": (1,)})
    >>> batch = {"picture": torch.zeros(2, 1, 2, 3), "age": torch.ones(2, 1)}
    >>> x = parts.joined(batch)
    >>> x.shape, parts.split(x)["age"].flatten().tolist()
    (torch.Size([2, 7]), [1.0, 1.0])
    >>> model = Both()
    >>> bool((parts.one_input(model)(x) == model(**batch)).all())
    True
    """

    shapes: Mapping[str, tuple[int, ...]] | Sequence[tuple[int, ...]]

    def _named(self) -> dict[str | int, tuple[int, ...]]:
        pairs = self.shapes.items() if isinstance(self.shapes, Mapping) else enumerate(self.shapes)
        return {name: tuple(shape) for name, shape in pairs}

    def joined(self, batch: Parts) -> Tensor:
        """The parts of a batch, each [n, *shape], as one tensor [n, d].

        Raises UnbatchError: a part is missing, of another shape, or of whole numbers.
        """
        given = dict[Any, Tensor](batch.items() if isinstance(batch, Mapping) else enumerate(batch))
        wanted = self._named()
        if set(given) != set(wanted):
            told = ", ".join(map(str, given)) or "none"
            raise UnbatchError(f"the batch has the parts {told}, and {', '.join(map(str, wanted))} are asked for.")
        rows = list[Tensor]()
        for name, shape in wanted.items():
            part = torch.as_tensor(given[name])
            if tuple(part.shape[1:]) != shape:
                raise UnbatchError(
                    f"part {name} is {tuple(part.shape)}, and (n, {', '.join(map(str, shape))}) is asked for."
                )
            if not part.is_floating_point():
                raise UnbatchError(
                    f"part {name} holds whole numbers ({part.dtype}); one that the model looks up, as token numbers are, "
                    "cannot be joined with others. Hold it fixed in a module round the model, and audit the other parts."
                )
            rows.append(part.flatten(1))
        if len({len(part) for part in rows}) > 1:
            raise UnbatchError(
                f"the parts are of {', '.join(str(len(part)) for part in rows)} examples; give as many of each."
            )
        return torch.cat(rows, 1)

    def split(self, x: Tensor) -> dict[Any, Tensor] | tuple[Tensor, ...]:
        """The parts [n, *shape] of joined examples [n, d], such as recovered ones, as the model takes them."""
        wanted = self._named()
        pieces = torch.split(x.flatten(1), [math.prod(shape) for shape in wanted.values()], 1)
        found = {
            name: piece.reshape(len(x), *shape) for (name, shape), piece in zip(wanted.items(), pieces, strict=True)
        }
        return found if isinstance(self.shapes, Mapping) else tuple(found.values())

    def one_input(self, model: nn.Module) -> nn.Module:
        """The same model with a forward of one input [n, d]; parameters and buffers are the same tensors by the same names.

        A model whose forward takes one argument is handed the mapping, or the tuple, itself.
        Raises UnbatchError: the model does not take these parts.
        """
        kind = type(model)
        needed = [
            p
            for p in inspect.signature(model.forward).parameters.values()
            if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
        whole = len(needed) == 1 and len(self._named()) > 1

        def forward(self_: nn.Module, x: Tensor) -> Any:
            parts = self.split(x)
            if whole:
                return kind.forward(self_, parts)
            return kind.forward(self_, **parts) if isinstance(parts, dict) else kind.forward(self_, *parts)

        adapted = copy.copy(model)
        adapted.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
        self._refuse_unfit(adapted, model)
        return adapted

    def _refuse_unfit(self, adapted: nn.Module, model: nn.Module) -> None:
        first = next(model.parameters(), torch.zeros(0))
        probe = torch.zeros(2, sum(math.prod(shape) for shape in self._named().values())).to(first)
        try:
            with torch.no_grad():
                copy.deepcopy(adapted).eval()(probe)
        except (TypeError, RuntimeError, KeyError, ValueError, IndexError) as why:
            words = " ".join(str(why).split()[:30])
            raise UnbatchError(f"{type(model).__name__} does not take these parts: {words}.") from why
