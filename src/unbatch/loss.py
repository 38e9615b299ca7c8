"""Losses: any callable ``(outputs, labels) -> scalar``, identified by probing it, never by its name."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from unbatch.errors import UnbatchError

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class LossForm:
    """Which of the known losses a loss is, as its values and gradients say.

    L = factor * sum_i l(outputs_i, labels_i), with factor = scale / n for the mean (over examples) and factor = scale for
    the sum; l is cross entropy (natural logarithm, with `smoothing`), binary cross entropy on logits summed over the
    outputs, or the squared error summed over the outputs.

    >>> str(identify(lambda outputs, labels: 3 * F.cross_entropy(outputs, labels, label_smoothing=0.1), (2, 5)))
    'cross-entropy (mean, scale 3, label smoothing 0.1)'
    """

    name: Literal["cross-entropy", "binary-cross-entropy", "squared-error"]
    reduction: Literal["mean", "sum"]
    scale: float
    classes: bool  # labels are class numbers, not real targets
    smoothing: float = 0.0

    def __str__(self) -> str:
        extra = f", label smoothing {self.smoothing:.3g}" if self.smoothing else ""
        scale = "" if abs(self.scale - 1) < 1e-6 else f", scale {self.scale:.6g}"
        return f"{self.name} ({self.reduction}{scale}{extra})"


def draw_labels(loss: Loss, outputs: Tensor, rng: torch.Generator) -> Tensor:
    """Random labels of the form that `loss` takes for `outputs` [n, k]: class numbers, or targets shaped [n, k] or [n].

    A form that the loss only takes by broadcasting is refused, since that would mix the examples.
    Raises UnbatchError: the loss takes none of these.

    >>> rng = torch.Generator().manual_seed(0)
    >>> draw_labels(F.cross_entropy, torch.zeros(4, 3), rng).dtype, draw_labels(F.mse_loss, torch.zeros(4, 3), rng).shape
    (torch.int64, torch.Size([4, 3]))
    """
    n = len(outputs)
    forms = [
        torch.randint(2, outputs.shape, generator=rng).to(outputs),
        torch.randint(2, (n,), generator=rng).to(outputs),
    ]
    if outputs.ndim > 1 and outputs.shape[1] > 1:
        forms.insert(0, torch.randint(outputs.shape[1], (n, *outputs.shape[2:]), generator=rng).to(outputs.device))
    reasons = []
    for labels in forms:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                value = loss(outputs, labels)
            if value.ndim == 0 and value.isfinite():
                return labels
            reasons.append(f"{labels.dtype} {tuple(labels.shape)} gave {tuple(value.shape)}")
        except (RuntimeError, ValueError, IndexError, TypeError, UserWarning) as error:
            reasons.append(f"{labels.dtype} {tuple(labels.shape)}: {str(error).splitlines()[0]}")
    raise UnbatchError(
        f"the loss is no finite scalar function of outputs {tuple(outputs.shape)} and labels; tried "
        f"{'; '.join(reasons)}. Give a callable (outputs, labels) -> scalar."
    )


def identify(loss: Loss, outputs_shape: tuple[int, ...], *, device: torch.device | None = None) -> LossForm | None:
    """The form of `loss` on outputs of shape [n, k] (or [n]), or None if it is none of the known ones.

    Values and gradients are compared with each reference at random outputs and labels in float64 (to 1e-6), for two
    batch sizes to tell the mean from the sum. Label smoothing is solved for from the gradient of cross entropy,
    c (p_j - (1 - s) [j = y] - s / k).

    >>> form = identify(F.cross_entropy, (2, 3))
    >>> form.name, form.reduction, form.scale, form.classes
    ('cross-entropy', 'mean', 1.0, True)
    >>> identify(lambda outputs, labels: outputs.exp().mean(), (2, 3)) is None
    True
    """
    rng = torch.Generator().manual_seed(0)
    k = outputs_shape[1] if len(outputs_shape) > 1 else 1
    sizes = (k + 2, k + 5)  # neither is k: a loss that broadcasts labels over the outputs shows itself
    fits: list[tuple[_Name, float, float]] = []
    classes = False
    for n in sizes:
        outputs = torch.randn((n, *outputs_shape[1:]), generator=rng, dtype=torch.float64).to(device)
        try:
            labels = draw_labels(loss, outputs, rng)
        except ValueError:
            return None
        classes = not labels.is_floating_point()
        fit = _fit(loss, outputs, labels)
        if fit is None:
            return None
        fits.append(fit)
    (name, small, smoothing), (other, large, again) = fits
    if name != other or abs(smoothing - again) > 1e-6:
        return None
    if abs(small - large) < 1e-6 * abs(small):
        return LossForm(name, "sum", small, classes, smoothing)
    if abs(sizes[0] * small - sizes[1] * large) < 1e-6 * abs(sizes[0] * small):
        return LossForm(name, "mean", sizes[0] * small, classes, smoothing)
    return None


_Name = Literal["cross-entropy", "binary-cross-entropy", "squared-error"]


def _fit(loss: Loss, outputs: Tensor, labels: Tensor) -> tuple[_Name, float, float] | None:
    """Name, factor and smoothing that explain the loss's value and gradient at these outputs."""
    live = outputs.clone().requires_grad_()
    value = loss(live, labels)
    (seen,) = torch.autograd.grad(value, live)
    target = labels
    if not labels.is_floating_point():
        k = outputs.shape[1]
        target = F.one_hot(labels, k).to(outputs)
        basis = torch.stack([(outputs.softmax(1) - target).flatten(), (target - 1 / k).flatten()], 1)  # [n k, 2]
        solved = torch.linalg.lstsq(basis, seen.flatten().unsqueeze(1)).solution.flatten()
        c, smoothing = float(solved[0]), float(solved[1] / solved[0])
        if _same((basis @ solved).view_as(seen), seen) and -1e-9 < smoothing < 1:
            smoothing = max(smoothing, 0.0) if smoothing > 1e-9 else 0.0
            total = F.cross_entropy(outputs, labels, reduction="sum", label_smoothing=smoothing)
            if _same(c * total, value.detach()):
                return "cross-entropy", c, smoothing
    if target.numel() != outputs.numel():
        return None
    target = target.view_as(outputs)
    c_bce = _ratio(seen, outputs.sigmoid() - target)
    total = F.binary_cross_entropy_with_logits(outputs, target, reduction="sum")
    if c_bce is not None and _same(c_bce * total, value.detach()):
        return "binary-cross-entropy", c_bce, 0.0
    c_square = _ratio(seen, 2 * (outputs - target))
    if c_square is not None and _same(c_square * (outputs - target).square().sum(), value.detach()):
        return "squared-error", c_square, 0.0
    return None


def _ratio(seen: Tensor, reference: Tensor) -> float | None:
    c = float((seen * reference).sum() / reference.square().sum())
    return c if c != 0 and _same(c * reference, seen) else None


def _same(a: Tensor, b: Tensor) -> bool:
    return bool(torch.linalg.vector_norm(a - b) <= 1e-6 * torch.linalg.vector_norm(b))


def reduction(loss: Loss, outputs: Tensor, labels: Tensor) -> Literal["mean", "sum"] | None:
    """Whether the loss is a mean or a sum over the batch: the batch taken twice leaves it, or doubles it. None: neither.

    >>> outputs, labels = torch.tensor([[1.0, 2.0]]), torch.tensor([0])
    >>> reduction(F.cross_entropy, outputs, labels), reduction(loss_named("cross-entropy", "sum"), outputs, labels)
    ('mean', 'sum')
    """
    once = float(loss(outputs, labels))
    twice = float(loss(torch.cat([outputs, outputs]), torch.cat([labels, labels])))
    if math.isclose(twice, once, rel_tol=1e-4, abs_tol=1e-9):
        return "mean"
    return "sum" if math.isclose(twice, 2 * once, rel_tol=1e-4) else None


def loss_named(name: str, reduction: Literal["mean", "sum"] = "mean") -> Loss:
    """A loss by its usual name: class labels [n] for all three; squared error and BCE also take real targets [n, k].

    squared-error is sum_j (output_j - onehot_j)^2 per example, binary-cross-entropy is on logits.
    Raises UnbatchError: unknown name.

    >>> loss_named("squared-error")(torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([0]))
    tensor(4.)
    """
    kinds: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "cross-entropy": lambda o, y: F.cross_entropy(o, y, reduction="none"),
        "binary-cross-entropy": lambda o, y: F.binary_cross_entropy_with_logits(
            o, _targets(o, y), reduction="none"
        ).sum(1),
        "squared-error": lambda o, y: (o - _targets(o, y)).square().sum(1),
    }
    if name not in kinds:
        raise UnbatchError(f"unknown loss {name!r}; known: {', '.join(kinds)}, or give a callable.")
    each = kinds[name]
    return lambda outputs, labels: each(outputs, labels).mean() if reduction == "mean" else each(outputs, labels).sum()


def _targets(outputs: Tensor, labels: Tensor) -> Tensor:
    """Labels as real targets of the outputs' shape [n, k]: class numbers as one-hot rows, bits as they are."""
    if labels.shape == outputs.shape:
        return labels.to(outputs)
    if outputs.shape[1] == 1:
        return labels.to(outputs).unsqueeze(1)
    return F.one_hot(labels, outputs.shape[1]).to(outputs)
