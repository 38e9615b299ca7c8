"""unmix: whole batches, exactly, from the gradient of the first dense layer, for any activation and depth."""

from __future__ import annotations

from typing import Annotated, ClassVar, final

import torch
from pydantic import Field

from unbatch.attack import Attack, Cost, Demo, Guarantee
from unbatch.inversion.unmixing import unmixed
from unbatch.inversion.view import View
from unbatch.knowledge import DOMAIN_FIELDS, PROTOCOL_FIELDS
from unbatch.reconstruction import Reconstruction


@final
class Unmix(Attack):
    """Recovers the examples of a whole batch behind a dense layer one by one, each certified on its own.

    The layer's gradient [dL/dW, dL/db] = sum_i delta_i (x_i, 1)^T has the examples' span as its row space and the batch
    size as its rank. In coordinates z of the span each example obeys U S q = F(z, y) alone, F the model's own delta:
    guesses (independent components of the edges of pictures, or of raw rows; draws from a prior) are polished on it,
    accepted if their subtraction lowers the rank by one, and subtracted. Kinked activations (relu) give exact dual
    vectors q instead, by a linear program over the neurons' patterns (one hidden layer) and least absolute deviations.
    Batch size, labels and residuals are found.

    Examples must not interact above the layer, and the batch must be smaller than half the layer's width and than its
    inputs. Where layers before it are not a mere normalisation, their exact outputs (features) are returned.

    >>> import torch, unbatch
    >>> from unbatch.models.small import build
    >>> rng = torch.Generator().manual_seed(0)
    >>> model = build("mlp", (6,), 3, width=20, activation="gelu", rng=rng)
    >>> x, y = torch.rand(2, 6, generator=rng), torch.tensor([0, 2])
    >>> seen, truth = unbatch.observe(model, torch.nn.functional.cross_entropy, x, y)
    >>> found = unbatch.attacks.Unmix()(seen)
    >>> found
    <Reconstruction: 2 examples [6], with labels, bounds up to ...>
    >>> torch.allclose(found.inputs[found.labels.argsort()], x.double(), atol=1e-5)
    True
    """

    family: ClassVar[str] = "span"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT
    cost: ClassVar[Cost] = Cost.SOLVES
    paper: ClassVar[str] = (
        "this library; on the span of Kariyappa et al., Cocktail Party Attack, ICML 2023, and the sparsity of Dimitrov et "
        "al., SPEAR, NeurIPS 2024"
    )
    needs: ClassVar[frozenset[str]] = frozenset({"input_shape"})
    uses: ClassVar[frozenset[str]] = (
        frozenset({"batch_size", "labels", "noise", "log_prob", "earlier", "buffers", "clients"})
        | DOMAIN_FIELDS
        | PROTOCOL_FIELDS
    )
    demo: ClassVar[Demo] = Demo(
        case="photos:batch=8,activation=gelu,width=200", floors={"l2-error": 1e-4, "label-accuracy": 1.0}
    )

    attempts: Annotated[
        int, Field(ge=1, description="times each start is tried without success before it is given up")
    ] = 3
    partial: Annotated[
        bool, Field(description="also return guesses that are not certified, with an infinite bound")
    ] = False

    def run(self, view: View, rng: torch.Generator) -> Reconstruction:
        return unmixed(view, rng, attempts=self.attempts, partial=self.partial)
