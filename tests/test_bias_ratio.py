from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unbatch
from unbatch import Attack, Knowledge, NotApplicable, Observation, Protocol, observe
from unbatch.case import Case


def example(d: int = 12, n: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(7)
    return torch.rand(n, d, generator=rng), torch.randint(4, (n,), generator=rng)


def mlp(bias: bool = True) -> nn.Module:
    rng = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Linear(12, 9, bias=bias), nn.ReLU(), nn.Linear(9, 4, bias=bias))
    for p in model.parameters():
        p.data = 0.5 * torch.randn(p.shape, generator=rng)
    return model


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "protocol",
    [Protocol(), Protocol(local_steps=5, learning_rate=0.1, momentum=0.9), Protocol(local_steps=3, mode="eval")],
    ids=["gradient", "momentum", "steps"],
)
def test_the_bound_holds_at_every_precision(dtype, protocol) -> None:
    x, y = example()
    obs, truth = observe(mlp().to(dtype), F.cross_entropy, x.to(dtype), y, protocol=protocol)
    if dtype == torch.bfloat16 and protocol.local_steps:  # bf16 parameters swallow small steps: it must not guess
        with pytest.raises(NotApplicable, match="rounding"):
            Attack.parse("bias-ratio")(obs)
        return
    found = Attack.parse("bias-ratio")(obs)
    error = float((found.inputs - truth.inputs.double()).norm() / found.inputs.norm())
    assert error <= float(found.bound[0]) < 1
    assert found.labels.tolist() == y.tolist()


def test_many_random_problems_stay_within_their_bound() -> None:
    rng = torch.Generator().manual_seed(0)
    ratios = []
    for _ in range(100):
        model = nn.Sequential(nn.Linear(20, 6), nn.Tanh(), nn.Linear(6, 3))
        for p in model.parameters():
            p.data = torch.randn(p.shape, generator=rng)
        x, y = 3 * torch.randn(1, 20, generator=rng), torch.randint(3, (1,), generator=rng)
        obs, truth = observe(model, F.cross_entropy, x, y)
        if not obs.update["0.bias"].any():
            continue  # a saturated head sends nothing
        found = Attack.parse("bias-ratio")(obs)
        error = float((found.inputs - truth.inputs.double()).norm() / found.inputs.norm())
        assert error <= found.bound[0]
        ratios.append(float(found.bound[0]) / max(error, 1e-12))
    assert len(ratios) > 80
    assert sorted(ratios)[len(ratios) // 2] < 300  # the bound says something


def test_features_of_a_deeper_layer() -> None:
    setting = Case.parse("photos:model=lenet").setting()
    obs, truth = observe(setting.model, setting.loss, setting.inputs, setting.labels)
    found = Attack.parse("bias-ratio")(obs)
    assert found.layer == "head"
    seen: list[torch.Tensor] = []
    dict(setting.model.named_modules())["head"].register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    with torch.no_grad():
        setting.model(truth.inputs)
    error = float((found.inputs - seen[0].double()).norm() / found.inputs.norm())
    assert error <= found.bound[0] < 1e-5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n": 2}, "2 examples"),
        ({"bias": False}, "no dense layer with a bias"),
        ({"defences": ["noise:sigma=0.1"]}, "not of rank one"),
        ({"protocol": Protocol(local_steps=3, weight_decay=0.5, learning_rate=0.5)}, "weight decay adds"),
        ({"protocol": Protocol(local_steps=2, optimiser="adam")}, "adam rescales every entry"),
        ({"zero": True}, "is zero"),
    ],
)
def test_obstacles_in_words(options: dict, words: str) -> None:
    x, y = example(n=options.pop("n", 1))
    model = mlp(options.pop("bias", True))
    zero = options.pop("zero", False)
    obs, _ = observe(model, F.cross_entropy, x, y, **options)
    if zero:
        update = {k: torch.zeros_like(v) for k, v in obs.update.items()}
        obs = Observation(model=obs.model, loss=obs.loss, update=update, knowledge=obs.knowledge)
    with pytest.raises(NotApplicable, match=words):
        Attack.parse("bias-ratio")(obs)


def test_clipping_and_sign_do_not_matter() -> None:
    x, y = example()
    obs, truth = observe(mlp(), F.cross_entropy, x, y, defences=["clip:norm=0.001"])
    update = {k: -v for k, v in obs.update.items()}
    obs = Observation(model=obs.model, loss=obs.loss, update=update, knowledge=obs.knowledge)
    found = Attack.parse("bias-ratio:tol=1e-4")(obs)
    torch.testing.assert_close(found.inputs, truth.inputs.double(), rtol=1e-4, atol=1e-5)
    assert found.labels.tolist() == y.tolist()


def test_a_mixture_that_looks_like_one_example_is_not_claimed() -> None:
    """Softmax regression on two classes has parallel deltas: any batch gives rank one, and the ratio is an average."""
    rng = torch.Generator().manual_seed(0)
    model = nn.Linear(6, 2)
    x, y = torch.rand(3, 6, generator=rng), torch.tensor([0, 1, 1])
    obs, truth = observe(model, F.cross_entropy, x, y)
    unknown = Observation(
        model=obs.model, loss=obs.loss, update=obs.update, knowledge=Knowledge(input_shape=(6,), mode="train")
    )
    found = Attack.parse("bias-ratio")(unknown)
    assert (found.inputs - truth.inputs).norm(dim=1).min() > 0.1
    assert torch.isinf(found.bound).all()


def test_without_a_batch_size_the_whole_update_decides() -> None:
    x, y = example()
    obs, truth = observe(mlp(), F.cross_entropy, x, y)
    found = Attack.parse("bias-ratio")(obs.only("input_shape", "mode", "local_steps"))
    assert torch.isfinite(found.bound).all()
    assert (found.inputs - truth.inputs.double()).norm() <= found.bound[0] * found.inputs.norm()


def test_a_normalised_input_is_undone() -> None:
    class Normalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net((x - 0.3) / 0.1)

    x, y = example()
    obs, truth = observe(Normalised(), F.cross_entropy, x, y)
    found = Attack.parse("bias-ratio")(obs)
    assert (found.inputs - truth.inputs.double()).norm() <= found.bound[0] * found.inputs.norm()


class Lossy(nn.Module):
    """Features that are drawn anew in every pass, before the only dense layer."""

    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.draw, self.conv, self.head = draw, nn.Conv2d(1, 4, 3, stride=2), nn.Linear(36, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.draw(self.conv(x).tanh().flatten(1)))


@pytest.mark.parametrize(
    "draw",
    [nn.Dropout(0.5), lambda z: F.dropout(z, 0.5, training=True), lambda z: z + 0.1 * torch.randn_like(z)],
    ids=["module", "function", "noise"],
)
def test_features_that_are_drawn_anew_are_not_called_a_false_claim(draw: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    setting = unbatch.Setting(
        model=Lossy(draw), loss=F.cross_entropy, inputs=torch.rand(1, 1, 8, 8), labels=torch.tensor([3])
    )
    audit = unbatch.audit(setting, attacks=["bias-ratio"], analyses=())
    assert not {"exact-claim-fails", "bound-violated"} & {flag.name for flag in audit.flags}
    assert "the features at 'head' are drawn anew in every pass" in audit.runs[0].words
    assert audit.runs[0].examples[0].error is None
    assert audit.runs[0].examples[0].bound is not None


class Shifted(nn.Module):
    def __init__(self, shift: float) -> None:
        super().__init__()
        self.shift, self.first, self.head = shift, nn.Linear(64, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x.flatten(1) + torch.full((64,), self.shift)).tanh())


@pytest.mark.parametrize("shift", [1.0, -40.0])
@pytest.mark.parametrize("attack", ["bias-ratio", "unmix", "layer-by-layer"])
def test_behind_a_constant_the_picture_has_its_shape_and_its_bound_holds(attack: str, shift: float) -> None:
    torch.manual_seed(0)
    model, x, y = Shifted(shift), torch.rand(1, 1, 8, 8), torch.tensor([3])
    seen, _ = unbatch.observe(model, F.cross_entropy, x, y)
    found = unbatch.Attack.parse(attack)(seen, seed=0)
    assert found.inputs is not None
    assert found.bound is not None
    assert found.inputs.shape == x.shape
    error = float((found.inputs - x).norm() / x.norm())
    assert error <= float(found.bound)
    assert error <= 1e-3
