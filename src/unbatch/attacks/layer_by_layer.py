"""layer-by-layer: an image, or a few, read backward through a convolutional network, one linear system a layer."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, final

import torch
from pydantic import Field
from torch import Tensor

from unbatch.attack import Attack, Cost, Demo, Guarantee
from unbatch.errors import NotApplicable
from unbatch.inversion.backward.first_dense import FirstDense
from unbatch.inversion.backward.fold import readings
from unbatch.inversion.backward.nonlinear_runs import flat_roots
from unbatch.inversion.backward.reading import KnownOutput, Reading, Unreadable
from unbatch.inversion.rounds import restored, sharpened, unseen
from unbatch.inversion.view import View
from unbatch.knowledge import DOMAIN_FIELDS, PROTOCOL_FIELDS
from unbatch.likelihood import Likelihood
from unbatch.network.chain import follow
from unbatch.network.precision import loss_value
from unbatch.numerics.search.matching import cosine_distance, signed_adam, total_variation
from unbatch.numerics.search.smoothest import smoothest, smoothest_root
from unbatch.observation import Observation
from unbatch.progress import tick
from unbatch.reconstruction import Reconstruction

Method = Literal["auto", "copa", "hybrid", "r-gap", "r-conv"]
LARGEST_BATCH = 4  # examples
ROUNDING_DRAWS = 3  # of the update's rounding, which show how far it moves what was read
BOUND_FACTOR = 4.0  # times the farthest of them, or twice what the update is off by, in units of what was drawn
FIRST_ORDER_MOVE = 0.1  # relative; beyond it the first order says nothing
LIKELY_ROOT_SIDE = 16  # pixels, below which a photograph's likeliest root is nearer than its smoothest
ROUNDING_MISFIT = 0.1  # relative, of a tensor: more is no rounding, whatever the precision
HYBRID = (((1.0, 1.0, 0.05), 10_000), ((1.0, 1.0, 0.1), 8_000), ((10.0, 0.1, 1.0), 1_000))  # first layer, second, later


@final
class LayerByLayer(Attack):
    """Solves the network backward from its first dense layer to its input, one linear system a run of layers.

    The dense layer's gradient gives its input and the loss's gradient there (one example as by bias-ratio, up to 4 by
    `unmix`). Below it each activation is inverted entry by entry, and each run of affine layers is one linear system
    [W; K] x = [z; dL/dW] for its input x: W, its forward equations for what is known of its output z (weight constraint),
    and K, those of its weights' gradients (gradient constraint), linear in x since dL/dz is known; dL/dx = W^T dL/dz.
    Where every system has full column rank the image is exact; otherwise it is a guess, and the layers are named.

    The methods differ in what they do with a system that leaves something open.
    r-gap: takes the solution of least norm, whatever the rank.
    copa: also asks that an inner system's solution come from the layers before it, with their gradients (pull-back
    constraint), and takes the likeliest image of those that do; so it reads layers that are not linear on the way back
    (residual blocks, max pooling, layer norms, GELU).
    auto: does as copa, and takes the smoothest image where all that leaves images open.
    hybrid: looks for a deficient layer's input by the published soft penalties instead.
    r-conv: where a layer has a weight, takes its gradient's equations alone.
    """

    family: ClassVar[str] = "layer-by-layer"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT
    cost: ClassVar[Cost] = Cost.SOLVES
    paper: ClassVar[str] = (
        "Chen, Campbell, 2021 (COPA), 2022 (hybrid); Zhu, Blaschko, R-GAP, ICLR 2021; Eltaras et al., R-CONV, 2024"
    )
    needs: ClassVar[frozenset[str]] = frozenset({"input_shape"})
    uses: ClassVar[frozenset[str]] = (
        frozenset({"batch_size", "labels", "noise", "buffers", "log_prob", "earlier", "clients"})
        | DOMAIN_FIELDS
        | PROTOCOL_FIELDS
    )
    demo: ClassVar[Demo] = Demo(
        case="photos:size=16,model=cnn2-c1,double=true", floors={"l2-error": 1e-9, "psnr": 200.0}
    )

    method: Annotated[Method, Field(description="how deficient systems are dealt with, and which equations count")] = (
        "auto"
    )

    iterations: Annotated[int | None, Field(gt=0, description="hybrid's steps a layer; none takes the published")] = (
        None
    )

    def run(self, view: View, rng: torch.Generator) -> Reconstruction:
        view.refuse_tokens()
        view = view.gradient
        n, law, hidden = view.knowledge.get("batch_size", 1), Likelihood.of(view.knowledge), unseen(view.obs)
        if n > LARGEST_BATCH:
            raise NotApplicable(
                f"the batch has {n} examples, and their gradients mix in every convolution; it reads up to {LARGEST_BATCH}."
            )
        if view.steps:
            raise NotApplicable(view.no_gradient)
        if law is None:
            return self._backward(view, rng, hidden)
        found = self._backward(restored(view, lowest=n == 1), rng, hidden)
        if any(law.spread(view.update).values()) or any(bool(h.any()) for h in hidden.values()):
            found = replace(found, bound=torch.full((len(found),), torch.inf, dtype=torch.float64))
        return sharpened(view.obs, found, rng)

    def _backward(self, view: View, rng: torch.Generator, hidden: Mapping[str, Tensor]) -> Reconstruction:
        """The reading of the input, whatever it determines; `hidden` entries of the update count as not sent."""
        first, obs, trace = FirstDense(view), view.obs, dict[str, Any](method=self.method)
        noise = float(obs.knowledge.get("noise", 0.0))
        errors = {k: _error(tensor, noise, obs.grain.get(k, 0.0)) for k, tensor in obs.update.items()}
        found, label = list[Reading](), None
        try:
            known, label = _known(first, errors, hidden, rng)
            for reading in self._read(obs, first, known):
                found.append(reading)
        except Unreadable as error:
            trace["stopped"] = str(error)
        trace["readings"] = [_row(reading) for reading in found]
        trace["deficient"] = [reading.layers for reading in found if reading.deficit != 0]
        if not found or found[-1].links[0] is not first.below[0]:
            trace.setdefault("stopped", "it was stopped before it reached the input.")
            nothing = torch.zeros(0, *obs.knowledge.input_shape)
            return Reconstruction(inputs=nothing, bound=nothing.new_zeros(0), trace=trace)
        last, open_ = found[-1], self._open(found)
        inputs = last.x if open_ == 0 else self._completed(obs, last)
        inputs = inputs.reshape(-1, *obs.knowledge.input_shape)  # a view alone may lie before the first link
        if trace["deficient"]:
            trace["undetermined"] = open_
        labels = label if label is not None else first.label(inputs)
        bound = torch.full((len(inputs),), torch.inf, dtype=torch.float64)
        if labels is not None:
            trace["residual"], misfits = _misfits(obs, inputs, labels)
            if open_ == 0:
                bound = _bound(obs, last, misfits, errors)
        return Reconstruction(inputs=inputs, labels=labels, bound=bound, trace=trace)

    @property
    def _curved(self) -> bool:
        """Whether what no linear system determines is read by the layers before it as well."""
        return self.method in ("auto", "copa")

    def _open(self, found: Sequence[Reading]) -> float | None:
        """The share of the input that is left open; None where it was not counted, or a later layer is deficient."""
        last, deficient = found[-1], [reading for reading in found if reading.deficit != 0]
        settled = all(reading is last for reading in deficient[:1]) or (self._curved and len(last.x) == 1)
        return last.deficit / last.system.unknowns if settled and last.deficit is not None else None

    def _read(self, obs: Observation, first: FirstDense, known: Sequence[KnownOutput]) -> Iterator[Reading]:
        """The readings; the hybrid's have its own x where the system is deficient, and the layers before follow it."""
        box = obs.knowledge.get("input_range", (0.0, 1.0)) if self._curved else None

        def going(reading: Reading) -> bool:
            return tick(1 - first.below.index(reading.links[0]) / len(first.below))

        def improve(reading: Reading) -> Tensor | None:
            if self.method != "hybrid" or reading.deficit == 0 or len(reading.x) > 1:
                return None
            return self._searched(obs, first, reading, first.likely()) if going(reading) else reading.x

        wide = self.method != "r-conv"
        for reading in readings(first.runs, known[0], known[1:], forward=wide, box=box, improve=improve):
            yield reading
            if not going(reading) and self.method != "hybrid":  # a stopped search still reads on from where it is
                return

    def _completed(self, obs: Observation, last: Reading) -> Tensor:
        """The smoothest picture that the equations allow, where that is asked for, and they hold of one."""
        shape, box = obs.knowledge.input_shape, obs.knowledge.get("input_range", (0.0, 1.0))
        if self.method != "auto" or len(shape) != 3 or len(last.x) > 1 or not last.fits:
            return last.x
        x, pullback = last.x.flatten(), last.pullback
        if pullback is None or flat_roots(last):
            x = smoothest(x, last.solution.free, shape, box, tick=tick)
        elif min(shape[1:]) >= LIKELY_ROOT_SIDE:
            x = smoothest_root(pullback, x, shape, box, tick=tick)
        return x.view(last.x.shape)

    def _searched(self, obs: Observation, first: FirstDense, reading: Reading, labels: Tensor | None) -> Tensor:
        """The hybrid's x of a deficient layer: by the match of the gradients from here on, total variation and the system.

        w_1 (1 - cosine of dL/dW) + w_2 TV(x) + w_3 |A (x - x*)|^2 with an orthonormal A, by signed Adam from the least-norm
        solution x*; weights and steps as published for the layer's place. Raises Unreadable: the label is not known.
        """
        if labels is None:
            raise Unreadable("the hybrid matches gradients, for which it needs the label, and that is not known.")
        here = first.links.index(reading.links[0])
        weighed = [link for link in first.links[:here] if getattr(link.module, "weight", None) is not None]
        weights, steps = HYBRID[min(len(weighed), len(HYBRID) - 1)]
        live = [replace(link, module=copy.deepcopy(link.module).double()) for link in first.links[here:]]
        own = {link.called(name): p for link in live for name, p in link.module.named_parameters()}
        seen = [obs.update[name].double() for name in own if name in obs.update]
        sent = [p for name, p in own.items() if name in obs.update]
        known = reading.solution.seen(reading.x.flatten(1))

        def objective(point: Tensor) -> Tensor:
            x = point.view_as(reading.x)
            found = torch.autograd.grad(loss_value(obs.loss, follow(live, x), labels), sent, create_graph=True)
            off = (reading.solution.seen(point) - known).square().sum()
            variation = total_variation(x) if x.ndim == 4 else off.new_zeros(())
            parts = (cosine_distance(found, seen), variation, off)
            return torch.stack([w * part for w, part in zip(weights, parts, strict=True)]).sum()

        point, steps = reading.x.flatten(1), self.iterations or steps
        for step, (_, moved) in enumerate(signed_adam(objective, point, steps=steps)):
            point = moved
            if not tick(step / steps):
                break
        return point.view_as(reading.x)


def _known(
    first: FirstDense, errors: Mapping[str, float], hidden: Mapping[str, Tensor], rng: torch.Generator
) -> tuple[list[KnownOutput], Tensor | None]:
    """What is known before the first dense layer, by the update and by draws of its rounding; the labels, if they come."""
    update = {name: tensor.double() for name, tensor in first.obs.update.items()}
    own = {first.dense.weight, first.dense.bias}  # which is filled
    update = {k: t if k in own else torch.where(hidden[k], torch.nan, t) for k, t in update.items()}
    features = first.features(update, rng)
    found = [features.known]
    for _ in range(ROUNDING_DRAWS):
        noise = {k: errors[k] * torch.randn(t.shape, generator=rng, dtype=t.dtype) for k, t in update.items()}
        moved = {k: t + noise[k].to(t.device) for k, t in update.items()}
        layers = first.statistics(rng)
        found.append(replace(features.again(moved, rng), layers=layers))
    return found, features.labels


def _bound(
    obs: Observation, last: Reading, misfits: Mapping[str, tuple[float, float]], errors: Mapping[str, float]
) -> Tensor:
    """The largest relative error [n] of a determined input, from how far the update's rounding moves it; inf: no claim.

    None is made where a tensor of the update misfits by more than rounding.
    """
    n, eps = len(last.x), float(torch.finfo(obs.dtype).eps)
    allowed = {k: min(1e3 * eps, ROUNDING_MISFIT) * size + errors[k] for k, (_, size) in misfits.items()}
    if any(not off <= allowed[k] for k, (off, _) in misfits.items()):
        return torch.full((n,), torch.inf, dtype=torch.float64)
    x = last.x.flatten(1)
    moves = [(other.view_as(x) - x).norm(dim=1) / x.norm(dim=1) for other, _ in last.others]
    far = torch.stack(moves).max(0).values.cpu()
    beyond = max([off / errors[k] for k, (off, _) in misfits.items() if errors[k]], default=1.0)
    return torch.where(far < FIRST_ORDER_MOVE, max(BOUND_FACTOR, 2 * beyond) * far, torch.inf)


def _error(t: Tensor, noise: float, grain: float) -> float:
    """Of an entry: what was added, the rounding of its sums, which goes with the tensor's size, and what does not."""
    rounding = 4 * (torch.finfo(t.dtype).eps * float(t.double().square().mean().sqrt()) + grain)
    return float((noise**2 + rounding**2) ** 0.5)


def _misfits(obs: Observation, inputs: Tensor, labels: Tensor) -> tuple[float, dict[str, tuple[float, float]]]:
    """The relative residual up to a factor, and each tensor's root mean square misfit and size."""
    kind = next(obs.model.parameters()).dtype
    y = labels.to(kind) if labels.is_floating_point() else labels
    factor, residual = obs.fit(inputs, y)
    again = obs.simulate(inputs.to(obs.device, kind), y.to(obs.device))
    rms = {k: (t.double(), t.double() - factor * again[k].detach().double()) for k, t in obs.update.items()}
    return residual, {
        k: (float(off.square().mean().sqrt()), float(t.square().mean().sqrt())) for k, (t, off) in rms.items()
    }


def _row(reading: Reading) -> dict[str, Any]:
    return {
        "layers": reading.layers,
        "unknowns": reading.system.unknowns,
        "equations": reading.system.equations,
        "rank": reading.solution.rank,
    }
