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
    """Recovers every picture of a batch behind a convolutional or residual network with ReLU, each with a bound.

    A convolution's gradient dL/dK = sum_ip delta_ip patch_ip^T is a dense layer's with its n P windows as examples. Where
    these are no more than its channels, its row space is the windows' span; a window of an inner layer is an extreme ray of
    the nonnegative vectors in it (a linear program), padding separates the corners, and overlaps grow whole maps from them.
    Above, the head's gradient tells labels and deltas. Below, each layer's gradient is linear in its input maps. From the
    shallowest tensor with enough equations the pictures follow by a search and Gauss-Newton. Batch size and labels are found.
    """

    family: ClassVar[str] = "span"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT
    cost: ClassVar[Cost] = Cost.SOLVES
    paper: ClassVar[str] = "this library; linear systems a layer after Zhu, Blaschko, R-GAP, ICLR 2021"
    needs: ClassVar[frozenset[str]] = frozenset({"input_shape"})
    uses: ClassVar[frozenset[str]] = (
        frozenset({"batch_size", "labels", "noise", "log_prob", "buffers", "clients"}) | DOMAIN_FIELDS | PROTOCOL_FIELDS
    )
    demo: ClassVar[Demo] = Demo(case="photos:batch=2,model=convnet,width=32", floors={"psnr": 60.0})

    steps: Annotated[int, Field(gt=0, description="of the search for pictures, in the first attempt; each has twice as many")] = 400
    attempts: Annotated[int, Field(ge=1, description="searches from other starting points")] = 3
    partial: Annotated[
        bool, Field(description="also return guesses that are not certified, with an infinite bound")
    ] = False

    def run(self, view: View, rng: torch.Generator) -> Reconstruction:
        return descended(view, rng, steps=self.steps, attempts=self.attempts, partial=self.partial)
