"""Several rounds of the same batch: what the server keeps, what attacks make of it, what bounds say of all of them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from clients import Exchange, perceptron
from torch import Tensor
from torch.nn import functional as F

from unbatch import Attack, Case, Earlier, Knowledge, Observation, Protocol, observe
from unbatch.analysis import Analysis, Bound, Verdict
from unbatch.auditing.run import audit
from unbatch.benchmarks.adaptive import compare
from unbatch.inversion.fisher import Information, joined
from unbatch.inversion.mean_round import mean_round, still
from unbatch.inversion.refine import batch_radius, refine
from unbatch.inversion.rounds import averaged, clearest
from unbatch.inversion.search_point import Unknowns
from unbatch.inversion.view import View
from unbatch.models import small
from unbatch.numerics.bounds.subsampled_gaussian import information
from unbatch.privacy import Privacy

RANGE = Knowledge(input_range=(0.0, 1.0))
NOISE = "noise:sigma=1e-4"


def network(kind: str = "mlp", dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.nn.Module:
    rng = torch.Generator().manual_seed(seed)
    return small.build(kind, (8,), 4, width=40, activation="tanh", rng=rng).to(dtype)


CLIENT = {
    "client": perceptron((8,), 4, width=40, activation="tanh"),
    "shape": (8,),
    "n": 3,
    "input_range": (0.0, 1.0),
}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def near(x: Tensor, seed: int = 0) -> Tensor:
    return x + 1e-2 * torch.randn(x.shape, generator=rng(seed), dtype=torch.float64)


def bound(name: str, obs: Observation, at: tuple[Tensor, Tensor] | None = None, which: int = 0) -> Bound:
    found = Analysis.parse(name)(obs, at=at)[which]
    assert isinstance(found, Bound)
    return found


@pytest.mark.parametrize("defences", [(), ("local-steps:steps=2,learning_rate=0.1",)])
def test_the_server_moves_the_model_by_what_it_received(exchange: Exchange, defences: tuple[str, ...]) -> None:
    obs, x, y = exchange(**CLIENT, defences=defences, rounds=3, server_rate=0.5, dtype=torch.float64)
    first, second, last = obs.exchanges
    towards = 0.5 if defences else -0.5
    for before, after in ((first, second), (second, last)):
        for name, p in before.model.named_parameters():
            torch.testing.assert_close(after.model.get_parameter(name), p + towards * before.update[name])
    for one in obs.exchanges:
        assert one.residual(x, y) < 1e-12
        assert "earlier" not in one.knowledge
    assert first.residual(x, y) < 1e-12 < second.fit(x + 0.1, y)[1]
    assert obs.protocol.rounds == 3
    assert str(obs.protocol).endswith("the same batch in 3 rounds, server rate 0.5")


def test_draws_are_fresh_in_each_round_and_the_last_round_s_model_is_the_observation_s(exchange: Exchange) -> None:
    obs, x, y = exchange(**CLIENT, defences=["noise:sigma=0.01"], rounds=100, dtype=torch.float64)
    clean = torch.cat([u.flatten() for u in obs.simulate(x, y).values()])
    off = torch.stack([torch.cat([u.flatten() for u in one.update.values()]) - clean for one in obs.exchanges])
    assert float(off.std()) == pytest.approx(0.01, rel=0.02)
    assert float(off.mean(0).std()) == pytest.approx(0.01 / 10, rel=0.1)  # independent from round to round
    assert all(one.model is obs.model for one in obs.exchanges)


def test_one_round_is_what_it_was() -> None:
    plain = observe(network(), F.cross_entropy, torch.rand(3, 8, generator=rng()), torch.arange(3), defences=[NOISE])[0]
    one = Protocol(rounds=1)
    same = observe(
        network(), F.cross_entropy, torch.rand(3, 8, generator=rng()), torch.arange(3), defences=[NOISE], protocol=one
    )[0]
    assert all(torch.equal(plain.update[k], same.update[k]) for k in plain.update)
    assert "earlier" not in same.knowledge
    assert all(tensor is plain.update[k] for k, tensor in plain.exchanges[0].update.items())
    assert str(Protocol()) == str(one)


def test_rounds_outlive_local_steps_and_private_steps_are_counted(exchange: Exchange) -> None:
    obs, _, _ = exchange(**CLIENT, defences=["local-steps:steps=2", "noise:sigma=1e-4"], rounds=3, server_rate=0.1)
    assert (obs.knowledge.rounds, obs.knowledge.server_rate) == (3, 0.1)
    assert len(obs.knowledge.earlier) == 2
    with pytest.raises(ValueError, match=r"3 updates of this batch take 6; declare dp-sgd:steps=6"):
        exchange(**CLIENT, defences=["local-steps:steps=2", "dp-sgd:steps=5,accountant=rdp"], rounds=3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda past: [], "earlier holds 0 rounds"),
        (lambda past: [dict(past.update)], r"earlier holds 1 rounds; give one or more, as Earlier"),
        (lambda past: [past, past, past], "rounds is 3, and with this one there are 4"),
        (lambda past: [replace(past, update={})], "earlier round 1: the update is empty"),
        (
            lambda past: [replace(past, update={"dense1.weight": torch.zeros(40, 9)})],
            "earlier round 1: the update's 'dense1.weight'",
        ),
        (
            lambda past: [replace(past, update=dict([*past.update.items()][:1]))],
            "earlier round 1: it holds the tensors",
        ),
        (lambda past: [replace(past, state={})], r"differ in .*whole state_dict"),
        (lambda past: [past, _reshaped(past)], r"earlier round 2: its state's .* has shape \(3,\)"),
        (lambda past: [_broken(past)], "holds NaN"),
    ],
)
def test_rounds_that_make_no_sense(exchange: Exchange, change: Any, words: str) -> None:
    obs, _, _ = exchange(**CLIENT, defences=[NOISE], rounds=3)
    with pytest.raises(ValueError, match=words):
        replace(obs, knowledge=obs.knowledge | Knowledge(rounds=3, earlier=change(obs.knowledge.earlier[0])))


def _reshaped(past: Earlier) -> Earlier:
    return replace(past, state={k: torch.zeros(3) for k in past.state})


def _broken(past: Earlier) -> Earlier:
    return replace(past, state={k: t * math.nan for k, t in past.state.items()})


@pytest.mark.parametrize("rules", [{"rounds": 0}, {"server_rate": -1.0}])
def test_a_protocol_without_rounds_is_refused(rules: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="greater than or equal to"):
        Protocol.model_validate(rules)
    if "rounds" in rules:
        with pytest.raises(ValueError, match="rounds is 0; give a whole number of at least 1"):
            Knowledge(rounds=0)


def test_rounds_at_the_same_parameters_are_fitted_as_their_mean(exchange: Exchange) -> None:
    obs, x, y = exchange(**CLIENT, defences=[NOISE], rounds=5, dtype=torch.float64)
    mean = joined(obs)
    told = mean.knowledge.only(*(set(mean.knowledge) - {"log_prob"}))
    one = replace(mean, knowledge=told)
    torch.testing.assert_close(refine(obs, near(x), y, rng()), refine(one, near(x), y, rng()), rtol=1e-6, atol=1e-8)
    assert one.knowledge.noise == pytest.approx(1e-4 / 5**0.5)


def whitened(obs: Observation, x: Tensor, y: Tensor, seed: int, told: Observation | None = None) -> float:
    """Squared error of the fit of `obs` in units of what the information of `told` allows, e.F e / (n d); 1 on average."""
    off = (refine(obs, near(x, seed), y, rng(seed)) - x).flatten(1)
    F_e = Information(told or obs, x, y).fisher(off) / obs.knowledge.noise**2
    return float((off * F_e).sum() / x.numel())


def test_the_error_falls_as_the_root_of_the_rounds(exchange: Exchange) -> None:
    """In units of one round's information 1 / T, on average over noise; its standard deviation here is a tenth of that."""
    for rounds in (1, 4, 16):
        found = list[float]()
        for seed in range(8):
            obs, x, y = exchange(**CLIENT, defences=[NOISE], rounds=rounds, dtype=torch.float64, seed=seed)
            found.append(whitened(obs, x, y, seed, obs.only(*(set(obs.knowledge) - {"earlier"}))))
        assert sum(found) / 8 == pytest.approx(1 / rounds, rel=0.3)


LAWS = ["noise:sigma=1e-4", "quantise:bits=10", "quantise:bits=10,stochastic=false", "prune:share=0.4"]


@pytest.mark.parametrize(
    ("law", "rate"),
    [*((law, 0.0) for law in LAWS), *(pytest.param(law, 0.3, marks=pytest.mark.slow) for law in LAWS), (LAWS[2], 1e-6)],
)
def test_every_radius_over_several_rounds_is_above_the_error(exchange: Exchange, law: str, rate: float) -> None:
    """Also where all rounds are rounded in the same way, or all but: they tell what one does."""
    ratios = list[Tensor]()
    for seed in range(3):
        obs, x, y = exchange(**CLIENT, defences=[law], rounds=4, server_rate=rate, seed=seed)
        found = refine(obs, near(x, seed), y, rng(seed))
        reach, error = batch_radius(obs, found, y, rng(seed)), (found - x).norm(dim=1) / found.norm(dim=1)
        ratios.append((reach / error)[reach.isfinite()])
    both = torch.cat(ratios)
    assert len(both) >= 6
    assert float(both.min()) > 1
    assert float(both.median()) < 100


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [2, 8])
@pytest.mark.parametrize("rate", [0.0, 1e-9, 1e-5, 0.1, 1.0])
@pytest.mark.parametrize("law", LAWS)
def test_every_radius_over_many_batches_is_above_the_error(
    exchange: Exchange, law: str, rate: float, rounds: int
) -> None:
    for seed in range(12):
        obs, x, y = exchange(**CLIENT, defences=[law], rounds=rounds, server_rate=rate, seed=seed)
        found = refine(obs, near(x, seed), y, rng(seed))
        reach, error = batch_radius(obs, found, y, rng(seed)), (found - x).norm(dim=1) / found.norm(dim=1)
        assert bool((reach >= error).all()), (seed, reach, error)


def test_rounds_at_other_parameters_are_fitted_jointly(exchange: Exchange) -> None:
    """The squared error is what the information of all rounds allows; of the last alone it is several times that."""
    every, last = list[float](), list[float]()
    for seed in range(4):
        obs, x, y = exchange(
            **CLIENT, defences=["noise:sigma=1e-5"], rounds=4, server_rate=0.5, dtype=torch.float64, seed=seed
        )
        every.append(whitened(obs, x, y, seed))
        last.append(whitened(obs.only(*(set(obs.knowledge) - {"earlier"})), x, y, seed, obs))
    assert sum(every) / 4 == pytest.approx(1.0, abs=0.4)
    assert sum(last) / 4 > 2


def test_pruned_rounds_are_searched_within_the_span_of_what_completes_them(exchange: Exchange) -> None:
    obs, x, _ = exchange(**CLIENT, defences=["prune:share=0.2"], rounds=3, server_rate=0.3, dtype=torch.float64)
    small = Unknowns.of(View.of(obs), "default").reduced(rng())
    assert small is not None
    assert small.span is not None
    assert len(small.seen) == len(small.roots) == 3 * len(obs.update)
    outside = x - x @ small.span.rows.T @ small.span.rows
    assert float(outside.norm() / x.norm()) < 1e-3


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_a_search_looks_at_all_rounds_within_the_span_of_all_of_them(exchange: Exchange, rate: float) -> None:
    obs, x, y = exchange(**CLIENT, defences=["noise:sigma=1e-6"], rounds=4, server_rate=rate, dtype=torch.float64)
    problem = Unknowns.of(View.of(replace(obs, knowledge=obs.knowledge | Knowledge(labels=y))), "default")
    count = len(obs.update)
    assert len(problem.seen) == (4 * count if rate else count)
    point = (x - problem.middle) / problem.scale
    whole = torch.cat([(a - b).flatten() for a, b in zip(problem.clean(point), problem.seen, strict=True)])
    assert float(whole.square().mean().sqrt()) == pytest.approx(1e-6 if rate else 0.5e-6, rel=0.1)
    assert problem.drawn == pytest.approx(float(whole.square().sum() / problem.size), rel=0.2)
    small = problem.reduced(rng())
    assert small is not None
    assert small.span is not None
    z = (x @ small.span.rows.T - small.middle) / small.scale
    inside = torch.cat([(a - b).flatten() for a, b in zip(small.clean(z), small.seen, strict=True)])
    assert float(inside.square().mean().sqrt()) < 3e-6


@pytest.mark.parametrize(("law", "shrinks"), [("noise:sigma=1e-4", 2.0), ("quantise:bits=10,stochastic=false", 1.0)])
def test_what_is_read_directly_is_the_mean_with_the_spread_that_is_left(
    exchange: Exchange, law: str, shrinks: float
) -> None:
    obs, _, _ = exchange(**CLIENT, defences=[law], rounds=4)
    mean = averaged(obs)
    before, after = (one.knowledge.log_prob.spread(one.update)["dense1.weight"] for one in (obs, mean))
    assert before / after == pytest.approx(shrinks, rel=0.1)
    assert "earlier" not in mean.knowledge
    moved, _, _ = exchange(**CLIENT, defences=[law], rounds=4, server_rate=0.1)
    assert averaged(moved) is moved


def test_bounds_and_attacks_take_one_mean_of_rounds(exchange: Exchange) -> None:
    obs, _, _ = exchange(**CLIENT, defences=[NOISE], rounds=4)
    mean, weights = mean_round(obs), [{k: torch.full_like(u, t) for k, u in obs.update.items()} for t in (0, 0, 1, 3)]
    assert still(obs)
    for name, u in averaged(obs).update.items():
        assert torch.equal(u, joined(obs).update[name])
        assert torch.equal(u, mean[name].to(u))
        third, last = (one.update[name].double() for one in obs.exchanges[2:])
        torch.testing.assert_close(mean_round(obs, weights)[name], (third + 3 * last) / 4, rtol=1e-14, atol=0)
    assert not still(exchange(**CLIENT, defences=[NOISE], rounds=2, server_rate=0.1)[0])


@pytest.mark.parametrize("rate", [0.1, -0.1])
def test_of_rounds_at_other_parameters_the_one_with_the_largest_update_is_read(exchange: Exchange, rate: float) -> None:
    """A server that goes on shrinks the gradient, round by round; the other way round it grows."""
    obs, _, _ = exchange(**CLIENT, defences=[NOISE], rounds=4, server_rate=abs(rate))
    if rate < 0:  # the same rounds, told in the opposite order
        first, *others = obs.exchanges
        past = [Earlier(state=one.model.state_dict(), update=one.update) for one in reversed(others)]
        obs = replace(first, knowledge=first.knowledge | Knowledge(earlier=past))
    read = clearest(obs)
    sizes = [sum(float(u.square().sum()) for u in one.update.values()) for one in obs.exchanges]
    best = obs.exchanges[sizes.index(max(sizes))]
    assert all(torch.equal(read.update[k], best.update[k]) for k in best.update)
    assert all(torch.equal(a, b) for a, b in zip(read.model.parameters(), best.model.parameters(), strict=True))
    assert sizes.index(max(sizes)) == (0 if rate > 0 else 3)


def test_an_attacker_who_does_not_know_earlier_rounds_sees_the_last_one() -> None:
    case = Case.parse("digits:batch=2,activation=gelu,width=60").setting()
    told = {"defences": ["noise:sigma=1e-5"], "protocol": Protocol(rounds=3)}
    obs = observe(case.model, case.loss, case.inputs, case.labels, knowledge=RANGE, **told)[0]
    alone = Observation(
        model=obs.model,
        loss=obs.loss,
        update=obs.update,
        knowledge=obs.knowledge.only(*(set(obs.knowledge) - {"earlier", "rounds"})),
    )
    first, second = (Attack.parse("unmix")(one, seed=1) for one in (obs.only(*alone.knowledge), alone))
    assert first.inputs is not None
    assert second.inputs is not None
    torch.testing.assert_close(first.inputs, second.inputs)


def test_the_attacker_who_knows_all_rounds_beats_the_one_who_knows_the_last() -> None:
    """16 rounds of noise are a quarter of it: 12 dB. Where one round gives nothing certified, they do."""
    case = "digits:batch=2,activation=gelu,width=60"
    row = compare("gradient-matching", case, ["noise:sigma=1e-4"], 0, 1, 4.0, None, {"rounds": 16})
    once = compare("gradient-matching", case, ["noise:sigma=1e-4"], 0, 1, 4.0)
    assert row["adaptive"]["psnr"] > row["naive"]["psnr"] + 8
    assert row["adaptive"]["psnr"] == pytest.approx(once["adaptive"]["psnr"] + 12, abs=4)


def test_unmix_over_several_rounds_meets_their_cramer_rao_bound() -> None:
    ratios = list[float]()
    for seed in range(2):
        setting = Case.parse(f"photos:size=8,batch=2,activation=tanh,width=60,double=true,seed={seed}").setting()
        x, y = setting.inputs, setting.labels
        told = {"defences": ["noise:sigma=1e-6"], "protocol": Protocol(rounds=4), "seed": seed}
        obs = observe(setting.model, setting.loss, x, y, knowledge=RANGE | Knowledge(domain="images"), **told)[0]
        found = Attack.parse("unmix")(obs, seed=seed)
        assert found.inputs is not None
        assert found.bound is not None
        assert len(found) == 2
        nearest = torch.cdist(x.flatten(1), found.inputs.flatten(1)).argmin(1)
        error = (found.inputs[nearest] - x).flatten(1)
        assert bool((error.norm(dim=1) <= found.bound[nearest] * found.inputs[nearest].flatten(1).norm(dim=1)).all())
        ratios.append(float(error.square().mean()) / bound("cramer-rao", obs, (x, y)).value ** 2)
    assert sum(ratios) / len(ratios) == pytest.approx(1.0, abs=0.25)


def test_cramer_rao_falls_by_exactly_the_number_of_rounds(exchange: Exchange) -> None:
    once, x, y = exchange(**CLIENT, defences=["noise:sigma=0.01"], dtype=torch.float64)
    often, _, _ = exchange(**CLIENT, defences=["noise:sigma=0.01"], rounds=7, dtype=torch.float64)
    first, second = (bound("cramer-rao", obs, (x, y)) for obs in (once, often))
    assert first.value**2 / second.value**2 == pytest.approx(7, rel=1e-9)
    assert "drawn anew in each of 7 rounds at the same parameters" in second.assumptions
    still = replace(often, knowledge=often.knowledge | Knowledge(earlier=_moved(often, 1e-12)))
    assert bound("cramer-rao", still, (x, y)).value == pytest.approx(second.value, rel=1e-6)  # the rounds added up


def test_what_is_made_of_noisy_rounds_is_bounded_as_those_rounds(exchange: Exchange) -> None:
    once, x, y = exchange(**CLIENT, defences=["prune:share=0.5", "noise:sigma=0.01"], dtype=torch.float64)
    often, _, _ = exchange(**CLIENT, defences=["prune:share=0.5", "noise:sigma=0.01"], rounds=4, dtype=torch.float64)
    for name in ("cramer-rao", "van-trees"):
        first, second = (bound(name, obs, (x, y)) for obs in (once, often))
        assert second.value < 0.9 * first.value
        assert "before prune:share=0.5 made of it what was sent" in second.assumptions
        assert "in each of 4 rounds" in second.assumptions
    noisy, _, _ = exchange(**CLIENT, defences=["noise:sigma=0.01"], rounds=4, dtype=torch.float64)
    assert bound("cramer-rao", often, (x, y)).value == pytest.approx(bound("cramer-rao", noisy, (x, y)).value)


def _moved(obs: Observation, by: float) -> list[Earlier]:
    return [replace(past, state={k: t + by for k, t in past.state.items()}) for past in obs.knowledge.earlier]


@pytest.mark.parametrize("name", ["van-trees", "noise-information"])
def test_bounds_for_any_attacker_see_the_noise_of_the_mean(exchange: Exchange, name: str) -> None:
    obs, _, _ = exchange(**CLIENT, defences=["noise:sigma=0.02"], rounds=4, dtype=torch.float64)
    one = replace(obs, knowledge=obs.knowledge.only("input_shape", "batch_size", "input_range", "mode"))
    told = Knowledge(noise=0.01)
    one = replace(one, knowledge=one.knowledge | told)
    first, second = bound(name, obs), bound(name, one)
    assert first.value == pytest.approx(second.value, rel=1e-9)
    alone = obs.only(*(set(obs.knowledge) - {"earlier", "rounds"}))
    assert bound(name, alone).value > 1.1 * first.value


@pytest.mark.parametrize("name", ["van-trees", "noise-information"])
def test_averages_over_a_prior_are_refused_where_the_parameters_moved(exchange: Exchange, name: str) -> None:
    with pytest.raises(ValueError, match="the parameters moved between the rounds"):
        Analysis.parse(name)(exchange(**CLIENT, defences=["noise:sigma=0.01"], rounds=3, server_rate=0.1)[0])


@pytest.mark.parametrize("name", ["cramer-rao", "van-trees", "noise-information", "dp-reconstruction", "counting"])
def test_rounds_that_nobody_kept_are_not_left_out_of_a_bound(exchange: Exchange, name: str) -> None:
    private = Knowledge(privacy=Privacy(clip=1.0, noise_multiplier=1.0, sampling_rate=1.0, steps=9, delta=1e-5))
    obs, _, _ = exchange(**CLIENT, defences=["noise:sigma=0.01"], rounds=3)
    obs = replace(obs, knowledge=obs.knowledge | private) if name == "dp-reconstruction" else obs
    lost = replace(obs, knowledge=obs.knowledge.only(*(set(obs.knowledge) - {"earlier"})))
    with pytest.raises(ValueError, match="sent in 3 rounds, and the updates of 2 are not here"):
        Analysis.parse(name)(lost)


def test_a_round_with_other_noise_than_is_told_is_refused(exchange: Exchange) -> None:
    obs, x, y = exchange(**CLIENT, defences=["noise:sigma=0.01"], rounds=16, dtype=torch.float64)
    clean = obs.simulate(x, y)
    bare = replace(obs.knowledge.earlier[0], update={k: u.detach() for k, u in clean.items()})
    told = Knowledge(earlier=[bare, *obs.knowledge.earlier[1:]])
    with pytest.raises(ValueError, match="not of the size that is told"):
        bound("cramer-rao", replace(obs, knowledge=obs.knowledge | told), (x, y))


def test_private_rounds_add_up(exchange: Exchange) -> None:
    known = {"clip": 1.0, "noise_multiplier": 2.0, "sampling_rate": 1.0, "delta": 1e-5}
    for rounds in (1, 4):
        obs, _, _ = exchange(**CLIENT, defences=[NOISE], rounds=rounds, server_rate=0.1)
        told = Knowledge(privacy=Privacy(**known, steps=4))
        found = bound("dp-reconstruction", replace(obs, knowledge=obs.knowledge | told))
        assert f"At most {information(2.0, 1.0, rounds):.4g} nats" in found.assumptions
    with pytest.raises(ValueError, match="these 4 updates take 4 private steps, and 3 are declared"):
        bound("dp-reconstruction", replace(obs, knowledge=obs.knowledge | Knowledge(privacy=Privacy(**known, steps=3))))


def test_messages_add_up(exchange: Exchange) -> None:
    spec = "prune:share=0.99"
    values = list[float]()
    for rounds in (1, 3):
        verdict = Analysis.parse("counting")(exchange(**CLIENT, defences=[spec], rounds=rounds, server_rate=0.5)[0])[-1]
        assert isinstance(verdict, Verdict)
        values.append(verdict.value)
    assert values[1] == pytest.approx(3 * values[0])


@pytest.mark.parametrize("name", ["cramer-rao", "dp-reconstruction"])
def test_statistics_that_moved_between_rounds_are_no_constants(name: str) -> None:
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 12), torch.nn.BatchNorm1d(12), torch.nn.Tanh(), torch.nn.Linear(12, 4)
    )
    private = Knowledge(privacy=Privacy(clip=1.0, noise_multiplier=1.0, sampling_rate=1.0, steps=9, delta=1e-5))
    x, y = torch.rand(3, 8, generator=rng()), torch.arange(3)
    told = {"defences": ["noise:sigma=0.01"], "protocol": Protocol(rounds=2, mode="eval"), "knowledge": RANGE}
    obs = observe(model, F.cross_entropy, x, y, **told)[0]
    obs = replace(obs, knowledge=obs.knowledge | private) if name == "dp-reconstruction" else obs
    assert Analysis.parse(name)(obs)
    moved = [replace(past, state=past.state | {"1.running_mean": torch.ones(12)}) for past in obs.knowledge.earlier]
    with pytest.raises(ValueError, match="statistics are sent without noise"):
        Analysis.parse(name)(replace(obs, knowledge=obs.knowledge | Knowledge(earlier=moved)))


def test_an_audit_runs_without_the_earlier_rounds_and_with_them() -> None:
    setting = Case.parse("digits:batch=1,activation=gelu,width=40").setting()
    setting = replace(setting, protocol=Protocol(rounds=3))
    record = audit(setting, attacks=["unmix"], defences=["noise:sigma=1e-5"], analyses=["cramer-rao", "gradient-rank"])
    assert record.notes == ["what each layer gives away, and what it leaves open, is told of the last round alone."]
    assert [run.title for run in record.runs] == ["unmix", "unmix, knowing the defence and earlier rounds"]
    assert ["earlier" in run.knowledge for run in record.runs] == [False, True]
    assert "random-defence-not-averaged" not in {flag.name for flag in record.flags}
    assert record.knowledge["earlier"] == "2 earlier rounds"
    errors = [run.examples[0].error for run in record.runs]
    assert errors[1] is not None
    assert errors[0] is None or errors[1] < errors[0]
    again = audit(setting, attacks=["unmix"], defences=["noise:sigma=1e-5"], analyses=(), resume=record)
    assert [run.seconds for run in again.runs] == [run.seconds for run in record.runs]
    other = replace(setting, protocol=Protocol(rounds=2))
    with pytest.raises(ValueError, match="another model, batch, protocol"):
        audit(other, attacks=["unmix"], defences=["noise:sigma=1e-5"], analyses=(), resume=record)


def test_a_bundle_carries_the_rounds(exchange: Exchange, tmp_path) -> None:
    obs, x, y = exchange(**CLIENT, defences=[NOISE], rounds=3, server_rate=0.2)
    obs.save(tmp_path / "b")
    again = Observation.load(tmp_path / "b", model=network(seed=9), loss=F.cross_entropy)
    assert len(again.exchanges) == 3
    for one, other in zip(obs.exchanges, again.exchanges, strict=True):
        assert all(torch.equal(one.update[k], other.update[k]) for k in one.update)
        assert one.residual(x, y) == pytest.approx(other.residual(x, y), rel=1e-6)
    assert again.protocol == obs.protocol


def test_a_bundle_that_skips_a_round_is_refused(exchange: Exchange, tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    obs, _, _ = exchange(**CLIENT, defences=[NOISE], rounds=3)
    obs.save(tmp_path / "b")
    held = {name: t for name, t in load_file(tmp_path / "b").items() if not name.startswith("earlier/0/")}
    save_file(held, tmp_path / "c", {"format": "unbatch-observation", "schema": "1"})
    with pytest.raises(ValueError, match="numbers its earlier rounds 1; number them 0, 1, 2"):
        Observation.load(tmp_path / "c", model=network(), loss=F.cross_entropy)
    bare = {name: t for name, t in load_file(tmp_path / "b").items() if "/state/" not in name}
    save_file(bare, tmp_path / "d", {"format": "unbatch-observation", "schema": "1"})
    with pytest.raises(ValueError, match="earlier round 1: its state and the model's differ"):
        Observation.load(tmp_path / "d", model=network(), loss=F.cross_entropy)
