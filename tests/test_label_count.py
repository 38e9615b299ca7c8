"""Label counting: a bound never claims too much, an exact claim is true, and an estimate is called one."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from unbatch.attack import Attack
from unbatch.auditing.client import observe
from unbatch.errors import NotApplicable
from unbatch.loss import Loss, loss_named
from unbatch.models import small
from unbatch.numerics.label_counts import apportion, count_bounds, impulse, label_counts, present
from unbatch.protocol import Protocol
from unbatch.reconstruction import Reconstruction

COUNT = Attack.parse("label-count:stand_ins=64")


def client(seed: int, n: int, k: int, *, scale: float = 1.0, **shape: object) -> tuple[nn.Module, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    model = small.build("mlp", (12,), k, rng=rng, **{"width": 24, **shape})  # type: ignore[arg-type]
    with torch.no_grad():
        model.head.weight.mul_(scale)
    return model, torch.randn(n, 12, generator=rng), torch.randint(max(k, 2), (n,), generator=rng)


def counted(
    model: nn.Module, x: Tensor, y: Tensor, loss: Loss = F.cross_entropy, **how: object
) -> tuple[Reconstruction, Tensor]:
    """The attack's answer and the true counts; whatever it claims is held against them."""
    found = COUNT(observe(model, loss, x, y, **how)[0])  # type: ignore[arg-type]
    lower, upper, estimate = (torch.tensor(found.trace[key]) for key in ("lower", "upper", "estimate"))
    true = torch.bincount(y.long(), minlength=len(lower))
    assert bool((lower <= true).all())
    assert bool((true <= upper).all())
    assert bool((lower <= estimate).all())
    assert bool((estimate <= upper).all())
    assert int(estimate.sum()) == len(y)
    assert found.labels is not None
    assert found.bound is not None
    assert torch.equal(torch.bincount(found.labels.flatten().long(), minlength=len(lower)), estimate)
    proven = found.labels[found.bound == 0].long()
    assert torch.bincount(proven, minlength=len(lower)).tolist() == found.trace["proven"]
    assert bool((torch.tensor(found.trace["proven"]) <= lower).all())
    assert bool((found.bound[len(proven) :] == torch.inf).all())
    assert (found.trace["proof"] == "exact") == (len(proven) == len(y))
    if int(lower.sum()) == len(y):
        assert torch.equal(estimate, true)
    return found, true


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.sampled_from([1, 3, 10, 64]),
    k=st.sampled_from([2, 10, 100]),
    scale=st.sampled_from([0.1, 1.0, 10.0, 100.0]),
    smoothing=st.sampled_from([0.0, 0.0, 0.1]),
    one_class=st.booleans(),
    double=st.booleans(),
    relu=st.booleans(),
    held=st.sampled_from(["both", "bias", "weight"]),
)
def test_bounds_hold_on_any_network(
    seed: int, n: int, k: int, scale: float, smoothing: float, one_class: bool, double: bool, relu: bool, held: str
) -> None:
    rng = torch.Generator().manual_seed(seed)
    dtype = torch.float64 if double else torch.float32
    h = torch.randn(n, 30, generator=rng).to(dtype)
    h = h.relu() if relu else h
    V = (scale * torch.randn(k, 30, generator=rng) / 5).to(dtype).requires_grad_()
    b = torch.randn(k, generator=rng).to(dtype).requires_grad_()
    y = torch.full((n,), seed % k) if one_class else torch.randint(k, (n,), generator=rng)
    dV, db = torch.autograd.grad(F.cross_entropy(h @ V.T + b, y, label_smoothing=smoothing), [V, b])
    lower, upper, estimate = label_counts(
        None if held == "bias" else dV,
        None if held == "weight" else db,
        n,
        factor=1 / n,
        expected=torch.full((k,), n / k),
        smoothing=smoothing,
        features=h.mean(0),
        nonnegative=relu,
    )
    true = torch.bincount(y, minlength=k)
    assert bool(((lower <= true) & (true <= upper)).all())
    assert bool(((lower <= estimate) & (estimate <= upper)).all())
    assert int(estimate.sum()) == n


@pytest.mark.parametrize(("n", "k"), [(1, 2), (1, 10), (3, 10), (10, 100)])
def test_a_fresh_network_fixes_every_label_and_proves_that_of_one(n: int, k: int) -> None:
    for seed in range(10):
        found, true = counted(*client(seed, n, k))
        assert found.trace["lower"] == true.tolist()
        assert found.trace["proof"] == ("exact" if n == 1 else "conditional")
        assert n == 1 or "rows of probabilities, ignored rows or another factor" in found.trace["words"]


def by_number(outputs: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy that takes class numbers and nothing else."""
    return -outputs.log_softmax(1).gather(1, labels[:, None]).mean()


@pytest.mark.parametrize("n", [3, 4])
@pytest.mark.parametrize(
    "loss", [by_number, nn.CrossEntropyLoss(ignore_index=9), nn.CrossEntropyLoss(torch.arange(1.0, 11))]
)
def test_classes_that_occur_are_proven_where_nothing_but_classes_can(n: int, loss: Loss) -> None:
    for seed in range(10):
        found, true = counted(*client(seed, n, 10), loss)
        seen = true.clone()
        seen[9] = 0 if getattr(loss, "ignore_index", 0) == 9 else seen[9]
        assert found.trace["proven"] == (seen > 0).long().tolist()


def altered(model: nn.Module, loss: Loss, x: Tensor, y: Tensor, factor: float) -> Reconstruction:
    """The answer to an update that was multiplied by a factor of which nobody tells."""
    obs = observe(model, loss, x, y)[0]
    return COUNT(replace(obs, update={name: factor * t for name, t in obs.update.items()}))


@pytest.mark.parametrize("factor", [2.0, 0.5, 30.0, -1.0, -0.01])
@pytest.mark.parametrize("loss", [F.cross_entropy, by_number, nn.CrossEntropyLoss(label_smoothing=0.1)])
def test_a_wrong_factor_proves_nothing_wrong(factor: float, loss: Loss) -> None:
    proven = 0
    for seed, (n, k) in itertools.product(range(15), [(1, 10), (2, 5), (3, 10), (4, 10)]):
        model, x, y = client(seed, n, k)
        found = altered(model, loss, x, y, factor)
        left = torch.bincount(y, minlength=k) - torch.tensor(found.trace["proven"])
        assert bool((left >= 0).all())
        proven += int((found.bound == 0).sum())
    assert proven == 0 or loss is by_number


def test_ignored_rows_and_soft_labels_are_not_proven_to_be_classes() -> None:
    model, x, _ = client(0, 4, 10)
    found = COUNT(observe(model, F.cross_entropy, x, torch.tensor([-100, -100, 5, 5]))[0])
    assert found.trace["proven"] == [0] * 10
    found = COUNT(observe(model, lambda o, y: F.nll_loss(o.log_softmax(1), y), x, torch.tensor([-100, -100, 5, 5]))[0])
    assert found.trace["proven"] == [0] * 5 + [1] + [0] * 4
    rows = torch.tensor([[0.6, 0.4] + 8 * [0.0]] * 2)
    found = COUNT(observe(model, F.cross_entropy, x[:2], rows)[0])
    assert bool((found.bound == torch.inf).all())


def test_the_soft_label_of_one_example_is_computed_back_but_not_proven() -> None:
    model, x, _ = client(0, 1, 10)
    row = torch.tensor([[0.6, 0.4] + 8 * [0.0]])
    found = COUNT(observe(model, F.cross_entropy, x, row)[0])
    assert torch.allclose(found.labels, row, atol=1e-4)
    assert bool((found.bound == torch.inf).all())
    assert "0.6 of class 0, 0.4 of class 1" in found.trace["words"]


def test_weighted_classes_are_counted() -> None:
    rng, right = torch.Generator().manual_seed(0), 0
    for seed in range(10):
        model, x, y = client(seed, 12, 4)
        weight = torch.rand(4, generator=rng) + 0.5
        found, true = counted(model, x, y, nn.CrossEntropyLoss(weight, reduction=("mean", "sum")[seed % 2]))
        right += int(torch.minimum(torch.tensor(found.trace["estimate"]), true).sum())
    assert right >= 0.9 * 120


def test_the_bounds_are_the_best_possible() -> None:
    rng = torch.Generator().manual_seed(0)
    n, k = 5, 3
    for _ in range(20):
        p = (3 * torch.randn(n, k, generator=rng, dtype=torch.float64)).softmax(1)
        pull = p.sum(0) - torch.bincount(torch.randint(k, (n,), generator=rng), minlength=k)
        lower, upper = count_bounds(pull / n, n, factor=1 / n)
        possible = [
            c
            for c in itertools.product(range(n + 1), repeat=k)
            if sum(c) == n and bool((pull + torch.tensor(c) > 0).all())
        ]
        table = torch.tensor(possible)
        assert torch.equal(lower, table.min(0).values)
        assert torch.equal(upper, table.max(0).values)


def test_a_gradient_that_no_batch_has_proves_nothing() -> None:
    for tampered in ([-0.5, 0.1, 0.1], [-0.9, -0.9, 1.8], [-5.0, 4.0, 1.0]):
        lower, upper = count_bounds(torch.tensor(tampered), 1, factor=1.0)
        assert lower.tolist() == [0, 0, 0]
        assert upper.tolist() == [1, 1, 1]


@pytest.mark.parametrize("n", [16, 64])
def test_more_examples_than_classes_is_bounded_and_nearly_right(n: int) -> None:
    wrong = 0
    for seed in range(10):
        found, true = counted(*client(seed, n, 10))
        assert found.trace["proof"] == "conditional"
        assert "are estimates" in found.trace["words"]
        wrong += int((torch.tensor(found.trace["estimate"]) - true).clamp_min(0).sum())
    assert wrong / (10 * n) < 0.05


@pytest.mark.parametrize("n", [1, 7, 40])
def test_a_batch_of_one_class(n: int) -> None:
    model, x, y = client(3, n, 10)
    found, _ = counted(model, x, torch.full_like(y, 4))
    assert found.labels is not None
    assert bool((found.labels == 4).all())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", ["cross-entropy", "binary-cross-entropy"])
@pytest.mark.parametrize("k", [1, 10])
def test_losses(k: int, loss: str, reduction: str) -> None:
    if (k, loss) == (1, "cross-entropy"):
        k = 2
    for seed, n in itertools.product(range(5), (1, 4, 30)):
        found, _ = counted(*client(seed, n, k), loss_named(loss, reduction))  # type: ignore[arg-type]
        assert found.trace["proof"] == "exact" or n > 1


def test_the_smoothing_of_the_loss_is_allowed_for() -> None:
    for seed in range(10):
        model, x, y = client(seed, 4, 10)
        found, true = counted(model, x, y, nn.CrossEntropyLoss(label_smoothing=0.2))
        assert found.trace["lower"] == true.tolist()
        assert counted(model, x[:1], y[:1], nn.CrossEntropyLoss(label_smoothing=0.2))[0].trace["proof"] == "exact"


def test_without_a_bias_one_example_is_proven_and_signs_prove_presence() -> None:
    for seed, activation in itertools.product(range(5), ("relu", "gelu")):
        found, true = counted(*client(seed, 1, 10, bias=False, activation=activation), by_number)
        assert found.trace["proof"] == "exact"
        found, _ = counted(*client(seed, 1, 10, bias=False, activation=activation))
        assert (found.trace["lower"], found.trace["proof"]) == (true.tolist(), "conditional")
    found, true = counted(*client(0, 6, 10, bias=False), by_number)
    assert "nonnegative" in found.trace["words"]
    assert torch.equal(torch.tensor(found.trace["proven"]) > 0, true > 0)
    found, _ = counted(*client(0, 6, 10, bias=False, activation="gelu"))
    assert found.trace["proof"] == "estimate"


def test_two_opposite_rows_prove_nothing() -> None:
    assert not present(torch.tensor([[1.0, -2.0], [-1.0, 2.0]]), 1).any()
    assert present(torch.tensor([[1.0, -2.0], [-2.0, 4.0], [1.0, -2.0]]), 1).tolist() == [False, True, False]


def test_a_fitted_network_proves_nothing_and_says_so() -> None:
    model, x, y = client(1, 8, 4)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(600):
        optimiser.zero_grad()
        F.cross_entropy(1e3 * model(x), y).backward()
        optimiser.step()
    with torch.no_grad():
        model.head.weight.mul_(1e3)
        model.head.bias.mul_(1e3)
    found, _ = counted(model, x, y)
    assert found.trace["proof"] == "estimate"
    assert found.trace["lower"] == [0] * 4
    assert found.trace["upper"] == [8] * 4
    assert found.trace["estimate"] == [2] * 4  # all that is left is to take the classes for equally frequent
    assert "proves nothing" in found.trace["words"]


def test_squared_error_is_exact_for_one_example_and_an_estimate_for_more() -> None:
    loss = loss_named("squared-error")
    for seed in range(10):
        assert counted(*client(seed, 1, 10), loss)[0].trace["proof"] == "exact"
        assert counted(*client(seed, 5, 10), loss)[0].trace["proof"] == "estimate"


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.sampled_from([1, 3, 10, 20]),
    k=st.sampled_from([2, 10]),
    steps=st.integers(1, 8),
    rate=st.sampled_from([1e-3, 1e-1, 1.0]),
    momentum=st.sampled_from([0.0, 0.9]),
    decay=st.sampled_from([0.0, 0.01]),
    batch=st.sampled_from([None, 3]),
    clients=st.sampled_from([1, 3]),
    optimiser=st.sampled_from(["sgd", "sgd", "adam"]),
)
def test_bounds_hold_of_local_training(
    seed: int,
    n: int,
    k: int,
    steps: int,
    rate: float,
    momentum: float,
    decay: float,
    batch: int | None,
    clients: int,
    optimiser: str,
) -> None:
    protocol = Protocol(
        local_steps=steps,
        learning_rate=rate,
        momentum=momentum,
        weight_decay=decay if optimiser == "sgd" else 0.0,
        local_batch_size=batch,
        optimiser=optimiser,  # type: ignore[arg-type]
    )
    counted(*client(seed, n, k), protocol=protocol, defences=[f"secure-aggregation:clients={min(clients, n)}"])


def test_local_training_keeps_the_proof() -> None:
    protocol = Protocol(epochs=3, local_batch_size=2, learning_rate=0.05, momentum=0.5, weight_decay=0.01)
    found, true = counted(*client(0, 4, 50), by_number, protocol=protocol)
    assert found.trace["lower"] == true.tolist()
    assert found.trace["proven"] == (true > 0).long().tolist()


def test_adam_proves_which_classes_occur() -> None:
    model, x, _ = client(0, 4, 10)
    for loss in (F.cross_entropy, by_number):
        adam = Protocol(local_steps=3, optimiser="adam")
        found, true = counted(model, x, torch.tensor([2, 5, 5, 7]), loss, protocol=adam)
        assert torch.equal(torch.tensor(found.trace["lower"]) > 0, true > 0)
        assert found.trace["proof"] == ("conditional" if loss is F.cross_entropy else "bounded")


@pytest.mark.parametrize("seed", range(5))
def test_impulse_is_what_torch_does(seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    options = {"momentum": 0.9 * (seed > 0), "weight_decay": 0.1 * (seed > 1)}
    w = nn.Parameter(torch.randn((), generator=rng, dtype=torch.float64))
    start, gradients = w.item(), torch.randn(7, generator=rng, dtype=torch.float64)
    optimiser = torch.optim.SGD([w], lr=0.3, **options)
    for g in gradients:
        w.grad = g.clone()
        optimiser.step()
    decay, weights = impulse(7, learning_rate=0.3, **options)
    assert w.item() == pytest.approx(decay * start - float(weights @ gradients), abs=1e-12)


def test_noise_ends_the_proof_unless_its_size_is_known() -> None:
    for seed in range(10):
        model, x, y = client(seed, 4, 10)
        loud = counted(model, x, y, defences=["noise:sigma=0.02,relative=true"], seed=seed)[0]
        assert loud.trace["proof"] == "estimate"
        known, true = counted(model, x, y, by_number, defences=["noise:sigma=0.001"], seed=seed)
        assert known.trace["lower"] == true.tolist()
        assert known.trace["proven"] == (true > 0).long().tolist()
        assert "known noise" in known.trace["words"]


@pytest.mark.parametrize("defence", ["clip:norm=0.01", "mixup", "secure-aggregation:clients=3"])
def test_defences_that_leave_the_labels_in(defence: str) -> None:
    for seed in range(5):
        assert counted(*client(seed, 6, 100), defences=[defence])[0].trace["proof"] == "conditional"
        assert sum(counted(*client(seed, 6, 100), by_number, defences=[defence])[0].trace["proven"]) > 3


def test_apportion_fills_up_the_largest_remainders() -> None:
    free = torch.zeros(3, dtype=torch.int64), torch.full((3,), 9)
    assert apportion(torch.tensor([2.6, 1.7, 0.7]), *free, 5).tolist() == [2, 2, 1]
    lower, upper = torch.tensor([0, 3, 0]), torch.tensor([1, 5, 5])
    assert apportion(torch.tensor([4.0, 0.0, 1.0]), lower, upper, 5).tolist() == [1, 3, 1]


class Cut(nn.Module):
    """A network whose output is not its last dense layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = small.build("mlp", (12,), 10, width=8, rng=torch.Generator().manual_seed(0))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) / 2


def test_obstacles_are_told_in_words() -> None:
    model, x, y = client(0, 4, 10)

    def words(model: nn.Module, y: Tensor, loss: Loss = F.cross_entropy, **how: object) -> str:
        with pytest.raises(NotApplicable) as refusal:
            COUNT(observe(model, loss, x, y, **how)[0])  # type: ignore[arg-type]
        return str(refusal.value)

    assert "not that of a dense layer" in words(Cut(), y)
    assert "vectors or real numbers" in words(model, torch.randn(4, 10), F.mse_loss)
    weighted = nn.CrossEntropyLoss(weight=torch.arange(1.0, 11.0))
    assert "weights or ignores classes" in words(model, y, weighted, protocol=Protocol(local_steps=2))
    assert "weights beside smoothing" in words(model, y, nn.CrossEntropyLoss(weighted.weight, label_smoothing=0.1))
    adam = Protocol(local_steps=2, optimiser="adam", weight_decay=0.1)
    assert "Adam keeps only signs" in words(model, y, protocol=adam)
    overshoot = Protocol(local_steps=3, learning_rate=1.0, weight_decay=1.5)
    assert "overshoot" in words(model, y, protocol=overshoot)
    model.head.requires_grad_(False)
    assert "frozen" in words(model, y)
    with pytest.raises(ValueError, match="both are missing"):
        label_counts(None, None, 1, factor=1.0, expected=torch.ones(2))
