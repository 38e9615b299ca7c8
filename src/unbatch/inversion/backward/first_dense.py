"""First dense: what a network's first dense layer gives away of its input, for whoever reads the layers below it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from unbatch.errors import NotApplicable
from unbatch.inversion.backward.reading import Start, Unreadable
from unbatch.inversion.label_fit import labels, nearest
from unbatch.inversion.unmixing import unmixed
from unbatch.inversion.view import View
from unbatch.layers.residual import split
from unbatch.network.batch_norm import KnownBatchNorm, known_batch_norms
from unbatch.network.chain import chain, follow

SIZES = (1e-3, 1e4, 200)  # of the input of a layer without a bias: from, to, and how many are tried
RANK_ONE = 64  # roundings of the update that may be left beside one outer product


class FirstDense:
    """The first dense layer that sent its gradient, the links below it and those above it, in float64.

    With a bias dL/dW = dz x^T and dL/db = dz give x and dz of one example; without, only their directions, and the size at
    which the model's own dz fits. Up to four examples by `unmix`.
    Raises NotApplicable: there is none that gives its input, or the network is no chain.
    """

    def __init__(self, view: View) -> None:
        obs = view.obs
        self.view, self.obs, self.n = view, obs, obs.knowledge.get("batch_size", 1)
        self.bound = torch.zeros(0)  # of the features' error, l2, where unmix gives them
        model = copy.deepcopy(obs.model).double()
        sent = obs.knowledge.get("buffers", {})
        for name, buffer in model.named_buffers():
            if name in sent:
                buffer.copy_(sent[name])
        self.links = split(chain(model, obs.knowledge.input_shape, obs.protocol.mode))
        if obs.protocol.mode == "train":
            self.links = known_batch_norms(self.links, dict(obs.model.named_buffers()), sent, self.n)
        first = view.first
        place = next((i for i, link in enumerate(self.links) if first is not None and link.name == first.name), None)
        if first is None or place is None:
            raise NotApplicable("no dense layer that sent its gradient stands in the network's chain of layers.")
        self.dense, self.below, self.above = first, self.links[:place], self.links[place:]
        self.W: Tensor = dict(model.named_parameters())[self.dense.weight].detach()
        self.labels = [y.double() if y.is_floating_point() else y for y in labels(view)]
        self._check()

    def _check(self) -> None:
        """Raise NotApplicable, saying why, unless the layer gives its input."""
        name = self.dense.name
        if not self.below:
            raise NotApplicable(f"nothing lies before the dense layer {name!r}: bias-ratio and unmix read its inputs.")
        if self.n > 1:
            return  # unmix says by itself whether it does
        dW = self.obs.update[self.dense.weight].double()
        if not bool(dW.any()):
            raise NotApplicable(f"the gradient of {name!r} is zero: the example does not reach that layer.")
        if self.dense.bias not in self.obs.update and not self.labels:
            raise NotApplicable(
                f"{name!r} sent no bias gradient, and without one only the label tells the size of its input."
            )
        rest = _rank_one(dW)[2]
        if rest > RANK_ONE * torch.finfo(self.obs.dtype).eps:
            raise NotApplicable(
                f"the gradient of {name!r} is not of rank one (relative rest {rest:.1e}): more than one example, noise, "
                "pruning, or an update computed in less precision than it is stored in."
            )

    def start(self, update: Mapping[str, Tensor], rng: torch.Generator) -> tuple[Start, Tensor | None]:
        """What is known of the layer's inputs, and the labels where they come with it.

        Raises Unreadable: no size of the input explains the gradient, or unmix finds too few examples.
        """
        dW = update[self.dense.weight].double()
        if self.n > 1:
            return self._several(update, rng)
        if self.dense.bias in update and bool(update[self.dense.bias or ""].any()):
            delta = update[self.dense.bias or ""].double()
            x, label = (delta @ dW) / (delta @ delta), self.obs.knowledge.get("labels")
        else:
            x, delta, label = self._scaled(dW, self.labels)
        return Start(x[None], (delta @ self.W)[None], update), label

    def moved(self, start: Start, label: Tensor | None, update: Mapping[str, Tensor], rng: torch.Generator) -> Start:
        """The start of nearly the same update, and of nearly the same batch statistics where they were sent."""
        norms = {link.name: link.module for link in self.below if isinstance(link.module, KnownBatchNorm)}
        layers = {name: norm.drawn(rng) for name, norm in norms.items()}
        return replace(self._moved(start, label, update, rng), layers=layers)

    def _moved(self, start: Start, label: Tensor | None, update: Mapping[str, Tensor], rng: torch.Generator) -> Start:
        if self.n > 1:
            assert label is not None  # _several gives them
            x = start.output + self.bound[:, None] * torch.nn.functional.normalize(
                torch.randn(start.output.shape, generator=rng, dtype=torch.float64).to(start.output), dim=1
            )
            return Start(x, self.delta(x, label) @ self.W, update)
        if self.dense.bias in update and bool(update[self.dense.bias or ""].any()):
            return self.start(update, rng)[0]
        assert label is not None  # _scaled gives it
        size = float(start.output.norm())
        x, delta, _ = self._scaled(update[self.dense.weight].double(), [label], (size / 1.1, size * 1.1, 4))
        return Start(x[None], (delta @ self.W)[None], update)

    def _scaled(
        self, dW: Tensor, labels: list[Tensor], sizes: tuple[float, float, int] = SIZES
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x, dz and the label of dW = dz x^T: the size of x at which the model's own dz is that of dW / |x|."""
        from scipy.optimize import brentq

        u, v, _ = _rank_one(dW)
        size, grid = float(u @ dW @ v), np.geomspace(*sizes)
        best: tuple[float, float, float, Tensor] | None = None
        for y in labels:
            for sign in (1.0, -1.0):

                def along(t: float, y: Tensor = y, sign: float = sign) -> float:  # t <dz, u> - size
                    return float(t * (self.delta(sign * t * v[None], y)[0] @ (sign * u)) - size)

                values = [along(t) for t in grid]
                for low, high, a, b in zip(grid, grid[1:], values, values[1:], strict=False):
                    if a * b <= 0:
                        t = brentq(along, low, high, xtol=1e-300, rtol=8.9e-16)
                        gap = float((t * self.delta(sign * t * v[None], y)[0] - size * sign * u).norm()) / size
                        best = min(best or (np.inf, t, sign, y), (gap, t, sign, y), key=lambda found: found[0])
        if best is None or best[0] > 1e-3:
            raise Unreadable(
                f"no size of the input of {self.dense.name!r}, which has no bias, explains its gradient: clipped or scaled."
            )
        _, t, sign, y = best
        return sign * t * v, sign * size / t * u, y

    def _several(self, update: Mapping[str, Tensor], rng: torch.Generator) -> tuple[Start, Tensor]:
        """The features that `unmix` proves, their gradients by the layers above, and how far off unmix says they can be."""
        found = unmixed(self.view, rng)
        labels, stretch = found.labels, 1.0
        if found.inputs is None or found.bound is None:
            raise Unreadable(f"unmix gives no features before {self.dense.name!r}.")
        x = found.inputs.double()
        if self.dense.feeds is not None:  # unmix undoes a normalisation, which the links below are
            stretch = float(self.dense.feeds.scale.abs().max())
            size, x = x.flatten(1).norm(dim=1), follow(self.below, x).flatten(1).detach()
        else:
            size = x.norm(dim=1)
        if len(x) != self.n or labels is None:
            raise Unreadable(f"unmix proves the features of {len(x)} of {self.n} examples before {self.dense.name!r}.")
        self.bound = found.bound.to(x) * size * stretch
        return Start(x, self.delta(x, labels) @ self.W, update), labels

    def delta(self, x: Tensor, labels: Tensor) -> Tensor:
        """dL/dz [n, m] of the dense layer's outputs for its inputs x [n, p], by the layers above it."""
        z = follow(self.above[:1], x).detach().requires_grad_()
        with torch.enable_grad():
            value = self.obs.loss(follow(self.above[1:], z), labels)
        return torch.autograd.grad(value, z)[0]

    def likely(self) -> Tensor | None:
        """The label [1] without an input: as known, or where cross entropy's p - 1 stands out in the head's gradient."""
        known = self.obs.knowledge.get("labels")
        if known is not None or not self.dense.head or self.dense.bias not in self.obs.update:
            return None if known is None else known.to(self.obs.device)
        form = self.view.form
        cross_entropy = form is not None and form.name == "cross-entropy"
        return self.obs.update[self.dense.bias or ""].abs().argmax()[None] if cross_entropy else None

    def label(self, inputs: Tensor) -> Tensor | None:
        """The label [1] of one example whose gradient at `inputs` explains the update best; None of no choice."""
        likely = self.likely()
        ordered = sorted(self.labels, key=lambda y: likely is not None and not torch.equal(y, likely))
        return nearest(self.obs, inputs, ordered) if len(inputs) == 1 else None


def _rank_one(A: Tensor) -> tuple[Tensor, Tensor, float]:
    """Unit u, v of the nearest s u v^T to A, and the relative rest."""
    U, S, Vh = torch.linalg.svd(A, full_matrices=False)
    rest = float(S[1:].norm() / S.norm()) if S.norm() > 0 else 0.0
    return U[:, 0], Vh[0], rest
