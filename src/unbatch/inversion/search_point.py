"""What a search does not know, written as one tensor, and what a guess of it explains of the update."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from unbatch.errors import UnbatchError
from unbatch.inversion.batch_statistics import BatchStatistics
from unbatch.inversion.input_span import SpanReduction, in_input_span
from unbatch.inversion.rounds import averaged, each_restored
from unbatch.inversion.view import View
from unbatch.knowledge import Knowledge
from unbatch.label_form import REFUSALS, LabelForm, one_hot_classes
from unbatch.likelihood import Likelihood
from unbatch.loss import LossForm
from unbatch.network.dense import forward
from unbatch.network.precision import in_double
from unbatch.numerics.label_counts import apportion, impulse, label_counts, occurring, weighted_counts
from unbatch.numerics.search.matching import norm_squared
from unbatch.observation import Observation

MOST_LABEL_SETS = 16  # ways to label a batch that are tried one after the other, where labels cannot be searched for
BITS_TO = 0.05  # labels that explain the update are read as zeros and ones where they are that near to them

Squash = Literal["softmax", "sigmoid", "none"]


@dataclass(frozen=True)
class Candidate:
    """One guess that a search made on its way; of one preset's guesses the one with the lowest loss is the best.

    >>> early = Candidate(0.5, torch.zeros(1, 4), torch.tensor([2]), phase="start")
    >>> later = Candidate(0.1, torch.ones(1, 4), torch.tensor([2]), phase="least squares")
    >>> min(early, later, key=lambda guess: guess.loss).phase
    'least squares'
    """

    loss: float
    inputs: Tensor  # [n, *input_shape]
    labels: Tensor  # as the loss takes them
    restart: int = 0
    phase: str = ""
    fresh: bool = False  # its soft labels are still those of the start
    source: str = "known"  # of its labels, as of the problem's
    squash: Squash = "none"

    def read_labels(self, form: LabelForm, solved: bool) -> Tensor:
        """Labels as a user reads them, in the loss's form: where soft ones were searched for, the likeliest class of each.

        Where the search `solved` its problem, probabilities that are neither 0 nor 1 stay as they are, since they explain
        the update. Real targets stay too, but where class numbers would have done and they are all but one-hot.
        """
        if self.source != "optimised":
            return self.labels
        if self.squash == "softmax":
            return self.labels if solved and one_hot_classes(self.labels) is None else self.labels.argmax(1)
        if self.squash == "sigmoid":
            bits = self.labels.round()
            return self.labels if solved and float((self.labels - bits).abs().max()) > BITS_TO else bits
        if form.kind in ("binary", "multi-label"):
            bits = self.labels.round()
            return bits if float((self.labels - bits).abs().max()) < BITS_TO else self.labels
        hard = one_hot_classes(self.labels) if form.kind == "class" else None
        return self.labels if hard is None else hard


@dataclass(frozen=True)
class Unknowns:
    """The unknown inputs (and labels) of an exchange written as one tensor to search over, and what a guess of it explains.

    A point [n, d + t] holds for each of n examples its input, in units of `scale` from `middle`, and beside it t logits of
    soft labels where labels are not known and cannot be counted. `inputs` and `targets` read it, and `update` simulates
    what the client would then have sent. Where the law of a defence is known, updates are as it is expected to leave
    them, in units of its spread.

    >>> import unbatch
    >>> from unbatch.models.small import build
    >>> rng = torch.Generator().manual_seed(0)
    >>> model, x, y = build("mlp", (4,), 3, width=8, rng=rng), torch.rand(2, 4, generator=rng), torch.tensor([0, 2])
    >>> seen, truth = unbatch.observe(model, torch.nn.functional.cross_entropy, x, y)
    >>> problem = Unknowns.of(View.of(seen), "default")
    >>> problem.start(rng, 0.1).shape, problem.source, problem.labels
    (torch.Size([2, 4]), 'counted', tensor([0, 2]))
    >>> point = (x - problem.middle) / problem.scale  # the private batch itself
    >>> all(torch.allclose(a, b, atol=1e-7) for a, b in zip(problem.clean(point), problem.seen, strict=True))
    True
    """

    view: View
    middle: float | Tensor
    scale: float
    box: float | None
    labels: Tensor  # fixed, or an example of their form
    source: str  # "known", "counted", "tried" or "optimised"
    squash: Squash = "none"
    seen: list[Tensor] = field(default_factory=list)
    sent: View = field(kw_only=True)  # the exchange as it was sent, rounds at the same parameters averaged
    span: SpanReduction | None = None  # with it, obs is its exchange
    whole: Unknowns | None = None  # what was reduced
    law: Likelihood | None = None  # of the update as sent, if it is known
    roots: list[Tensor] = field(default_factory=list)  # of the law's weights: `seen` and updates are in these units

    @classmethod
    def each(cls, view: View, preset: str, dtype: torch.dtype | None = None) -> list[Unknowns]:
        """The problems that an exchange poses to a search: one, or one for each labelling where those can only be tried.

        Raises UnbatchError: as `of`, or there are too many ways to label the batch.
        """
        if view.known_labels is None and _confined(view):
            return [cls.of(view, preset, dtype, tried=labels) for labels in _labellings(view)]
        if (
            view.known_labels is not None
            or _searchable(view.labels)
            or (preset != "dlg" and counted_labels(view) is not None)
        ):
            return [cls.of(view, preset, dtype)]
        return [cls.of(view, preset, dtype, tried=labels) for labels in _labellings(view)]

    @classmethod
    def of(cls, view: View, preset: str, dtype: torch.dtype | None = None, *, tried: Tensor | None = None) -> Unknowns:
        """The problem that an exchange poses to a search, with labels as known, as `tried`, counted or to be found.

        All rounds that are known are to be explained; those at the same parameters by their mean.
        Raises UnbatchError: the model or the loss does not take such inputs or soft labels.
        """
        view = view.on(averaged(view.obs))
        obs = view.obs
        known, first = obs.knowledge, next(obs.model.parameters())
        low, high = known.get("input_range", (-2.0, 2.0))
        unit = preset == "dlg" or not math.isfinite(high - low)
        middle, scale = (0.0, 1.0) if unit else ((low + high) / 2, (high - low) / 4)
        outputs = forward(obs.model, torch.full((known.batch_size, *known.input_shape), middle))
        labels, source = view.known_labels, "known"
        if labels is None and tried is not None:
            labels, source = tried, "tried"
        if labels is None and preset != "dlg":
            labels, source = counted_labels(view), "counted"
        squash: Squash = "none"
        if labels is None:
            source = "optimised"
            labels, squash = _to_be_found(view, outputs)
        box = None if unit or "input_range" not in known else 2.0
        known_labels = labels.to(obs.device)
        return cls(view, middle, scale, box, known_labels, source, squash, sent=view).to(dtype or first.dtype)

    def to(self, dtype: torch.dtype) -> Unknowns:
        """The same problem in another precision, read anew from the update as it was sent."""
        obs = self.sent.obs
        known = obs.knowledge
        model = in_double(obs.model) if dtype == torch.float64 else copy.deepcopy(obs.model).to(dtype)
        if "buffers" in known:
            known = known | Knowledge(buffers={name: in_precision(b, dtype) for name, b in known.buffers.items()})
        update = {name: tensor.to(dtype) for name, tensor in obs.update.items()}
        moved = replace(obs, model=model, update=update, knowledge=known)
        law = Likelihood.of(known)
        updates = [{name: t.to(dtype) for name, t in one.update.items()} for one in moved.exchanges]
        seen = [t for one in updates for t in one.values()]
        roots = [w.sqrt().to(dtype) for one in updates for w in law.weights(one).values()] if law else []
        seen = [t * w for t, w in zip(seen, roots, strict=True)] if law else seen
        view, labels = self.sent.like(moved), in_precision(self.labels, dtype)
        return replace(self, view=view, labels=labels, seen=seen, law=law, roots=roots)

    def reduced(self, rng: torch.Generator) -> Unknowns | None:
        """The same problem for inputs in the span of the first layer's update.

        Starts keep their size and their middle. None where the update gives no such span away.
        """
        span = in_input_span(each_restored(self.view), rng)
        if span is None:
            return None
        small = [t for one in span.obs.exchanges for t in one.update.values()]
        own = [  # a tensor that was reduced keeps one weight for all
            w if w.shape == t.shape else w.square().mean().sqrt() for w, t in zip(self.roots, small, strict=False)
        ]
        d, r = math.prod(span.shape), len(span.rows)
        middle = torch.full((d,), float(self.middle)).to(span.rows) @ span.rows.T
        scale = self.scale * (d / r) ** 0.5
        seen = [t * w for t, w in zip(small, own, strict=True)] if own else small
        return replace(
            self,
            view=View.of(span.obs),
            middle=middle.to(self.seen[0].dtype),
            scale=scale,
            box=None,
            seen=seen,
            span=span,
            whole=self,
            roots=own,
        )

    @property
    def obs(self) -> Observation:
        """The exchange that is to be explained, in the search's precision."""
        return self.view.obs

    @property
    def in_span(self) -> bool:
        """Whether the private inputs are known to lie where the search looks, so that it cannot fit noise instead."""
        return self.span is not None and self.span.exact

    @property
    def image(self) -> bool:
        """Whether the inputs are pictures, so that total variation means something: as told, else by their shape."""

        known = (self.whole or self).obs.knowledge
        domain = known.get("domain")
        return domain == "images" or (domain is None and len(known.input_shape) == 3)

    @cached_property
    def exchanges(self) -> tuple[Observation, ...]:
        """Every round that is to be explained."""

        return self.obs.exchanges

    @cached_property
    def statistics(self) -> BatchStatistics:
        """What running averages say of the batch. Raises NotApplicable: nothing; the message says why."""
        return BatchStatistics.of(self.obs)

    @cached_property
    def size(self) -> Tensor:
        """|update|^2, in the units of `seen`."""
        return norm_squared(self.seen)

    @cached_property
    def drawn(self) -> float:
        """The share of |update|^2 that the defence's draws make, as far as its law is known."""
        if self.law is None:
            return 0.0
        spread = [s for one in (self.whole or self).obs.exchanges for s in self.law.spread(one.update).values()]
        pairs = zip(self.seen, self.roots, spread, strict=True)
        return sum(float((w.square().expand_as(t)).sum()) * s**2 for t, w, s in pairs) / float(self.size)

    def softened(self) -> Unknowns | None:
        """The same problem with probabilities to be found in place of counted classes; None where the loss takes none."""
        form = self.view.labels
        if self.source != "counted" or not _searchable(form) or form.rows is None or self.span is not None:
            return None
        rows = torch.full((len(self.labels), *form.rows), 1 / form.count).to(self.seen[0])
        return replace(self, labels=rows, source="optimised", squash="softmax")

    def start(self, rng: torch.Generator, spread: float) -> Tensor:
        """A random point [n, d + t] to start from: normal noise of that spread."""
        d = math.prod(self.obs.knowledge.input_shape)
        t = self.labels[0].numel() if self.source == "optimised" else 0
        noise = torch.randn(self.obs.knowledge.batch_size, d + t, generator=rng, dtype=torch.float64)
        return (spread * noise).to(self.seen[0])

    def inputs(self, point: Tensor) -> Tensor:
        """The inputs [n, *shape] at a point, as this problem's model takes them: in the span if it was reduced to it."""
        shape = self.obs.knowledge.input_shape
        return self.middle + self.scale * point[:, : math.prod(shape)].reshape(len(point), *shape)

    def originals(self, point: Tensor) -> Tensor:
        """The inputs [n, *input_shape] at a point, as the whole network takes them."""
        return self.inputs(point) if self.span is None else self.span.inputs(self.inputs(point))

    def pictures(self, point: Tensor) -> Tensor:
        """The inputs of the whole network in units of a quarter of their range, of which total variation is taken."""
        whole = self.whole or self
        return (self.originals(point) - whole.middle) / whole.scale

    def targets(self, point: Tensor) -> Tensor:
        """The labels at a point as the loss takes them: the known or counted ones, else those that are searched for."""

        if self.source != "optimised":
            return self.labels
        free = point[:, math.prod(self.obs.knowledge.input_shape) :].reshape(self.labels.shape)
        return free.softmax(1) if self.squash == "softmax" else free.sigmoid() if self.squash == "sigmoid" else free

    def update(self, point: Tensor, *, create_graph: bool = True) -> list[Tensor]:
        """The update that the client would have sent at a point, in the units of `seen`.

        Where a defence is known, as it is expected to leave the update.
        """
        x, y, law = self.inputs(point), self.targets(point), self.law
        made = [one.simulate(x, y, create_graph=create_graph) for one in self.exchanges]
        if law is None:
            return [t for one in made for t in one.values()]
        found = [t for one in made for t in law.expected(one).values()]
        return [t * w for t, w in zip(found, self.roots, strict=True)]

    def clean(self, point: Tensor) -> list[Tensor]:
        """The update at a point, as `update` gives it, without a graph."""

        return self.update(point, create_graph=False)

    def candidate(self, loss: float, point: Tensor, start: Tensor, phase: str) -> Candidate:
        """A point as a guess to return: inputs of the whole network, cut to their range if that is known."""

        inputs = self.originals(point)
        inputs = inputs.clamp(*self.obs.knowledge.input_range) if "input_range" in self.obs.knowledge else inputs
        d = math.prod(self.obs.knowledge.input_shape)
        fresh = self.source == "optimised" and torch.equal(point[:, d:], start[:, d:].to(point))
        labels = self.targets(point)
        return Candidate(loss, inputs, labels, phase=phase, fresh=fresh, source=self.source, squash=self.squash)


def _searchable(form: LabelForm) -> bool:
    """Whether labels can be searched for in real numbers: the loss has a gradient with respect to them."""
    return form.sloped and form.kind != "sign" and (form.kind != "class" or form.rows is not None)


def _confined(view: View) -> bool:
    """Whether labels are zeros and ones that can be tried, since a search would leave the numbers that the loss takes."""
    form = view.labels
    ways = math.comb(view.knowledge.batch_size + 1, 1) if form.kind == "binary" else 0
    if not 0 < ways <= MOST_LABEL_SETS or form.whole:
        return False
    parameter = next(view.model.parameters())
    outputs = torch.full((1, *view.outputs), 0.5, dtype=parameter.dtype, device=parameter.device)
    try:
        return not bool(view.loss(outputs, form.every(parameter.detach().flatten()[0])[1] + 0.5).isfinite())
    except REFUSALS:
        return True


def _to_be_found(view: View, outputs: Tensor) -> tuple[Tensor, Squash]:
    """An example of the labels that are searched for beside outputs [n, ...], and what keeps them what they are.

    Raises UnbatchError: the loss has no gradient with respect to its labels.
    """
    form, known = view.labels, view.form
    if not _searchable(form):
        raise UnbatchError(
            f"the labels are unknown, and the loss has no gradient with respect to them (it takes {form.words()}), so they "
            "cannot be searched for. Make them known."
        )
    if form.kind == "class" and known is not None and known.name == "squared-error":
        return outputs, "none"  # it may as well have been real targets
    if form.kind == "class":
        return outputs.softmax(1), "softmax"
    labels = form.draw(len(outputs), torch.Generator().manual_seed(0), outputs)
    return labels, "sigmoid" if known is not None and known.name == "binary-cross-entropy" else "none"


def _labellings(view: View) -> list[Tensor]:
    """Every way to label the batch, in no order, as the loss takes labels.

    Raises UnbatchError: there are none, or too many.
    """
    n, form = view.knowledge.batch_size, view.labels
    each = form.every(next(view.model.parameters()).detach().flatten()[0])
    ways = math.comb(n + len(each) - 1, n) if each else 0
    if not 0 < ways <= MOST_LABEL_SETS:
        many = (
            f"there are {ways:,} ways to label {n} examples, of which at most {MOST_LABEL_SETS} are tried"
            if ways
            else ""
        )
        raise UnbatchError(
            f"the labels are unknown, the loss has no gradient with respect to them (it takes {form.words()}), and "
            f"{many or 'there is no end of them to try'}. Make them known."
        )
    return [torch.cat(chosen) for chosen in itertools.combinations_with_replacement(each, n)]


def counted_labels(view: View) -> Tensor | None:
    """The labels [n] that the head's gradient counts under cross entropy, in order of class; None where it cannot.

    Probabilities are estimated from the model's outputs on stand-in inputs.
    """
    obs, known, protocol, head, form = view.obs, view.knowledge, view.protocol, view.head, view.form
    n, steps = known.batch_size, view.steps
    if head is None or head.weight not in obs.update or (steps and protocol.optimiser != "sgd"):
        return None
    if form is None or form.name != "cross-entropy" or form.scale <= 0 or not form.classes:
        return None
    outputs = forward(obs.model, view.stand_in(64, torch.Generator().manual_seed(0)))
    decay, factor = 1.0, 1.0
    if steps:
        rates = {k: getattr(protocol, k) for k in ("learning_rate", "momentum", "weight_decay")}
        decay, kicks = impulse(steps, **rates)
        factor = float(kicks.sum())
    sent = {k: obs.update[k] / known.get("clients", 1) for k in (head.weight, head.bias) if k and k in obs.update}
    if steps:
        sent = {k: (decay - 1) * obs.model.get_parameter(k).detach() - tensor for k, tensor in sent.items()}
    batch = min(protocol.local_batch_size or n, n) if steps else n
    factor *= form.scale * (1 if form.reduction == "mean" else batch) / n
    expected = n * outputs.softmax(1).mean(0)
    weight, bias = sent[head.weight], sent.get(head.bias or "")
    if form.weights is not None:
        return None if bias is None else _counted_by_weight(bias, n, form, factor / form.scale, expected / n)
    estimate = label_counts(weight, bias, n, factor=factor, expected=expected, smoothing=form.smoothing)[2]
    return torch.arange(len(estimate)).repeat_interleave(estimate)


def _counted_by_weight(bias: Tensor, n: int, form: LossForm, factor: float, mean: Tensor) -> Tensor:
    """The labels [n] under class weights, from the head's bias gradient [k] and mean probabilities [k].

    `factor` is what each example's own gradient counts in the update under a plain loss of scale 1. Classes that have a
    negative entry occur, whatever the weights.
    """
    times = factor * n if form.reduction == "mean" else factor
    total = form.reduction == "sum" or form.by_count
    scale = form.scale * times / (n if form.by_count else 1)
    lower, upper, estimate = weighted_counts(bias, n, torch.tensor(form.weights), mean, scale, total=total)
    sure = occurring(bias, n, factor=scale).long()
    if 0 < int(sure.sum()) <= n:
        lower = torch.maximum(lower, sure)
        upper = torch.minimum(torch.maximum(upper, lower), n - (lower.sum() - lower))
        estimate = apportion(estimate.double(), lower, upper, n)
    return torch.arange(len(estimate)).repeat_interleave(estimate)


def in_precision(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in that precision if it holds real numbers; class labels stay the integers that they are.

    >>> in_precision(torch.ones(2), torch.float64).dtype, in_precision(torch.tensor([0, 2]), torch.float64).dtype
    (torch.float64, torch.int64)
    """
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
