"""Attacks that know a defence's likelihood: never worse for it, and honest in what they certify."""

import json
from pathlib import Path

import pytest
import torch
from clients import Exchange, perceptron

from unbatch.attack import Attack
from unbatch.auditing.run import audit
from unbatch.benchmarks import find
from unbatch.benchmarks.adaptive import compare
from unbatch.case import Case
from unbatch.defence import Defence
from unbatch.inversion.refine import BatchLikelihood, batch_radius, refine
from unbatch.knowledge import Knowledge
from unbatch.likelihood import Likelihood
from unbatch.numerics.linear.completion import complete
from unbatch.privacy import Privacy
from unbatch.protocol import Update

WORSE = 0.5  # dB
ROUNDING = 100.0  # dB: beyond it both are exact, and differ by the rounding of a float32 update
SECONDS = 4.0  # for an attack that does not end by itself
CASES = {
    "gradient-matching": "digits:batch=2,activation=gelu,width=60",
    "unmix": "digits:batch=2,activation=gelu,width=60",
}
MILD = {
    "noise": "noise:sigma=1e-5",
    "clip": "clip:norm=0.1",
    "prune": "prune:share=0.3",
    "quantise": "quantise:bits=12",
}


def sent(n: int = 3) -> Update:
    rng = torch.Generator().manual_seed(0)
    return {"a": torch.randn(4, n, generator=rng, dtype=torch.float64), "b": torch.randn(5, generator=rng)}


LAWS = [name for name, kind in Defence.find().items() if kind().likelihood(None, sent()) is not None]
TAKERS = [name for name, kind in Attack.find().items() if "log_prob" in kind.needs | kind.uses]


def judged(attack: str, defence: str, batches: int) -> None:
    row = compare(attack, CASES.get(attack, Attack.find(attack).demo.case), [defence], 0, batches, SECONDS)
    naive, adaptive = row["naive"], row["adaptive"]
    assert min(adaptive["psnr"], ROUNDING) >= min(naive["psnr"], ROUNDING) - WORSE, row
    assert set(naive["certified"]) <= set(adaptive["certified"]), row
    assert adaptive["least bound over error"] is None or adaptive["least bound over error"] >= 1, row


def test_the_laws_and_the_attacks_that_take_them_are_found() -> None:
    assert {"clip", "noise", "prune", "quantise"} <= set(LAWS)
    assert {"gradient-matching", "layer-by-layer", "unmix"} <= set(TAKERS)


@pytest.mark.parametrize("attack", TAKERS)
@pytest.mark.parametrize("defence", LAWS)
def test_knowing_the_defence_costs_nothing(attack: str, defence: str) -> None:
    judged(attack, MILD.get(defence, defence), 1)


@pytest.mark.slow
@pytest.mark.parametrize("attack", TAKERS)
@pytest.mark.parametrize("defence", [*LAWS, *MILD.values()])
def test_knowing_the_defence_costs_nothing_over_ten_batches(attack: str, defence: str) -> None:
    judged(attack, defence, 10)


@pytest.mark.parametrize(("defence", "naive"), [("clip:norm=0.1", 2), ("prune:share=0.3", 0), ("quantise:bits=12", 0)])
def test_what_the_naive_attack_cannot_read_is_certified(defence: str, naive: int) -> None:
    """A clip is a common factor, which is fitted without being told."""
    row = compare("unmix", "photos:batch=2,size=8,activation=gelu,width=60", [defence], 0, 1, 60.0)  # it ends by itself
    assert len(row["naive"]["certified"]) == naive
    assert len(row["adaptive"]["certified"]) == 2
    assert row["adaptive"]["psnr"] > 60


CLIENT = {
    "client": perceptron((8,), 4, width=40, activation="tanh"),
    "shape": (8,),
    "n": 3,
    "normal": True,
    "dtype": torch.float32,
}
DRAWN = [
    "noise:sigma=1e-4",
    "quantise:bits=12",
    "quantise:bits=12,stochastic=false",
    "prune:share=0.4",
    "clip:norm=0.05",
]


@pytest.mark.parametrize("defence", DRAWN)
def test_the_likeliest_inputs_lie_within_their_radius_and_near_it(exchange: Exchange, defence: str) -> None:
    ratios = []
    for seed in range(8):
        obs, x, y = exchange(**CLIENT, defences=[defence], seed=seed)
        rng = torch.Generator().manual_seed(seed)
        found = refine(obs, x + 1e-2 * torch.randn(x.shape, generator=rng, dtype=torch.float64), y, rng)
        bound, error = batch_radius(obs, found, y, rng), (found - x).norm(dim=1) / found.norm(dim=1)
        assert bool(bound.isfinite().any())
        ratios.append((bound / error)[bound.isfinite()])
    both = torch.cat(ratios)
    assert float(both.min()) > 1
    assert float(both.median()) < 100 or defence in (
        "prune:share=0.4",
        "clip:norm=0.05",
    )  # where rounding alone is left


def test_no_radius_where_the_inputs_are_not_near_the_true_ones_or_not_determined(exchange: Exchange) -> None:
    obs, x, y = exchange(**CLIENT, defences=["noise:sigma=1e-5"])
    rng = torch.Generator().manual_seed(0)
    assert not bool(batch_radius(obs, x + 0.1, y, rng).isfinite().any())
    obs, x, y = exchange(**CLIENT, defences=["prune:share=0.97"])
    assert not bool(batch_radius(obs, refine(obs, x, y, rng), y, rng).isfinite().any())


@pytest.mark.parametrize(
    "spec", ["quantise:bits=3", "quantise:bits=3,stochastic=false", "noise:sigma=0.3", "prune:share=0.5"]
)
def test_the_law_is_concave_and_its_slope_autograds(spec: str) -> None:
    defence, seen = Defence.parse(spec), sent()
    law = defence.likelihood(None, seen)
    assert law is not None
    for far in (0.0, 0.1, 3.0, 1e3):
        at = {k: t + far for k, t in seen.items()}
        gap, slope, bend = law.slope(seen, at)
        assert bool(gap.isfinite())
        assert float(gap) >= -1e-9
        assert all(bool(t.isfinite().all()) for t in (*slope.values(), *bend.values()))
        assert all(bool((t >= 0).all()) for t in bend.values())
        assert far == 0 or all(float(t.min()) >= 0 for t in slope.values())  # uphill leads back


def test_random_rounding_is_as_likely_as_it_is_frequent() -> None:
    """The triangle 1 - |u - seen| / s, but for its blurred edges."""
    defence = Defence.parse("quantise:bits=2")
    seen = {"a": torch.tensor([1.0, 0.0], dtype=torch.float64)}
    for off in (0.3, 0.5, 0.7):
        near, there = (defence.log_prob(seen, {"a": torch.tensor([1.0, d], dtype=torch.float64)}) for d in (0.0, off))
        assert near is not None
        assert there is not None
        assert float((there - near).exp()) == pytest.approx(1 - off, abs=0.15)


def test_noise_round_a_clipped_update_is_read_through_the_clip(exchange: Exchange) -> None:
    obs, x, y = exchange(**CLIENT, defences=["noise:sigma=1e-9", "clip:norm=0.05"])
    search = BatchLikelihood(obs, y)
    off = search.seen - search(x.flatten(1)).detach()
    assert float(off.abs().max()) < 1e-7
    assert search.law.rescales(obs.update)


def test_no_law_where_it_is_not_tractable(exchange: Exchange) -> None:
    for defences in (
        ("clip:norm=0.05", "noise"),
        ("secure-aggregation:clients=2", "quantise"),
        ("secure-aggregation:clients=2", "noise", "clip:norm=0.05"),
        ("secure-aggregation:clients=2", "prune", "noise"),
        ("mixup",),
        ("noise:sigma=0",),
    ):
        assert "log_prob" not in exchange(**CLIENT, defences=defences)[0].knowledge


@pytest.mark.parametrize("clients", [2, 3])
def test_the_noise_of_a_sum_of_clients_has_the_root_of_their_number_times_one_s(
    exchange: Exchange, clients: int
) -> None:
    obs, x, y = exchange(**CLIENT, defences=[f"secure-aggregation:clients={clients}", "noise:sigma=1e-3"])
    law, sigma = Likelihood.of(obs.knowledge), 1e-3 * clients**0.5
    assert obs.knowledge.log_prob is law
    assert law is not None
    clean = {k: t.detach() for k, t in obs.simulate(x.float(), y).items()}
    off = torch.cat([(obs.update[k] - t).flatten() for k, t in clean.items()])
    assert float(off.square().mean().sqrt()) == pytest.approx(sigma, rel=0.1)
    assert float(law(obs.update, clean)) == pytest.approx(-float(off.square().sum()) / (2 * sigma**2))
    assert law.spread(obs.update) == pytest.approx(dict.fromkeys(obs.update, sigma))


def test_noise_of_known_size_is_the_same_law_without_the_defence(exchange: Exchange) -> None:
    obs = exchange(**CLIENT, defences=["noise:sigma=1e-3"])[0]
    told, bare = (Likelihood.of(known) for known in (obs.knowledge, Knowledge(noise=1e-3)))
    assert told is not None
    assert bare is not None
    at = {k: t.double() + 1e-3 for k, t in obs.update.items()}
    torch.testing.assert_close(told.slope(obs.update, at), bare.slope(obs.update, at))
    assert told.spread(obs.update) == pytest.approx(bare.spread(obs.update))
    private = Privacy(clip=1.0, noise_multiplier=1.0, sampling_rate=1.0, steps=1, delta=1e-5)
    for known in (Knowledge(), Knowledge(noise=0.0), Knowledge(noise=1e-3, privacy=private)):
        assert Likelihood.of(known) is None


def test_a_plain_function_is_a_law(exchange: Exchange) -> None:
    obs = exchange(**CLIENT)[0]
    law = Likelihood(lambda seen, clean: -torch.stack([(seen[k] - clean[k]).square().sum() for k in seen]).sum())
    same = {k: t.clone() for k, t in obs.update.items()}
    assert float(law(obs.update, same)) == 0
    assert all(bool((w == 1).all()) for w in law.weights(obs.update).values())


def test_completion_of_a_pruned_matrix() -> None:
    rng = torch.Generator().manual_seed(0)
    A = torch.randn(40, 3, generator=rng, dtype=torch.float64) @ torch.randn(3, 50, generator=rng, dtype=torch.float64)
    seen = torch.rand(A.shape, generator=rng) < 0.5
    found, misfit = complete(torch.where(seen, A, 0.0), seen, 3, target=1e-12)
    assert misfit < 1e-10
    assert float((found - A).norm() / A.norm()) < 1e-9
    assert complete(torch.where(seen, A, 0.0), seen, 2)[1] > 1e-2


def test_an_audit_reports_both() -> None:
    setting = Case.parse("digits:batch=1,activation=gelu,width=40").setting()
    record = audit(setting, attacks=["unmix", "bias-ratio"], defences=["clip:norm=0.01"], analyses=())
    assert [run.title for run in record.runs] == ["unmix", "unmix, knowing the defence", "bias-ratio"]
    assert ["log_prob" in run.knowledge for run in record.runs] == [False, True, False]
    again = audit(setting, attacks=["unmix", "bias-ratio"], defences=["clip:norm=0.01"], analyses=(), resume=record)
    assert [run.seconds for run in again.runs] == [run.seconds for run in record.runs]


def test_a_tensor_of_which_nothing_is_seen_is_completed_by_zeros() -> None:
    A = torch.zeros(4, 3).double()
    found, misfit = complete(A, torch.zeros(4, 3, dtype=torch.bool), 2)
    assert not found.any()
    assert misfit == 0.0


def test_a_benchmark_that_was_cut_short_goes_on(tmp_path: Path) -> None:
    some = {
        "batches": 1,
        "seconds": 0.5,
        "problems": {"unmix": "digits:batch=2,activation=gelu,width=60"},
        "defences": [("clip:norm=0.1",)],
        "again": [(("noise:sigma=1e-4",), {"rounds": 3})],
    }
    measured = find("adaptive").run(out=tmp_path, **some)
    path = tmp_path / "adaptive.json"
    record = json.loads(path.read_text())
    assert (record["complete"], record["environment"]["seconds are"]) == (True, "wall")
    assert record["rows"] == json.loads(json.dumps(measured))
    first = measured[0] | {"kept": True}
    path.write_text(json.dumps(record | {"complete": False, "rows": [first]}))
    again = find("adaptive").run(out=tmp_path, **some)
    assert again[0] == json.loads(json.dumps(first))
    assert [row["defence"] for row in again] == [["clip:norm=0.1"], ["noise:sigma=1e-4"]]
    assert [row["rounds"] for row in again] == [{}, {"rounds": 3}]
    assert json.loads(path.read_text())["complete"]
