"""imprint: a server that plants bins in the first dense layer, and reads each example that is alone in one."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor, nn

from unbatch.attack import NOTHING, ActiveAttack, Cost, Demo, Guarantee
from unbatch.errors import NotApplicable
from unbatch.inversion.planted.front import put_in_front
from unbatch.inversion.planted.quiet import plant_rows, shape_known
from unbatch.inversion.planted.reading import planted_layer, read_sums
from unbatch.inversion.planted.slabs import bins_for, from_statistics
from unbatch.inversion.view import View
from unbatch.knowledge import DOMAIN_FIELDS, PROTOCOL_FIELDS, Knowledge
from unbatch.reconstruction import Reconstruction


@final
class Imprint(ActiveAttack):
    """Sorts the examples into bins by planted rows of the first dense layer, and reads each that is alone in its bin.

    Rows of one direction u and thresholds t_1 < t_2 < ... : the gradients of neighbouring rows differ by the examples
    with t_k < u . x <= t_(k+1), so that a bin with one example holds w (x, 1), w what its loss sends back.

    How it is proven that a bin holds one: the layers above are planted so that the outputs are constant, and the first
    class has the golden share p of the probability. Then w is p or p - 1 by the label alone, and no sum of two or more of
    these is one of them again. With several directions an example that is read in a bin of one is taken out of those of
    the others, which may leave another one alone there.

    Thresholds are quantiles: of `public` examples where they are known; of a normal law whose `centre` and `spread` are
    given (statistics of the mean entry of an input); or by the Gaussian rule without data, along random directions.
    With `bins` the server puts a dense block in front of any network that ends with a dense layer: it then changes the
    architecture, and not parameters alone.

    Bound: the rounding of the n addends of an entry of the gradient, over w.

    >>> import torch, unbatch
    >>> from unbatch.auditing.cheating import planted_exchange
    >>> client = unbatch.Case.parse("digits:batch=4,width=64").setting()
    >>> attack = unbatch.attacks.Imprint()
    >>> seen, truth = planted_exchange(attack, client, knowledge=client.domain.public())
    >>> found = attack(seen)
    >>> len(found), float(torch.cdist(found.inputs.flatten(1), truth.inputs.double().flatten(1)).amin(1).max()) < 1e-4
    (4, True)
    """

    family: ClassVar[str] = "planted sums"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT
    cost: ClassVar[Cost] = Cost.READS
    threat_model: ClassVar[str] = "malicious server (chooses the parameters; with `bins` also the architecture)"
    paper: ClassVar[str] = "Fowl et al., Robbing the Fed, ICLR 2022; Nowak et al., QBI, 2024 (thresholds without data)"
    needs: ClassVar[frozenset[str]] = frozenset({"input_shape", "batch_size"})
    uses: ClassVar[frozenset[str]] = (
        frozenset({"public", "clients", "noise", "clip", "altered", "mixup"}) | DOMAIN_FIELDS | PROTOCOL_FIELDS
    )
    demo: ClassVar[Demo] = Demo(case="digits:batch=6,width=200", floors={"psnr": 80.0})

    bins: Annotated[
        int | None, Field(gt=1, description="units of a block in front of the network; none plants its own first layer")
    ] = None
    directions: Annotated[
        int | None,
        Field(gt=0, description="along which there are bins; none takes 2, or 1 by statistics, 4 without data"),
    ] = None
    centre: Annotated[float | None, Field(description="of the mean entry of an input, its mean over the data")] = None
    spread: Annotated[float | None, Field(gt=0, description="its standard deviation; without data: an entry's")] = None

    def plant(self, model: nn.Module, rng: torch.Generator, known: Knowledge = NOTHING) -> nn.Module:
        """A copy of `model` with bins in its first dense layer, and a quiet network above; or behind a block of bins.

        Raises NotApplicable: the network does not begin with a dense layer, or has more than relu above it.
        """
        shape = shape_known(known)
        d = math.prod(shape)
        if self.bins is not None:
            return put_in_front(model, shape, *self._rows(self.bins, d, rng, known))
        return plant_rows(model, shape, lambda m: self._rows(m, d, rng, known))

    def run(self, view: View, rng: torch.Generator) -> Reconstruction:
        view.refuse_tokens()
        return read_sums(view, planted_layer(view))

    def _rows(self, m: int, d: int, rng: torch.Generator, known: Knowledge) -> tuple[Tensor, Tensor]:
        """The rows [m, d] and biases [m] of the bins, on the network's inputs."""
        if "public" in known or self.centre is None:
            W, at = bins_for(known, m, d, rng, self.directions, self.spread)
        elif self.spread is not None:
            W, at = from_statistics(self.centre, self.spread, m, d)
        else:
            raise NotApplicable("thresholds by statistics take the spread of the mean entry as well as its centre.")
        return W, -at
