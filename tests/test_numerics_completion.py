"""Spans that lack directions of their windows, completed by padding, against the windows themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unbatch
from unbatch import Protocol
from unbatch.attacks import Descend
from unbatch.numerics.windows.completion import bordering, completed_span, largest_completed
from unbatch.numerics.windows.geometry import Windows

SQUARE = Windows.of((24, 4, 4), kernel=(3, 3), padding=(1, 1))


def span(windows: Windows, n: int, outputs: int) -> tuple[Tensor, Tensor]:
    """What a gradient of so many outputs gives of the windows of n random maps, and the windows on the border's entries."""
    rng = torch.Generator().manual_seed(n)
    x = torch.randn(n, *windows.shape, generator=rng, dtype=torch.float64).relu()
    held = windows.rows(x).flatten(0, 1)
    mixed = torch.randn(outputs, len(held), generator=rng, dtype=torch.float64) @ held
    return torch.linalg.qr(mixed.T).Q.T, bordering(windows).rows(x).flatten(0, 1)


@pytest.mark.parametrize("outputs", [24, 31])
def test_every_window_is_in_the_completed_span(outputs: int) -> None:
    rows, own = span(SQUARE, 2, outputs)
    whole = completed_span(rows, SQUARE, 2)
    assert whole is not None
    assert whole.shape == (32, 192)
    assert torch.allclose(own @ whole.T @ whole, own, atol=1e-10)


def test_no_more_may_be_missing_than_there_are_windows_at_an_edge() -> None:
    assert largest_completed(SQUARE, 24) == 2
    assert largest_completed(SQUARE, 23) == 1
    assert completed_span(span(SQUARE, 2, 23)[0], SQUARE, 2) is None


def test_another_batch_size_is_no_solution() -> None:
    rows, _ = span(SQUARE, 2, 30)
    assert completed_span(rows, SQUARE, 3) is None


@pytest.mark.parametrize(
    "windows",
    [
        Windows.of((24, 6, 6), kernel=(3, 3)),
        Windows.of(
            (24, 8, 8), kernel=(3, 3), stride=(2, 2), padding=(1, 1)
        ),  # its first window is padding on all of them
    ],
    ids=["unpadded", "strided"],
)
def test_what_padding_does_not_say_is_not_said(windows: Windows) -> None:
    assert largest_completed(windows, 28) == 0
    assert completed_span(span(windows, 2, 28)[0], windows, 2) is None


@pytest.mark.parametrize("outputs", [26, 32])
def test_a_batch_with_more_windows_than_outputs_is_told_apart(outputs: int) -> None:
    """Two examples of sixteen windows; of 32 outputs one is off for both."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, outputs, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * outputs, 3),
    ).double()
    with torch.no_grad():
        net[2].bias[0] -= 100 * (outputs == 32)
    x = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sent = unbatch.observe(net, F.cross_entropy, x, torch.tensor([0, 2]), protocol=Protocol(mode="eval"))[0]
    found = Descend()(sent)
    assert found.trace["layer"] == "2"
    assert found.inputs is not None
    assert found.bound is not None
    far = torch.cdist(found.inputs.flatten(1), x.flatten(1)).min(1).values / found.inputs.flatten(1).norm(dim=1)
    assert len(found) == 2
    assert bool((far < 1e-9).all())
    assert bool((far <= found.bound).all())
