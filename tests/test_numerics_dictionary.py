"""Row spaces as dictionaries: the law of pairs, and the test of membership in units of rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from unbatch.numerics.dictionary.bipartite import closure, components, proven
from unbatch.numerics.dictionary.membership import CUT, row_space
from unbatch.numerics.dictionary.sharing import token_shares


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn_pairs(seed: int, most: int = 30) -> Tensor:
    """A few pairs of 40 tokens and 12 positions, in one component or several."""
    r = rng(seed)
    pairs = torch.zeros(40, 12, dtype=torch.bool)
    k = int(torch.randint(1, most, (1,), generator=r))
    pairs[torch.randint(40, (k,), generator=r), torch.randint(12, (k,), generator=r)] = True
    return pairs


def sums(seed: int, width: int = 80) -> Tensor:
    """Layer norms of a token's vector plus a position's [40, 12, width]."""
    r = rng(seed)
    u, v = (torch.randn(n, width, generator=r, dtype=torch.float64) for n in (40, 12))
    return torch.nn.functional.layer_norm(u[:, None] + v[None], (width,))


@pytest.mark.parametrize("seed", range(20))
def test_the_rank_of_pairs_is_tokens_plus_positions_minus_components_and_their_closure_is_what_passes(
    seed: int,
) -> None:
    pairs, x = drawn_pairs(seed), sums(seed)
    inside = x[pairs]  # [k, d]
    gradient = torch.randn(120, len(inside), generator=rng(seed + 100), dtype=torch.float64) @ inside
    space = row_space(gradient, eps=torch.finfo(torch.float64).eps)
    assert space.rank == components(pairs).rank
    passes = space.members(x.flatten(0, 1)).view(40, 12)
    assert torch.equal(passes, closure(pairs))


@pytest.mark.parametrize("seed", range(20))
def test_a_proven_pair_is_in_every_batch_of_the_same_closure(seed: int) -> None:
    pairs = drawn_pairs(seed)
    whole = closure(pairs)
    sure = proven(whole)
    assert not bool((sure & ~pairs).any())
    for i, j in whole.nonzero().tolist():  # what is not proven can be left out
        less = whole.clone()
        less[i, j] = False
        assert torch.equal(closure(less), whole) is not bool(sure[i, j])


def test_components_name_what_is_in_no_pair() -> None:
    pairs = torch.zeros(3, 2, dtype=torch.bool)
    pairs[1, 1] = True
    found = components(pairs)
    assert found.left.tolist() == [-1, 0, -1]
    assert found.right.tolist() == [-1, 0]
    assert (found.count, found.rank) == (1, 1)
    assert components(torch.zeros(2, 2, dtype=torch.bool)).rank == 0


@pytest.mark.parametrize("kind", [torch.float64, torch.float32])
@pytest.mark.parametrize("decades", [0, 3])
def test_members_have_offness_about_one_whatever_the_precision_and_the_fall_of_singular_values(
    kind: torch.dtype, decades: int
) -> None:
    r, d = 30, 64
    x = torch.randn(r, d, generator=rng(0), dtype=torch.float64)
    delta = torch.randn(100, r, generator=rng(1), dtype=torch.float64) * torch.logspace(0, -decades, r).double()
    gradient = delta.to(kind) @ x.to(kind)
    space = row_space(gradient, eps=torch.finfo(kind).eps)
    assert space.rank == r
    assert not space.saturated
    members = space.offness(x)
    assert float(members.max()) < CUT / 2
    others = space.offness(torch.randn(1000, d, generator=rng(2), dtype=torch.float64))
    assert float(others.min()) > 4 * CUT
    assert space.gap > 10


def test_few_outside_directions_bound_the_distance_from_below() -> None:
    x = torch.randn(10, 40, generator=rng(0), dtype=torch.float64)
    space = row_space(torch.randn(50, 10, generator=rng(1), dtype=torch.float64) @ x, eps=1e-16)
    screens = space.outside(6)
    assert torch.allclose(screens @ screens.T, torch.eye(6, dtype=torch.float64), atol=1e-12)
    assert float((x @ screens.T).norm(dim=1).max()) < 1e-10
    other = torch.nn.functional.normalize(torch.randn(100, 40, generator=rng(2), dtype=torch.float64), dim=1)
    away = (other - other @ space.rows.T @ space.rows).norm(dim=1)
    assert bool(((other @ screens.T).norm(dim=1) <= away).all())


def test_a_gradient_that_is_full_says_so_and_a_vector_of_no_length_is_never_a_member() -> None:
    full = row_space(torch.randn(9, 5, generator=rng(0), dtype=torch.float64), eps=1e-16)
    assert full.saturated
    assert full.rank == 5
    assert row_space(torch.randn(9, 4, generator=rng(0)) @ torch.randn(4, 5, generator=rng(1)), eps=1e-7).saturated
    assert not row_space(torch.randn(9, 3, generator=rng(0)) @ torch.randn(3, 5, generator=rng(1)), eps=1e-7).saturated
    assert not bool(full.members(torch.zeros(1, 5, dtype=torch.float64)).any())
    assert row_space(torch.zeros(4, 3), eps=1e-7).rank == 0


@pytest.mark.parametrize("seed", range(20))
def test_a_gradient_s_shares_add_up_to_it_and_place_each_token_that_occurs_once(seed: int) -> None:
    pairs, x, r = drawn_pairs(seed, 12), sums(seed), rng(seed)
    allowed, delta = closure(pairs), torch.randn(60, int(pairs.sum()), generator=r, dtype=torch.float64)
    used = allowed.any(1)
    gradient = delta @ x[pairs]
    found = token_shares(x[used], allowed[used], gradient)
    once = (pairs[used].sum(1) == 1) & (allowed[used].sum(1) > 1)
    several = pairs[used].sum(1) > 1
    if not bool(several.any()):  # else parts of those that occur twice are spread over the others
        assert torch.allclose(found.share[once], pairs[used][once].double(), atol=1e-8)
    assert torch.equal(found.row >= 0, allowed[used])
    lone = (allowed[used].sum(1) == 1) & ~several
    for token in lone.nonzero().flatten().tolist():  # its own delta, in the vector's scale
        place = int(allowed[used][token].nonzero()[0])
        k = int((pairs.nonzero() == torch.tensor([int(used.nonzero()[token]), place])).all(1).nonzero()[0])
        own = found.sums[found.row[token, place]]
        assert abs(float(torch.nn.functional.cosine_similarity(own, delta[:, k], dim=0))) > 1 - 1e-8
