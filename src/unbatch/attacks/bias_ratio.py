"""bias-ratio: one example behind a dense layer with a bias, exactly, by dividing two gradients."""

from __future__ import annotations

from typing import Annotated, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor

from unbatch.attack import Attack, Cost, Demo, Guarantee
from unbatch.errors import NotApplicable
from unbatch.inversion.label_fit import label_behind
from unbatch.inversion.view import View
from unbatch.knowledge import PROTOCOL_FIELDS
from unbatch.network.dense import Dense
from unbatch.observation import Observation
from unbatch.reconstruction import Reconstruction


@final
class BiasRatio(Attack):
    """Reads one example exactly: a dense layer's weight gradient divided by its bias gradient.

    One example: dL/dW = delta x^T and dL/db = delta, so x = (dL/dW)^T (dL/db) / |dL/db|^2.

    The same ratio survives any common factor of the two (clipping, the learning rate, a flipped sign) and SGD's local steps
    without weight decay, whose sum of delta_t x^T has the sum of delta_t beside it. That the two carry one factor the
    layer alone does not show: whatever is returned is held to the update that it would send (the label found, the layers
    above), and claimed where it explains the update up to one factor. Where nothing but a normalisation lies before the
    layer the network's input is returned, otherwise the layer's exact input features.

    Bound: let each of dL/dW, dL/db carry relative error at most e; then |x' - x| / |x'| <= e (1 + sqrt(1 + r^2)) /
    (1 - e), r the relative residual of the rank-one fit; e is taken as the larger of r and the rounding of the update.

    >>> import torch, unbatch
    >>> from unbatch.models.small import build
    >>> rng = torch.Generator().manual_seed(0)
    >>> model = build("mlp", (4,), 3, width=8, rng=rng)  # one dense layer of 8 relu units, and the head
    >>> x, y = torch.rand(1, 4, generator=rng), torch.tensor([2])
    >>> seen, truth = unbatch.observe(model, torch.nn.functional.cross_entropy, x, y)
    >>> found = unbatch.attacks.BiasRatio()(seen)
    >>> found
    <Reconstruction: 1 example [4], with labels, bounds up to ...>
    >>> torch.allclose(found.inputs, x.double(), rtol=1e-6), found.labels
    (True, tensor([2]))
    """

    family: ClassVar[str] = "linear"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT
    cost: ClassVar[Cost] = Cost.READS
    paper: ClassVar[str] = "Phong, Aono, Hayashi, Wang, Moriai, IEEE TIFS 2018; Geiping et al., NeurIPS 2020, Prop. 3.1"
    needs: ClassVar[frozenset[str]] = frozenset({"input_shape"})
    uses: ClassVar[frozenset[str]] = frozenset({"batch_size", "clients", "buffers"}) | PROTOCOL_FIELDS
    demo: ClassVar[Demo] = Demo(case="photos:width=16", floors={"l2-error": 1e-5, "psnr": 80.0})

    tol: Annotated[
        float | None, Field(gt=0, description="relative rank-one residual accepted; none takes the update's rounding")
    ] = None

    def run(self, view: View, rng: torch.Generator) -> Reconstruction:
        view.refuse_tokens()
        view = view if view.protocol.optimiser == "sgd" else view.gradient
        layer = self._layer(view)
        rounding = self._rounding(view.obs, layer)
        if rounding > 0.1:
            raise NotApplicable(
                f"the parameters' own rounding ({rounding:.1e}, relative) drowns the update of {layer.name!r}."
            )
        z, residual = _fit(view.obs, layer)  # [1, d]
        allowed = self.tol if self.tol is not None else 16 * rounding
        if residual > allowed:
            raise NotApplicable(
                f"the gradient of {layer.name!r} is not of rank one (relative residual {residual:.1e}, tol "
                f"{allowed:.1e}): more than one example, noise, pruning or weight decay."
            )
        e = max(residual, rounding)
        bound = torch.tensor(
            [e * (1 + (1 + residual**2) ** 0.5) / (1 - e) if e < 1 else torch.inf], dtype=torch.float64
        )
        inputs, bound, name = view.undo(layer, z, bound)
        label, explained, trace = None, None, {"layer": layer.name, "rank-one residual": residual}
        if not name:
            label = label_behind(view, inputs)
            explained = view.obs.residual(inputs, label) if label is not None else None
            trace["residual with the label found"] = explained
        bound = self._claim(view.obs, bound, explained)
        return Reconstruction(inputs=inputs, labels=label, layer=name, bound=bound, trace=trace)

    def _layer(self, view: View) -> Dense:
        """The first dense layer whose weight and bias were sent, one on the network's input before all others.

        Raises NotApplicable: its bias gradient is none to divide by, or the update is no multiple of one gradient.
        """
        n, protocol = view.knowledge.get("batch_size", 1), view.protocol
        if n > 1:
            raise NotApplicable(
                f"the batch has {n} examples, and the ratio of weight and bias gradient is a mixture of them."
            )
        if view.steps and protocol.optimiser != "sgd":
            raise NotApplicable(view.no_gradient)
        if view.steps and protocol.weight_decay:
            raise NotApplicable(
                "weight decay adds the parameters themselves to the update, so it is no multiple of the input."
            )
        sent = [layer for layer in view.layers if layer.bias and {layer.weight, layer.bias} <= set(view.update)]
        layer = next((layer for layer in sent if layer.feeds is not None), sent[0] if sent else None)
        if layer is None:
            raise NotApplicable("no dense layer with a bias sent its gradient, so there is nothing to divide by.")
        if not bool(view.update[layer.bias or ""].any()):
            raise NotApplicable(f"the bias gradient of {layer.name!r} is zero: the example does not reach that layer.")
        return layer

    def _claim(self, obs: Observation, bound: Tensor, explained: float | None) -> Tensor:
        """Parallel deltas make a mixture look like one example; only n = 1 known, or the whole update, rules that out."""
        certain = "batch_size" in obs.knowledge or (explained is not None and explained <= 1e-3)
        return bound if certain else torch.full_like(bound, torch.inf)

    def _rounding(self, obs: Observation, layer: Dense) -> float:
        """Relative error of the update's entries: a few roundings, or after local steps those of the parameters."""
        eps, sent = torch.finfo(obs.dtype).eps, [name for name in (layer.weight, layer.bias) if name]
        if obs.protocol.steps(1) == 0:
            sizes = {k: float(obs.update[k].double().square().mean().sqrt()) for k in sent}
            return 4 * (eps + max(float(obs.grain.get(k, 0.0)) / sizes[k] for k in sent))
        parameters = dict(obs.model.named_parameters())
        ratios = [float(parameters[k].detach().double().norm() / obs.update[k].double().norm()) for k in sent]
        return 4 * eps * (1 + obs.protocol.steps(1) * max(ratios))


def _fit(obs: Observation, layer: Dense) -> tuple[Tensor, float]:
    """The layer's input [1, d] and |dW - db x^T| / |dW|, in float64."""
    W, b = obs.update[layer.weight].double(), obs.update[layer.bias or ""].double()  # [m, d], [m]
    x = (b @ W) / (b @ b)
    size = torch.linalg.matrix_norm(W)
    return x[None], float(torch.linalg.matrix_norm(W - torch.outer(b, x)) / size) if size > 0 else 0.0
