"""gradient-matching: inputs whose simulated update comes nearest to the one that was sent, by optimisation."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, final

import torch
from pydantic import Field

from unbatch.attack import Attack, Demo, Guarantee
from unbatch.inversion.matching import UpdateMatching
from unbatch.inversion.tokens.embedding_matching import MOVES_TRIED, STARTS_LOOKED_AT, TokenMatching
from unbatch.inversion.view import View
from unbatch.knowledge import DOMAIN_FIELDS, PROTOCOL_FIELDS
from unbatch.reconstruction import Reconstruction


@final
class GradientMatching(Attack):
    """Searches for inputs whose simulated update comes nearest to the one seen (DLG, inverting gradients, our own).

    argmin over inputs of the distance between the simulated and the observed update.

    default: |g(x) - g|^2 by Levenberg-Marquardt in float64 from near the middle of the range, in the span of the inputs
    where the first layer is dense and gives it away; on networks with kinks through ever sharper rounded ones; where that
    leaves a rest, signed Adam on cosine distance and total variation.
    dlg: |g(x) - g|^2 by L-BFGS from normal noise. inverting-gradients: cosine distance and total variation by signed
    Adam within the range, in units of a quarter of it. Guesses are chosen by the match (and total variation) alone.
    batch-norm-inversion: where a client sends batch norm's running averages after its steps, they give its batches'
    statistics away (of one step each layer's mean and variance, of several their mixture); .1 times the misfit of those
    and .001 that of the update, by noisy Adam from the prior's mean. The authors' code computes its match from values
    that no gradient passes; here one does. With `statistics`, the first-order steps of the others add that misfit too.

    tag, lamp: the peers for texts. They search over the vectors that a model looks up for its tokens, by Adam from the best
    of random ones, and end at the tokens that point nearest to them. tag: l2 and `alpha` l1 distance of gradients. lamp:
    cosine distance, vectors held near the table's length, and every 75 steps the best of `moves` other orders (two tokens
    swapped, a run moved, two sentences cut and recombined) by the match and, with public sentences, by how likely their
    bigrams make a sentence. Every bound is infinite; `token-span` proves what it returns.

    Labels are used where known, else counted from the head's gradient, else (dlg: always) optimised as soft ones.

    >>> import torch, unbatch
    >>> from unbatch.models.small import build
    >>> rng = torch.Generator().manual_seed(0)
    >>> model = build("mlp", (6,), 3, width=20, activation="gelu", rng=rng)
    >>> x, y = torch.rand(2, 6, generator=rng), torch.tensor([0, 2])
    >>> seen, truth = unbatch.observe(model, torch.nn.functional.cross_entropy, x, y)
    >>> found = unbatch.attacks.GradientMatching()(seen)
    >>> found.trace["converged"], torch.allclose(found.inputs, x.double(), atol=1e-3), found.labels
    (True, True, tensor([0, 2]))
    """

    family: ClassVar[str] = "matching"
    guarantee: ClassVar[Guarantee] = Guarantee.HEURISTIC
    paper: ClassVar[str] = (
        "Zhu, Liu, Han, NeurIPS 2019 (dlg); Geiping et al., NeurIPS 2020 (inverting-gradients); Hatamizadeh et al., Do "
        "Gradient Inversion Attacks Make Federated Learning Unsafe?, IEEE TMI 2023 (batch-norm-inversion); Deng et al., "
        "TAG, Findings of EMNLP 2021 (tag); Balunovic et al., LAMP, NeurIPS 2022 (lamp)"
    )
    needs: ClassVar[frozenset[str]] = frozenset({"input_shape", "batch_size"})
    uses: ClassVar[frozenset[str]] = (
        frozenset({"labels", "buffers", "clients", "log_prob", "earlier", "public"}) | DOMAIN_FIELDS | PROTOCOL_FIELDS
    )
    demo: ClassVar[Demo] = Demo(
        case="digits:batch=2,activation=gelu,width=100", floors={"psnr": 60.0}, knows=("labels",)
    )

    preset: Annotated[
        Literal["default", "dlg", "inverting-gradients", "batch-norm-inversion", "tag", "lamp"],
        Field(description="ours, or a published method"),
    ] = "default"
    iterations: Annotated[
        int | None, Field(gt=0, description="first-order steps a restart; none takes the preset's own")
    ] = None
    restarts: Annotated[int, Field(gt=0, description="starts; later ones only while none is exact")] = 1
    tv: Annotated[float, Field(ge=0, description="weight of total variation, for pictures only")] = 0.01
    statistics: Annotated[
        float | None, Field(ge=0, description="weight of batch statistics that were sent; none takes the preset's own")
    ] = None

    match: Annotated[
        Literal["l2-l1", "cosine"] | None, Field(description="of tag and lamp; none takes the preset's own")
    ] = None
    alpha: Annotated[float, Field(ge=0, description="weight of l1 in l2-l1")] = 0.01
    prior: Annotated[float, Field(ge=0, description="lamp: weight of how unlikely a sentence is")] = 0.2
    starts: Annotated[int, Field(gt=0, description="tag and lamp: random points looked at first")] = STARTS_LOOKED_AT
    moves: Annotated[int, Field(ge=0, description="lamp: orders looked at, at a time")] = MOVES_TRIED

    def run(self, view: View, rng: torch.Generator) -> Reconstruction:
        if self.preset == "tag" or self.preset == "lamp":
            words = TokenMatching(
                preset=self.preset,
                match=self.match,
                alpha=self.alpha,
                prior=self.prior,
                iterations=self.iterations,
                restarts=self.restarts,
                starts=self.starts,
                moves=self.moves,
            )
            return words.run(view, rng)
        search = UpdateMatching(
            preset=self.preset,
            iterations=self.iterations,
            restarts=self.restarts,
            tv=self.tv,
            statistics=self.statistics,
        )
        return search.run(view if view.protocol.optimiser == "sgd" else view.gradient, rng)
