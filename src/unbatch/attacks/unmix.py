"""unmix: whole batches, exactly, from the gradient of the first dense layer, for any activation and depth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Annotated, Any, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor

from unbatch.attack import Attack, Demo, Guarantee
from unbatch.domain import Images
from unbatch.inversion.above_layer import Rounding, Tail
from unbatch.inversion.rounds import restored, sharpened, unseen
from unbatch.knowledge import PROTOCOL_FIELDS, Knowledge
from unbatch.likelihood import Likelihood
from unbatch.loss import LossForm, identify
from unbatch.network.dense import Dense, dense_layers, forward
from unbatch.numerics.label_counts import apportion, label_counts
from unbatch.numerics.linear.span import Span, leading_span, rounding_noise
from unbatch.numerics.unmix.certificate import radius
from unbatch.numerics.unmix.descent import Descent, beginning
from unbatch.numerics.unmix.ica import edges, fast_ica, group_ica, whiten
from unbatch.numerics.unmix.mixture import Mixture
from unbatch.numerics.unmix.moment_start import weight_moments
from unbatch.numerics.unmix.solver import Separation, Start, unmix
from unbatch.observation import Observation
from unbatch.progress import tick
from unbatch.reconstruction import Reconstruction, certified

DUPLICATES = 2  # copies beyond the rank that are looked for, where nothing fits without
ARITHMETIC = 8 * torch.finfo(torch.float64).eps  # what reading A adds to its error
BENT = 0.05  # share of the deltas' span below which too few kinks are met: measured .03 finds none, .08 all
ROUNDINGS = 4  # relative error of a delta, in units of rounding: measured ones are 1 to 3


@final
class Unmix(Attack):
    """Every example of a batch behind a dense layer, one by one, each certified on its own.

    The layer's gradient [dL/dW, dL/db] = sum_i delta_i (x_i, 1)^T has the examples' span as its row space and the batch
    size as its rank. In coordinates z of the span each example obeys U S q = F(z, y) alone, F the model's own delta:
    guesses (independent components of the edges of pictures, or of raw rows; draws from a prior) are polished on it,
    accepted if their subtraction lowers the rank by one, and subtracted. Kinked activations (relu) give exact dual
    vectors q instead, by a linear program over the neurons' patterns (one hidden layer) and least absolute deviations.
    Batch size, labels and residuals are found.

    Examples must not interact above the layer, and the batch must be smaller than half the layer's width and than its
    inputs. Where layers before it are not a mere normalisation, their exact outputs (features) are returned.
    """

    family: ClassVar[str] = "span"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT
    paper: ClassVar[str] = (
        "this library; on the span of Kariyappa et al., Cocktail Party Attack, ICML 2023, and the sparsity of Dimitrov et "
        "al., SPEAR, NeurIPS 2024"
    )
    needs: ClassVar[frozenset[str]] = frozenset({"input_shape"})
    uses: ClassVar[frozenset[str]] = (
        frozenset({"batch_size", "labels", "noise", "input_range", "domain", "log_prob", "earlier", "buffers"})
        | PROTOCOL_FIELDS
    )
    demo: ClassVar[Demo] = Demo(
        case="photos:batch=8,activation=gelu,width=200", floors={"l2-error": 1e-4, "label-accuracy": 1.0}
    )

    attempts: Annotated[
        int, Field(ge=1, description="times each start is tried without success before it is given up")
    ] = 3
    partial: Annotated[
        bool, Field(description="also return guesses that are not certified, with an infinite bound")
    ] = False

    def obstacle(self, obs: Observation) -> str | None:
        obs = restored(obs)
        if obs.protocol.steps(obs.knowledge.get("batch_size", 1)):
            return "the update is of local steps, which mix the gradients of several weights."
        layer = _layer(obs)
        if isinstance(layer, str):
            return layer
        form = _form(obs)
        if form is None:
            return "the loss is none of cross entropy, binary cross entropy and squared error."
        words = Tail(obs, layer, form, 1).obstacle()
        if words is not None:
            return words
        span = _span(obs, layer, torch.Generator().manual_seed(0))
        n, (m, d) = len(span.values), obs.update[layer.weight].shape
        if n == 0:
            return f"the gradient of {layer.name!r} is zero."
        if n >= min(m, d + (layer.bias is not None)):
            return (
                f"the gradient of {layer.name!r} has full rank {n}: the batch has at least as many examples as the layer "
                "has inputs or neurons (or the update carries noise), and the span no longer isolates the examples."
            )
        if 2 * n >= m:
            return (
                f"the gradient of {layer.name!r} has rank {n}, and {m} neurons give {m - n} equations for the {n} unknowns "
                "of an example: fewer than it takes."
            )
        return None

    def run(self, obs: Observation, rng: torch.Generator) -> Reconstruction:
        law, n = Likelihood.of(obs.knowledge), obs.knowledge.get("batch_size")
        if law is None:
            found = self._read(obs, rng)
            return found if self.partial else certified(found)
        nothing = torch.zeros(0, *obs.knowledge.input_shape)
        found, layer = Reconstruction(inputs=nothing, bound=nothing.new_zeros(0)), _layer(obs)
        reads = isinstance(layer, Dense) and layer.feeds is not None  # the network's own inputs
        if not (reads and law.rescales(obs.update)):
            found = self._read(restored(obs), rng)
            filled = any(bool(hidden.any()) for hidden in unseen(obs).values())
            if filled or any(
                law.spread(obs.update).values()
            ):  # only the whole batch tells a mixture from an example then
                found = replace(found, bound=torch.full((len(found),), torch.inf, dtype=torch.float64))
            found = sharpened(obs, found, rng)
        if n is not None and len(certified(found)) < n and reads and tick(0.0):  # all at once, by the likelihood
            search, told = Attack.parse("gradient-matching"), obs.knowledge | Knowledge(log_prob=law)
            seen = replace(obs, knowledge=told.only(*search.needs, *search.uses))
            found = _longer(found, sharpened(obs, search.run(seen, rng), rng))
        return found if self.partial else certified(found)

    def _read(self, obs: Observation, rng: torch.Generator) -> Reconstruction:
        layer, form = _layer(obs), _form(obs)
        assert isinstance(layer, Dense)  # obstacle() has looked
        assert form is not None
        span = _span(obs, layer, rng)
        known = obs.knowledge.get("labels")
        classes = known.unique().to(obs.device) if known is not None and form.classes else None
        starts = list(_starts(obs, layer, span))
        rank = len(span.values)
        # exact duplicates count once in the rank and once each in the mean: then the batch is larger than the rank
        for size in range(rank, rank + (DUPLICATES if form.reduction == "mean" else 0) + 1):
            mixture = _mixture(obs, layer, form, span, size)
            attempts = self.attempts if size == rank else 1
            ways: list[tuple[str, Start | Descent]] = [*starts]
            if mixture.classes:  # second: on pictures and most tables components are faster where they work
                ways.insert(1, ("descent", Descent(Counted(obs, form, mixture))))
            copies = 1 + (size - rank if form.reduction == "mean" else DUPLICATES)
            found = unmix(mixture, ways, rng, classes=classes, attempts=attempts, copies=copies, tick=tick)
            if len(found.z):
                break
        rounding = Rounding(obs, layer, form, span.rows, size)
        reach = radius(mixture, found.z, found.labels, rng, rounding=rounding, jointly=found.joint)
        z, labels = found.z, found.labels
        if mixture.classes:
            times = labels // mixture.classes + 1
            z, reach = z.repeat_interleave(times, 0), reach.repeat_interleave(times)
            labels = (labels % mixture.classes).repeat_interleave(times)
        trace: dict[str, Any] = {
            "layer": layer.name,
            "rank": rank,
            "batch size": size,
            "certified": int(reach.isfinite().sum()),
            "found but not certified": int((~reach.isfinite()).sum()),
            "log": found.log,
            "singular values": span.values.tolist(),
        }
        if len(found.z) < rank:
            trace["words"] = _shortfall(mixture, found, rank, obs.knowledge.get("batch_size"))
        if self.partial and found.guesses is not None:
            z = torch.cat([z, found.guesses])
            reach = torch.cat([reach, torch.full((len(found.guesses),), torch.inf).to(reach)])
        rows = z @ span.rows  # [f, d or d + 1]
        x = rows[:, : obs.update[layer.weight].shape[1]]
        bound = (reach / x.norm(dim=1).clamp_min(1e-300)).cpu()
        targets = None if len(z) > len(labels) else _labels(labels, form)  # guesses have none
        if layer.feeds is None:
            return Reconstruction(inputs=x, labels=targets, layer=layer.name, bound=bound, trace=trace)
        inputs = layer.feeds.invert(x)
        stretch = (x.norm(dim=1) / inputs.norm(dim=1) / layer.feeds.scale.abs().min().to(x)).cpu()
        shaped = inputs.reshape(-1, *obs.knowledge.input_shape)
        return Reconstruction(inputs=shaped, labels=targets, bound=bound * stretch.clamp_min(1.0), trace=trace)


def _longer(first: Reconstruction, second: Reconstruction) -> Reconstruction:
    """The one with more certified examples."""
    counts = [0 if found.bound is None else int(found.bound.isfinite().sum()) for found in (first, second)]
    return second if counts[1] > counts[0] else first


def _layer(obs: Observation) -> Dense | str:
    """The first dense layer that sent its gradient, or what is missing, in words."""
    layers = dense_layers(obs.model, obs.knowledge.input_shape)
    layer = next((d for d in layers if d.weight in obs.update), None)
    if layer is None:
        return "no dense layer sent its gradient."
    if layer.head:
        return (
            "the only dense layer is the head: its deltas have as many entries as classes, too few to tell examples by."
        )
    return layer


def _form(obs: Observation) -> LossForm | None:
    outputs = tuple(forward(obs.model, torch.zeros(2, *obs.knowledge.input_shape)).shape)
    return identify(obs.loss, outputs, device=next(obs.model.parameters()).device)


def _span(obs: Observation, layer: Dense, rng: torch.Generator) -> Span:
    A = obs.update[layer.weight].double()
    if layer.bias in obs.update and layer.bias is not None:
        A = torch.cat([A, obs.update[layer.bias].double()[:, None]], 1)
    noise = float(obs.knowledge.get("noise", 0.0)) + rounding_noise(obs.dtype)
    return leading_span(A, rng, eps=torch.finfo(obs.dtype).eps, noise=noise)


def _mixture(obs: Observation, layer: Dense, form: LossForm, span: Span, size: int) -> Mixture:
    parameters = {name: p.detach().double() for name, p in obs.model.named_parameters(remove_duplicate=False)}
    W = parameters[layer.weight]
    sent = layer.bias is not None and layer.bias in obs.update
    offset = None
    if layer.bias is not None and sent:
        W = torch.cat([W, parameters[layer.bias][:, None]], 1)
    elif layer.bias is not None:
        offset = parameters[layer.bias]
    P = span.rows
    tail = Tail(obs, layer, form, size)
    # what the client computed with, in which deltas are wrong; a coarser update was rounded once, at the end
    eps = torch.finfo(next(obs.model.parameters()).dtype).eps
    once = torch.finfo(obs.dtype).eps > 1e-4  # the tolerance for sums rounded term by term is then far too wide
    return Mixture(
        U=span.columns,
        S=span.values,
        W=P @ W.T,
        offset=offset,
        ones=P[:, -1].clone() if sent else None,
        deltas=tail,
        classes=tail.classes,
        targets=tail.targets,
        noise=min(span.noise, 2 * span.beyond) if once else span.noise,
        rounding=ROUNDINGS * max(eps, torch.finfo(torch.float64).eps),
        basis=torch.eye(len(P)).to(P),
        outside=span.beyond + span.arithmetic + ARITHMETIC * float(span.values[0]),
    )


def _shortfall(mixture: Mixture, found: Separation, rank: int, n: int | None) -> str:
    """Why fewer examples were found than the gradient has rank, as far as the gradient tells."""
    words, bent = f"{len(found.z)} of {rank} examples were found.", _bend(mixture)
    lost = BENT if found.joint else float(mixture.noise / mixture.S[-1]) ** 2  # a smooth bend is seen down to the noise
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
    return words


def _bend(mixture: Mixture) -> float:
    """Share of the deltas' span outside the range of J^T, J the derivative of the outputs at a typical input of the span.

    0 where all deltas are J^T r_i, as in a linear network; 1 is what unrelated directions would have.
    """
    assert isinstance(mixture.deltas, Tail)
    m, n = mixture.U.shape
    z = mixture.U.new_zeros(1, n) if mixture.ones is None else mixture.scaled(mixture.ones[None])
    if mixture.deltas.targets >= m:
        return 1.0
    before = mixture.before(z).detach().requires_grad_()
    outputs = mixture.deltas.outputs(before).flatten()
    J = torch.cat([torch.autograd.grad(output, before, retain_graph=True)[0] for output in outputs])  # [k, m]
    _, S, Vh = torch.linalg.svd(J, full_matrices=False)
    Q = Vh[S > 1e-9 * S[0]]
    return float((1 - (Q @ mixture.U).square().sum() / n) / (1 - len(Q) / m))


class Counted:
    """Labels of the examples not found yet, in any order: as known, or as the head's gradient counts them."""

    def __init__(self, obs: Observation, form: LossForm, mixture: Mixture) -> None:
        assert isinstance(mixture.deltas, Tail)
        self.form, self.mixture, self.tail = form, mixture, mixture.deltas
        self.known = obs.knowledge.get("labels")
        head = next((layer for layer in dense_layers(obs.model, obs.knowledge.input_shape) if layer.head), None)
        names = (None, None) if head is None else (head.weight, head.bias)
        self.weight, self.bias = (obs.update.get(name) if name else None for name in names)

    def __call__(self, z: Tensor, y: Tensor) -> Tensor:
        k, n, left = self.mixture.classes, self.tail.n, self.mixture.n - len(z)
        z, y = z.repeat_interleave(y // k + 1, 0), (y % k).repeat_interleave(y // k + 1)
        if self.known is not None:
            counts = torch.bincount(self.known.cpu(), minlength=k)
        else:
            # probabilities of those not found: on average those of the found, where they are many, or of noise
            alike = z if len(z) > left else beginning(self.mixture, torch.Generator().manual_seed(0), spread=1.0)
            expected = self._probabilities(z).sum(0) + (n - len(z)) * self._probabilities(alike).mean(0)
            counts = expected if len(expected) == k else torch.cat([n - expected, expected])
            if self.weight is not None or self.bias is not None:
                factor = self.form.scale / (n if self.form.reduction == "mean" else 1)
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
        return outputs.sigmoid() if self.form.name == "binary-cross-entropy" else outputs.softmax(1)


def _labels(labels: Tensor, form: LossForm) -> Tensor:
    return labels if form.classes else labels.to(torch.float64)


def _starts(obs: Observation, layer: Dense, span: Span) -> Iterator[tuple[str, Start]]:
    """Guesses of what the r examples left look like, as rows [g, r] of coordinates in their mixture; the best one first."""
    shape = obs.knowledge.input_shape
    d = obs.update[layer.weight].shape[1]
    scale = torch.ones(d).to(span.rows) if layer.feeds is None else layer.feeds.scale.to(span.rows)
    rows = span.rows[:, :d] / scale  # mixtures of network inputs, up to a shift that edges do not see

    def separated(signals: Callable[[Tensor], Tensor]) -> Start:
        def start(left: Mixture, rng: torch.Generator) -> Tensor:
            white, T = whiten(signals(left.basis @ rows))
            turn = torch.linalg.qr(torch.randn(left.n, left.n, generator=rng, dtype=torch.float64))[0].to(white)
            return group_ica(white, turn) @ T

        return start

    def raw(left: Mixture, rng: torch.Generator) -> Tensor:
        centred = left.basis @ rows
        return fast_ica(centred - centred.mean(1, keepdim=True), rng)

    def prior(left: Mixture, rng: torch.Generator) -> Tensor:
        low, high = obs.knowledge.get("input_range", (0.0, 1.0))
        draws = Images(shape=shape, low=low, high=high).prior(4 * left.n, rng).to(rows).flatten(1)
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
