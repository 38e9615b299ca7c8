import pytest
import torch
from torch import Tensor

from unbatch.numerics.linear import linsys
from unbatch.numerics.linear.linsys import LinearSystem


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(8, 5), (5, 8), (6, 6)])
def test_solve_is_the_least_squares_solution_of_least_norm(shape: tuple[int, int]) -> None:
    A, b = drawn(*shape), drawn(shape[0], seed=1)
    system = LinearSystem.of(A, b)
    torch.testing.assert_close(system.solve().x, torch.linalg.pinv(A) @ b, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(system.matrix(), A)
    assert system.rank() == min(shape)


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("shape", [(12, 9), (7, 9)])
def test_a_deficient_system(shape: tuple[int, int], small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linsys, "SVD_ENTRIES", 2**19 if small else 0)
    A, x = drawn(shape[0], 4) @ drawn(4, 9, seed=1), drawn(9, seed=2)
    system = LinearSystem.of(A, A @ x)
    found = system.solve()
    assert found.rank == system.rank() == 4
    seen = torch.linalg.pinv(A, rtol=1e-12) @ A
    torch.testing.assert_close(found.x, seen @ x, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(found.free(x[None])[0], x - seen @ x, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("way", ["squared", "iterated"])
@pytest.mark.parametrize("shape", [(60, 40), (30, 40)])
def test_every_way_gives_one_answer(way: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    A, b = drawn(*shape), drawn(shape[0], seed=1)
    monkeypatch.setattr(linsys, "SVD_ENTRIES" if way == "squared" else "MATRIX_ENTRIES", 0)
    found = LinearSystem.of(A, b).solve()
    torch.testing.assert_close(found.x, torch.linalg.pinv(A) @ b, rtol=1e-9, atol=1e-10)
    assert found.rank == (min(shape) if way == "squared" else None)


def test_refinement_makes_good_what_squaring_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linsys, "SVD_ENTRIES", 0)
    U, V = torch.linalg.qr(drawn(60, 40))[0], torch.linalg.qr(drawn(40, 40, seed=1))[0]
    A = U * torch.logspace(0, -6, 40, dtype=torch.float64) @ V.T
    x = drawn(40, seed=2)
    found = LinearSystem.of(A, A @ x).solve().x
    assert float((found - x).norm() / x.norm()) < 1e-9


def test_systems_add_and_select() -> None:
    A, x = drawn(3, 6), drawn(6, seed=1)
    which = torch.tensor([1, 4, 4])
    both = LinearSystem.of(A, A @ x) + LinearSystem.some(which, x[which], 6)
    dense = torch.cat([A, torch.eye(6, dtype=torch.float64)[which]])
    torch.testing.assert_close(both.matrix(), dense)
    torch.testing.assert_close(both.pull(drawn(2, 6)), drawn(2, 6) @ dense)
    assert float(both.residual(x).norm()) < 1e-12
    assert both.rank() == 5


def test_no_equations() -> None:
    none = LinearSystem.some(torch.zeros(0, dtype=torch.long), drawn(0), 4)
    assert none.matrix().shape == (0, 4)
    assert none.rank() == 0
    assert torch.equal(none.solve().x, torch.zeros(4, dtype=torch.float64))


def test_what_is_no_system_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no linear system"):
        LinearSystem.of(drawn(3, 2), drawn(2))
    with pytest.raises(ValueError, match="not finite"):
        LinearSystem.of(drawn(3, 2), drawn(3) / 0).solve()
    with pytest.raises(ValueError, match="on 2 and on 3 unknowns"):
        LinearSystem.of(drawn(3, 2), drawn(3)) + LinearSystem.of(drawn(3, 3), drawn(3))
    monkeypatch.setattr(linsys, "MATRIX_ENTRIES", 5)
    with pytest.raises(ValueError, match="3 x 2 is not held"):
        LinearSystem.of(drawn(3, 2), drawn(3)).matrix()


def test_an_svd_that_does_not_end_is_got_round(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args, **kwargs):
        raise torch.linalg.LinAlgError("failed to converge")

    A, x = drawn(12, 4) @ drawn(4, 9, seed=1), drawn(9, seed=2)
    expected = torch.linalg.pinv(A, rtol=1e-12) @ A @ x
    monkeypatch.setattr(torch.linalg, "svd", never)
    found = LinearSystem.of(A, A @ x).solve()
    assert found.rank == 4
    torch.testing.assert_close(found.x, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("least", "rank"), [(2e-6, 300), (1e-8, 299)])
def test_what_counts_as_zero_where_the_matrix_is_squared(
    least: float, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linsys, "SVD_ENTRIES", 0)
    U, V = torch.linalg.qr(drawn(300, 300))[0], torch.linalg.qr(drawn(300, 300, seed=1))[0]
    values = torch.ones(300, dtype=torch.float64)
    values[-1] = least
    A = U * values @ V.T
    assert LinearSystem.of(A, drawn(300)).rank() == rank
    wide = LinearSystem.of(A[:200], drawn(200)).solve()
    assert float((A[:200] @ wide.free(drawn(1, 300)).T).norm()) < 1e-12
