"""Trained weights as a weighted sum of gradients at unknown inputs, and the published search for these.

At a stationary margin theta = sum_i lambda_i grad Phi(x_i, y_i), lambda_i >= 0: Phi = y f for two classes (Haim et al.,
NeurIPS 2022), f_y - max_{j != y} f_j for several; and where weight decay holds a regression, theta = sum_i lambda_i grad
f(x_i) with lambda_i of either sign (Buzaglo et al., NeurIPS 2023).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from unbatch.errors import NotApplicable
from unbatch.inversion.view import View
from unbatch.numerics.search.smooth_backward import SmoothBackward
from unbatch.progress import tick

Sides = Literal["two classes", "classes", "numbers"]

PICTURES = (-1.0, 1.0)  # range of inputs in the published attacks, where none is known
FLOOR_WEIGHT = 5.0  # of strengths below their least, as published
PLACES_A_PICTURE = 2  # candidates for each example that was trained on
SAME_PICTURE = 0.95  # normalised correlation of two candidates of one class, from which on they are one
SCALED = 2.0  # times the weights, to see how outputs grow with them
WHOLE_POWER = 1e-3  # from a whole number, up to which a power is one
PROBED = 64
STARTS_AT, FLOORS, SHARPNESSES = (1e-6, 0.1), (0.01, 0.5), (10.0, 500.0)  # as published
RATES, STRENGTH_RATES = (3e-3, 0.2), (1e-3, 0.5)  # of Adam; published are 1e-5 to 1, of plain descent for 50,000 steps
TICKED = 25


@dataclass(frozen=True)
class SumSettings:
    """One draw of what the published attacks leave open: from the ranges of their sweeps, but for the rates.

    >>> SumSettings.drawn(torch.Generator().manual_seed(0)) == SumSettings.drawn(torch.Generator().manual_seed(0))
    True
    """

    start: float  # standard deviation of candidates
    rate: float
    strength_rate: float
    floor: float  # least strength, in units of their mean
    alpha: float

    @classmethod
    def drawn(cls, rng: torch.Generator) -> SumSettings:
        u = torch.rand(5, generator=rng, dtype=torch.float64).tolist()
        spans = (STARTS_AT, RATES, STRENGTH_RATES)
        logs = [a * (b / a) ** t for t, (a, b) in zip(u[:3], spans, strict=True)]
        flat = [a + t * (b - a) for t, (a, b) in zip(u[3:], (FLOORS, SHARPNESSES), strict=True)]
        return cls(*logs, *flat)


@dataclass(frozen=True, eq=False)
class SumGuess:
    """What one draw ended at: inputs [n, ...] with classes [n] (none of numbers), the strongest first; and its own loss.

    `loss` is all that was minimised and `residual` the share |theta - sum|^2 / |theta|^2 in it.
    """

    settings: SumSettings
    inputs: Tensor
    classes: Tensor | None
    strengths: Tensor
    loss: float
    residual: float


@dataclass(frozen=True, eq=False)
class GradientSum:
    """A released network, rescaled to a margin near one, and what of it the conditions speak of.

    `unit` is the mean strength of m candidates that they ask for: |theta|^2 = degree sum_i lambda_i Phi_i, at Phi_i = 1.
    """

    model: nn.Module
    weights: dict[str, Tensor]
    sides: Sides
    outputs: int
    degree: float
    shape: tuple[int, ...]
    box: tuple[float, float]

    @property
    def size(self) -> Tensor:
        """|theta|^2."""
        return torch.stack([p.square().sum() for p in self.weights.values()]).sum()

    def unit(self, m: int) -> float:
        return float(self.size.detach()) / (self.degree * m)

    def advantage(self, inputs: Tensor, classes: Tensor) -> Tensor:
        """Phi of each candidate: [m, 1], and for numbers all outputs [m, k]."""
        out: Tensor = functional_call(self.model, self.weights, (inputs.view(-1, *self.shape),)).flatten(1)
        if self.sides == "numbers":
            return out
        if self.sides == "two classes":
            return out * (2 * classes[:, None] - 1)
        own = F.one_hot(classes, self.outputs).bool()
        return (out[own] - out.masked_fill(own, -math.inf).amax(1))[:, None]

    def residual(self, inputs: Tensor, classes: Tensor, strengths: Tensor, alpha: float) -> Tensor:
        """|theta - sum_i lambda_i grad Phi_i|^2 / |theta|^2, summed over all parameters; differentiable."""
        with SmoothBackward(alpha):
            total = (strengths * self.advantage(inputs, classes)).sum()
        sums = torch.autograd.grad(total, list(self.weights.values()), create_graph=True)
        off = [(p.detach() - g).square().sum() for p, g in zip(self.weights.values(), sums, strict=True)]
        return torch.stack(off).sum() / self.size.detach()


def gradient_sum_of(view: View, rng: torch.Generator) -> GradientSum:
    """The conditions that a released model's weights obey at the end of its training, by the form of its loss.

    Raises NotApplicable: the loss is none of the three, nothing in the network is rectified, or its outputs do not grow by
    one whole power with the weights, which the conditions of a margin take.

    >>> import unbatch
    >>> client = unbatch.Case.parse("trained:batch=2,width=20,steps=50").setting()
    >>> told = {"knowledge": client.knowledge, "training": client.training}
    >>> seen, _ = unbatch.observe(client.model, client.loss, client.inputs, client.labels, **told)
    >>> found = gradient_sum_of(View.of(seen), torch.Generator().manual_seed(0))
    >>> found.sides, found.degree
    ('two classes', 2.0)
    """
    view.refuse_tokens()
    sides, outputs = _sides(view), math.prod(view.outputs)
    model = copy.deepcopy(view.model).double().eval()
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    shape, probe = tuple(view.knowledge.input_shape), view.stand_in(PROBED, rng).double()
    box = tuple(view.knowledge.get("input_range", PICTURES))
    here = GradientSum(model, weights, "numbers", outputs, 1.0, shape, box)
    with torch.no_grad(), SmoothBackward(1.0) as block:
        once = here.advantage(probe, torch.zeros(0))
        grown = GradientSum(
            model, {name: SCALED * p for name, p in weights.items()}, "numbers", outputs, 1.0, shape, box
        ).advantage(probe, torch.zeros(0))
    if not block.met:
        raise NotApplicable("nothing in the network is rectified (relu), for which the published attacks are.")
    powers = (grown.abs() / once.abs().clamp_min(1e-300)).log2()[once.abs() > WHOLE_POWER * once.abs().max()]
    degree, off = float(powers.median()), float((powers - powers.median().round()).abs().max())
    whole = off < WHOLE_POWER and round(degree) >= 1
    if sides != "numbers" and not whole:
        raise NotApplicable(
            "the outputs do not grow by one whole power with the weights (biases behind the first layer, say), and the "
            "conditions of a margin hold for such networks alone."
        )
    degree = float(round(degree)) if whole else max(1.0, degree)
    scale = 1.0 if sides == "numbers" else _margin(here, probe) ** (-1 / degree)
    held = {name: (scale * p).requires_grad_() for name, p in weights.items()}
    return GradientSum(model, held, sides, outputs, degree, shape, box)


def _sides(view: View) -> Sides:
    form = view.form
    if form is not None and form.name == "binary-cross-entropy" and view.outputs in ((), (1,)):
        return "two classes"
    if form is not None and form.name == "cross-entropy" and len(view.outputs) == 1 and view.outputs[0] > 1:
        return "classes"
    if form is not None and form.name == "squared-error":
        return "numbers"
    raise NotApplicable(
        "the conditions are of two classes by one logit, of several under cross entropy, or of numbers under a squared "
        f"error with weight decay; this loss is {form if form is not None else 'none of these'}."
    )


def _margin(here: GradientSum, probe: Tensor) -> float:
    """About the margin, without data: the middle output at inputs of a stand-in's length along the output's own slope."""
    x = probe.clone().requires_grad_()
    weights = {name: p.detach() for name, p in here.weights.items()}
    out = functional_call(here.model, weights, (x,)).flatten(1)
    ahead = out.abs().amax(1) if here.outputs == 1 else out.amax(1) - out.mean(1)
    (slope,) = torch.autograd.grad(ahead.sum(), x)
    flat = slope.flatten(1)
    moved = (F.normalize(flat, dim=1) * probe.flatten(1).norm(dim=1, keepdim=True)).view_as(probe)
    with torch.no_grad():
        out = functional_call(here.model, weights, (moved,)).flatten(1)
    ahead = out.abs().amax(1) if here.outputs == 1 else out.amax(1) - out.mean(1)
    return max(float(ahead.median()), 1e-300)


def guesses(held: GradientSum, n: int, rng: torch.Generator, *, draws: int, steps: int) -> Iterator[SumGuess]:
    """What each draw of settings ends at, one after the other; fewer, where the search is stopped.

    Adam with a falling rate on 2 n candidates and their strengths, as many of each class, of all that is left of the
    weights, what is out of range, and strengths below their floor.
    """
    for number in range(draws):
        settings = SumSettings.drawn(rng)
        guess, on = _searched(held, n, rng, settings, steps, (number / draws, 1 / draws))
        if guess is not None:
            yield guess
        if not on:
            return


def chosen(found: list[SumGuess]) -> SumGuess:
    """The draw with the least loss of its own.

    >>> nothing = SumSettings(start=0.1, rate=0.1, strength_rate=0.1, floor=0.1, alpha=10.0)
    >>> ends = [SumGuess(nothing, torch.zeros(1), None, torch.zeros(1), loss, loss) for loss in (0.5, 0.2)]
    >>> chosen(ends).loss
    0.2
    """
    return min(found, key=lambda guess: guess.loss)


def _searched(
    held: GradientSum, n: int, rng: torch.Generator, settings: SumSettings, steps: int, part: tuple[float, float]
) -> tuple[SumGuess | None, bool]:
    """Where one draw ends, None where it diverged; and whether to go on."""
    m, like = PLACES_A_PICTURE * n, held.size
    sides = held.outputs if held.sides == "classes" else 2
    classes = (torch.arange(m) % sides).to(like.device)
    x = settings.start * torch.randn(m, math.prod(held.shape), generator=rng, dtype=torch.float64)
    if held.sides == "numbers":
        strengths = torch.randn(m, held.outputs, generator=rng, dtype=torch.float64)
    else:
        strengths = torch.rand(m, 1, generator=rng, dtype=torch.float64)
    x, strengths = x.to(like.device).requires_grad_(), strengths.to(like.device).requires_grad_()
    unit = held.unit(m)
    groups = [{"params": [x], "lr": settings.rate}, {"params": [strengths], "lr": settings.strength_rate}]
    search = torch.optim.Adam(groups)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(search, steps)
    on = True
    for step in range(steps):
        loss, residual = _loss(held, x, classes, strengths, unit, settings)
        if not math.isfinite(float(loss.detach())):
            return None, on
        x.grad, strengths.grad = torch.autograd.grad(loss, [x, strengths])
        search.step()
        falling.step()
        if step % TICKED == 0 and not (on := tick(part[0] + part[1] * step / steps, float(residual.detach()))):
            break
    loss, residual = _loss(held, x, classes, strengths, unit, settings)
    if not math.isfinite(float(loss.detach())):
        return None, on
    size = (unit * strengths.detach()).norm(dim=1)
    kept = without_copies(x.detach(), size, classes if held.sides != "numbers" else torch.zeros_like(classes), n)
    return SumGuess(
        settings,
        x.detach()[kept].view(-1, *held.shape),
        classes[kept] if held.sides != "numbers" else None,
        size[kept],
        float(loss.detach()),
        float(residual.detach()),
    ), on


def _loss(
    held: GradientSum, x: Tensor, classes: Tensor, strengths: Tensor, unit: float, settings: SumSettings
) -> tuple[Tensor, Tensor]:
    residual = held.residual(x, classes, unit * strengths, settings.alpha)
    low, high = held.box
    outside = (F.relu(x - high) + F.relu(low - x)).square().sum() / len(x)
    loss = residual + outside
    if held.sides != "numbers":
        loss = loss + FLOOR_WEIGHT * F.relu(settings.floor - strengths).square().sum()
    return loss, residual


def without_copies(points: Tensor, strengths: Tensor, classes: Tensor, n: int) -> list[int]:
    """Which n of the candidates [m, d] to keep: the strongest that are no copy of a stronger one of their class.

    Strength is that times the point's length, what it puts into the sums; copies fill up what is left.

    >>> z = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.01, 0.0], [0.0, 1.0, 0.0]])
    >>> without_copies(z, torch.tensor([2.0, 1.0, 0.5]), torch.zeros(3), 2)
    [0, 2]
    """
    size = strengths * points.norm(dim=1)
    unit = F.normalize(points - points.mean(1, keepdim=True), dim=1)
    kept, copies = list[int](), list[int]()
    for i in size.argsort(descending=True, stable=True).tolist():
        own = [k for k in kept if classes[k] == classes[i]]
        (copies if own and float((unit[own] @ unit[i]).max()) > SAME_PICTURE else kept).append(i)
    return (kept + copies)[:n]
