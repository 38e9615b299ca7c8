"""Losses: any callable ``(outputs, labels) -> scalar``, identified by probing it, never by its name."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from unbatch.errors import UnbatchError
from unbatch.label_form import REFUSALS, LabelForm, in_dtype

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class LossForm:
    """Which of the known losses a loss is, as its values and gradients say.

    L = factor * sum_i w_i l(outputs_i, labels_i); l is cross entropy (natural logarithm, with `smoothing`), binary cross
    entropy on logits summed over the outputs, or the squared error summed over the outputs. factor = scale for the sum; for
    the mean it is scale / sum_i w_i, or scale / n with `by_count`. w_i is 1 but where classes have `weights` (the largest
    is 1), and 0 for rows of the class number `ignored`, whether that is one of the classes or stands outside them.
    Any other sum or mean of one term an example is `additive`: focal loss, `pos_weight`, weights beside smoothing, Huber.
    Nothing is known of its l but that it is l(outputs_i, labels_i), so who needs l asks the loss itself; scale is 1.

    `labels` is the form in which the loss takes labels.

    >>> str(identify(lambda outputs, labels: 3 * F.cross_entropy(outputs, labels, label_smoothing=0.1), (2, 5)))
    'cross-entropy (mean, scale 3, label smoothing 0.1)'
    >>> form = identify(torch.nn.CrossEntropyLoss(ignore_index=1), (2, 3))
    >>> str(form), form.ignored, form.weights
    ('cross-entropy (mean, class 1 ignored)', 1, (1.0, 0.0, 1.0))
    """

    name: Literal["cross-entropy", "binary-cross-entropy", "squared-error", "additive"]
    reduction: Literal["mean", "sum"]
    scale: float
    labels: LabelForm
    smoothing: float = 0.0
    weights: tuple[float, ...] | None = None  # of the classes; None: all the same
    ignored: int | None = None  # the label whose rows count for nothing; usually -100, outside the classes
    by_count: bool = False  # the mean divides by the number of rows, ignored and light ones as well

    @property
    def classes(self) -> bool:
        """Whether labels are class numbers, and not bits or real targets."""
        return self.labels.kind == "class"

    def weight_of(self, labels: Tensor) -> Tensor:
        """The weight w_i of each of these labels [g] in the loss, in float64; 1 where labels are no class numbers.

        >>> identify(torch.nn.CrossEntropyLoss(ignore_index=1), (2, 3)).weight_of(torch.tensor([0, 1, 2]))
        tensor([1., 0., 1.], dtype=torch.float64)
        """
        if self.weights is None or labels.is_floating_point():
            return torch.ones(len(labels), dtype=torch.float64, device=labels.device)
        table = torch.tensor(self.weights, dtype=torch.float64, device=labels.device)
        return torch.where(labels < 0, 0.0, table[labels.clamp(0, len(table) - 1)])

    def __str__(self) -> str:
        extra = f", label smoothing {self.smoothing:.3g}" if self.smoothing else ""
        scale = "" if abs(self.scale - 1) < 1e-6 else f", scale {self.scale:.6g}"
        if self.weights is not None and set(self.weights) != {0.0, 1.0}:
            extra += ", classes weighted"
        elif self.weights is not None:
            idle = [str(j) for j, w in enumerate(self.weights) if w == 0]
            extra += f", class{'es' * (len(idle) > 1)} {', '.join(idle)} ignored"
        return f"{self.name} ({self.reduction}{scale}{extra})"


_Name = Literal["cross-entropy", "binary-cross-entropy", "squared-error"]
USUAL_IGNORED = (-100, -1, 255)  # numbers outside the classes by which rows are marked as unlabelled
MOST_WEIGHED_CLASSES = 1024  # whose weights are read one by one in a loss of unknown terms
WIDE_TARGETS = 30.0  # a squared error that turns into something else far out (Huber) shows itself there


@dataclass(frozen=True)
class _Fit:
    """A reference that explains the loss's value and gradient on one batch: the factor that each class's rows have."""

    name: _Name
    factors: Tensor  # [k] by class; [1] where labels are no class numbers
    smoothing: float

    def like(self, other: _Fit, close: float) -> bool:
        """Whether both are the same loss, with weights in the same proportion."""
        same = self.name == other.name and abs(self.smoothing - other.smoothing) <= close
        return same and _near(self.factors / self.factors.max(), other.factors / other.factors.max(), 10 * close)


def identify(loss: Loss, outputs_shape: tuple[int, ...], *, device: torch.device | None = None) -> LossForm | None:
    """The form of `loss` on outputs of shape [n, k] (or [n]), or None if it is no sum or mean of one term an example.

    Values and gradients are compared with each reference at random outputs and labels in float64 (to 1e-6; in float32 to
    1e-4 where the loss takes nothing else). Labels name every class, so that weights and an ignored class show
    themselves; a second batch with more of the heaviest class tells a sum, a mean over rows and a mean over weights apart.
    Label smoothing is solved for from the gradient of cross entropy, c (p_j - (1 - s) [j = y] - s / k).

    >>> form = identify(F.cross_entropy, (2, 3))
    >>> form.name, form.reduction, form.scale, form.classes, form.ignored
    ('cross-entropy', 'mean', 1.0, True, -100)
    >>> def focal(outputs, labels):
    ...     each = F.cross_entropy(outputs, labels, reduction="none")
    ...     return ((1 - (-each).exp()) ** 2 * each).sum()
    >>> str(identify(focal, (2, 3))), identify(lambda outputs, labels: outputs.std() + labels.sum(), (2, 3))
    ('additive (sum)', None)
    """
    try:
        labels = LabelForm.of(loss, outputs_shape[1:], device=device)
    except UnbatchError:
        return None
    for dtype, close in ((torch.float64, 1e-6), (torch.float32, 1e-4)):
        for reading in (_identified, _additive):
            try:
                found = reading(in_dtype(loss, dtype), outputs_shape[1:], labels, dtype, device, close)
            except REFUSALS:
                continue
            if found is not None:
                return found
    return None


def _identified(
    loss: Loss, shape: tuple[int, ...], form: LabelForm, dtype: torch.dtype, device: torch.device | None, close: float
) -> LossForm | None:
    """What the loss is by two batches, of which the second has three more rows, of its heaviest class."""
    rng, k = torch.Generator().manual_seed(0), form.count if form.kind == "class" else 0
    fits, sizes, heaviest = list[_Fit](), list[int](), 0
    for more in (0, 3):
        n = (k or (shape[0] if shape else 1) + 2) + more
        outputs = torch.randn((n, *shape), generator=rng, dtype=torch.float64).to(device, dtype)
        labels = form.draw(n, rng, outputs)
        if k:
            labels = torch.cat([torch.randperm(k, generator=rng), torch.full((more,), heaviest)]).to(outputs.device)
        fit = _fit(loss, outputs, labels, form, close)
        if fit is None:
            return None
        heaviest = int(fit.factors.argmax())
        fits.append(fit)
        sizes.append(n)
    first, second = fits
    if not first.like(second, close):
        return None
    weights = (first.factors / first.factors.max()).cpu()
    weights = weights.where(weights > 10 * close, 0.0).where((weights - 1).abs() > 10 * close, 1.0)
    peaks = [float(fit.factors.max()) for fit in fits]
    masses = [float(weights.sum()) + more if k else size for size, more in zip(sizes, (0, 3), strict=True)]
    uneven = bool(k) and bool((weights < 1).any())
    readings: tuple[tuple[Literal["mean", "sum"], list[float], bool], ...] = (
        ("sum", [1.0, 1.0], False),
        ("mean", masses, False),
        ("mean", [float(size) for size in sizes], True),
    )
    for reduction, over, counted in readings:
        scales = [peak * size for peak, size in zip(peaks, over, strict=True)]
        if math.isclose(*scales, rel_tol=close):
            scale, by_count = float(f"{scales[0]:.10g}"), counted and uneven
            made = LossForm(first.name, reduction, scale, form, first.smoothing, by_count=by_count)
            break
    else:
        return None
    if uneven:
        idle = (weights == 0).nonzero().flatten().tolist()
        table = tuple(float(f"{w:.10g}") for w in weights.tolist())
        made = replace(made, weights=table, ignored=idle[0] if len(idle) == 1 else None)
    return _with_ignored(loss, shape, made, dtype, close) if made.ignored is None and k else made


def _additive(
    loss: Loss, shape: tuple[int, ...], form: LabelForm, dtype: torch.dtype, device: torch.device | None, close: float
) -> LossForm | None:
    """The form of a sum or mean of one unknown term an example, by its value and gradient on batches and on single rows.

    Of a mean over class weights, sum_i w_i l_i / sum_i w_i, single rows show l_i, and a row of class j beside one of class
    0 its weight: the pair's gradient of the second row is w_j / (w_0 + w_j) of that row's own.
    """
    rng = torch.Generator().manual_seed(2)
    k = form.count if form.kind == "class" and not form.shape and form.count <= MOST_WEIGHED_CLASSES else 0
    n = max(k, 4) + 3
    outputs = torch.randn((n, *shape), generator=rng, dtype=torch.float64).to(device, dtype)
    labels = form.draw(n, rng, outputs)
    if k:
        labels = (torch.arange(n) % k).to(labels)
    each = torch.cat([gradient_of(loss, outputs[i : i + 1], labels[i : i + 1]) for i in range(n)])
    values = torch.stack([loss(outputs[i : i + 1], labels[i : i + 1]).detach() for i in range(n)])
    if not bool(each.isfinite().all()) or not bool(each.any()):
        return None

    def holds(weights: Tensor, *, mean: bool) -> bool:
        """Whether batches of two sizes are the weighted sum, or mean, of their rows."""
        for size in (n - 3, n):
            w = weights[:size] / (weights[:size].sum() if mean else 1)
            seen = gradient_of(loss, outputs[:size], labels[:size])
            value = loss(outputs[:size], labels[:size]).detach()
            if not _near(seen, each[:size] * w.view(-1, *(1,) * len(shape)), close):
                return False
            if not _near(value, (values[:size] * w).sum(), close):
                return False
        return True

    ones = torch.ones(n, dtype=dtype, device=outputs.device)
    if holds(ones, mean=False):
        return LossForm("additive", "sum", 1.0, form)
    if holds(ones, mean=True):
        return LossForm("additive", "mean", 1.0, form)
    if not k:
        return None
    table = torch.ones(k, dtype=dtype, device=outputs.device)
    for j in range(1, k):
        pair = torch.tensor([0, j], device=outputs.device)
        share = float((gradient_of(loss, outputs[pair], labels[pair])[1] * each[j]).sum() / each[j].square().sum())
        if not 0 < share < 1:
            return None
        table[j] = share / (1 - share)
    if not holds(table[labels], mean=True):
        return None
    weights = tuple(float(f"{w:.10g}") for w in (table / table.max()).tolist())
    return LossForm("additive", "mean", 1.0, form, weights=weights)


def _with_ignored(loss: Loss, shape: tuple[int, ...], form: LossForm, dtype: torch.dtype, close: float) -> LossForm:
    """The same form with the number outside the classes, if there is one, whose rows count for nothing."""
    k, rng = form.labels.count, torch.Generator().manual_seed(1)
    outputs = torch.randn((3, *shape), generator=rng, dtype=torch.float64).to(
        dtype
    )  # a GPU would not survive a wrong one
    heaviest = form.weights.index(1.0) if form.weights else 0
    for number in USUAL_IGNORED:
        if 0 <= number < k:
            continue
        try:
            slope = gradient_of(loss, outputs, torch.tensor([heaviest, heaviest, number]))
            whole = gradient_of(loss, outputs[:2], torch.tensor([heaviest, heaviest]))
        except REFUSALS:
            continue
        if bool(slope[2].any()) or not bool(slope.isfinite().all()):
            continue
        ratio = float(slope[:2].norm() / whole.norm())
        for by_count, expected in ((form.by_count, 1.0), (form.reduction == "mean", 2 / 3)):
            if math.isclose(ratio, expected, rel_tol=10 * close):
                return replace(form, ignored=number, by_count=by_count)
    return form


def gradient_of(loss: Loss, outputs: Tensor, labels: Tensor) -> Tensor:
    """The gradient of the loss with respect to the outputs [n, ...], by autograd.

    >>> gradient_of(lambda o, y: (o - y).square().sum(), torch.tensor([[1.0]]), torch.tensor([[0.5]]))
    tensor([[1.]])
    """
    live = outputs.detach().clone().requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(loss(live, labels), live)
    return slope


def _fit(loss: Loss, outputs: Tensor, labels: Tensor, form: LabelForm, close: float) -> _Fit | None:
    """Name, factors and smoothing that explain the loss's value and gradient at these outputs."""
    seen, value = gradient_of(loss, outputs, labels), loss(outputs, labels).detach()
    if form.kind == "class":
        found = _cross_entropy(outputs, labels, seen, value, close)
        if found is not None or outputs.ndim != 2:
            return found
        target = F.one_hot(labels, form.count).to(outputs)
    elif labels.numel() == outputs.numel() and form.kind != "sign":
        target = labels.view_as(outputs).to(outputs)
    else:
        return None
    c_bce = _ratio(seen, outputs.sigmoid() - target, close)
    total = F.binary_cross_entropy_with_logits(outputs, target, reduction="sum")
    if c_bce is not None and _near(c_bce * total, value, close):
        return _Fit("binary-cross-entropy", torch.tensor([c_bce], dtype=torch.float64), 0.0)
    c_square = _ratio(seen, 2 * (outputs - target), close)
    if c_square is None or not _near(c_square * (outputs - target).square().sum(), value, close):
        return None
    if form.kind != "class" and not form.whole:
        far = WIDE_TARGETS * torch.linspace(-1, 1, labels.numel()).to(labels).view_as(labels)
        if not _near(gradient_of(loss, outputs, far), c_square * 2 * (outputs - far.view_as(outputs)), close):
            return None
    return _Fit("squared-error", torch.tensor([c_square], dtype=torch.float64), 0.0)


def _cross_entropy(outputs: Tensor, labels: Tensor, seen: Tensor, value: Tensor, close: float) -> _Fit | None:
    """Cross entropy with one factor and label smoothing, or with a factor for each class (weights, an ignored class)."""
    k = outputs.shape[1]
    target = F.one_hot(labels, k).to(outputs)
    pull = outputs.softmax(1) - target
    basis = torch.stack([pull.flatten(), (target - 1 / k).flatten()], 1)  # [n k, 2]
    solved = torch.linalg.solve(basis.T @ basis, basis.T @ seen.flatten())
    c, smoothing = float(solved[0]), float(solved[1] / solved[0])
    if _near((basis @ solved).view_as(seen), seen, close) and -1e-9 < smoothing < 1:
        smoothing = smoothing if smoothing > max(1e-9, 1e-3 * close) else 0.0
        total = F.cross_entropy(outputs, labels, reduction="sum", label_smoothing=smoothing)
        if _near(c * total, value, close):
            return _Fit("cross-entropy", torch.full((k,), c, dtype=torch.float64), smoothing)
    each = (seen * pull).sum(1) / pull.square().sum(1)  # [n]
    if not _near(each[:, None] * pull, seen, close) or not bool((each > -close * each.abs().max()).all()):
        return None
    factors = torch.zeros(k, dtype=torch.float64, device=outputs.device).scatter(0, labels, each.double())
    if not _near(factors[labels], each.double(), close) or not bool(each.any()):
        return None
    total = (each * F.cross_entropy(outputs, labels, reduction="none")).sum()
    return _Fit("cross-entropy", factors, 0.0) if _near(total, value, close) else None


def _ratio(seen: Tensor, reference: Tensor, close: float) -> float | None:
    c = float((seen * reference).sum() / reference.square().sum())
    return c if c != 0 and _near(c * reference, seen, close) else None


def _near(a: Tensor, b: Tensor, close: float) -> bool:
    return bool(torch.linalg.vector_norm(a - b) <= close * torch.linalg.vector_norm(b))


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
