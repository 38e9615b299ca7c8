"""Which label explains the update of one example, once its input is known."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from unbatch.inversion.view import View
from unbatch.loss import Loss
from unbatch.observation import Observation

# Two classes may share a gradient up to sign, and then their fits differ by rounding: so many digits count.
DIGITS_OF_A_FIT = 4


def possible_labels(view: View) -> list[Tensor]:
    """The labels that one example may have, each as a tensor [1]: the known one, else every class.

    Empty where there is no finite number of them (real targets) or the loss is of no known form.

    >>> import unbatch
    >>> from unbatch.models.small import build
    >>> rng = torch.Generator().manual_seed(0)
    >>> model, x, y = build("mlp", (4,), 3, width=8, rng=rng), torch.rand(1, 4, generator=rng), torch.tensor([2])
    >>> seen, truth = unbatch.observe(model, torch.nn.functional.cross_entropy, x, y)
    >>> possible_labels(View.of(seen))
    [tensor([0]), tensor([1]), tensor([2])]
    """
    known, device, form = view.knowledge.get("labels"), view.obs.device, view.form
    if known is not None:
        return [known.to(device)]
    if form is not None and form.classes:
        return [torch.tensor([y], device=device) for y in range(view.outputs[0] if view.outputs else 2)]
    if form is not None and form.name == "binary-cross-entropy" and math.prod(view.outputs) == 1:
        parameter = next(view.model.parameters())
        return _two(view.loss, torch.zeros(1, *view.outputs, dtype=parameter.dtype, device=device))
    return []


def explaining_label(obs: Observation, inputs: Tensor, candidates: Sequence[Tensor]) -> Tensor | None:
    """The candidate label with which the gradient at `inputs` [1, *shape] explains the update best, up to a factor.

    Where two classes share a gradient up to sign, the factor that is nearest to 1 tells them apart. The first of more than
    two that fits to rounding is taken. None where there are no candidates.

    >>> import unbatch
    >>> from unbatch.models.small import build
    >>> rng = torch.Generator().manual_seed(0)
    >>> model, x, y = build("mlp", (4,), 3, width=8, rng=rng), torch.rand(1, 4, generator=rng), torch.tensor([2])
    >>> seen, truth = unbatch.observe(model, torch.nn.functional.cross_entropy, x, y)
    >>> explaining_label(seen, x, possible_labels(View.of(seen)))
    tensor([2])
    """
    best: tuple[float, float, Tensor | None] = (torch.inf, torch.inf, None)
    kind = next(obs.model.parameters()).dtype
    for y in candidates:
        factor, fit = obs.fit(inputs, y.to(kind) if y.is_floating_point() else y)
        best = min(best, (round(fit, DIGITS_OF_A_FIT), abs(factor - 1), y), key=lambda found: found[:2])
        if len(candidates) > 2 and fit < 1e3 * torch.finfo(obs.dtype).eps:
            break
    return best[2]


def _two(loss: Loss, output: Tensor) -> list[Tensor]:
    """Both labels of a binary loss on one output [1, ...]: numbers [1], if it takes those, else targets like the output."""
    numbers = [torch.tensor([y], device=output.device) for y in (0, 1)]
    targets = [torch.full_like(output, y) for y in (0.0, 1.0)]
    try:
        same = all(torch.equal(loss(output + 1, a), loss(output + 1, b)) for a, b in zip(numbers, targets, strict=True))
    except (RuntimeError, ValueError, TypeError):
        same = False
    return numbers if same else targets
