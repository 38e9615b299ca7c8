"""layer-by-layer: an image, or a few, read backward through a convolutional network, one linear system a layer."""

from __future__ import annotations

import copy
from collections.abc import Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, final

import numpy as np
import torch
from pydantic import Field
from scipy.optimize import brentq
from torch import Tensor

from unbatch.attack import Attack, Demo, Guarantee
from unbatch.chain import Link, chain, follow
from unbatch.loss import identify
from unbatch.network import dense_layers, forward
from unbatch.numerics.linsys import Solution
from unbatch.numerics.matching import cosine_distance, signed_adam, total_variation
from unbatch.numerics.smoothest import smoothest, smoothest_root
from unbatch.observation import PROTOCOL_FIELDS, Observation, Reconstruction
from unbatch.progress import tick
from unbatch.pullback import Fit, Pullback
from unbatch.trunk import Reading, Unreadable, read

Method = Literal["auto", "copa", "hybrid", "r-gap", "r-conv"]
MOST = 4  # examples of a batch
DRAWS = 3  # of the update's rounding, which show how far it moves what was read
HYBRID = (((1.0, 1.0, 0.05), 10_000), ((1.0, 1.0, 0.1), 8_000), ((10.0, 0.1, 1.0), 1_000))  # first layer, second, later
SAFETY = 4.0  # times the farthest of them
SIZES = (1e-3, 1e4, 200)  # of the input of a dense layer without a bias: from, to, and how many are tried


@final
class LayerByLayer(Attack):
    """Backward from the first dense layer: x_i from [W; K] x_i = [s^-1(x_{i+1}); dL/dW_i], layer by layer.

    The dense layer gives its input and dL/dx (n = 1: as bias-ratio does, up to 4 examples by `unmix`). Each run of affine
    layers below it is one linear system: W, its forward equations for what is known of its output (weight constraint), and
    K, those of its weight's gradient (gradient constraint), linear in x since dL/dz is known; dL/dx = W^T dL/dz.
    Where every system has full column rank the image is exact; otherwise it is a guess, and the layers are named.

    r-gap: at the solution of least norm, whatever the rank. copa: where an inner system is deficient, also the pull-back
    constraint, that its solution come from an input. auto: and where all that leaves pictures open, the smoothest of them.
    hybrid: a deficient layer's input by the published soft penalties instead. r-conv: where a layer has a weight, its
    gradient's equations alone.
    """

    family: ClassVar[str] = "layer-by-layer"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT
    paper: ClassVar[str] = (
        "Chen, Campbell, 2021 (COPA), 2022 (hybrid); Zhu, Blaschko, R-GAP, ICLR 2021; Eltaras et al., R-CONV, 2024"
    )
    needs: ClassVar[frozenset[str]] = frozenset({"input_shape"})
    uses: ClassVar[frozenset[str]] = (
        frozenset({"batch_size", "labels", "noise", "input_range", "domain", "buffers"}) | PROTOCOL_FIELDS
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

    def obstacle(self, obs: Observation) -> str | None:
        n = obs.knowledge.get("batch_size", 1)
        if n > MOST:
            return f"the batch has {n} examples, and their gradients mix in every convolution; it reads up to {MOST}."
        if obs.protocol.steps(n):
            return "the update is of local steps, which mix the gradients of several weights."
        try:
            top = Top(obs)
        except ValueError as error:
            return str(error)
        return top.obstacle(n)

    def run(self, obs: Observation, rng: torch.Generator) -> Reconstruction:
        top = Top(obs)
        features = top.read(obs.update, rng)
        update = {name: tensor.double() for name, tensor in obs.update.items()}
        readings: list[Reading] = []
        trace: dict[str, Any] = {"method": self.method, "features": features.x[0].numel()}
        try:
            walk, better = self._readings(top, features, update), None
            with suppress(StopIteration):
                while tick(len(readings) / (1 + len(top.below))):
                    readings.append(walk.send(better))
                    last, better = readings[-1], None
                    if self.method == "hybrid" and last.deficit != 0 and len(last.x) == 1:
                        better = self._searched(obs, top, last, features.labels)
                        readings[-1] = replace(last, x=better)
        except Unreadable as error:
            trace["stopped"] = str(error)
        trace["readings"] = [_row(reading) for reading in readings]
        open_ = [reading for reading in readings if reading.deficit != 0]
        trace["deficient"] = [reading.layers for reading in open_]
        if not readings or readings[-1].links[0] is not top.below[0]:  # stopped before the input
            nothing = torch.zeros(0, *obs.knowledge.input_shape)
            return Reconstruction(inputs=nothing, bound=nothing.new_zeros(0), trace=trace)
        inputs, exact = readings[-1].x, not open_
        fit = pullback = None
        if open_ and len(inputs) == 1 and self.method in ("auto", "copa") and open_[0] is not readings[-1]:
            pullback, fit = self._pulled(obs, top, open_[0], update, inputs[0])
            inputs, exact = fit.x[None], fit.solution.rank == inputs.numel() and fit.residual < 1e3 * _eps(obs)
            trace["rank of all equations"] = fit.solution.rank
        if not exact:
            solution = readings[-1].solution if fit is None else fit.solution
            trace["undetermined"] = None if solution.rank is None else 1 - solution.rank / inputs.numel()
            if self.method == "auto" and len(inputs) == 1:
                inputs = self._smoothed(obs, inputs, solution, pullback)
        labels = features.labels if features.labels is not None else _label(obs, inputs)
        bound = torch.full((len(inputs),), torch.inf, dtype=torch.float64)
        trace["residual"] = obs.fit(inputs, labels)[1] if labels is not None else None
        if exact and trace["residual"] is not None and trace["residual"] < 1e3 * _eps(obs):
            bound = self._bound(obs, top, readings, pullback, fit, rng)
        return Reconstruction(inputs=inputs, labels=labels, bound=bound, trace=trace)

    def _readings(
        self, top: Top, features: Features, update: Mapping[str, Tensor], near: Sequence[Reading] = ()
    ) -> Generator[Reading, Tensor | None, None]:
        return read(top.below, features.x, features.grad, update, forward=self.method != "r-conv", near=near)

    def _searched(self, obs: Observation, top: Top, reading: Reading, labels: Tensor | None) -> Tensor:
        """The hybrid's x of a deficient layer: by the match of the gradients from here on, total variation and the system.

        w_1 (1 - cosine of dL/dW) + w_2 TV(x) + w_3 |A (x - x*)|^2 with an orthonormal A, by signed Adam from the least-norm
        solution x*; weights and steps as published for the layer's place. Raises Unreadable: the label is not known.
        """
        if labels is None:
            raise Unreadable("the hybrid matches gradients, for which it needs the label, and that is not known.")
        here = top.links.index(reading.links[0])
        weighed = [link for link in top.links[:here] if getattr(link.module, "weight", None) is not None]
        weights, steps = HYBRID[min(len(weighed), len(HYBRID) - 1)]
        live = [replace(link, module=copy.deepcopy(link.module).double()) for link in top.links[here:]]
        own = {f"{link.name}.{name}": p for link in live for name, p in link.module.named_parameters()}
        seen = [obs.update[name].double() for name in own if name in obs.update]
        sent = [p for name, p in own.items() if name in obs.update]
        known = reading.solution.seen(reading.x.flatten(1))

        def objective(point: Tensor) -> Tensor:
            x = point.view_as(reading.x)
            found = torch.autograd.grad(obs.loss(follow(live, x), labels), sent, create_graph=True)
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

    def _pullback(
        self, top: Top, reading: Reading, update: Mapping[str, Tensor], *, gradients: bool = True
    ) -> Pullback:
        """What a deficient system and, with `gradients`, the layers before it say of the input."""
        before = top.below[: top.below.index(reading.links[0])]
        seen = update if gradients else {}
        return Pullback(before, reading.x[0], reading.solution, reading.grad[0], seen)

    def _pulled(
        self, obs: Observation, top: Top, reading: Reading, update: Mapping[str, Tensor], start: Tensor
    ) -> tuple[Pullback, Fit]:
        """By the system's own equations, continuous in the input; if they leave some open, with gradients, which jump."""
        alone = self._pullback(top, reading, update, gradients=False)
        fit = alone.solve(start)
        if fit.solution.rank == start.numel() and fit.residual < 1e3 * _eps(obs):
            return alone, fit
        whole = self._pullback(top, reading, update)
        return whole, whole.solve(fit.x)

    def _smoothed(self, obs: Observation, inputs: Tensor, solution: Solution, pullback: Pullback | None) -> Tensor:
        """The smoothest picture among those that the equations leave, where the inputs are pictures."""
        shape = obs.knowledge.input_shape
        if len(shape) != 3 or solution.rank is None:
            return inputs
        box = obs.knowledge.get("input_range", (0.0, 1.0))
        if pullback is None:
            return smoothest(inputs.flatten(), solution.free, shape, box).view(inputs.shape)
        grey = torch.full_like(inputs.flatten(), sum(box) / 2)
        return smoothest_root(pullback, grey, shape, box).view(inputs.shape)

    def _bound(
        self,
        obs: Observation,
        top: Top,
        readings: Sequence[Reading],
        pullback: Pullback | None,
        fit: Fit | None,
        rng: torch.Generator,
    ) -> Tensor:
        """How far the inputs move if the update is rounded in other ways, to first order; a multiple of the farthest."""
        x = readings[-1].x if fit is None else fit.x[None]
        far, noise = torch.zeros(len(x), dtype=torch.float64), float(obs.knowledge.get("noise", 0.0))
        for _ in range(DRAWS):
            moved = {name: t.double() + _drawn(t, noise, rng) for name, t in obs.update.items()}
            again = list(self._readings(top, top.read(moved, rng), moved, readings))
            there = again[-1].x
            if fit is not None and pullback is not None:
                deficient = next(i for i, reading in enumerate(readings) if reading.deficit != 0)
                other = self._pullback(top, again[deficient], moved, gradients=bool(pullback.sent))
                there = (fit.x.flatten() - fit.solution.inverse(other(fit.x.flatten()).detach())).view(x.shape)
            far = torch.maximum(far, ((there - x).flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1)).cpu())
        return torch.where(far < 0.1, SAFETY * far, torch.inf)


def _eps(obs: Observation) -> float:
    return float(torch.finfo(obs.dtype).eps)


def _drawn(t: Tensor, noise: float, rng: torch.Generator) -> Tensor:
    """Other errors of an entry: what was added, and the rounding of its sums, which goes with the tensor's size."""
    rounding = 4 * torch.finfo(t.dtype).eps * t.double().square().mean().sqrt()
    size = (noise**2 + rounding**2).sqrt()
    return size * torch.randn(t.shape, generator=rng, dtype=torch.float64).to(t.device)


def _row(reading: Reading) -> dict[str, Any]:
    return {
        "layers": reading.layers,
        "unknowns": reading.system.unknowns,
        "equations": reading.system.equations,
        "rank": reading.solution.rank,
    }


@dataclass(frozen=True)
class Features:
    """What the dense layer reads, [n, p], and dL/dx of it."""

    x: Tensor
    grad: Tensor
    labels: Tensor | None


class Top:
    """The first dense layer that sent its gradient, the links below it, and those above it.

    Raises ValueError: there is none, or the network is no chain.
    """

    def __init__(self, obs: Observation) -> None:
        self.obs = obs
        links = chain(obs.model, obs.knowledge.input_shape, obs.protocol.mode)
        dense = [d for d in dense_layers(obs.model, obs.knowledge.input_shape) if d.weight in obs.update]
        place = next((i for i, link in enumerate(links) if dense and link.name == dense[0].name), None)
        if place is None:
            raise ValueError("no dense layer that sent its gradient stands in the network's chain of layers.")
        self.links, self.dense, self.below, self.above = links, dense[0], links[:place], links[place:]
        self.modules = {link.name: copy.deepcopy(link.module).double() for link in self.above}
        self.W: Tensor = dict(obs.model.named_parameters())[self.dense.weight].detach().double()
        outputs = forward(obs.model, torch.zeros(2, *obs.knowledge.input_shape))
        self.form = identify(obs.loss, tuple(outputs.shape), device=obs.device)
        self.classes = outputs[0].numel() if self.form is not None and self.form.classes else 0

    def obstacle(self, n: int) -> str | None:
        """Why the layer does not give its inputs, in words."""
        if not self.below:
            return f"nothing lies before the dense layer {self.dense.name!r}: bias-ratio and unmix read its inputs."
        if n > 1:
            unmix = Attack.parse("unmix")
            return unmix.obstacle(self.obs.only(*(unmix.needs | unmix.uses)))
        dW = self.obs.update[self.dense.weight].double()
        size = float(torch.linalg.matrix_norm(dW))
        if size == 0:
            return f"the gradient of {self.dense.name!r} is zero: the example does not reach that layer."
        if self.dense.bias not in self.obs.update and not self.classes:
            return (
                f"{self.dense.name!r} sent no bias gradient, and without one only class labels tell its input's size."
            )
        rest = _rank_one(dW)[2]
        if rest > 64 * torch.finfo(self.obs.dtype).eps:
            return (
                f"the gradient of {self.dense.name!r} is not of rank one (relative rest {rest:.1e}): more than one "
                "example, noise or pruning."
            )
        return None

    def read(self, update: Mapping[str, Tensor], rng: torch.Generator) -> Features:
        """The layer's inputs [n, p] and dL/dx. Raises ValueError: no size of the input explains the gradient."""
        dW, labels = update[self.dense.weight].double(), self.obs.knowledge.get("labels")
        if self.obs.knowledge.get("batch_size", 1) > 1:
            return self._several(rng)
        if self.dense.bias in update and bool(update[self.dense.bias or ""].any()):
            delta = update[self.dense.bias or ""].double()
            x = (delta @ dW) / (delta @ delta)
            if labels is None and self.dense.head and self.form is not None and self.form.name == "cross-entropy":
                labels = delta.argmin()[None]  # p - 1 < 0 there alone
        else:
            x, delta, labels = self._scaled(dW, labels)
        return Features(x[None], (delta @ self.W)[None], labels)

    def _scaled(self, dW: Tensor, label: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """x, dL/dz and the label of dW = dL/dz x^T: the size of x at which the model's own dL/dz is that of dW / |x|."""
        u, v, _ = _rank_one(dW)
        size = float(u @ dW @ v)
        assert self.form is not None  # obstacle() has looked
        best: tuple[float, float, float, Tensor] | None = None
        for y in [label] if label is not None else [torch.tensor([c], device=dW.device) for c in range(self.classes)]:
            for sign in (1.0, -1.0):

                def along(t: float, y: Tensor = y, sign: float = sign) -> float:  # t <dL/dz, u> - size
                    return float(t * (self.delta(sign * t * v[None], y)[0] @ (sign * u)) - size)

                grid = np.geomspace(*SIZES)
                values = [along(t) for t in grid]
                for low, high, a, b in zip(grid, grid[1:], values, values[1:], strict=False):
                    if a * b <= 0:
                        t = brentq(along, low, high, xtol=1e-300, rtol=8.9e-16)
                        delta = self.delta(sign * t * v[None], y)[0]
                        gap = float((t * delta - size * sign * u).norm()) / size
                        best = min(best or (np.inf, t, sign, y), (gap, t, sign, y), key=lambda found: found[0])
        if best is None or best[0] > 1e-3:
            raise Unreadable(f"no size of the input of {self.dense.name!r}, which has no bias, explains its gradient.")
        _, t, sign, y = best
        return sign * t * v, sign * size / t * u, y

    def _several(self, rng: torch.Generator) -> Features:
        """The features that `unmix` proves, and their gradients by the layers above."""
        unmix = Attack.parse("unmix")
        found = unmix.run(self.obs.only(*(unmix.needs | unmix.uses)), rng)
        assert found.inputs is not None
        x, labels = found.inputs.double(), found.labels
        if len(x) != self.obs.knowledge.batch_size or labels is None:
            raise Unreadable(f"unmix finds {len(x)} of {self.obs.knowledge.batch_size} examples' features.")
        return Features(x, self.delta(x, labels, len(x)) @ self.W, labels)

    def delta(self, x: Tensor, labels: Tensor, n: int = 1) -> Tensor:
        """dL/dz [n, m] of the dense layer's outputs for its inputs x [n, p], by the layers above it in float64."""
        links = [Link(link.name, self.modules[link.name], link.before, link.after) for link in self.above]
        z = follow(links[:1], x).detach().requires_grad_()
        with torch.enable_grad():
            value = self.obs.loss(follow(links[1:], z), labels)
        return torch.autograd.grad(value, z)[0]


def _rank_one(A: Tensor) -> tuple[Tensor, Tensor, float]:
    """Unit u, v of the nearest s u v^T to A, and the relative rest."""
    U, S, Vh = torch.linalg.svd(A, full_matrices=False)
    rest = float(S[1:].norm() / S.norm()) if S.norm() > 0 else 0.0
    return U[:, 0], Vh[0], rest


def _label(obs: Observation, inputs: Tensor) -> Tensor | None:
    """The class [1] whose gradient at `inputs` explains the update best up to a factor; None for a loss unknown to us."""
    outputs = forward(obs.model, inputs)
    form = identify(obs.loss, tuple(outputs.shape), device=obs.device)
    if form is None or not form.classes or len(inputs) > 1:
        return None
    candidates = [torch.tensor([y], device=obs.device) for y in range(outputs.shape[1])]
    return min(candidates, key=lambda y: obs.fit(inputs, y)[1])
