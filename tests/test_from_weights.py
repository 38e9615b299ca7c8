"""Attacks on released models: weight-span and informed-adversary, what they prove and what they refuse."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import unbatch
from unbatch import Attack, Case, NotApplicable, Observation, Truth, observe
from unbatch.inversion.claims import judged
from unbatch.inversion.reconstructor import shadow_models
from unbatch.inversion.view import View

SPAN = "trained:batch=4,outsiders=12,threat=start,width=24,steps=60,method=sgd,start=1"
GLM = "trained:known=11,threat=informed,depth=0,weight_decay=0.05,start=1"


def release(spec: str) -> tuple[Observation, Truth]:
    client = Case.parse(spec).setting()
    known = client.domain.public() | client.knowledge
    return observe(client.model, client.loss, client.inputs, client.labels, knowledge=known, training=client.training)


def members(spec: str) -> tuple[int, int, float]:
    """How many candidates are claimed, how many of these are right, and how near the nearest other one is."""
    seen, truth = release(spec)
    found = Attack.parse("weight-span")(seen)
    gaps = torch.cdist(found.inputs.flatten(1), truth.inputs.flatten(1)).amin(1)
    sure = found.bound.isfinite()
    return int(sure.sum()), int((gaps[sure] == 0).sum()), float(found.trace["nearest other"])


@pytest.mark.parametrize(
    "rules",
    [
        "task=classes",
        "momentum=0.9,weight_decay=0.01",
        "part=3",
        "task=regression,rate=0.01",
        "centred=true",
        "double=false",
    ],
)
def test_members_are_told_exactly_whatever_sgd_does(rules: str) -> None:
    claimed, right, nearest = members(f"{SPAN},{rules}")
    assert claimed == right == 4
    assert nearest > 0.1


def test_what_breaks_the_span_is_said() -> None:
    seen, _ = release(SPAN.replace("method=sgd", "method=adam"))
    with pytest.raises(NotApplicable, match="Adam"):
        Attack.parse("weight-span")(seen)


def test_without_the_start_nothing_is_claimed() -> None:
    seen, truth = release(SPAN.replace("method=sgd,start=1", "start=0.0001").replace("threat=start", "threat=release"))
    found = Attack.parse("weight-span")(seen)
    assert not bool(found.bound.isfinite().any())
    assert len(found) == len(truth)


def test_a_stranger_is_not_in_the_span() -> None:
    seen, truth = release(SPAN)
    known = seen.knowledge | unbatch.Knowledge(candidates=seen.knowledge.candidates + 0.01)
    with pytest.raises(NotApplicable, match="none of 16 candidates"):
        Attack.parse("weight-span")(replace(seen, knowledge=known))
    outsider = next(c for c in seen.knowledge.candidates if not bool((c == truth.inputs).flatten(1).all(1).any()))
    claim = unbatch.Reconstruction(inputs=outsider[None], bound=torch.tensor([1e-9]))
    ruled = judged(View.of(seen), claim)
    assert not bool(ruled.bound.isfinite())
    assert "outside of the span" in ruled.trace["withdrawn"]


@pytest.mark.parametrize("task", ["classes", "binary", "regression"])
def test_a_linear_model_gives_away_its_last_example(task: str) -> None:
    seen, truth = release(f"{GLM},task={task}")
    found = Attack.parse("informed-adversary")(seen)
    error = float((found.inputs - truth.inputs).norm() / found.inputs.norm())
    assert error <= 1e-10
    assert error <= float(found.bound) <= 1e-9
    assert torch.allclose(found.labels.double(), truth.labels.double(), atol=1e-8)


def test_a_training_that_stopped_early_is_refused_where_its_start_is_not_known() -> None:
    seen, _ = release(f"{GLM},task=classes,method=sgd,steps=20")
    with pytest.raises(NotApplicable, match="not one example's"):
        Attack.parse("informed-adversary")(replace(seen, knowledge=seen.knowledge.without("initial")))


STOPPED = "trained:threat=informed,known=5,width=3,activation=elu,biases=all,start=1,steps=4"


@pytest.mark.parametrize(
    "rules",
    [
        "momentum=0.9,weight_decay=0.01,part=2",
        "double=false",
        pytest.param("depth=0,task=classes", marks=pytest.mark.slow),
    ],
)
def test_a_training_of_known_steps_is_run_again_to_its_one_unknown_example(rules: str) -> None:
    seen, truth = release(f"{STOPPED},method=sgd,{rules}")
    found = Attack.parse("informed-adversary")(seen)
    error = float((found.inputs - truth.inputs).norm() / found.inputs.norm())
    assert error <= float(found.bound) <= (1e-2 if "double=false" in rules else 1e-9)
    assert torch.equal(found.labels, truth.labels)


def test_the_second_judge_trains_again_too() -> None:
    seen, _ = release(f"{STOPPED},method=sgd")
    found = Attack.parse("informed-adversary")(seen)
    assert "trained again" in found.trace["second judge"]
    for wrong in (
        replace(found, inputs=found.inputs + 1e-4),
        replace(found, labels=1 - found.labels),
        replace(found, inputs=found.inputs * (1 + 1e-9), bound=torch.tensor([1e-14])),
    ):
        assert not bool(judged(View.of(seen), wrong).bound.isfinite())


@pytest.mark.parametrize("change", ["recipe", "known_inputs"])
def test_another_training_ends_nowhere_near(change: str) -> None:
    seen, _ = release(f"{STOPPED},method=sgd")
    other = {
        "recipe": {"recipe": dict(seen.knowledge.recipe) | {"learning_rate": 0.2}},
        "known_inputs": {"known_inputs": seen.knowledge.known_inputs.flip(-1)},
    }[change]
    with pytest.raises(NotApplicable, match="trained again as the recipe says".capitalize()):
        Attack.parse("informed-adversary")(replace(seen, knowledge=seen.knowledge | unbatch.Knowledge(**other)))


def test_a_wrong_recipe_is_refused() -> None:
    seen, _ = release(f"{GLM},task=classes")
    wrong = seen.knowledge | unbatch.Knowledge(recipe={"weight_decay": 0.02})
    with pytest.raises(NotApplicable, match="stationary point"):
        Attack.parse("informed-adversary")(replace(seen, knowledge=wrong))


@pytest.mark.parametrize("change", ["inputs", "labels", "bound"])
def test_the_second_judge_withdraws_what_leaves_a_gradient(change: str) -> None:
    seen, _ = release(f"{GLM},task=classes")
    found = Attack.parse("informed-adversary")(seen)
    wrong = {
        "inputs": replace(found, inputs=found.inputs + 1e-4),
        "labels": replace(found, labels=(found.labels + 1) % 10),
        "bound": replace(found, inputs=found.inputs * (1 + 1e-9), bound=torch.tensor([1e-13])),
    }[change]
    assert bool(judged(View.of(seen), found).bound.isfinite())
    assert not bool(judged(View.of(seen), wrong).bound.isfinite())


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classes", "regression"])
def test_a_network_at_a_stationary_point_gives_it_away_as_well(task: str) -> None:
    seen, truth = release(
        f"trained:known=29,threat=informed,width=8,activation=tanh,biases=all,weight_decay=0.01,start=1,task={task}"
    )
    found = Attack.parse("informed-adversary")(seen)
    error = float((found.inputs - truth.inputs).norm() / found.inputs.norm())
    assert error <= float(found.bound) < 1e-6


def test_an_audit_of_a_release_counts_members_and_says_who_could() -> None:
    record = unbatch.audit(Case.parse(SPAN), attacks=["weight-span"], analyses=["training-span"])
    assert len(record.recovered()) == 4
    assert not record.flags
    assert "told from other candidates; anyone who holds them sees by this released model" in record.verdict()
    said = {verdict.name: verdict.value for verdict in record.verdicts}
    assert said["membership AUC"] == 1.0
    assert said["members' distance"] < 1e-8 < said["strangers' distance"]


SHADOWS = "trained:threat=informed,known=9,public=90,width=3,activation=elu,biases=all,start=1,method=sgd,steps=5"


def test_shadow_models_train_as_the_client_does_and_are_kept(tmp_path: Path) -> None:
    seen, truth = release(f"{SHADOWS},momentum=0.9,weight_decay=0.01")
    own = torch.cat([p.detach().flatten() for p in seen.model.parameters()])
    weights = shadow_models(View.of(seen), truth.inputs, truth.labels, tmp_path)
    assert torch.allclose(weights[0], own, atol=1e-12)
    (kept,) = tmp_path.iterdir()
    before = kept.stat().st_mtime_ns
    assert torch.equal(shadow_models(View.of(seen), truth.inputs, truth.labels, tmp_path), weights)
    assert kept.stat().st_mtime_ns == before


def test_the_reconstructor_is_a_guess_with_its_chance_beside() -> None:
    seen, _ = release(SHADOWS)
    found = unbatch.attacks.InformedAdversary(again=False, shadows=90, hidden=8, epochs=2)(seen)
    assert found.inputs.shape == (1, 1, 8, 8)
    assert not bool(found.bound.isfinite())
    assert {"held-out loss", "chance loss", "closed form"} <= set(found.trace)
    with pytest.raises(NotApplicable, match="must be known, to train shadow models"):
        unbatch.attacks.InformedAdversary(again=False, shadows=90)(seen.only(*(set(seen.knowledge) - {"public"})))


def test_weights_that_never_move_do_not_drown_the_others() -> None:
    """Digits have pixels that are always 0; in float32 what rounding leaves of their weights used to be made large."""
    longer = SHADOWS.replace("public=90,width=3", "public=200,width=5").replace("steps=5", "steps=15")
    seen, _ = release(f"{longer},momentum=0.9,double=false")
    found = unbatch.attacks.InformedAdversary(again=False, shadows=200, hidden=64, epochs=20)(seen)
    assert found.trace["weights that differ"] < sum(p.numel() for p in seen.model.parameters())
    assert found.trace["held-out loss"] < 0.8 * found.trace["chance loss"]


@pytest.mark.parametrize(
    ("spec", "attack", "who"),
    [
        (
            "trained:known=3,threat=informed,depth=0,weight_decay=0.1,start=1",
            "informed-adversary",
            "all other training",
        ),
        (
            "trained:batch=4,width=200,steps=60,start=1,method=sgd,threat=start,centred=true",
            "silent-units",
            "and the weights before training",
        ),
    ],
)
def test_the_verdict_says_who_could(spec: str, attack: str, who: str) -> None:
    record = unbatch.audit(Case.parse(spec), attacks=[attack], analyses=())
    assert record.recovered()
    assert who in record.verdict()
