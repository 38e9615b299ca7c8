"""Reconstruction: what an attack returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor


@dataclass(frozen=True, kw_only=True, repr=False)
class Reconstruction:
    """What an attack read out of an observation: k examples, which need not be as many as the batch has.

    >>> import torch
    >>> pictures, labels = torch.zeros(2, 1, 8, 8), torch.tensor([3, 1])
    >>> found = Reconstruction(inputs=pictures, labels=labels, bound=torch.tensor([1e-6, 2e-6]))
    >>> found, len(found)
    (<Reconstruction: 2 examples [1, 8, 8], with labels, bounds up to 2e-06>, 2)
    """

    inputs: Tensor | None  # [k, *shape], whole numbers where they are tokens; None for an attack on labels alone
    labels: Tensor | None = None  # [k]
    layer: str = ""  # the module whose inputs these are; "" = the network's own
    up_to: frozenset[str] = frozenset({"permutation"})  # also "sign", "scale": what cannot be known
    bound: Tensor | None = None  # [k] largest |error| / |returned example|, l2; inf = a guess, no claim; of tokens 0
    trace: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        held = self.inputs if self.inputs is not None else self.labels
        return 0 if held is None else len(held)

    def __repr__(self) -> str:
        noun = "example" if len(self) == 1 else "examples"
        what = f"{noun} {list(self.inputs.shape[1:])}" if self.inputs is not None else "labels alone"
        where = f" as they enter {self.layer}" if self.layer else ""
        labels = ", with labels" if self.inputs is not None and self.labels is not None else ""
        bound = f", bounds up to {float(self.bound.max()):.2g}" if self.bound is not None and len(self.bound) else ""
        return f"<Reconstruction: {len(self)} {what}{where}{labels}{bound}>"


def certified(found: Reconstruction) -> Reconstruction:
    """The examples of a reconstruction that come with a finite bound: those about which the attack claims something.

    >>> import torch
    >>> found = Reconstruction(inputs=torch.tensor([[0.5], [0.7]]), bound=torch.tensor([1e-6, torch.inf]))
    >>> certified(found).inputs
    tensor([[0.5000]])
    """
    if found.inputs is None or found.bound is None:
        return found
    sure = found.bound.isfinite()
    labels = None if found.labels is None else found.labels[sure.to(found.labels.device)]
    return replace(found, inputs=found.inputs[sure.to(found.inputs.device)], labels=labels, bound=found.bound[sure])
