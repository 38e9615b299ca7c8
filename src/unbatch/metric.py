"""How near a recovered example is to the private one, and the one matching of the two that every metric shares."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from unbatch.domain import Domain
from unbatch.label_form import agree
from unbatch.plugin import Plugin
from unbatch.reconstruction import Reconstruction
from unbatch.truth import Truth


class Metric(Plugin, ABC):
    """Says how near recovered examples are to the private ones that they were matched with.

    A subclass gives `score` and the class attributes below.

    >>> from unbatch.metrics import L2Error
    >>> L2Error().score(torch.tensor([[3.0, 4.5]]), torch.tensor([[3.0, 4.0]]))  # off by 0.5 of 5
    tensor([0.1000], dtype=torch.float64)
    """

    kind: ClassVar[str] = "metric"
    folder: ClassVar[str] = "metrics"

    subject: ClassVar[Literal["inputs", "labels"]] = "inputs"
    higher_is_better: ClassVar[bool]
    unit: ClassVar[str] = ""
    best: ClassVar[float | None]  # the score of an example compared with itself; None: it differs between examples

    @abstractmethod
    def score(self, found: Tensor, true: Tensor) -> Tensor:
        """How near each recovered example is to the private one beside it: pairs [p, ...], [p, ...] -> [p]."""

    def on(self, domain: Domain) -> Self | None:
        """This metric with its scale set for examples of that domain; None where it has no meaning there."""
        return self


@dataclass(frozen=True, kw_only=True, repr=False)
class Matching:
    """Which recovered example stands for which private one, with sign and scale resolved where `up_to` allows.

    >>> from unbatch.domain import domain_of
    >>> truth = Truth(inputs=torch.tensor([[1.0, 0.0], [0.0, 1.0]]), labels=torch.tensor([0, 1]))
    >>> found = Reconstruction(inputs=torch.tensor([[0.0, -0.9]]), up_to=frozenset({"permutation", "sign"}))
    >>> pairs = match(found, truth, domain_of(truth.inputs))
    >>> pairs, pairs.true, pairs.inputs, pairs.factor.tolist()
    (<Matching of 1 pairs>, tensor([1]), tensor([[-0.0000, 0.9000]], dtype=torch.float64), [-1.0])
    """

    found: Tensor  # [p] indices into the reconstruction
    true: Tensor  # [p] indices into the truth
    inputs: Tensor | None  # [p, ...] the matched reconstructions, resolved
    factor: Tensor  # [p] what each was multiplied by

    def __repr__(self) -> str:
        return f"<Matching of {len(self.found)} pairs>"


def match(found: Reconstruction, truth: Truth, domain: Domain) -> Matching:
    """Assigns recovered to private examples, one to one, at the least total distance of the domain.

    Sign (scale) is chosen per pair, only where `found.up_to` holds it. An attack on labels alone is matched by label.
    Where `found` holds a layer's features, `truth` must hold the true features, and `domain` be theirs.
    p = min(k, n): further private examples stay unmatched, further guesses count for nothing.

    >>> from unbatch.domain import domain_of
    >>> truth = Truth(inputs=torch.tensor([[1.0, 0.0], [0.0, 1.0]]), labels=torch.tensor([0, 1]))
    >>> found = Reconstruction(inputs=torch.tensor([[0.1, 0.9], [0.8, 0.0]]))
    >>> pairs = match(found, truth, domain_of(truth.inputs))
    >>> pairs.found, pairs.true
    (tensor([0, 1]), tensor([1, 0]))
    """
    from scipy.optimize import linear_sum_assignment  # on use: a client that only observes needs no scipy

    k, n = len(found), len(truth)
    if not k:
        cost, factor = torch.zeros(0, n).double(), torch.ones(0, n).double()
    elif found.inputs is None:
        labels = found.labels if found.labels is not None else torch.full((k,), -1)
        pairs = torch.cartesian_prod(torch.arange(k), torch.arange(n))
        cost = (~agree(labels.cpu()[pairs[:, 0]], truth.labels.cpu()[pairs[:, 1]])).double().view(k, n)
        factor = torch.ones(k, n, dtype=torch.float64)
    else:
        a = found.inputs.detach().double().cpu().reshape(k, -1)  # [k, d]
        b = truth.inputs.detach().double().cpu().reshape(n, -1)  # [n, d]
        factor = torch.ones(k, n, dtype=torch.float64)
        if "scale" in found.up_to:
            factor = (a @ b.T) / a.square().sum(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
            if "sign" not in found.up_to:
                factor = factor.clamp_min(0)
        elif "sign" in found.up_to:
            factor = torch.where(a @ b.T < 0, -1.0, 1.0).double()
        if bool((factor == 1).all()):
            cost = domain.distance(found.inputs, truth.inputs).double().cpu()
        else:
            shape = truth.inputs.shape[1:]
            rows = [(factor[:, j : j + 1] * a).reshape(k, *shape) for j in range(n)]
            cost = torch.cat([domain.distance(row, truth.inputs[j : j + 1]) for j, row in enumerate(rows)], 1).double()
    rows_, columns = linear_sum_assignment(cost.numpy())
    i, j = torch.as_tensor(rows_, dtype=torch.long), torch.as_tensor(columns, dtype=torch.long)
    resolved = None
    if found.inputs is not None:
        scale = factor[i, j].reshape(-1, *[1] * (found.inputs.ndim - 1))
        resolved = found.inputs.detach().double().cpu()[i] * scale
    return Matching(found=i, true=j, inputs=resolved, factor=factor[i, j])
