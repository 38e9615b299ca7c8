"""bias-ratio: one example behind a dense layer with a bias, exactly, by dividing two gradients."""

from __future__ import annotations

from typing import Annotated, ClassVar, final

import torch
from pydantic import Field

from unbatch.attack import Attack, Cost, Demo, Guarantee
from unbatch.inversion.division import divided
from unbatch.inversion.view import View
from unbatch.knowledge import PROTOCOL_FIELDS
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
        return divided(view, self.tol)
