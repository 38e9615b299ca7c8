"""Sharing: a gradient of vectors s (u_a + v_b) taken apart into what belongs to each a, and which of them stand at b."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unbatch.numerics.dictionary.bipartite import components


@dataclass(frozen=True, eq=False)
class Shares:
    """What each token at each position has of a gradient, as far as linear algebra tells.

    >>> x = torch.eye(4, dtype=torch.float64)[None]
    >>> found = token_shares(x[:, :2], torch.ones(1, 2, dtype=torch.bool), torch.tensor([[2.0, 3.0, 0.0, 0.0]]).double())
    >>> found.sums[found.row].squeeze(2)  # one token at two positions: each pair by itself
    tensor([[2., 3.]], dtype=torch.float64)
    """

    sums: Tensor  # [r, m], sums of delta over the occurrences of a token, or of one pair where pairs are independent
    row: Tensor  # [a, b], which of them is a pair's; -1 where the pair is not allowed
    share: Tensor  # [a, b], of what stands at a position: about 1 of a token that occurs there and nowhere else


def token_shares(x: Tensor, allowed: Tensor, gradient: Tensor) -> Shares:
    """The sums of delta by token, and the share of each token in each position, of a gradient sum delta x^T.

    x [a, b, d] are vectors s_ab (u_a + v_b), `allowed` [a, b] a closure. In a component the scales are told by the one
    relation that two tokens at two positions have. In the vectors u_a and v_b, independent but for one, the gradient is
    sum_a U_a u_a^T + sum_b V_b v_b^T, U_a the sum of s delta over the occurrences of a, and V_b over those at b. So V_b is
    the sum of the U_a of the tokens at b that occur nowhere else, and of parts of others: least squares finds the former.

    >>> r = torch.Generator().manual_seed(0)
    >>> u, v = (torch.randn(*side, 9, generator=r, dtype=torch.float64) for side in ((3, 1), (1, 2)))
    >>> x = torch.nn.functional.normalize(u + v, dim=2)
    >>> delta = torch.randn(7, 3, generator=r, dtype=torch.float64)
    >>> gradient = delta @ torch.stack([x[0, 0], x[1, 1], x[2, 0]])
    >>> found = token_shares(x, torch.ones(3, 2, dtype=torch.bool), gradient)
    >>> found.share.round().abs().int().tolist()  # the second token stands at the second position
    [[1, 0], [0, 1], [1, 0]]
    """
    parts = components(allowed.cpu())
    basis, held = list[Tensor](), list[tuple[Tensor, Tensor, int]]()
    row = torch.full(allowed.shape, -1)
    for c in range(parts.count):
        left, right = ((side == c).nonzero().flatten() for side in (parts.left, parts.right))
        if len(left) == 1 or len(right) == 1:
            row[left[:, None], right[None]] = len(basis) + torch.arange(len(left) * len(right)).view(len(left), -1)
            basis += list(x[left[:, None], right[None]].flatten(0, 1))
            continue
        held.append((left, right, len(basis)))
        row[left[:, None], right[None]] = (len(basis) + torch.arange(len(left)))[:, None].expand(-1, len(right))
        basis += _formal(x[left][:, right])
    sums = torch.linalg.lstsq(torch.stack(basis).T, gradient.T).solution  # [r, m]
    share = (row >= 0).to(x.dtype)
    for left, right, start in held:
        own = sums[start : start + len(left)]
        others = sums[start + len(left) : start + len(left) + len(right) - 1]
        at = torch.cat([(own.sum(0) - others.sum(0))[None], others])  # [b, m]
        share[left[:, None], right[None]] = torch.linalg.lstsq(own.T, at.T).solution.to(share)
    return Shares(sums, row.to(x.device), share)


def _formal(x: Tensor) -> list[Tensor]:
    """Vectors u_a + v_0 of each a, then v_b - v_0 of each other b, of a whole component s_ab (u_a + v_b) [a, b, d]."""

    def relation(a: int, b: int) -> Tensor:
        """The coefficients of x_00, x_0b, x_a0 and x_ab that give zero: 1 / s, of alternating signs."""
        four = torch.stack([x[0, 0], x[0, b], x[a, 0], x[a, b]], 1)
        found: Tensor = torch.linalg.svd(four, full_matrices=False)[2][-1]
        return found

    tokens = [x[0, 0]]
    for a in range(1, len(x)):
        n = relation(a, 1)
        tokens.append(-x[a, 0] * n[2] / n[0])
    places = []
    for b in range(1, x.shape[1]):
        n = relation(1, b)
        places.append(-x[0, b] * n[1] / n[0] - x[0, 0])
    return tokens + places
