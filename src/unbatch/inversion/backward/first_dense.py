"""First dense: what a network's first dense layer gives away of its input, for whoever reads the layers below it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from unbatch.errors import NotApplicable
from unbatch.inversion.backward.reading import KnownOutput, Unreadable
from unbatch.inversion.backward.runs import runs
from unbatch.inversion.label_fit import label_behind, possible_labels
from unbatch.inversion.unmixing import unmixed
from unbatch.inversion.view import View
from unbatch.layers.residual import split
from unbatch.network.batch_norm import KnownBatchNorm, known_batch_norms
from unbatch.network.chain import chain, follow
from unbatch.network.precision import in_double, loss_value
from unbatch.reconstruction import Reconstruction

INPUT_SIZES = (1e-3, 1e4, 200)  # of a layer without a bias: from, to, and how many are tried
NEARBY = 1.1  # factor on the size of its input within which nearly the same update's is looked for
NEARBY_SIZES = 4  # tried between
RANK_ONE_ROUNDINGS = 64  # of the update, that may be left beside one outer product
GRAIN_ROOM = 2.0  # times the error of a difference of parameters, whose size is that of the parameters
SIZE_MISFIT = 1e-3  # relative, of the gradient at the size that explains it best: more is no explanation


@dataclass(frozen=True)
class KnownInputs:
    """The inputs of the first dense layer, with their labels, and how to find those of nearly the same update."""

    known: KnownOutput  # of the layers below it
    labels: Tensor | None  # [n], where they come with the inputs
    again: Callable[[Mapping[str, Tensor], torch.Generator], KnownOutput]  # of a nearby update


@dataclass(frozen=True)
class Outer:
    """The outer product size u v^T nearest to a matrix, u and v of unit length: its largest singular value's part."""

    u: Tensor  # [rows]
    v: Tensor  # [columns]
    size: float
    rest: float  # |matrix - size u v^T| / |matrix|

    @classmethod
    def of(cls, A: Tensor) -> Outer:
        """By the singular value decomposition of A [rows, columns].

        >>> outer = Outer.of(torch.tensor([[0.0, 3.0], [0.0, 0.0]]))
        >>> outer.size, outer.rest
        (3.0, 0.0)
        """
        U, S, Vh = torch.linalg.svd(A, full_matrices=False)
        rest = float(S[1:].norm() / S.norm()) if S.norm() > 0 else 0.0
        u, v = U[:, 0], Vh[0]
        return cls(u, v, float(u @ A @ v), rest)


class FirstDense:
    """The first dense layer that sent its gradient: from it alone its inputs are known, where the way back begins.

    With a bias dL/dW = dz x^T and dL/db = dz give x and dz of one example; without, only their directions, and the size at
    which the model's own dz fits. Up to four examples by `unmix`. `links` are the network's, `below` those before the
    layer, cut into `runs`, `above` from it on, all in float64.

    view: an exchange whose input_shape is known. Raises NotApplicable: there is no such layer, nothing lies before it, or
    the network is no chain.
    Source: the outer product of one example, Phong et al., 2017; its size without a bias, R-GAP, ICLR 2021.

    >>> from torch import nn
    >>> from unbatch.knowledge import Knowledge
    >>> from unbatch.observation import Observation
    >>> model = nn.Sequential(nn.Conv1d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(6, 3)).double()
    >>> update = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    >>> known, loss = Knowledge(input_shape=(1, 4)), nn.functional.cross_entropy
    >>> first = FirstDense(View.of(Observation(model=model, loss=loss, update=update, knowledge=known)))
    >>> first.dense.name, [link.name for link in first.below]
    ('3', ['0', '1', '2'])
    >>> first.features(update, torch.Generator()).known.output
    tensor([[1., 1., 1., 1., 1., 1.]], dtype=torch.float64)
    """

    def __init__(self, view: View) -> None:
        obs = view.obs
        self.view, self.obs, self.n = view, obs, obs.knowledge.get("batch_size", 1)
        first = view.first
        model = in_double(obs.model)
        sent = obs.knowledge.get("buffers", {})
        for name, buffer in model.named_buffers():
            if name in sent:
                buffer.copy_(sent[name])
        self.links = split(chain(model, obs.knowledge.input_shape, obs.protocol.mode))
        if obs.protocol.mode == "train":
            self.links = known_batch_norms(self.links, dict(obs.model.named_buffers()), sent, self.n)
        weight = None if first is None else first.weight
        place = next((i for i, link in enumerate(self.links) if link.called("weight") == weight), None)
        if first is None or place is None:
            raise NotApplicable("no dense layer that sent its gradient stands in the network's chain of layers.")
        self.dense, self.below, self.above = first, self.links[:place], self.links[place:]
        self.W: Tensor = dict(model.named_parameters())[self.dense.weight].detach()
        self.labels = [y.double() if y.is_floating_point() else y for y in possible_labels(view)]
        self.runs = runs(self.below)
        if not self.runs:
            raise NotApplicable(
                f"nothing lies before the dense layer {first.name!r}: bias-ratio and unmix read its inputs."
            )

    def features(self, update: Mapping[str, Tensor], rng: torch.Generator) -> KnownInputs:
        """What is known of the layer's inputs [n, p] by an update in float64, and the labels where they come with it.

        Raises NotApplicable: its gradient is zero, or not one example's. Raises Unreadable: no size of the input explains
        the gradient, or unmix finds too few examples.
        """
        if self.n > 1:
            return self._several(update, rng)
        dW, name = update[self.dense.weight].double(), self.dense.name
        if not bool(dW.any()):
            raise NotApplicable(f"the gradient of {name!r} is zero: the example does not reach that layer.")
        if self.dense.bias not in update and not self.labels:
            raise NotApplicable(
                f"{name!r} sent no bias gradient, and without one only the label tells the size of its input."
            )
        outer = Outer.of(dW)
        if outer.rest > self._rounding(dW):
            raise NotApplicable(
                f"the gradient of {name!r} is not of rank one (relative rest {outer.rest:.1e}): more than one example, "
                "noise, pruning, or an update computed in less precision than it is stored in."
            )
        known = self._divided(update)
        if known is None:
            return self._scaled(outer, update)
        return KnownInputs(known, self.view.known_labels, lambda moved, rng: self._again(known, moved))

    def _rounding(self, dW: Tensor) -> float:
        """What rounding may leave beside one outer product, relative to it."""
        m, p = dW.shape
        coarse = self.obs.grain.get(self.dense.weight, 0.0) * (m * p) ** 0.5 / float(dW.norm())
        return float(RANK_ONE_ROUNDINGS * torch.finfo(self.obs.dtype).eps + GRAIN_ROOM * coarse)

    def _again(self, known: KnownOutput, update: Mapping[str, Tensor]) -> KnownOutput:
        """By a bias whose gradient moved; where it vanished, what was known."""
        return self._divided(update) or known

    def _divided(self, update: Mapping[str, Tensor]) -> KnownOutput | None:
        """One example's x = dz^T dW / |dz|^2; None without a bias, or where its gradient dz is zero."""
        delta = update.get(self.dense.bias or "")
        if delta is None or not bool(delta.any()):
            return None
        delta, dW = delta.double(), update[self.dense.weight].double()
        x = (delta @ dW) / (delta @ delta)
        return KnownOutput(x[None], (delta @ self.W)[None], update)

    def _scaled(self, outer: Outer, update: Mapping[str, Tensor]) -> KnownInputs:
        """One example's, by the direction of its input and the label whose gradient fits."""
        x, delta, label = self._sized(outer, self.labels, INPUT_SIZES)
        size = float(x.norm())
        near = (size / NEARBY, size * NEARBY, NEARBY_SIZES)

        def again(update: Mapping[str, Tensor], rng: torch.Generator) -> KnownOutput:
            x, delta, _ = self._sized(Outer.of(update[self.dense.weight].double()), [label], near)
            return KnownOutput(x[None], (delta @ self.W)[None], update)

        return KnownInputs(KnownOutput(x[None], (delta @ self.W)[None], update), label, again)

    def _sized(
        self, outer: Outer, candidates: list[Tensor], sizes: tuple[float, float, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [p], dz [m] and the label of dW = dz x^T: the size of x at which the model's own dz is that of dW / |x|."""
        from scipy.optimize import brentq

        u, v, size, grid = outer.u, outer.v, outer.size, np.geomspace(*sizes)
        best: tuple[float, float, float, Tensor] | None = None
        for y in candidates:
            for sign in (1.0, -1.0):

                def along(t: float, y: Tensor = y, sign: float = sign) -> float:  # t <dz, u> - size
                    return float(t * (self.delta(sign * t * v[None], y)[0] @ (sign * u)) - size)

                values = [along(t) for t in grid]
                for low, high, a, b in zip(grid, grid[1:], values, values[1:], strict=False):
                    if a * b <= 0:
                        t = brentq(along, low, high, xtol=1e-300, rtol=8.9e-16)
                        gap = float((t * self.delta(sign * t * v[None], y)[0] - size * sign * u).norm()) / size
                        best = min(best or (np.inf, t, sign, y), (gap, t, sign, y), key=lambda found: found[0])
        if best is None or best[0] > SIZE_MISFIT:
            raise Unreadable(
                f"no size of the input of {self.dense.name!r}, which has no bias, explains its gradient: clipped or scaled."
            )
        _, t, sign, y = best
        return sign * t * v, sign * size / t * u, y

    def _several(self, update: Mapping[str, Tensor], rng: torch.Generator) -> KnownInputs:
        """The features that `unmix` proves, their gradients by the layers above, and how far off unmix says they can be."""
        found = unmixed(self.view, rng)
        own, stretch = found.labels, 1.0
        if found.inputs is None or found.bound is None:
            raise Unreadable(f"unmix gives no features before {self.dense.name!r}.")
        x = found.inputs.double()
        if self.dense.feeds is not None:  # unmix undoes a normalisation, which the links below are
            stretch = float(self.dense.feeds.scale.abs().max())
            size, x = x.flatten(1).norm(dim=1), follow(self.below, x).flatten(1).detach()
        else:
            size = x.norm(dim=1)
        if len(x) != self.n or own is None:
            raise Unreadable(f"unmix proves the features of {len(x)} of {self.n} examples before {self.dense.name!r}.")
        bound, y = found.bound.to(x) * size * stretch, own  # [n] l2
        counts = self._counts(found, x)

        def again(update: Mapping[str, Tensor], rng: torch.Generator) -> KnownOutput:
            way = torch.randn(x.shape, generator=rng, dtype=torch.float64).to(x)
            moved = x + bound[:, None] * torch.nn.functional.normalize(way, dim=1)
            return KnownOutput(moved, (counts * self.delta(moved, y)) @ self.W, update)

        return KnownInputs(KnownOutput(x, (counts * self.delta(x, y)) @ self.W, update), y, again)

    def _counts(self, found: Reconstruction, x: Tensor) -> Tensor:
        """How much each example counts in the update [n, 1], over what it counts in the loss of a batch of these n."""
        weights = torch.tensor(found.trace["weights"]).to(x)[:, None]
        return weights * (len(x) if self.view.form is not None and self.view.form.reduction == "mean" else 1)

    def statistics(self, rng: torch.Generator) -> dict[str, torch.nn.Module]:
        """By link's name, the batch norms below whose statistics were sent, these moved by their rounding."""
        norms = {link.name: link.module for link in self.below if isinstance(link.module, KnownBatchNorm)}
        return {name: norm.drawn(rng) for name, norm in norms.items()}

    def delta(self, x: Tensor, labels: Tensor) -> Tensor:
        """dL/dz [n, m] of the dense layer's outputs for its inputs x [n, p], by the layers above it."""
        z = follow(self.above[:1], x).detach().requires_grad_()
        with torch.enable_grad():
            value = loss_value(self.obs.loss, follow(self.above[1:], z), labels)
        return torch.autograd.grad(value, z)[0]

    def likely(self) -> Tensor | None:
        """The label [1] without an input: as known, or where cross entropy's p - 1 stands out in the head's gradient."""
        known = self.view.known_labels
        if known is not None or not self.dense.head or self.dense.bias not in self.obs.update:
            return known
        form = self.view.form
        cross_entropy = form is not None and form.name == "cross-entropy"
        return self.obs.update[self.dense.bias or ""].abs().argmax()[None] if cross_entropy else None

    def label(self, inputs: Tensor) -> Tensor | None:
        """The label [1] of one example whose gradient at `inputs` [1, *shape] explains the update best, or None."""
        likely = self.likely()
        ordered = sorted(self.labels, key=lambda y: likely is not None and not torch.equal(y, likely))
        return label_behind(self.view, inputs, ordered) if len(inputs) == 1 else None
