"""Readings against autograd: what each run of layers says of its input, and how a reading follows a changed update."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbatch.inversion.backward.fold import Improve, readings
from unbatch.inversion.backward.reading import KnownOutput, Reading, Unreadable
from unbatch.inversion.backward.runs import runs
from unbatch.network.chain import Link, chain, follow

SHAPE = (2, 7, 7)


def drawn(*layers: nn.Module, seed: int = 0) -> nn.Sequential:
    """Layers in float64, every weight uniform in +-1 / sqrt(fan in)."""
    model, rng = nn.Sequential(*layers).double(), torch.Generator().manual_seed(seed)
    for module in model:
        for p in module.parameters():
            fan = p[0].numel() if p.ndim > 1 else 16
            p.data = (2 * torch.rand(p.shape, generator=rng, dtype=torch.float64) - 1) / fan**0.5
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data += 1
            module.running_mean += 0.1 * torch.randn(module.running_mean.shape, generator=rng, dtype=torch.float64)
    return model


class Backward:
    """A trunk on random inputs: its links, every link's input and output, dL/d of each, and the weights' gradients."""

    def __init__(self, model: nn.Sequential, shape: tuple[int, ...] = SHAPE, n: int = 1, seed: int = 1) -> None:
        rng = torch.Generator().manual_seed(seed)
        self.links = chain(model, shape)
        x = torch.rand(n, *shape, generator=rng, dtype=torch.float64).requires_grad_()
        self.states = [x]
        for link in self.links:
            self.states.append(link.module(self.states[-1].reshape(n, *link.before)))
        direction = torch.randn(self.states[-1].shape, generator=rng, dtype=torch.float64)
        named = {f"{link.name}.{name}": p for link in self.links for name, p in link.module.named_parameters()}
        found = torch.autograd.grad((self.states[-1] * direction).sum(), [*named.values(), *self.states])
        self.update: dict[str, Tensor] = dict(zip(named, found, strict=False))
        self.grads = found[len(named) :]
        self.states = [state.detach() for state in self.states]

    def read(
        self, *updates: Mapping[str, Tensor], forward: bool = True, improve: Improve = lambda reading: None
    ) -> list[Reading]:
        """From the first update, or the true one; the others are followed."""
        first, *others = [KnownOutput(self.states[-1], self.grads[-1], u) for u in updates or (self.update,)]
        return list(readings(runs(self.links), first, others, forward=forward, improve=improve))

    def at(self, link: Link) -> int:
        return next(i for i, other in enumerate(self.links) if other is link)


def close(found: Tensor, true: Tensor, tolerance: float = 1e-9) -> None:
    assert found.shape == true.shape
    assert float((found - true).norm()) <= tolerance * float(true.norm())


def small() -> nn.Sequential:
    return drawn(nn.Conv2d(2, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.LeakyReLU(0.2))


def mixed() -> nn.Sequential:
    trunk = [nn.Conv2d(2, 12, 3, padding=1), nn.BatchNorm2d(12), nn.AvgPool2d(2), nn.Softplus()]
    return drawn(*trunk, nn.Identity(), nn.Upsample(scale_factor=2), nn.Conv2d(12, 14, 3), nn.Tanh(), nn.Flatten())


@pytest.mark.parametrize("model", [small(), mixed()], ids=["two convolutions", "norm, pooling, upsampling"])
@pytest.mark.parametrize("n", [1, 2])
def test_every_run_s_input_and_gradient_are_the_true_ones(model: nn.Sequential, n: int) -> None:
    true = Backward(model.eval(), n=n)
    readings = true.read()
    assert readings[-1].links[0] is true.links[0]
    for reading in readings:
        place = true.at(reading.links[0])
        close(reading.grad, true.grads[place].reshape(reading.grad.shape))
        residual = reading.system.residual(true.states[place].flatten())
        assert float(residual.norm()) < 1e-10 * (1 + float(reading.system.b.norm()))
        if reading.deficit == 0:
            close(reading.x, true.states[place].reshape(reading.x.shape))
    if n == 1:
        assert [reading.deficit for reading in readings] == [0] * len(readings)


def test_affine_layers_in_a_row_are_one_reading() -> None:
    readings = Backward(mixed().eval()).read()
    assert [reading.layers for reading in readings] == ["4, 5, 6", "0, 1, 2"]
    assert readings[0].x.shape == (1, 12, 3, 3)


def test_a_deficient_run_s_solution_is_the_one_of_least_norm() -> None:
    true = Backward(drawn(nn.Conv2d(2, 2, 3, stride=2), nn.Tanh()))
    (reading,) = true.read()
    A = reading.system.matrix()
    rank = int(torch.linalg.matrix_rank(A))
    assert reading.deficit == 98 - rank > 0
    close(reading.x.flatten(), torch.linalg.pinv(A) @ reading.system.b)
    free = reading.solution.free(torch.eye(98, dtype=torch.float64))
    assert float((A @ free.T).norm()) < 1e-9
    assert int(torch.linalg.matrix_rank(free)) == 98 - rank


def test_without_forward_equations_only_layers_with_a_weight_lose_them() -> None:
    true = Backward(drawn(nn.Softplus(), nn.Conv2d(2, 9, 3, padding=1), nn.Tanh()))
    whole, alone = true.read(), true.read(forward=False)
    assert whole[0].system.equations == 9 * 49 + 9 * 18
    assert alone[0].system.equations == 9 * 18
    close(whole[-1].x, true.states[0])
    close(alone[-1].x, true.states[0])


def test_a_weight_that_sent_nothing_gives_no_gradient_equations() -> None:
    true = Backward(small())
    bare = true.read({k: t for k, t in true.update.items() if k != "2.weight"})
    assert [row.system.equations for row in bare] == [8 * 49, 6 * 49 + 6 * 18]
    close(bare[-1].x, true.states[0])
    assert true.read(forward=False)[0].system.equations == 8 * 54


def test_a_better_solution_is_used_below() -> None:
    act = nn.LeakyReLU(0.2)
    model = drawn(nn.Conv2d(2, 12, 3, padding=1), act, nn.Conv2d(12, 3, 3, padding=1), nn.LeakyReLU(0.2))
    true = Backward(model)
    asked = list[str]()

    def improve(reading: Reading) -> Tensor | None:
        asked.append(reading.layers)
        return true.states[2] if reading.deficit else None

    first, last = true.read(improve=improve)
    assert asked == ["2", "0"]
    assert first.deficit
    assert first.deficit > 0
    close(first.x, true.states[2], 0.0)
    close(last.x, true.states[0])
    assert float((true.read()[-1].x - true.states[0]).norm()) > 1e-3 * float(true.states[0].norm())


@pytest.mark.parametrize("act", [nn.LeakyReLU(0.2), nn.Tanh(), nn.Softplus()], ids=str)
def test_others_follow_a_slightly_changed_update_to_first_order(act: nn.Module) -> None:
    model = drawn(nn.Conv2d(2, 6, 3, padding=1), act, nn.Conv2d(6, 8, 3, padding=1), copy.deepcopy(act))
    true, rng = Backward(model), torch.Generator().manual_seed(5)
    base = true.read()
    changes = {k: torch.randn(t.shape, generator=rng, dtype=torch.float64) * t.norm() for k, t in true.update.items()}
    left = []
    for size in (1e-5, 1e-6):
        moved = {k: t + size * changes[k] / t.numel() ** 0.5 for k, t in true.update.items()}
        fresh, followed = true.read(moved), true.read(true.update, moved)
        way = float((fresh[-1].x - base[-1].x).norm())
        left.append(float((followed[-1].others[0][0] - fresh[-1].x).norm()))
        assert way > 0.01 * size
        assert left[-1] < 0.02 * way
    assert left[1] < left[0] / 30 + 1e-13  # second order: a hundredth


def test_another_start_of_the_same_update_stays_where_it_is() -> None:
    true = Backward(small(), n=2)
    for reading in true.read(true.update, true.update):
        close(reading.others[0][0], reading.x, 1e-12)


def test_examples_share_the_weight_s_gradient() -> None:
    true = Backward(drawn(nn.Conv2d(2, 3, 3, stride=2), nn.Tanh()), n=3)
    (reading,) = true.read()
    assert reading.system.unknowns == 3 * 98
    assert reading.system.equations == 3 * 3 * 9 + 3 * 18
    assert reading.x.shape == (3, *SHAPE)
    A = reading.system.matrix()
    K = A[-54:]
    expected = torch.autograd.functional.jacobian(lambda x: weighed(true, x), true.states[0]).reshape(54, -1)
    assert float(K.flatten() @ expected.flatten() / (K.norm() * expected.norm())) == pytest.approx(1, abs=1e-12)
    assert float(reading.system.residual(true.states[0].flatten()).norm()) < 1e-11


def weighed(true: Backward, x: Tensor) -> Tensor:
    """The first weight's gradient as a function of the inputs, dL/dz held."""
    layer = true.links[0].module
    W = layer.weight
    z = F.conv2d(x, W, stride=layer.stride)
    (found,) = torch.autograd.grad((z * true.grads[1]).sum(), W, create_graph=True)
    return found.flatten()


@pytest.mark.parametrize("n", [1, 2])
def test_outputs_that_a_relu_cut_say_nothing(n: int) -> None:
    true = Backward(drawn(nn.Conv2d(2, 30, 3, padding=1, bias=False), nn.ReLU()), n=n)
    (reading,) = true.read(forward=True)
    alive = int((true.states[-1] > 0).sum())
    assert 0 < alive < true.states[-1].numel()
    assert reading.system.equations in (alive, alive + 30 * 18)  # the second: with the gradient's
    if reading.deficit == 0:
        close(reading.x, true.states[0])
    close(reading.grad, true.grads[0])


@pytest.mark.parametrize(
    ("layers", "name"),
    [
        ([nn.Conv2d(2, 4, 3), nn.GLU(1)], "'1' (GLU)"),
        ([nn.Conv2d(2, 4, 3), nn.MaxPool2d(2), nn.Tanh()], "'1' (MaxPool2d)"),
        ([nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 3), nn.GELU()], "'3' (GELU)"),
    ],
)
def test_a_layer_without_a_way_back_is_named(layers: Sequence[nn.Module], name: str) -> None:
    with pytest.raises(Unreadable) as error:
        Backward(drawn(*layers)).read()
    assert f"layer {name}" in str(error.value)


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 4), nn.LayerNorm([4, 5, 5])], ids=["group", "layer"])
def test_a_normalisation_is_named(norm: nn.Module) -> None:
    with pytest.raises(Unreadable, match="layer '1'"):
        Backward(drawn(nn.Conv2d(2, 4, 3), norm, nn.Tanh())).read()


def test_a_prelu_s_weight_gives_no_equations() -> None:
    model = drawn(nn.Conv2d(2, 6, 3, padding=1), nn.PReLU(6))
    model[1].weight.data = model[1].weight.data.abs() + 0.1
    true = Backward(model)
    assert "1.weight" in true.update
    close(true.read()[-1].x, true.states[0])


def test_max_pooling_s_windows_of_one_entry_are_read() -> None:
    true = Backward(drawn(nn.Conv2d(2, 6, 3, padding=1), nn.MaxPool2d(1, stride=2), nn.Tanh()))
    (reading,) = true.read()
    assert reading.system.equations == 6 * 16 + 6 * 18
    close(reading.grad, true.grads[0])
    assert float(reading.system.residual(true.states[0].flatten()).norm()) < 1e-12


def test_two_activations_in_a_row_are_both_inverted() -> None:
    true = Backward(drawn(nn.Conv2d(2, 6, 3, padding=1), nn.Tanh(), nn.LeakyReLU(0.2)))
    close(true.read()[-1].x, true.states[0])


def test_a_trunk_of_activations_alone() -> None:
    true = Backward(drawn(nn.Softplus(), nn.Identity(), nn.Tanh()))
    close(true.read()[-1].x, true.states[0])


def test_the_network_s_input_before_an_activation_is_read() -> None:
    true = Backward(drawn(nn.Softplus(), nn.Conv2d(2, 6, 3, padding=1), nn.Tanh()))
    readings = true.read()
    assert [reading.layers for reading in readings] == ["1", "0"]
    close(readings[-1].x, true.states[0])
    close(readings[-1].grad, true.grads[0])
    close(follow(true.links, readings[-1].x).detach(), true.states[-1])
