"""Layer rules against autograd: the true input satisfies the equations, and they give it back where rank allows."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from unbatch.layer import LayerRule, rule_for
from unbatch.layers.affine import Affine
from unbatch.models.small import initialise
from unbatch.network.batch_norm import KnownBatchNorm, known_batch_norms
from unbatch.network.chain import Link
from unbatch.testing import check_layer_rule

quick = hypothesis_settings(deadline=None, max_examples=30)
SEED = st.integers(0, 10**6)


def filled(layer: nn.Module, seed: int) -> nn.Module:
    """Every parameter and statistic drawn, in float64."""
    rng = torch.Generator().manual_seed(seed)
    layer = layer.double()
    with torch.no_grad():
        for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=rng, dtype=torch.float64))
                if "var" in name:
                    tensor.abs_().add_(0.5)
    return layer


def drawn(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)


def jacobians(layer: nn.Module, x: Tensor, dz: Tensor) -> tuple[Tensor, Tensor | None]:
    """The slow oracle: derivatives of the output, and of the weight's gradient, by the input."""
    d = x.numel()
    forward = jacrev(lambda x: layer(x))(x).reshape(-1, d)
    if getattr(layer, "weight", None) is None:
        return forward, None
    weight = layer.weight.detach()

    def gradient(x: Tensor) -> Tensor:
        return torch.func.grad(lambda w: (functional_call(layer, {"weight": w}, (x,)) * dz).sum())(weight)

    return forward, jacrev(gradient)(x).reshape(-1, d)


def hold(layer: nn.Module, x: Tensor) -> None:
    """Affine equations are the Jacobians, and pull is the transpose of push."""
    dz = drawn(tuple(layer(x).shape[1:]), 7)
    shape, rule = tuple(x.shape[1:]), Affine()
    assert rule.accepts(layer)
    systems = [rule.forward_equations(layer, shape, layer(x).detach())]
    expected = list(jacobians(layer, x, dz))
    if expected[1] is not None:
        (dW,) = torch.autograd.grad(layer(x), layer.weight, dz)
        systems.append(rule.gradient_equations(layer, shape, dz, dW))
    for system, A in zip(systems, expected, strict=False):
        torch.testing.assert_close(system.matrix(), A, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(system.residual(x.flatten()), torch.zeros_like(system.b), rtol=0, atol=1e-8)
        u = drawn((system.equations,), 3)
        torch.testing.assert_close(system.pull(u), u @ A, rtol=1e-9, atol=1e-9)
    check_layer_rule(rule, layer, x)


@quick
@given(seed=SEED, d=st.integers(1, 12), m=st.integers(1, 12), bias=st.booleans())
def test_dense_layers(seed: int, d: int, m: int, bias: bool) -> None:
    layer, x = filled(nn.Linear(d, m, bias=bias), seed), drawn((d,), seed)
    hold(layer, x)
    dz = drawn((m,), seed + 5)
    (dW,) = torch.autograd.grad(layer(x), layer.weight, dz)
    system = Affine().gradient_equations(layer, (d,), dz, dW)
    assert system.rank() == d
    torch.testing.assert_close(system.solve().x, x[0], rtol=1e-8, atol=1e-9)


CONVOLUTION = {
    "seed": SEED,
    "channels": st.tuples(st.integers(1, 3), st.integers(1, 3)),
    "groups": st.integers(1, 2),
    "kernel": st.integers(1, 3),
    "stride": st.integers(1, 3),
    "padding": st.integers(0, 2),
    "dilation": st.integers(1, 2),
    "bias": st.booleans(),
    "mode": st.sampled_from(["zeros", "circular", "reflect"]),
    "sides": st.tuples(st.integers(5, 8), st.integers(5, 8)),
}


@quick
@given(**CONVOLUTION)
def test_convolutions(seed, channels, groups, kernel, stride, padding, dilation, bias, mode, sides) -> None:
    before, after = (groups * c for c in channels)
    solid = (nn.Conv3d, (before, 5, 5, 5 if mode == "zeros" else 6))
    kinds = [(nn.Conv2d, (before, *sides)), (nn.Conv1d, (before, sides[0]))]
    for kind, shape in (*kinds, *([solid] if seed % 5 == 0 else [])):
        layer = kind(
            before,
            after,
            kernel,
            stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            bias=bias,
            padding_mode=mode,
        )
        hold(filled(layer, seed), drawn(shape, seed))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.AvgPool2d(2), (2, 6, 6)),
        (nn.AvgPool2d(3, stride=2, padding=1), (2, 7, 5)),
        (nn.AvgPool1d(2), (2, 8)),
        (nn.AdaptiveAvgPool2d(2), (3, 5, 7)),
        (nn.BatchNorm2d(3).eval(), (3, 4, 4)),
        (nn.BatchNorm1d(5).eval(), (5,)),
        (nn.InstanceNorm2d(3, affine=True, track_running_stats=True).eval(), (3, 4, 4)),
        (nn.Upsample(scale_factor=2), (2, 3, 3)),
        (nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False), (2, 4, 3)),
        (nn.Upsample(scale_factor=2, mode="bicubic"), (1, 4, 4)),
        (nn.Upsample(scale_factor=2, mode="trilinear"), (1, 2, 3, 2)),
        (nn.UpsamplingNearest2d(scale_factor=2), (2, 3, 3)),
        (nn.UpsamplingBilinear2d(scale_factor=2), (2, 3, 3)),
        (nn.Conv3d(2, 4, (2, 3, 2), (1, 2, 1), (1, 0, 1), (1, 1, 2), groups=2), (2, 4, 5, 5)),
        (nn.AvgPool3d(2), (2, 4, 4, 4)),
        (nn.BatchNorm3d(2).eval(), (2, 3, 3, 2)),
        (nn.ConvTranspose3d(2, 1, 2, stride=2), (2, 2, 3, 2)),
        (nn.Dropout3d(0.5).eval(), (2, 2, 2, 2)),
        (nn.ConvTranspose2d(2, 3, 3, stride=2), (2, 4, 4)),
        (nn.Flatten(), (2, 3, 3)),
        (nn.Dropout(0.5).eval(), (7,)),
        (nn.ZeroPad2d(1), (2, 3, 3)),
        (nn.PixelShuffle(2), (4, 3, 3)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_other_affine_layers(layer: nn.Module, shape: tuple[int, ...]) -> None:
    hold(filled(layer, 0), drawn(shape, 0))


EVERYWHERE = [nn.LeakyReLU(inplace=True), nn.ELU(), nn.CELU(), nn.SELU(), nn.Softplus(), nn.Sigmoid(), nn.Tanh()]
EVERYWHERE += [nn.PReLU(4).double(), nn.Softsign(), nn.LogSigmoid()]
ABOVE = [nn.ReLU(), nn.GELU(), nn.GELU(approximate="tanh"), nn.SiLU(), nn.Mish(), nn.Hardswish()]
BETWEEN = [nn.ReLU6(), nn.Hardtanh(), nn.Hardtanh(-2.0, 0.5), nn.Hardsigmoid()]


@pytest.mark.parametrize("layer", [*EVERYWHERE, *ABOVE, *BETWEEN], ids=str)
@given(seed=SEED)
@hypothesis_settings(deadline=None, max_examples=5)
def test_activations_are_inverted_where_they_rise(layer: nn.Module, seed: int) -> None:
    x = (3 * drawn((4, 5), seed)).clamp(-8, 8)
    rule = rule_for(layer)
    assert rule is not None
    system = rule.forward_equations(layer, (4, 5), layer(x.clone()))
    assert float(system.residual(x.flatten()).norm()) < 1e-6
    if any(layer is other for other in EVERYWHERE):
        assert system.equations == 20
    elif any(layer is other for other in ABOVE):
        assert system.equations == int((x > 0).sum())
    else:
        low, high = {nn.ReLU6: (0, 6), nn.Hardsigmoid: (-3, 3)}.get(type(layer), (None, None))
        low, high = (layer.min_val, layer.max_val) if low is None else (low, high)
        assert system.equations == int(((x > low) & (x < high)).sum())
    check_layer_rule(rule, layer, x)


@pytest.mark.parametrize(("dtype", "known"), [(torch.float64, 2), (torch.float32, 1)])
def test_a_saturated_unit_gives_no_equation(dtype: torch.dtype, known: int) -> None:
    x = torch.tensor([[0.3, 10.0, 45.0, -800.0]], dtype=dtype)
    for layer in (nn.Sigmoid(), nn.Tanh()):
        system = rule_for(layer).forward_equations(layer, (4,), layer(x))
        assert system.equations == known
        which = system.matrix().argmax(1)
        assert float((system.b - x[0, which]).abs().max()) < 1e-4


def test_activations_that_fall_are_refused() -> None:
    falling = nn.PReLU()
    nn.init.constant_(falling.weight, -0.5)
    for layer in (nn.LeakyReLU(-0.1), falling, nn.Softplus(threshold=1.0)):
        assert rule_for(layer) is None


@pytest.mark.parametrize(
    ("layer", "shape", "groups"),
    [
        (nn.LayerNorm(6), (4, 6), 4),
        (nn.LayerNorm((3, 4)), (3, 4), 1),
        (nn.GroupNorm(2, 4), (4, 3, 3), 2),
        (nn.InstanceNorm2d(3, affine=True), (3, 4, 4), 3),
        (nn.BatchNorm2d(3), (3, 4, 4), 3),
        (nn.BatchNorm3d(2), (2, 3, 2, 3), 2),
        (nn.InstanceNorm3d(2), (2, 3, 2, 3), 2),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_norms_leave_a_mean_and_a_deviation_a_group(layer: nn.Module, shape: tuple[int, ...], groups: int) -> None:
    layer, x = filled(layer, 0), drawn(shape, 0)
    rule = rule_for(layer)
    assert rule is not None
    assert rule.name == "norm"
    system = rule.forward_equations(layer, shape, layer(x))
    torch.testing.assert_close(system.residual(x.flatten()), torch.zeros(x.numel(), dtype=x.dtype), rtol=0, atol=1e-9)
    assert system.rank() == x.numel() - 2 * groups
    torch.testing.assert_close(system.matrix(), system.matrix().T, rtol=0, atol=1e-12)
    check_layer_rule(rule, layer, x)


def test_a_norm_says_nothing_of_groups_with_a_weight_of_zero() -> None:
    layer, x = nn.GroupNorm(2, 4).double(), drawn((4, 3), 0)
    with torch.no_grad():
        layer.weight[1] = 0
    system = rule_for(layer).forward_equations(layer, (4, 3), layer(x).detach())
    assert system.rank() == 6 - 2
    assert float(system.residual(x.flatten()).abs().max()) < 1e-12


def trained(layer: nn.Module, x: Tensor) -> KnownBatchNorm:
    """The batch norm with what its running statistics before and after a step on x say."""
    shape = tuple(x.shape[1:])
    before = {f"bn.{k}": b.clone() for k, b in layer.named_buffers()}
    layer.train()(x)
    after = {f"bn.{k}": b for k, b in layer.named_buffers()}
    (link,) = known_batch_norms([Link("bn", layer, shape, shape)], before, after, len(x))
    assert isinstance(link.module, KnownBatchNorm)
    return link.module


@quick
@given(
    seed=SEED,
    sides=st.lists(st.integers(1, 5), min_size=1, max_size=2),
    channels=st.integers(1, 4),
    affine=st.booleans(),
    momentum=st.sampled_from([0.01, 0.1, 0.9, 1.0, None]),
)
def test_batch_norm_in_train_mode_with_its_statistics(seed, sides, channels, affine, momentum) -> None:
    sides = [*sides[:-1], sides[-1] + 1]  # two entries a channel at least
    kind = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d}[len(sides)]
    layer = filled(kind(channels, affine=affine, momentum=momentum), seed)
    layer.num_batches_tracked.fill_(seed % 7)
    shape = (channels, *sides)
    x = 3 * drawn(shape, seed) + 1
    known, rule = trained(layer, x), rule_for(trained(layer, x))
    places = list(range(2, x.ndim))
    off = [known.mean - x[0].flatten(1).mean(1), known.var - x[0].flatten(1).var(1, unbiased=False)]
    assert all(bool((gap.abs() <= error + 1e-14).all()) for gap, error in zip(off, known.errors, strict=True))
    z, dz = layer(x).detach(), drawn(shape, 7)
    torch.testing.assert_close(known(x), z, rtol=1e-9, atol=1e-9)
    system = rule.forward_equations(known, shape, z)
    scale = (x.var(places, unbiased=False) + layer.eps).rsqrt()[0] * (layer.weight.detach() if affine else 1.0)
    entries = x[0, 0].numel()
    torch.testing.assert_close(system.matrix(), scale.repeat_interleave(entries).diag(), rtol=1e-6, atol=1e-9)
    assert float(system.residual(x.flatten()).abs().max()) < 1e-8 * (1 + float(system.b.abs().max()))
    live = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(layer(live), live, dz)
    found = rule.grad_input(known, shape, z, dz)
    torch.testing.assert_close(found, dx[0], rtol=1e-5, atol=1e-6 * float(scale.abs().max()))
    check_layer_rule(rule, known, x)


def test_a_train_mode_batch_norm_s_gradient_is_not_that_of_eval_mode() -> None:
    layer, x, dz = filled(nn.BatchNorm2d(3), 0), drawn((3, 4, 4), 0), drawn((3, 4, 4), 7)
    known = trained(layer, x)
    fixed = copy.deepcopy(layer).eval()
    fixed.running_mean, fixed.running_var = known.mean, known.var
    z = layer(x).detach()
    torch.testing.assert_close(fixed(x), z, rtol=1e-9, atol=1e-9)
    wrong, right = (rule_for(each).grad_input(each, (3, 4, 4), z, dz) for each in (fixed, known))
    assert float((wrong - right).norm()) > 0.05 * float(right.norm())


def test_a_train_mode_batch_norm_needs_its_whole_output_for_its_gradient() -> None:
    layer, x, dz = filled(nn.BatchNorm2d(2), 0), drawn((2, 4, 4), 0), drawn((2, 4, 4), 7)
    known = trained(layer, x)
    z = layer(x).detach()
    z[0, 1, 2, 3] = torch.nan
    with pytest.raises(ValueError, match="needs its whole output"):
        rule_for(known).grad_input(known, (2, 4, 4), z, dz)
    with torch.no_grad():
        layer.weight[1] = 0  # its channel passes nothing back, whatever it gave
    assert bool((rule_for(known).grad_input(known, (2, 4, 4), z, dz)[1] == 0).all())


def test_subclasses_and_parametrised_layers_have_no_rule() -> None:
    class Standardised(nn.Conv2d):
        pass

    assert rule_for(Standardised(1, 2, 3)) is None
    assert rule_for(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))) is None
    assert rule_for(nn.MaxPool2d(2, return_indices=True)) is None


def test_hooks_of_the_user_are_not_run() -> None:
    layer, ran = nn.Linear(3, 2), []
    layer.register_forward_hook(lambda *args: ran.append(1))
    Affine().forward_equations(layer, (3,), torch.zeros(2)).matrix()
    assert not ran
    layer(torch.zeros(1, 3))
    assert ran


def test_max_pooling_gives_the_windows_of_one_entry() -> None:
    x = drawn((1, 5, 5), 0)
    for layer, alone in ((nn.MaxPool2d(2), 0), (nn.MaxPool2d(2, ceil_mode=True), 1), (nn.MaxPool2d(1, stride=2), 9)):
        rule = rule_for(layer)
        system = rule.forward_equations(layer, (1, 5, 5), layer(x))
        assert system.equations == alone
        check_layer_rule(rule, layer, x)


def test_a_layer_without_a_way_back_says_so_before_it_is_asked_and_then() -> None:
    x = drawn((2, 4, 4), 0)
    for layer, words in (
        (nn.MaxPool2d(2), "largest"),
        (nn.LayerNorm((2, 4, 4)).double(), "standard deviation"),
        (nn.BatchNorm2d(2).double(), "running statistics after the step"),
        (trained(nn.BatchNorm2d(2, momentum=0.0).double(), x), "statistics"),
    ):
        rule, output = rule_for(layer), layer(x).detach()
        assert words in rule.no_way_back(layer, (2, 4, 4))
        with pytest.raises(ValueError, match=words):
            rule.grad_input(layer, (2, 4, 4), output, torch.ones_like(output))
    for layer in (nn.MaxPool2d(1, stride=2), nn.AvgPool2d(2), nn.GELU(), trained(nn.BatchNorm2d(2).double(), x)):
        assert rule_for(layer).no_way_back(layer, (2, 4, 4)) == ""


def test_a_rule_that_denies_a_way_back_that_it_has_breaks_the_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Affine, "no_way_back", lambda *_: "none.")
    with pytest.raises(AssertionError, match="no way back"):
        check_layer_rule(Affine(), nn.Linear(3, 2).double(), drawn((3,), 0))


def test_rules_tell_batch_norm_by_its_mode_and_know_no_lstm() -> None:
    names = [
        rule.name if (rule := rule_for(layer)) else None for layer in (nn.BatchNorm2d(2), nn.BatchNorm2d(2).eval())
    ]
    assert names == ["norm", "affine"]
    assert rule_for(nn.Dropout(0.5).eval()).name == "affine"
    assert rule_for(nn.Dropout(0.5)) is None
    assert rule_for(nn.LSTM(2, 2)) is None


def test_every_rule_is_found() -> None:
    assert set(LayerRule.find()) == {"activation", "affine", "batch-norm", "max-pool", "norm", "residual"}


def test_equations_in_float32_are_solved_in_float64() -> None:
    layer, x = nn.Linear(6, 4), torch.randn(1, 6, generator=torch.Generator().manual_seed(0))
    initialise(layer, torch.Generator().manual_seed(0))
    system = Affine().forward_equations(layer, (6,), layer(x))
    assert system.b.dtype == torch.float64
    assert system.solve().x.dtype == torch.float64


def test_wrong_shapes_are_named() -> None:
    layer = nn.Linear(4, 3)
    with pytest.raises(ValueError, match=r"output has shape \(5,\)"):
        Affine().forward_equations(layer, (4,), torch.zeros(5))
    for wrong in ((4, 3), (4,)):
        with pytest.raises(ValueError, match="grad_weight has shape"):
            Affine().gradient_equations(layer, (4,), torch.zeros(3), torch.zeros(wrong))
    with pytest.raises(ValueError, match=r"an input of shape \(5,\) does not fit this Linear"):
        Affine().forward_equations(layer, (5,), torch.zeros(3))
