"""Lower bounds: against the best attacks on linear models, and against the library's own attacks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import unbatch
from unbatch import Attack, Case, Knowledge, Protocol, observe
from unbatch.analysis import Analysis, Bound, Verdict
from unbatch.attack import NotApplicable
from unbatch.benchmarks import bounds as noisy_gradients
from unbatch.information import jumps
from unbatch.loss import loss_named
from unbatch.models import ACTIVATIONS
from unbatch.numerics.prior import GaussianPrior
from unbatch.observation import Observation, Privacy

LOSS = loss_named("cross-entropy")
EVAL = Protocol(mode="eval")
RANGE = Knowledge(input_range=(0.0, 1.0))


def total(output: Tensor, target: Tensor) -> Tensor:
    """With it the gradient of a linear network of one example is linear in the example."""
    return output.sum()


def linear(d: int, m: int = 12, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(d, m, bias=False), nn.Linear(m, 1, bias=False)).double()


def tanh(shape: tuple[int, ...], m: int, act: type[nn.Module] = nn.Tanh, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), m), act(), nn.Linear(m, 6)).double()


def seen(
    model: nn.Module, loss: object, x: Tensor, y: Tensor, sigma: float, seed: int = 0, **known: object
) -> Observation:
    more = RANGE | Knowledge(**known)
    return observe(model, loss, x, y, defences=[f"noise:sigma={sigma}"], knowledge=more, protocol=EVAL, seed=seed)[0]


def flat(update: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in update.values()])


def one(spec: str, obs: Observation, at: tuple[Tensor, Tensor] | None = None) -> Bound:
    (bound,) = Analysis.parse(spec).run(obs, at=at)
    assert isinstance(bound, Bound)
    return bound


# ------------------------------------------------------------------------------------------------- linear models


@pytest.mark.parametrize("sigma", [1e-3, 0.3])
def test_least_squares_meets_cramer_rao_and_the_posterior_mean_van_trees(sigma: float) -> None:
    shape, y = (1, 3, 4), torch.tensor([0])
    model, prior = linear(12), GaussianPrior(shape)
    obs = seen(model, total, prior.draw(1, torch.Generator().manual_seed(0)), y, sigma)
    clean = observe(model, total, torch.zeros(1, *shape).double(), y, protocol=EVAL)[0]
    J = torch.stack([flat(clean.simulate(e.view(1, *shape), y)) for e in torch.eye(12).double()], 1)
    F = J.T @ J / sigma**2
    C = prior.push(torch.eye(12).double()).T @ prior.push(torch.eye(12).double())
    posterior = torch.linalg.inv(F + torch.linalg.inv(C))
    cramer_rao, van_trees = one("cramer-rao", obs), one("van-trees", obs)
    assert cramer_rao.value**2 == pytest.approx(float(torch.linalg.inv(F).trace()) / 12, rel=1e-9)
    assert van_trees.value**2 == pytest.approx(float(posterior.trace()) / 12, rel=1e-9)
    assert (cramer_rao.scope, van_trees.scope) == ("unbiased", "any")
    weaker = one("noise-information:draws=200", obs)
    assert weaker.value < van_trees.value
    assert weaker.psnr < 40 or sigma < 0.1
    stochastic = one("van-trees:exact=0,probes=16", obs)
    assert 0.5 * van_trees.value < stochastic.value < van_trees.value  # two standard errors are taken off
    rng, errors = torch.Generator().manual_seed(1), []
    inverse = torch.linalg.pinv(J)
    for x in prior.draw(2000, rng):
        u = J @ x.flatten() + sigma * torch.randn(len(J), generator=rng, dtype=torch.float64)
        squares = inverse @ u - x.flatten()
        mean = 0.5 + posterior @ (J.T @ (u - 0.5 * J.sum(1))) / sigma**2 - x.flatten()
        errors.append(torch.stack([squares.square().mean(), mean.square().mean()]))
    found = torch.stack(errors)
    bounds = torch.tensor([cramer_rao.value**2, van_trees.value**2])
    off = (found.mean(0) - bounds) / (found.std(0) / len(found) ** 0.5)
    assert float(off.abs().max()) < 4


def test_the_value_is_in_units_of_the_range() -> None:
    y, x = torch.tensor([0]), torch.rand(1, 12).double()
    unit = seen(linear(12), total, x, y, 0.1)
    wide = observe(
        linear(12),
        total,
        10 * x,
        y,
        defences=["noise:sigma=1"],
        knowledge=Knowledge(input_range=(0.0, 10.0)),
        protocol=EVAL,
    )[0]
    for name in ("cramer-rao", "van-trees"):
        a, b = one(name, unit), one(name, wide)
        assert a.value == pytest.approx(b.value)
        assert f"at most {a.psnr:.1f} dB" in a.assumptions
        assert a.psnr == pytest.approx(-20 * math.log10(a.value))


@pytest.mark.parametrize("n", [1, 3])
def test_random_probes_agree_with_the_whole_matrix(n: int) -> None:
    x, y = torch.rand(n, 1, 5, 5).double(), torch.arange(n)
    obs = seen(tanh((1, 5, 5), 60), LOSS, x, y, 0.01)
    whole, probed = one("cramer-rao", obs, (x, y)), one("cramer-rao:exact=0,probes=64", obs, (x, y))
    assert probed.value == pytest.approx(whole.value, rel=0.1)
    assert "standard error" in probed.assumptions
    assert "exact" in whole.assumptions
    assert whole.picture.startswith("data:image/png")
    assert not probed.picture


# ------------------------------------------------------------------------------------------------- who is bounded


def drawn(n: int, sigma: float, seed: int, act: type[nn.Module] = nn.Tanh) -> tuple[Observation, Tensor]:
    rng = torch.Generator().manual_seed(1000 + seed)
    x = GaussianPrior((1, 4, 4)).draw(n, rng)
    return seen(tanh((1, 4, 4), 48, act), LOSS, x, torch.arange(n), sigma, seed), x


def squared_error(attack: str, obs: Observation, x: Tensor) -> float:
    """Mean squared error of the best assignment; what finds nothing answers with the prior's mean."""
    try:
        found = Attack.parse(attack)(obs, seed=0).inputs
    except NotApplicable:
        found = None
    if found is None or not len(found):
        return float((x - 0.5).square().mean())
    table = torch.cdist(found.double().flatten(1), x.flatten(1)).square() / x[0].numel()
    guess = (x - 0.5).square().flatten(1).mean(1)
    return float(torch.minimum(table.min(0).values, guess).mean())  # kinder to the attacker than any attack can be


ATTACKS = "unmix:attempts=1,partial=true", "gradient-matching:iterations=60", "bias-ratio", "label-count"


def violate(attack: str, n: int, sigma: float, seeds: int, act: type[nn.Module] = nn.Tanh) -> None:
    names = ["noise-information"] if act is nn.ReLU else ["noise-information", "van-trees:draws=32"]
    bound = max(one(name, drawn(n, sigma, 0, act)[0]).value for name in names) ** 2
    errors = torch.tensor([squared_error(attack, *drawn(n, sigma, seed, act)) for seed in range(seeds)])
    assert float(errors.mean()) > bound - 3 * float(errors.std()) / seeds**0.5
    assert bound > 0


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_attack_violates_a_bound_for_any(attack: str) -> None:
    violate(attack, 1, 0.03, 2)


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("sigma", [1e-3, 0.1])
@pytest.mark.parametrize("act", [nn.Tanh, nn.ReLU])
@pytest.mark.parametrize("attack", ATTACKS)
def test_no_attack_violates_a_bound_for_any_over_many_seeds(
    attack: str, act: type[nn.Module], n: int, sigma: float
) -> None:
    violate(attack, n, sigma, 12, act)


def efficiency(act: type[nn.Module], sigma: float, n: int, seeds: int) -> Tensor:
    """Mean squared error of unmix over the Cramer-Rao bound, seed by seed."""
    shape = (1, 6, 6)
    x, y = torch.rand(n, *shape, generator=torch.Generator().manual_seed(0)).double(), torch.arange(n)
    model = tanh(shape, 120, act)
    bound = one("cramer-rao", seen(model, LOSS, x, y, sigma), (x, y)).value ** 2
    errors = []
    for seed in range(seeds):
        found = Attack.parse("unmix")(seen(model, LOSS, x, y, sigma, seed), seed=0).inputs
        assert found is not None
        place = torch.cdist(found.flatten(1), x.flatten(1)).argmin(1)
        assert sorted(place.tolist()) == list(range(n))
        errors.append(float((found - x[place]).square().mean()))
    return torch.tensor(errors) / bound


def test_unmix_meets_cramer_rao_and_does_not_beat_it() -> None:
    ratio = efficiency(nn.Tanh, 1e-6, 3, 6)
    assert abs(float(ratio.mean()) - 1) < 4 * float(ratio.std()) / len(ratio) ** 0.5 + 0.02


@pytest.mark.slow
@pytest.mark.parametrize("act", [nn.Tanh, nn.GELU, nn.Softplus, nn.Sigmoid])
@pytest.mark.parametrize("sigma", [1e-7, 1e-6])
def test_unmix_meets_cramer_rao_over_many_seeds(act: type[nn.Module], sigma: float) -> None:
    ratio = efficiency(act, sigma, 4, 30)
    assert abs(float(ratio.mean()) - 1) < 3 * float(ratio.std()) / len(ratio) ** 0.5 + 0.02


@pytest.mark.parametrize("sigma", [1e-5, 1e-4])
def test_noise_of_known_size_is_all_that_the_fit_is_told(sigma: float) -> None:
    """Without the defence's likelihood every example is as near as its bound says, nearer than its own reading tells."""
    x, y = torch.rand(3, 1, 6, 6, generator=torch.Generator().manual_seed(0)).double(), torch.arange(3)
    obs = seen(tanh((1, 6, 6), 120), LOSS, x, y, sigma)
    bare = obs.only(*(set(obs.knowledge) - {"log_prob"}))
    found, told = (Attack.parse("unmix")(each, seed=0) for each in (bare, obs))
    assert found.inputs is not None
    assert told.inputs is not None
    assert found.bound is not None
    gaps = torch.cdist(found.inputs.flatten(1), x.flatten(1))
    ratio = found.bound * found.inputs.flatten(1).norm(dim=1) / gaps.min(1).values
    assert sorted(gaps.argmin(1).tolist()) == [0, 1, 2]
    assert 1 < float(ratio.min()) < float(ratio.max()) < 20
    assert float(found.bound.max()) < 50 * sigma
    torch.testing.assert_close(found.inputs, told.inputs, rtol=0, atol=0.05 * float(gaps.min(1).values.max()))


# ------------------------------------------------------------------------------------------------- what is refused


def test_networks_whose_update_jumps_are_told_from_smooth_ones() -> None:
    found = {}
    for name, act in (ACTIVATIONS | {"selu": nn.SELU, "hardtanh": nn.Hardtanh, "mish": nn.Mish}).items():
        x, y = torch.rand(2, 1, 5, 5), torch.tensor([0, 1])
        obs = seen(tanh((1, 5, 5), 30, act), LOSS, x, y, 0.01)
        found[name] = jumps(obs, x, y, torch.Generator().manual_seed(0)) is not None
    assert {name for name, jump in found.items() if jump} == {"relu", "leaky-relu", "hardtanh", "selu"}
    pooled = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2, 3)).double()
    assert "MaxPool" in str(jumps(seen(pooled, LOSS, x, y, 0.01), x, y, torch.Generator()))


@pytest.mark.parametrize("name", ["cramer-rao", "van-trees"])
def test_words_where_there_is_no_bound(name: str) -> None:
    x, y = torch.rand(2, 1, 4, 4).double(), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="no Gaussian noise of known size"):
        Analysis.parse(name).run(observe(tanh((1, 4, 4), 20), LOSS, x, y)[0])
    with pytest.raises(ValueError, match="jumps where inputs cross a kink"):
        Analysis.parse(name).run(seen(tanh((1, 4, 4), 20, nn.ReLU), LOSS, x, y, 0.1))
    defences = ["noise:sigma=1e-4", "quantise:bits=4"]
    coarse = observe(tanh((1, 4, 4), 20), LOSS, x, y, defences=defences, knowledge=RANGE)[0]
    with pytest.raises(ValueError, match="changed by quantise:bits=4"):
        Analysis.parse(name).run(coarse)
    untold = coarse.only(*(set(coarse.knowledge) - {"altered"}))
    with pytest.raises(ValueError, match="another defence changed it"):
        Analysis.parse(name).run(untold, at=(x, y))
    clipped = observe(tanh((1, 4, 4), 20), LOSS, x, y, defences=["noise:sigma=1e-4", "clip:norm=0.1"], knowledge=RANGE)[
        0
    ]
    assert one(name, clipped, (x, y)).value > 0


def test_fewer_entries_than_unknowns_leave_no_unbiased_attacker() -> None:
    x, y = torch.rand(1, 30).double(), torch.tensor([0])
    model = nn.Sequential(nn.Linear(30, 2, bias=False), nn.Tanh(), nn.Linear(2, 2)).double()
    model[0].weight.requires_grad_(False)
    bound = one("cramer-rao", seen(model, LOSS, x, y, 0.1))
    assert bound.value == math.inf
    assert bound.psnr == -math.inf
    assert "no unbiased attacker exists" in bound.assumptions
    assert one("van-trees", seen(model, LOSS, x, y, 0.1)).psnr < 15


def test_default_audits_keep_quiet_and_named_analyses_say_why() -> None:
    case = Case.parse("digits:width=16,activation=tanh")
    assert not unbatch.audit(case, attacks=[]).notes
    assert not unbatch.audit(case, attacks=[]).bounds
    names = ["cramer-rao", "van-trees", "noise-information", "dp-reconstruction", "counting"]
    named = unbatch.audit(case, attacks=[], analyses=names)
    assert [note.partition(":")[0] for note in named.notes] == names
    noisy = unbatch.audit(case, attacks=[], defences=["noise:sigma=0.01"])
    assert {bound.name for bound in noisy.bounds} == {"Cramer-Rao", "van Trees", "noise information"}
    assert unbatch.audit(case, attacks=[], defences=["noise:sigma=0.01"]).bounds == noisy.bounds


# ------------------------------------------------------------------------------------------------- privacy, counting


def private(z: float, q: float = 1.0, steps: int = 1, shape: tuple[int, ...] = (1, 4, 4)) -> Observation:
    x, y = torch.rand(1, *shape).double(), torch.tensor([0])
    privacy = Privacy(clip=1.0, noise_multiplier=z, sampling_rate=q, steps=steps, delta=1e-5)
    return observe(tanh(shape, 20), LOSS, x, y, knowledge=RANGE | Knowledge(privacy=privacy))[0]


def test_privacy_bounds_are_sharp_about_as_many_nats_as_unknowns() -> None:
    def psnr(z: float, **more: float) -> dict[str, float]:
        found = Analysis.parse("dp-reconstruction").run(private(z, **more))
        return {f.name: f.psnr if isinstance(f, Bound) else f.value for f in found}

    strong, weak = psnr(10.0), psnr(0.05)
    chance = -10 * math.log10(0.25**2)
    assert strong["zCDP information"] == pytest.approx(chance, abs=0.1)
    assert weak["zCDP information"] > chance + 40
    assert strong["reconstruction robustness"] < weak["reconstruction robustness"]
    assert strong["Renyi"] < 10 < weak["Renyi"]
    assert strong["reconstruction success"] < 0.02 < weak["reconstruction success"]
    one_step, many = psnr(1.0, q=0.1), psnr(1.0, q=0.1, steps=100)
    assert all(one_step[name] <= many[name] for name in one_step)


def test_the_best_linear_attack_on_the_gaussian_mechanism_keeps_to_the_bounds() -> None:
    """u = clip(x - middle, 1) + z normal, whose posterior mean is known where nothing is clipped."""
    prior = GaussianPrior((1, 4, 4))
    for z in (0.05, 0.3, 1.0, 5.0):
        rng = torch.Generator().manual_seed(0)
        x = prior.draw(20000, rng).flatten(1) - 0.5
        u = x / x.norm(dim=1, keepdim=True).clamp_min(1.0) + z * torch.randn(
            x.shape, generator=rng, dtype=torch.float64
        )
        fit = torch.linalg.lstsq(u, x).solution
        error = float((u @ fit - x).square().mean())
        bounds = [
            b for b in Analysis.parse("dp-reconstruction").run(private(z)) if isinstance(b, Bound) and b.scope == "any"
        ]
        assert len(bounds) == 2
        assert all(b.value**2 < 1.01 * error for b in bounds)


@pytest.mark.parametrize("z", [0.2, 0.5, 1.0, 4.0])
def test_least_squares_on_the_gaussian_mechanism_keeps_to_the_renyi_bound(z: float) -> None:
    """u = (2 / sqrt d) (x - 1/2) + z normal, of norm at most 1 on the unit cube: an error of z sqrt(d) / 2 an entry."""
    for d in (1, 4, 64):
        bounds = Analysis.parse("dp-reconstruction").run(private(z, shape=(1, 1, d)))
        (renyi,) = [b for b in bounds if isinstance(b, Bound) and b.scope == "unbiased"]
        assert renyi.value < z * d**0.5 / 2
        assert renyi.value == pytest.approx(0.5 / math.expm1(4 / z**2) ** 0.5)


def test_counting_bits_and_numbers() -> None:
    x, y = torch.rand(2, 1, 8, 8), torch.tensor([0, 1])
    model = tanh((1, 8, 8), 40).float()
    pruned = observe(model, LOSS, x, y, defences=["prune:share=0.998"])[0]
    bound, verdict = Analysis.parse("counting").run(pruned)
    assert isinstance(bound, Bound)
    assert isinstance(verdict, Verdict)
    sent = sum(int(t.count_nonzero()) for t in pruned.update.values())
    assert verdict.value == sent / 128
    assert 12 < bound.psnr < 59
    with pytest.raises(ValueError, match="numbers and bits enough"):
        Analysis.parse("counting").run(observe(model, LOSS, x, y)[0])
    harder = observe(model, LOSS, x, y, defences=["prune:share=0.9995"])[0]
    assert Analysis.parse("counting").run(harder)[0].value > bound.value


@pytest.mark.slow
def test_under_noise_no_mixture_is_certified() -> None:
    """At 1e-4 the dense layer's gradient of four photographs accepts a mixture, which the whole update refuses."""
    problem, returned = noisy_gradients._Problem.of("softplus", 4, None, "cpu", 0), 0
    for draw in (3, 4, 6):
        obs, truth = noisy_gradients._sent(problem.model, problem.x, problem.y, 1e-4, draw)
        found = Attack.parse("unmix")(obs, seed=0)
        returned += len(found)
        if len(found):
            x = found.inputs.double().flatten(1)
            errors = torch.cdist(x, truth.inputs.double().flatten(1)).amin(1) / x.norm(dim=1)
            assert bool((errors <= found.bound).all())
    assert returned
