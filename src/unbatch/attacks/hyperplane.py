"""hyperplane: a server that cuts the space of inputs into parallel slabs, and the full ones again in every round."""

from __future__ import annotations

import copy
import math
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from unbatch.attack import NOTHING, ActiveAttack, Cost, Demo, Guarantee
from unbatch.errors import NotApplicable
from unbatch.inversion.planted.quiet import plant_rows, shape_known
from unbatch.inversion.planted.reading import open_slabs, planted_layer, read_sums
from unbatch.inversion.planted.slabs import bins_for
from unbatch.inversion.view import View
from unbatch.knowledge import DOMAIN_FIELDS, PROTOCOL_FIELDS, Knowledge
from unbatch.observation import Observation
from unbatch.protocol import Protocol
from unbatch.reconstruction import Reconstruction


@final
class Hyperplane(ActiveAttack):
    """Reads every example of a batch over several rounds, with few units: slabs with several examples are cut again.

    In the first round the thresholds of parallel rows lie at quantiles. In each further one they cut the slabs that hold
    examples not read so far, the narrowest first, into equal parts, as many as there are units for; what is read is taken
    out of the sums of all rounds. It ends when nothing is left, or with the protocol's rounds.

    That a slab holds one example is proven by what its sum weighs, as in `imprint`: the number of examples in it follows
    from the gradient of the bias alone.

    Bound: as in `imprint`.

    >>> import torch, unbatch
    >>> from unbatch.auditing.cheating import planted_exchange
    >>> client = unbatch.Case.parse("digits:batch=6,width=8").setting()
    >>> object.__setattr__(client, "protocol", unbatch.Protocol(rounds=12))
    >>> attack = unbatch.attacks.Hyperplane()
    >>> seen, truth = planted_exchange(attack, client, knowledge=client.domain.public())
    >>> len(attack(seen)), len(seen.exchanges) <= 12
    (6, True)
    """

    family: ClassVar[str] = "planted sums"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT
    cost: ClassVar[Cost] = Cost.SOLVES
    threat_model: ClassVar[str] = "malicious server (chooses the parameters, anew in every round)"
    paper: ClassVar[str] = (
        "Cutting Through Privacy: A Hyperplane-Based Data Reconstruction Attack in Federated Learning, UAI 2025"
    )
    needs: ClassVar[frozenset[str]] = frozenset({"input_shape", "batch_size", "earlier"})
    uses: ClassVar[frozenset[str]] = (
        frozenset({"public", "clients", "noise", "clip", "altered", "mixup"}) | DOMAIN_FIELDS | PROTOCOL_FIELDS
    )
    demo: ClassVar[Demo] = Demo(case="digits:batch=8,width=12", floors={"psnr": 80.0}, protocol=Protocol(rounds=12))

    def plant(self, model: nn.Module, rng: torch.Generator, known: Knowledge = NOTHING) -> nn.Module:
        """A copy of `model` with parallel rows in its first dense layer, and a quiet network above.

        Raises NotApplicable: the network does not begin with a dense layer, or has more than relu above it.
        """
        shape = shape_known(known)

        def rows(m: int) -> tuple[Tensor, Tensor]:
            W, at = bins_for(known, m, math.prod(shape), rng, directions=1)
            return W, -at

        return plant_rows(model, shape, rows)

    def replant(self, seen: Observation, rng: torch.Generator) -> nn.Module | None:
        """The same rows with thresholds within the slabs that are left; None where none is left, or nothing can be read."""
        view = View.of(seen)
        try:
            layer = planted_layer(view)
            slabs = open_slabs(view, layer)
        except NotApplicable:  # `run` says why
            return None
        if not len(slabs):
            return None
        made = copy.deepcopy(seen.model)
        W, b = (made.get_parameter(name) for name in (layer.weight, layer.bias or ""))
        size = W.detach().double().norm(dim=1)
        cuts = _cut(slabs, len(b), float((-b.detach().double() / size).min()))
        with torch.no_grad():
            b.copy_(-cuts * size)
        return made

    def run(self, view: View, rng: torch.Generator) -> Reconstruction:
        view.refuse_tokens()
        return read_sums(view, planted_layer(view))


def _cut(slabs: Tensor, m: int, lowest: float) -> Tensor:
    """Thresholds [m] that cut slabs [s, 2], the first ones where there are many, into as many equal parts as there may be.

    A half space is taken to reach as far beyond its threshold as that lies above the lowest one.
    """
    slabs = slabs[: max(1, m // 3)]
    far = torch.where(slabs[:, 1].isinf(), 2 * slabs[:, 0] - lowest + 1e-3, slabs[:, 1])
    each = [m // len(slabs) + (i < m % len(slabs)) for i in range(len(slabs))]
    parts = [
        torch.linspace(float(low), float(high), k, dtype=torch.float64)
        for low, high, k in zip(slabs[:, 0], far, each, strict=True)
    ]
    return torch.cat(parts).sort().values
