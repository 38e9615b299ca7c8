"""Wrong masks behind a ReLU, found by the equations that they break."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from unbatch.inversion.descent.masks import flipped, pursued
from unbatch.numerics.trimming import trimmed
from unbatch.numerics.windows.geometry import Windows
from unbatch.numerics.windows.weight_equations import weight_equations

WINDOWS, SINGLE = (Windows.of((c, 4, 4), kernel=(3, 3), padding=(1, 1)) for c in (6, 1))


def broken(outputs: int, wrong: list[tuple[int, int, int]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs [2, 6, 4, 4], deltas with wrong masks [2, outputs, 16], what flips change, and the true gradient's sides."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, 4, 4, generator=rng, dtype=torch.float64).relu()
    full = torch.randn(2, outputs, 16, generator=rng, dtype=torch.float64)
    mask = torch.rand(full.shape, generator=rng) > 0.5
    sides = weight_equations(full * mask, SINGLE) @ x.transpose(0, 1).flatten(1).T
    for entry in wrong:
        mask[entry] = ~mask[entry]
    return x, full * mask, full * (1 - 2 * mask.double()), sides


def test_a_channel_that_contradicts_the_rest_is_left_out_and_its_masks_are_mended() -> None:
    wrong = [(0, 3, 5), (1, 3, 2), (1, 20, 9)]
    x, deltas, flips, B = broken(40, wrong)
    U = torch.linalg.qr(weight_equations(deltas, SINGLE)).Q
    block = torch.arange(len(B)) // 9
    out, E = trimmed(U, B, block)
    assert out.nonzero().flatten().tolist() == [3, 20]
    off = E.view(40, 9, 6)[out].transpose(1, 2).flatten(1)
    found = flipped(off, flips[:, out], x, WINDOWS, torch.ones(2, 2, 16, dtype=torch.bool))
    assert {(i, (3, 20)[o], p) for i, o, p in found.nonzero().tolist()} == set(wrong)


@pytest.mark.parametrize("wrong", [[], [(1, 2, 7)], [(0, 1, 3), (1, 4, 11)]])
def test_masks_are_mended_where_hardly_more_equations_than_unknowns_are_left(wrong: list[tuple[int, int, int]]) -> None:
    x, deltas, flips, B = broken(6, wrong)
    U = torch.linalg.qr(weight_equations(deltas, SINGLE)).Q
    rows = torch.arange(len(B)).view(6, 9)
    left = B - U @ (U.T @ B)
    left = left if wrong else left + 1e-6 * torch.randn(left.shape, generator=torch.Generator().manual_seed(1)).double()
    found = pursued(left, U, rows, flips, x, WINDOWS, torch.ones(2, 6, 16, dtype=torch.bool))
    assert sorted(map(tuple, found.nonzero().tolist())) == sorted(wrong)
