"""kkt: training pictures out of a released model alone, by the conditions under which its margin stopped growing."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, ClassVar, Literal, final

import torch
from pydantic import Field
from torch import Tensor

from unbatch.attack import Attack, Demo, Guarantee
from unbatch.errors import NotApplicable
from unbatch.inversion.gradient_sum import chosen, gradient_sum_of, guesses
from unbatch.inversion.margin_cone import WHOLE, ConeAnswer, cone_answers
from unbatch.inversion.view import View
from unbatch.knowledge import DOMAIN_FIELDS
from unbatch.network.dense import forward
from unbatch.numerics.search.margin import (
    Attempt,
    MarginWeights,
    Units,
    above_noise,
    search,
    strongest,
    told_apart,
    units,
)
from unbatch.progress import tick
from unbatch.reconstruction import Reconstruction
from unbatch.threat_model import ThreatModel

SAME_OUTPUT = 1e-4  # relative difference between the model's outputs and those of one layer of rectified units
LEAST_DIRECTIONS = 2
DIRECTION_STEPS, SUM_STEPS = 600, 2000  # of Adam, where none are asked for: over directions, and of each published draw
# Times the programmes after which an answer is whole: facets that are found again may have more units, which sharpens it.
AGAIN = 2
LEAST_AGREEING = 0.9  # of the units on the facets, that are silent on their examples: below, most facets are wrong


@final
class Kkt(Attack):
    """Reads training inputs out of a released classifier of one hidden layer that was trained on its margin.

    Every step moves unit k by v_k times a sum, with weights above zero, of y_i (x_i, 1) over the inputs it fires on. So
    (w_k, b_k) / v_k lie in the cone of the vectors y_i (x_i, 1), and on its facet i the units that never fired on x_i.
    These facets are found by linear programmes, and the inverse of their normals is all inputs and classes at once: to a
    thousandth or so, which what is left of a small start decides. It takes as many directions above that start as there
    are examples, and for each example units that never fired on it; `agreeing` in the trace is the share of these that do
    not fire on the answer, 1 where all facets are right.

    Where that is not so, points are sought instead whose sums point where the units point, and at which |f| is one margin:
    at a stationary one (w_k, b_k) = v_k sum_i c_i [unit k fires on x_i] (x_i, 1). Of inputs on which the same units fire,
    only a mixture is told then: `determined` says for each answer how far it is told apart (1 fully). Some more points
    than examples are returned, the strongest first. One logit; rectified units; a bias in the first layer and none
    behind it.

    haim, buzaglo: the published searches as peers, over all parameters: |theta - sum_i lambda_i grad Phi_i|^2 by Adam on
    twice as many candidates, inputs held to their range (-1 to 1 where none is known), strengths above a floor, and
    relu's step replaced by a sigmoid going back. haim: Phi = y f, one logit. buzaglo: also several classes, f_y less the
    largest other, and numbers under a squared error with weight decay, strengths of either sign. Settings are drawn, as in
    the papers' sweeps, `draws` times; the draw with the least loss of its own is the answer, and of it the strongest that
    are no copies. Any network of rectified units, whose outputs grow by one whole power with its weights but for numbers.
    Nothing is claimed.

    >>> import unbatch
    >>> unbatch.attacks.Kkt.threat_model.sees
    'release'
    """

    family: ClassVar[str] = "stationarity"
    guarantee: ClassVar[Guarantee] = Guarantee.HEURISTIC
    paper: ClassVar[str] = (
        "conditions and preset haim: Haim et al., Reconstructing Training Data from Trained Neural Networks, NeurIPS 2022; "
        "buzaglo: Buzaglo et al., Deconstructing Data Reconstruction, NeurIPS 2023; facets of the units' cone, and search "
        "over their directions: this library"
    )
    needs: ClassVar[frozenset[str]] = frozenset({"input_shape", "batch_size"})
    uses: ClassVar[frozenset[str]] = DOMAIN_FIELDS
    demo: ClassVar[Demo] = Demo(
        case="trained:batch=4,width=50,steps=200,start=0.1,centred=true", options="starts=16,steps=40"
    )
    threat_model: ClassVar[str] = ThreatModel.RELEASE

    preset: Annotated[Literal["default", "haim", "buzaglo"], Field(description="ours, or a published search")] = (
        "default"
    )
    draws: Annotated[int, Field(gt=0, description="haim and buzaglo: settings tried, one chosen by its own loss")] = 8
    starts: Annotated[int, Field(gt=0, description="of the search, side by side; the better ones go on")] = 512
    steps: Annotated[
        int | None, Field(gt=0, description="of Adam; none takes 600, and 2,000 for each draw of haim and buzaglo")
    ] = None
    spare: Annotated[float, Field(ge=1, description="points searched for, in batches")] = 1.25
    margin: Annotated[float, Field(ge=0, description="weight of equal outputs beside the units' directions")] = 3.0
    inside: Annotated[float, Field(ge=0, description="weight of the inputs' range, where it is known")] = 0.1

    programmes: Annotated[
        int, Field(ge=0, description="linear programmes at most, for the facets of the units' cone")
    ] = 1500

    def run(self, view: View, rng: torch.Generator) -> Reconstruction:
        if self.preset != "default":
            return self._by_sums(view, rng)
        weight, bias, outward = hidden_layer(view)
        answer, done = self._by_facets(view, weight, bias, outward, rng)
        if answer is not None:
            low, high = view.knowledge.get("input_range", (-torch.inf, torch.inf))
            inputs = answer.inputs.clamp(low, high).reshape(len(answer.inputs), *view.knowledge.input_shape)
            facts = {"agreeing": answer.agreeing, "on facets": answer.on.tolist(), "programmes": done}
            return Reconstruction(inputs=inputs.cpu(), labels=answer.classes.cpu(), trace=facts)
        return self._by_directions(view, directions_of(weight, bias, outward), rng)

    def _by_facets(
        self, view: View, weight: Tensor, bias: Tensor, outward: Tensor, rng: torch.Generator
    ) -> tuple[ConeAnswer | None, int]:
        """The answer of the cone that its units agree with, and after how many programmes; none, where there is none."""
        ends, n, done = torch.cat([weight, bias[:, None]], 1), view.knowledge.batch_size, 0
        basis, noise = above_noise(ends)
        if len(basis) < n:
            return None, done
        best: ConeAnswer | None = None
        rows, enough = ends * outward.sign()[:, None], self.programmes
        for done, best in enumerate(cone_answers(rows, ends, basis[:n], noise, rng, programmes=self.programmes), 1):
            if best is not None and best.agreeing >= WHOLE:
                enough = min(enough, AGAIN * done)
            if done >= enough or not tick(done / self.programmes, best.agreeing if best is not None else 0.0):
                break
        return (best, done) if best is not None and best.agreeing >= LEAST_AGREEING else (None, done)

    def _by_sums(self, view: View, rng: torch.Generator) -> Reconstruction:
        """The published search, its settings chosen by its own loss."""
        held = gradient_sum_of(view, rng)
        if self.preset == "haim" and held.sides != "two classes":
            raise NotApplicable("haim reads one logit of two classes; buzaglo reads several classes and numbers.")
        n, steps = view.knowledge.batch_size, self.steps or SUM_STEPS
        found = list(guesses(held, n, rng, draws=self.draws, steps=steps))
        if not found:
            raise NotApplicable("nothing was found: every draw of settings diverged.")
        best = chosen(found)
        return Reconstruction(
            inputs=best.inputs.clamp(*held.box).cpu(),
            labels=best.classes.cpu() if best.classes is not None else None,
            trace={
                "chosen": found.index(best),
                "losses": [guess.loss for guess in found],
                "residuals": [guess.residual for guess in found],
                "settings": [asdict(guess.settings) for guess in found],
                "strengths": best.strengths.tolist(),
            },
        )

    def _by_directions(self, view: View, held: Units, rng: torch.Generator) -> Reconstruction:
        n, shape = view.knowledge.batch_size, view.knowledge.input_shape
        last: Attempt | None = None
        steps = self.steps or DIRECTION_STEPS
        moves = search(
            held,
            round(self.spare * n),
            rng,
            starts=self.starts,
            steps=steps,
            box=view.knowledge.get("input_range"),
            weights=MarginWeights(margin=self.margin, inside=self.inside),
        )
        for step, last in enumerate(moves):
            if not tick(step / steps, float(last.losses.min())):
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


def hidden_layer(view: View) -> tuple[Tensor, Tensor, Tensor]:
    """Weights [m, d], biases [m] and outgoing weights [m] of a released model, float64.

    Raises NotApplicable: it is not one layer of rectified units under one logit, in words.
    """
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
    return weight, bias, outward.flatten()


def directions_of(weight: Tensor, bias: Tensor, outward: Tensor) -> Units:
    """The directions of hidden units. Raises NotApplicable: all are one."""
    held = units(weight, bias, outward)
    if len(held.rows) < LEAST_DIRECTIONS:
        raise NotApplicable("all hidden units point one way: they tell one mixture of the inputs and no more.")
    return held


def _plain(scale: Tensor, shift: Tensor) -> bool:
    return bool((scale == 1).all()) and not bool(shift.any())
