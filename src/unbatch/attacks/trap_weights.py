"""trap-weights: rows of a dense layer so that few examples set off each unit, and those that are alone are read."""

from __future__ import annotations

import copy
from typing import Annotated, ClassVar, final

import torch
from pydantic import Field
from torch import nn

from unbatch.attack import NOTHING, ActiveAttack, Cost, Demo, Guarantee
from unbatch.errors import NotApplicable
from unbatch.inversion.lone_rows import lone_examples
from unbatch.inversion.view import View
from unbatch.knowledge import PROTOCOL_FIELDS, Knowledge
from unbatch.network.first_linear import first_linear
from unbatch.reconstruction import Reconstruction


@final
class TrapWeights(ActiveAttack):
    """Plants a first dense layer whose units each fire for few examples, and reads those that fire one alone.

    A row is half negative and half positive, w_q = -|a_k| and w_p = s |a_k| for pairs of entries drawn at random, a
    standard normal, s < 1: the brighter the input, the more the negative half outweighs the positive one, and only an
    input that happens to be bright where the row is positive gets through. Row by row s is drawn from [scale, 1], so that
    some units fire for one example of a hundred and others for one of three, whatever the data.

    Where one example fires a unit, (dL/dW)_i / (dL/db)_i is that example. That it was alone shows by what the model sends
    back for it and some label: the unit's own delta, and its column of the next layer's gradient. Examples that are found
    are taken out of all rows, and others become lone.

    Bound: the rounding of the row, and of all that was taken out of it before.

    >>> import torch, unbatch
    >>> from unbatch.models.small import build
    >>> rng, attack = torch.Generator().manual_seed(0), unbatch.attacks.TrapWeights(scale=0.5)
    >>> model = attack.plant(build("mlp", (30,), 3, width=100, rng=rng), rng)
    >>> x, y = torch.rand(5, 30, generator=rng), torch.tensor([0, 2, 1, 0, 1])
    >>> seen, truth = unbatch.observe(model, torch.nn.functional.cross_entropy, x, y)
    >>> found = attack(seen)
    >>> found
    <Reconstruction: 5 examples [30], with labels, bounds up to ...>
    """

    family: ClassVar[str] = "planted rows"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT
    cost: ClassVar[Cost] = Cost.SOLVES
    paper: ClassVar[str] = (
        "Boenisch, Dziedzic, Schuster, Shahin Shamsabadi, Shumailov, Papernot, When the Curious Abandon Honesty, EuroS&P "
        "2023; peeling: this library"
    )
    needs: ClassVar[frozenset[str]] = frozenset({"input_shape", "batch_size"})
    uses: ClassVar[frozenset[str]] = frozenset({"clients", "buffers"}) | PROTOCOL_FIELDS
    demo: ClassVar[Demo] = Demo(
        case="digits:batch=5,width=100", floors={"l2-error": 1e-4, "label-accuracy": 1.0}, options="scale=0.6"
    )

    scale: Annotated[
        float,
        Field(gt=0, lt=1, description="least s, by which the positive half of a row is smaller than the negative one"),
    ] = 0.9

    def plant(self, model: nn.Module, rng: torch.Generator, known: Knowledge = NOTHING) -> nn.Module:
        """A copy of `model` whose first dense layer has such rows, and no bias to start with.

        Raises NotApplicable: its first parameters are no dense layer's with a bias.
        """
        made = copy.deepcopy(model)
        layer = first_linear(made)
        W, d = layer.weight, layer.in_features
        with torch.no_grad():
            for row in W:
                s = self.scale + (1 - self.scale) * float(torch.rand((), generator=rng))
                size = torch.randn(d // 2, generator=rng).abs() / d**0.5
                order = torch.randperm(d, generator=rng)
                row.zero_()
                row[order[: d // 2]] = -size.to(row)
                row[order[d // 2 : 2 * (d // 2)]] = s * size.to(row)
            layer.bias.zero_()
        return made

    def run(self, view: View, rng: torch.Generator) -> Reconstruction:
        view = view.gradient
        layer = view.first
        if layer is None:
            raise NotApplicable("no dense layer sent its gradient, so there are no rows to read.")
        found = lone_examples(view, layer)
        inputs, bound, name = view.undo(layer, found.inputs, found.bound)
        trace = {
            "layer": layer.name,
            "rows": len(view.update[layer.weight]),
            "alone from the start": sum(turn == 0 for turn in found.rounds),
            "alone once others were taken out": sum(turn > 0 for turn in found.rounds),
        }
        return Reconstruction(inputs=inputs, labels=found.labels, layer=name, bound=bound, trace=trace)
