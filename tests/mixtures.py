"""Mixtures of known truth, made without a model: the gradients of random networks with one hidden layer."""

import torch
from torch import Tensor
from torch.nn import functional as F

from unbatch.numerics.unmix.mixture import Mixture

ACTIVATIONS = {
    "gelu": F.gelu,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "leaky": F.leaky_relu,
    "softplus": F.softplus,
    "elu": F.elu,
}
SWITCHES = {"relu": torch.relu, "leaky": F.leaky_relu, "hardtanh": F.hardtanh}


class Problem:
    """n random inputs [n, d] of a network of width m with k outputs; its gradient as a mixture, and the truth."""

    def __init__(self, activation="gelu", *, n=6, d=12, m=80, k=4, seed=0, real=False, bias=True, twins=None) -> None:
        rng = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64)  # noqa: E731
        s = (ACTIVATIONS | SWITCHES)[activation]
        self.x = torch.cat([draw(n, d), torch.ones(n, 1, dtype=torch.float64)], 1)[:, : d + bias]
        if twins is not None:
            self.x[1, :d] = self.x[0, :d] + twins * draw(d)
        W, V = draw(m, d + bias) / d**0.5, draw(k, m) / m**0.5
        self.y = draw(n, k) if real else torch.randint(k, (n,), generator=rng)

        def deltas(before: Tensor, y: Tensor) -> Tensor:
            live = before if before.requires_grad else before.detach().requires_grad_()
            with torch.enable_grad():
                out = s(live) @ V.T
                loss = (out - y).square().sum() if real else F.cross_entropy(out, y, reduction="sum")
                return torch.autograd.grad(loss / n, live, create_graph=before.requires_grad)[0]

        A = deltas(self.x @ W.T, self.y).T @ self.x
        U, S, P = (
            part[..., :n] if i < 2 else part[:n] for i, part in enumerate(torch.linalg.svd(A, full_matrices=False))
        )
        self.P, self.A, self.rng = P, A, rng
        noise = 1e-12 * float(S[0])
        ones = P[:, -1].clone() if bias else None
        eye = torch.eye(n, dtype=torch.float64)
        self.mixture = Mixture(U, S, P @ W.T, None, ones, deltas, 0 if real else k, k, noise, 1e-14, eye)
        self.z = self.x @ P.T

    def near(self, error: float) -> Tensor:
        noise = torch.randn(self.z.shape, generator=self.rng, dtype=torch.float64)
        return self.mixture.scaled(self.z + error * self.z.norm(dim=1, keepdim=True) * F.normalize(noise, dim=1))
