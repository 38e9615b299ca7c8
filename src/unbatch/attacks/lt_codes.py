"""lt-codes: a server that plants rows of which each fires for a random set of examples, and peels the sums apart."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor, nn

from unbatch.attack import NOTHING, ActiveAttack, Cost, Demo, Guarantee
from unbatch.errors import NotApplicable
from unbatch.inversion.planted.quiet import plant_rows, shape_known
from unbatch.inversion.planted.reading import planted_layer, read_sums
from unbatch.inversion.planted.slabs import random_directions, thresholds_for
from unbatch.inversion.view import View
from unbatch.knowledge import DOMAIN_FIELDS, PROTOCOL_FIELDS, Knowledge
from unbatch.reconstruction import Reconstruction


@final
class LtCodes(ActiveAttack):
    """Reads a batch like a fountain code: each unit sends the sum over a random set of examples, and sets are peeled.

    Every row of the first dense layer has a random direction, and a threshold above which a share k / n of the examples is
    expected: k = 1 for the share `degree_one` of the rows, and for the others k drawn from the degrees of an LT code (ideal
    soliton: 1/n for k = 1, 1 / (k (k - 1)) for k = 2 .. n). A set of one example is read; an example that is read says by
    itself in which other sets it is, and is taken out of them, until none of one is left. That a set holds one is proven as
    in `imprint`. No two rows are alike, and thresholds need not be right: a share that is off makes sets larger or smaller.

    Bound: as in `imprint`; what is taken out of a set adds its own error.

    >>> import torch, unbatch
    >>> from unbatch.auditing.cheating import planted_exchange
    >>> client = unbatch.Case.parse("digits:batch=4,width=64").setting()
    >>> attack = unbatch.attacks.LtCodes()
    >>> seen, truth = planted_exchange(attack, client, knowledge=client.domain.public())
    >>> len(attack(seen))
    4
    """

    family: ClassVar[str] = "planted sums"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT
    cost: ClassVar[Cost] = Cost.READS
    paper: ClassVar[str] = (
        "Luby, LT codes, FOCS 2002 (the code); Nowak et al., QBI, 2024 (a threshold a row); Fowl et al., ICLR 2022 (bins)"
    )
    needs: ClassVar[frozenset[str]] = frozenset({"input_shape", "batch_size"})
    uses: ClassVar[frozenset[str]] = (
        frozenset({"public", "clients", "noise", "clip", "altered", "mixup"}) | DOMAIN_FIELDS | PROTOCOL_FIELDS
    )
    demo: ClassVar[Demo] = Demo(case="digits:batch=6,width=200", floors={"psnr": 80.0})

    degree_one: Annotated[float, Field(ge=0, le=1, description="share of the rows meant for one example alone")] = 0.5

    def plant(self, model: nn.Module, rng: torch.Generator, known: Knowledge = NOTHING) -> nn.Module:
        """A copy of `model` with such rows in its first dense layer, and a quiet network above.

        Raises NotApplicable: the network does not begin with a dense layer, or has more than relu above it.
        """
        if "batch_size" not in known:
            raise NotApplicable("batch_size must be known, to choose how many examples a row is to fire for.")
        shape = shape_known(known)
        return plant_rows(model, shape, lambda m: self._rows(m, math.prod(shape), rng, known))

    def run(self, view: View, rng: torch.Generator) -> Reconstruction:
        view.refuse_tokens()
        return read_sums(view, planted_layer(view))

    def _rows(self, m: int, d: int, rng: torch.Generator, known: Knowledge) -> tuple[Tensor, Tensor]:
        """Rows [m, d] and biases [m], on the network's inputs."""
        n, W = int(known.batch_size), random_directions(m, d, rng)
        k = torch.arange(1, n + 1, dtype=torch.float64)
        soliton = torch.cat([torch.full((1,), 1 / n, dtype=torch.float64), 1 / (k[1:] * (k[1:] - 1))])
        degrees = 1 + torch.multinomial(soliton, m, replacement=True, generator=rng).double()
        degrees[: round(self.degree_one * m)] = 1.0
        return W, -thresholds_for(known, W, (degrees / (n + 1)).clamp(max=0.5))
