"""kkt: training pictures out of a released model alone, by the conditions under which its margin stopped growing."""

from __future__ import annotations

from typing import Annotated, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor

from unbatch.attack import Attack, Demo, Guarantee
from unbatch.errors import NotApplicable
from unbatch.inversion.view import View
from unbatch.knowledge import DOMAIN_FIELDS
from unbatch.network.dense import forward
from unbatch.numerics.search.margin import Attempt, MarginWeights, Units, search, strongest, told_apart, units
from unbatch.progress import tick
from unbatch.reconstruction import Reconstruction
from unbatch.threat_model import ThreatModel

SAME_OUTPUT = 1e-4  # relative difference between the model's outputs and those of one layer of rectified units
LEAST_DIRECTIONS = 2


@final
class Kkt(Attack):
    """Reads training inputs out of a released classifier of one hidden layer that was trained until its margin stood still.

    Where the margin is stationary, (w_k, b_k) = v_k sum_i c_i [unit k fires on x_i] (x_i, 1) for every hidden unit k: its
    direction is a sum of the same few inputs, those on which it fires, and |f(x_i)| is the same for all. Points are sought
    whose sums point where the units point, in the span of the units, from differences of units; what decides between
    starts is this alone. Of inputs on which the same units fire, only a mixture is told: `trace` says for each answer how
    far it is told apart (`determined`, 1 fully). Some more points than examples are returned, the strongest first.
    One logit; rectified units; a bias in the first layer and none behind it.

    >>> import unbatch
    >>> unbatch.attacks.Kkt.threat_model.sees
    'release'
    """

    family: ClassVar[str] = "stationarity"
    guarantee: ClassVar[Guarantee] = Guarantee.HEURISTIC
    paper: ClassVar[str] = (
        "conditions: Haim et al., Reconstructing Training Data from Trained Neural Networks, NeurIPS 2022; search over "
        "directions of units: this library"
    )
    needs: ClassVar[frozenset[str]] = frozenset({"input_shape", "batch_size"})
    uses: ClassVar[frozenset[str]] = DOMAIN_FIELDS
    demo: ClassVar[Demo] = Demo(
        case="trained:batch=4,width=50,steps=200,start=0.1,centred=true", options="starts=16,steps=40"
    )
    threat_model: ClassVar[str] = ThreatModel.RELEASE

    starts: Annotated[int, Field(gt=0, description="of the search, side by side; the better ones go on")] = 512
    steps: Annotated[int, Field(gt=0, description="of Adam")] = 600
    spare: Annotated[float, Field(ge=1, description="points searched for, in batches")] = 1.25
    margin: Annotated[float, Field(ge=0, description="weight of equal outputs beside the units' directions")] = 3.0
    inside: Annotated[float, Field(ge=0, description="weight of the inputs' range, where it is known")] = 0.1

    def run(self, view: View, rng: torch.Generator) -> Reconstruction:
        held = hidden_units(view)
        n, shape = view.knowledge.batch_size, view.knowledge.input_shape
        last: Attempt | None = None
        moves = search(
            held,
            round(self.spare * n),
            rng,
            starts=self.starts,
            steps=self.steps,
            box=view.knowledge.get("input_range"),
            weights=MarginWeights(margin=self.margin, inside=self.inside),
        )
        for step, last in enumerate(moves):
            if not tick(step / self.steps, float(last.losses.min())):
                break
        if last is None:
            raise RuntimeError("a search ended without its start; this is a defect of unbatch.")
        best = int(last.losses.argmin())
        points, strengths = strongest(last.points[best], last.strengths[best], round(self.spare * n))
        low, high = view.knowledge.get("input_range", (-torch.inf, torch.inf))
        return Reconstruction(
            inputs=held.inputs(points).clamp(low, high).reshape(len(points), *shape).cpu(),
            trace={
                "directions": len(held.rows),
                "span": len(held.basis),
                "losses": last.losses.tolist(),
                "margin off": float(last.margin_off[best]),
                "determined": told_apart(held, points).tolist(),
                "strengths": strengths.tolist(),
            },
        )


def hidden_units(view: View) -> Units:
    """The directions of the hidden units of a released model. Raises NotApplicable: it is no such network, in words."""
    layers, parameters = view.layers, dict(view.model.named_parameters())
    if view.outputs != (1,):
        raise NotApplicable(f"the model has outputs of shape {view.outputs}, and this reads one logit.")
    if len(layers) != 2 or layers[0].bias is None or layers[0].feeds is None or layers[1].bias is not None:
        raise NotApplicable("the model is no hidden layer with a bias under one output without.")
    weight, bias, outward = (
        parameters[name].detach().double() for name in (layers[0].weight, layers[0].bias, layers[1].weight)
    )
    probe = view.stand_in(16, torch.Generator().manual_seed(0)).to(weight)
    fed = probe.flatten(1) * layers[0].feeds.scale.to(weight) + layers[0].feeds.shift.to(weight)
    ours, own = (fed @ weight.T + bias).clamp_min(0) @ outward.flatten(), forward(view.model, probe).flatten().double()
    if float((ours - own).norm()) > SAME_OUTPUT * float(own.norm()) or not _plain(
        layers[0].feeds.scale, layers[0].feeds.shift
    ):
        raise NotApplicable("the model computes something other than one layer of rectified units on its own inputs.")
    held = units(weight, bias, outward.flatten())
    if len(held.rows) < LEAST_DIRECTIONS:
        raise NotApplicable("all hidden units point one way: they tell one mixture of the inputs and no more.")
    return held


def _plain(scale: Tensor, shift: Tensor) -> bool:
    return bool((scale == 1).all()) and not bool(shift.any())
