"""A wrong capture is not audited, and says why; a right one is, whatever its model, loss, protocol and precision."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unbatch
from unbatch.auditing.diagnosis import unreadable
from unbatch.reporting import html as report
from unbatch.reporting.gate import breaches
from unbatch.reporting.tiers import Outcome

X = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([3, 5])
Update = dict[str, Tensor]


def deep() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(48, 16),
        nn.ReLU(),
        nn.Linear(16, 16),
        nn.ReLU(),
        nn.Linear(16, 16),
        nn.ReLU(),
        nn.Linear(16, 10),
    )


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 10))


def gradient(model: nn.Module) -> Update:
    found = torch.autograd.grad(F.cross_entropy(model(X), Y), list(model.parameters()))
    return dict(zip([name for name, _ in model.named_parameters()], found, strict=True))


def stepped(optimiser: Callable[..., torch.optim.Optimizer], steps: int = 1, **options: float) -> Callable[..., Update]:
    def made(model: nn.Module) -> Update:
        after = copy.deepcopy(model)
        move = optimiser(after.parameters(), **options)
        for _ in range(steps):
            move.zero_grad()
            F.cross_entropy(after(X), Y).backward()
            move.step()
        pairs = zip(after.named_parameters(), model.parameters(), strict=True)
        return {name: (new - old).detach() for (name, new), old in pairs}

    return made


def exchanged(model: nn.Module) -> Update:
    seen = gradient(model)
    return seen | {"3.weight": seen["5.weight"], "5.weight": seen["3.weight"]}


def transposed(model: nn.Module) -> Update:
    return {name: t.T if t.shape == (16, 16) else t for name, t in gradient(model).items()}


def noisy(model: nn.Module) -> Update:
    return {name: t.std() * torch.randn_like(t) for name, t in gradient(model).items()}


def captured(model: nn.Module, update: Update, **known: object) -> unbatch.Observation:
    told = unbatch.Knowledge(input_shape=(3, 4, 4), batch_size=2, mode="train", **known)
    return unbatch.Observation(model=model, loss=F.cross_entropy, update=update, knowledge=told)


WRONG: dict[str, tuple[Callable[[nn.Module], Update], str, str]] = {
    "flipped": (lambda m: {k: -t for k, t in gradient(m).items()}, "its sign is flipped", "The sign is flipped"),
    "weights": (
        lambda m: {k: p.detach() for k, p in m.named_parameters()},
        "the model's own parameters",
        "the model's own",
    ),
    "adamw": (stepped(torch.optim.AdamW, lr=1e-3), "Adam", "1 local step of adam"),
    "adam": (stepped(torch.optim.Adam, steps=3, lr=1e-3), "Adam", "3 local steps of adam"),
    "step": (stepped(torch.optim.SGD, lr=0.05), "its sign is flipped", "a step of SGD with learning rate 0.05"),
    "scaled": (lambda m: {k: 128 * t for k, t in gradient(m).items()}, "times as far as any batch could", "128 times"),
    "noise": (noisy, "no batch has such an update", "the batch does not explain it"),
    "zeros": (lambda m: {k: 0 * t for k, t in gradient(m).items()}, "all zeros", "all zeros"),
}


@pytest.mark.parametrize("make", [deep, convolutions])
@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_capture_is_not_audited_and_says_why(make: Callable[[], nn.Module], kind: str) -> None:
    wrong, by_structure, by_batch = WRONG[kind]
    model = make()
    obs = captured(model, wrong(model))
    assert unreadable(captured(model, gradient(model))) == ""
    said = unreadable(obs)
    assert by_structure in said
    assert by_batch in unreadable(obs, X, Y)
    assert kind == "zeros" or "Readings tried" in said


@pytest.mark.parametrize(
    ("wrong", "fits"),
    [(exchanged, "3.weight holds 5.weight, 5.weight holds 3.weight"), (transposed, "square tensors transposed")],
)
def test_tensors_that_were_mixed_up_are_put_back_in_words(wrong: Callable[[nn.Module], Update], fits: str) -> None:
    obs = captured(deep(), wrong(deep()))
    assert f"It would fit if {fits}" in unreadable(obs)
    assert f"mixed up: {fits}" in unreadable(obs, X, Y)


def test_a_protocol_that_was_not_sent_or_not_told_shows() -> None:
    model = deep()
    four = stepped(torch.optim.SGD, steps=4, lr=0.05)(model)
    assert unreadable(captured(model, four, local_steps=4, learning_rate=0.05)) == ""
    assert unreadable(captured(model, four, local_steps=4, learning_rate=0.05), X, Y) == ""
    assert unreadable(captured(model, four))
    assert "that of 4 local steps of sgd, learning rate 0.0499" in unreadable(captured(model, four), X, Y)
    assert "its sign is flipped" in unreadable(captured(model, gradient(model), local_steps=4, learning_rate=0.05))


def test_a_defence_that_is_known_is_no_wrong_capture() -> None:
    model = deep()
    assert unreadable(captured(model, noisy(model))) != ""
    assert unreadable(captured(model, noisy(model), noise=0.1)) == ""
    assert unreadable(captured(model, noisy(model), noise=0.1), X, Y) == ""


@pytest.mark.parametrize("truth", [None, unbatch.Truth(inputs=X, labels=Y)], ids=["alone", "truth"])
def test_verdict_page_and_gate_refuse_a_wrong_capture(truth: unbatch.Truth | None) -> None:
    model = deep()
    flipped = captured(model, {name: -t for name, t in gradient(model).items()})
    audit = unbatch.audit(flipped, truth=truth, attacks=["label-count", "gradient-matching:iterations=20"], analyses=())
    assert audit.outcome is Outcome.NOT_AUDITED
    assert audit.verdict().startswith("This update is not audited, and that is not safety. ")
    assert "sign is flipped" in audit.verdict()
    assert report.severity(audit) == ("untested", "Not audited")
    assert any("not audited" in words for words in breaches(audit, max_recovered=2))


def test_what_nothing_explains_is_not_called_safe() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.GELU(), nn.Linear(16, 3))
    flipped = {name: -t for name, t in unbatch.observe(model, F.mse_loss, X, torch.rand(2, 3))[0].update.items()}
    known = unbatch.Knowledge(input_shape=(3, 4, 4), batch_size=2)
    obs = unbatch.Observation(model=model, loss=F.mse_loss, update=flipped, knowledge=known)
    assert unreadable(obs) == ""  # real targets can be anything
    audit = unbatch.audit(obs, attacks="gradient-matching", analyses=(), budget=1)
    assert audit.outcome in (Outcome.NOT_AUDITED, Outcome.EXPLAINED)  # where other targets do explain it, so be it


def test_an_exact_find_stands_whatever_else_is_off() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 10))
    seen = unbatch.observe(model, F.cross_entropy, X[:1], Y[:1])[0]
    audit = unbatch.audit(seen, truth=unbatch.Truth(inputs=X[1:], labels=Y[1:]), attacks="bias-ratio", analyses=())
    assert audit.outcome is Outcome.NOT_AUDITED  # what is there is not the batch that was given
    assert unbatch.audit(seen, attacks="bias-ratio", analyses=()).outcome is Outcome.EXACT


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross-entropy": F.cross_entropy,
    "smoothed": lambda o, y: F.cross_entropy(o, y, label_smoothing=0.1),
    "squared": lambda o, y: F.mse_loss(o, F.one_hot(y, 10).to(o)),
}
PROTOCOLS = (
    {},
    {"local_steps": 1, "learning_rate": 0.1},
    {"local_steps": 4, "learning_rate": 0.05},
    {"local_steps": 3, "learning_rate": 0.01, "momentum": 0.9},
    {"local_steps": 2, "learning_rate": 0.001, "optimiser": "adam"},
    {"local_steps": 2, "weight_decay": 0.01},
)


def normed() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 10))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [deep, convolutions, normed])
def test_a_right_capture_is_never_refused(make: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    for loss, protocol, n in itertools.product(LOSSES.values(), PROTOCOLS, (2, 12)):
        rng = torch.Generator().manual_seed(n)
        x, y = torch.rand(n, 3, 4, 4, generator=rng).to(dtype), torch.randint(10, (n,), generator=rng)
        obs, _ = unbatch.observe(make().to(dtype), loss, x, y, protocol=unbatch.Protocol(**protocol))
        assert (unreadable(obs), unreadable(obs, x, y)) == ("", ""), (protocol, n)
