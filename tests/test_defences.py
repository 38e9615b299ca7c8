"""Defences: each against its formula computed independently, at zero strength, stacked, and out of range."""

import math
from dataclasses import replace
from typing import ClassVar, final

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbatch.auditing.client import observe
from unbatch.case import Case
from unbatch.defence import Defence, Round, Stack, Step
from unbatch.knowledge import Knowledge
from unbatch.loss import Loss, identify, loss_named
from unbatch.models import small
from unbatch.protocol import Protocol, Update

N, K = 6, 4


def client(n: int = N, k: int = K) -> tuple[nn.Module, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    model = small.build("mlp", (5,), k, width=7, activation="tanh", rng=rng).double()
    x = torch.randn(n, 5, generator=rng, dtype=torch.float64)
    return model, x, torch.randint(max(k, 2), (n,), generator=rng)


def sent(*defences: str | Defence, loss: Loss = F.cross_entropy, seed: int = 0, **how: object) -> Update:
    model, x, y = client()
    return observe(model, loss, x, y, defences=defences, seed=seed, **how)[0].update  # type: ignore[arg-type]


def gradient(model: nn.Module, value: Tensor) -> Update:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(value, parameters), strict=True))


def flat(update: Update) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in update.values()])


def same(a: Update, b: Update, atol: float = 1e-12) -> bool:
    return list(a) == list(b) and torch.allclose(flat(a), flat(b), rtol=0, atol=atol)


def bitwise(a: Update, b: Update) -> bool:
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def constant(update: Update) -> Step:
    """A step that sends `update` whatever it is asked."""
    return lambda round_: update


def on(spec: str, update: Update, seed: int = 0) -> Update:
    """The defence on a given update."""
    model, x, y = client()
    rng = torch.Generator().manual_seed(seed)
    round_ = Round(model=model, loss=F.cross_entropy, inputs=x, labels=y, protocol=Protocol(), rng=rng)
    return Defence.parse(spec).wrap(constant(update))(round_)


@pytest.mark.parametrize("name", Defence.find())
@pytest.mark.parametrize("protocol", [Protocol(), Protocol(epochs=2, local_batch_size=2, momentum=0.5)])
def test_zero_strength_changes_nothing(name: str, protocol: Protocol) -> None:
    identity = Defence.find(name).identity
    assert bitwise(sent(identity, protocol=protocol), sent(protocol=protocol))
    assert bitwise(sent(identity, "noise", protocol=protocol), sent("noise", protocol=protocol))


@pytest.mark.parametrize("name", Defence.find())
def test_draws_follow_the_seed_and_only_where_declared(name: str) -> None:
    assert bitwise(sent(name), sent(name))
    assert bitwise(sent(name, seed=0), sent(name, seed=1)) != Defence.find(name).random


@pytest.mark.parametrize("name", Defence.find())
def test_the_model_and_the_global_generator_are_left_alone(name: str) -> None:
    model, x, y = client()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    observe(model, F.cross_entropy, x, y, defences=[name])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "spec",
    [
        "clip:norm=0",
        "clip:norm=-1",
        "noise:sigma=-1",
        "noise:sigma=inf",
        "prune:share=1",
        "prune:share=-0.1",
        "quantise:bits=1",
        "quantise:bits=17",
        "secure-aggregation:clients=0",
        "local-steps:steps=-1",
        "local-steps:learning_rate=0",
        "local-steps:momentum=1",
        "local-steps:optimiser=lbfgs",
        "local-steps:steps=2,epochs=2",
        "label-smoothing:epsilon=1",
        "mixup:alpha=-1",
    ],
)
def test_options_out_of_range_are_refused(spec: str) -> None:
    with pytest.raises(ValueError, match=f"Options of {spec.partition(':')[0]}"):
        Defence.parse(spec)


def test_clip_shortens_the_whole_update() -> None:
    clean = sent()
    size = float(flat(clean).norm())
    short = sent(f"clip:norm={size / 3}")
    assert float(flat(short).norm()) == pytest.approx(size / 3)
    assert torch.allclose(flat(short) * 3, flat(clean), rtol=1e-12)
    assert bitwise(sent(f"clip:norm={2 * size}"), clean)


def test_clip_expects_nothing_of_nothing_and_has_a_slope_there() -> None:
    clean = {"a": torch.zeros(3, requires_grad=True), "b": torch.zeros(2, 2, requires_grad=True)}
    law = Defence.parse("clip:norm=0.5").log_prob({"a": torch.ones(3), "b": torch.ones(2, 2)}, clean)
    assert law is not None
    found = torch.autograd.grad(law, list(clean.values()))
    assert torch.equal(
        flat(dict(zip(clean, found, strict=True))), torch.ones(7)
    )  # as of an update that is short enough


def test_noise_has_the_stated_deviation_and_likelihood() -> None:
    clean = {"a": torch.full((300, 200), 3.0), "b": torch.full((40_000,), -1.0)}
    rms = math.sqrt((60_000 * 9 + 40_000) / 100_000)
    for spec, s in (("noise:sigma=0.5", 0.5), ("noise:sigma=0.5,relative=true", 0.5 * rms)):
        off = flat(on(spec, clean)) - flat(clean)
        assert float(off.std()) == pytest.approx(s, rel=0.02)
        assert abs(float(off.mean())) < 5 * s / math.sqrt(100_000)
        assert abs(float(torch.corrcoef(torch.stack([off[:50_000], off[50_000:]]))[0, 1])) < 0.03
        noise = Defence.parse(spec)
        seen = on(spec, clean)
        expected = torch.distributions.Normal(flat(clean).double(), s).log_prob(flat(seen).double()).sum()
        other = torch.distributions.Normal(1.1 * flat(clean).double(), s * (1.1 if "true" in spec else 1.0))
        moved = noise.log_prob(seen, {k: 1.1 * v for k, v in clean.items()})
        gap = other.log_prob(flat(seen).double()).sum() - expected
        here = noise.log_prob(seen, clean)
        assert here is not None
        assert moved is not None
        assert float(moved - here) == pytest.approx(float(gap), rel=1e-4)
    assert Defence.parse("noise:sigma=0").log_prob(clean, clean) is None


def test_noise_makes_its_size_known_where_it_is_absolute() -> None:
    assert Defence.parse("noise:sigma=0.5").public(Knowledge()).noise == 0.5
    for spec in ("noise:sigma=0.5,relative=true", "noise:sigma=0"):
        assert "noise" not in Defence.parse(spec).public(Knowledge())


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_prune_keeps_the_largest_entries_of_the_whole_update(share: float) -> None:
    clean, pruned = flat(sent()), flat(sent(f"prune:share={share}"))
    dropped = int(share * len(clean))
    kept = clean.abs().topk(len(clean) - dropped).indices
    assert torch.equal(pruned[kept], clean[kept])
    assert int((pruned == 0).sum()) == dropped


def test_prune_drops_as_many_among_equals() -> None:
    assert int((flat(on("prune:share=0.5", {"a": torch.ones(3, 2), "b": torch.ones(4)})) == 0).sum()) == 5


def test_the_likelihood_of_pruning_looks_at_kept_entries() -> None:
    defence, clean = Defence.parse("prune:share=0.5"), {"a": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    seen = on("prune:share=0.5", clean)
    assert float(defence.log_prob(seen, clean)) == 0  # type: ignore[arg-type]
    guess = {"a": torch.tensor([9.0, 9.0, 3.0, 5.0])}
    assert float(defence.log_prob(seen, guess)) == -0.5  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [4, 8])
def test_quantise_to_the_nearest_level(bits: int) -> None:
    clean, coarse = sent(), sent(f"quantise:bits={bits},stochastic=false")
    top = 2 ** (bits - 1) - 1
    for name, tensor in clean.items():
        scale = float(tensor.abs().max()) / top
        levels = coarse[name] / scale
        assert torch.allclose(levels, levels.round(), atol=1e-9)
        assert len(levels.round().unique()) <= 2 * top + 1
        assert float((coarse[name] - tensor).abs().max()) <= scale / 2 * (1 + 1e-9)


def test_stochastic_rounding_is_right_in_the_mean() -> None:
    clean = {"a": torch.tensor([0.3, -0.75, 1.0, 0.0], dtype=torch.float64)}
    draws = torch.stack([on("quantise:bits=3", clean, seed)["a"] for seed in range(4000)]) * 3
    assert torch.allclose(draws, draws.round(), atol=1e-12)
    assert float((draws.mean(0) / 3 - clean["a"]).abs().max()) < 0.01
    assert bool((draws[:, 3] == 0).all())
    assert bitwise(on("quantise", {"a": torch.zeros(3)}), {"a": torch.zeros(3)})


@pytest.mark.parametrize("clients", [2, 3, 4])
@pytest.mark.parametrize("protocol", [Protocol(), Protocol(local_steps=3, learning_rate=0.5)])
def test_secure_aggregation_adds_up_the_clients(clients: int, protocol: Protocol) -> None:
    model, x, y = client()
    cut = [range(i, j) for i, j in {2: [(0, 3), (3, 6)], 3: [(0, 2), (2, 4), (4, 6)]}.get(clients, [])]
    cut = cut or [range(2), range(2, 4), range(4, 5), range(5, 6)]
    alone = [observe(model, F.cross_entropy, x[list(i)], y[list(i)], protocol=protocol)[0].update for i in cut]
    total = {name: sum((u[name] for u in alone[1:]), alone[0][name]) for name in alone[0]}
    obs, _ = observe(
        model, F.cross_entropy, x, y, protocol=protocol, defences=[f"secure-aggregation:clients={clients}"]
    )
    assert same(obs.update, total)
    assert obs.knowledge.clients == clients
    assert obs.knowledge.batch_size == N


def test_secure_aggregation_of_a_summed_loss_is_the_unions_gradient() -> None:
    assert same(
        sent("secure-aggregation:clients=4", loss=loss_named("cross-entropy", "sum")),
        sent(loss=loss_named("cross-entropy", "sum")),
    )


def test_more_clients_than_examples_are_refused() -> None:
    with pytest.raises(ValueError, match="give at most 6 clients"):
        sent("secure-aggregation:clients=7")


def test_local_steps_are_the_protocols() -> None:
    for spec, protocol in {
        "local-steps:steps=3,learning_rate=0.2": Protocol(local_steps=3, learning_rate=0.2),
        "local-steps:epochs=2,batch=4,momentum=0.9": Protocol(epochs=2, local_batch_size=4, momentum=0.9),
        "local-steps:optimiser=adam": Protocol(local_steps=4, optimiser="adam"),
    }.items():
        model, x, y = client()
        told, _ = observe(model, F.cross_entropy, x, y, protocol=protocol)
        obs, _ = observe(model, F.cross_entropy, x, y, defences=[spec])
        assert bitwise(obs.update, told.update)
        assert obs.protocol == told.protocol
        assert obs.residual(x, y) == 0


def test_local_steps_replace_the_rounds_own_and_say_so() -> None:
    model, x, y = client()
    protocol = Protocol(epochs=2, local_batch_size=3, weight_decay=0.1, mode="eval")
    obs, _ = observe(model, F.cross_entropy, x, y, protocol=protocol, defences=["local-steps:steps=2"])
    assert obs.protocol == Protocol(local_steps=2, weight_decay=0.1, mode="eval")
    assert obs.residual(x, y) == 0
    with torch.no_grad():  # two plain SGD steps with weight decay, by hand
        start = [p.clone() for p in model.parameters()]
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(2):
        optimiser.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimiser.step()
    moved = torch.cat([(p.detach() - q).flatten() for p, q in zip(model.parameters(), start, strict=True)])
    assert torch.allclose(flat(obs.update), moved, atol=1e-14)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_label_smoothing_is_cross_entropys_own(reduction: str) -> None:
    model, x, y = client()
    loss = nn.CrossEntropyLoss(reduction=reduction)
    expected = gradient(model, F.cross_entropy(model(x), y, reduction=reduction, label_smoothing=0.3))
    assert same(sent("label-smoothing:epsilon=0.3", loss=loss), expected)


@pytest.mark.parametrize("column", [False, True])
def test_label_smoothing_of_bits_draws_them_to_one_half(column: bool) -> None:
    model, x, _ = client(k=1)
    y = torch.tensor([0, 1, 1, 0, 1, 1]).double()
    loss = F.binary_cross_entropy_with_logits if column else loss_named("binary-cross-entropy")
    labels = y[:, None] if column else y
    obs, _ = observe(model, loss, x, labels, defences=["label-smoothing:epsilon=0.2"])
    target = (0.8 * y + 0.1)[:, None]
    assert same(obs.update, gradient(model, F.binary_cross_entropy_with_logits(model(x), target)))


def test_label_smoothing_of_real_numbers_is_refused() -> None:
    model, x, _ = client(k=1)
    with pytest.raises(ValueError, match="real numbers"):
        observe(model, F.mse_loss, x, x[:, :1], defences=["label-smoothing"])


def blended(seed: int, alpha: float) -> tuple[float, Tensor]:
    """What a mixup round of that seed mixes: read off inputs that name their row."""
    x, seen = torch.eye(N, dtype=torch.float64), []

    def spy(round_: Round) -> Update:
        seen.append(round_)
        return {}

    model, _, y = client()
    rng = torch.Generator().manual_seed(seed)
    round_ = Round(model=model, loss=F.cross_entropy, inputs=x, labels=y, protocol=Protocol(), rng=rng)
    Defence.parse(f"mixup:alpha={alpha}").wrap(spy)(round_)
    rows = seen[0].inputs
    order = torch.tensor([int((row - row[i] * x[i]).argmax()) if row[i] < 1 else i for i, row in enumerate(rows)])
    blend = next(float(row[i]) for i, row in enumerate(rows) if row[i] < 1)
    return blend, order


def test_mixup_blends_inputs_and_losses_alike() -> None:
    model, x, y = client()
    for seed in range(5):
        blend, order = blended(seed, 1.0)
        assert sorted(order.tolist()) == list(range(N))
        outputs = model(blend * x + (1 - blend) * x[order])
        value = blend * F.cross_entropy(outputs, y) + (1 - blend) * F.cross_entropy(outputs, y[order])
        assert same(sent("mixup:alpha=1", seed=seed), gradient(model, value))


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_the_blend_follows_the_beta_law(alpha: float) -> None:
    draws = torch.tensor([blended(seed, alpha)[0] for seed in range(600)])
    assert float(draws.mean()) == pytest.approx(0.5, abs=0.07)
    assert float(draws.var()) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.2)


def test_mixup_of_tokens_is_refused() -> None:
    model, _, y = client()
    rng = torch.Generator().manual_seed(0)
    tokens = torch.zeros(N, 3, dtype=torch.int64)
    round_ = Round(model=model, loss=F.cross_entropy, inputs=tokens, labels=y, protocol=Protocol(), rng=rng)
    with pytest.raises(ValueError, match="tokens"):
        Defence.parse("mixup").wrap(constant({}))(round_)


def test_the_first_defence_is_the_last_to_touch_the_update() -> None:
    size = float(flat(sent()).norm())
    assert float(flat(sent(f"clip:norm={size / 2}", "noise:sigma=1")).norm()) == pytest.approx(size / 2)
    clean = sent(f"clip:norm={size / 2}")
    noised = flat(sent("noise:sigma=1", f"clip:norm={size / 2}"))
    drawn = flat(sent("noise:sigma=1")) - flat(sent())
    assert torch.allclose(noised - flat(clean), drawn, atol=1e-12)


def test_training_defences_stack_in_either_order() -> None:
    """Smoothing and mixup change the loss, local steps and shares cut the batch: none undoes another."""
    model, x, y = client()
    smooth = nn.CrossEntropyLoss(label_smoothing=0.3)
    for order in (("mixup", "label-smoothing:epsilon=0.3"), ("label-smoothing:epsilon=0.3", "mixup")):
        assert same(sent(*order), sent("mixup", loss=smooth))
    for order in (
        ("local-steps:batch=2", "secure-aggregation:clients=2"),
        ("secure-aggregation:clients=2", "local-steps:batch=2"),
    ):
        halves = [
            observe(model, smooth, x[i : i + 3], y[i : i + 3], defences=["local-steps:batch=2"])[0].update
            for i in (0, 3)
        ]
        assert same(sent(*order, loss=smooth), {k: halves[0][k] + halves[1][k] for k in halves[0]})
    both = sent("mixup", "local-steps:steps=3,batch=2")
    assert not same(both, sent("local-steps:steps=3,batch=2"))


def test_a_round_is_changed_in_a_copy() -> None:
    model, x, y = client()
    held: list[Round] = []

    def keep(round_: Round) -> Update:
        held.append(round_)
        return sent()

    round_ = Round(
        model=model, loss=F.cross_entropy, inputs=x, labels=y, protocol=Protocol(), rng=torch.Generator().manual_seed(0)
    )
    copy = replace(round_, inputs=x.clone(), labels=y.clone())
    for name in Defence.find():
        Defence.parse(name).wrap(keep)(round_)
    assert held
    assert torch.equal(round_.inputs, copy.inputs)
    assert torch.equal(round_.labels, copy.labels)
    assert round_.loss is copy.loss


@pytest.mark.parametrize(
    ("stack", "sigma"),
    [
        (["secure-aggregation:clients=4", "noise:sigma=0.5"], 1.0),  # every client adds its own
        (["noise:sigma=0.5", "secure-aggregation:clients=4"], 0.5),
        (["noise:sigma=0.3", "noise:sigma=0.4"], 0.5),
        (["clip:norm=1", "noise:sigma=0.5"], None),  # shortened by a factor that the server does not see
        (["noise:sigma=0.5", "clip:norm=1"], 0.5),
        (["noise:sigma=0.5,relative=true", "noise:sigma=0.5"], None),
    ],
)
def test_what_is_known_of_the_noise_follows_the_stack(stack: list[str], sigma: float | None) -> None:
    setting = Case.parse("digits:batch=8,width=8").setting()
    obs, _ = observe(setting.model, setting.loss, setting.inputs, setting.labels, defences=stack)
    known = obs.knowledge.get("noise")
    assert known == (sigma if sigma is None else pytest.approx(sigma))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("stack", [[], ["local-steps:steps=3,learning_rate=0.1"], ["local-steps:epochs=2,batch=1"]])
@pytest.mark.parametrize(("n", "clients"), [(6, 3), (6, 4), (5, 2)])
def test_the_attacker_can_simulate_the_sum_over_clients(n: int, clients: int, stack: list[str], reduction: str) -> None:
    setting = Case.parse(f"digits:batch={n},width=8,reduction={reduction}").setting()
    stack = [f"secure-aggregation:clients={clients}", *stack]
    obs, truth = observe(setting.model, setting.loss, setting.inputs, setting.labels, defences=stack)
    assert obs.residual(truth.inputs, truth.labels) < 1e-6


def test_a_smoothed_loss_is_declared() -> None:
    setting = Case.parse("digits:batch=3,width=8").setting()
    stack = ["label-smoothing:epsilon=0.2"]
    obs, truth = observe(setting.model, setting.loss, setting.inputs, setting.labels, defences=stack)
    assert obs.residual(truth.inputs, truth.labels) == 0
    form = identify(obs.loss, (1, 10))
    assert form is not None
    assert form.smoothing == pytest.approx(0.2)


def test_a_stack_is_one_step_one_loss_and_one_knowledge() -> None:
    model, x, y = client()
    stack = Stack.of(["noise:sigma=0.1", "label-smoothing", "local-steps:steps=2"])
    obs, _ = observe(model, F.cross_entropy, x, y, defences=stack.defences, seed=3)
    rng = torch.Generator().manual_seed(3)
    round_ = Round(model=model, loss=F.cross_entropy, inputs=x, labels=y, protocol=Protocol(), rng=rng)
    assert bitwise(stack.step(round_), obs.update)
    outputs = model(x)
    assert torch.equal(obs.loss(outputs, y), stack.loss(F.cross_entropy)(outputs, y))
    told = stack.told(Knowledge(batch_size=N, mode="train"), obs.update)
    assert {name: told.get(name) for name in ("local_steps", "noise", "mode")} == {
        "local_steps": 2,
        "noise": 0.1,
        "mode": "train",
    }
    assert set(told) == set(stack.public(Knowledge(batch_size=N, mode="train"))) | {"log_prob"}
    assert set(told) <= set(obs.knowledge)
    assert told.server_sign() == 1.0
    assert Stack().public(Knowledge(batch_size=N)).server_sign() == -1.0


@final
class Moody(Defence):
    """A third party's whose likelihood is of some updates alone."""

    paper: ClassVar[str] = "none"
    identity: ClassVar[str] = ""

    def wrap(self, step: Step) -> Step:
        return step

    def log_prob(self, seen: Update, clean: Update) -> Tensor | None:
        return flat(clean).sum() if torch.equal(flat(seen), flat(clean)) else None


def test_a_likelihood_of_some_updates_alone_is_named_as_what_breaks_the_contract() -> None:
    model, x, y = client()
    obs, _ = observe(model, F.cross_entropy, x, y, defences=[Moody()])
    law = obs.knowledge.log_prob
    assert float(law(obs.update, obs.update)) == pytest.approx(float(flat(obs.update).sum()))
    with pytest.raises(TypeError, match="moody gives a likelihood of one update and none of another"):
        law(obs.update, {name: 2 * u for name, u in obs.update.items()})
