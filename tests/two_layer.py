"""Clients of two dense layers at the parameters of the theorem or at PyTorch's, and how far a reconstruction is off."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbatch.domain import Table
from unbatch.metric import match
from unbatch.numerics.moments.hermite import coefficients
from unbatch.reconstruction import Reconstruction
from unbatch.truth import Truth

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "leaky-relu": lambda t: F.leaky_relu(t, 0.01),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "gelu": F.gelu,
    "silu": F.silu,
    "elu": F.elu,
    "erf": lambda t: torch.erf(t / 2**0.5),
    "x2+x3": lambda t: t**2 + t**3,
}
ORDER = {
    "relu": 4,
    "leaky-relu": 4,
    "tanh": 3,
    "sigmoid": 3,
    "softplus": 4,
    "gelu": 4,
    "silu": 4,
    "elu": 3,
    "erf": 3,
    "x2+x3": 3,
}


class TwoLayer(nn.Module):
    """Flatten, dense, a function, dense."""

    def __init__(self, s: Callable[[Tensor], Tensor], d: int, m: int, k: int = 1, *, bias: bool = False) -> None:
        super().__init__()
        self.inner, self.outer, self.s = nn.Linear(d, m, bias=bias), nn.Linear(m, k, bias=bias), s

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.s(self.inner(x.flatten(1))))


def model(s: Callable[[Tensor], Tensor], d: int, m: int, k: int, rng: torch.Generator, *, default: bool) -> nn.Module:
    """At the paper's parameters (W normal, a = 1 / m, no bias) or at PyTorch's default law, with biases."""
    made = TwoLayer(s, d, m, k, bias=default).double()
    for p in made.parameters():
        p.data = torch.randn(p.shape, generator=rng, dtype=torch.float64)
    if default:
        for layer in (made.inner, made.outer):
            for p in layer.parameters():
                bound = layer.in_features**-0.5
                p.data = bound * (2 * torch.rand(p.shape, generator=rng, dtype=torch.float64) - 1)
    elif k == 1:
        made.outer.weight.data = torch.full_like(made.outer.weight, 1 / m)
    return made


def client(
    name: str,
    *,
    n: int = 2,
    d: int = 30,
    m: int = 2000,
    k: int = 1,
    default: bool = False,
    norm: float = 1.0,
    seed: int = 0,
) -> tuple[nn.Module, str, Tensor, Tensor]:
    """Model, loss, inputs and labels: inputs of that norm, the same for every m; classes, or for one output real numbers.

    These are E s(Z) +- [1, 2], which keeps residuals away from 0, as the theorem asks (its pi_min): an example without a
    residual sends nothing.
    """
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=rng, dtype=torch.float64)
    x *= norm / x.norm(dim=1, keepdim=True)
    y = torch.randn(n, 1, generator=rng).sign() * (1 + torch.rand(n, 1, generator=rng))
    classes = torch.randint(k, (n,), generator=rng)
    made = model(ACTIVATIONS[name], d, m, k, rng, default=default)
    if k > 1:
        return made, "cross-entropy", x, classes
    return made, "squared-error", x, y.double() + coefficients(ACTIVATIONS[name], scale=norm)[0]


def errors(found: Reconstruction, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Relative errors of the matched examples, and of what they claim relative to themselves."""
    matching = match(found, Truth(inputs=x, labels=y), Table(shape=tuple(x.shape[1:])))
    true = x[matching.true].double()
    assert matching.inputs is not None
    gap = (matching.inputs - true).flatten(1).norm(dim=1)
    assert found.bound is not None
    claim = gap / matching.inputs.flatten(1).norm(dim=1) <= found.bound[matching.found]
    return gap / true.flatten(1).norm(dim=1), claim
