"""What weights' gradients can determine of a batch's maps, counted, against the rank of the equations themselves."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from unbatch.numerics.windows.equation_count import EquationCount
from unbatch.numerics.windows.geometry import Windows
from unbatch.numerics.windows.weight_equations import weight_equations

PLAIN = Windows.of((1, 6, 6), kernel=(3, 3), padding=(1, 1))
STRIDED = Windows.of((1, 6, 6), kernel=(3, 3), stride=(2, 2), padding=(1, 1))
SHORTCUT = Windows.of((1, 6, 6), kernel=(1, 1), stride=(2, 2))
UNPADDED = Windows.of((1, 6, 6), kernel=(3, 3), stride=(2, 2))
DILATED = Windows.of((1, 6, 6), kernel=(3, 3), padding=(2, 2), dilation=(2, 2))
WIDE = Windows.of((1, 6, 6), kernel=(5, 5), padding=(2, 2))


def rank(readers: Sequence[tuple[int, Windows]], n: int) -> int:
    rng = torch.Generator().manual_seed(0)
    made = [
        weight_equations(torch.randn(n, c, len(windows), generator=rng, dtype=torch.float64), windows)
        for c, windows in readers
    ]
    return int(torch.linalg.matrix_rank(torch.cat(made)))


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize(
    "readers",
    [
        [(4, PLAIN)],
        [(20, PLAIN)],
        [(8, STRIDED)],
        [(8, STRIDED), (8, SHORTCUT)],
        [(3, STRIDED), (5, PLAIN)],
        [(12, UNPADDED)],
        [(6, DILATED)],
        [(3, WIDE)],
    ],
)
def test_the_count_is_the_rank_for_random_gradients(readers: Sequence[tuple[int, Windows]], n: int) -> None:
    assert EquationCount.of(readers).most(n) == rank(readers, n)


@pytest.mark.parametrize("readers", [[(16, PLAIN)], [(18, STRIDED), (9, SHORTCUT)], [(27, STRIDED)]])
def test_the_largest_batch_is_the_last_one_that_is_determined(readers: Sequence[tuple[int, Windows]]) -> None:
    count = EquationCount.of(readers)
    n = count.largest
    assert n >= 1
    assert rank(readers, n) == n * count.entries
    assert rank(readers, n + 1) < (n + 1) * count.entries


def test_entries_that_no_window_holds_are_never_determined() -> None:
    count = EquationCount.of([(100, SHORTCUT)])
    assert (count.largest, count.most(1), count.entries) == (0, 9, 36)


def test_a_dense_layer_is_one_place_on_one_entry() -> None:
    count = EquationCount.of([(10, Windows.of((1, 1, 1), kernel=(1, 1)))])
    assert (count.largest, count.most(7), count.most(12)) == (10, 7, 10)
