"""adapter-imprint: a server of parameter-efficient fine-tuning that plants bins in an adapter beside a frozen layer."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, final

import torch
from pydantic import Field
from torch import nn

from unbatch.attack import NOTHING, ActiveAttack, Cost, Demo, Guarantee
from unbatch.errors import NotApplicable
from unbatch.inversion.planted.beside import plant_beside
from unbatch.inversion.planted.quiet import shape_known
from unbatch.inversion.planted.reading import planted_layer, read_sums
from unbatch.inversion.planted.slabs import bins_for
from unbatch.inversion.view import View
from unbatch.knowledge import DOMAIN_FIELDS, PROTOCOL_FIELDS, Knowledge
from unbatch.reconstruction import Reconstruction


@final
class AdapterImprint(ActiveAttack):
    """Reads inputs off the update of a bottleneck adapter, which is all that a client of fine-tuning sends with its head.

    The network is frozen, and is left as it was: only what the client trains is planted. The way down of the first adapter,
    beside the first dense layer, holds the bins of `imprint`: rows of a few directions and rising biases. Its way up adds
    the sum of its units to one unit of the frozen layer. The biases of all ways up open that unit and one of each layer
    above for all examples, and shut the others, so that what comes back passes the frozen relus on one way, which is the
    same for every example; the head makes the outputs constant, the first class at the golden share. So it is proven as in
    `imprint` that a bin holds one example.

    Adapters without a nonlinearity (LoRA) have no bins: they send B^T G and G A^T, two products of what the frozen layer
    would send, G.

    Bound: as in `imprint`.

    >>> import torch, unbatch
    >>> from unbatch.auditing.cheating import planted_exchange
    >>> client = unbatch.Case.parse("digits:batch=4,width=24,depth=2,adapter=64").setting()
    >>> attack = unbatch.attacks.AdapterImprint()
    >>> seen, truth = planted_exchange(attack, client, knowledge=client.domain.public())
    >>> sorted(seen.update)[:4]
    ['dense1.down.bias', 'dense1.down.weight', 'dense1.up.bias', 'dense1.up.weight']
    >>> found = attack(seen)
    >>> len(found), float(torch.cdist(found.inputs.flatten(1), truth.inputs.double().flatten(1)).amin(1).max()) < 1e-4
    (4, True)
    """

    family: ClassVar[str] = "planted sums"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT
    cost: ClassVar[Cost] = Cost.READS
    paper: ClassVar[str] = (
        "Sami, Sen, Roy-Chowdhury, Krishnamurthy, Guler, Gradient Inversion Attacks on Parameter-Efficient Fine-Tuning, "
        "CVPR 2025 (bins in adapters); a frozen network that is left as it was, and the proof: this library"
    )
    needs: ClassVar[frozenset[str]] = frozenset({"input_shape", "batch_size"})
    uses: ClassVar[frozenset[str]] = (
        frozenset({"public", "clients", "noise", "clip", "altered", "mixup"}) | DOMAIN_FIELDS | PROTOCOL_FIELDS
    )
    demo: ClassVar[Demo] = Demo(case="digits:batch=6,width=32,depth=2,adapter=150", floors={"psnr": 80.0})

    directions: Annotated[
        int | None, Field(gt=0, description="along which there are bins; none takes 2, or 4 without public examples")
    ] = None

    def plant(self, model: nn.Module, rng: torch.Generator, known: Knowledge = NOTHING) -> nn.Module:
        """A copy of `model` with bins in its first adapter, and one open way above; frozen parameters stay.

        Raises NotApplicable: it is no chain of frozen dense layers with relu, parallel adapters and a trained head.
        """
        shape = shape_known(known)
        d = math.prod(shape)
        return plant_beside(model, shape, lambda m: bins_for(known, m, d, rng, self.directions))

    def run(self, view: View, rng: torch.Generator) -> Reconstruction:
        view.refuse_tokens()
        if view.first is None:
            raise NotApplicable("no dense layer sent its gradient, so there are no bins to read.")
        return read_sums(view, planted_layer(view))
