"""mixup: the client trains on blends of pairs of its examples."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar, final

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from unbatch.defence import Defence, Round, Step
from unbatch.errors import UnbatchError
from unbatch.knowledge import Knowledge
from unbatch.protocol import Update


@final
class Mixup(Defence):
    """Blends every example with another one of the batch before training on it.

    x_i -> l x_i + (1 - l) x_j and L -> l L(o, y_i) + (1 - l) L(o, y_j): j = pi(i) a random permutation of the
    batch, l ~ Beta(alpha, alpha), both drawn once a round.

    It has no likelihood: the server sees neither the pairs nor the blend.
    Raises UnbatchError: inputs are tokens, which cannot be blended.

    >>> import torch, unbatch
    >>> model, loss = torch.nn.Linear(2, 2), torch.nn.functional.cross_entropy
    >>> x, y = torch.ones(4, 2), torch.tensor([0, 1, 1, 0])
    >>> seen, truth = unbatch.observe(model, loss, x, y, defences="mixup:alpha=0.4")
    >>> seen.knowledge.mixup
    0.4
    """

    paper: ClassVar[str] = "Zhang et al., ICLR 2018"
    random: ClassVar[bool] = True
    identity: ClassVar[str] = "mixup:alpha=0"

    alpha: Annotated[float, Field(ge=0, allow_inf_nan=False, description="of the Beta law of the blend")] = 1.0

    def public(self, known: Knowledge) -> Knowledge:
        return known | Knowledge(mixup=self.alpha) if self.alpha else known

    def wrap(self, step: Step) -> Step:
        def mixed(round_: Round) -> Update:
            if not self.alpha:
                return step(round_)
            x, y = round_.inputs, round_.labels
            if not x.is_floating_point():
                raise UnbatchError(f"{self} blends real-valued inputs; these are {x.dtype} tokens, leave it out.")
            seed = int(torch.randint(2**62, (), generator=round_.rng))
            blend = float(np.random.default_rng(seed).beta(self.alpha, self.alpha))
            order = torch.randperm(len(x), generator=round_.rng).to(x.device)

            def loss(outputs: Tensor, pair: Tensor) -> Tensor:
                first, second = pair.unbind(1)
                return blend * round_.loss(outputs, first) + (1 - blend) * round_.loss(outputs, second)

            pairs = torch.stack([y, y[order]], 1)  # one tensor, so that local batches and shares cut both alike
            return step(replace(round_, inputs=torch.lerp(x[order], x, blend), labels=pairs, loss=loss))

        return mixed
