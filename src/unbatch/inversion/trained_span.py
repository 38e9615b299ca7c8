"""What the first dense layer of a trained model spans: the inputs that it was trained on, and no others.

Every step of SGD adds sum_i delta_i (x_i, 1)^T to the first layer's weight and bias, whatever the loss, and momentum and
weight decay only rescale what is there. So [W, b] = c [W0, b0] + D with the rows of D in the span of the training inputs;
c = 1 without weight decay.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from unbatch.errors import NotApplicable
from unbatch.inversion.view import View
from unbatch.network.dense import Dense
from unbatch.numerics.linear.span import rank_tolerance

USUAL_STEPS = 10_000  # of a training whose length is not known: roundings add up over it
LEAST_MARGIN = 10.0  # times the tolerance, by which strangers are to be outside
STRANGERS = 64  # drawn from the prior
LARGEST_GUESSED = 0.1  # of a distance by which a candidate is taken for a member where the start is not known
GUESSED_GAP = 1e-3  # of the largest singular value: what is below is taken for the start, where that is not known
WHY_FULL = (
    "the change of the first layer does not lie in a span of the training inputs. That is so after an adaptive optimiser "
    "(Adam rescales every entry), with a norm in front of it or augmentation (which adds vectors to the span), and where "
    "there are as many examples as it has neurons or inputs."
)


@dataclass(frozen=True)
class TrainedSpan:
    """The span of the training inputs, as they enter the first dense layer with a 1 behind them for its bias.

    `tolerance` is the relative distance that rounding may leave of a member, `exact` whether the start is known.
    """

    layer: Dense
    rows: Tensor  # [r, d + 1] orthonormal, float64; [r, d] of a layer without a bias
    change: Tensor  # [m, d + 1] of which they are the row space
    tolerance: float
    kept: float  # the factor that weight decay left of the starting weights
    exact: bool

    def entering(self, inputs: Tensor) -> Tensor:
        """Inputs [n, ...] as they enter the layer, with a 1 where it has a bias [n, d + 1]."""
        z = inputs.double().flatten(1)
        feeds = self.layer.feeds
        z = z * feeds.scale.to(z) + feeds.shift.to(z) if feeds is not None else z
        return torch.cat([z, torch.ones_like(z[:, :1])], 1) if self.layer.bias is not None else z

    def distances(self, inputs: Tensor) -> Tensor:
        """The relative distances [n] of inputs [n, ...] from the span: rounding for what was trained on."""
        z = torch.nn.functional.normalize(self.entering(inputs.to(self.rows.device)), dim=1)
        away: Tensor = (z - z @ self.rows.T @ self.rows).norm(dim=1)
        return away


def trained_span(view: View) -> TrainedSpan:
    """What the first dense layer's change spans.

    Without `initial` the start is taken for zero, so that the span is exact for a start at zero, and a guess otherwise.
    Raises NotApplicable: the inputs do not enter a dense layer as they are, nothing has changed, or it spans everything.

    >>> import unbatch
    >>> client = unbatch.Case.parse("trained:batch=4,width=16,steps=30,threat=start").setting()
    >>> told = {"knowledge": client.knowledge, "training": client.training}
    >>> seen, truth = unbatch.observe(client.model, client.loss, client.inputs, client.labels, **told)
    >>> found = trained_span(View.of(seen))
    >>> len(found.rows), bool((found.distances(truth.inputs) < 1e-9).all())
    (4, True)
    """
    if "input_shape" not in view.knowledge:
        raise NotApplicable("input_shape must be known, to run the model once.")
    layer = next((each for each in view.layers if each.feeds is not None), None)
    if layer is None:
        raise NotApplicable("the inputs do not enter a dense layer as they are, or behind a normalisation alone.")
    own = {name: p.detach() for name, p in view.model.named_parameters(remove_duplicate=False)}
    start = view.knowledge.get("initial")
    after, exact = _with_bias(own, layer), start is not None
    before = _with_bias(start, layer).to(after) if exact else torch.zeros_like(after)
    recipe = view.knowledge.get("recipe", {})
    decayed = exact and ("recipe" not in view.knowledge or bool(recipe.get("weight_decay", 0.0)))
    kept = _kept(before, after) if decayed else 1.0
    change = after - kept * before
    steps = float(recipe.get("steps", USUAL_STEPS))
    eps = max(torch.finfo(own[layer.weight].dtype).eps, torch.finfo(torch.float64).eps)
    largest = after if float(after.norm()) >= float(before.norm()) else before
    _, values, rows = torch.linalg.svd(change, full_matrices=False)
    if not float(values[0]) > 0:
        raise NotApplicable("the first dense layer is as it was before training: it was frozen, or there was none.")
    noise = rank_tolerance(largest, eps) * math.sqrt(max(steps, 1.0))
    if not exact:
        noise = max(noise, GUESSED_GAP * float(values[0]))
    rank = int((values > LEAST_MARGIN * noise).sum())
    if not exact:  # as many directions as there are examples, where that is known: those of the start are behind them
        rank = min(int(view.knowledge.get("batch_size", rank)), int((values > 0).sum()))
    if rank == 0 or rank >= min(change.shape):
        raise NotApplicable(WHY_FULL if rank else "the change of the first layer is no more than its rounding.")
    tolerance = noise / float(values[rank - 1]) + 64 * torch.finfo(torch.float64).eps
    return TrainedSpan(layer, rows[:rank], change, tolerance, kept, exact)


def start_and_end(view: View, layer: Dense) -> tuple[Tensor, Tensor]:
    """A first layer's [W, b] before and after training, in float64. Raises Unknown: `initial` is not known.

    >>> import unbatch
    >>> client = unbatch.Case.parse("trained:batch=4,width=16,steps=30,threat=start").setting()
    >>> told = {"knowledge": client.knowledge, "training": client.training}
    >>> seen, truth = unbatch.observe(client.model, client.loss, client.inputs, client.labels, **told)
    >>> [end.shape for end in start_and_end(View.of(seen), View.of(seen).layers[0])]
    [torch.Size([16, 65]), torch.Size([16, 65])]
    """
    after = _with_bias({name: p.detach() for name, p in view.model.named_parameters(remove_duplicate=False)}, layer)
    return _with_bias(dict(view.knowledge.initial), layer).to(after), after


def strangers(view: View, span: TrainedSpan, rng: torch.Generator) -> Tensor:
    """Distances of inputs that were not trained on: public ones where there are any, else draws of the prior."""
    own = view.knowledge.get("public")
    return span.distances(own if own is not None and len(own) else view.stand_in(STRANGERS, rng))


def _with_bias(values: dict[str, Tensor], layer: Dense) -> Tensor:
    """[W, b] in float64."""
    weight = values[layer.weight].double()
    if layer.bias is None:
        return weight
    found: Tensor = torch.cat([weight, values[layer.bias].double()[:, None]], 1)
    return found


def _kept(before: Tensor, after: Tensor) -> float:
    """c of after = c before + low rank: an eigenvalue of after before^+ of as many vectors as the rank leaves out."""
    wide = before.shape[0] <= before.shape[1]
    inverse = torch.linalg.pinv(before)
    values = torch.linalg.eigvals(after @ inverse if wide else inverse @ after)
    real = values.real[values.imag.abs() <= 1e-6 * values.abs().max()]
    if not len(real):
        raise NotApplicable("weight decay left no one factor of the starting weights: too many examples for the layer.")
    return float(real.median())
