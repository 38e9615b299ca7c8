"""Runs: a network is cut behind its activations, and the kind of every run is told from its layers' rules alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from unbatch.inversion.backward.fold import State, step
from unbatch.inversion.backward.reading import KnownOutput, Unreadable
from unbatch.inversion.backward.runs import NonlinearRun, runs
from unbatch.models import small
from unbatch.network.chain import chain, follow

SHAPE = (3, 8, 8)


def conv(before: int, after: int) -> nn.Module:
    return nn.Conv2d(before, after, 3, padding=1)


def cut(*layers: nn.Module, shape: tuple[int, ...] = SHAPE, train: bool = False) -> list[str]:
    """Every run as kind: layers | what stands behind them."""
    found = runs(chain(nn.Sequential(*layers), shape, "train" if train else "eval"))
    kinds = [type(run).__name__.removesuffix("Run").lower() for run in found]
    links = [", ".join(link.name for link in run.links) for run in found]
    behind = [", ".join(layer.link.name for layer in run.behind) for run in found]
    return [f"{kind}: {own} | {last}".strip() for kind, own, last in zip(kinds, links, behind, strict=True)]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([conv(3, 4), nn.Tanh(), conv(4, 4), nn.ReLU(), nn.Flatten()], ["affine: 0 | 1", "affine: 2 | 3, 4"]),
        ([conv(3, 4), nn.BatchNorm2d(4), nn.AvgPool2d(2), nn.ELU()], ["affine: 0, 1, 2 | 3"]),
        ([nn.Softplus(), conv(3, 4), nn.Tanh()], ["activation: 0 |", "affine: 1 | 2"]),
        ([conv(3, 4), nn.Tanh(), nn.Identity(), nn.ELU()], ["affine: 0 | 1", "activation: 2, 3 |"]),
        ([nn.Identity(), nn.Tanh(), nn.Flatten()], ["activation: 0, 1 | 2"]),
        ([conv(3, 4), nn.Tanh(), nn.Identity(), conv(4, 4), nn.Flatten()], ["affine: 0 | 1", "affine: 2, 3 | 4"]),
        ([conv(3, 4), nn.Identity(), nn.Tanh(), nn.Dropout(0.5)], ["affine: 0 | 1, 2, 3"]),
        ([conv(3, 4), nn.GroupNorm(2, 4), nn.Tanh()], ["nonlinear: 0, 1 | 2"]),
        ([conv(3, 4), nn.Tanh(), nn.MaxPool2d(2)], ["affine: 0 | 1", "nonlinear: 2 |"]),
        ([conv(3, 4), nn.Tanh(), nn.MaxPool2d(1, stride=2)], ["affine: 0 | 1", "affine: 2 |"]),
        ([conv(3, 4), nn.GLU(1), conv(2, 4), nn.Tanh()], ["nonlinear: 0, 1, 2 | 3"]),
        ([conv(3, 4), nn.LeakyReLU(-0.2), conv(4, 4), nn.GELU()], ["nonlinear: 0, 1, 2 | 3"]),
        ([nn.Flatten(), nn.Identity()], []),
    ],
)
def test_a_network_is_cut_behind_its_activations(layers: list[nn.Module], expected: list[str]) -> None:
    assert cut(*layers) == expected


def test_dropout_and_batch_norm_in_train_mode_have_no_linear_way_back() -> None:
    assert cut(conv(3, 4), nn.Tanh(), nn.Dropout(0.5), train=True) == ["affine: 0 | 1", "nonlinear: 2 |"]
    assert cut(conv(3, 4), nn.BatchNorm2d(4), nn.Tanh(), train=True) == ["nonlinear: 0, 1 | 2"]


def test_the_last_layer_without_a_linear_way_back_is_named() -> None:
    (run,) = runs(chain(nn.Sequential(conv(3, 4), nn.GLU(1), nn.LayerNorm([2, 8, 8]), nn.Tanh()), SHAPE))
    assert isinstance(run, NonlinearRun)
    assert run.why == (
        "layer '2' (LayerNorm) cannot be read backward: its output does not hold the standard deviation by which its "
        "gradient was divided."
    )


def test_a_residual_block_stands_in_a_run_that_is_not_linear() -> None:
    model = small.build("resnet-small", SHAPE, 5, width=2, rng=torch.Generator().manual_seed(0))
    found = runs(chain(model, SHAPE)[:-1])
    assert [type(run).__name__ for run in found] == ["AffineRun", "NonlinearRun"]
    assert [link.name for link in found[0].whole] == ["conv1", "norm1", "relu1"]
    assert isinstance(found[1], NonlinearRun)
    assert found[1].why.startswith("layer 'block3'")


def test_every_link_is_in_one_run_and_in_its_place() -> None:
    layers = [nn.Softplus(), conv(3, 4), nn.Tanh(), nn.ELU(), nn.MaxPool2d(2), conv(4, 4), nn.Tanh(), nn.Flatten()]
    links = chain(nn.Sequential(*layers), SHAPE)
    assert [link for run in runs(links) for link in run.whole] == links


def test_a_step_leaves_its_state_as_it_was_and_merges_only_where_it_may() -> None:
    layers = [nn.Conv2d(1, 2, 3), nn.Tanh(), nn.LPPool2d(1, 2)]
    model = nn.Sequential(*layers).double()
    links = chain(model, (1, 6, 6))
    x = torch.rand(1, 1, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    known = KnownOutput(follow(links, x).detach(), torch.ones(1, 2, 2, 2, dtype=torch.float64), {})
    before, last = runs(links)
    state = State((known,), (0.0, 1.0))
    reading, opened = step(state, last, [before])
    assert reading is None
    assert opened.open is not None
    assert [link.name for link in opened.open.links] == ["2"]
    assert state.open is None
    with pytest.raises(Unreadable, match="layer '2'"):
        step(State((known,), None), last, [before])
    reading, _ = step(opened, before, [])
    assert reading is not None
    assert reading.layers == "0, 1, 2"
