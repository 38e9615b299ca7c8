"""feature-inversion: pictures from the exact features of a network's first dense layer."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Annotated, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor

from unbatch.attack import Attack, Demo, Guarantee
from unbatch.errors import NotApplicable
from unbatch.inversion.unmixing import unmixed
from unbatch.inversion.view import View
from unbatch.knowledge import DOMAIN_FIELDS, PROTOCOL_FIELDS
from unbatch.network.dense import DenseFeatures
from unbatch.numerics.search.matching import signed_adam, total_variation
from unbatch.progress import tick
from unbatch.reconstruction import Reconstruction

STARTING_TV_WEIGHT = 1.0  # weight of total variation at the start: pictures as flat as grey itself
LARGEST_FEATURE_BOUND = 0.01  # largest bound of features that are inverted: a search leaves a misfit of about as much
FALLING_SHARE = 0.7  # share of the steps after which it is down to `tv`


@final
class FeatureInversion(Attack):
    """Searches for the pictures whose features behind the convolutions are those that `unmix` proves; a guess.

    argmin over x of sum_i |f(x_i) - f_i|^2 / |f(grey) - f_i|^2 + tv TV(x_i): f the network below its dense layers.

    The features f_i [d] of every example are what `unmix` proves of a network whose first dense layer comes after
    convolutions; they are exact, the pictures are a guess: what f does not keep is filled in by total variation (Mahendran,
    Vedaldi, Understanding Deep Image Representations by Inverting Them, CVPR 2015). Signed Adam within the range, from
    flat pictures to detailed ones: the weight of total variation starts at 1 and falls to `tv`.

    >>> import torch, unbatch
    >>> from unbatch.models.small import build
    >>> rng = torch.Generator().manual_seed(0)
    >>> model = build("convnet", (1, 4, 4), 3, width=4, activation="gelu", rng=rng)
    >>> x, y = torch.rand(1, 1, 4, 4, generator=rng), torch.tensor([0])
    >>> seen, truth = unbatch.observe(model, torch.nn.functional.cross_entropy, x, y)
    >>> found = unbatch.attacks.FeatureInversion(iterations=20)(seen)
    >>> found.inputs.shape, found.trace["layer"], found.trace["features"]
    (torch.Size([1, 1, 4, 4]), 'dense1', 16)
    >>> found.trace["misfit"][0] < 0.5  # of what grey leaves, after 20 steps
    True
    """

    family: ClassVar[str] = "span"
    guarantee: ClassVar[Guarantee] = Guarantee.HEURISTIC
    paper: ClassVar[str] = "Mahendran, Vedaldi, CVPR 2015, on the features of unmix"
    needs: ClassVar[frozenset[str]] = frozenset({"input_shape"})
    uses: ClassVar[frozenset[str]] = (
        frozenset({"batch_size", "labels", "noise", "buffers", "clients"}) | DOMAIN_FIELDS | PROTOCOL_FIELDS
    )
    demo: ClassVar[Demo] = Demo(
        case="photos:batch=2,model=convnet,width=32,activation=gelu",
        floors={"psnr": 25.0},
        options="iterations=120",
    )

    iterations: Annotated[int, Field(gt=0, description="Adam steps")] = 1000
    tv: Annotated[float, Field(ge=0, description="weight of total variation at the end")] = 0.003

    def run(self, view: View, rng: torch.Generator) -> Reconstruction:
        view.refuse_tokens()
        if len(view.knowledge.input_shape) != 3:
            raise NotApplicable("the inputs are no pictures [c, h, w], and the prior is for pictures.")
        if any(layer.feeds is not None for layer in view.layers):
            raise NotApplicable(
                "the first dense layer reads the inputs themselves, which unmix returns: nothing is left to invert."
            )
        below = self._below(view)
        found = unmixed(view, rng)
        inputs, bound = found.inputs, found.bound
        if inputs is None or bound is None:
            return found
        sure = bound <= LARGEST_FEATURE_BOUND  # without features that their bounds leave open
        features = inputs[sure.to(inputs.device)].to(next(view.model.parameters()))
        labels = None if found.labels is None else found.labels[sure.to(found.labels.device)]
        shape, n = view.knowledge.input_shape, len(features)
        low, high = view.knowledge.get("input_range", (-2.0, 2.0))
        middle, scale = (low + high) / 2, (high - low) / 4

        def pictures(point: Tensor) -> Tensor:
            entries: Tensor = middle + scale * point.view(n, *shape)
            return entries

        start = torch.randn(n, math.prod(shape), generator=rng, dtype=torch.float64).to(features) * 0.1
        point, best, misfit = start, math.inf, None
        if n:
            with torch.no_grad():  # what all pictures share in their features is most of |f_i| and tells nothing
                size = (below(pictures(0 * start)) - features).norm(dim=1).clamp_min(torch.finfo(features.dtype).tiny)
            search = CoarseToFine(
                lambda p: (below(pictures(p)) - features).norm(dim=1) / size, shape, self.tv, self.iterations
            )
            for step, (_, latest) in enumerate(signed_adam(search, start, steps=self.iterations, box=2.0)):
                if search.score < best:
                    best, point, misfit = search.score, latest, search.misfit
                if not tick(step / self.iterations, best):
                    break
        return Reconstruction(
            inputs=pictures(point),
            labels=labels,
            trace={
                "layer": found.layer,
                "features": len(features.T),
                "bounds of the features": bound[sure].tolist(),
                "misfit": misfit,
            },
        )

    @staticmethod
    def _below(view: View) -> DenseFeatures:
        """The network below its first dense layer, as a function. Raises NotApplicable: none, or it draws at random."""
        if view.first is None:
            raise NotApplicable("no dense layer sent its gradient.")
        name = view.first.name
        below = DenseFeatures(copy.deepcopy(view.model), name, view.protocol.mode)
        shape = (2, *view.knowledge.input_shape)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            ones = torch.ones(shape).to(next(view.model.parameters()))
            first, again = below(ones), below(ones)
        if not torch.equal(first, again):
            raise NotApplicable(
                f"the layers before {name!r} are random in the client's mode (dropout): features have no one picture."
            )
        return below


class CoarseToFine:
    """What a search for pictures minimises: their misfit, and a total variation that counts for less from call to call.

    |gap|^2 + w TV over points [n, p] of pictures of `shape`, gap [n] the misfits. w falls geometrically from 1 to `tv`
    within the first 70 % of `calls`, so that flat pictures come first and details later. After each call `score` is the
    value at the final weight, which can be compared from call to call, and `misfit` the gaps.

    >>> target = torch.tensor([[0.0, 1.0, 0.0, 1.0]])
    >>> objective = CoarseToFine(lambda point: (point - target).norm(dim=1), (1, 2, 2), tv=0.0, calls=2)
    >>> float(objective(target)) > 0, float(objective(target)) > 0, float(objective(target))  # flat, flat, the target
    (True, True, 0.0)
    >>> objective.score
    0.0
    """

    def __init__(self, gap: Callable[[Tensor], Tensor], shape: tuple[int, ...], tv: float, calls: int) -> None:
        self.gap, self.shape, self.tv, self.falls = gap, shape, tv, max(1, math.ceil(FALLING_SHARE * calls))
        self.calls = 0
        self.score = math.inf  # of the last point, at the final weight: comparable from call to call
        self.misfit: list[float] = []  # of the last point, example by example

    def __call__(self, point: Tensor) -> Tensor:
        gap, variation = self.gap(point), len(point) * total_variation(point.view(-1, *self.shape))
        rest = gap.square().sum()
        self.misfit = gap.detach().tolist()
        self.score = float((rest + self.tv * variation).detach())
        to_go = max(0.0, 1 - self.calls / self.falls)
        self.calls += 1
        end = max(self.tv, 1e-3 * STARTING_TV_WEIGHT)  # tv may be zero, which no geometric fall reaches
        weight = end * (STARTING_TV_WEIGHT / end) ** to_go if to_go else self.tv
        return rest + weight * variation
