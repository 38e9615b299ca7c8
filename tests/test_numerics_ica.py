import pytest
import torch
from torch.nn.functional import normalize

from unbatch.case import Case
from unbatch.numerics.unmix.ica import edges, fast_ica, group_ica, whiten


def photos(n: int) -> torch.Tensor:
    return Case.parse(f"photos:batch={n}").setting().inputs.double().flatten(1)


def mixed(x: torch.Tensor, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """An orthonormal basis of x's rows, and the rows' coordinates in it."""
    rng = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(len(x), len(x), generator=rng, dtype=torch.float64))[0]
    P = turn @ torch.linalg.svd(x, full_matrices=False)[2]
    return P, x @ P.T


def cosines(found: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    return (normalize(found, dim=1) @ normalize(true, dim=1).T).abs().max(0).values


def random_turn(n: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(1)
    return torch.linalg.qr(torch.randn(n, n, generator=rng, dtype=torch.float64))[0]


def test_edges_commute_with_mixing_and_ignore_brightness() -> None:
    x = photos(3)
    M = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(
        edges(M @ x, (3, 32, 32)), torch.einsum("ki,igp->kgp", M, edges(x, (3, 32, 32))), rtol=1e-9, atol=1e-12
    )
    torch.testing.assert_close(edges(x + 7, (3, 32, 32)), edges(x, (3, 32, 32)))
    picture = torch.arange(12, dtype=torch.float64).reshape(1, 12)
    across, down = edges(picture, (1, 3, 4))[0].reshape(2, 3, 4)
    assert bool((across[:, :-1] == 1).all())
    assert bool((down[:-1] == 4).all())
    assert not across[:, -1].any()
    assert not down[-1].any()


def test_white_is_white_and_flat_directions_stay_finite() -> None:
    signals = edges(photos(4), (3, 32, 32))
    white, T = whiten(signals)
    flat = white.flatten(1)
    torch.testing.assert_close(flat @ flat.T / flat.shape[1], torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(flat, T @ signals.flatten(1))
    constant = torch.cat([signals, torch.zeros_like(signals[:1])])
    assert bool(whiten(constant)[0].isfinite().all())


def test_groups_of_edges_tell_photographs_better_than_single_entries() -> None:
    P, Z = mixed(photos(16))
    white, T = whiten(edges(P, (3, 32, 32)))
    back = torch.linalg.inv(T)  # rows of Z T^-1 are mixed by an orthogonal matrix if the edges are uncorrelated
    grouped = cosines(group_ica(white, random_turn(16)), Z @ back)
    single = cosines(fast_ica(white, torch.Generator().manual_seed(0)), Z @ back)
    assert float(grouped.mean()) > 0.97
    assert float(1 - grouped.mean()) < 0.8 * float(1 - single.mean())


@pytest.mark.parametrize("sources", ["groups", "single"])
def test_independent_sources_are_found(sources: str) -> None:
    rng = torch.Generator().manual_seed(0)
    n, g, p = 5, 3, 4000
    size = torch.randn(n, 1, p, generator=rng, dtype=torch.float64).abs() ** 3
    s = size * torch.randn(n, g, p, generator=rng, dtype=torch.float64)  # entries of a group are large together
    mix = torch.randn(n, n, generator=rng, dtype=torch.float64)
    observed = torch.einsum("ij,jgp->igp", mix, s)
    white, T = whiten(observed)
    starts = [group_ica(white, random_turn(n))] if sources == "groups" else [fast_ica(white, rng) for _ in range(3)]
    gains = [normalize(W @ T @ mix * s.flatten(1).norm(dim=1), dim=1).abs() for W in starts]
    assert max(float(gain.max(0).values.min()) for gain in gains) > 0.99  # a single start may end elsewhere


def test_the_start_comes_from_the_generator_alone() -> None:
    white, _ = whiten(edges(photos(4), (3, 32, 32)))
    a, b = (fast_ica(white, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a, b)
