"""Pullback: its residuals vanish at the truth, its system is the Jacobian, and Gauss-Newton comes back to the truth."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from unbatch.inversion.backward.pullback import Pullback
from unbatch.network.chain import chain
from unbatch.numerics.linear.linsys import LinearSystem

SHAPE = (2, 6, 6)
D = 72


class Setting:
    """A convolution and an activation, the system of a deficient layer above them, and the true input."""

    def __init__(self, act: nn.Module, rows: int = 90, *, gradients: bool = True, seed: int = 0) -> None:
        rng = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=rng, dtype=torch.float64)

        self.model = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), act, nn.Conv2d(6, 6, 3, padding=1, groups=2)).double()
        for p in self.model.parameters():
            p.data = draw(*p.shape) / p[0].numel() ** 0.5
        self.x = torch.rand(SHAPE, generator=rng, dtype=torch.float64)
        t = self.model(self.x[None])
        self.gradient = draw(*t.shape[1:])
        parameters = dict(self.model.named_parameters())
        found = torch.autograd.grad((t[0] * self.gradient).sum(), list(parameters.values()))
        self.update = dict(zip(parameters, found, strict=True)) if gradients else {}
        self.A = draw(rows, t.numel())
        self.t = t[0].detach()
        self.solution = LinearSystem.of(self.A, self.A @ self.t.flatten()).solve()
        assert self.solution.rank == min(rows, t.numel())
        links = chain(self.model, SHAPE)
        self.pullback = Pullback(links, self.solution.held(self.solution.x), self.gradient, self.update)
        self.draw = draw


ACTS = pytest.mark.parametrize("act", [nn.Tanh(), nn.Softplus(), nn.LeakyReLU(0.2), nn.SiLU()], ids=str)
SENT = pytest.mark.parametrize("gradients", [True, False], ids=["gradients", "system alone"])


@ACTS
@SENT
def test_no_residual_at_the_truth_and_some_elsewhere(act: nn.Module, gradients: bool) -> None:
    setting = Setting(act, gradients=gradients)
    assert float(setting.pullback(setting.x.flatten()).norm()) < 1e-12
    away = setting.x.flatten() + 1e-3 * setting.draw(D)
    assert float(setting.pullback(away).norm()) > 1e-4


@pytest.mark.parametrize("rows", [20, 90, 200])
def test_residuals_are_relative_and_do_not_see_what_the_system_leaves_open(rows: int) -> None:
    setting = Setting(nn.Tanh(), rows, gradients=False)
    x = setting.x.flatten() + 0.1 * setting.draw(D)
    off = (setting.model(x.view(1, *SHAPE))[0] - setting.t).detach().flatten()
    Q = torch.linalg.qr(setting.A.T).Q  # orthonormal basis of what the system sees
    expected = float((off @ Q).norm() / (setting.t.flatten() @ Q).norm())
    assert float(setting.pullback(x).detach().norm()) == pytest.approx(expected, rel=1e-9)


def test_gradients_stand_beside_the_system_each_relative_to_its_size() -> None:
    setting = Setting(nn.Tanh())
    plain = Setting(nn.Tanh(), gradients=False)
    x = setting.x.flatten() + 0.1 * setting.draw(D)
    found = setting.pullback(x).detach()
    cut = len(plain.pullback(x))
    torch.testing.assert_close(found[:cut], plain.pullback(x).detach())
    parameters = dict(setting.model.named_parameters())
    t = setting.model(x.view(1, *SHAPE))
    again = torch.autograd.grad((t[0] * setting.gradient).sum(), list(parameters.values()))
    wanted = {
        k: (g - setting.update[k]).flatten() / setting.update[k].norm() for k, g in zip(parameters, again, strict=True)
    }
    assert len(found) - cut == sum(len(part) for part in wanted.values())
    squares = sum(float(part.square().sum()) for part in wanted.values())
    assert float(found[cut:].square().sum()) == pytest.approx(squares, rel=1e-9)


@ACTS
@SENT
def test_the_system_is_the_jacobian(act: nn.Module, gradients: bool) -> None:
    setting = Setting(act, gradients=gradients)
    x = setting.x.flatten() + 0.1 * setting.draw(D)
    system = setting.pullback.system(x)
    J = torch.autograd.functional.jacobian(setting.pullback, x)
    torch.testing.assert_close(system.b, -setting.pullback(x).detach())
    v, u = setting.draw(5, D), setting.draw(5, len(J))
    torch.testing.assert_close(system.push(v), v @ J.T, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(system.pull(u), u @ J, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(system.matrix(), J, rtol=1e-9, atol=1e-11)
    assert not system.push(v).requires_grad
    assert not system.pull(u).requires_grad


@ACTS
@SENT
def test_gauss_newton_comes_back_to_the_truth(act: nn.Module, gradients: bool) -> None:
    setting = Setting(act, gradients=gradients)
    for seed in range(3):
        noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        fit = setting.pullback.solve(setting.x + 0.02 * noise)
        assert fit.x.shape == SHAPE
        assert fit.solution.rank == D
        assert fit.residual < 1e-12
        assert float((fit.x - setting.x).norm()) < 1e-10 * float(setting.x.norm())


def test_from_afar_where_the_activation_is_smooth() -> None:
    setting = Setting(nn.Softplus())
    fit = setting.pullback.solve(torch.zeros(SHAPE, dtype=torch.float64))
    assert float((fit.x - setting.x).norm()) < 1e-9


def test_too_few_equations_leave_the_rank_short_and_the_residual_small() -> None:
    setting = Setting(nn.Tanh(), rows=30, gradients=False)
    fit = setting.pullback.solve(setting.x + 0.02 * setting.draw(*SHAPE))
    assert fit.solution.rank == 30
    assert fit.residual < 1e-12
    assert float((fit.x - setting.x).norm()) > 1e-3


def test_a_start_at_the_truth_stays_there() -> None:
    setting = Setting(nn.Tanh())
    fit = setting.pullback.solve(setting.x)
    assert fit.residual < 1e-12
    torch.testing.assert_close(fit.x, setting.x, rtol=0, atol=1e-12)


def test_contradicting_data_give_the_least_residual_and_say_so() -> None:
    setting = Setting(nn.Tanh())
    wrong = {k: t + 0.1 * t.norm() * setting.draw(*t.shape) / t.numel() ** 0.5 for k, t in setting.update.items()}
    links = chain(setting.model, SHAPE)
    off = Pullback(links, setting.solution.held(setting.solution.x), setting.gradient, wrong)
    fit = off.solve(setting.x)
    assert 1e-3 < fit.residual <= float(off(setting.x.flatten()).detach().norm())
    assert fit.residual == pytest.approx(float(off(fit.x.flatten()).detach().norm()), rel=1e-9)
    J = torch.autograd.functional.jacobian(off, fit.x.flatten())
    assert float((off(fit.x.flatten()).detach() @ J).norm()) < 1e-3 * fit.residual * float(
        torch.linalg.matrix_norm(J, 2)
    )


def test_the_layers_of_the_network_are_left_alone() -> None:
    setting = Setting(nn.LeakyReLU(0.2))
    state = {k: v.clone() for k, v in setting.model.state_dict().items()}
    setting.pullback.solve(setting.x + 0.02 * setting.draw(*SHAPE))
    assert all(torch.equal(v, state[k]) for k, v in setting.model.state_dict().items())
    assert all(p.grad is None for p in setting.model.parameters())
