"""Lower bounds: against the best attacks on linear models, and against the library's own attacks."""

from __future__ import annotations

import base64
import io
import itertools
import json
import math
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.optimize import linear_sum_assignment
from scipy.stats import norm
from scipy.stats import t as student
from torch import Tensor, nn

import unbatch
from unbatch import Attack, Case, Knowledge, Protocol, observe
from unbatch.analyses.dp_reconstruction import CHANCES
from unbatch.analysis import Analysis, Bound, Verdict
from unbatch.attack import ActiveAttack
from unbatch.benchmarks import bounds as noisy_gradients
from unbatch.case import Setting
from unbatch.errors import NotApplicable
from unbatch.inversion.fisher import Imagined, Information, jumps
from unbatch.inversion.probe import probe
from unbatch.inversion.view import View
from unbatch.loss import loss_named
from unbatch.models.small import ACTIVATIONS
from unbatch.numerics.bounds.prior import GaussianPrior
from unbatch.numerics.bounds.rate_distortion import distortion, guessing_radius, level
from unbatch.numerics.bounds.subsampled_gaussian import Robustness
from unbatch.observation import Observation
from unbatch.privacy import Privacy
from unbatch.progress import Watch, watching
from unbatch.reporting.html import write

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
    (bound,) = Analysis.parse(spec)(obs, at=at)
    assert isinstance(bound, Bound)
    return bound


# ------------------------------------------------------------------------------------------------- linear models


def jacobian(model: nn.Module, shape: tuple[int, ...], n: int) -> Tensor:
    """Of the update of n examples through a linear network, which sees their sum alone, [e, n d]."""
    d, y = math.prod(shape), torch.zeros(1, dtype=torch.long)
    clean = observe(model, total, torch.zeros(1, *shape).double(), y, protocol=EVAL)[0]
    J = torch.stack([flat(clean.simulate(e.view(1, *shape), y)) for e in torch.eye(d).double()], 1)
    return J.repeat(1, n)


def covariance(prior: GaussianPrior, n: int) -> Tensor:
    C = prior.push(torch.eye(prior.d).double()).T @ prior.push(torch.eye(prior.d).double())
    return torch.block_diag(*[C] * n)


@pytest.mark.parametrize("sigma", [1e-3, 0.3])
def test_least_squares_meets_cramer_rao_and_the_posterior_mean_van_trees(sigma: float) -> None:
    shape, y = (1, 3, 4), torch.tensor([0])
    model, prior = linear(12), GaussianPrior(shape)
    obs = seen(model, total, prior.draw(1, torch.Generator().manual_seed(0)), y, sigma)
    J, C = jacobian(model, shape, 1), covariance(prior, 1)
    F = J.T @ J / sigma**2
    posterior = torch.linalg.inv(F + torch.linalg.inv(C))
    cramer_rao, van_trees = one("cramer-rao", obs), one("van-trees", obs)
    assert cramer_rao.value**2 == pytest.approx(float(torch.linalg.inv(F).trace()) / 12, rel=1e-9)
    assert van_trees.value**2 == pytest.approx(float(posterior.trace()) / 12, rel=1e-9)
    assert (cramer_rao.scope, van_trees.scope) == ("unbiased", "any")
    weaker = one("noise-information:draws=200", obs)
    assert weaker.value < van_trees.value
    assert weaker.psnr < 40 or sigma < 0.1
    stochastic = one("van-trees:exact=0,probes=16", obs)
    assert 0.3 * van_trees.value < stochastic.value < van_trees.value  # the sampling error is taken off
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


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("sigma", [1e-2, 0.3, 10.0])
def test_bounds_of_a_linear_network_in_closed_form(n: int, sigma: float) -> None:
    """F is that of the sum of the examples; matching n answers to the truth adds log n! nats."""
    shape, d = (1, 3, 4), 12
    model, prior, matched = linear(d), GaussianPrior((1, 3, 4)), math.lgamma(n + 1)
    x = prior.draw(n, torch.Generator().manual_seed(0))
    obs = seen(model, total, x, torch.zeros(n, dtype=torch.long), sigma)
    J, C = jacobian(model, shape, n), covariance(prior, n)
    precision = J.T @ J / sigma**2 + torch.linalg.inv(C)
    V = torch.linalg.inv(precision)
    found = one("van-trees", obs).value
    assert found**2 * n * d == pytest.approx(distortion(torch.linalg.eigvalsh(V), matched), rel=1e-6)
    t = level(torch.linalg.eigvalsh(V), matched)
    least = float(torch.linalg.inv(precision + torch.eye(n * d) / t).trace()) - (t * matched / 2 if matched else 0.0)
    several = [
        Analysis.parse("van-trees:exact=0,probes=8,steps=60")(obs, rng=torch.Generator().manual_seed(k))
        for k in range(4)
    ]
    assert 0.2 * least < sum(bound.value**2 for (bound,) in several) / 4 * n * d < 1.05 * least
    sizes = [tensor.numel() for tensor in obs.update.values()]
    variances = [
        float(block.diagonal().mean())
        for block in (
            (J @ C @ J.T)[a : a + k, a : a + k]
            for a, k in zip(itertools.accumulate(sizes, initial=0), sizes, strict=False)
        )
    ]
    nats = sum(k * math.log1p(v / sigma**2) / 2 for k, v in zip(sizes, variances, strict=True))
    weaker = one("noise-information:draws=400", obs, (x, torch.zeros(n, dtype=torch.long)))
    told = float(weaker.assumptions.split()[2])
    assert nats < told < 1.1 * nats + 0.01
    assert weaker.value == pytest.approx(math.sqrt(distortion(prior.variances, (told + matched) / n) / d), rel=1e-3)
    rng, errors = torch.Generator().manual_seed(1), []
    half = torch.linalg.cholesky(V)
    for _ in range(400):  # the posterior's mean, and draws from it that are matched to the truth
        x = prior.draw(n, rng).flatten()
        u = J @ x + sigma * torch.randn(len(J), generator=rng, dtype=torch.float64)
        mean = 0.5 + V @ (J.T @ (u - 0.5 * J.sum(1))) / sigma**2
        answers = mean + 0.5 * half @ torch.randn(n * d, generator=rng, dtype=torch.float64)
        errors.append([nearest(mean, x, n), nearest(answers, x, n)])
    best = torch.tensor(errors).mean(0).min()
    assert found**2 < 1.1 * float(best)
    assert n > 1 or found**2 > 0.9 * float(best)


def nearest(answers: Tensor, x: Tensor, n: int) -> float:
    """Mean squared error of the best assignment."""
    table = torch.cdist(answers.view(n, -1), x.view(n, -1)).square().numpy()
    return float(table[linear_sum_assignment(table)].sum()) / x.numel()


@pytest.mark.parametrize(("shape", "n"), [((1, 4, 4), 4), ((4,), 16)])
def test_guesses_that_never_saw_the_update_keep_to_every_bound_when_they_are_matched(
    shape: tuple[int, ...], n: int
) -> None:
    prior, rng = GaussianPrior(shape), torch.Generator().manual_seed(0)
    codes = 0.3 * (prior.draw(n, rng).flatten(1) - 0.5)

    def assigned(codes: Tensor) -> tuple[Tensor, Tensor]:
        x = prior.draw(n, rng).flatten(1) - 0.5
        table = torch.cdist(codes, x).square().numpy()
        _, place = linear_sum_assignment(table)
        return x[place], (codes - x[place]).square().mean()

    for _ in range(15):  # Lloyd's iterations under the assignment
        codes = torch.stack([assigned(codes)[0] for _ in range(40)]).mean(0)
    error = float(torch.stack([assigned(codes)[1] for _ in range(300)]).mean())
    assert error < 0.9 * 0.25**2  # less than the prior's own variance: what no bound may exclude
    model, x = tanh(shape, 20), prior.draw(n, rng)
    blind = seen(model, LOSS, x, torch.arange(n) % 6, 1e6)
    spent = blind.knowledge | Knowledge(
        privacy=Privacy(clip=1.0, noise_multiplier=1e6, sampling_rate=1, steps=1, delta=1)
    )
    private = replace(blind, knowledge=spent)
    none = replace(blind, update={k: torch.zeros_like(u) for k, u in blind.update.items()})
    found = [*Analysis.parse("dp-reconstruction")(private), *Analysis.parse("counting")(none)]
    found += [one("noise-information", blind), one("van-trees", blind), one("van-trees:exact=0", blind)]
    squares = {b.name: b.value**2 for b in found if isinstance(b, Bound) and b.scope == "any"}
    assert len(squares) == 7
    assert max(squares.values()) < error
    assert squares["van Trees"] > 0.3 * error
    assert squares["zCDP information"] > 0.3 * error


def test_labels_that_nobody_knows_are_drawn_anew() -> None:
    """The bound is at most the mean of those at labels that are known; one draw of labels may be far off it."""
    x = GaussianPrior((1, 4, 4)).draw(4, torch.Generator().manual_seed(0))
    obs = seen(tanh((1, 4, 4), 24), LOSS, x, torch.arange(4), 0.1)
    drawn = Imagined.of(View.of(obs), None, torch.Generator().manual_seed(0), 8)
    assert len({tuple(y.tolist()) for _, y in drawn.batches}) > 4
    rng = torch.Generator().manual_seed(0)
    every = [torch.randint(6, (4,), generator=rng) for _ in range(12)]
    for name in ("van-trees", "noise-information"):
        told = [one(name, replace(obs, knowledge=obs.knowledge | Knowledge(labels=y))) for y in every]
        unknown = one(name, obs)
        squares = torch.tensor([bound.value**2 for bound in told])
        assert unknown.value**2 <= float(squares.mean())
        assert unknown.value**2 > 0.3 * float(squares.mean())
        assert "over labels drawn at random" in unknown.assumptions
        assert "for these labels" in told[0].assumptions


def test_each_example_s_share_is_in_units_of_the_range() -> None:
    y, x = torch.tensor([0, 1]), torch.rand(2, 1, 3, 4).double()
    told = []
    for unit in (1.0, 10.0):
        model = tanh((1, 3, 4), 30)
        with torch.no_grad():
            model[1].weight /= unit
        known = Knowledge(input_range=(0.0, unit))
        stack = ["noise:sigma=1e-3"]
        obs = observe(model, LOSS, unit * x, y, defences=stack, knowledge=known, protocol=EVAL)[0]
        bound = one("cramer-rao", obs, (unit * x, y))
        each = re.search(r"Example by example ([\d.-]+) to ([\d.-]+) dB", bound.assumptions)
        assert each
        low, high = map(float, each.groups())
        mean = -10 * math.log10((10 ** (-low / 10) + 10 ** (-high / 10)) / 2)
        assert mean == pytest.approx(bound.psnr, abs=0.1)
        told.append(bound.psnr)
    assert told[0] != told[1]


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
    assert whole.error == 0 < probed.error < 0.1 * probed.value
    assert abs(probed.value - whole.value) < 5 * probed.error
    true, about = pixels(whole), pixels(one("cramer-rao:exact=0,probes=400", obs, (x, y)))
    assert true.shape == about.shape == (5, 5 * n)
    assert float((true - about).abs().max()) < 0.15
    assert float(true.max()) == 1.0
    blurred = pixels(probed)
    assert float(torch.corrcoef(torch.stack([true.flatten(), blurred.flatten()]))[0, 1]) > 0.7


def pixels(bound: Bound) -> Tensor:
    """What is drawn, in [0, 1]."""
    header, _, data = bound.picture.partition(",")
    assert header == "data:image/png;base64"
    return torch.from_numpy(np.array(Image.open(io.BytesIO(base64.b64decode(data))))).double() / 255


def covered(shape: tuple[int, ...], hidden: Tensor, m: int = 300) -> nn.Sequential:
    """A network whose first layer never sees the pixels `hidden`, and whose own gradient is not sent."""
    model = tanh(shape, m)
    with torch.no_grad():
        model[1].weight[:, hidden.flatten()] = 0.0
    model[1].weight.requires_grad_(False)
    return model


@pytest.mark.parametrize("spec", ["cramer-rao", "cramer-rao:exact=0,probes=64,steps=200"])
def test_the_picture_is_white_where_nothing_determines_a_pixel(spec: str) -> None:
    hidden = torch.zeros(1, 6, 6, dtype=torch.bool)
    hidden[0, 2, 1:4] = True
    x, y = torch.rand(2, 1, 6, 6, generator=torch.Generator().manual_seed(0)).double(), torch.tensor([0, 1])
    obs = seen(covered((1, 6, 6), hidden), LOSS, x, y, 1e-3)
    found = one(spec, obs, (x, y))
    white = torch.cat([hidden[0], hidden[0]], 1)
    drawn = pixels(found)
    assert torch.equal(drawn == 1.0, white)
    assert float(drawn[~white].max()) == pytest.approx(0.75, abs=0.01)
    assert float(drawn[~white].min()) > 0
    assert found.value == math.inf
    assert found.error == 0
    assert "no unbiased attacker exists" in found.assumptions
    rest = re.search(r"The 66 entries that it does determine: ([\d.-]+) dB", found.assumptions)
    assert rest
    J = Information(obs, x, y).matrix()[~white_first(hidden)][:, ~white_first(hidden)]
    least = 1e-6 * float(torch.linalg.inv(J).diagonal().mean())
    assert float(rest[1]) == pytest.approx(-10 * math.log10(least), abs=0.1 if spec == "cramer-rao" else 2)


def white_first(hidden: Tensor) -> Tensor:
    return hidden.flatten().repeat(2)


@pytest.mark.parametrize(("shape", "n", "m", "how"), [((1, 24, 24), 1, 30, "exact"), ((3, 24, 24), 2, 40, "8 random")])
def test_a_large_model_has_its_picture_in_the_page_and_in_the_json(
    shape: tuple[int, ...], n: int, m: int, how: str, tmp_path: Path
) -> None:
    """576 unknowns are few enough for the matrix of so small an update, 3,456 are not."""
    rng = torch.Generator().manual_seed(0)
    x, y = torch.rand(n, *shape, generator=rng), torch.arange(n)
    setting = Setting(model=tanh(shape, m).float(), loss=LOSS, inputs=x, labels=y, protocol=EVAL)
    record = unbatch.audit(setting, attacks=[], defences=["noise:sigma=1e-4"], analyses=["cramer-rao"])
    (bound,) = record.bounds
    assert how in bound.assumptions
    assert (bound.error > 0) == (how != "exact")
    drawn = pixels(bound)
    assert tuple(drawn.shape) == ((24, 24 * n) if shape[0] == 1 else (24, 24 * n, 3))
    assert float(drawn.max()) == 1.0 > float(drawn.min()) > 0.3
    write(record, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert f'<img src="{bound.picture}"' in page
    assert bool(bound.spread) == (how != "exact")
    assert f"{bound.spread}</td><td>unbiased" in page
    held = json.loads(record.model_dump_json())["bounds"][0]
    assert (held["picture"], held["error"]) == (bound.picture, bound.error)


# ------------------------------------------------------------------------------------------------- who is bounded


NOISY, PRIVATE, FEW = "noise:sigma={}", "dp-sgd:clip=1,noise_multiplier={},accountant=rdp", "prune:share={}"
BOUNDS = "noise-information", "van-trees:draws=32", "dp-reconstruction", "counting"


def drawn(
    n: int, strength: float, seed: int, act: type[nn.Module] = nn.Tanh, defence: str = NOISY
) -> tuple[Observation, Tensor]:
    """The update of a batch drawn from the prior, with labels 0, 1 ... that the attacker knows."""
    shape = (1, 8, 8) if defence == FEW else (1, 4, 4)
    x, y = GaussianPrior(shape).draw(n, torch.Generator().manual_seed(1000 + seed)), torch.arange(n)
    model, spelt = tanh(shape, 48, act), defence.format(strength).split("; ")
    model = model.float() if defence == FEW else model
    known = RANGE | Knowledge(labels=y)
    return observe(model, LOSS, x, y, defences=spelt, knowledge=known, protocol=EVAL, seed=seed)[0], x


def squared_error(attack: str, obs: Observation, x: Tensor, seconds: float | None = None) -> float:
    """Mean squared error of the best assignment; what finds nothing answers with the prior's mean."""
    try:
        with watching(Watch(deadline=math.inf if seconds is None else time.monotonic() + seconds)):
            found = Attack.parse(attack)(obs, seed=0)
        inputs = None if found.layer else found.inputs
    except NotApplicable:
        inputs = None
    guess = (x - 0.5).square().flatten(1).mean(1)
    if inputs is None or not len(inputs):
        return float(guess.mean())
    table = torch.cdist(inputs.double().flatten(1), x.flatten(1)).square() / x[0].numel()
    i, j = linear_sum_assignment(table.numpy())
    guess[j] = torch.minimum(guess[j], table[i, j])  # kinder to the attacker than any attack can be
    return float(guess.mean())


def violated(errors: Tensor, bound: float) -> bool:
    """Whether their mean is below the bound, and not by chance (one-sided t test at 0.1 %)."""
    seeds = len(errors)
    return float(errors.mean()) + float(student.ppf(0.999, seeds - 1) * errors.std()) / seeds**0.5 < bound


def best_bound(obs: Observation) -> float:
    """The largest mean squared error that a bound on this update for any attacker asks for; 0 where there is none."""
    found = [0.0]
    for name in BOUNDS:
        try:
            findings = Analysis.parse(name)(obs)
        except ValueError:
            continue
        found += [b.value**2 for b in findings if isinstance(b, Bound) and (b.scope, b.covers) == ("any", "update")]
    return max(found)


@pytest.mark.parametrize(
    ("attack", "n", "defence", "strength", "seeds"),
    [
        ("unmix:attempts=1,partial=true", 1, NOISY, 1e-3, 10),
        ("gradient-matching:iterations=60", 1, NOISY, 0.1, 10),
        ("bias-ratio", 1, NOISY, 1.0, 60),
        ("bias-ratio", 1, PRIVATE, 5.0, 60),
        ("label-count", 3, NOISY, 10.0, 60),
        pytest.param("gradient-matching:iterations=60", 3, NOISY, 1.0, 8, marks=pytest.mark.slow),
        ("gradient-matching:iterations=60", 2, PRIVATE, 0.5, 8),
        ("gradient-matching:iterations=60", 2, FEW, 0.999, 8),
        ("bias-ratio", 1, "clip:norm=5; noise:sigma={}", 1.0, 60),
        pytest.param(
            "unmix:attempts=1,partial=true", 1, "quantise:bits=16; noise:sigma={}", 1e-3, 10, marks=pytest.mark.slow
        ),
        pytest.param(
            "gradient-matching:iterations=60", 2, "prune:share=0.5; noise:sigma={}", 0.3, 8, marks=pytest.mark.slow
        ),
    ],
)
def test_no_attack_violates_a_bound_for_any(attack: str, n: int, defence: str, strength: float, seeds: int) -> None:
    bound = best_bound(drawn(n, strength, 0, defence=defence)[0])
    exchanges = [drawn(n, strength, seed, defence=defence) for seed in range(seeds)]
    errors = torch.tensor([squared_error(attack, *each) for each in exchanges])
    assert bound > 0
    assert not violated(errors, bound)
    if (
        n == 1 and "matching" not in attack and "quantise" not in defence
    ):  # near tight: a bound that is 3 dB too strong would be found out
        assert violated(errors, 2 * bound)


PASSIVE = [name for name, attack in Attack.find().items() if not issubclass(attack, ActiveAttack)]


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(
    ("defence", "strength"), [(NOISY, 1e-3), (NOISY, 0.1), (PRIVATE, 0.1), (PRIVATE, 2.0), (FEW, 0.999)]
)
@pytest.mark.parametrize("act", [nn.Tanh, nn.ReLU])
@pytest.mark.parametrize("attack", [*PASSIVE, "unmix:attempts=1,partial=true"])
def test_no_attack_violates_a_bound_for_any_over_many_seeds(
    attack: str, act: type[nn.Module], defence: str, strength: float, n: int
) -> None:
    bound = best_bound(drawn(n, strength, 0, act, defence)[0])
    errors = [squared_error(attack, *drawn(n, strength, seed, act, defence), seconds=1.0) for seed in range(8)]
    assert not violated(torch.tensor(errors), bound)
    assert bound > 0


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
        Analysis.parse(name)(observe(tanh((1, 4, 4), 20), LOSS, x, y)[0])
    with pytest.raises(ValueError, match="lost in rounding"):
        Analysis.parse(name)(seen(tanh((1, 4, 4), 20), LOSS, x, y, 1e-300))
    with pytest.raises(ValueError, match="jumps where inputs cross a kink"):
        Analysis.parse(name)(seen(tanh((1, 4, 4), 20, nn.ReLU), LOSS, x, y, 0.1))
    defences = ["noise:sigma=1e-4", "quantise:bits=4"]
    coarse = observe(tanh((1, 4, 4), 20), LOSS, x, y, defences=defences, knowledge=RANGE)[0]
    with pytest.raises(ValueError, match="changed by quantise:bits=4"):
        Analysis.parse(name)(coarse)
    untold = coarse.only(*(set(coarse.knowledge) - {"altered"}))
    with pytest.raises(ValueError, match="another defence changed it"):
        Analysis.parse(name)(untold, at=(x, y))
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


@pytest.mark.parametrize("sigma", [1e-2, 1e-6, 1e-8])
def test_what_an_update_does_not_determine_has_no_unbiased_attacker(sigma: float) -> None:
    x, y = torch.rand(1, 1, 4, 4).double().repeat(2, 1, 1, 1), torch.tensor([1, 1])
    bound = one("cramer-rao", seen(tanh((1, 4, 4), 48), LOSS, x, y, sigma), (x, y))
    assert bound.value == math.inf
    assert "does not determine 16 of the 32 unknowns" in bound.assumptions
    masked = tanh((1, 4, 4), 48)
    with torch.no_grad():
        masked[1].weight[:, :3] = 0.0
    masked[1].weight.requires_grad_(False)
    partly = observe(masked, LOSS, x[:1], y[:1], defences=[f"noise:sigma={sigma}"], knowledge=RANGE, protocol=EVAL)[0]
    assert "does not determine 3 of the 16 unknowns" in one("cramer-rao", partly, (x[:1], y[:1])).assumptions
    near = torch.cat([x[:1], x[:1] + 1e-5])  # nearly the same, yet determined
    close = one("cramer-rao", seen(tanh((1, 4, 4), 48), LOSS, near, y, sigma), (near, y))
    assert math.isfinite(close.value)
    assert close.assumptions.count("exact") == 1


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
        found = Analysis.parse("dp-reconstruction")(private(z, **more))
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
            b for b in Analysis.parse("dp-reconstruction")(private(z)) if isinstance(b, Bound) and b.scope == "any"
        ]
        assert [b.covers for b in bounds] == ["update", "update", "training", "training"]
        assert all(b.value**2 < 1.01 * error for b in bounds)


@pytest.mark.parametrize("z", [0.5, 3.0])
def test_nats_of_one_update_and_of_the_training(z: float) -> None:
    v = GaussianPrior((1, 4, 4)).variances
    for steps in (1, 8):
        found = {
            b.name: b for b in Analysis.parse("dp-reconstruction")(private(z, steps=steps)) if isinstance(b, Bound)
        }
        whole, once = found["zCDP information"], found["zCDP information, this update"]
        assert whole.value**2 * 16 == pytest.approx(distortion(v, steps / (2 * z**2)))
        assert once.value**2 * 16 == pytest.approx(distortion(v, 1 / (2 * z**2)))
        robust = found["reconstruction robustness"], found["reconstruction robustness, this update"]
        assert robust[0].value <= robust[1].value if steps > 1 else robust[0].value == robust[1].value
        renyi = 4 * steps / z**2
        assert found["Renyi"].value == pytest.approx(0.5 / math.expm1(renyi) ** 0.5)
    rare = [b for b in Analysis.parse("dp-reconstruction")(private(z, q=0.01)) if isinstance(b, Bound)]
    best = {c: min(b.psnr for b in rare if b.scope == "any" and b.covers == c) for c in ("update", "training")}
    assert best["update"] > best["training"]  # who is in it for sure has no sampling to hide behind
    four = replace(private(z), knowledge=private(z).knowledge | Knowledge(batch_size=4))
    matched = Analysis.parse("dp-reconstruction")(four)[0]
    assert isinstance(matched, Bound)
    assert matched.value**2 * 16 == pytest.approx(distortion(v, 1 / (2 * z**2) + math.log(24) / 4))


@pytest.mark.parametrize("n", [1, 4])
def test_the_radius_that_none_of_n_answers_reaches(n: int) -> None:
    """Union over answers; where the chance of reaching it is drawn, three standard errors on the safe side."""
    v, obs = GaussianPrior((1, 4, 4)).variances, private(1.0, q=0.2, steps=3)
    told = replace(obs, knowledge=obs.knowledge | Knowledge(batch_size=n))
    found = {b.name: b.value for b in Analysis.parse("dp-reconstruction")(told)}

    def best(reached: Callable[[float], float]) -> float:
        at = [(1 - reached(min(1.0, n * k)), guessing_radius(v, math.log(k))) for k in CHANCES]
        return max(math.sqrt(max(left, 0.0) / 16) * radius for left, radius in at)

    sampled = Robustness(1.0, 0.2, 3, torch.Generator().manual_seed(0))

    def safe(chance: float) -> float:
        reached, spread = sampled.success(math.log(chance))
        assert spread > 0 or reached == 1
        return reached + 3 * spread

    assert found["reconstruction robustness, this update"] == pytest.approx(best(lambda k: norm.cdf(norm.ppf(k) + 1)))
    assert found["reconstruction robustness"] == pytest.approx(best(safe), rel=1e-6)


@pytest.mark.parametrize("steps", [1, 4])
def test_the_sign_of_one_number_released_comes_near_the_bound(steps: int) -> None:
    """u_t = sign(x - 1/2) + z normal: error / variance = 1 - 2/pi E tanh^2(sum u / z^2), d = 1."""
    z, rng = 3.0, torch.Generator().manual_seed(0)
    total_ = steps + z * steps**0.5 * torch.randn(400_000, generator=rng, dtype=torch.float64)
    error = 1 - 2 / math.pi * float((total_ / z**2).tanh().square().mean())
    found = Analysis.parse("dp-reconstruction")(private(z, steps=steps, shape=(1,)))
    (bound,) = [b for b in found if isinstance(b, Bound) and b.name == "zCDP information"]
    assert 0.75 * error < bound.value**2 / 0.25**2 < error


def test_mixup_and_undeclared_steps_have_no_privacy_to_speak_of() -> None:
    obs = private(1.0)
    mixed = replace(obs, knowledge=obs.knowledge | Knowledge(mixup=1.0))
    with pytest.raises(ValueError, match="two gradients"):
        Analysis.parse("dp-reconstruction")(mixed)
    often = replace(obs, knowledge=obs.knowledge | Knowledge(local_steps=3))
    with pytest.raises(ValueError, match="takes 3 private steps, and 1 are declared"):
        Analysis.parse("dp-reconstruction")(often)


@pytest.mark.parametrize("z", [0.2, 0.5, 1.0, 4.0])
def test_least_squares_on_the_gaussian_mechanism_keeps_to_the_renyi_bound(z: float) -> None:
    """u = (2 / sqrt d) (x - 1/2) + z normal, of norm at most 1 on the unit cube: an error of z sqrt(d) / 2 an entry."""
    for d in (1, 4, 64):
        bounds = Analysis.parse("dp-reconstruction")(private(z, shape=(1, 1, d)))
        (renyi,) = [b for b in bounds if isinstance(b, Bound) and b.scope == "unbiased"]
        assert renyi.value < z * d**0.5 / 2
        assert renyi.value == pytest.approx(0.5 / math.expm1(4 / z**2) ** 0.5)


def test_counting_bits_and_numbers() -> None:
    x, y = torch.rand(2, 1, 8, 8), torch.tensor([0, 1])
    model = tanh((1, 8, 8), 40).float()
    pruned = observe(model, LOSS, x, y, defences=["prune:share=0.998"])[0]
    bound, verdict = Analysis.parse("counting")(pruned)
    assert isinstance(bound, Bound)
    assert isinstance(verdict, Verdict)
    sent = sum(int(t.count_nonzero()) for t in pruned.update.values())
    assert verdict.value == sent / 128
    bits = 0.0
    for tensor in pruned.update.values():
        k, e = int(tensor.count_nonzero()), tensor.numel()
        kinds = k + (k < e)  # every entry that is kept stands once, and zero e - k times
        share = torch.tensor([1 / e] * k + [(e - k) / e] * (k < e)).double()
        entropy = -e * float((share * share.log2()).sum())
        bits += min(32 * e, entropy + kinds * (32 + math.log2(e + 1)) + 1)
    nats = (bits * math.log(2) + math.log(2)) / 2  # n = 2
    assert bound.value == pytest.approx(math.sqrt(distortion(GaussianPrior((1, 8, 8)).variances, nats) / 64))
    with pytest.raises(ValueError, match="numbers and bits enough"):
        Analysis.parse("counting")(observe(model, LOSS, x, y)[0])
    harder = observe(model, LOSS, x, y, defences=["prune:share=0.9995"])[0]
    assert Analysis.parse("counting")(harder)[0].value > bound.value


@pytest.mark.parametrize(("levels", "error"), [(2, 0.3634), (4, 0.1175)])
def test_the_best_scalar_quantiser_comes_near_the_count_of_its_bits(levels: int, error: float) -> None:
    """The update is the input, each entry at the nearest of Lloyd and Max's levels, whose errors they give."""
    d, ends = 4096, {2: [0.7979], 4: [0.4528, 1.510]}[levels]
    codes = 0.25 * torch.tensor([*(-e for e in reversed(ends)), *ends]).double()
    x = GaussianPrior((d,)).draw(1, torch.Generator().manual_seed(0)) - 0.5
    nearest_code = codes[(x[0, :, None] - codes).abs().argmin(1)]
    assert float((nearest_code - x[0]).square().mean()) / 0.25**2 == pytest.approx(error, rel=0.05)
    model = nn.Linear(d, 1, bias=False).double()
    known = Knowledge(input_shape=(d,), batch_size=1)
    obs = Observation(model=model, loss=total, update={"weight": nearest_code[None]}, knowledge=known)
    (bound,) = [b for b in Analysis.parse("counting")(obs) if isinstance(b, Bound)]
    assert 0.45 * error < bound.value**2 / 0.25**2 < error


@pytest.mark.parametrize("name", ["cramer-rao", "van-trees", "noise-information", "dp-reconstruction", "counting"])
def test_every_analysis_works_without_the_truth_and_says_so(name: str) -> None:
    x, y = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1])
    how = {"counting": "prune:share=0.996", "dp-reconstruction": "dp-sgd:accountant=rdp"}.get(name, "noise:sigma=0.01")
    obs = observe(tanh((1, 4, 4), 20).float(), LOSS, x, y, defences=[how], knowledge=RANGE, protocol=EVAL)[0]
    found = [b for b in Analysis.parse(name)(obs) if isinstance(b, Bound) and b.name != "Renyi"]
    assert found
    for bound in found:
        assert "drawn from the prior" in bound.assumptions or "without the truth" in bound.assumptions
        assert bound.assumptions.endswith("dB.")
        assert bound.source
        assert bound.scope == ("unbiased" if name == "cramer-rao" else "any")


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


# ------------------------------------------------------------------------------------------------- cut short


@pytest.mark.parametrize("spec", ["van-trees:draws=64", "noise-information:draws=64"])
def test_a_bound_that_is_cut_short_is_one_from_fewer_draws(spec: str) -> None:
    x = GaussianPrior((1, 3, 3)).draw(2, torch.Generator().manual_seed(0))
    obs = seen(tanh((1, 3, 3), 24), LOSS, x, torch.arange(2), 0.1)
    with watching(Watch(stop=True)) as watch:
        if spec.startswith("van"):  # one draw is not left in its middle, where there are not yet four
            with pytest.raises(NotApplicable, match="cut short before the information"):
                one(spec, obs)
        else:
            assert "from 4 prior draws" in one(spec, obs).assumptions
        watch.stop, heard = False, list[float]()

        def listen(share: float, best: float | None) -> None:
            heard.append(share)
            watch.stop = share >= 0.25

        watch.listener = listen
        short = one(spec, obs)
        assert watch.cut_short
    assert heard
    whole = one(spec, obs)
    assert "from 64 prior draws" in whole.assumptions
    assert "from 16 prior draws" in short.assumptions
    assert 0.5 * whole.value < short.value < 1.02 * whole.value


def test_probes_that_are_cut_short_leave_a_larger_error_bar() -> None:
    x, y = torch.rand(2, 1, 3, 4, generator=torch.Generator().manual_seed(0)).double(), torch.tensor([0, 1])
    obs = seen(tanh((1, 3, 4), 30), LOSS, x, y, 1e-3)
    with watching(Watch()) as watch:
        watch.listener = lambda share, best: setattr(watch, "stop", share > 0)
        short = one("cramer-rao:exact=0,probes=64", obs, (x, y))
        assert watch.cut_short
        watch.listener, watch.stop = None, True
        with pytest.raises(NotApplicable, match="cut short before"):
            one("cramer-rao", obs, (x, y))
    whole = one("cramer-rao:exact=0,probes=64", obs, (x, y))
    assert "from 2 random probes" in short.assumptions
    assert "from 64 random probes" in whole.assumptions
    assert short.error > 0
    assert abs(short.value - whole.value) < 20 * (short.error + whole.error)


def test_a_table_is_looked_at_where_its_rows_lie() -> None:
    """Without the truth: standardised columns, whose range nobody told, are no numbers in [0, 1]."""
    model = nn.Sequential(nn.Linear(30, 16), nn.Tanh(), nn.Linear(16, 2))
    x, y = torch.randn(4, 30, generator=torch.Generator().manual_seed(0)), torch.arange(4) % 2
    for ranged in (False, True):
        told = Knowledge(domain="table") | (Knowledge(input_range=(-1.0, 1.0)) if ranged else Knowledge())
        obs = observe(model, LOSS, x, y, defences=["noise:sigma=.1"], knowledge=told, protocol=EVAL)[0]
        drawn, _, whose = probe(View.of(obs), None, torch.Generator().manual_seed(0), whole=True)
        assert drawn.shape == x.shape
        assert whose == "a batch drawn from the prior"
        assert float(drawn.min()) == -1.0 if ranged else float(drawn.min()) < -1.5
        assert -0.3 < float(drawn.mean()) < 0.3
        words = one("van-trees", obs).assumptions
        assert ("the range is not known, and a table's rows may well lie elsewhere" in words) != ranged
