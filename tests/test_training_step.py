"""capture: what one step of a user's loop sends, whatever the loop does to its gradient, and that it can be audited."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unbatch
from unbatch import Truth, UnbatchError, capture
from unbatch.models import small
from unbatch.network.precision import outputs_of
from unbatch.protocol import flatten
from unbatch.training_step import CapturedStep

N = 4
Loop = Callable[[nn.Module, torch.optim.Optimizer], None]


def network(**how: object) -> nn.Module:
    rng = torch.Generator().manual_seed(0)
    return small.build("mlp", (6,), 3, width=8, activation="tanh", rng=rng, **how)


def batch(n: int = N) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1)
    return torch.rand(n, 6, generator=rng), torch.randint(3, (n,), generator=rng)


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def gradient(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss_of(model, x, y), list(model.parameters()))
    return dict(zip(dict(model.named_parameters()), found, strict=True))


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], factor: float = 1.0) -> None:
    assert list(a) == list(b)
    for name, tensor in b.items():
        torch.testing.assert_close(a[name], factor * tensor, rtol=1e-5, atol=1e-8, msg=name)


def taken(make: Callable[..., torch.optim.Optimizer], between: Loop | None = None, n: int = N, **how: object):
    """One captured step of a loop that does `between` to the gradient."""
    model, (x, y) = network(), batch(n)
    optimiser = make(model.parameters(), **how)
    with capture(model, optimiser) as step:
        optimiser.zero_grad()
        loss_of(model, x, y).backward()
        if between:
            between(model, optimiser)
        optimiser.step()
    return step, model


def test_one_step_is_seen_and_the_loop_goes_on_as_without() -> None:
    step, model = taken(torch.optim.SGD, lr=0.1, momentum=0.9)
    plain = network()
    assert_same(dict(step.model.named_parameters()), dict(plain.named_parameters()))
    optimiser = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    expected = gradient(plain, *batch())
    loss_of(plain, *batch()).backward()
    optimiser.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    assert_same(step.gradient, expected)
    assert_same(step.difference, expected, -0.1)
    assert (step.optimiser, step.passes, step.factor, step.notes) == ("SGD", 1, 1.0, [])
    assert step.settings[0]["momentum"] == 0.9
    assert repr(step) == "<CapturedStep of Sequential: SGD, learning rate 0.1; 1 backward pass; 83 entries>"
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters())
    assert not model._forward_pre_hooks
    assert all(p.grad is None for p in step.model.parameters())


@pytest.mark.parametrize("sent", ["gradient", "difference"])
def test_a_step_leads_to_a_report(sent: str) -> None:
    step, _ = taken(torch.optim.SGD, n=1, lr=0.1, momentum=0.9, weight_decay=0.01)
    seen = step.observation(F.cross_entropy, sent=sent)
    x, y = batch(1)
    audit = unbatch.audit(seen, truth=Truth(inputs=x, labels=y), attacks=["bias-ratio"], analyses=())
    assert audit.recovered() == {(0, 0)}
    told = {"input_shape": (6,), "batch_size": 1, "mode": "train"}
    step_of = {"local_steps": 1, "optimiser": "sgd", "learning_rate": 0.1}  # weight decay is known, and taken off
    assert dict(vars(seen.knowledge)) == (told if sent == "gradient" else step_of | told)


def test_accumulated_passes_are_counted_and_their_batch_is_the_whole() -> None:
    model, (x, y) = network(), batch(6)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = gradient(model, x, y)
    with capture(model, optimiser) as step:
        with torch.no_grad():
            model(x)  # an evaluation is no part of the batch
        for part in torch.arange(6).split(2):
            (loss_of(model, x[part], y[part]) / 3).backward()
        optimiser.step()
    assert step.passes == 3
    assert_same(step.gradient, expected)
    assert step.observation(F.cross_entropy).knowledge.only("batch_size", "input_shape").batch_size == 6
    assert step.observation(F.cross_entropy, batch_size=5).knowledge.batch_size == 5
    assert "the sum of 3 backward passes" in step.notes[0]
    assert step.observation(F.cross_entropy).residual(x, y) < 1e-6


def by_norm(model: nn.Module, _: torch.optim.Optimizer) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 0.05)


def by_value(model: nn.Module, _: torch.optim.Optimizer) -> None:
    nn.utils.clip_grad_value_(model.parameters(), 0.02)


def noisy(model: nn.Module, _: torch.optim.Optimizer) -> None:
    rng = torch.Generator().manual_seed(2)
    for p in model.parameters():
        p.grad += 0.01 * torch.randn(p.shape, generator=rng)


def doubled(model: nn.Module, _: torch.optim.Optimizer) -> None:
    for p in model.parameters():
        p.grad *= 2


@pytest.mark.parametrize(
    ("between", "altered", "said"),
    [
        (by_value, "clipping of each entry to 0.02", "there was clipping of each entry to 0.02"),
        (noisy, "an unknown change of the gradient", "there was an unknown change"),
        (doubled, "a factor of 2", "there was a factor of 2"),
    ],
)
def test_a_gradient_that_was_changed_is_known_to_be(between: Loop, altered: str, said: str) -> None:
    step, _ = taken(torch.optim.SGD, between, lr=0.1)
    assert step.observation(F.cross_entropy).knowledge.altered == altered
    assert said in step.notes[0]
    declared = step.observation(F.cross_entropy, defences="noise:sigma=0.01,relative=false")
    assert "altered" not in declared.knowledge
    assert declared.knowledge.noise == 0.01


@pytest.mark.parametrize("sent", ["gradient", "difference"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_clipping_by_the_norm_is_clipping_and_is_read(sent: str, decay: float) -> None:
    step, _ = taken(torch.optim.SGD, by_norm, n=1, lr=0.1, weight_decay=decay)
    seen = step.observation(F.cross_entropy, sent=sent)
    assert step.factor is not None
    assert 0 < step.factor < 1
    assert seen.knowledge.clip == pytest.approx(0.05 * (1 if sent == "gradient" else 0.1), rel=1e-3)
    assert "weight_decay" not in seen.knowledge  # taken off: the step was clipped before it was added
    assert "shortened by" in step.notes[0]
    x, y = batch(1)
    audit = unbatch.audit(seen, truth=Truth(inputs=x, labels=y), attacks=["bias-ratio"], analyses=())
    assert audit.recovered() == {(0, 0)}


def test_clipping_within_adam_is_no_clipping_of_its_step() -> None:
    step, _ = taken(torch.optim.Adam, by_norm, lr=0.1)
    assert step.observation(F.cross_entropy).knowledge.clip == pytest.approx(0.05, rel=1e-3)
    assert "within a step of Adam" in step.observation(F.cross_entropy, sent="difference").knowledge.altered


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("told", [False, True])
def test_the_scale_of_mixed_precision_is_taken_off(fused: bool, clipped: bool, told: bool) -> None:
    model, (x, y) = network(), batch()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with capture(model, optimiser, scaler=scaler if told else None) as step:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss_of(model, x, y)
        scaler.scale(value).backward()
        if clipped:
            scaler.unscale_(optimiser)
            by_norm(model, optimiser)
        scaler.step(optimiser)
        scaler.update()
    exact = gradient(step.model, x, y)
    size = flatten(step.gradient, step.gradient).norm()
    if clipped:
        assert size == pytest.approx(0.05, rel=1e-3)
    else:
        for name, tensor in exact.items():
            assert float((step.gradient[name] - tensor).norm() / tensor.norm()) < 0.02  # of bfloat16
    for name, tensor in step.difference.items():
        torch.testing.assert_close(tensor, -0.1 * step.gradient[name], rtol=1e-4, atol=1e-7)
    if told or (fused and not clipped):
        assert "The scaler's factor of 1024 was taken off." in step.notes
        assert ("clip" in step.observation(F.cross_entropy).knowledge) == clipped
    assert "The forward pass ran in bfloat16, and the gradient is as coarse as that." in step.notes


def test_a_power_of_two_without_a_scaler_is_taken_for_one() -> None:
    model, (x, y) = network(), batch()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with capture(model, optimiser) as step:
        scaler.scale(loss_of(model, x, y)).backward()
        scaler.step(optimiser)
    assert step.factor == 1
    assert "divided by 1024 between backward and step, as a GradScaler does" in step.notes[0]
    assert "clip" not in step.observation(F.cross_entropy).knowledge


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_scaler_left_out_is_no_step(fused: bool) -> None:
    model, (x, y) = network(), batch()
    optimiser = torch.optim.Adam(model.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def loop() -> None:
        with capture(model, optimiser, scaler=scaler):
            (scaler.scale(loss_of(model, x, y)) * torch.inf).backward()
            scaler.step(optimiser)

    with pytest.raises(UnbatchError, match="a GradScaler then leaves the step out"):
        loop()


@pytest.mark.parametrize(
    ("make", "how"),
    [
        (torch.optim.SGD, {"lr": 0.1}),
        (torch.optim.SGD, {"lr": torch.tensor(0.1), "momentum": 0.5, "dampening": 0.3, "weight_decay": 0.1}),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.5, "nesterov": True, "weight_decay": 0.1}),
        (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.1, "betas": (0.5, 0.9)}),
        (torch.optim.Adam, {"lr": 0.01, "amsgrad": True}),
        (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    ],
)
def test_the_difference_is_the_declared_step_s(make: Callable[..., torch.optim.Optimizer], how: dict) -> None:
    step, _ = taken(make, **how)
    assert step.observation(F.cross_entropy, sent="difference").residual(*batch()) < 1e-4


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_groups_with_their_own_rates_and_decays_are_one_step_to_who_knows_them(make) -> None:
    model, (x, y) = network(), batch()
    weights, biases = ([p for p in model.parameters() if (p.ndim > 1) == flat] for flat in (True, False))
    optimiser = make([{"params": weights, "weight_decay": 0.1}, {"params": biases, "lr": 0.3}], lr=0.1, weight_decay=0)
    with capture(model, optimiser) as step:
        loss_of(model, x, y).backward()
        optimiser.step()
    seen = step.observation(F.cross_entropy, sent="difference")
    assert seen.knowledge.learning_rate == 0.1
    assert "weight_decay" not in seen.knowledge
    assert seen.residual(x, y) < 1e-4
    assert "learning rate 0.1 and 0.3" in repr(step)


def test_a_difference_that_no_server_reads_is_refused_and_the_gradient_is_not() -> None:
    for make, how, words in (
        (torch.optim.RMSprop, {"lr": 0.1}, "a step of RMSprop is none of SGD, Adam or AdamW"),
        (torch.optim.SGD, {"lr": 0.1, "maximize": True}, "maximises"),
        (torch.optim.SGD, {"lr": 0.0}, "learning rate of this step is 0"),
        (torch.optim.Adam, {"lr": 0.1, "eps": 1e-3}, "eps=0.001"),
    ):
        step, _ = taken(make, **how)
        with pytest.raises(UnbatchError, match=words):
            step.observation(F.cross_entropy, sent="difference")
        assert step.observation(F.cross_entropy).residual(*batch()) < 1e-6
    model, (x, y) = network(), batch()
    for make, how in ((torch.optim.SGD, {"momentum": 0.9}), (torch.optim.Adam, {})):
        optimiser = make(model.parameters(), lr=0.1, **how)
        for _ in range(2):
            with capture(model, optimiser) as step:
                optimiser.zero_grad()
                loss_of(model, x, y).backward()
                optimiser.step()
        with pytest.raises(UnbatchError, match="had a state from earlier steps, which this exchange does not tell"):
            step.observation(F.cross_entropy, sent="difference")
        assert step.observation(F.cross_entropy).residual(x, y) < 1e-6
        assert "state from earlier steps" in step.notes[-1]
    halves = [{"params": list(model.parameters())[:2], "weight_decay": 0.1}, {"params": list(model.parameters())[2:]}]
    optimiser = torch.optim.Adam(halves)
    with capture(model, optimiser) as step:
        optimiser.zero_grad()
        loss_of(model, x, y).backward()
        optimiser.step()
    with pytest.raises(UnbatchError, match=r"Adam adds 0 and 0\.1 of the weights"):
        step.observation(F.cross_entropy, sent="difference")


def test_a_closure_is_run_once_or_refused() -> None:
    model, (x, y) = network(), batch()
    expected = gradient(model, x, y)

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = loss_of(model, x, y)
        value.backward()
        return value

    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    with capture(model, optimiser) as step:
        optimiser.step(closure)
    assert_same(step.gradient, expected)
    assert (step.passes, step.factor) == (1, 1.0)
    optimiser = torch.optim.LBFGS(model.parameters())
    with pytest.raises(UnbatchError, match=r"LBFGS ran its closure \d+ times"), capture(model, optimiser):
        optimiser.step(closure)


def test_batch_statistics_are_those_before_and_those_after_are_sent_if_asked() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    x, y = batch()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    with capture(model, optimiser) as step:
        loss_of(model, x, y).backward()
        optimiser.step()
    assert not torch.equal(step.buffers["1.running_mean"], step.buffers_before["1.running_mean"])
    assert torch.equal(step.buffers["1.running_mean"], model[1].running_mean)
    assert "buffers" not in step.observation(F.cross_entropy).knowledge
    seen = step.observation(F.cross_entropy, buffers=True)
    assert torch.equal(seen.knowledge.buffers["1.running_mean"], model[1].running_mean)
    assert seen.residual(x, y) < 1e-6


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_wrapped_models_frozen_layers_and_parameters_of_others(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model, (x, y) = network(), batch()
    model[1].weight.requires_grad_(False)
    held, stranger = [p for p in model.parameters() if p.ndim > 1], nn.Parameter(torch.zeros(2))
    optimiser = torch.optim.SGD([*held, stranger], lr=0.1)
    wrapped = wrap(model)
    with capture(wrapped, optimiser) as step:
        (loss_of(wrapped, x, y) + stranger.sum()).backward()
        optimiser.step()
    last = list(dict(model.named_parameters()))[-2]
    assert list(step.gradient) == list(step.difference) == [last]
    assert_same({last: step.gradient[last]}, {last: gradient_of(step, last, x, y)})
    assert "not in the update: 'dense1.bias', 'head.bias'" in step.notes[0]
    assert "parameters that are not the model's, too: (2,)" in step.notes[1]
    assert type(step.model) is nn.Sequential
    assert step.observation(F.cross_entropy).residual(x, y) < 1e-6


def gradient_of(step: CapturedStep, name: str, x: Tensor, y: Tensor) -> Tensor:
    model = copy.deepcopy(step.model).requires_grad_(True)
    held = dict(model.named_parameters())
    return torch.autograd.grad(F.cross_entropy(outputs_of(model, x, held), y), held[name])[0]


def test_tokens_and_unused_parameters() -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head, self.spare = nn.Embedding(9, 4), nn.Linear(4, 3), nn.Linear(1, 1)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.table(tokens).mean(1))

    model, tokens = Bag(), torch.tensor([[1, 2], [3, 4]])
    optimiser = torch.optim.AdamW(model.parameters())
    with capture(model, optimiser) as step:
        loss_of(model, tokens, torch.tensor([0, 2])).backward()
        optimiser.step()
    assert list(step.difference) == ["table.weight", "head.weight", "head.bias"]
    seen = step.observation(F.cross_entropy)
    assert (seen.knowledge.domain, seen.knowledge.input_shape, seen.knowledge.batch_size) == ("tokens", (2,), 2)


def test_what_is_no_step_says_why() -> None:
    model, (x, y) = network(), batch()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)

    def loop(act: Callable[[], object], of: object = optimiser) -> None:
        with capture(model, of):
            act()

    def both() -> None:
        for _ in range(2):
            loss_of(model, x, y).backward()
            optimiser.step()

    backward = lambda: loss_of(model, x, y).backward()  # noqa: E731
    for act, words in (
        (lambda: None, "no step was taken in the block, and no backward pass ran"),
        (backward, "no step was taken in the block by the optimiser that was given"),
        (both, "the block took 2 steps"),
    ):
        optimiser.zero_grad()
        with pytest.raises(UnbatchError, match=words):
            loop(act)
    optimiser.zero_grad()
    with pytest.raises(UnbatchError, match="without a gradient"):
        loop(optimiser.step)
    with pytest.raises(UnbatchError, match="none of the 4 parameters of the optimiser is one of Sequential's"):
        loop(backward, torch.optim.SGD(network().parameters(), lr=0.1))
    with pytest.raises(UnbatchError, match=r"is a list, and no torch.optim.Optimizer"):
        loop(backward, [])
    with pytest.raises(KeyError), capture(model, optimiser) as step:
        raise KeyError
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    with pytest.raises(UnbatchError, match="while its block still runs, or the block failed"):
        step.gradient  # noqa: B018
    assert repr(step) == "<CapturedStep: its block is not over>"
    good, _ = taken(torch.optim.SGD, lr=0.1)
    with pytest.raises(UnbatchError, match="give one of 'gradient', 'difference'"):
        good.observation(F.cross_entropy, sent="weights")
    with pytest.raises(UnbatchError, match="the loss is not given"):
        good.observation()


def test_a_model_that_cannot_be_copied_is_refused_in_words() -> None:
    model, (x, y) = network(), batch()
    model.kept = loss_of(model, x, y)  # what a forward pass left
    with (
        pytest.raises(UnbatchError, match="the model cannot be copied"),
        capture(model, torch.optim.SGD(model.parameters(), lr=0.1)),
    ):
        pass
