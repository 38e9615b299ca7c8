"""Patch refinement: one picture's windows made exact by what the model itself says that its tokens send back."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unbatch.errors import NotApplicable
from unbatch.inversion.patches import MISFIT_ROUNDINGS, ROUNDINGS, PatchWindows
from unbatch.network.patches import PatchEmbedding, back_from_patches
from unbatch.network.precision import in_double
from unbatch.numerics.callables import Apply
from unbatch.numerics.linear.directions import KeptDirections
from unbatch.observation import Observation
from unbatch.progress import tick

STEPS = 6  # of Newton
WITHIN = 1e-4  # of what is left, to which the system of each step is solved
COMPUTED = 16.0  # roundings of what a forward and a backward pass give, that differ from the client's
LEAST_GAIN = 0.5  # of what is left, to which a step must bring it for another one


def refined(obs: Observation, front: PatchEmbedding, found: PatchWindows, label: Tensor) -> PatchWindows:
    """The windows, nearer to where they explain the embedding's gradient; as they were where that gains nothing.

    dL/dW = D(P)^T P, where D(P) [T, width], what the tokens send back, is computed by the model at the windows P [T, p]
    and the label: as many equations as unknowns,

        f(P) = (D(P)^T)^+ dL/dW - P = 0,

    solved by Newton's method from windows that are nearly right. -f' is the identity and what D changes by, which is small
    but for a few directions, so that its systems are solved by products (`KeptDirections`), two backward passes each; as
    f' hardly changes, the directions of the first step serve the others. The error is to first order: the rounding of dL/dW
    and of D, and what is left of f, through f'^-1 as far as those directions tell it.
    """
    if front.weight not in obs.update or found.free:
        return found
    equation = _SentBack(obs, front, label)
    try:
        start = equation.at(found.values)
    except NotApplicable:
        return found
    system = KeptDirections(equation.slope(found.values, start.inverse))
    best, P = start, found.values
    for k in range(STEPS):
        if not tick(k / STEPS):
            break
        step = system.solved(best.off.flatten(), WITHIN).view_as(P)
        new = equation.at(P + step)
        if not new.size < best.size:
            break
        enough = new.size > LEAST_GAIN * best.size or new.size < new.total**0.5
        best, P = new, P + step
        if enough:
            break
    left = system.solved(best.off.flatten(), 1.0)
    error = ROUNDINGS * (
        max(best.misfit, 1.0) * system.spread(best.covariance, best.total) + float(left.norm()) + best.size
    )
    if best.misfit > MISFIT_ROUNDINGS or not error < found.error:
        return found
    trace = {"refined by": f"the gradient of {front.weight!r}", "products": len(system)}
    return replace(found, values=P, error=error, trace=found.trace | trace)


@dataclass(frozen=True, eq=False)
class _Off:
    """How far windows are from what the embedding's gradient says that they are."""

    off: Tensor  # [T, p] f(P)
    inverse: Tensor  # [T, width] (D^T)^+, rows weighed by their rounding
    rounding: Tensor  # [T, T] covariance of each column of f(P) by the rounding of dL/dW and D
    misfit: float  # of the gradient, in roundings

    @property
    def size(self) -> float:
        """|f(P)|."""
        return float(self.off.norm())

    @property
    def total(self) -> float:
        """The variance of f(P) by rounding, summed over its entries."""
        return float(self.rounding.trace()) * self.off.shape[1]

    def covariance(self, rows: Tensor) -> Tensor:
        """The covariance of f(P), times each row [k, T p]."""
        return (self.rounding @ rows.view(len(rows), *self.off.shape)).flatten(1)


class _SentBack:
    """f(P) and its slope, in float64."""

    def __init__(self, obs: Observation, front: PatchEmbedding, label: Tensor) -> None:
        self.obs, self.front, self.label = obs, front, label
        self.model = in_double(obs.model)
        self.G = obs.update[front.weight].double().flatten(1)  # [width, p]
        self.fixed = obs.rounding(front.weight) + float(obs.knowledge.get("noise", 0.0))
        self.eps = torch.finfo(obs.update[front.weight].dtype).eps

    def back(self, P: Tensor, *, create_graph: bool = False) -> Tensor:
        """D(P) [T, width]."""
        x = self.front.picture(P, self.obs.knowledge.input_shape)[None]
        mode = self.obs.protocol.mode
        return back_from_patches(self.model, self.front, x, self.label, self.obs.loss, mode, create_graph=create_graph)

    def at(self, P: Tensor) -> _Off:
        """f(P), and what it is known to. Raises NotApplicable: what is sent back does not tell the windows apart."""
        D = self.back(P).detach()
        relative = self.G.norm(dim=1) / self.G.shape[1] ** 0.5 + D.norm(dim=0) * float(P.square().mean().sqrt())
        unit = (
            COMPUTED * self.eps * relative + self.fixed + torch.finfo(torch.float64).tiny
        )  # [width] the error of each row's entry
        U, S, V = torch.linalg.svd(D / unit, full_matrices=False)
        if not float(S[-1]) > 0:
            raise NotApplicable("some patches send nothing back.")
        inverse = (U / S) @ V / unit
        values = inverse @ self.G
        misfit = float(torch.linalg.matrix_norm((self.G - D.T @ values) / unit[:, None])) / self.G.numel() ** 0.5
        return _Off(values - P, inverse, (U / S.square()) @ U.T, misfit)

    def slope(self, P: Tensor, inverse: Tensor) -> Apply:
        """v -> -f'(P) v, of v [T p], to first order in what is left."""
        at = P.detach().clone().requires_grad_()
        with torch.enable_grad():
            D = self.back(at, create_graph=True)
            free = torch.zeros_like(D).requires_grad_()
            (pulled,) = torch.autograd.grad(D, at, free, create_graph=True)

        def product(v: Tensor) -> Tensor:
            v = v.view_as(P)
            (moved,) = torch.autograd.grad(pulled, free, v, retain_graph=True)
            return (v + inverse @ (moved.T @ P)).flatten()

        return product
