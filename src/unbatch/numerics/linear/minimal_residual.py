"""Minimal residual: linear systems that are known by products with their matrix alone, which need not be symmetric."""

from __future__ import annotations

import torch
from torch import Tensor

from unbatch.numerics.callables import Apply


def minimal_residual(apply: Apply, b: Tensor, *, products: int, tolerance: float) -> Tensor:
    """The solution of A x = b by GMRES: of all x in the span of b, A b, A^2 b, ... the one with the least |A x - b|.

    An orthonormal basis of that span is kept, so that memory grows with the products. It ends where |A x - b| is below
    `tolerance` times |b|, or after so many `products`. Few are needed where A is near a multiple of the identity.

    b: of any shape. Source: Saad and Schultz, GMRES (SIAM Journal on Scientific and Statistical Computing, 1986).

    >>> A = torch.tensor([[1.0, 0.5], [0.0, 1.0]], dtype=torch.float64)
    >>> minimal_residual(A.matmul, torch.tensor([2.0, 2.0], dtype=torch.float64), products=5, tolerance=1e-9)
    tensor([1., 2.], dtype=torch.float64)
    """
    size = float(b.norm())
    if not size > 0:
        return torch.zeros_like(b)
    basis = b.new_empty(products + 1, b.numel())
    basis[0] = b.flatten() / size
    made = b.new_zeros(products + 1, products)  # A basis[k] in the basis
    side = b.new_zeros(products + 1)
    side[0] = size
    found = b.new_zeros(0)
    for k in range(products):
        known, image = basis[: k + 1], apply(basis[k].view_as(b)).flatten()
        for _ in range(2):  # once more for what rounding left along the basis
            along = known @ image
            made[: k + 1, k] += along
            image = image - along @ known
        made[k + 1, k] = image.norm()
        found = torch.linalg.lstsq(made[: k + 2, : k + 1], side[: k + 2, None]).solution[:, 0]
        left = float((made[: k + 2, : k + 1] @ found - side[: k + 2]).norm())
        if left <= tolerance * size or not float(made[k + 1, k]) > torch.finfo(b.dtype).eps * float(
            made[: k + 1, k].norm()
        ):
            break
        basis[k + 1] = image / made[k + 1, k]
    x: Tensor = found @ basis[: len(found)]
    return x.view_as(b)
