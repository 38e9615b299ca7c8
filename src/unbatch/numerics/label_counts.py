"""Label counts: how often each class occurs in a batch, from the gradient of a classifier's last layer.

Example i weighs a_i in the loss, L = sum_i a_i l(o_i, y_i) (a_i = 1 / n for the mean); the last layer is o = V h + b.
With cross entropy, p_i = softmax(o_i) and label smoothing e,

    dL/db_c = sum_i a_i (p_ic - (1 - e) [y_i = c] - e / k),     dL/dV_c = the same sum, each term times h_i.

Every p_ic is positive, so the labels of class c must pay for all of a negative entry: that is a proof, whatever the
inputs, the weights and the layers below. The rest of the count is hidden in sum_i p_ic and can only be estimated.

Source: Zhao et al., iDLG, 2020 (one example); Wainakh et al., Label Leakage from Gradients, PoPETs 2022 (counts);
Geng et al., Towards General Deep Leakage in Federated Learning, 2021 (probabilities from stand-in inputs).
"""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor

CountedLoss = Literal["cross-entropy", "binary-cross-entropy", "squared-error"]


def label_counts(
    weight: Tensor | None,  # dL/dV [k, m]
    bias: Tensor | None,  # dL/db [k]
    n: int,
    *,
    factor: float,
    expected: Tensor,
    loss: CountedLoss = "cross-entropy",
    smoothing: float = 0.0,
    features: Tensor | None = None,
    nonnegative: bool = False,
    most: float | None = None,
    slack: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """How often each class occurs in a batch, from the gradient of a classifier's last layer.

    Proven least and greatest, and estimated, number of examples of each class: three int64 [k].

    `factor` is the mean a_i, `most` the largest where they differ. `expected` [k] stands in for sum_i p_ic (for the sum
    of the outputs under squared error) and `features` [m] for h; only the estimate depends on them. `nonnegative` says
    that h >= 0 always. `slack` is the error of a gradient's entry beyond its rounding. A single logit counts as two
    classes. The estimate lies within the bounds and adds up to n.

    Raises ValueError: neither gradient is given.

    >>> logits, labels = torch.zeros(3, 2).requires_grad_(), torch.tensor([0, 0, 1])
    >>> bias = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, labels), logits)[0].sum(0)
    >>> least, most, counts = label_counts(None, bias, 3, factor=1 / 3, expected=torch.tensor([1.5, 1.5]))
    >>> least, most, counts
    (tensor([1, 0]), tensor([3, 2]), tensor([2, 1]))
    """
    held = bias if bias is not None else weight
    if held is None:
        raise ValueError("label counts need the gradient of the last layer's weight or bias; both are missing.")
    k = len(_two_classes(held))
    lower, upper = torch.zeros(k, dtype=torch.int64), torch.full((k,), n, dtype=torch.int64)
    honest = loss != "squared-error"
    if loss == "cross-entropy":
        honest = cancels(held, n, factor=factor, slack=slack)
    if honest and bias is not None:
        lower, upper = count_bounds(bias, n, factor=factor, loss=loss, smoothing=smoothing, most=most, slack=slack)
    if honest and weight is not None and not smoothing:
        found = present(weight, n, nonnegative=nonnegative, slack=slack)
        lower, upper = _tighten(torch.maximum(lower, found.long()), upper, n)
    pull = torch.zeros(k, dtype=torch.float64)  # sum_i a_i (p_i - target_i)
    if bias is not None:
        pull = _two_classes(bias).double().cpu()
    elif weight is not None and features is not None and bool(features.any()):
        h = features.double().cpu()
        pull = _two_classes(weight).double().cpu() @ h / (h @ h)
    step = 2 * factor if loss == "squared-error" else factor
    expected = expected.double().cpu()
    expected = torch.cat([n - expected, expected]) if len(expected) < k else expected
    target = (expected - pull / step - n * smoothing / k) / (1 - smoothing)
    return lower, upper, apportion(target, lower, upper, n)


def count_bounds(
    bias: Tensor,  # dL/db [k]
    n: int,
    *,
    factor: float,
    loss: CountedLoss = "cross-entropy",
    smoothing: float = 0.0,
    most: float | None = None,
    slack: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Least and greatest number of examples of each class that any batch with this gradient can have.

    Proven bounds, int64 [k] each, on the class counts c with sum c = n.

    c_j >= ceil(-(dL/db_j / a + n e / k) / (1 - e) - t) and c_j <= n - sum of the other lower bounds; under binary cross
    entropy also c_j <= n - ceil(dL/db_j / a - t). They are the best possible: every c between them that adds up to n
    belongs to some probabilities. t is `sum_rounding` plus the slack. Shrinking the gradient, or every example's share of
    it, only loosens them. A gradient that no batch of n examples can have (under cross entropy it does not cancel, or
    the bounds contradict each other) proves nothing: the answer is 0 and n.

    >>> count_bounds(torch.tensor([-0.5, 0.25, 0.25]), 4, factor=1 / 4)  # the first class must pay for the others
    (tensor([2, 0, 0]), tensor([4, 2, 2]))
    """
    bias = _two_classes(bias)
    k = len(bias)
    tolerance = sum_rounding(n, bias.dtype) + slack / factor
    pull = bias.double().cpu() / factor  # sum_i (p_i - target_i)
    shrink = factor / (most or factor)  # an example that weighs more than the mean must not count twice
    owed = -shrink * (pull + n * smoothing / k) / (1 - smoothing)
    lower = (owed - tolerance / (1 - smoothing)).ceil().clamp_min(0).long()
    upper = torch.full((k,), n, dtype=torch.int64)
    if loss == "binary-cross-entropy":
        upper = n - (shrink * pull - tolerance).ceil().clamp_min(0).long()
    elif not cancels(bias, n, factor=factor, slack=slack):
        lower = torch.zeros_like(lower)
    return _tighten(lower, upper, n)


def counts_by_sign(
    weight: Tensor | None, bias: Tensor | None, k: int, n: int, *, slack: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """How often each class occurs, from the signs that training by Adam leaves.

    The same from an update after - before of Adam without weight decay, which holds little but signs.

    Adam moves an entry by a positive sum of its gradients over a positive number, so an entry that grew had a negative
    gradient at some step: its class occurs. `weight` counts only where the features are nonnegative. The estimate
    spreads n over the classes that occur.

    >>> least, most, counts = counts_by_sign(None, torch.tensor([0.1, -0.1, 0.1]), 3, 4)
    >>> least, counts
    (tensor([1, 0, 1]), tensor([2, 0, 2]))
    """
    grown = torch.zeros(k, dtype=torch.bool)
    for update in (weight, bias):
        if update is not None:
            grown |= (_two_classes(update).cpu() > slack).reshape(k, -1).any(1)
    lower, upper = _tighten(grown.long(), torch.full((k,), n, dtype=torch.int64), n)
    share = grown.double() if bool(grown.any()) else torch.ones(k, dtype=torch.float64)
    return lower, upper, apportion(n * share / share.sum(), lower, upper, n)


def cancels(gradient: Tensor, n: int, *, factor: float, slack: float = 0.0) -> bool:
    """Whether a gradient is untouched enough to add up to zero over the classes.

    Whether dL/db [k] or dL/dV [k, m] adds up to zero over the classes, as probabilities and labels both do.

    Noise, pruning and quantisation destroy it, so it tells an update that was tampered with. A weight's entries hold
    features of unknown size: their sum is compared with the gradient's own norm, to sqrt(eps).

    >>> [cancels(torch.tensor([-0.5, c, 0.25]), 4, factor=1 / 4) for c in (0.25, 0.0)]
    [True, False]
    """
    rows = _two_classes(gradient).double().cpu()
    off = float(torch.linalg.vector_norm(rows.sum(0)))
    if gradient.ndim == 1:
        return off <= len(rows) * (sum_rounding(n, gradient.dtype) * factor + slack)
    precision = math.sqrt(torch.finfo(gradient.dtype).eps)
    return off <= precision * float(torch.linalg.vector_norm(rows)) + slack * math.sqrt(rows.numel())


def present(weight: Tensor, n: int, *, nonnegative: bool = False, slack: float = 0.0) -> Tensor:
    """Which classes certainly occur in the batch.

    Classes [k] that the weight's gradient dL/dV [k, m] proves to occur under cross entropy.

    Features h >= 0: an absent class has dL/dV_c = sum_i a_i p_ic h_i >= 0, and floating sums of nonnegative terms are
    nonnegative, so any negative entry is a proof. One example: the rows are t_c h with t = p - e_y, so the label's row
    points against all others; two others beyond rounding tell the sides apart, two opposite rows alone do not.

    >>> present(torch.tensor([[0.2, 0.1], [-0.3, 0.1], [0.1, 0.0]]), 4, nonnegative=True)
    tensor([False,  True, False])
    """
    rows = _two_classes(weight).double().cpu()
    found = (rows < -slack).any(1) if nonnegative else torch.zeros(len(rows), dtype=torch.bool)
    if n == 1:
        U, S, _ = torch.linalg.svd(rows, full_matrices=False)
        rough = 64 * torch.finfo(weight.dtype).eps * S[0] + slack * math.sqrt(rows.numel())
        t = U[:, 0] * S[0]
        for alone, others in ((t > rough, t < -rough), (t < -rough, t > rough)):
            if bool((S[1:] <= rough).all()) and int(alone.sum()) == 1 and int(others.sum()) > 1:
                found |= alone
    return found


def occurring(gradient: Tensor, n: int, *, factor: float, slack: float = 0.0, sums: bool = True) -> Tensor:
    """Which classes certainly occur in a batch of n class numbers, at any positive factor: bool [k].

    Of dL/db [k], or dL/dV [k, m] with nonnegative features, a class's entries are sums of positive terms but for its own
    examples, so a negative one names it, whatever the factor, the classes' weights and how many rows are ignored. Were the
    sign of the gradient the other one, its positive entries would name classes: more of them than n rule that out. Nothing
    is said where more classes are named than there are examples, or the classes' entries do not add up to zero (which those
    of Adam's steps never do: without `sums` they need not).

    >>> occurring(torch.tensor([-0.5, 0.25, 0.125, 0.125]), 1, factor=1.0)
    tensor([ True, False, False, False])
    >>> occurring(torch.tensor([-0.5, 0.5]), 1, factor=1.0)  # or the second one, had the sign been lost
    tensor([False, False])
    """
    rows = _two_classes(gradient).double().cpu()
    rough = sum_rounding(n, gradient.dtype) * factor + slack if gradient.ndim == 1 else slack
    named, against = ((sign * rows > rough).reshape(len(rows), -1).any(1) for sign in (-1, 1))
    whole = not sums or cancels(gradient, n, factor=factor, slack=slack)
    if int(named.sum()) > n or int(against.sum()) <= n or not whole:
        return torch.zeros_like(named)
    return named


def weighted_counts(
    bias: Tensor | None, n: int, weights: Tensor, mean: Tensor, scale: float, *, total: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """How often each class occurs under a loss with class weights w [k]: nothing sure, 0 and n, and an estimate.

    c_j w_j = W mean_j - u_j, with W = sum_i w_i the weight of the batch, `mean` [k] standing in for the weighted mean
    probabilities, and u = dL/db / scale for the sum over examples (`total`), W dL/db / scale for the mean over weights;
    W is such that the counts add up to n. Classes of weight 0 cannot be seen and count as absent.

    >>> slope, w = torch.tensor([-0.25, 0.0, 0.25]), torch.tensor([0.5, 1.0, 1.0])
    >>> weighted_counts(slope, 4, w, torch.tensor([0.25, 0.5, 0.25]), 1.0, total=False)[2]
    tensor([3, 1, 0])
    """
    k, seen = len(weights), weights.double() > 0
    lower, upper = torch.zeros(k, dtype=torch.int64), torch.full((k,), n, dtype=torch.int64)
    w, p = weights.double().where(seen, 1.0), mean.double().cpu() * seen
    u = torch.zeros(k, dtype=torch.float64) if bias is None else bias.double().cpu() * seen / scale
    if total:
        W = (n + float((u / w).sum())) / float((p / w).sum())
        target = (W * p - u) / w
    else:
        target = (p - u).clamp_min(0) / w
        target = n * target / target.sum().clamp_min(1e-300)
    return lower, upper, apportion(target, lower, upper.where(seen, 0), n)


def class_of(row: Tensor, tolerance: float) -> int | None:
    """The class of which a label row [k] is the one-hot row, to a tolerance; of one number whether it is 0 or 1.

    >>> class_of(torch.tensor([0.0, 1.0]), 1e-3), class_of(torch.tensor([0.4, 0.6]), 1e-3), class_of(torch.ones(1), 1e-3)
    (1, None, 1)
    """
    likeliest = int(row.argmax()) if len(row) > 1 else int(float(row) > 0.5)
    ideal = torch.zeros_like(row) if len(row) > 1 else torch.full_like(row, float(likeliest))
    if len(row) > 1:
        ideal[likeliest] = 1
    return likeliest if float((row - ideal).abs().max()) <= tolerance else None


def factor_of_class(row: Tensor, pull: Tensor) -> float | None:
    """The factor by which an update of one class was multiplied, where that explains why its label row [k] is no class.

    `pull` [k] is dL/db / a. A row computed back as t = p - c (p - e) is e at no factor but c: its entries beside the class
    are (1 - c) p, where those of the pull are c p, in one proportion for all. None: they are not, or are too few to tell.

    >>> p, e = torch.tensor([0.2, 0.3, 0.5]), torch.tensor([0.0, 1.0, 0.0])
    >>> factor_of_class(p - 2 * (p - e), 2 * (p - e)), factor_of_class(t := torch.tensor([0.6, 0.4, 0.0]), p - t)
    (2.0, None)
    """
    if len(row) < 3:
        return None
    pull = pull.double().cpu()
    others = torch.ones(len(row), dtype=torch.bool)
    others[int(pull.argmin())] = False
    left, right = row.double().cpu()[others], pull[others]
    ratio = float((left @ right) / (right @ right).clamp_min(1e-300))  # (1 - c) / c
    if ratio == 0 or float((left - ratio * right).norm()) > 1e-2 * float(left.norm()):
        return None
    p = left + right
    c = float((right @ p) / (p @ p))
    return float(f"{c:.6g}") if c else None


def apportion(target: Tensor, lower: Tensor, upper: Tensor, n: int) -> Tensor:
    """Shares made whole numbers of a given sum.

    Whole counts [k] within the bounds that add up to n; each next one goes where `target` misses most.

    Needs sum lower <= n <= sum upper.

    >>> apportion(torch.tensor([2.6, 1.3, 0.1]), torch.tensor([0, 0, 0]), torch.tensor([4, 4, 4]), 4)
    tensor([3, 1, 0])
    """
    counts = lower.clone()
    for _ in range(n - int(lower.sum())):
        missing = torch.where(counts < upper, target - counts, -math.inf)
        counts[int(missing.argmax())] += 1
    return counts


def sum_rounding(n: int, dtype: torch.dtype) -> float:
    """How wrong rounding can make the gradient of an output's bias.

    Largest error of sum_i (p_ic - [y_i = c]) from n terms of size at most 1, each rounded, summed in `dtype`.

    n eps (2 + sqrt n): the probabilistic bound 2 sqrt(n) u sum |terms| with u = eps / 2 taken at twice that, and two
    roundings a term. Source: Higham and Mary, SIAM J. Sci. Comput. 41, 2019.

    >>> sum_rounding(4, torch.float32) < 1e-5
    True
    """
    return float(torch.finfo(dtype).eps) * n * (2 + math.sqrt(n))


def impulse(
    steps: int, *, learning_rate: float, momentum: float = 0.0, weight_decay: float = 0.0
) -> tuple[float, Tensor]:
    """How much each gradient of a few steps of SGD counts in the change that is sent.

    What SGD makes of its gradients: w_after = decay * w_before - sum_s weights_s g_s, as decay, weights [steps].

    v <- momentum * v + g + weight_decay * w;  w <- w - learning_rate * v.

    >>> impulse(3, learning_rate=0.1)
    (1.0, tensor([0.1000, 0.1000, 0.1000], dtype=torch.float64))
    >>> impulse(2, learning_rate=0.1, momentum=0.5)[1]
    tensor([0.1500, 0.1000], dtype=torch.float64)
    """

    def path(w: float, kick: float) -> list[float]:
        v, seen = 0.0, []
        for s in range(steps):
            v = momentum * v + (kick if s == 0 else 0.0) + weight_decay * w
            w -= learning_rate * v
            seen.append(w)
        return seen

    weights = -torch.tensor(path(0.0, 1.0)[::-1], dtype=torch.float64)  # a gradient s steps before the end
    return path(1.0, 0.0)[-1] if steps else 1.0, weights


def _tighten(lower: Tensor, upper: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The bounds made consistent with a total of n; 0 and n where none is."""
    lower, upper = (
        torch.maximum(lower, n - (upper.sum() - upper)),
        torch.minimum(upper, n - (lower.sum() - lower)),
    )
    if bool((lower > upper).any()):
        return torch.zeros_like(lower), torch.full_like(upper, n)
    return lower, upper


@overload
def _two_classes(gradient: Tensor) -> Tensor: ...
@overload
def _two_classes(gradient: None) -> None: ...
def _two_classes(gradient: Tensor | None) -> Tensor | None:
    """A single logit's gradient as that of two classes: -g for the zeros, g for the ones."""
    return torch.cat([-gradient, gradient]) if gradient is not None and len(gradient) == 1 else gradient
