"""conv-imprint: a server that plants identity kernels in a network's convolutions, and bins behind them."""

from __future__ import annotations

from typing import Annotated, ClassVar, final

import torch
from pydantic import Field
from torch import nn

from unbatch.attack import NOTHING, ActiveAttack, Cost, Demo, Guarantee
from unbatch.errors import NotApplicable
from unbatch.inversion.planted.kernels import identity_kernels
from unbatch.inversion.planted.quiet import quieten, shape_known
from unbatch.inversion.planted.reading import planted_layer, read_sums
from unbatch.inversion.planted.slabs import bins_for
from unbatch.inversion.view import View
from unbatch.knowledge import DOMAIN_FIELDS, PROTOCOL_FIELDS, Knowledge
from unbatch.network.dense import anatomy, layer_inputs
from unbatch.reconstruction import Reconstruction


@final
class ConvImprint(ActiveAttack):
    """Reads what enters the first dense layer of a convolutional network, whose convolutions pass pictures on unchanged.

    Parameters alone: every convolution holds identity kernels, shifted ones where it jumps over pixels and has the channels
    for them; the first dense layer holds bins, and the network above is quiet, as in `imprint`. Where the network pools in
    between, what is read is the pooled picture: the largest of each cell.

    Pictures are taken to have no values below zero, which a relu would stop.

    Bound: as in `imprint`, of what entered the layer.

    >>> import torch, unbatch
    >>> from unbatch.auditing.cheating import planted_exchange
    >>> client = unbatch.Case.parse("digits:batch=3,model=convnet,width=16").setting()
    >>> attack = unbatch.attacks.ConvImprint()
    >>> seen, truth = planted_exchange(attack, client, knowledge=client.domain.public())
    >>> found = attack(seen)
    >>> pooled = torch.nn.functional.max_pool2d(truth.inputs, 2).flatten(1).double()
    >>> found.layer, bool((torch.cdist(pooled, found.inputs[:, :16]).amin(1) < 1e-4).all())
    ('dense1', True)
    """

    family: ClassVar[str] = "planted sums"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT
    cost: ClassVar[Cost] = Cost.READS
    paper: ClassVar[str] = (
        "Fowl et al., Robbing the Fed, ICLR 2022; Zhao et al., LOKI, IEEE S&P 2024 (identity kernels)"
    )
    needs: ClassVar[frozenset[str]] = frozenset({"input_shape", "batch_size"})
    uses: ClassVar[frozenset[str]] = (
        frozenset({"public", "clients", "noise", "clip", "altered", "mixup"}) | DOMAIN_FIELDS | PROTOCOL_FIELDS
    )
    demo: ClassVar[Demo] = Demo(case="digits:batch=3,model=convnet,width=16")

    directions: Annotated[
        int | None, Field(gt=0, description="along which there are bins; none takes 2, or 4 without public examples")
    ] = None

    def plant(self, model: nn.Module, rng: torch.Generator, known: Knowledge = NOTHING) -> nn.Module:
        """A copy of `model` with identity kernels, bins in its first dense layer, and a quiet network above.

        Raises NotApplicable: no convolution comes before a dense layer with another above, or more than relu and pooling.
        """
        shape = shape_known(known)
        made, below = identity_kernels(model)
        layers = anatomy(made, shape).layers
        if not layers or layers[0].head:
            raise NotApplicable("there is no dense layer below the last one, in which bins could be planted.")
        m, d = made.get_parameter(layers[0].weight).shape
        told = known
        if "public" in known:
            kind = next(made.parameters()).dtype
            passed = layer_inputs(made, layers[0].name, known.public.to(kind), "eval").detach()
            told = Knowledge(public=passed)
        W, at = bins_for(told, m, d, rng, self.directions)
        return quieten(made, shape, W, -at, below)

    def run(self, view: View, rng: torch.Generator) -> Reconstruction:
        view.refuse_tokens()
        return read_sums(view, planted_layer(view))
