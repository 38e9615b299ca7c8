"""cramer-rao: how well an unbiased attacker can do at most against Gaussian noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor

from unbatch.analysis import Bound
from unbatch.domain import Images
from unbatch.information import Information, NoiseAnalysis, deviation, fitted, joined, jumps
from unbatch.numerics.inverse_trace import inverse_trace, kronecker
from unbatch.numerics.least_squares import example_gram
from unbatch.observation import Observation
from unbatch.probe import probe


@final
class CramerRao(NoiseAnalysis):
    """Covariance of every unbiased attacker's answer >= sigma^2 (J^T J)^-1, J the Jacobian of the update as sent.

    J is with respect to all entries of all inputs of the batch; labels count as known, which only helps the attacker. The
    value is the root mean square over all entries. Up to `exact` unknowns J^T J is formed; beyond, its inverse's trace is
    estimated from random probes and conjugate gradients, which too few steps only lower. It does not hold for attackers
    who know what inputs look like (see `van-trees`), and not where the update jumps as inputs move (relu). The information
    of several rounds adds up, at the parameters that each had: T rounds at the same ones divide the variance by T.
    """

    paper: ClassVar[str] = "Rao, 1945; Cramer, 1946"

    follows: ClassVar[bool] = True

    exact: Annotated[int, Field(ge=0, description="unknowns up to which the information matrix is formed")] = 512
    probes: Annotated[int, Field(ge=2, description="random probes of a larger one")] = 4
    steps: Annotated[int, Field(gt=0, description="conjugate-gradient steps for each probe")] = 40

    def find_bounds(self, obs: Observation, at: tuple[Tensor, Tensor] | None, rng: torch.Generator) -> Sequence[Bound]:
        x, y, whose = probe(obs, at, rng, whole=True)
        if at is not None:
            fitted(obs, x, y)
        if why := jumps(obs, x, y, rng):
            raise ValueError(why)
        told = joined(obs)
        variance, how = self._variance(Information(told, x, y), deviation(told), rng)
        low, high = obs.knowledge.get("input_range", (0.0, 1.0))
        value = math.sqrt(float(variance.mean())) / (high - low)
        each = (-10 * (variance.mean(1) / (high - low) ** 2).log10()).sort().values
        words = f"{self.premise(obs)}. At {whose}, {how}."
        if len(each) > 1 and bool(each.isfinite().all()):
            words += f" Example by example {each[0]:.1f} to {each[-1]:.1f} dB."
        shown = "" if how != "exact" else _map(variance, tuple(x.shape[1:]))
        bound = Bound.of("Cramer-Rao", value, "unbiased", words, self.paper)
        return [bound.model_copy(update={"picture": shown})]

    def _variance(self, at: Information, sigma: float, rng: torch.Generator) -> tuple[Tensor, str]:
        """The least variance [n, d] of every entry, and how it was computed."""
        like = at.x.detach().flatten(1)
        if len(at.sent) < like.numel():
            few = f"{len(at.sent):,} entries are sent for {like.numel():,} unknowns, and no unbiased attacker exists"
            return torch.full_like(like, math.inf), few
        if like.numel() <= self.exact:
            inverse, lost = _diagonal(at)
            if lost:
                how = f"the update does not determine {lost} of the {like.numel():,} unknowns: no unbiased attacker exists"
                return sigma**2 * inverse.view_as(like), how
            return sigma**2 * inverse.view_as(like), "exact"
        gram = example_gram(at.push, like, len(at.sent), rng)
        solve = kronecker(gram, torch.ones(like.shape[1]).to(like), 0.0)
        found = inverse_trace([[at.fisher]], like, rng, probes=self.probes, precondition=solve, steps=self.steps)
        shares = found.diagonal.sum(1).clamp_min(1e-300)  # example by example, scaled to the trace
        each = shares / shares.sum() * found.value / like.shape[1]
        how = f"from {self.probes} random probes (standard error of the variance {found.error / found.value:.1%})"
        return sigma**2 * each[:, None].expand_as(like), how


def _diagonal(at: Information) -> tuple[Tensor, int]:
    """Of (J^T J)^-1 [n d], infinite at entries that move in J's null space, and the dimension of that.

    Eigenvectors of J^T J below its own rounding are told apart by J itself, whose rounding is that of a square root.
    """
    F = at.matrix()
    values, V = torch.linalg.eigh(F)
    size = len(F) * torch.finfo(F.dtype).eps
    weak = values <= size * values[-1]
    if weak.any():
        _, s, W = torch.linalg.svd(torch.stack([at.push(v) for v in V[:, weak].T], 1), full_matrices=False)
        values[weak], V[:, weak] = s.square(), V[:, weak] @ W.T
    lost = values <= (10 * size) ** 2 * values.max()
    inverse = (V[:, ~lost].square() / values[~lost]).sum(1)
    moved = V[:, lost].square().sum(1) > torch.finfo(F.dtype).eps
    return torch.where(moved, torch.inf, inverse), int(lost.sum())


def _map(variance: Tensor, shape: tuple[int, ...]) -> str:
    """The least standard deviation of every pixel, examples side by side."""
    if len(shape) != 3 or shape[0] not in (1, 3):
        return ""
    pixels = torch.cat(list(variance.sqrt().view(-1, *shape)[:8]), 2)
    return Images(shape=tuple(pixels.shape), low=0.0, high=float(pixels.max())).render(pixels)
