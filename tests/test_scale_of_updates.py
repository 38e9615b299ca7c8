"""Updates that are a multiple of the gradient: summed clients, micro-batches, half a loss, loss scaling, a step of SGD."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unbatch
from unbatch.attacks.unmix import Unmix
from unbatch.case import Case
from unbatch.errors import NotApplicable
from unbatch.inversion.weighing import Weighing
from unbatch.knowledge import Earlier, Knowledge
from unbatch.likelihood import Likelihood
from unbatch.loss import identify
from unbatch.observation import Observation
from unbatch.protocol import Protocol

FACTORS = (-1.0, -0.05, 0.5, 2.0, 3.0, 4.0, 1024.0)


class Client:
    """A batch, a small network, and the gradients of parts of the batch."""

    def __init__(
        self, n: int = 4, *, activation: nn.Module | None = None, classes: int = 10, bias: bool = True, width: int = 48
    ) -> None:
        rng = torch.Generator().manual_seed(3)
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(64, width, bias=bias), activation or nn.ReLU(), nn.Linear(width, classes)
        )
        for p in self.net.parameters():
            p.data = (2 * torch.rand(p.shape, generator=rng) - 1) / p.shape[-1] ** 0.5
        self.x, self.y = torch.rand(n, 1, 8, 8, generator=rng), torch.randint(classes, (n,), generator=rng)

    def gradient(self, part: slice = slice(None), factor: float = 1.0) -> dict[str, Tensor]:
        value = F.cross_entropy(self.net(self.x[part]), self.y[part])
        names = [name for name, _ in self.net.named_parameters()]
        return {
            k: factor * g for k, g in zip(names, torch.autograd.grad(value, list(self.net.parameters())), strict=True)
        }

    def seen(self, update: dict[str, Tensor], **known) -> Observation:
        told = Knowledge(input_shape=(1, 8, 8), **known)
        return Observation(model=self.net, loss=F.cross_entropy, update=update, knowledge=told)

    def found_all(self, found: unbatch.Reconstruction) -> None:
        """Every example once, each within a bound of its own, under its own label."""
        gap = (
            torch.cdist(found.inputs.flatten(1), self.x.double().flatten(1))
            / found.inputs.flatten(1).norm(dim=1)[:, None]
        )
        assert sorted(gap.argmin(1).tolist()) == list(range(len(self.x)))
        assert bool((gap.min(1).values <= found.bound).all())
        assert bool((found.bound < 1e-2).all())
        assert torch.equal(found.labels, self.y[gap.argmin(1)])


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU()])
@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("factor", FACTORS)
def test_any_multiple_of_a_gradient_gives_the_batch_and_says_the_factor(
    activation: nn.Module, told: bool, factor: float
) -> None:
    client = Client(activation=activation)
    found = Unmix()(client.seen(client.gradient(factor=factor), **({"batch_size": 4} if told else {})))
    client.found_all(found)
    assert found.trace["factor"] == pytest.approx(factor, rel=1e-3)
    number = f"{factor:.3f}" if factor < 100 else f"{factor:.4g}"
    assert f"{number} times the mean gradient of these 4 examples" in found.trace["words"]
    assert found.trace["weights"] == pytest.approx([factor / 4] * 4, rel=1e-3)


def test_a_gradient_as_it_is_needs_no_words() -> None:
    client = Client()
    found = Unmix()(client.seen(client.gradient(), batch_size=4))
    assert "words" not in found.trace
    assert found.trace["factor"] == 1.0


@pytest.mark.parametrize("clients", [2, 3, 4])
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU()])
@pytest.mark.parametrize("told", [True, False])
def test_summed_clients_are_read_with_equal_shares_and_unequal(clients: int, activation: nn.Module, told: bool) -> None:
    client = Client(activation=activation)
    parts = [client.gradient(slice(int(i[0]), int(i[-1]) + 1)) for i in torch.arange(4).tensor_split(clients)]
    update = {k: torch.stack([part[k] for part in parts]).sum(0) for k in parts[0]}
    known = {"batch_size": 4, **({"clients": clients} if told else {})}
    found = Unmix()(client.seen(update, **known))
    client.found_all(found)
    if clients != 3:
        assert f"{clients}" in found.trace["words"]
    elif told:
        assert found.trace["words"] == "The update is the sum of the mean gradients of 3 clients."
        assert client.seen(update, **known).residual(found.inputs.float(), found.labels) < 1e-4
    else:
        assert sum(found.trace["weights"]) == pytest.approx(3.0, rel=1e-3)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU()])
def test_one_example_at_another_scale(activation: nn.Module) -> None:
    client = Client(1, activation=activation)
    found = Unmix()(client.seen(client.gradient(factor=3.0), batch_size=1))
    client.found_all(found)
    assert found.trace["words"] == "The update is 3.000 times the mean gradient of this one example."


@pytest.mark.parametrize("factor", [1.0, -1.0, 0.5])
def test_two_classes_are_told_by_the_weights_that_they_give_the_examples(factor: float) -> None:
    client = Client(activation=nn.GELU(), classes=2)
    found = Unmix()(client.seen(client.gradient(factor=factor), batch_size=4))
    client.found_all(found)
    assert found.trace["factor"] == pytest.approx(factor, rel=1e-3)


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_a_layer_without_a_bias(factor: float) -> None:
    client = Client(3, activation=nn.GELU(), bias=False, width=80)
    found = Unmix()(client.seen(client.gradient(factor=factor), batch_size=3))
    client.found_all(found)


def test_a_batch_that_is_larger_than_known_is_never_returned() -> None:
    """Four times the mean of two looks like two examples four times each."""
    client = Client(2)
    for known in ({"batch_size": 2}, {}):
        found = Unmix()(client.seen(client.gradient(factor=4.0), **known))
        client.found_all(found)


def test_a_phantom_of_the_wrong_factor_does_not_stop_the_others() -> None:
    setting = Case.parse("photos:batch=16,size=16,width=200,activation=gelu").setting()
    seen, _ = unbatch.observe(setting.model, setting.loss, setting.inputs, setting.labels)
    found = Unmix()(replace(seen, update={k: 2 * u for k, u in seen.update.items()}), seed=1)
    assert (len(found), found.trace["certified"]) == (16, 16)
    assert found.trace["factor"] == pytest.approx(2.0, rel=1e-3)


STEP = Protocol(local_steps=1, learning_rate=0.05)


@pytest.mark.parametrize(
    "protocol",
    [
        STEP,
        Protocol(local_steps=1, learning_rate=0.05, momentum=0.9),
        Protocol(local_steps=1, learning_rate=0.05, weight_decay=0.1),
        Protocol(epochs=1, learning_rate=0.05),
        Protocol(local_steps=1, learning_rate=0.5, momentum=0.9, weight_decay=0.01),
    ],
    ids=str,
)
@pytest.mark.parametrize("attack", ["unmix", "bias-ratio"])
def test_one_step_of_sgd_is_a_gradient(protocol: Protocol, attack: str) -> None:
    if attack == "bias-ratio" and protocol.weight_decay:
        pytest.skip("it refuses weight decay in words")
    client = Client(1 if attack == "bias-ratio" else 4, activation=nn.GELU())
    seen, _ = unbatch.observe(client.net, F.cross_entropy, client.x, client.y, protocol=protocol)
    client.found_all(unbatch.Attack.parse(attack)(seen))


def test_a_step_as_a_gradient_is_as_coarse_as_the_parameters_were() -> None:
    client = Client(activation=nn.GELU())
    seen, _ = unbatch.observe(client.net, F.cross_entropy, client.x, client.y, protocol=STEP)
    again = seen.as_gradient()
    for name, g in client.gradient().items():
        off = float((again.update[name] - g).square().mean().sqrt())
        assert 0.2 * off < again.rounding(name) < 5 * off
    bounds = [float(Unmix()(o).bound.max()) for o in (client.seen(client.gradient(), batch_size=4), seen)]
    assert bounds[1] > 2 * bounds[0]


def test_a_step_without_its_learning_rate_and_a_sign_turned_round_are_fitted() -> None:
    client = Client(activation=nn.GELU())
    step = {k: -0.05 * g for k, g in client.gradient().items()}
    turned = {k: -u for k, u in step.items()}
    rate = {"local_steps": 1, "learning_rate": 0.05}
    for update, known, factor in (
        (step, rate, 1.0),
        (step, {"local_steps": 1}, 0.05),
        (step, {}, -0.05),
        (turned, rate, -1.0),
        (turned, {}, 0.05),
    ):
        found = Unmix()(client.seen(update, batch_size=4, **known))
        client.found_all(found)
        assert found.trace["factor"] == pytest.approx(factor, rel=1e-3)


def test_what_is_no_single_step_is_left_as_it_is() -> None:
    client = Client()
    for known in (
        {},
        {"local_steps": 2, "learning_rate": 0.1},
        {"local_steps": 1, "learning_rate": 0.1, "optimiser": "adam"},
        {"epochs": 1, "local_batch_size": 2, "learning_rate": 0.1, "batch_size": 4},
        {"epochs": 1, "local_batch_size": 2, "learning_rate": 0.1},
        {"local_steps": 1, "weight_decay": 0.1},
    ):
        seen = client.seen(client.gradient(), **known)
        assert seen.as_gradient() is seen


def test_a_step_on_a_part_of_the_batch_is_the_gradient_of_that_part() -> None:
    client = Client(4)
    known = {"local_steps": 1, "learning_rate": 0.1, "local_batch_size": 3, "batch_size": 4, "labels": client.y}
    again = client.seen(client.gradient(slice(3), -0.1), **known).as_gradient()
    assert again.knowledge.batch_size == 3
    assert torch.equal(again.knowledge.labels, client.y[:3])
    assert again.residual(client.x[:3], client.y[:3]) < 1e-6


def test_noise_laws_and_earlier_rounds_are_told_in_the_unit_of_the_gradient() -> None:
    client = Client()
    g = client.gradient()
    w = {name: p.detach() for name, p in client.net.named_parameters()}
    step = {k: -0.1 * (g[k] + 0.5 * w[k]) for k in g}
    law = Likelihood.gaussian(0.01)
    past = Earlier(state=client.net.state_dict(), update=step)
    known = {
        "local_steps": 1,
        "learning_rate": 0.1,
        "weight_decay": 0.5,
        "noise": 0.01,
        "clip": 2.0,
        "log_prob": law,
        "earlier": (past,),
        "server_rate": 1.0,
    }
    again = client.seen(step, **known).as_gradient()
    assert (again.knowledge.noise, again.knowledge.clip, again.knowledge.server_rate) == pytest.approx((0.1, 20, 0.1))
    for update in (again.update, again.knowledge.earlier[0].update):
        for k in g:
            torch.testing.assert_close(update[k], g[k], rtol=1e-3, atol=1e-6)
    other = {k: 1.1 * u for k, u in step.items()}
    told = again.knowledge.log_prob
    as_seen = replace(client.seen(other, **known)).as_gradient().update
    assert float(told(as_seen, g)) == pytest.approx(float(law(other, step)), rel=1e-3)
    assert told.spread(g)["1.weight"] == pytest.approx(0.1)


def test_how_often_examples_occur_follows_from_how_much_they_count() -> None:
    mean, total = (identify(nn.CrossEntropyLoss(reduction=r), (2, 3)) for r in ("mean", "sum"))
    cases = (
        (mean, [0.25, 0.5, 0.25], 4, 1, [1, 2, 1], 1.0),  # one occurs twice
        (mean, [0.25, 0.25], 4, 1, [1, 1], 1.0),  # two were not found, or depend on these
        (mean, [0.5, 0.5], 2, 1, [1, 1], 1.0),
        (mean, [1.0, 1.0], 2, 1, [1, 1], 2.0),
        (mean, [0.5, 0.5, 1.0], None, 1, [1, 1, 2], 2.0),
        (mean, [1 / 3, 0.5], 5, 2, [1, 1], 2.0),
        (mean, [-0.5, -0.5], 2, 1, [1, 1], -1.0),
        (total, [1.0, 2.0], None, 1, [1, 2], 1.0),
        (total, [2.0, 2.0], 4, 1, [2, 2], 1.0),
        (total, [2.0, 2.0], 2, 1, [1, 1], 2.0),
    )
    for form, weights, n, clients, times, factor in cases:
        told = Weighing.of(torch.tensor(weights), form, rank=len(weights), n=n, clients=clients)
        assert told.times.tolist() == times, weights
        assert told.factor == pytest.approx(factor), weights
    part = Weighing.of(torch.tensor([0.5, 0.5]), mean, rank=4, n=4)  # the other two stand for one each at least
    assert (part.times.tolist(), part.factor) == ([1, 1], 2.0)
    uneven = Weighing.of(torch.tensor([0.3, 0.41]), mean, rank=2, n=2)
    assert uneven.times.tolist() == [1, 1]
    assert "count unequally in the update, 0.3 to 0.41" in uneven.words


def regression(n: int, wide: int, hidden: int, targets: int, loss=F.mse_loss) -> tuple[Observation, Tensor, Tensor]:
    """What a server sees of a regression on real targets behind one hidden layer, its inputs and targets."""
    rng = torch.Generator().manual_seed(5)
    net = nn.Sequential(nn.Linear(wide, hidden), nn.ELU(), nn.Linear(hidden, targets))
    for p in net.parameters():
        p.data = (2 * torch.rand(p.shape, generator=rng) - 1) / p.shape[-1] ** 0.5
    x, y = torch.rand(n, wide, generator=rng), torch.rand(n, targets, generator=rng)
    return unbatch.observe(net, loss, x, y)[0], x, y


@pytest.mark.parametrize(
    ("n", "wide", "hidden", "targets"), [(2, 115, 58, 115), (1, 20, 12, 12), (4, 40, 30, 24), (3, 40, 30, 200)]
)
@pytest.mark.parametrize("loss", [F.mse_loss, F.binary_cross_entropy_with_logits])
def test_more_targets_than_neurons_can_tell_are_refused_in_words(
    n: int, wide: int, hidden: int, targets: int, loss
) -> None:
    with pytest.raises(NotApplicable, match=f"{targets} real numbers an example.* {n + targets} unknowns"):
        Unmix()(regression(n, wide, hidden, targets, loss)[0])


def test_one_neuron_is_refused_in_words() -> None:
    with pytest.raises(NotApplicable, match="full rank 1"):
        Unmix()(regression(1, 20, 1, 3)[0])


@pytest.mark.parametrize(("n", "targets"), [(1, 1), (3, 1), (3, 24), (1, 28)])
def test_as_many_targets_as_neurons_can_tell_are_found(n: int, targets: int) -> None:
    seen, x, y = regression(n, 40, 60, targets)
    found = Unmix()(seen)
    gap = torch.cdist(found.inputs, x.double())
    assert sorted(gap.argmin(1).tolist()) == list(range(n))
    assert bool((gap.min(1).values <= found.bound * found.inputs.norm(dim=1)).all())
    torch.testing.assert_close(found.labels.double(), y.double()[gap.argmin(1)], atol=1e-2, rtol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_the_verdict_does_not_hang_on_the_scale(seed: int) -> None:
    """Random small networks and factors: as many certified, as many returned, as at factor 1."""
    rng = torch.Generator().manual_seed(seed)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (), generator=rng))]

    n = pick(1, 2, 3, 5)
    activation = pick(nn.ReLU(), nn.GELU(), nn.Tanh(), nn.SiLU(), nn.LeakyReLU(0.1))
    client = Client(n, activation=activation, classes=pick(3, 10), width=pick(40, 64))
    known = pick({}, {"batch_size": n})
    plain = Unmix()(client.seen(client.gradient(), **known))
    client.found_all(plain)
    for factor in (*FACTORS, float(n)):
        found = Unmix()(client.seen(client.gradient(factor=factor), **known))
        assert len(found) == len(plain), factor
        assert int(found.bound.isfinite().sum()) == int(plain.bound.isfinite().sum()), factor
        client.found_all(found)


def convolutions(hidden: int) -> nn.Module:
    rng = torch.Generator().manual_seed(2)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(512, hidden),
        nn.Softplus(),
        nn.Linear(hidden, 9),
    )
    for p in net.parameters():
        p.data = (2 * torch.rand(p.shape, generator=rng) - 1) / max(p[0].numel(), 8) ** 0.5
    return net.double()


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("way", ["3", "-0.5", "step", "clients"])
def test_layer_by_layer_reads_any_multiple_of_a_gradient(n: int, way: str) -> None:
    rng = torch.Generator().manual_seed(4)
    x, y = torch.rand(n, 3, 8, 8, generator=rng).double(), torch.randint(9, (n,), generator=rng)
    rules = Protocol(local_steps=1, learning_rate=0.1, weight_decay=0.01) if way == "step" else Protocol()
    defences = "secure-aggregation:clients=2" if way == "clients" and n > 1 else ()
    seen, _ = unbatch.observe(convolutions(24), F.cross_entropy, x, y, protocol=rules, defences=defences)
    if way in ("3", "-0.5"):
        seen = replace(seen, update={k: float(way) * u for k, u in seen.update.items()})
    found = unbatch.Attack.parse("layer-by-layer")(seen)
    assert len(found) == n
    gap = torch.cdist(found.inputs.flatten(1), x.flatten(1)) / found.inputs.flatten(1).norm(dim=1)[:, None]
    assert sorted(gap.argmin(1).tolist()) == list(range(n))
    assert bool((gap.min(1).values <= found.bound).all())
    assert bool((found.bound < 1e-4).all())
    assert torch.equal(found.labels, y[gap.argmin(1)])


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("way", ["1", "3", "-1", "1024", "step"])
def test_tensor_moment_names_labels_at_any_multiple_of_a_gradient(classes: int, way: str) -> None:
    rng = torch.Generator().manual_seed(6)
    net = nn.Sequential(nn.Linear(6, 3000), nn.GELU(), nn.Linear(3000, classes)).double()
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=rng, dtype=torch.float64) / p.shape[-1] ** 0.5
    x, y = torch.randn(3, 6, generator=rng).double(), torch.tensor([0, 1, 1])
    rules = Protocol(local_steps=1, learning_rate=0.1) if way == "step" else Protocol()
    seen, _ = unbatch.observe(net, F.cross_entropy, x, y, protocol=rules)
    if way != "step":
        seen = replace(seen, update={k: float(way) * u for k, u in seen.update.items()})
    found = unbatch.Attack.parse("tensor-moment")(seen)
    gap = torch.cdist(found.inputs, x) / found.inputs.norm(dim=1)[:, None]
    assert sorted(gap.argmin(1).tolist()) == [0, 1, 2]
    assert bool((gap.min(1).values <= found.bound).all())
    assert bool(found.bound.isfinite().all())
    assert torch.equal(found.labels, y[gap.argmin(1)])
    assert found.trace.get("factor", 1.0) == pytest.approx(1.0 if way == "step" else float(way), rel=0.1)
