"""Probe: the examples at which an analysis looks, and whose they are."""

from __future__ import annotations

import torch
from torch import Tensor

from unbatch.errors import NotApplicable
from unbatch.inversion.view import View


def probe(
    view: View, at: tuple[Tensor, Tensor] | None, rng: torch.Generator, *, whole: bool = False
) -> tuple[Tensor, Tensor, str]:
    """The example at which an analysis looks: x [1, *input_shape], y [1], and in words whose it is.

    The first one of the batch `at` = (inputs [n, ...], labels [n]), the truth; where that is none, a draw from the prior of
    the inputs' domain, with a label drawn at random. With `whole` as many as the batch has.
    Raises NotApplicable: input_shape is not known, to run the model.
    """
    if at is not None:
        n = len(at[0]) if whole else 1
        whose = "the batch" if whole else "the batch's first example"
        return at[0][:n].to(view.obs.device), at[1][:n].to(view.obs.device), whose
    if "input_shape" not in view.knowledge:
        raise NotApplicable("input_shape must be known, to run the model once.")
    x = view.stand_in(view.knowledge.batch_size if whole else 1, rng)
    y = view.labels.draw(len(x), rng, next(view.model.parameters()))
    return x, y, "a batch drawn from the prior" if whole else "an example drawn from the prior"
