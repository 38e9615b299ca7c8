"""ntk: training examples out of the change of a network's weights, where training stayed linear in them."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar, final

import torch
from pydantic import Field

from unbatch.attack import Attack, Cost, Demo, Guarantee
from unbatch.errors import NotApplicable
from unbatch.inversion.linearised import as_one_step, duals_of
from unbatch.inversion.unmixing import unmixed
from unbatch.inversion.view import View
from unbatch.knowledge import DOMAIN_FIELDS
from unbatch.reconstruction import Reconstruction
from unbatch.threat_model import ThreatModel

LINEARISED = "linearised"  # of a recipe's methods the one under which the change is such a sum; and one step of any
NOT_LINEAR = (
    "nothing was found: the change of the weights is no sum of gradients at the starting weights, as it would be if the "
    "network had stayed linear in its parameters while it was trained."
)


@final
class Ntk(Attack):
    """Recovers the training examples of a network whose weights before and after training are known, exactly.

    While a network is linear in its parameters, theta - theta0 = sum_i a_i grad f(x_i; theta0), with numbers a_i of any
    sign for whatever loss and number of steps. That is one gradient of a batch with unknown real targets. The first dense
    layer's part of it has the examples' span as its row space, so n numbers are sought for each example, and not its
    pixels; what is found is held to all parameters, many more equations than unknowns, and certified.

    Linearised training obeys this exactly; a wide network that was trained by small steps nearly, and of that nothing is
    claimed. Weight decay and Adam break it. The numbers a_i are in the trace (`duals`); their signs say on which side of
    the model's first outputs the labels are.

    >>> import unbatch
    >>> spec = "trained:batch=3,width=40,steps=200,start=1,task=regression,method=linearised,threat=start"
    >>> client = unbatch.Case.parse(spec).setting()
    >>> told = {"knowledge": client.knowledge, "training": client.training}
    >>> seen, truth = unbatch.observe(client.model, client.loss, client.inputs, client.labels, **told)
    >>> found = unbatch.attacks.Ntk()(seen)
    >>> len(found), bool(found.bound.max() < 1e-10), len(found.trace["duals"])
    (3, True, 3)
    """

    family: ClassVar[str] = "span"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT
    paper: ClassVar[str] = (
        "equations: Loo et al., Understanding Reconstruction Attacks with the Neural Tangent Kernel and Dataset "
        "Distillation, ICLR 2024; their solution in the span: this library"
    )
    needs: ClassVar[frozenset[str]] = frozenset({"input_shape", "initial"})
    uses: ClassVar[frozenset[str]] = frozenset({"recipe", "batch_size"}) | DOMAIN_FIELDS
    demo: ClassVar[Demo] = Demo(
        case="trained:batch=4,width=60,steps=300,start=1,task=regression,method=linearised,threat=start",
        floors={"psnr": 100.0},
    )
    cost: ClassVar[Cost] = Cost.SOLVES
    threat_model: ClassVar[str] = ThreatModel.START

    attempts: Annotated[
        int, Field(ge=1, description="times each start is tried without success before it is given up")
    ] = 8

    def run(self, view: View, rng: torch.Generator) -> Reconstruction:
        recipe = view.knowledge.get("recipe", {})
        if recipe.get("method", LINEARISED) != LINEARISED and recipe.get("steps") != 1:
            raise NotApplicable(NOT_LINEAR)
        step = as_one_step(view)
        found = unmixed(step, rng, attempts=self.attempts)
        if found.inputs is None or not len(found):
            raise NotApplicable(NOT_LINEAR)
        duals, left = duals_of(step, found.inputs) if not found.layer else (torch.zeros(0, 1), float("nan"))
        trace = {**found.trace, "duals": duals.tolist(), "left of the change": left}
        return replace(found, labels=None, trace=trace)
