"""Slopes: deltas that are the activation's slope times the residual's share, and guesses brought near examples by them."""

from dataclasses import replace

import pytest
import torch
from mixtures import Problem
from torch import Tensor
from torch.nn import functional as F

from unbatch.numerics.unmix.alternation import Slopes, approach, slopes
from unbatch.numerics.unmix.equation import choose_labels
from unbatch.numerics.unmix.mixture import Mixture
from unbatch.numerics.unmix.solver import best_apart, unmix

SMOOTH = {"gelu": F.gelu, "tanh": torch.tanh, "softplus": F.softplus, "elu": F.elu}


def told_by(p: Problem) -> Slopes:
    found = slopes(p.mixture, p.z, p.rng)
    assert found is not None
    return found


@pytest.mark.parametrize("activation", SMOOTH)
def test_the_table_is_the_slope_of_the_activation_up_to_a_factor(activation: str) -> None:
    p = Problem(activation)
    found = told_by(p)
    t = torch.linspace(-1, 1, 201, dtype=torch.float64, requires_grad=True)
    slope = torch.autograd.grad(SMOOTH[activation](t).sum(), t)[0]
    told, rise = found(t.detach())
    factor = float(slope @ told / (told @ told))
    torch.testing.assert_close(factor * told, slope, atol=1e-4, rtol=0)
    steep = ((found(t + 1e-2)[0] - found(t - 1e-2)[0]) / 2e-2).detach()
    smooth = t.detach().abs() > 0.02  # elu's kink
    torch.testing.assert_close(rise[smooth], steep[smooth], atol=0.02, rtol=0)


@pytest.mark.parametrize("activation", SMOOTH)
def test_deltas_are_the_slope_times_the_drive_up_to_a_factor(activation: str) -> None:
    p = Problem(activation)
    found, before = told_by(p), p.mixture.before(p.z)
    drive = found.drive(p.mixture, before, p.y)
    torch.testing.assert_close(drive.square().mean(1), torch.ones(6, dtype=torch.float64))
    told, delta = (F.normalize(t, dim=1) for t in (found(before)[0] * drive, p.mixture.F(p.z, p.y)))
    torch.testing.assert_close(told, delta, atol=1e-5, rtol=0)


@pytest.mark.parametrize("activation", ["relu", "leaky", "hardtanh"])
def test_a_slope_that_jumps_has_no_table(activation: str) -> None:
    p = Problem(activation)
    assert slopes(p.mixture, p.z, p.rng) is None


def test_other_deltas_have_no_slopes() -> None:
    p = Problem("tanh")
    assert slopes(Problem("tanh", real=True).mixture, p.z, p.rng) is None
    V, A = (torch.randn(r, c, generator=p.rng, dtype=torch.float64) / c**0.5 for r, c in ((30, 80), (4, 30)))

    def deep(before: Tensor, y: Tensor) -> Tensor:
        live = before.detach().requires_grad_()
        with torch.enable_grad():
            value = F.cross_entropy(torch.tanh(torch.tanh(live) @ V.T) @ A.T, y, reduction="sum")
            return torch.autograd.grad(value, live)[0]

    assert slopes(replace(p.mixture, deltas=deep), p.z, p.rng) is None  # neurons above hold it to all preactivations

    def half(before: Tensor, y: Tensor) -> Tensor:
        live = before.detach().requires_grad_()
        with torch.enable_grad():
            hidden = torch.cat([torch.tanh(live[:, :40]), F.gelu(live[:, 40:])], 1)
            return torch.autograd.grad(F.cross_entropy(hidden @ V[:4].T, y, reduction="sum"), live)[0]

    assert slopes(replace(p.mixture, deltas=half), p.z, p.rng) is None  # two activations in one layer


@pytest.mark.parametrize(
    ("activation", "bias", "share"),
    [("tanh", True, 0.8), ("tanh", False, 0.9), ("elu", True, 0.35), ("elu", False, 0.6)],
)
def test_guesses_far_off_come_near(activation: str, bias: bool, share: float) -> None:
    """Of one problem's 40 guesses the share differs by a tenth from processor to processor: three problems' mean."""
    near = []
    for seed in range(3):
        p = Problem(activation, n=40, d=60, m=300, bias=bias, seed=seed)
        guesses = p.near(0.45)
        moved = approach(p.mixture, told_by(p), guesses, p.y)
        before, after = ((z - p.z).norm(dim=1) / p.z.norm(dim=1) for z in (guesses, moved))
        assert float(before.min()) > 0.3
        near.append(float((after < 0.05).double().mean()))
    assert sum(near) / 3 > share


def test_nothing_moves_where_nothing_is_guessed() -> None:
    p = Problem("tanh")
    assert approach(p.mixture, told_by(p), p.z[:0], p.y[:0]).shape == (0, 6)
    assert slopes(p.mixture, p.z[:0], p.rng) is None


def test_the_nearest_come_first_and_parallel_ones_once() -> None:
    p = Problem("gelu")
    classes = torch.arange(4)
    near, far = p.near(0.001), p.near(0.3)
    kept = best_apart(p.mixture, torch.cat([far, near, near * 1.001, torch.full((1, 6), torch.nan).double()]), classes)
    assert all(any(torch.equal(z, one) for one in torch.cat([near, near * 1.001])) for z in kept[:6])
    unit = F.normalize(kept, dim=1)
    assert float((unit @ unit.T - torch.eye(len(unit)).double()).abs().max()) < 0.995


def test_labels_of_guesses_are_the_ones_that_fit() -> None:
    p: Problem = Problem("elu", n=40, d=60, m=300)
    mixture: Mixture = p.mixture
    moved = approach(mixture, told_by(p), p.near(0.3), p.y)
    assert float((choose_labels(mixture, moved, torch.arange(4)) == p.y).double().mean()) > 0.8


def test_what_goes_astray_stays_as_it_was() -> None:
    p = Problem("elu", n=80, d=100, m=300)
    guesses = p.near(0.5)  # most of elu's, whose slope is flat beyond 0
    moved = approach(p.mixture, told_by(p), guesses, p.y)
    kept, off = (moved == guesses).all(1), (moved - p.z).norm(dim=1) / p.z.norm(dim=1)
    assert float(kept.double().mean()) > 0.5
    assert float(off[~kept].median()) < 0.05


@pytest.mark.parametrize("activation", ["tanh", "gelu"])
def test_more_of_a_large_batch_are_found_at_once(activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for few in (64, 1000):  # with and without
        monkeypatch.setattr("unbatch.numerics.unmix.solver.FEW_EXAMPLES", few)
        p = Problem(activation, n=80, d=100, m=300)
        guesses = p.near(0.5)

        def start(left: Mixture, rng: torch.Generator, guesses: Tensor = guesses) -> Tensor:
            return guesses @ left.basis.T

        separation = unmix(p.mixture, [("near", start)], p.rng, tick=lambda share: share < 1e-9)  # one round
        found[few] = separation.log[0]["found"]
        assert float(torch.cdist(separation.z, p.z).amin(1).max()) < 1e-6
    assert found[64] > found[1000] + 8
