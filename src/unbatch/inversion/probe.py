"""Probe: the examples at which an analysis looks, and whose they are."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from unbatch.errors import NotApplicable, UnbatchError
from unbatch.inversion.view import View
from unbatch.network.dense import forward
from unbatch.network.tracing import draws_kept


def probe(
    view: View, at: tuple[Tensor, Tensor] | None, rng: torch.Generator, *, whole: bool = False
) -> tuple[Tensor, Tensor, str]:
    """The example at which an analysis looks: x [1, *input_shape], y [1], and in words whose it is.

    The first one of the batch `at` = (inputs [n, ...], labels [n]), the truth; where that is none, a draw from the prior of
    the inputs' domain, with a label drawn at random. With `whole` as many as the batch has.
    Raises NotApplicable: input_shape is not known, to run the model; it takes no example alone, as batch norm in train mode
    on one pixel.
    """
    x, y, whose = _chosen(view, at, rng, whole)
    mode = view.obs.protocol.mode
    if len(x) == 1 and mode == "train":
        try:
            with draws_kept(view.model):
                forward(copy.deepcopy(view.model), x, mode)  # batch norm writes into its buffers
        except UnbatchError as error:
            raise NotApplicable(
                f"it looks at one example alone, which the model does not take in train mode: {error}"
            ) from error
    return x, y, whose


def _chosen(
    view: View, at: tuple[Tensor, Tensor] | None, rng: torch.Generator, whole: bool
) -> tuple[Tensor, Tensor, str]:
    if at is not None:
        n = len(at[0]) if whole else 1
        whose = "the batch" if whole else "the batch's first example"
        return at[0][:n].to(view.obs.device), at[1][:n].to(view.obs.device), whose
    if "input_shape" not in view.knowledge:
        raise NotApplicable("input_shape must be known, to run the model once.")
    x = view.stand_in(view.knowledge.batch_size if whole else 1, rng)
    y = view.labels.draw(len(x), rng, next(view.model.parameters()))
    return x, y, "a batch drawn from the prior" if whole else "an example drawn from the prior"
