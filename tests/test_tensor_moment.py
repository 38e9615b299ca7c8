from collections.abc import Callable

import pytest
import torch
from clients import Exchange
from torch import Tensor, nn
from torch.nn import functional as F
from two_layer import ACTIVATIONS, ORDER, TwoLayer, client, errors, model

from unbatch import Attack, Knowledge, NotApplicable, Observation, Protocol, Truth, observe
from unbatch.case import Case
from unbatch.domain import Table
from unbatch.loss import loss_named
from unbatch.metric import match
from unbatch.numerics.moments.hermite import coefficients

ODD = {"tanh", "sigmoid", "erf"}


@pytest.mark.parametrize("default", [False, True], ids=["paper", "default"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_at_the_paper_s_and_at_the_default_initialisation(
    exchange: Exchange, name: str, default: bool
) -> None:
    settings = {"k": 5, "n": 4, "norm": 5.0} if default else {}
    obs, x, y = exchange(*client(name, default=default, **settings))
    found = Attack.parse("tensor-moment")(obs)
    error, claim = errors(found, x, y)
    assert float(error.max()) < (1e-10 if name == "x2+x3" else 0.12)
    assert bool(claim.all())
    assert found.trace["order"] == ORDER[name] or default
    signed, scaled = ("sign" not in found.up_to), ("scale" not in found.up_to)
    assert (signed, scaled) == (default or name not in ODD, default)
    labels = found.labels[match(found, Truth(inputs=x, labels=y), Table(shape=(30,))).found]
    expected = y[match(found, Truth(inputs=x, labels=y), Table(shape=(30,))).true]
    if default:
        assert labels.tolist() == expected.tolist()
    elif signed:
        assert float((labels - expected.flatten()).abs().max()) < 0.15


@pytest.mark.parametrize("name", [pytest.param("x2+x3", marks=pytest.mark.slow), "tanh"])
def test_the_targets_at_784_inputs(exchange: Exchange, name: str) -> None:
    """Relative error at d = 784, n = 2, m = 5000, before any polishing; the paper's averages for comparison."""
    limit = {"x2+x3": 0.035, "tanh": 0.015}[name]
    for spec in ("tensor-moment", "tensor-moment:estimate=stein,gradient=first"):
        sizes = [
            errors(Attack.parse(spec)(obs), x, y)[0]
            for obs, x, y in [exchange(*client(name, d=784, m=5000, seed=s)) for s in range(4)]
        ]
        assert float(torch.cat(sizes).mean()) <= limit


def test_few_classes_and_examples_of_one_class(exchange: Exchange) -> None:
    """Residual vectors of one class are nearly parallel: order two alone cannot separate them, the higher orders do."""
    rng = torch.Generator().manual_seed(1)
    made = model(torch.relu, 40, 4000, 3, rng, default=True)
    x = torch.randn(4, 40, generator=rng, dtype=torch.float64)
    obs, x, y = exchange(made, F.cross_entropy, x, torch.tensor([0, 0, 0, 2]))
    error, claim = errors(Attack.parse("tensor-moment")(obs), x, y)
    assert float(error.max()) < 0.2
    assert bool(claim.all())


@pytest.mark.parametrize("loss", ["cross-entropy", "binary-cross-entropy", "squared-error"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_losses_and_their_factors(exchange: Exchange, loss: str, reduction: str) -> None:
    rng = torch.Generator().manual_seed(2)
    made = model(F.gelu, 30, 2000, 4, rng, default=True)
    x, y = torch.randn(4, 30, generator=rng, dtype=torch.float64), torch.tensor([2, 0, 3, 1])
    obs, x, y = exchange(made, loss_named(loss, reduction), x, y)
    found = Attack.parse("tensor-moment")(obs)
    matching = match(found, Truth(inputs=x, labels=y), Table(shape=(30,)))
    assert found.labels[matching.found].tolist() == y[matching.true].tolist()
    outputs = made(x[matching.true]).detach().requires_grad_()
    (residuals,) = torch.autograd.grad(loss_named(loss, reduction)(outputs, y[matching.true]), outputs)
    recovered = found.trace["residuals"][matching.found]
    assert float((recovered - residuals).norm() / residuals.norm()) < 0.05


@pytest.mark.parametrize(
    "options",
    [
        "gradient=first",
        "gradient=head",
        "gradient=both",
        "estimate=stein",
        "estimate=regression",
        "order=4,gradient=head",
    ],
)
def test_options(exchange: Exchange, options: str) -> None:
    obs, x, y = exchange(*client("elu", d=20, m=8000, seed=3))
    error, claim = errors(Attack.parse(f"tensor-moment:{options}")(obs), x, y)
    assert float(error.max()) < 0.3
    assert bool(claim.all())


@pytest.mark.parametrize("name", ["x2+x3", "tanh"])
@pytest.mark.parametrize("gradient", ["first", "head"])
def test_the_paper_s_subspace(exchange: Exchange, name: str, gradient: str) -> None:
    obs, x, y = exchange(*client(name, d=6, m=40_000, seed=1))
    spec = f"tensor-moment:subspace=moment,estimate=stein,gradient={gradient},norm=1"
    if gradient == "head":
        obs = Observation(
            model=obs.model, loss=obs.loss, update={"outer.weight": obs.update["outer.weight"]}, knowledge=obs.knowledge
        )
    found = Attack.parse(spec)(obs)
    assert found.trace["orders of the subspace"] == ([3] if name == "tanh" else [2, 3])
    error, claim = errors(found, x, y)
    assert float(error.max()) < 0.5
    assert bool(claim.all())


def test_a_sign_that_only_the_loss_tells(exchange: Exchange) -> None:
    """tanh without biases gives the same gradient for (-x, -r); only softmax minus one-hot residuals fit the loss."""
    rng = torch.Generator().manual_seed(4)
    made = TwoLayer(torch.tanh, 30, 3000, 5).double()
    for p in made.parameters():
        p.data = torch.randn(p.shape, generator=rng, dtype=torch.float64) / p.shape[1] ** 0.5
    x = torch.randn(3, 30, generator=rng, dtype=torch.float64)
    x *= 6 / x.norm(dim=1, keepdim=True)
    obs, x, y = exchange(made, F.cross_entropy, x, torch.tensor([0, 4, 2]))
    found = Attack.parse("tensor-moment:norm=6")(obs)
    assert found.up_to == {"permutation"}
    assert float(errors(found, x, y)[0].max()) < 0.1


def test_a_quadratic_activation_with_several_outputs_leaks_all_but_signs(exchange: Exchange) -> None:
    """T_k = sum_i r_ik x_i x_i^T is a three-way CP; s is even, so x and -x send the same gradient."""
    rng = torch.Generator().manual_seed(5)
    made = model(torch.square, 20, 3000, 4, rng, default=False)
    made.outer.weight.data /= 3000**0.5
    x = torch.randn(3, 20, generator=rng, dtype=torch.float64)
    x /= x.norm(dim=1, keepdim=True)
    obs, x, y = exchange(made, F.cross_entropy, x, torch.tensor([0, 3, 2]))
    found = Attack.parse("tensor-moment:norm=1")(obs)
    assert (found.trace["order"], found.up_to) == (2, {"permutation", "sign"})
    assert float(errors(found, x, y)[0].max()) < 1e-9


@pytest.mark.parametrize("name", sorted(ODD))
def test_the_head_s_bias_tells_the_signs(exchange: Exchange, name: str) -> None:
    """Of an odd activation without a bias before it: its gradient is the sum of the residuals, which flip with x."""
    rng = torch.Generator().manual_seed(5)
    made = TwoLayer(ACTIVATIONS[name], 20, 20_000).double()
    made.inner.weight.data = torch.randn(20_000, 20, generator=rng, dtype=torch.float64)
    made.outer.weight.data.fill_(1 / 20_000)
    x = torch.randn(3, 20, generator=rng, dtype=torch.float64)
    x /= x.norm(dim=1, keepdim=True)
    y = torch.tensor([[2.0], [-1.0], [4.5]], dtype=torch.float64)
    found = Attack.parse("tensor-moment:norm=1")(observe(made, loss_named("squared-error"), x, y)[0])
    assert found.up_to == {"permutation", "sign"}
    made.outer = nn.Linear(20_000, 1).double()
    made.outer.weight.data.fill_(1 / 20_000)
    made.outer.bias.data.fill_(0.25)
    obs, x, y = exchange(made, loss_named("squared-error"), x, y)
    found = Attack.parse("tensor-moment:norm=1")(obs)
    assert found.up_to == {"permutation"}
    assert float(errors(found, x, y)[0].max()) < 0.1
    matching = match(found, Truth(inputs=x, labels=y), Table(shape=(20,)))
    assert float((found.labels[matching.found] - y[matching.true, 0]).abs().max()) < 0.3


def test_one_example_needs_no_moments_whatever_the_activation(exchange: Exchange) -> None:
    rng = torch.Generator().manual_seed(0)
    made = model(lambda t: t, 20, 50, 3, rng, default=True)
    x = torch.randn(1, 20, generator=rng, dtype=torch.float64)
    obs, x, y = exchange(made, F.cross_entropy, x, torch.tensor([1]))
    found = Attack.parse("tensor-moment")(obs)
    error, claim = errors(found, x, y)
    assert float(error.max()) < 1e-12
    assert bool(claim.all())
    assert found.labels.tolist() == [1]


def test_the_batch_size_need_not_be_known(exchange: Exchange) -> None:
    obs, x, y = exchange(*client("gelu", n=3, d=30, default=True, k=4, norm=4.0))
    found = Attack.parse("tensor-moment")(obs.only("input_shape", "mode", "local_steps"))
    assert len(found) == found.trace["examples"] == 3
    assert float(errors(found, x, y)[0].max()) < 0.1


@pytest.mark.parametrize("constant", [0.0, 0.3])
def test_a_constant_bias_is_no_weight_but_fixes_the_scale(exchange: Exchange, constant: float) -> None:
    rng = torch.Generator().manual_seed(6)
    made = model(torch.tanh, 30, 4000, 4, rng, default=True)
    made.inner.weight.data *= 3
    made.inner.bias.data.fill_(constant)
    x = torch.randn(3, 30, generator=rng, dtype=torch.float64) / 2
    obs, x, y = exchange(made, F.cross_entropy, x, torch.tensor([0, 1, 1]))
    found = Attack.parse("tensor-moment")(obs)
    error, claim = errors(found, x, y)
    assert found.up_to == {"permutation"}
    assert float(error.max()) < 0.1
    assert bool(claim.all())


def test_in_single_precision_on_real_images(exchange: Exchange) -> None:
    setting = Case.parse("digits:batch=4,width=2000,activation=gelu").setting()
    obs, x, y = exchange(setting.model, setting.loss, setting.inputs, setting.labels)
    error, claim = errors(Attack.parse("tensor-moment")(obs), x, y)
    assert float(error.max()) < 0.05
    assert bool(claim.all())


def test_a_normalised_input_and_a_deeper_feature(exchange: Exchange) -> None:
    class Normalised(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return self.net((x - 0.4) / 0.2)

    rng = torch.Generator().manual_seed(7)
    x, y = torch.rand(3, 30, generator=rng, dtype=torch.float64), torch.tensor([0, 1, 2])
    obs, x, y = exchange(Normalised(model(F.gelu, 30, 3000, 3, rng, default=True)), F.cross_entropy, x, y)
    error, claim = errors(Attack.parse("tensor-moment")(obs), x, y)
    assert float(error.max()) < 0.1
    assert bool(claim.all())
    deep = nn.Sequential(nn.Linear(12, 30).double(), nn.Tanh(), model(F.gelu, 30, 3000, 3, rng, default=True))
    obs, x, y = exchange(deep, F.cross_entropy, torch.randn(3, 12, generator=rng, dtype=torch.float64) * 3, y)
    found = Attack.parse("tensor-moment")(obs)
    assert found.layer == "2.inner"
    features = deep[1](deep[0](x)).detach()
    error, claim = errors(found, features, y)
    assert float(error.max()) < 0.2
    assert bool(claim.all())


class Raw(nn.Module):
    """Two matrices used by hand, under names of their own, the activation written out."""

    def __init__(self, d: int, m: int, k: int, rng: torch.Generator) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.randn(m, d, generator=rng, dtype=torch.float64) / d**0.5)
        self.shift = nn.Parameter(torch.randn(m, generator=rng, dtype=torch.float64) / d**0.5)
        self.out = nn.Parameter(torch.randn(k, m, generator=rng, dtype=torch.float64) / m**0.5)

    def forward(self, pictures: Tensor) -> Tensor:
        z = F.linear(pictures.reshape(len(pictures), -1), self.theta, self.shift)
        return F.linear(z * torch.sigmoid(1.7 * z), self.out)


def test_a_custom_module_with_its_own_parameters_and_activation(exchange: Exchange) -> None:
    rng = torch.Generator().manual_seed(8)
    x, y = torch.randn(3, 2, 4, 4, generator=rng, dtype=torch.float64), torch.tensor([3, 0, 1])
    obs, x, y = exchange(Raw(32, 4000, 4, rng), F.cross_entropy, x, y)
    found = Attack.parse("tensor-moment")(obs)
    error, claim = errors(found, x, y)
    assert found.inputs.shape == x.shape
    assert float(error.max()) < 0.1
    assert bool(claim.all())


@pytest.mark.parametrize(("scale", "norm"), [(0.02, 5.0), (4.0, 0.4)])
def test_weight_scales_other_than_one(exchange: Exchange, scale: float, norm: float) -> None:
    rng = torch.Generator().manual_seed(9)
    made = model(F.softplus, 20, 4000, 4, rng, default=False)
    made.inner.weight.data *= scale
    made.outer.weight.data /= 4000**0.5
    x = torch.randn(3, 20, generator=rng, dtype=torch.float64)
    x *= norm / x.norm(dim=1, keepdim=True)
    obs, x, y = exchange(made, F.cross_entropy, x, torch.tensor([0, 1, 3]))
    error, claim = errors(Attack.parse(f"tensor-moment:norm={norm}")(obs), x, y)
    assert float(error.max()) < 0.1
    assert bool(claim.all())


def test_correlated_weights_are_whitened(exchange: Exchange) -> None:
    """Rows of W from N(0, C), C of condition number 36: Stein's identity holds in coordinates where they are white."""
    rng = torch.Generator().manual_seed(10)
    made = model(torch.tanh, 20, 6000, 4, rng, default=False)
    made.inner.weight.data *= torch.linspace(0.05, 0.3, 20, dtype=torch.float64)
    made.outer.weight.data /= 6000**0.5
    x = torch.randn(3, 20, generator=rng, dtype=torch.float64)
    x *= 4 / x.norm(dim=1, keepdim=True)
    obs, x, y = exchange(made, F.cross_entropy, x, torch.tensor([0, 1, 3]))
    error, claim = errors(Attack.parse("tensor-moment:norm=4")(obs), x, y)
    assert float(error.max()) < 0.1
    assert bool(claim.all())


def test_the_bias_of_a_uniform_initialisation_is_measured_and_reported(exchange: Exchange) -> None:
    """Uniform weights have fourth cumulant -1.2: along an input it is -1.2 sum x^4 / |x|^4, so it shows at small d."""
    found = {}
    for d in (3, 300):
        obs, x, y = exchange(*client("gelu", n=2, d=d, m=20_000, k=5, default=True, norm=3.0, seed=2))
        one = Attack.parse("tensor-moment")(obs)
        found[d] = one.trace["bias of the moments over their noise"]
        assert found[d] == pytest.approx(20_000**0.5 * one.trace["non-Gaussianity of the weights"])
        assert bool(errors(one, x, y)[1].all())
    assert found[300] < 1.5 < 3 < found[3]
    gaussian, _, _ = exchange(*client("gelu", n=2, d=3, m=20_000, k=5, seed=2))
    assert Attack.parse("tensor-moment")(gaussian).trace["bias of the moments over their noise"] < 1.5


@pytest.mark.parametrize("gradient", ["first", "head", "both"])
@pytest.mark.parametrize(("name", "order"), [("gelu", 2), ("gelu", 4), ("elu", 3), ("elu", 4), ("tanh", 3)])
def test_every_order_from_every_gradient(exchange: Exchange, name: str, order: int, gradient: str) -> None:
    """Ten outputs: residual vectors are not parallel, so that order 2 is enough where it does not vanish."""
    obs, x, y = exchange(*client(name, n=3, d=20, m=6000, k=10, default=True, norm=4.0, seed=3))
    found = Attack.parse(f"tensor-moment:order={order},gradient={gradient}")(obs)
    error, claim = errors(found, x, y)
    assert found.trace["order"] == order
    assert "as asked" in found.trace["why"]
    routes = {"both": {"first", "head"}}.get(gradient, {gradient})
    assert {key.split(",")[0] for key in found.trace["noise of the moments"]} == routes
    assert float(error.max()) < 0.25
    assert bool(claim.all())


@pytest.mark.parametrize(("name", "order"), [("tanh", 3), ("relu", 4), ("x2+x3", 3)])
def test_auto_says_why(exchange: Exchange, name: str, order: int) -> None:
    obs, _, _ = exchange(*client(name))
    trace = Attack.parse("tensor-moment")(obs).trace
    assert trace["order"] == order
    words, values = trace["why"].split(": ")
    assert words == "the largest of the orders that separate inputs; E s^(p) for p = 1 ... 4"
    stated = torch.tensor([float(value) for value in values.split(", ")], dtype=torch.float64)
    torch.testing.assert_close(stated, coefficients(ACTIVATIONS[name])[1:], rtol=0.03, atol=1e-9)


def test_two_directions_that_collapse_into_one_carry_no_claim(exchange: Exchange) -> None:
    """A CP fit can answer with two parallel columns of opposite, huge weights; first order then predicts a tiny error."""
    collapsed = 0
    for seed in range(12):
        rng = torch.Generator().manual_seed(seed)
        made = model(torch.relu, 30, 1500, 2, rng, default=True)
        made.inner.weight.data *= 3
        x = torch.randn(3, 30, generator=rng, dtype=torch.float64)
        x[1:] = x[:1] + 0.4 * x[1:]
        obs, x, y = exchange(made, F.cross_entropy, x, torch.tensor([0, 1, 0]))
        found = Attack.parse("tensor-moment")(obs)
        error, claim = errors(found, x, y)
        collapsed += bool((error > 0.5).any())
        assert bool(claim.all())
    assert collapsed


def cheap(s: Callable[[Tensor], Tensor], n: int = 2, k: int = 1, d: int = 10, **options: object) -> Observation:
    rng = torch.Generator().manual_seed(0)
    made = model(s, d, 400, k, rng, default=False)
    x = torch.randn(n, d, generator=rng, dtype=torch.float64)
    if options.pop("dependent", False):
        x[-1] = x[0] + x[1]
    if k > 1:
        return observe(made, F.cross_entropy, x, torch.randint(k, (n,), generator=rng), **options)[0]
    return observe(made, loss_named("squared-error"), x, torch.ones(n, 1, dtype=torch.float64), **options)[0]


@pytest.mark.parametrize(
    ("spec", "make", "words"),
    [
        ("", lambda: cheap(lambda t: 2 * t + 1, k=4), "only the weighted sum of the inputs"),
        ("", lambda: cheap(lambda t: 2 * t + 1), "only the weighted sum of the inputs"),
        ("", lambda: cheap(lambda t: t**2 - t), "only the span of the inputs"),
        ("order=3", lambda: cheap(torch.relu), "E s''' is exactly 0 for this activation: use order 4"),
        ("order=3", lambda: cheap(F.gelu), "use order 4"),
        ("order=3", lambda: cheap(F.silu), "use order 4"),
        ("order=3", lambda: cheap(F.softplus), "use order 4"),
        ("order=4", lambda: cheap(torch.tanh), "E s'''' is exactly 0 for this activation: use order 3"),
        ("order=2", lambda: cheap(torch.relu), "of one output it gives only the span; use order 4"),
        ("order=2", lambda: cheap(torch.tanh, k=3), "E s'' is exactly 0; use order 3"),
        ("", lambda: cheap(torch.relu, n=4, dependent=True), "rank 3 for 4 examples.*dependent"),
        ("", lambda: cheap(torch.relu, n=12), "n > d"),
        ("", lambda: cheap(torch.relu, protocol=Protocol(local_steps=2)), "local steps"),
    ],
)  # fmt: skip
def test_obstacles_in_words(spec: str, make: Callable[[], Observation], words: str) -> None:
    with pytest.raises(NotApplicable, match=words):
        Attack.parse(f"tensor-moment:{spec}" if spec else "tensor-moment")(make())


def test_obstacles_of_the_network() -> None:
    attack = Attack.parse("tensor-moment")
    x, y = torch.randn(2, 6, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1])
    for layers, words in [
        ([nn.Linear(6, 3)], "does not end in two dense layers"),
        ([nn.Linear(6, 40), nn.LayerNorm(40), nn.ReLU(), nn.Linear(40, 3)], "more than an elementwise activation"),
        ([nn.Linear(6, 40), nn.ReLU(), nn.Dropout(), nn.Linear(40, 3)], "more than an elementwise activation"),
        ([nn.Linear(6, 40), nn.ReLU(), nn.BatchNorm1d(40), nn.Linear(40, 3)], "more than an elementwise activation"),
    ]:
        obs, _ = observe(nn.Sequential(*layers), F.cross_entropy, x, y)
        with pytest.raises(NotApplicable, match=words):
            attack(obs)


def test_what_was_not_sent() -> None:
    obs = cheap(F.elu)
    frozen = {k: v for k, v in obs.update.items() if k != "inner.weight"}
    only_head = Observation(model=obs.model, loss=obs.loss, update=frozen, knowledge=obs.knowledge)
    with pytest.raises(NotApplicable, match="sent no gradient; use gradient=head,subspace=moment"):
        Attack.parse("tensor-moment")(only_head)
    unknown = only_head.only("input_shape", "mode")
    with pytest.raises(NotApplicable, match="neither dL/dW nor batch_size"):
        Attack.parse("tensor-moment:gradient=head,subspace=moment")(unknown)
    frozen = {k: v for k, v in obs.update.items() if k != "outer.weight"}
    only_first = Observation(model=obs.model, loss=obs.loss, update=frozen, knowledge=obs.knowledge)
    with pytest.raises(NotApplicable, match="use gradient=first"):
        Attack.parse("tensor-moment:gradient=head")(only_first)
    assert len(Attack.parse("tensor-moment")(only_first)) == 2


def test_noise_of_full_rank_without_a_batch_size() -> None:
    obs = cheap(F.elu)
    noisy = {
        k: v + 1e-4 * torch.randn(v.shape, generator=torch.Generator().manual_seed(0)) for k, v in obs.update.items()
    }
    unknown = Observation(
        model=obs.model, loss=obs.loss, update=noisy, knowledge=Knowledge(input_shape=(10,), mode="train")
    )
    with pytest.raises(NotApplicable, match="full rank"):
        Attack.parse("tensor-moment")(unknown)


def test_a_trained_network_is_refused() -> None:
    setting = Case.parse("digits:batch=4,width=1000,activation=gelu").setting()
    more = Case.parse("digits:batch=300,width=1000,activation=gelu").setting()
    optimiser = torch.optim.Adam(setting.model.parameters(), 1e-3)
    for _ in range(150):
        optimiser.zero_grad()
        setting.loss(setting.model(more.inputs), more.labels).backward()
        optimiser.step()
    obs, _ = observe(setting.model, setting.loss, setting.inputs, setting.labels)
    with pytest.raises(NotApplicable, match="too far from Gaussian"):
        Attack.parse("tensor-moment")(obs)


@pytest.mark.parametrize("default", [False, True], ids=["paper", "default"])
def test_the_bound_holds_and_says_something(exchange: Exchange, default: bool) -> None:
    """20 trials over all activations; the slow tests run 200 for each."""
    held, ratios = 0, []
    names = list(ACTIVATIONS)
    for seed in range(20):
        settings = {"k": 4, "n": 3, "norm": 3.0} if default else {}
        obs, x, y = exchange(*client(names[seed % len(names)], m=1500, default=default, seed=100 + seed, **settings))
        found = Attack.parse("tensor-moment")(obs)
        error, claim = errors(found, x, y)
        held += bool(claim.all())
        if names[seed % len(names)] != "x2+x3":
            ratios.append(float(found.bound.median() / error.median()))
    assert held >= 19
    assert sorted(ratios)[len(ratios) // 2] < 20
