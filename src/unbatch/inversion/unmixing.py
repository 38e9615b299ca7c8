"""Every example of a batch out of the gradient of the first dense layer, each certified on its own.

What the attack `unmix` does, as a function for whoever needs the inputs of that layer: under the caller's own knowledge,
judged by the same bounds.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from unbatch.errors import NotApplicable
from unbatch.inversion.above_layer import Rounding, Tail
from unbatch.inversion.matching import UpdateMatching
from unbatch.inversion.rounds import restored, sharpened, unseen
from unbatch.inversion.view import View
from unbatch.inversion.weighing import Weighing
from unbatch.knowledge import Knowledge, shares
from unbatch.label_form import completed
from unbatch.likelihood import Likelihood
from unbatch.loss import LossForm
from unbatch.network.dense import Dense
from unbatch.numerics.label_counts import apportion, label_counts
from unbatch.numerics.linear.span import Span, leading_span
from unbatch.numerics.unmix.certificate import mixture_radius
from unbatch.numerics.unmix.copies import radius_with_copies
from unbatch.numerics.unmix.descent import Descent, beginning
from unbatch.numerics.unmix.ica import edges, fast_ica, group_ica, whiten
from unbatch.numerics.unmix.mixture import Mixture
from unbatch.numerics.unmix.moment_start import weight_moments
from unbatch.numerics.unmix.solver import GuessMaker, Separation, unmix
from unbatch.progress import tick
from unbatch.reconstruction import Reconstruction, certified

READING_ERROR = 8 * torch.finfo(torch.float64).eps  # what reading A adds to its error
LEAST_BENT_SHARE = 0.05  # share of the deltas' span below which too few kinks are met: measured .03 finds none, .08 all
WEIGHT_ERROR = 1e-3  # relative, up to which two weights of examples are taken for one; more where precision is coarse
WEIGHT_ERROR_IN_ROUNDINGS, LARGEST_WEIGHT_ERROR = 8, 0.05
PROBABILITY_ERROR = 1e-3  # by which a label's probability may leave [0, 1]
HARDLY_APART = 1e-4  # noise over the least singular value above which two may have been split: measured 3e-4 to .3
COPY_STEPS = 64  # that are tried, of copies from each other
DELTA_ERROR_IN_ROUNDINGS = 4  # relative error of a delta, in units of rounding: measured ones are 1 to 3


def unmixed(view: View, rng: torch.Generator, *, attempts: int = 3, partial: bool = False) -> Reconstruction:
    """The examples of the batch behind the first dense layer's gradient that are certified; with `partial` guesses as well.

    Where a defence's law is known the update is restored by it first, what was found is moved to where the update is
    likeliest, and what is still missing is looked for by matching the whole batch at once.
    Raises NotApplicable: no dense layer's gradient isolates the examples; the message says why.

    >>> import unbatch
    >>> from unbatch.models.small import build
    >>> rng = torch.Generator().manual_seed(0)
    >>> model = build("mlp", (6,), 3, width=20, activation="gelu", rng=rng)
    >>> x, y = torch.rand(2, 6, generator=rng), torch.tensor([0, 2])
    >>> seen, truth = unbatch.observe(model, torch.nn.functional.cross_entropy, x, y)
    >>> found = unmixed(View.of(seen), rng)
    >>> found.labels.sort().values, bool(found.bound.max() < 1e-5)
    (tensor([0, 2]), True)
    """
    view = view.gradient
    law, n = Likelihood.of(view.knowledge), view.knowledge.get("batch_size")
    problem = Unmixing.of(view if law is None else restored(view), rng)
    if law is None:
        found = _separated(problem, rng, attempts, partial)
        soft = problem.softened()
        if soft is not None and not len(certified(found)):
            found = _longer(found, _separated(soft, rng, attempts, partial))
        return found if partial else certified(found)
    nothing = torch.zeros(0, *view.knowledge.input_shape)
    found = Reconstruction(inputs=nothing, bound=nothing.new_zeros(0))
    reads = problem.layer.feeds is not None  # the network's own inputs
    if not (reads and law.rescales(view.update)):
        found = _separated(problem, rng, attempts, partial)
        drawn = any(law.spread(view.update).values()) or any(bool(hidden.any()) for hidden in unseen(view.obs).values())
        if drawn:  # only the whole batch tells a mixture from an example then
            found = replace(found, bound=torch.full((len(found),), torch.inf, dtype=torch.float64))
        found = sharpened(view.obs, found, rng)
    if n is not None and len(certified(found)) < n and reads and tick(0.0):  # all at once, by the likelihood
        told = view.on(replace(view.obs, knowledge=view.knowledge | Knowledge(log_prob=law)))
        found = _longer(found, sharpened(view.obs, UpdateMatching().run(told, rng), rng))
    return found if partial else certified(found)


@dataclass(frozen=True)
class Unmixing:
    """The equations that one exchange gives for every example of its batch by itself.

    The row space of a first dense layer's gradient [dL/dW, dL/db] is the span of the examples, and the model above the
    layer says which gradient each of them must have sent back: `mixture` puts the two together, and `starts` guesses where
    to begin.

    >>> import unbatch
    >>> from unbatch.models.small import build
    >>> rng = torch.Generator().manual_seed(0)
    >>> model = build("mlp", (6,), 3, width=20, activation="gelu", rng=rng)
    >>> x, y = torch.rand(2, 6, generator=rng), torch.tensor([0, 2])
    >>> seen, truth = unbatch.observe(model, torch.nn.functional.cross_entropy, x, y)
    >>> problem = Unmixing.of(View.of(seen), rng)
    >>> problem.rank, problem.layer.name, [name for name, _ in problem.starts()]
    (2, 'dense1', ['raw', 'fast ica', 'moments', 'random'])
    """

    view: View
    layer: Dense
    form: LossForm
    span: Span

    @classmethod
    def of(cls, view: View, rng: torch.Generator) -> Unmixing:
        """The equations of an exchange, after a look at whether they can tell its examples apart.

        Raises NotApplicable: they cannot; the message says why.
        """
        if view.steps:
            raise NotApplicable(view.no_gradient)
        layer, form = view.first, view.form
        if layer is None:
            raise NotApplicable("no dense layer sent its gradient.")
        if layer.head:
            raise NotApplicable(
                "the only dense layer is the head: its deltas have as many entries as classes, too few to tell examples by."
            )
        if form is None:
            raise NotApplicable("the loss is no sum or mean of one term an example, so no delta is one example's.")
        tail = Tail(view.obs, layer, form, 1)
        tail.check()
        span = layer_span(view, layer, rng)
        n, (m, d) = len(span.values), view.update[layer.weight].shape
        if n == 0:
            raise NotApplicable(f"the gradient of {layer.name!r} is zero.")
        if n >= min(m, d + (layer.bias is not None)):
            raise NotApplicable(
                f"the gradient of {layer.name!r} has full rank {n}: the batch has at least as many examples as the layer "
                "has inputs or neurons (or the update carries noise), and the span no longer isolates the examples."
            )
        if 2 * n >= m:
            raise NotApplicable(
                f"the gradient of {layer.name!r} has rank {n}, and {m} neurons give {m - n} equations for the {n} unknowns "
                "of an example: fewer than it takes."
            )
        if layer.bias in view.update and layer.bias is not None and not bool(view.update[layer.bias].any()):
            raise NotApplicable(
                f"the gradient of {layer.bias!r} is zero and that of {layer.weight!r} is not: the examples' deltas cancel, "
                "or it was pruned, and the span says nothing of their size."
            )
        targets = 0 if tail.classes else tail.targets
        if 2 * n + targets > m:
            raise NotApplicable(
                f"the targets are {targets} real numbers an example, unknown as well: with them an example of this batch "
                f"has {n + targets} unknowns, and the {m} neurons of {layer.name!r} give {m - n} equations: fewer than it "
                "takes."
            )
        return cls(view, layer, form, span)

    def softened(self) -> Unmixing | None:
        """The same equations for rows of probabilities in place of class numbers.

        None where the loss takes none, or they are more numbers than the neurons can tell.
        """
        rows = self.form.labels.softened()
        if rows is None or "labels" in self.view.knowledge:
            return None
        form = replace(self.form, labels=rows)
        told = 2 * self.rank + Tail(self.view.obs, self.layer, form, 1).targets <= len(self.span.columns)
        return replace(self, form=form) if told else None

    @property
    def rank(self) -> int:
        """The rank of the gradient: the number of examples, but for those that depend linearly on each other."""
        return len(self.span.values)

    @property
    def size(self) -> int:
        """The size of the batch that is assumed: as known, else the rank."""
        return max(int(self.view.knowledge.get("batch_size", 0)), self.rank)

    @property
    def clients(self) -> int:
        """How many clients' gradients are known to be added up in the update, each a mean over its own examples."""
        return int(self.view.knowledge.get("clients", 1)) if self.form.reduction == "mean" else 1

    @property
    def even(self) -> bool:
        """Whether every client has as many examples as any other."""
        return len(set(shares(self.size, self.clients))) == 1

    def tail(self, size: int) -> Tail:
        """The model above the layer, which says what gradient an example of a batch of `size` sends back."""
        return Tail(self.view.obs, self.layer, self.form, size)

    def mixture(self, tail: Tail) -> Mixture:
        """The equations that each example obeys in coordinates of the span, in a batch of as many as `tail` has.

        How much each counts is left open where clients have unequal shares of the batch.
        """
        obs, layer, span = self.view.obs, self.layer, self.span
        parameters = {name: p.detach().double() for name, p in obs.model.named_parameters(remove_duplicate=False)}
        W = parameters[layer.weight]
        sent = layer.bias is not None and layer.bias in obs.update
        offset = None
        if layer.bias is not None and sent:
            W = torch.cat([W, parameters[layer.bias][:, None]], 1)
        elif layer.bias is not None:
            offset = parameters[layer.bias]
        P = span.rows
        # what the client computed with, in which deltas are wrong; a coarser update was rounded once, at the end
        eps = torch.finfo(next(obs.model.parameters()).dtype).eps
        once = torch.finfo(obs.dtype).eps > 1e-4  # the tolerance for sums rounded term by term is then far too wide
        return Mixture(
            weighed=self.even or not tail.classes,
            U=span.columns,
            S=span.values,
            W=P @ W.T,
            offset=offset,
            ones=P[:, -1].clone() if sent else None,
            deltas=tail if self.clients == 1 else lambda before, y: self.clients * tail(before, y),
            classes=tail.classes,
            targets=tail.targets,
            noise=min(span.noise, 2 * span.beyond) if once else span.noise,
            rounding=DELTA_ERROR_IN_ROUNDINGS * max(eps, torch.finfo(torch.float64).eps),
            basis=torch.eye(len(P)).to(P),
            outside=span.beyond + span.arithmetic + READING_ERROR * float(span.values[0]),
        )

    def weighing(self, weights: Tensor) -> Weighing:
        """What examples that count `weights` [f] of their own gradients say of the batch's size and the update's factor."""
        known, eps = self.view.knowledge, torch.finfo(self.view.obs.dtype).eps
        tolerance = min(max(WEIGHT_ERROR, WEIGHT_ERROR_IN_ROUNDINGS * eps), LARGEST_WEIGHT_ERROR)
        n, clients = known.get("batch_size"), known.get("clients", 1)
        return Weighing.of(weights, self.form, rank=self.rank, n=n, clients=clients, tolerance=tolerance)

    def most_times(self, weighing: Weighing) -> Tensor:
        """How many examples each of those found can stand for at most [f].

        Of a size that is not known as few examples are taken to be behind the update as explain it. In a batch of known
        size real targets and uneven weights leave open of how many of the rest; and where weights are uneven and the last
        example hardly stands out of the noise, near copies may have been split at any point of their line: two at least.
        """
        n = self.view.knowledge.get("batch_size")
        most = 1 if n is None or (self.form.classes and weighing.even) else max(n - self.rank + 1, 1)
        split = not weighing.even and self.span.noise > HARDLY_APART * float(self.span.values[-1])
        return weighing.times.clamp_min(max(most, 2) if split else most)

    def steps(self, rng: torch.Generator) -> Tensor:
        """Preactivations [s, m] of unit steps of the layer's inputs."""
        W = dict(self.view.obs.model.named_parameters(remove_duplicate=False))[self.layer.weight].detach().double()
        return normalize(torch.randn(COPY_STEPS, W.shape[1], generator=rng, dtype=torch.float64).to(W), dim=1) @ W.T

    def starts(self) -> Iterator[tuple[str, GuessMaker]]:
        """Guesses of what the r examples left look like, rows [g, r] of coordinates in their mixture; the best first."""
        view, layer, span = self.view, self.layer, self.span
        shape = view.knowledge.input_shape
        d = view.update[layer.weight].shape[1]
        scale = torch.ones(d).to(span.rows) if layer.feeds is None else layer.feeds.scale.to(span.rows)
        rows = span.rows[:, :d] / scale  # mixtures of network inputs, up to a shift that edges do not see

        def separated(signals: Callable[[Tensor], Tensor]) -> GuessMaker:
            def start(left: Mixture, rng: torch.Generator) -> Tensor:
                white, T = whiten(signals(left.basis @ rows))
                turn = torch.linalg.qr(torch.randn(left.n, left.n, generator=rng, dtype=torch.float64))[0].to(white)
                return group_ica(white, turn) @ T

            return start

        def raw(left: Mixture, rng: torch.Generator) -> Tensor:
            centred = left.basis @ rows
            return fast_ica(centred - centred.mean(1, keepdim=True), rng)

        def prior(left: Mixture, rng: torch.Generator) -> Tensor:
            draws = view.stand_in(4 * left.n, rng).to(rows).flatten(1)
            draws = draws if layer.feeds is None else draws * layer.feeds.scale.to(rows) + layer.feeds.shift.to(rows)
            if span.rows.shape[1] > d:
                draws = torch.cat([draws, torch.ones(len(draws), 1).to(draws)], 1)
            return draws @ (left.basis @ span.rows).T

        def random(left: Mixture, rng: torch.Generator) -> Tensor:
            count = 64 if left.n <= 16 else left.n  # a small space is covered, a large one is not
            return torch.randn(count, left.n, generator=rng, dtype=torch.float64).to(rows)

        pictures = layer.feeds is not None and len(shape) == 3 and min(shape[1:]) > 1
        if pictures:
            yield "edges", separated(lambda mixed: edges(mixed, (shape[0], shape[1], shape[2])))
        else:
            yield "raw", separated(lambda mixed: (mixed - mixed.mean(1, keepdim=True))[:, None])
            yield "fast ica", raw
        yield "moments", weight_moments
        yield "random", random
        if pictures:
            yield "prior", prior
            yield "raw", separated(lambda mixed: (mixed - mixed.mean(1, keepdim=True))[:, None])


def _longer(first: Reconstruction, second: Reconstruction) -> Reconstruction:
    """The one with more certified examples."""
    counts = [0 if found.bound is None else int(found.bound.isfinite().sum()) for found in (first, second)]
    return second if counts[1] > counts[0] else first


def layer_span(view: View, layer: Dense, rng: torch.Generator) -> Span:
    """The row space of a dense layer's gradient [dL/dW, dL/db]: the span of its inputs, down to rounding and known noise.

    >>> import unbatch
    >>> from unbatch.models.small import build
    >>> rng = torch.Generator().manual_seed(0)
    >>> model, x, y = build("mlp", (6,), 3, width=20, rng=rng), torch.rand(2, 6, generator=rng), torch.tensor([0, 2])
    >>> seen, truth = unbatch.observe(model, torch.nn.functional.cross_entropy, x, y)
    >>> view = View.of(seen)
    >>> rows = layer_span(view, view.first, rng).rows  # orthonormal, of the inputs with a 1 beside them for the bias
    >>> rows.shape
    torch.Size([2, 7])
    >>> examples = torch.cat([x, torch.ones(2, 1)], 1).double()
    >>> torch.allclose(examples @ rows.T @ rows, examples, atol=1e-5)
    True
    """
    A = view.update[layer.weight].double()
    if layer.bias in view.update and layer.bias is not None:
        A = torch.cat([A, view.update[layer.bias].double()[:, None]], 1)
    names = [layer.weight] if layer.bias not in view.update else [layer.weight, layer.bias]
    rounding = max(view.obs.rounding(name) for name in names if name is not None)
    noise = float(view.knowledge.get("noise", 0.0)) + rounding
    return leading_span(A, rng, eps=torch.finfo(view.obs.dtype).eps, noise=noise)


def _separated(problem: Unmixing, rng: torch.Generator, attempts: int, partial: bool) -> Reconstruction:
    """What the span alone gives, with bounds."""
    view, form, rank = problem.view, problem.form, problem.rank
    known = view.known_labels
    classes = torch.unique(known).to(view.obs.device) if known is not None and form.classes else None
    starts = list(problem.starts())
    tail = problem.tail(problem.size)
    mixture = problem.mixture(tail)
    ways: list[tuple[str, GuessMaker | Descent]] = [*starts]
    if mixture.classes:  # second: on pictures and most tables components are faster where they work
        ways.insert(1, ("descent", Descent(RemainingLabels(view, form, mixture, tail))))
    found = unmix(mixture, ways, rng, classes=classes, attempts=attempts, tick=tick)
    own = mixture if found.weighed else mixture.unweighed()
    weights = own.weights(own.F(found.z, found.labels), found.z)
    weights = weights * problem.clients / tail.n if form.reduction == "mean" else weights
    weighing = problem.weighing(weights)
    rounding = Rounding(view.obs, problem.layer, form, problem.span.rows, tail.n)
    reach = mixture_radius(
        own,
        found.z,
        found.labels,
        rng,
        rounding=lambda z, y: problem.clients * rounding(z, y),
        jointly=found.joint,
    )
    times, steps = problem.most_times(weighing), problem.steps(rng)
    reach = radius_with_copies(own, found.z, found.labels, reach, times, steps)
    if form.labels.kind == "probabilities" and len(found.z):
        rows = completed(found.labels)
        reach = reach.masked_fill((rows < -PROBABILITY_ERROR).any(1) | (rows > 1 + PROBABILITY_ERROR).any(1), torch.inf)
    trace: dict[str, Any] = {
        "layer": problem.layer.name,
        "rank": rank,
        "batch size": weighing.size,
        "factor": weighing.factor,
        "log": found.log,
        "singular values": problem.span.values.tolist(),
    }
    told = _factor_words(weighing, form, found.labels, view.knowledge.get("batch_size"))
    words = [told] if told else []
    if len(found.z) < rank:
        words.append(_shortfall(mixture, tail, found, rank, view.knowledge.get("batch_size")))
    if words:
        trace["words"] = " ".join(words)
    return _returned(problem, found, weighing, weights, reach, trace, partial)


def _factor_words(weighing: Weighing, form: LossForm, labels: Tensor, n: int | None) -> str:
    """What multiple of the batch's gradient the update is, in words; rows that weigh less or are ignored are no factor."""
    found, uneven = len(labels), form.ignored is not None or form.weights is not None
    if (
        n is None
        or not found
        or not uneven
        or form.reduction != "mean"
        or form.by_count
        or len(weighing.times) != found
    ):
        return weighing.words
    mass = float(form.weight_of(labels).sum()) if form.classes else float(found)
    if abs(weighing.factor * mass / n - 1) > 1e-3:
        return weighing.words
    if found == n:
        return ""
    return (
        f"The update is the mean gradient of these {found} examples: either {n - found} of the batch of {n} are ignored by "
        f"the loss, or the update is {weighing.factor:.4g} times that of a batch in which they are hidden."
    )


def _returned(
    problem: Unmixing,
    found: Separation,
    weighing: Weighing,
    weights: Tensor,
    reach: Tensor,
    trace: dict[str, Any],
    partial: bool,
) -> Reconstruction:
    """What was found in the span's coordinates, as inputs with relative bounds; an example that occurs twice, twice.

    Clients with fewer examples come last, as they do where a batch is dealt to clients.
    """
    view, order = problem.view, weights.abs().argsort(stable=True)
    order = order if problem.clients > 1 else torch.arange(len(order)).to(order)
    times = weighing.times[order.cpu()]
    spare = torch.cat([torch.arange(int(t)) >= _proven_times(problem, weighing, int(t)) for t in times] or [times > 0])
    order = order.repeat_interleave(times.to(order.device))
    z, labels, reach = found.z[order], found.labels[order], reach[order].masked_fill(spare.to(reach.device), torch.inf)
    trace |= {
        "weights": (weights / weighing.times.to(weights))[order].tolist(),
        "certified": int(reach.isfinite().sum()),
        "found but not certified": int((~reach.isfinite()).sum()),
    }
    if partial and found.guesses is not None:
        z = torch.cat([z, found.guesses])
        reach = torch.cat([reach, torch.full((len(found.guesses),), torch.inf).to(reach)])
    rows = z @ problem.span.rows  # [f, d or d + 1]
    x = rows[:, : view.update[problem.layer.weight].shape[1]]
    bound = (reach / x.norm(dim=1).clamp_min(1e-300)).cpu()
    # a real target follows from how much its example counts, which clients of unequal shares leave open
    told = bool(problem.tail(problem.size).classes) or problem.even
    form = problem.form.labels
    targets = completed(labels) if form.kind == "probabilities" and len(labels) else labels
    targets = labels if form.kind == "class" else form.taken(targets, torch.float64)
    inputs, bound, name = view.undo(problem.layer, x, bound)
    return Reconstruction(
        inputs=inputs,
        labels=targets if len(z) == len(labels) and told else None,  # guesses have none
        layer=name,
        bound=bound,
        trace=trace,
    )


def _proven_times(problem: Unmixing, weighing: Weighing, times: int) -> int:
    """How often an example that counts `times` times occurs at least, whatever rows the loss ignored.

    The mean over the rows that count is the same for every example once and twice: the common divisor of all counts may be
    ignored rows as well as copies.
    """
    form = problem.form
    if form.ignored is None or form.by_count or form.reduction != "mean" or problem.view.known_labels is not None:
        return times
    whole = len(weighing.times) == problem.rank
    return times // math.gcd(*weighing.times.tolist()) if whole else 1


def _shortfall(mixture: Mixture, tail: Tail, found: Separation, rank: int, n: int | None) -> str:
    """Why fewer examples were found than the gradient has rank, as far as the gradient tells."""
    words, bent = f"{len(found.z)} of {rank} examples were found.", _bend(mixture, tail)
    lost = (
        LEAST_BENT_SHARE if found.joint else float(mixture.noise / mixture.S[-1]) ** 2
    )  # a smooth bend is seen down to the noise
    if n is not None and n > rank:
        words += (
            f" The batch has {n}, so examples depend linearly on each other (duplicates, three constant images), and the "
            "span does not isolate those that do."
        )
    if bent < lost:
        words += (
            f" All but {bent:.1e} of the deltas' span is that of a linear network: everything above the layer is all but "
            "linear on these inputs, and the gradient of a linear network leaks the span of the inputs and nothing more."
        )
    return words + _failed(found)


def _failed(found: Separation) -> str:
    """Which starts were tried without success since the last one that had some."""
    held = (
        [i for i, entry in enumerate(found.log) if entry.get("found") and not entry.get("lost")] if len(found.z) else []
    )
    last = max(held, default=-1)
    misses = Counter(str(entry["start"]) for entry in found.log[last + 1 :])
    told = [f"{name}{f' ({times} times)' if times > 1 else ''}" for name, times in misses.items()]
    return f" Tried without success{' after the last of them' * (last >= 0)}: {', '.join(told)}." if told else ""


def _bend(mixture: Mixture, tail: Tail) -> float:
    """Share of the deltas' span outside the range of J^T, J the derivative of the outputs at a typical input of the span.

    0 where all deltas are J^T r_i, as in a linear network; 1 is what unrelated directions would have.
    """
    m, n = mixture.U.shape
    z = mixture.U.new_zeros(1, n) if mixture.ones is None else mixture.scaled(mixture.ones[None])
    if tail.targets >= m:
        return 1.0
    before = mixture.before(z).detach().requires_grad_()
    outputs = tail.outputs(before).flatten()
    J = torch.cat([torch.autograd.grad(output, before, retain_graph=True)[0] for output in outputs])  # [k, m]
    if not bool(J.isfinite().all()):  # no typical input: of a bias whose gradient was pruned away
        return 1.0
    _, S, Vh = torch.linalg.svd(J, full_matrices=False)
    Q = Vh[S > 1e-9 * S[0]]
    return float((1 - (Q @ mixture.U).square().sum() / n) / (1 - len(Q) / m))


class RemainingLabels:
    """The labels of the examples that have not been found yet: as known, or as the head's gradient counts them.

    In any order.

    >>> import unbatch
    >>> from unbatch.models.small import build
    >>> rng = torch.Generator().manual_seed(0)
    >>> model = build("mlp", (6,), 3, width=20, activation="gelu", rng=rng)
    >>> x, y = torch.rand(2, 6, generator=rng), torch.tensor([0, 2])
    >>> seen, truth = unbatch.observe(model, torch.nn.functional.cross_entropy, x, y)
    >>> problem = Unmixing.of(View.of(seen), rng)
    >>> tail = problem.tail(2)
    >>> remaining = RemainingLabels(problem.view, problem.form, problem.mixture(tail), tail)
    >>> nothing_found = torch.zeros(0, 2).double(), torch.zeros(0, dtype=torch.int64)
    >>> remaining(*nothing_found)
    tensor([0, 2])
    """

    def __init__(self, view: View, form: LossForm, mixture: Mixture, tail: Tail) -> None:
        self.form, self.mixture, self.tail = form, mixture, tail
        self.known, self.clients = view.known_labels, 1
        if form.reduction == "mean":
            self.clients = int(view.knowledge.get("clients", 1))
        names = (None, None) if view.head is None else (view.head.weight, view.head.bias)
        self.weight, self.bias = (view.update.get(name) if name else None for name in names)

    def __call__(self, z: Tensor, y: Tensor) -> Tensor:
        """The labels left, where the examples of coordinates z [f, n] and labels y [f] are found."""
        k, n, left, unit = self.mixture.classes, self.tail.n, self.mixture.n - len(z), 1.0
        if len(z):  # an example that counts twice occurs twice, and all count as many times as the update was scaled
            free = self.mixture.unweighed()
            weights = free.weights(free.F(z, y), z)
            unit = float(weights.median())
            times = (weights / unit).round().clamp(1, n).long()
            z, y = z.repeat_interleave(times, 0), y.repeat_interleave(times)
        if self.known is not None:
            counts = torch.bincount(self.known.cpu().flatten().long(), minlength=k)
        else:
            # probabilities of those not found: on average those of the found, where they are many, or of noise
            alike = z if len(z) > left else beginning(self.mixture, torch.Generator().manual_seed(0), spread=1.0)
            expected = self._probabilities(z).sum(0) + (n - len(z)) * self._probabilities(alike).mean(0)
            counts = expected if len(expected) == k else torch.cat([n - expected, expected])
            if self.form.name != "additive" and (self.weight is not None or self.bias is not None):
                factor = unit * self.clients * self.form.scale / (n if self.form.reduction == "mean" else 1)
                counts = label_counts(
                    self.weight,
                    self.bias,
                    n,
                    factor=factor,
                    expected=expected,
                    loss=self.form.name,
                    smoothing=self.form.smoothing,
                )[2]
        rest = (counts.cpu() - torch.bincount(y.cpu(), minlength=k)).clamp_min(0).double()
        zeros = torch.zeros(k, dtype=torch.int64)
        whole = apportion(rest * left / rest.sum().clamp_min(1), zeros, zeros + left, left)
        return torch.arange(k).repeat_interleave(whole).to(y.device)

    def _probabilities(self, z: Tensor) -> Tensor:
        with torch.no_grad():
            outputs = self.tail.outputs(self.mixture.before(z)).flatten(1).cpu()
        return outputs.softmax(1) if self.form.classes and outputs.shape[1] > 1 else outputs.sigmoid()
