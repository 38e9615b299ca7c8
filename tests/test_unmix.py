"""unmix on small clients of every kind; the truth is compared here and only here."""

from dataclasses import replace

import pytest
import torch
from clients import Exchange
from torch import Tensor, nn

from unbatch.attacks.unmix import Unmix
from unbatch.case import Case
from unbatch.errors import NotApplicable
from unbatch.inversion.unmixing import RemainingLabels, Unmixing
from unbatch.inversion.view import View
from unbatch.loss import loss_named
from unbatch.numerics.unmix import solver as solver
from unbatch.numerics.unmix.mixture import MOST_CLASSES
from unbatch.reconstruction import Reconstruction


def client(spelling: str, dtype=torch.float64):
    setting = Case.parse(spelling).setting()
    model, x = setting.model.to(dtype), setting.inputs.to(dtype)
    return model, setting.loss, x, setting.labels


def errors(found: Reconstruction, x: Tensor) -> Tensor:
    """[k, n] |found - true| / |found|."""
    assert found.inputs is not None
    a, b = found.inputs.double().flatten(1), x.double().flatten(1)
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist") / a.norm(dim=1, keepdim=True)


def holds(found: Reconstruction, x: Tensor, *, share: float = 1.0, most: float = 1e-4) -> None:
    """At least that share of x is found, no example twice, and every one within its bound."""
    gap = errors(found, x)
    assert len(set(gap.argmin(1).tolist())) == len(found) >= share * len(x)
    assert found.bound is not None
    least = gap.min(1).values
    assert bool((least <= found.bound).all())
    assert bool((least < most).all())


ACTIVATIONS = ["relu", "leaky-relu", "elu", "gelu", "silu", "softplus", "tanh", "sigmoid"]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_any_activation(exchange: Exchange, activation: str, dtype: torch.dtype) -> None:
    model, loss, x, y = client(f"photos:batch=8,size=16,width=200,activation={activation}", dtype)
    found = Unmix()(exchange(model, loss, x, y)[0])
    holds(found, x)
    assert torch.equal(found.labels, y[errors(found, x).argmin(1)])


def with_activation(activation: nn.Module, gain: float, dtype=torch.float64, batch: int = 6):
    """A client of that activation whose first layer is `gain` times the usual one."""
    model, loss, x, y = client(f"photos:batch={batch},size=16,width=200,activation=relu", dtype)
    flatten, first, _, head = model
    for p in first.parameters():
        p.data *= gain
    return nn.Sequential(flatten, first, activation, head).to(dtype), loss, x, y


@pytest.mark.parametrize(("activation", "gain"), [(nn.PReLU(), 1.0), (nn.Hardtanh(), 3.0)], ids=["prelu", "hardtanh"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_kinked_activations_that_torch_has_besides(
    exchange: Exchange, activation: nn.Module, gain: float, dtype: torch.dtype
) -> None:
    model, loss, x, y = with_activation(activation, gain, dtype)
    found = Unmix()(exchange(model, loss, x, y)[0])
    holds(found, x)
    assert torch.equal(found.labels, y[errors(found, x).argmin(1)])
    assert "words" not in found.trace


def test_the_last_of_a_large_relu_batch_are_found_by_the_patterns_of_guesses(
    exchange: Exchange, monkeypatch: pytest.MonkeyPatch
) -> None:
    """42 examples, 100 neurons: programs end at those that are found, and with few left guesses have few unknowns."""
    model, loss, x, y = client("photos:batch=42,size=16,width=100,activation=relu")
    obs = exchange(model, loss, x, y)[0]
    found = Unmix(attempts=1)(obs)
    holds(found, x)
    assert "settle" not in {entry["start"] for entry in found.trace["log"]}
    monkeypatch.setattr(solver, "FREE_SHARE", 0.0)
    monkeypatch.setattr(solver, "LAST_EXAMPLES", 0)
    without = Unmix(attempts=1)(obs)
    holds(without, x)  # those of which the outputs tell are subtracted, and the rest is a small mixture of its own
    left = [entry["left"] for entry in without.trace["log"]]
    assert sum(n == 42 for n in left) == 1
    assert left != sorted(left, reverse=True)


def test_a_hardtanh_that_hardly_saturates_is_said_to_be_linear(exchange: Exchange) -> None:
    model, loss, x, y = with_activation(nn.Hardtanh(), 1.0, batch=8)  # of four, rounding decides
    assert float((model[:2](x).abs() > 1).double().mean()) < 0.01
    found = Unmix(attempts=1)(exchange(model, loss, x, y)[0])
    assert not len(found)
    assert "of 8 examples were found" in found.trace["words"]
    assert "all but linear on these inputs" in found.trace["words"]


@pytest.mark.parametrize(
    "spelling",
    [
        "depth=2,width=120,activation=gelu",
        "depth=3,width=120,activation=tanh",
        "depth=3,width=300,activation=relu",
        "depth=2,width=200,activation=leaky-relu",
    ],
)
def test_any_depth(exchange: Exchange, spelling: str) -> None:
    model, loss, x, y = client(f"photos:batch=6,size=16,{spelling}")
    holds(Unmix()(exchange(model, loss, x, y)[0]), x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_deep_network_of_learnt_slopes(exchange: Exchange, dtype: torch.dtype) -> None:
    model, loss, x, y = client("photos:batch=5,size=16,depth=2,width=150,activation=relu", dtype)
    model = nn.Sequential(*[nn.PReLU(dtype=dtype) if isinstance(layer, nn.ReLU) else layer for layer in model])
    found = Unmix(attempts=1)(exchange(model, loss, x, y)[0])
    holds(found, x)
    assert torch.equal(found.labels, y[errors(found, x).argmin(1)])


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["leaky-relu", "prelu"])
def test_a_deep_leaky_network_of_a_larger_batch(exchange: Exchange, activation: str) -> None:
    """Nine dual vectors that are nearly right fix all but two directions of each example, and its outputs fix these."""
    model, loss, x, y = client("photos:batch=10,size=16,depth=4,width=500,activation=leaky-relu")
    if activation == "prelu":
        model = nn.Sequential(
            *[nn.PReLU(dtype=x.dtype) if isinstance(layer, nn.LeakyReLU) else layer for layer in model]
        )
    found = Unmix(attempts=1)(exchange(model, loss, x, y)[0])
    holds(found, x)


def test_a_deep_leaky_network_of_real_targets(exchange: Exchange) -> None:
    model, _, x, _ = client("photos:batch=3,size=16,depth=2,width=150,activation=leaky-relu")
    y = torch.randn(3, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = Unmix(attempts=1)(exchange(model, lambda o, t: (o - t).square().mean(), x, y)[0])
    holds(found, x)


@pytest.mark.parametrize("name", ["cross-entropy", "binary-cross-entropy", "squared-error"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_any_loss(exchange: Exchange, name: str, reduction: str) -> None:
    model, _, x, y = client("photos:batch=6,size=16,width=150,activation=gelu")
    holds(Unmix()(exchange(model, loss_named(name, reduction), x, y)[0]), x)


def test_a_real_target_is_found_with_its_input(exchange: Exchange) -> None:
    model, _, x, _ = client("photos:batch=6,size=16,width=150,activation=tanh")
    model = nn.Sequential(*list(model)[:-1], nn.Linear(150, 1)).double()
    y = torch.randn(6, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = Unmix()(exchange(model, lambda o, t: (o - t).square().mean(), x, y)[0])
    holds(found, x)
    torch.testing.assert_close(found.labels, y[errors(found, x).argmin(1)], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_without_a_bias(exchange: Exchange, activation: str) -> None:
    model, loss, x, y = client(f"photos:batch=6,size=16,width=200,activation={activation},bias=false")
    holds(Unmix()(exchange(model, loss, x, y)[0]), x)


@pytest.mark.parametrize("activation", ["relu", "leaky-relu"])
def test_kinks_above_the_classes_that_patterns_take(exchange: Exchange, activation: str) -> None:
    """Every label of every guess would be too many programs: such networks go by the signs alone, or by rounded kinks."""
    k = MOST_CLASSES + 22
    model, loss, x, _ = client(f"photos:batch=6,size=16,width=300,activation={activation}")
    rng = torch.Generator().manual_seed(1)
    head = nn.Linear(300, k).double()
    for p in head.parameters():
        p.data = (2 * torch.rand(p.shape, generator=rng, dtype=torch.float64) - 1) / 300**0.5
    y = torch.randint(k, (6,), generator=rng)
    found = Unmix()(exchange(nn.Sequential(*list(model)[:-1], head), loss, x, y)[0])
    holds(found, x)
    assert torch.equal(found.labels, y[errors(found, x).argmin(1)])


class Standardised(nn.Module):
    """Pictures less a mean and over a deviation for each channel, as data loaders leave them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.49, 0.48, 0.45])[:, None, None])
        self.register_buffer("deviation", torch.tensor([0.25, 0.24, 0.26])[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.deviation


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_a_network_that_standardises_first_gives_the_pictures_as_they_were(exchange: Exchange, activation: str) -> None:
    model, loss, x, y = client(f"photos:batch=6,size=16,width=200,activation={activation}")
    found = Unmix()(exchange(nn.Sequential(Standardised(), *model).double(), loss, x, y)[0])
    assert found.layer == ""
    assert found.inputs.shape == x.shape
    holds(found, x)


def test_one_class_and_repeated_labels(exchange: Exchange) -> None:
    model, loss, x, _ = client("photos:batch=8,size=16,width=200,activation=gelu")
    y = torch.full((8,), 3)
    found = Unmix()(exchange(model, loss, x, y)[0])
    holds(found, x)
    assert found.labels.tolist() == [3] * 8


@pytest.mark.parametrize("knowledge", ["known", "counted"])
def test_labels_of_the_rest_are_counted_for_a_descent(exchange: Exchange, knowledge: str) -> None:
    model, loss, x, y = client("photos:batch=16,size=16,width=200,activation=gelu")
    obs = exchange(model, loss, x, y, **({"labels": y} if knowledge == "known" else {}))[0]
    problem = Unmixing.of(View.of(obs), torch.Generator().manual_seed(0))
    layer, span, tail = problem.layer, problem.span, problem.tail(16)
    mixture = problem.mixture(tail)
    z = torch.cat([x.flatten(1) * layer.feeds.scale + layer.feeds.shift, torch.ones(16, 1)], 1).double() @ span.rows.T
    counted = RemainingLabels(problem.view, problem.form, mixture, tail)
    for found in (0, 6, 12):
        left = counted(z[:found], y[:found])
        wrong = (torch.bincount(left, minlength=9) - torch.bincount(y[found:], minlength=9)).abs().sum() / 2
        assert len(left) == 16 - found
        assert wrong <= (0 if knowledge == "known" else 1)


def test_a_table_of_which_components_are_a_poor_guess_is_polished_to_the_truth(exchange: Exchange) -> None:
    model, loss, x, y = client("tables:dataset=breast-cancer,batch=16,width=300,activation=softplus", torch.float32)
    found = Unmix()(exchange(model, loss, x, y)[0])
    holds(found, x)


def test_a_descent_alone_finds_a_batch(exchange: Exchange, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Unmixing, "starts", lambda self: iter(()))
    model, loss, x, y = client("tables:dataset=breast-cancer,batch=16,width=300,activation=softplus", torch.float32)
    found = Unmix()(exchange(model, loss, x, y)[0])
    holds(found, x)
    assert {entry["start"] for entry in found.trace["log"]} == {"descent"}


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_draws_of_the_prior_alone_find_a_batch(
    exchange: Exchange, activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Unmixing.starts
    monkeypatch.setattr(Unmixing, "starts", lambda self: (start for start in whole(self) if start[0] == "prior"))
    monkeypatch.setattr(
        "unbatch.inversion.unmixing.Descent", lambda labels: lambda left, rng: left.U.new_zeros(0, left.n)
    )
    model, loss, x, y = client(f"photos:batch=8,size=16,width=200,activation={activation}")
    found = Unmix()(exchange(model, loss, x, y)[0])
    holds(found, x)
    assert {entry["start"] for entry in found.trace["log"] if entry["found"]} <= {"prior", "settle"}


def test_a_table(exchange: Exchange) -> None:
    model, loss, x, y = client("tables:batch=8,width=200,activation=gelu")
    holds(Unmix()(exchange(model, loss, x, y)[0]), x)


def test_known_labels_narrow_the_search_and_wrong_labels_give_nothing_wrong(exchange: Exchange) -> None:
    model, loss, x, y = client("photos:batch=6,size=16,width=200,activation=gelu")
    holds(Unmix()(exchange(model, loss, x, y, labels=y)[0]), x)
    for labels, share in ((torch.where(torch.arange(6) == 2, (y + 1) % 9, y), 5 / 6), ((y + 1) % 9, 1 / 6)):
        holds(Unmix()(exchange(model, loss, x, y, labels=labels)[0]), x, share=share)


def test_near_duplicates_are_told_apart(exchange: Exchange) -> None:
    model, loss, x, y = client("photos:batch=6,size=16,width=200,activation=gelu")
    x[1] = x[0] + 1e-3 * torch.randn(x[0].shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    y[1] = y[0]
    holds(Unmix()(exchange(model, loss, x, y)[0]), x)


@pytest.mark.parametrize("activation", ["gelu", "relu", "leaky-relu"])
def test_constant_images(exchange: Exchange, activation: str) -> None:
    """Two differ from each other; with a third they depend linearly, and the rank falls below the batch size."""
    model, loss, x, y = client(f"photos:batch=6,size=16,width=200,activation={activation}")
    x[0], x[1] = 0.3, 0.8
    holds(Unmix()(exchange(model, loss, x, y)[0]), x)
    x[2] = 0.5
    found = Unmix(attempts=1)(exchange(model, loss, x, y, batch_size=6)[0])
    holds(found, x, share=0.0)
    assert sorted(errors(found, x).argmin(1).tolist()) == [3, 4, 5]  # of nine classes two are missing
    assert "3 of 5 examples were found. The batch has 6" in found.trace["words"]
    assert "Tried without success" in found.trace["words"]
    assert "linear on these inputs" not in found.trace["words"]


def narrow(n: int, d: int, m: int, activation: type[nn.Module] = nn.GELU, *, bias: bool = True):
    rng = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(d, m, bias=bias), activation(), nn.Linear(m, 9)).double()
    for p in model.parameters():
        p.data = (2 * torch.rand(p.shape, generator=rng, dtype=torch.float64) - 1) / d**0.5
    return model, nn.CrossEntropyLoss(), torch.rand(n, d, generator=rng).double(), torch.randint(9, (n,), generator=rng)


@pytest.mark.parametrize("activation", [nn.GELU, nn.ReLU])
def test_as_many_examples_as_inputs_are_the_most(exchange: Exchange, activation: type[nn.Module]) -> None:
    """With a bias the span has d + 1 directions, and n of them must be fewer."""
    model, loss, x, y = narrow(12, 12, 100, activation)
    holds(Unmix()(exchange(model, loss, x, y)[0]), x)
    for n in (13, 14, 20):
        refused(exchange, *narrow(n, 12, 100, activation), "full rank 13: the batch has at least as many")
    refused(exchange, *narrow(12, 12, 100, activation, bias=False), "full rank 12: the batch has at least as many")
    holds(Unmix()(exchange(*narrow(11, 12, 100, activation, bias=False))[0]), narrow(11, 12, 100, bias=False)[2])


def test_as_many_examples_as_neurons_and_more_are_refused(exchange: Exchange) -> None:
    for n in (10, 12):
        refused(exchange, *narrow(n, 60, 10), "full rank 10: the batch has at least as many")


def test_partial_guesses_carry_no_claim(exchange: Exchange) -> None:
    model, loss, x, y = client("photos:batch=8,size=16,width=200,activation=gelu")
    obs = exchange(model, loss, x, y, labels=(y + 1) % 9)[0]  # wrong labels leave something unfound
    found = Unmix(partial=True, attempts=1)(obs)
    assert found.bound is not None
    gap = errors(found, x).min(1).values
    assert bool((gap <= found.bound).all())
    assert len(found) > len(Unmix(attempts=1)(obs))


def refused(exchange: Exchange, model, loss, x, y, words: str, **knowledge) -> None:
    with pytest.raises(NotApplicable, match=words):
        Unmix()(exchange(model, loss, x, y, **knowledge)[0])


def test_obstacles_in_words(exchange: Exchange) -> None:
    model, loss, x, y = client("photos:batch=8,size=8,width=200,activation=gelu")
    narrow = client("photos:batch=8,size=8,width=8,activation=gelu")
    refused(exchange, *narrow, "no longer isolates")
    refused(exchange, *client("photos:batch=8,size=8,width=14,activation=gelu"), "fewer than it takes")
    refused(exchange, *client("photos:batch=4,size=8,width=50,activation=identity"), "linear")
    flat = x.flatten(1)
    normed = nn.Sequential(nn.Linear(192, 60), nn.BatchNorm1d(60), nn.GELU(), nn.Linear(60, 9)).double()
    refused(exchange, normed, loss, flat, y, "interact", mode="train")
    dropped = nn.Sequential(nn.Linear(192, 60), nn.Dropout(), nn.GELU(), nn.Linear(60, 9)).double()
    refused(exchange, dropped, loss, flat, y, "random", mode="train")
    refused(exchange, nn.Linear(192, 9).double(), loss, flat, y, "head")
    refused(exchange, model, lambda o, t: o.square().mean() * o.abs().sum(), x, y, "loss")


def test_batch_norm_in_eval_mode_is_no_obstacle(exchange: Exchange) -> None:
    _, loss, x, y = client("photos:batch=4,size=8,width=60,activation=gelu")
    rng = torch.Generator().manual_seed(0)
    normed = nn.Sequential(nn.Flatten(), nn.Linear(192, 80), nn.BatchNorm1d(80), nn.GELU(), nn.Linear(80, 9)).double()
    for p in normed.parameters():
        p.data = 0.1 * torch.randn(p.shape, generator=rng, dtype=torch.float64)
    normed.eval()
    holds(Unmix()(exchange(normed, loss, x, y, mode="eval")[0]), x)


def test_features_behind_convolutions(exchange: Exchange) -> None:
    model, loss, x, y = client("photos:batch=4,size=8,model=convnet,depth=1,width=4,activation=gelu")
    found = Unmix()(exchange(model, loss, x, y)[0])
    head = next(i for i, layer in enumerate(model) if isinstance(layer, nn.Linear))
    features = model[:head](x).detach()
    assert found.layer
    holds(found, features)


def test_a_gradient_in_half_precision_claims_no_more_than_it_holds(exchange: Exchange) -> None:
    model, loss, x, y = client("photos:batch=4,size=16,width=300,activation=gelu", torch.float32)
    obs = exchange(model, loss, x, y)[0]
    halved = replace(obs, update={name: tensor.bfloat16() for name, tensor in obs.update.items()})
    found = Unmix(attempts=1)(halved)
    holds(found, x, most=2e-3)
    assert float((found.bound / errors(found, x).min(1).values).median()) < 100


@pytest.mark.parametrize(("n", "width"), [(1, 12), (1, 24), (2, 24), (2, 40), (3, 64)])
def test_a_few_examples_on_tiny_kinked_layers(exchange: Exchange, n: int, width: int) -> None:
    model, loss, x, y = client(f"photos:batch={n},size=16,width={width},activation=relu")
    holds(Unmix()(exchange(model, loss, x, y)[0]), x)


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_exact_duplicates_are_counted(exchange: Exchange, activation: str, reduction: str) -> None:
    model, loss, x, y = client(f"photos:batch=6,size=16,width=200,activation={activation}")
    x[1], y[1] = x[0], y[0]
    loss = loss if reduction == "mean" else torch.nn.CrossEntropyLoss(reduction="sum")
    found = Unmix(attempts=1)(exchange(model, loss, x, y)[0])
    assert len(found) == 6
    gap = errors(found, x)
    assert bool((gap.min(1).values <= found.bound).all())
    assert sorted(gap.argmin(1).tolist()) in ([0, 0, 2, 3, 4, 5], [1, 1, 2, 3, 4, 5])
    assert sorted(found.labels.tolist()) == sorted(y.tolist())
    assert found.trace["batch size"] == 6 if reduction == "mean" else True
