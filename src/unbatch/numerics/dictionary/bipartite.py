"""Bipartite law: what the span of sums u_a + v_b tells of the pairs (a, b) that are in it.

A token at a position enters a transformer as one vector of a token plus one of a position. Take the pairs that occur as the
edges of a graph between tokens and positions. The span of their sums has dimension tokens + positions - components, and
every pair inside a component lies in it, whether it occurs or not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Components:
    """The connected parts of a graph between two kinds of things.

    >>> components(torch.eye(3, dtype=torch.bool)).count
    3
    """

    left: Tensor  # [a], the component of each thing of the first kind; -1: in no pair
    right: Tensor  # [b]
    count: int

    @property
    def rank(self) -> int:
        """The dimension of the span of u_a + v_b over the pairs, for vectors in general position."""
        return int((self.left >= 0).sum()) + int((self.right >= 0).sum()) - self.count


def components(pairs: Tensor) -> Components:
    """The connected parts of the graph whose edges are the true entries of `pairs` [a, b].

    rank of {u_a + v_b} = used a + used b - components: along a cycle the alternating sum of its edges vanishes, and the
    edges of a forest are independent.

    >>> pairs = torch.tensor([[True, True, False], [True, False, False], [False, False, True]])
    >>> found = components(pairs)
    >>> found.left, found.right, found.count, found.rank
    (tensor([0, 0, 1]), tensor([0, 0, 1]), 2, 4)
    """
    left, right = torch.full((len(pairs),), -1), torch.full((pairs.shape[1],), -1)
    edges, count = pairs.to(torch.float32), 0
    for start in pairs.any(1).nonzero().flatten().tolist():
        if left[start] >= 0:
            continue
        mine = torch.zeros(len(pairs), dtype=torch.bool)
        mine[start] = True
        while True:
            reached = (mine.to(torch.float32) @ edges) > 0
            grown = (edges @ reached.to(torch.float32)) > 0
            if torch.equal(grown, mine):
                break
            mine = grown
        left[mine], right[reached] = count, count
        count += 1
    return Components(left, right, count)


def closure(pairs: Tensor) -> Tensor:
    """Which pairs [a, b] lie in the span of those in `pairs`: every one whose two ends are in one component.

    u_a + v_b is the alternating sum of the edges along a path from a to b.

    >>> closure(torch.tensor([[True, True, False], [True, False, False], [False, False, True]])).int()
    tensor([[1, 1, 0],
            [1, 1, 0],
            [0, 0, 1]], dtype=torch.int32)
    """
    found = components(pairs)
    return (found.left[:, None] == found.right[None, :]) & (found.left[:, None] >= 0)


def proven(pairs: Tensor) -> Tensor:
    """Which pairs of a closure [a, b] must occur, whatever pairs it is the closure of.

    A component of one a or of one b is a star, and needs each of its edges. In any other one each edge can be left out.

    >>> proven(torch.tensor([[True, True, False], [True, True, False], [False, False, True]])).int()
    tensor([[0, 0, 0],
            [0, 0, 0],
            [0, 0, 1]], dtype=torch.int32)
    """
    degree_left, degree_right = pairs.sum(1), pairs.sum(0)
    return pairs & ((degree_left[:, None] == 1) | (degree_right[None, :] == 1))
