"""Back: the gradients of all parameters below a tensor, as equations of the inputs, where what came back to it is known."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp

from unbatch.inversion.descent.separation import CLIENT_ROUNDINGS

DROWNED = 0.1  # of a tensor's gradient, which float32's rounding may be before it is left out


class Back:
    """How far inputs are from the gradients of the parameters below a tensor, given what came back to that tensor.

    Those are sums over the whole batch. `seen` holds them by the names that the parameters have in `below`; `delta`
    [n, ...] is what came back, `eps` the rounding of the update's type.

    >>> net, x, delta = nn.Linear(2, 1).double(), torch.ones(1, 2).double(), torch.full((1, 1), 3.0).double()
    >>> back = Back(net, delta, {"weight": torch.tensor([[3.0, 3.0]]).double()})
    >>> float(back(x)), back.off(2 * x).round(decimals=4).tolist()
    (0.0, [0.7071, 0.7071])
    """

    def __init__(self, below: nn.Module, delta: Tensor, seen: Mapping[str, Tensor], eps: float = 0.0) -> None:
        self.below, self.delta, self.seen, self.eps = below, delta, dict(seen), eps
        self.units = {name: float(gradient.norm()) for name, gradient in seen.items()}

    def __call__(self, x: Tensor) -> Tensor:
        """The mean over the parameters of |dL/dW - seen|^2 / |seen|^2, differentiable."""
        made = self._made(x)
        parts = [(made[name] - seen).square().sum() / seen.square().sum() for name, seen in self.seen.items()]
        return torch.stack(parts).mean()

    def off(self, x: Tensor) -> Tensor:
        """dL/dW - seen of all parameters as one vector [e], each in units of its own; differentiable."""
        made = self._made(x)
        return torch.cat([((made[name] - seen) / self.units[name]).flatten() for name, seen in self.seen.items()])

    def noise(self, delta: float) -> Tensor:
        """The standard deviation [e] of the entries of `off`, where what came back is known up to `delta`, relative."""
        sigma = max(CLIENT_ROUNDINGS * self.eps, delta)
        each = (seen.new_full((seen.numel(),), sigma / seen.numel() ** 0.5) for seen in self.seen.values())
        return torch.cat(list(each))

    def single(self) -> Back:
        """The same in float32."""
        found = copy.copy(self)
        found.below, found.delta = copy.deepcopy(self.below).float(), self.delta.float()
        found.seen = {name: gradient.float() for name, gradient in self.seen.items()}
        return found

    def weighed(self, x: Tensor) -> Back:
        """The same with every tensor in units of its rounding, measured at inputs x by float32 beside float64.

        Sums that nearly cancel are rounded by more than they are (a bias before a norm, say): these are left out.
        """
        fine, coarse = self._made(x.double()), self.single()._made(x.float())
        found = Back(self.below, self.delta, {}, self.eps)
        for name, seen in self.seen.items():
            off = float((coarse[name].double() - fine[name]).norm() / fine[name].norm().clamp_min(1e-300))
            if off < DROWNED:
                roundings = off / torch.finfo(torch.float32).eps
                found.seen[name] = seen
                found.units[name] = float(seen.norm()) * max(1.0, roundings / CLIENT_ROUNDINGS)
        return found

    def _made(self, x: Tensor) -> dict[str, Tensor]:
        weights = {name: weight for name, weight in self.below.named_parameters() if name in self.seen}

        def run(own: dict[str, Tensor]) -> Tensor:
            made: Tensor = functional_call(self.below, own, (x,))
            return made

        found: dict[str, Tensor] = vjp(run, weights)[1](self.delta)[0]
        return found
