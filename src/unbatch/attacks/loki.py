"""loki: a server that gives each client of a sum units of its own, and so reads through secure aggregation."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, final

import torch
from pydantic import Field
from torch import nn

from unbatch.attack import NOTHING, ActiveAttack, Cost, Demo, Guarantee
from unbatch.inversion.planted.front import put_in_front
from unbatch.inversion.planted.quiet import shape_known
from unbatch.inversion.planted.reading import planted_layer, read_sums
from unbatch.inversion.planted.slabs import bins_for
from unbatch.inversion.planted.still import as_one_pass
from unbatch.inversion.view import View
from unbatch.knowledge import DOMAIN_FIELDS, PROTOCOL_FIELDS, Knowledge
from unbatch.reconstruction import Reconstruction


@final
class Loki(ActiveAttack):
    """Reads the examples of every client out of the sum of all clients' updates, by a block with units for each of them.

    The server puts a dense block in front of the network and sends each client a model of its own, in which only the
    client's units are on. What the other clients send for them is zero, so that the sum holds each client's bins by
    themselves. They are read, and proven, as in `imprint`.

    It changes the architecture. Published as a convolution with a kernel set for each client before a shared dense layer;
    units of each client's own are the same block without the zeros.

    Where clients take local steps (FedAvg), the planted numbers are constants, and parameters that are 0 stand beside them.
    Training moves these by less than the block can show, so that all steps add up to one gradient, whose digits are kept.
    Published with hard-tanh units that fire for one bin each; relu units serve as long as nothing moves. It needs plain
    SGD whose steps take each example equally often, in batches of one size, at a known rate.

    Bound: as in `imprint`, for the examples of one client.

    >>> import torch, unbatch
    >>> from unbatch.auditing.cheating import planted_exchange
    >>> client = unbatch.Case.parse("digits:batch=6,width=8").setting()
    >>> attack, told = unbatch.attacks.Loki(units=60), {"knowledge": client.domain.public()}
    >>> seen, truth = planted_exchange(attack, client, defences="secure-aggregation:clients=3", **told)
    >>> len(attack(seen)), seen.knowledge.clients
    (6, 3)
    """

    family: ClassVar[str] = "planted sums"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT
    cost: ClassVar[Cost] = Cost.READS
    threat_model: ClassVar[str] = (
        "malicious server (changes the architecture, and sends each client a model of its own)"
    )
    paper: ClassVar[str] = "Zhao et al., LOKI: Large-scale Data Reconstruction Attack against FL, IEEE S&P 2024"
    needs: ClassVar[frozenset[str]] = frozenset({"input_shape", "batch_size"})
    uses: ClassVar[frozenset[str]] = (
        frozenset({"public", "clients", "noise", "clip", "altered", "mixup"}) | DOMAIN_FIELDS | PROTOCOL_FIELDS
    )
    demo: ClassVar[Demo] = Demo(
        case="digits:batch=6,width=8",
        floors={"psnr": 80.0},
        defences=("secure-aggregation:clients=2",),
        options="units=100",
    )

    units: Annotated[
        int | None, Field(gt=1, description="of each client; none takes four for each of its examples")
    ] = None
    directions: Annotated[
        int | None, Field(gt=0, description="along which there are bins; none takes 2, or 4 without public examples")
    ] = None

    def plant(self, model: nn.Module, rng: torch.Generator, known: Knowledge = NOTHING) -> nn.Module:
        """The network behind a block of units for each client, its own head made constant.

        Raises NotApplicable: the network does not end with a dense layer with a bias.
        """
        shape, clients = shape_known(known), int(known.get("clients", 1))
        each = self.units or 4 * math.ceil(known.get("batch_size", 1) / clients)
        W, at = bins_for(known, each, math.prod(shape), rng, self.directions)
        still = bool(known.get("local_steps") or known.get("epochs"))
        return put_in_front(model, shape, W.repeat(clients, 1), -at.repeat(clients), clients, still=still)

    def run(self, view: View, rng: torch.Generator) -> Reconstruction:
        view.refuse_tokens()
        view, passes = as_one_pass(view)
        return read_sums(view, planted_layer(view), passes)
