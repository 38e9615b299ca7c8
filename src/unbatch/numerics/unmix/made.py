"""A made-up mixture whose examples are known, to try the functions of this folder on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from unbatch.numerics.unmix.mixture import Mixture


def made_mixture(
    n: int,
    activation: Callable[[Tensor], Tensor] = torch.tanh,
    *,
    d: int = 12,
    width: int = 80,
    classes: int = 4,
    seed: int = 0,
) -> tuple[Mixture, Tensor, Tensor]:
    """The mixture of n random examples in a random network with one hidden layer, and what is hidden in it.

    loss = mean cross entropy of V s(W x + b), x [d] normal, W [width, d], V [classes, width]; the mixture is of dL/d(W, b).
    Returns it with the coordinates z [n, n] and the labels y [n] of its examples.

    >>> mixture, z, y = made_mixture(4)
    >>> bool(((mixture.U * mixture.S) - mixture.F(z, y).T @ z).abs().max() < 1e-12)  # U S = sum_i delta_i z_i^T
    True
    """
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    x = torch.cat([draw(n, d), torch.ones(n, 1, dtype=torch.float64)], 1)
    W, V, y = (
        draw(width, d + 1) / d**0.5,
        draw(classes, width) / width**0.5,
        torch.randint(classes, (n,), generator=rng),
    )

    def deltas(before: Tensor, y: Tensor) -> Tensor:
        live = before if before.requires_grad else before.detach().requires_grad_()
        with torch.enable_grad():
            loss = torch.nn.functional.cross_entropy(activation(live) @ V.T, y, reduction="sum") / n
            return torch.autograd.grad(loss, live, create_graph=before.requires_grad)[0]

    A = deltas(x @ W.T, y).T @ x
    U, S, P = torch.linalg.svd(A, full_matrices=False)
    U, S, P = U[:, :n], S[:n], P[:n]
    mixture = Mixture(
        U=U,
        S=S,
        W=P @ W.T,
        offset=None,
        ones=P[:, -1].clone(),
        deltas=deltas,
        classes=classes,
        targets=classes,
        noise=1e-12 * float(S[0]),
        rounding=1e-14,
        basis=torch.eye(n, dtype=torch.float64),
    )
    return mixture, x @ P.T, y
