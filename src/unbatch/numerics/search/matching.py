"""Gradient matching: how far two updates are apart, and the published searches that make it small.

An update is a sequence of tensors. A search is a generator of (objective, point), so that its caller can time it, judge
the points and stop it; the point is the one at which the objective was taken.

Sources: Zhu, Liu, Han, Deep Leakage from Gradients, NeurIPS 2019; Geiping et al., Inverting Gradients, NeurIPS 2020;
Hatamizadeh et al., Do Gradient Inversion Attacks Make Federated Learning Unsafe?, IEEE TMI 2023.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

Objective = Callable[[Tensor], Tensor]  # a point [n, p] -> scalar
Evaluations = Iterator[tuple[float, Tensor]]


def squared_difference(found: Sequence[Tensor], seen: Sequence[Tensor]) -> Tensor:
    """How far two updates are apart, squared.

    sum |found - seen|^2 over all entries.

    >>> squared_difference([torch.ones(2), torch.zeros(1)], [torch.zeros(2), torch.zeros(1)])
    tensor(2.)
    """
    return norm_squared([a - b for a, b in zip(found, seen, strict=True)])


def cosine_distance(found: Sequence[Tensor], seen: Sequence[Tensor], square: Tensor | None = None) -> Tensor:
    """How far two updates point apart, whatever their sizes.

    1 - <found, seen> / (|found| |seen|), all parameters as one vector; 1 where either is zero.

    `square` is |seen|^2, where it is at hand.

    >>> cosine_distance([torch.tensor([1.0, 0.0])], [torch.tensor([2.0, 0.0])])
    tensor(0.)
    >>> cosine_distance([torch.tensor([1.0, 0.0])], [torch.tensor([0.0, 3.0])])
    tensor(1.)
    """
    product = torch.stack([(a * b).sum() for a, b in zip(found, seen, strict=True)]).sum()
    squares = [norm_squared(found), norm_squared(seen) if square is None else square]
    tiny = torch.finfo(product.dtype).tiny
    return 1 - product / (squares[0].clamp_min(tiny).sqrt() * squares[1].clamp_min(tiny).sqrt())


def norm_squared(update: Sequence[Tensor]) -> Tensor:
    """The size of an update, squared.

    sum |update|^2 over all entries.

    >>> norm_squared([torch.tensor([3.0]), torch.tensor([[4.0]])])
    tensor(25.)
    """
    return torch.stack([t.square().sum() for t in update]).sum()


def total_variation(pictures: Tensor) -> Tensor:
    """How rough pictures are.

    Mean absolute difference of neighbours along each of the last two axes [..., h, w], added.

    >>> total_variation(torch.tensor([[0.0, 1.0], [0.0, 1.0]]))
    tensor(1.)
    """
    down, across = pictures.diff(dim=-2).abs(), pictures.diff(dim=-1).abs()
    return sum((part.mean() for part in (down, across) if part.numel()), pictures.new_zeros(()))


def rough_length(pictures: Tensor) -> Tensor:
    """How rough pictures are, by lengths: the l2 norms of the differences of neighbours in four directions, added.

    Down, across and along both diagonals of the last two axes [..., h, w].

    >>> rough_length(torch.tensor([[0.0, 1.0], [0.0, 1.0]])).round(decimals=3)
    tensor(3.4140)
    """
    parts = [
        pictures.diff(dim=-2),
        pictures.diff(dim=-1),
        pictures[..., 1:, 1:] - pictures[..., :-1, :-1],
        pictures[..., 1:, :-1] - pictures[..., :-1, 1:],
    ]
    return torch.stack([torch.linalg.vector_norm(part) for part in parts]).sum()


def signed_adam(
    objective: Objective, start: Tensor, *, steps: int, rate: float = 0.1, box: float | None = None, decay: bool = True
) -> Evaluations:
    """The search of Geiping et al.: every entry moves by the same amount.

    Adam on the sign of the gradient, within [-box, box].

    With `decay` the rate falls tenfold after 3/8, 5/8 and 7/8 of the steps.

    >>> *_, (value, x) = signed_adam(lambda x: (x - 0.5).square().sum(), torch.zeros(1, 2), steps=100)
    >>> bool((x - 0.5).abs().max() < 0.01)
    True
    """
    point = start.detach().clone().requires_grad_()
    adam = torch.optim.Adam([point], lr=rate)
    falls = [int(steps * share) for share in (3 / 8, 5 / 8, 7 / 8)] if decay else []
    for step in range(1, steps + 1):
        value, gradient = _evaluate(objective, point)
        yield value, point.detach().clone()
        point.grad = gradient.sign()
        adam.step()
        adam.param_groups[0]["lr"] *= 0.1 ** falls.count(step)
        if box is not None:
            with torch.no_grad():
                point.clamp_(-box, box)
    yield _evaluate(objective, point)[0], point.detach()


def noisy_adam(
    objective: Objective,
    start: Tensor,
    rng: torch.Generator,
    *,
    steps: int,
    rate: float = 0.1,
    box: float | None = None,
) -> Evaluations:
    """The search of Hatamizadeh et al.: Adam with noise of a tenth of its rate, which rises, and then falls to nothing.

    Betas of .9; the rate rises over the first tenth of the steps, at most 100 of them, and falls as a cosine.

    >>> rng = torch.Generator().manual_seed(0)
    >>> *_, (value, x) = noisy_adam(lambda x: (x - 0.5).square().sum(), torch.zeros(1, 2), rng, steps=200)
    >>> bool((x - 0.5).abs().max() < 0.01)
    True
    """
    point = start.detach().clone().requires_grad_()
    adam = torch.optim.Adam([point], lr=rate, betas=(0.9, 0.9))
    rising = max(1, min(100, steps // 10))
    for step in range(steps):
        value, gradient = _evaluate(objective, point)
        yield value, point.detach().clone()
        share = max(0, step - rising) / max(1, steps - rising)
        here = rate * min(1.0, (step + 1) / rising) * (1 + math.cos(math.pi * share)) / 2
        adam.param_groups[0]["lr"] = here
        point.grad = gradient
        adam.step()
        noise = torch.randn(point.shape, generator=rng, dtype=torch.float64).to(point)
        with torch.no_grad():
            point.add_(0.1 * here * noise)
            if box is not None:
                point.clamp_(-box, box)
    yield _evaluate(objective, point)[0], point.detach()


def lbfgs(objective: Objective, start: Tensor, *, steps: int, rate: float = 1.0, history: int = 100) -> Evaluations:
    """The search of Zhu et al.: L-BFGS.

    L-BFGS with steps of fixed length `rate`; ends early where the objective is no longer finite.

    >>> *_, (value, x) = lbfgs(lambda x: (x - 0.5).square().sum(), torch.zeros(1, 2), steps=5)
    >>> x.round(decimals=4)
    tensor([[0.5000, 0.5000]])
    """
    point = start.detach().clone().requires_grad_()
    solver = torch.optim.LBFGS(
        [point], lr=rate, max_iter=1, history_size=history, tolerance_grad=0, tolerance_change=0
    )  # one iteration a call: it then evaluates once and keeps its memory

    def closure() -> Tensor:
        value = objective(point)
        (point.grad,) = torch.autograd.grad(value, point)
        return value.detach()

    for _ in range(steps):
        here = point.detach().clone()
        value = float(solver.step(closure))  # type: ignore[no-untyped-call]
        if value != value or abs(value) == float("inf"):
            yield float("inf"), here
            return
        yield value, here


def _evaluate(objective: Objective, point: Tensor) -> tuple[float, Tensor]:
    value = objective(point)
    (gradient,) = torch.autograd.grad(value, point)
    return float(value.detach()), gradient
