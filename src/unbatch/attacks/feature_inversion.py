"""feature-inversion: pictures from the exact features of a network's first dense layer."""

from __future__ import annotations

import copy
import math
from typing import Annotated, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor

from unbatch.attack import Attack, Demo, Guarantee
from unbatch.network import Features, dense_layers
from unbatch.numerics.matching import signed_adam, total_variation
from unbatch.observation import PROTOCOL_FIELDS, Observation, Reconstruction
from unbatch.progress import tick


@final
class FeatureInversion(Attack):
    """argmin over x of sum_i |f(x_i) - f_i|^2 / |f_i|^2 + tv TV(x_i): f the network below its first dense layer.

    The features f_i [d] of every example are what `unmix` proves of a network whose first dense layer comes after
    convolutions; they are exact, the pictures are a guess: what f does not keep is filled in by total variation (Mahendran,
    Vedaldi, Understanding Deep Image Representations by Inverting Them, CVPR 2015). Signed Adam within the range.
    """

    family: ClassVar[str] = "span"
    guarantee: ClassVar[Guarantee] = Guarantee.HEURISTIC
    paper: ClassVar[str] = "Mahendran, Vedaldi, CVPR 2015, on the features of unmix"
    needs: ClassVar[frozenset[str]] = frozenset({"input_shape"})
    uses: ClassVar[frozenset[str]] = (
        frozenset({"labels", "noise", "input_range", "domain", "log_prob", "buffers"}) | PROTOCOL_FIELDS
    )
    demo: ClassVar[Demo] = Demo(
        case="photos:batch=4,model=convnet,width=32,activation=gelu", floors={"psnr": 15.0}, options="iterations=300"
    )

    iterations: Annotated[int, Field(gt=0, description="Adam steps")] = 2000
    tv: Annotated[float, Field(ge=0, description="weight of total variation")] = 0.003

    def obstacle(self, obs: Observation) -> str | None:
        if len(obs.knowledge.input_shape) != 3:
            return "the inputs are no pictures [c, h, w], and the prior is for pictures."
        layers = dense_layers(obs.model, obs.knowledge.input_shape)
        if any(layer.feeds is not None for layer in layers):
            return "the first dense layer reads the inputs themselves, which unmix returns: nothing is left to invert."
        unmix = Attack.parse("unmix")
        return unmix.obstacle(obs.only(*(unmix.needs | unmix.uses)))

    def run(self, obs: Observation, rng: torch.Generator) -> Reconstruction:
        found = _features(obs, rng)
        assert found.inputs is not None  # unmix returns inputs, if no examples
        shape, n = obs.knowledge.input_shape, len(found)
        low, high = obs.knowledge.get("input_range", (-2.0, 2.0))
        middle, scale = (low + high) / 2, (high - low) / 4
        features = found.inputs.to(obs.device, obs.dtype)
        size = features.norm(dim=1).clamp_min(torch.finfo(obs.dtype).tiny)
        below = Features(copy.deepcopy(obs.model), found.layer, obs.protocol.mode)

        def misfit(point: Tensor) -> Tensor:
            gap: Tensor = (below(middle + scale * point.view(n, *shape)) - features).norm(dim=1) / size
            return gap.square().sum()

        def objective(point: Tensor) -> Tensor:
            return misfit(point) + self.tv * n * total_variation(point.view(n, *shape))

        point = torch.randn(n, math.prod(shape), generator=rng, dtype=torch.float64).to(features) * 0.1
        if n:
            for step, (value, latest) in enumerate(signed_adam(objective, point, steps=self.iterations, box=2.0)):
                point = latest
                if not tick(step / self.iterations, value):
                    break
        return Reconstruction(
            inputs=middle + scale * point.view(n, *shape),
            labels=found.labels,
            trace={
                "layer": found.layer,
                "features": len(features.T),
                "bounds of the features": found.bound,
                "misfit": float(misfit(point).detach().sqrt()) if n else None,
            },
        )


def _features(obs: Observation, rng: torch.Generator) -> Reconstruction:
    """What `unmix` finds, asked by its name."""
    unmix = Attack.parse("unmix")
    return unmix.run(obs.only(*(unmix.needs | unmix.uses)), rng)
