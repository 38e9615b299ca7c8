"""tensor-moment: the batch behind a two-layer network's gradient, from moment tensors over its neurons."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, final

import torch
from pydantic import Field

from unbatch.attack import Attack, Cost, Demo, Guarantee
from unbatch.inversion.tensor_moments import TensorMoments
from unbatch.inversion.view import View
from unbatch.knowledge import PROTOCOL_FIELDS
from unbatch.reconstruction import Reconstruction


@final
class TensorMoment(Attack):
    """Recovers the batch of a two-layer network with random weights, with its labels, from the moments of one gradient.

    With L the loss, V [k, m] the head, r_i = dL/d(output of i) and z = W x + b:

        dL/dV_j = sum_i r_i s(z_ij)            dL/dW_j = sum_i (V_j . r_i) s'(z_ij) x_i

    The row space of [dL/dW, dL/db] is the span of the (x_i, 1) (or the span is read off the second moment, as in the
    paper). Projected on it, the Hermite coefficients of both over the neurons are sum_i r_i E s^(p) v_i^{x p}, p = 2, 3,
    4 (Stein's identity); their simultaneous diagonalisation gives the directions of all x_i. The bias's gradient fixes
    scale and sign; without it inputs have norm `norm`, and the sign follows from s and the loss where it can.

    Bound: 3.5 times the error that the spread of the moments over groups of neurons gives, to first order through the
    diagonalisation, raised where the tensors fit worse than that spread says or the weights are less Gaussian than their
    number lets chance be, plus the rounding of the span.

    >>> import torch, unbatch
    >>> from unbatch.models.small import build
    >>> rng = torch.Generator().manual_seed(0)
    >>> model = build("mlp", (3,), 3, width=500, activation="gelu", rng=rng)
    >>> x, y = torch.rand(2, 3, generator=rng), torch.tensor([0, 2])
    >>> seen, truth = unbatch.observe(model, torch.nn.functional.cross_entropy, x, y)
    >>> found = unbatch.attacks.TensorMoment()(seen)
    >>> found  # 500 neurons make the moments rough; an error falls with the square root of their number
    <Reconstruction: 2 examples [3], with labels, bounds up to ...>
    >>> order = found.labels.argsort()  # it returns the examples in an order of its own
    >>> off = (found.inputs[order] - x).norm(dim=1) / found.inputs[order].norm(dim=1)
    >>> found.labels[order], bool((off <= found.bound[order]).all())
    (tensor([0, 2]), True)
    """

    family: ClassVar[str] = "tensor"
    guarantee: ClassVar[Guarantee] = Guarantee.BOUNDED
    cost: ClassVar[Cost] = Cost.SOLVES
    paper: ClassVar[str] = "Wang, Lee, Lei, Reconstructing Training Data from Model Gradient, Provably, AISTATS 2023"
    needs: ClassVar[frozenset[str]] = frozenset({"input_shape"})
    uses: ClassVar[frozenset[str]] = frozenset({"batch_size"}) | PROTOCOL_FIELDS
    demo: ClassVar[Demo] = Demo(
        case="tables:batch=4,width=2000,activation=gelu", floors={"l2-error": 0.1, "label-accuracy": 1.0}
    )

    gradient: Annotated[
        Literal["auto", "first", "head", "both"],
        Field(description="the layer whose gradient the moments are taken of; auto: both if there are several outputs"),
    ] = "auto"
    order: Annotated[
        Literal["auto", "2", "3", "4"], Field(description="highest order of the tensors; auto looks at the activation")
    ] = "auto"
    subspace: Annotated[
        Literal["span", "moment"], Field(description="row space of dL/dW, or the paper's second moment")
    ] = "span"
    estimate: Annotated[
        Literal["regression", "stein"], Field(description="Hermite coefficients by least squares, or by averages")
    ] = "regression"
    norm: Annotated[
        float | None, Field(gt=0, description="l2 norm of the inputs, where no bias fixes it; none takes 1")
    ] = None

    def run(self, view: View, rng: torch.Generator) -> Reconstruction:
        options = TensorMoments(
            gradient=self.gradient, order=self.order, subspace=self.subspace, estimate=self.estimate, norm=self.norm
        )
        return options.run(view, rng)
