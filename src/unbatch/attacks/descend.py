"""descend: whole batches, exactly, out of convolutional and residual networks."""

from __future__ import annotations

from typing import Annotated, ClassVar, final

import torch
from pydantic import Field

from unbatch.attack import Attack, Cost, Demo, Guarantee
from unbatch.inversion.descent.descent import descended
from unbatch.inversion.view import View
from unbatch.knowledge import DOMAIN_FIELDS, PROTOCOL_FIELDS
from unbatch.reconstruction import Reconstruction


@final
class Descend(Attack):
    """Recovers every picture of a batch behind a convolutional or residual network, each with a bound.

    A convolution's gradient dL/dK = sum_ip delta_ip patch_ip^T is a dense layer's with its n P windows as examples. Where
    these are no more than its channels, its row space is the windows' span; a window of an inner layer is an extreme ray of
    the nonnegative vectors in it (a linear program), padding separates the corners, and overlaps grow whole maps from them.
    Without a ReLU the space of whole maps takes the cone's place, where each example obeys the equation of `unmix`. A
    single picture that no window tells (depthwise convolutions, layer norm) follows from the head's features and all
    gradients.
    Above, the head's gradient tells labels and deltas. Below, each layer's gradient is linear in its input maps. From the
    shallowest tensor with enough equations the pictures follow by a search and Gauss-Newton. Batch size and labels are
    found.

    >>> import torch, unbatch
    >>> from unbatch.models.small import build
    >>> rng = torch.Generator().manual_seed(0)
    >>> model = build("resnet18", (1, 8, 8), 3, width=8, norm=None, rng=rng).double()
    >>> x, y = torch.randn(1, 1, 8, 8, generator=rng).double(), torch.tensor([2])
    >>> seen, truth = unbatch.observe(model, torch.nn.functional.cross_entropy, x, y)
    >>> found = unbatch.attacks.Descend()(seen)
    >>> found.labels, torch.allclose(found.inputs, x, atol=1e-8), found.trace["layer"]
    (tensor([2]), True, 'block7.conv1')
    """

    family: ClassVar[str] = "span"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT
    cost: ClassVar[Cost] = Cost.SOLVES
    paper: ClassVar[str] = "this library; linear systems a layer after Zhu, Blaschko, R-GAP, ICLR 2021"
    needs: ClassVar[frozenset[str]] = frozenset({"input_shape"})
    uses: ClassVar[frozenset[str]] = (
        frozenset({"batch_size", "labels", "noise", "altered", "buffers", "clients"}) | DOMAIN_FIELDS | PROTOCOL_FIELDS
    )
    demo: ClassVar[Demo] = Demo(
        case="photos:batch=2,size=16,model=resnet18,width=16,norm=none,double=true",
        floors={"psnr": 200.0, "label-accuracy": 1.0},
    )

    steps: Annotated[
        int, Field(gt=0, description="of the first search for pictures; each next one has twice as many")
    ] = 400
    attempts: Annotated[int, Field(ge=1, description="searches from other starting points")] = 3
    partial: Annotated[
        bool, Field(description="also return guesses that are not certified, with an infinite bound")
    ] = False

    def run(self, view: View, rng: torch.Generator) -> Reconstruction:
        view.refuse_tokens()
        return descended(view, rng, steps=self.steps, attempts=self.attempts, partial=self.partial)
