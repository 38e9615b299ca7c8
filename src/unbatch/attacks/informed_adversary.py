"""informed-adversary: the one training example that is not known, off a released model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor

from unbatch.attack import Attack, Cost, Demo, Guarantee
from unbatch.errors import NotApplicable
from unbatch.inversion.reconstructor import learned
from unbatch.inversion.retraining import retrained
from unbatch.inversion.stationarity import ROUNDINGS, Remainder, own_gradient, remainder
from unbatch.inversion.view import View
from unbatch.knowledge import DOMAIN_FIELDS
from unbatch.network.dense import Dense
from unbatch.reconstruction import Reconstruction
from unbatch.threat_model import ThreatModel

LARGEST_SECOND = 1e-3  # of the largest singular value of a layer's remainder, which one example leaves at rank one
LARGEST_MISFIT = 1e-4  # of the remainder, by which the example's own gradient may be off


@final
class InformedAdversary(Attack):
    """Computes the one training example that is not known from a model that was trained to a stationary point.

    At a stationary point of the mean loss + weight_decay / 2 |theta|^2 over n examples, the gradients of n - 1 known ones
    leave the unknown one's: g = -sum_known g_i - n weight_decay theta. In a dense layer with a bias g is r (x, 1)^T, so
    that x = sum_j r_j g_j / |r|^2, exactly. For a generalised linear model that is all, and a deep one needs no more where
    its inputs enter such a layer. The label is the one with which the example's whole gradient is g. What is left of g
    bounds the error: |E| (1 + |x|) / |r|, E the layer's remainder beside r (x, 1)^T and its rounding.

    A training that stopped early leaves a gradient that is no example's, which the second singular value shows. Where
    it was steps of SGD from a start that is known, `again` trains again with a guess in the example's place, and solves
    for the one with which training ends at the released parameters: least squares through every step, with each label.
    The bound is what is left, and rounding, over the least singular value of the derivative of training's end.

    With `shadows` a network is asked where neither holds, which is a guess and claims nothing: it learns the example from
    the weights of that many models, each trained by the same recipe from the same start on the known examples and one of
    the public ones (the paper's reconstructor). They are kept in the folder `keep`, and a run goes on from there.

    >>> import unbatch
    >>> spec = "trained:known=9,threat=informed,task=classes,depth=0,start=1,weight_decay=0.1"
    >>> client = unbatch.Case.parse(spec).setting()
    >>> told = {"knowledge": client.knowledge, "training": client.training}
    >>> seen, truth = unbatch.observe(client.model, client.loss, client.inputs, client.labels, **told)
    >>> found = unbatch.attacks.InformedAdversary()(seen)
    >>> bool((found.inputs - truth.inputs).abs().max() < 1e-10), bool(found.bound < 1e-9), found.labels == truth.labels
    (True, True, tensor([True]))
    """

    family: ClassVar[str] = "stationarity"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT
    paper: ClassVar[str] = "Balle, Cherubin and Hayes, Reconstructing Training Data with Informed Adversaries, S&P 2022"
    needs: ClassVar[frozenset[str]] = frozenset({"input_shape", "known_inputs", "known_labels", "recipe"})
    uses: ClassVar[frozenset[str]] = (
        frozenset({"batch_size", "initial", "public", "public_labels", "privacy"}) | DOMAIN_FIELDS
    )
    demo: ClassVar[Demo] = Demo(
        case="trained:known=9,threat=informed,task=classes,depth=0,start=1,weight_decay=0.1", floors={"psnr": 200.0}
    )
    cost: ClassVar[Cost] = Cost.SOLVES
    threat_model: ClassVar[str] = ThreatModel.INFORMED

    again: Annotated[bool, Field(description="train again with a guess where the closed form does not hold")] = True
    shadows: Annotated[int, Field(ge=0, description="models that a network learns from; 0: the closed form alone")] = 0
    hidden: Annotated[int, Field(gt=0, description="units of each of the network's two layers")] = 1000
    epochs: Annotated[int, Field(gt=0, description="of the network's training")] = 200
    keep: Annotated[str | None, Field(description="folder for shadow models, from which a run goes on")] = None

    def run(self, view: View, rng: torch.Generator) -> Reconstruction:
        try:
            return self._closed(view)
        except NotApplicable as error:
            why = str(error)
        if self.again and "initial" in view.knowledge:
            try:
                found = retrained(view, rng)
                return replace(found, trace={**found.trace, "closed form": why})
            except NotApplicable as error:
                why = f"{why} {str(error)[:1].upper()}{str(error)[1:]}"
        if not self.shadows:
            raise NotApplicable(why)
        found = learned(view, rng, self.shadows, self.hidden, self.epochs, Path(self.keep) if self.keep else None)
        return replace(found, trace={**found.trace, "closed form": why})

    def _closed(self, view: View) -> Reconstruction:
        """The example by the closed form. Raises NotApplicable: it does not hold."""
        if view.knowledge.get("batch_size", 1) != 1:
            raise NotApplicable(f"{view.knowledge.batch_size} examples are unknown, and this is for one.")
        left = remainder(view)
        layer = next((each for each in view.layers if each.feeds is not None and each.bias is not None), None)
        if layer is None or layer.bias is None:
            raise NotApplicable("the inputs enter no dense layer that has a bias, whose ratio would be the example.")
        received, bound, second = _ratio(left, layer)
        x, bound, name = view.undo(layer, received, bound)
        if name:
            raise NotApplicable(f"only the features at {name!r} are told.")
        label, misfit = _label(view, x, left)
        if misfit > LARGEST_MISFIT:
            raise NotApplicable(
                f"no label makes the example's gradient the one that is left ({misfit:.1e} of it stays): it is known "
                "wrongly how the model was trained, or the training ended elsewhere."
            )
        return Reconstruction(
            inputs=x,
            labels=label,
            bound=bound,
            trace={"known": left.known, "layer": layer.name, "second singular value": second, "misfit": misfit},
        )


def _ratio(left: Remainder, layer: Dense) -> tuple[Tensor, Tensor, float]:
    """What the layer received [1, d], a bound on its relative error [1], and how far the remainder is from rank one.

    Raises NotApplicable: the remainder is not one example's.
    """
    weight, r = left.gradient[layer.weight], left.gradient[layer.bias or ""]
    rounding = ROUNDINGS * max(left.off[layer.weight], left.off[layer.bias or ""]) * (weight.numel() + r.numel()) ** 0.5
    size = float(r.norm())
    if size <= rounding:
        raise NotApplicable(
            "the unknown example's gradient has vanished: the model fits it, and decay left no trace of it."
        )
    received = (r @ weight / size**2)[None]
    misfit = float((weight - r[:, None] * received).norm())
    values = torch.linalg.svdvals(torch.cat([weight, r[:, None]], 1))
    second = float(values[1] / values[0]) if len(values) > 1 else 0.0
    if second > LARGEST_SECOND:
        raise NotApplicable(
            f"what is left of the gradient is not one example's: its second singular value is {second:.1e} of the first. "
            "The training stopped before a stationary point, or more than one example is unknown."
        )
    length = float(received.norm())
    error = (misfit + rounding) * (1 + length) / size / max(length, 1e-300)
    return received, torch.tensor([error], dtype=torch.float64), second


def _label(view: View, x: Tensor, left: Remainder) -> tuple[Tensor, float]:
    """The label [1, ...] with which the example's own gradient is nearest to the remainder, and by how much it is off."""
    best: tuple[Tensor, float] | None = None
    for label in _labels(view, x, left):
        own = own_gradient(view, x, label)
        gap = torch.stack([(own[n] - g).square().sum() for n, g in left.gradient.items()]).sum().sqrt()
        off = float(gap) / max(left.norm(), 1e-300)
        if best is None or off < best[1]:
            best = label, off
    if best is None:
        raise NotApplicable(f"labels of the form {view.labels.words()} are not solved for.")
    return best


def _labels(view: View, x: Tensor, left: Remainder) -> list[Tensor]:
    """Every label of a class; of one real target the one that makes its gradient a multiple of one, by two trials."""
    form = view.labels
    if form.shape == () and form.kind in ("class", "binary"):
        kind = view.knowledge.known_labels.dtype
        return [torch.tensor([k], device=x.device).to(kind) for k in range(form.count or 2)]
    if form.kind != "real" or len(view.knowledge.known_labels) == 0 or view.knowledge.known_labels[0].numel() != 1:
        return []
    shape = view.knowledge.known_labels[:1].shape
    trials = [torch.full(shape, value, dtype=torch.float64, device=x.device) for value in (0.0, 1.0)]
    zero, one = (own_gradient(view, x, trial) for trial in trials)
    slope = {
        name: one[name] - zero[name] for name in zero
    }  # under the squared error a gradient is linear in its target
    along = sum(float(((left.gradient[n] - zero[n]) * slope[n]).sum()) for n in zero)
    size = sum(float(slope[n].square().sum()) for n in zero)
    return [torch.full(shape, along / size, dtype=torch.float64, device=x.device)] if size else []
