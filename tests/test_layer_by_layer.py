"""layer-by-layer against the truth: exact where the equations determine a picture, and honest where they do not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from clients import Exchange
from convolutional import SMALL, conv, drawn, errors, exact, leaky, network, psnr, refused, sound
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F

from unbatch.attacks.layer_by_layer import LayerByLayer
from unbatch.auditing.client import observe
from unbatch.case import Case
from unbatch.errors import NotApplicable
from unbatch.knowledge import Knowledge
from unbatch.loss import loss_named
from unbatch.models import small
from unbatch.observation import Observation
from unbatch.protocol import Protocol
from unbatch.reconstruction import Reconstruction

TYPES = pytest.mark.parametrize(("dtype", "floor"), [(torch.float64, 200.0), (torch.float32, 90.0)], ids=["64", "32"])


def changed(obs: Observation, f: Callable[[str, Tensor], Tensor]) -> Observation:
    return replace(obs, update={name: f(name, tensor.clone()) for name, tensor in obs.update.items()})


# ---------------------------------------------------------------------------------------------------------- exactness


@TYPES
@pytest.mark.parametrize(
    ("trunk", "shape"),
    [
        ([conv(3, 6), nn.Tanh()], SMALL),
        ([conv(3, 6, bias=True), nn.Tanh()], SMALL),
        ([conv(3, 12, 4, stride=2, padding=1), leaky(), conv(12, 16, padding=1), nn.Sigmoid()], SMALL),
        ([conv(3, 8, padding=1, bias=True), nn.Softplus(), conv(8, 8, groups=2, padding=1), nn.ELU()], SMALL),
        ([conv(3, 8, dilation=2, bias=True), nn.Softplus()], SMALL),
        ([conv(3, 12, padding=1, padding_mode="circular"), nn.CELU()], SMALL),
        ([conv(3, 24, padding=1), nn.ReLU(), conv(24, 60, padding=1, bias=True), nn.ReLU()], (3, 6, 6)),
        ([conv(3, 12, padding=1), nn.AvgPool2d(2), nn.Tanh()], SMALL),
        ([conv(3, 8, padding=1), nn.BatchNorm2d(8), nn.Tanh()], SMALL),
        ([conv(3, 8, padding=1), nn.BatchNorm2d(8), leaky(), nn.BatchNorm2d(8), conv(8, 9), nn.Tanh()], SMALL),
        ([nn.Conv1d(4, 8, 3), nn.Tanh(), nn.Conv1d(8, 9, 2, bias=False), leaky()], (4, 20)),
        ([conv(3, 8, padding=1), nn.Tanh(), nn.Upsample(scale_factor=2), conv(8, 4), leaky()], SMALL),
        ([nn.Softplus(), conv(3, 8), nn.Tanh(), nn.Dropout(0.5), nn.Identity()], SMALL),
        ([nn.ZeroPad2d(1), conv(3, 4), conv(4, 12), nn.Tanh()], SMALL),
        ([nn.Unflatten(1, (3, 8, 8)), conv(3, 8), nn.Tanh()], (192,)),
    ],
    ids=[
        *("bias-free", "bias", "stride", "groups", "dilation", "circular", "relu", "pool", "norm", "norms"),
        *("1d", "upsample", "activation first", "two affine", "unflatten"),
    ],
)
def test_determined_networks_give_the_picture(
    exchange: Exchange, trunk: list[nn.Module], shape: tuple[int, ...], dtype: torch.dtype, floor: float
) -> None:
    obs, x, y = exchange(network(trunk, shape), shape=shape, dtype=dtype)
    found = exact(obs, x, y, floor)
    assert found.trace["deficient"] == []
    assert "undetermined" not in found.trace


def hardly_cut(deep: bool, seed: int, shift: float) -> nn.Sequential:
    """ReLU after convolutions with large biases: few outputs are zero."""
    layers = [conv(3, 8, padding=1, bias=True), nn.ReLU(), conv(8, 12, padding=1, bias=True), nn.ReLU()]
    model = network(layers if deep else layers[:2], seed=seed)
    for layer in model:
        if isinstance(layer, nn.Conv2d):
            layer.bias.data += shift
    return model


@TYPES
@pytest.mark.parametrize(("seed", "shift"), [(1, 0.5), (3, 0.9)])
def test_few_outputs_that_a_relu_cut(
    exchange: Exchange, seed: int, shift: float, dtype: torch.dtype, floor: float
) -> None:
    exact(*exchange(hardly_cut(False, seed, shift), seed=seed + 1, dtype=dtype), floor)


@pytest.mark.parametrize(("seed", "shift", "dtype"), [(1, 0.5, torch.float64), (3, 0.9, torch.float32)])
def test_few_inner_outputs_that_a_relu_cut(exchange: Exchange, seed: int, shift: float, dtype: torch.dtype) -> None:
    exact(*exchange(hardly_cut(True, seed, shift), seed=seed + 1, dtype=dtype), 90.0)


@TYPES
@pytest.mark.parametrize("loss", ["cross-entropy", "binary-cross-entropy", "squared-error"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("tell", [False, True], ids=["not told", "told"])
def test_every_loss_and_the_label_whether_told_or_not(
    exchange: Exchange, loss: str, reduction: Any, tell: bool, dtype: torch.dtype, floor: float
) -> None:
    model = network([conv(3, 6), nn.Tanh()])
    for label in (0, 3) if dtype == torch.float64 else (4,):
        exact(
            *exchange(model, loss=loss_named(loss, reduction), y=torch.tensor([label]), tell=tell, dtype=dtype), floor
        )


@TYPES
@pytest.mark.parametrize("loss", ["cross-entropy", "binary-cross-entropy", "squared-error"])
def test_a_head_without_a_bias(exchange: Exchange, loss: str, dtype: torch.dtype, floor: float) -> None:
    model = network([conv(3, 6), nn.Tanh()], bias=False)
    exact(*exchange(model, loss=loss_named(loss), tell=True, dtype=dtype), floor)


def test_a_head_without_a_bias_tells_the_label_too(exchange: Exchange) -> None:
    model = network([conv(3, 6), nn.Tanh()], bias=False, classes=3)
    exact(*exchange(model, seed=3), 200.0)


@TYPES
def test_several_dense_layers_above(exchange: Exchange, dtype: torch.dtype, floor: float) -> None:
    exact(*exchange(network([conv(3, 6), nn.Tanh()], hidden=(20, 12)), dtype=dtype), floor)
    model = network([conv(3, 6), nn.Tanh()], hidden=(20, 12), act=nn.GELU, bias=False)
    exact(*exchange(model, dtype=dtype, tell=True), floor)


@TYPES
def test_clipping_and_other_positive_factors_change_nothing(
    exchange: Exchange, dtype: torch.dtype, floor: float
) -> None:
    model = network([conv(3, 12, stride=2), leaky(), conv(12, 20, padding=1), nn.Tanh()], (3, 9, 9))
    obs, x, y = exchange(model, shape=(3, 9, 9), dtype=dtype, defences=["clip:norm=0.01"])
    exact(obs, x, y, floor)
    exact(changed(obs, lambda _, t: t * 1e5), x, y, floor)


def test_layers_that_sent_nothing_are_read_by_their_outputs(exchange: Exchange) -> None:
    obs, x, y = exchange(network([conv(3, 6), nn.Tanh()]))
    exact(replace(obs, update={k: t for k, t in obs.update.items() if not k.startswith("0")}), x, y, 200.0)


def test_the_gradients_alone_give_the_picture_where_they_suffice(exchange: Exchange) -> None:
    model = network([conv(3, 12, 4, stride=2, padding=1), leaky(), conv(12, 16, padding=1), nn.Tanh()])
    found = exact(*exchange(model), 200.0, method="r-conv")
    assert [row["equations"] for row in found.trace["readings"]] == [16 * 12 * 9, 12 * 3 * 16]


@pytest.mark.slow
@TYPES
@pytest.mark.parametrize("name", ["cnn2-c1", "cnn3-c3", "cnn6", "cnn6-narrow", "cnn6-wide"])
def test_published_networks_on_photographs(name: str, dtype: torch.dtype, floor: float) -> None:
    setting = Case.parse(f"photos:size=16,model={name},double={str(dtype == torch.float64).lower()}").setting()
    obs, truth = observe(setting.model, setting.loss, setting.inputs, setting.labels)
    exact(obs, truth.inputs.double(), truth.labels, floor)


# -------------------------------------------------------------------------------------------------------------- bound


def random_network(seed: int) -> nn.Sequential:
    """Determined in nearly every draw; act, width, stride, biases and pooling by the seed."""
    rng = torch.Generator().manual_seed(seed)

    def one_of(options: Sequence[Any]) -> Any:
        return options[int(torch.randint(len(options), (1,), generator=rng))]

    acts = [nn.Tanh, nn.Sigmoid, nn.Softplus, nn.ELU, leaky, nn.Softsign]
    a, b = one_of([6, 9, 12]), one_of([16, 20])
    first = conv(3, a, one_of([3, 4]), stride=1, padding=one_of([0, 1]), bias=one_of([True, False]))
    trunk = [first, one_of(acts)()]
    if one_of([True, False]):
        trunk += [conv(a, b, 3, padding=1, bias=one_of([True, False])), one_of(acts)()]
    return network(trunk, hidden=one_of([(), (), (15,)]), seed=seed, gain=one_of([1.0, 2.0]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["64", "32"])
def test_the_bound_holds_over_random_networks_and_says_something(exchange: Exchange, dtype: torch.dtype) -> None:
    ratios, bounds, true = [], [], []
    for seed in range(22):
        obs, x, _ = exchange(random_network(seed), seed=seed, dtype=dtype)
        found = LayerByLayer()(obs)
        sound(obs, found, x)
        if not bool(found.bound.isfinite().all()):
            assert found.trace["deficient"]
            continue
        assert not found.trace["deficient"]
        bounds.append(float(found.bound[0]))
        true.append(max(float(errors(found, x)[0][0]), torch.finfo(dtype).eps / 2))
        ratios.append(bounds[-1] / true[-1])
    assert len(ratios) >= 20
    assert torch.tensor(ratios).median() < 100
    assert spearmanr(true, bounds).statistic > 0.7  # a constant has none


def narrow(act: Callable[[], nn.Module] = leaky, seed: int = 0) -> nn.Sequential:
    """Its second convolution leaves 32 of 588 unknowns open, which the first one's narrowness settles."""
    first, second, third = conv(3, 12, 4, stride=2, padding=2), conv(12, 8, stride=2, padding=1), conv(8, 24, padding=1)
    return network([first, act(), second, act(), third, act()], (3, 12, 12), seed=seed)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["64", "32"])
def test_the_bound_of_the_pull_back_constraint_holds(exchange: Exchange, dtype: torch.dtype) -> None:
    broken = []
    for seed in (3, 4):
        obs, x, _ = exchange(narrow(seed=seed), shape=(3, 12, 12), seed=seed + 1, dtype=dtype)
        found = LayerByLayer(method="copa")(obs)
        error, bound = float(errors(found, x)[0][0]), float(found.bound[0])
        assert bound < 100 * error
        if error > bound:
            broken.append(f"seed {seed}: {error:.1e} > {bound:.1e}")
    assert not broken


@pytest.mark.parametrize("entry", [False, True], ids=["whole weight", "one entry"])
@pytest.mark.parametrize("layer", ["0.weight", "2.weight"])
def test_a_wrong_gradient_gives_no_finite_bound_in_double(exchange: Exchange, layer: str, entry: bool) -> None:
    obs, x, _ = exchange(network([conv(3, 8, padding=1), nn.Sigmoid(), conv(8, 12, padding=1), nn.Sigmoid()]))
    found = LayerByLayer()(changed(obs, spoilt(layer, entry)))
    assert psnr(found, x) < 90
    assert found.bound.tolist() == [torch.inf]


@pytest.mark.parametrize("entry", [False, True], ids=["whole weight", "one entry"])
def test_a_wrong_gradient_of_a_small_weight_gives_no_false_bound_in_single(exchange: Exchange, entry: bool) -> None:
    model = network([conv(3, 8, padding=1), nn.Sigmoid(), conv(8, 12, padding=1), nn.Sigmoid()])
    obs, x, _ = exchange(model, dtype=torch.float32)
    found = LayerByLayer()(changed(obs, spoilt("0.weight", entry)))
    assert len(found) == 1
    assert found.bound.tolist() == [torch.inf]
    sound(obs, found, x)


def spoilt(layer: str, entry: bool) -> Callable[[str, Tensor], Tensor]:
    """One per cent on one weight's gradient, or on one entry of it."""

    def f(name: str, t: Tensor) -> Tensor:
        if name == layer:
            (t.flatten()[5:6] if entry else t).mul_(1.01)
        return t

    return f


HALVES = pytest.mark.parametrize("coarse", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])


@HALVES
def test_half_precision_updates_give_coarse_pictures_within_their_bound(
    exchange: Exchange, coarse: torch.dtype
) -> None:
    obs, x, y = exchange(network([conv(3, 6), nn.Tanh()]), dtype=torch.float32)
    found = LayerByLayer()(changed(obs, lambda _, t: t.to(coarse)))
    assert psnr(found, x) > 50
    assert found.labels.tolist() == y.tolist()
    sound(obs, found, x)


@HALVES
def test_a_wrong_half_precision_gradient_gives_no_false_bound(exchange: Exchange, coarse: torch.dtype) -> None:
    obs, x, _ = exchange(network([conv(3, 6), nn.Tanh()]), dtype=torch.float32)
    wrong = changed(obs, lambda name, t: (t * (3.0 if name == "0.weight" else 1.0)).to(coarse))
    found = LayerByLayer()(wrong)
    assert len(found) == 1
    assert found.bound.tolist() == [torch.inf]
    sound(obs, found, x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["64", "32"])
@pytest.mark.parametrize("gain", [3.0, 10.0, 100.0])
@pytest.mark.parametrize("layers", [1, 2])
def test_saturated_units_give_no_false_bound(exchange: Exchange, gain: float, layers: int, dtype: torch.dtype) -> None:
    model = network([conv(3, 8, padding=1), nn.Tanh(), conv(8, 16, padding=1), nn.Tanh()][: 2 * layers])
    for p in model[0].parameters():
        p.data *= gain
    obs, x, _ = exchange(model, dtype=dtype)
    found = LayerByLayer()(obs)
    assert len(found) == 1
    sound(obs, found, x)
    assert bool(found.bound.isfinite()) or gain > 3
    assert found.bound.tolist() == [torch.inf] or gain < 100


def noised(obs: Observation, share: float, seed: int) -> tuple[Observation, float]:
    """Noise of one standard deviation on every entry, `share` of the dense layer's root mean square; and its size."""
    rng, sigma = torch.Generator().manual_seed(seed), share * float(obs.update["3.weight"].square().mean().sqrt())
    return changed(obs, lambda _, t: t + sigma * torch.randn(t.shape, generator=rng).to(t)), sigma


@pytest.mark.parametrize("share", [3e-7, *(pytest.param(s, marks=pytest.mark.slow) for s in (3e-6, 5e-6, 1e-4)), 1e-2])
@pytest.mark.parametrize("told", [True, False], ids=["told", "not told"])
def test_noise_gives_no_false_bound(exchange: Exchange, share: float, told: bool) -> None:
    for seed in range(6):
        obs, x, _ = exchange(network([conv(3, 6), nn.Tanh()], seed=seed), dtype=torch.float32)
        seen, sigma = noised(obs, share, seed)
        if told:
            seen = replace(seen, knowledge=seen.knowledge | Knowledge(noise=sigma))
        try:
            found, words = LayerByLayer()(seen), ""
        except NotApplicable as error:
            found, words = None, str(error)
        if found is None:
            assert share > 1e-5
            assert "not of rank one" in words
        else:
            sound(obs, found, x)


# ---------------------------------------------------------------------------------------------------------- deficient


def ranks(obs: Observation, x: Tensor, y: Tensor) -> dict[str, int]:
    """The oracle: for each convolution in `obs.model`, the rank of [forward map; map from input to weight gradient]."""
    model, found = copy.deepcopy(obs.model).double(), {}
    layers = list(model)
    for i, layer in enumerate(layers):
        if not isinstance(layer, nn.Conv2d):
            continue
        t = nn.Sequential(*layers[:i])(x).detach()
        z = layer(t).detach().requires_grad_()
        (dz,) = torch.autograd.grad(obs.loss(nn.Sequential(*layers[i + 1 :])(z), y), z)
        forward = torch.autograd.functional.jacobian(lambda t, layer=layer: layer(t).flatten(), t).reshape(
            -1, t.numel()
        )

        def weighed(t: Tensor, layer: nn.Conv2d = layer, dz: Tensor = dz) -> Tensor:
            W = layer.weight
            out = F.conv2d(t, W, None, layer.stride, layer.padding, layer.dilation, layer.groups)
            (dW,) = torch.autograd.grad((out * dz).sum(), W, create_graph=True)
            return dW.flatten()

        gradient = torch.autograd.functional.jacobian(weighed, t).reshape(-1, t.numel())
        A = torch.cat([forward / forward.norm(), gradient / gradient.norm()])
        found[str(i)] = int(torch.linalg.matrix_rank(A, rtol=1e-11))
    return found


@pytest.mark.parametrize(
    "trunk",
    [
        [conv(3, 3, 5, stride=2), nn.Tanh()],
        [conv(3, 1, bias=True), nn.Tanh()],
        [conv(3, 5, 3, stride=4), leaky()],  # pixels that no kernel touches
        [conv(3, 2, padding=1), nn.Sigmoid(), conv(2, 12, padding=1), nn.Tanh()],
    ],
    ids=["strided", "one channel", "untouched pixels", "first of two"],
)
def test_deficient_layers_are_named_and_their_rank_is_the_matrix_rank(
    exchange: Exchange, trunk: list[nn.Module]
) -> None:
    obs, x, y = exchange(network(trunk))
    expected = ranks(obs, x, y)
    for method in ("auto", "copa", "r-gap"):
        found = LayerByLayer(method=method)(obs)
        rows = {row["layers"]: row for row in found.trace["readings"]}
        assert {name: row["rank"] for name, row in rows.items()} == expected
        assert found.trace["deficient"] == [n for n in rows if expected[n] < rows[n]["unknowns"]] == ["0"]
        assert found.trace["undetermined"] == pytest.approx(1 - expected["0"] / 192)
        assert found.bound.tolist() == [torch.inf]
        assert found.labels.tolist() == y.tolist()
        assert obs.residual(found.inputs, found.labels) < 1e-9


def test_what_an_inner_layer_leaves_open_is_not_called_determined(exchange: Exchange) -> None:
    obs, x, _ = exchange(narrow(), shape=(3, 12, 12))
    found = LayerByLayer(method="r-gap")(obs)
    assert psnr(found, x) < 40
    assert found.trace["deficient"] == ["2"]
    assert found.trace["undetermined"] is None or found.trace["undetermined"] > 0


@pytest.mark.parametrize(
    ("name", "gain"),
    [
        ("cnn2-c2", 8.0),
        pytest.param("cnn2-c6", 6.0, marks=pytest.mark.slow),  # only its last row and column are open
        pytest.param("cnn3-c2", 8.0, marks=pytest.mark.slow),
    ],
)
def test_the_smoothest_picture_is_nearer_than_that_of_least_norm(name: str, gain: float) -> None:
    setting = Case.parse(f"photos:size=16,model={name},double=true").setting()
    known = Knowledge(input_range=(0.0, 1.0), domain="images")
    obs, truth = observe(setting.model, setting.loss, setting.inputs, setting.labels, knowledge=known)
    least, smooth = LayerByLayer(method="r-gap")(obs), LayerByLayer()(obs)
    named = [layers.split(", ")[0] for layers in smooth.trace["deficient"]]  # it reads some with what follows them
    assert least.trace["deficient"] == named != []
    assert psnr(smooth, truth.inputs) > psnr(least, truth.inputs) + gain
    assert smooth.bound.tolist() == least.bound.tolist() == [torch.inf]
    assert obs.residual(smooth.inputs, smooth.labels) < 1e-9


@pytest.mark.parametrize("act", [leaky, nn.Tanh, nn.Softplus], ids=["leaky", "tanh", "softplus"])
@TYPES
def test_the_pull_back_constraint_settles_an_inner_layer(
    exchange: Exchange, act: Callable[[], nn.Module], dtype: torch.dtype, floor: float
) -> None:
    obs, x, y = exchange(narrow(act), shape=(3, 12, 12), dtype=dtype)
    least = LayerByLayer(method="r-gap")(obs)
    assert psnr(least, x) < 40
    assert least.bound.tolist() == [torch.inf]
    for method in ("auto", "copa") if dtype == torch.float64 else ("auto",):
        found = LayerByLayer(method=method)(obs)
        assert psnr(found, x) > floor
        assert found.labels.tolist() == y.tolist()
        assert bool(found.bound.isfinite().all())
        assert found.trace["deficient"][0] == "2"
        assert found.trace["undetermined"] == 0


def test_the_hybrid_s_search_nears_the_picture_and_claims_nothing() -> None:
    setting = Case.parse("photos:size=16,model=cnn2-c2,double=true").setting()
    obs, truth = observe(setting.model, setting.loss, setting.inputs, setting.labels)
    least, found = LayerByLayer(method="r-gap")(obs), LayerByLayer(method="hybrid", iterations=100)(obs)
    assert psnr(found, truth.inputs) > psnr(least, truth.inputs) + 8
    assert found.bound.tolist() == [torch.inf]


# ------------------------------------------------------------------------------------------- layers that are not linear


class Residual(nn.Module):
    """act(norm(second(act(norm(first x)))) + x), or beside a 1 x 1 convolution where the shape changes."""

    def __init__(self, width: int, out: int, stride: int = 1, *, act: type[nn.Module] = nn.Tanh, norm: bool = False):
        super().__init__()
        self.first, self.second = nn.Conv2d(width, out, 3, stride, 1), nn.Conv2d(out, out, 3, 1, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(out) if norm else nn.Identity() for _ in range(2))
        self.act, self.last = act(), act()
        same = width == out and stride == 1
        self.beside = nn.Identity() if same else nn.Conv2d(width, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.act(self.norms[0](self.first(x)))
        return self.last(self.norms[1](self.second(inner)) + self.beside(x))


STEM = [conv(3, 8, padding=1), nn.Tanh()]
CURVED = {
    "gelu": [conv(3, 8), nn.GELU()],
    "silu": [conv(3, 8), nn.SiLU(), conv(8, 12), nn.Tanh()],
    "gated": [conv(3, 8), nn.GLU(1), conv(4, 12), nn.Tanh()],
    "power pooling": [conv(3, 8), nn.Tanh(), nn.LPPool2d(2, 2)],
    "residual": [*STEM, Residual(8, 8)],
    "residual, fewer pixels": [*STEM, Residual(8, 8), Residual(8, 16, 2)],
    "residual, normed": [*STEM, Residual(8, 8, norm=True), Residual(8, 16, 2, norm=True)],
    "group norm": [conv(3, 8), nn.GroupNorm(2, 8), nn.Tanh()],
    "layer norm": [conv(3, 8), nn.LayerNorm([8, 6, 6]), nn.Tanh()],
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", CURVED)
def test_layers_that_are_not_linear_are_read_with_those_before_them(exchange: Exchange, name: str) -> None:
    found = exact(*exchange(network(CURVED[name])), 200.0)
    assert found.trace["deficient"] == []


@pytest.mark.parametrize("name", ["silu", pytest.param("residual, normed", marks=pytest.mark.slow)])
def test_they_are_from_float32_gradients_too(exchange: Exchange, name: str) -> None:
    exact(*exchange(network(CURVED[name]), dtype=torch.float32), 90.0)


def test_max_pooling_behind_relu_is_read_where_equations_abound(exchange: Exchange) -> None:
    trunk = [conv(1, 24, padding=1), nn.ReLU(), conv(24, 24, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    exact(*exchange(network(trunk, (1, 6, 6)), shape=(1, 6, 6)), 200.0)


def test_two_residual_blocks_with_kinks_are_annealed() -> None:
    """Gauss and Newton stay on the wrong side of many kinks from every start."""
    trunk = [Residual(3, 3, act=nn.LeakyReLU), Residual(3, 6, 2, act=nn.LeakyReLU)]
    whole = Case.parse("photos:size=32").setting()
    model, known = network(trunk).double(), Knowledge(input_range=(0.0, 1.0), domain="images")
    inputs, labels = whole.inputs[:1, :, ::4, ::4].double(), whole.labels[:1] % 5
    obs, truth = observe(model, whole.loss, inputs, labels, knowledge=known, protocol=Protocol(mode="eval"))
    exact(obs, truth.inputs, truth.labels, 200.0)


def test_what_is_too_large_for_gauss_and_newton_is_said(exchange: Exchange) -> None:
    model = small.build("resnet-small", (1, 8, 8), 10, rng=torch.Generator().manual_seed(0)).double()
    refused(exchange(model, shape=(1, 8, 8))[0], "too many for Gauss and Newton")


def test_the_bound_behind_a_layer_norm_holds(exchange: Exchange) -> None:
    for seed in range(3):
        obs, x, _ = exchange(network(CURVED["layer norm"], seed=seed), seed=seed + 1, dtype=torch.float32)
        found = LayerByLayer()(obs)
        assert psnr(found, x) > 60
        sound(obs, found, x)


def test_batch_norm_on_its_own_statistics_hides_the_mean_of_every_colour(exchange: Exchange) -> None:
    model = network([conv(3, 8), nn.BatchNorm2d(8), nn.Tanh()])
    before = copy.deepcopy(model.state_dict())
    obs, x, _ = exchange(model, mode="train")
    found = LayerByLayer()(obs)
    assert found.trace["deficient"] == ["0, 1"]
    assert found.trace["undetermined"] == pytest.approx(3 / 192)
    assert found.bound.tolist() == [torch.inf]
    off = (found.inputs.double() - x)[0]
    inner = (off - off.mean((1, 2), keepdim=True)).abs().max()
    assert float(off.mean((1, 2)).abs().max()) > 1e-4 > 1e-6 > float(inner)
    for name, tensor in obs.model.state_dict().items():
        assert torch.equal(tensor.double(), before[name].double())


@pytest.mark.parametrize(
    "trunk",
    [pytest.param([conv(3, 8), nn.Tanh(), nn.MaxPool2d(2)], marks=pytest.mark.slow), [conv(3, 8), nn.LeakyReLU(-0.2)]],
)
def test_where_gauss_and_newton_find_no_root_nothing_is_claimed(exchange: Exchange, trunk: list[nn.Module]) -> None:
    obs, x, _ = exchange(network(trunk))
    found = LayerByLayer()(obs)
    assert psnr(found, x) < 40
    assert found.bound.tolist() == [torch.inf]
    assert found.trace["undetermined"] is None
    assert "1" in found.trace["deficient"][-1]


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("trunk", "words"),
    [
        ([conv(3, 8), nn.GLU(1), conv(4, 12), nn.Tanh()], "layer '1' (GLU) cannot be read backward: it has no rule"),
        ([conv(3, 8), nn.Tanh(), nn.LPPool2d(2, 2)], "layer '2' (LPPool2d) cannot be read backward: it has no rule"),
        ([conv(3, 8), nn.LeakyReLU(-0.2)], "layer '1' (LeakyReLU) cannot be read backward: it has no rule"),
        ([conv(3, 8), nn.Tanh(), nn.MaxPool2d(2)], "layer '2' (MaxPool2d)"),
        ([conv(3, 8), nn.MaxPool2d(2), nn.Tanh(), conv(8, 12), nn.Tanh()], "layer '1' (MaxPool2d)"),
        ([conv(3, 8), nn.GELU()], "below 0, where the activation falls and rises: they have two inputs"),
        ([conv(3, 8), nn.SiLU(), conv(8, 12), nn.Tanh()], "layer '1' (SiLU)"),
    ],
)
def test_layers_without_a_way_back_are_named(exchange: Exchange, trunk: list[nn.Module], words: str) -> None:
    refused(exchange(network(trunk))[0], words, method="r-gap")


def test_max_pooling_is_refused_for_its_reason(exchange: Exchange) -> None:
    refused(exchange(network([conv(3, 8), nn.Tanh(), nn.MaxPool2d(2)]))[0], "largest", method="r-gap")


@pytest.mark.parametrize(
    ("norm", "mode"), [(nn.GroupNorm(2, 8), "eval"), (nn.LayerNorm([8, 6, 6]), "eval"), (nn.BatchNorm2d(8), "train")]
)
def test_normalisation_by_the_example_s_own_statistics_is_named(exchange: Exchange, norm: nn.Module, mode: Any) -> None:
    model = network([conv(3, 8), norm, nn.Tanh()])
    refused(exchange(model, mode=mode)[0], "layer '1'", method="r-gap")


def test_dropout_in_train_mode_is_named(exchange: Exchange) -> None:
    model = network([conv(3, 8), nn.Tanh(), nn.Dropout(0.3)])
    obs = exchange(model, mode="train")[0]
    refused(obs, "layer '2' (Dropout)", method="r-gap")
    refused(obs, "layer '2' draws at random")


class Written(nn.Module):
    """Two convolutions by hand: `twice` runs one module in both places, `tied` gives both one weight."""

    def __init__(self, *, twice: bool = False, tied: bool = False) -> None:
        super().__init__()
        self.first, self.second = conv(3, 3, padding=1), conv(3, 3, padding=1)
        self.act, self.again, self.head = nn.Tanh(), nn.Tanh(), nn.Linear(192, 5)
        self.twice = twice
        if tied:
            self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.first(x))
        return self.head(self.again((self.first if self.twice else self.second)(x)).flatten(1))


def test_modules_that_run_twice_and_shared_weights_are_named(exchange: Exchange) -> None:
    refused(exchange(drawn(Written(twice=True)))[0], "'first' runs 2 times")
    refused(exchange(drawn(Written(tied=True)))[0], "'first' and 'second' share a weight")


def test_exchanges_that_it_does_not_read_are_declined_in_words(exchange: Exchange) -> None:
    model = network([conv(3, 6), nn.Tanh()])
    obs, _, _ = exchange(model)
    refused(exchange(model, n=5)[0], "the batch has 5 examples")
    refused(exchange(model, n=2)[0], "the only dense layer is the head")
    untold = replace(exchange(model, n=2)[0], knowledge=Knowledge(input_shape=SMALL))
    refused(untold, "'3' is not of rank one")
    refused(exchange(model, local_steps=2)[0], "local steps")
    refused(changed(obs, lambda _, t: torch.zeros_like(t)), "gradient of '3' is zero")
    refused(replace(obs, update={"0.weight": obs.update["0.weight"]}), "no dense layer")
    refused(exchange(drawn(nn.Sequential(conv(3, 5, 8), nn.Flatten())))[0], "no dense layer")
    dense = drawn(nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 5)))
    refused(exchange(dense, shape=(12,))[0], "nothing lies before the dense layer '0'")
    flat = drawn(nn.Sequential(nn.Flatten(), nn.Linear(12, 5)))
    refused(exchange(flat, shape=(3, 4))[0], "nothing lies before the dense layer '1'")
    refused(exchange(network([conv(3, 8), nn.Tanh()], hidden=(5,)), n=3)[0], "'3' has rank 3, and 5 neurons")
    with pytest.raises(NotApplicable, match="needs input_shape"):
        LayerByLayer()(obs.only("batch_size"))
    loose = changed(exchange(model, dtype=torch.float32)[0], lambda _, t: t.double())
    assert len(LayerByLayer()(loose)) == 1  # its numbers tell that they were rounded to less


def test_a_clipped_update_without_biases_is_declined_in_words(exchange: Exchange) -> None:
    model = network([conv(3, 6), nn.Tanh()], bias=False)
    refused(exchange(model, defences=["clip:norm=0.01"], tell=True)[0], "'3', which has no bias")


@pytest.mark.parametrize("between", [(), (nn.Identity(),), (nn.Dropout(0.5),)], ids=["none", "identity", "dropout"])
def test_two_activations_in_a_row(exchange: Exchange, between: tuple[nn.Module, ...]) -> None:
    exact(*exchange(network([conv(3, 8), nn.Tanh(), *between, leaky()])), 200.0)


def test_batch_norm_statistics_that_were_sent_are_used(exchange: Exchange) -> None:
    obs, x, y = exchange(network([conv(3, 8, padding=1), nn.BatchNorm2d(8), nn.Tanh()]))
    server = copy.deepcopy(obs.model)
    server[1].running_mean += 0.2
    server[1].running_var *= 1.5
    known = obs.knowledge | Knowledge(buffers=dict(obs.model.named_buffers()))
    exact(replace(obs, model=server, knowledge=known), x, y, 200.0)


def smoothed(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs, labels, label_smoothing=0.1)


@pytest.mark.parametrize("what", ["negative factor", "negative loss", "smoothed and confident"])
def test_the_label_where_its_delta_is_not_the_least(exchange: Exchange, what: str) -> None:
    model = network([conv(3, 6), nn.Tanh()])
    if what == "negative factor":
        obs, x, y = exchange(model)
        exact(changed(obs, lambda _, t: -0.3 * t), x, y, 200.0)
    elif what == "negative loss":
        exact(*exchange(model, loss=lambda o, y: -F.cross_entropy(o, y)), 200.0)
    else:
        model[-1].bias.data[2] += 12
        exact(*exchange(model, loss=smoothed, y=torch.tensor([2])), 200.0)


def test_two_classes_on_one_output_with_the_label_told(exchange: Exchange) -> None:
    model = network([conv(3, 6), nn.Tanh()], classes=1)
    exact(*exchange(model, loss=loss_named("binary-cross-entropy"), y=torch.tensor([1]), tell=True), 200.0)


@pytest.mark.parametrize(("bias", "tell"), [(True, False), (False, True)], ids=["not told", "no bias"])
def test_two_classes_on_one_output(exchange: Exchange, bias: bool, tell: bool) -> None:
    model = network([conv(3, 6), nn.Tanh()], classes=1, bias=bias)
    exact(*exchange(model, loss=loss_named("binary-cross-entropy"), y=torch.tensor([1]), tell=tell), 200.0)


def test_the_model_the_update_and_the_modes_are_left_alone(exchange: Exchange) -> None:
    obs, _, _ = exchange(narrow(), shape=(3, 12, 12))
    state = {k: v.clone() for k, v in obs.model.state_dict().items()}
    update = {k: v.clone() for k, v in obs.update.items()}
    modes = [module.training for module in obs.model.modules()]
    LayerByLayer()(obs)
    assert all(torch.equal(v, state[k]) for k, v in obs.model.state_dict().items())
    assert all(torch.equal(v, update[k]) for k, v in obs.update.items())
    assert modes == [module.training for module in obs.model.modules()]


# ------------------------------------------------------------------------------------------------------------ batches


def wide() -> nn.Sequential:
    """A trunk whose outputs determine every picture, and a hidden layer that `unmix` reads."""
    return network([conv(3, 8, padding=1, bias=True), leaky()], hidden=(40,), act=nn.Softplus)


def paired(found: Reconstruction, x: Tensor, y: Tensor, floor: float) -> None:
    near = errors(found, x)[1]
    assert sorted(near.tolist()) == list(range(len(x)))
    assert found.labels.tolist() == y[near].tolist()
    assert psnr(found, x) > floor


@pytest.mark.parametrize("n", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 4))])
def test_every_picture_of_a_small_batch(exchange: Exchange, n: int) -> None:
    obs, x, y = exchange(wide(), n=n)
    found = LayerByLayer()(obs)
    paired(found, x, y, 200.0)
    assert found.trace["deficient"] == []
    assert found.trace["residual"] < 1e-12


@pytest.mark.parametrize(("n", "dtype"), [(2, torch.float64), (3, torch.float32)], ids=["64", "32"])
def test_a_small_batch_s_bounds_are_finite_and_hold(exchange: Exchange, n: int, dtype: torch.dtype) -> None:
    obs, x, y = exchange(wide(), n=n, dtype=dtype)
    found = LayerByLayer()(obs)
    paired(found, x, y, 90.0)
    sound(obs, found, x)
    assert bool(found.bound.isfinite().all())


def test_a_batch_whose_gradients_mix_is_a_guess_that_explains_them(exchange: Exchange) -> None:
    model = network([conv(3, 4, 4, stride=2, padding=1), leaky()], hidden=(60,), act=nn.Softplus)
    one, x, y = exchange(model)
    exact(one, x, y, 200.0)
    obs, x, y = exchange(model, n=2)
    found = LayerByLayer()(obs)
    row = found.trace["readings"][0]
    assert row["equations"] == 2 * 64 + 4 * 3 * 16  # every picture's outputs, and one weight's gradient for both
    assert row["rank"] < row["unknowns"] == 2 * 192
    assert found.trace["deficient"] == ["0"]
    assert found.trace["undetermined"] == pytest.approx(1 - row["rank"] / 384)
    assert found.bound.tolist() == [torch.inf] * 2
    assert obs.residual(found.inputs, found.labels) < 1e-9


def test_one_weight_s_gradient_settles_two_pictures_that_lack_little(exchange: Exchange) -> None:
    model = network([conv(3, 10, 3, stride=2, padding=1), leaky()], hidden=(60,), act=nn.Softplus)
    obs, x, y = exchange(model, n=2)
    found = LayerByLayer()(obs)
    row = found.trace["readings"][0]
    assert 2 * 160 < row["rank"] == row["unknowns"]  # 160 outputs a picture of 192 entries
    paired(found, x, y, 200.0)


def test_a_normalisation_below_the_dense_layer_is_undone_once(exchange: Exchange) -> None:
    obs, x, y = exchange(network([nn.BatchNorm2d(3)], hidden=(40,), act=nn.Softplus), n=2)
    paired(LayerByLayer()(obs), x, y, 200.0)


def test_a_batch_that_is_not_found_whole_is_declined_in_words(exchange: Exchange) -> None:
    """7 neurons are enough for 3 examples, but not from so coarse a gradient."""
    model = network([conv(3, 8, bias=True), nn.Tanh()], hidden=(7,), act=nn.ReLU, seed=2)
    assert len(LayerByLayer()(exchange(model, n=3, seed=3)[0])) == 3
    refused(exchange(model, n=3, seed=3, dtype=torch.float16)[0], "unmix proves the features of 0 of 3 examples")


def rows(trace: Mapping[str, Any]) -> list[str]:
    return [row["layers"] for row in trace["readings"]]


def test_the_trace_names_every_run_of_layers_from_the_last(exchange: Exchange) -> None:
    trunk = [conv(3, 8, padding=1), nn.BatchNorm2d(8), nn.Tanh(), conv(8, 12), nn.AvgPool2d(2), leaky()]
    found = LayerByLayer()(exchange(network(trunk))[0])
    assert rows(found.trace) == ["3, 4", "0, 1, 2"]
    assert found.trace["deficient"] == ["3, 4"]
    assert rows(LayerByLayer(method="r-gap")(exchange(network(trunk))[0]).trace) == ["3, 4", "0, 1"]
