import copy
import math

import pytest
import torch
from clients import Exchange, linear
from torch import nn
from torch.nn import functional as F

from unbatch import Attack, Knowledge, Observation, Unknown, observe
from unbatch.errors import UnbatchError


def test_knowledge_is_any_subset() -> None:
    known = Knowledge(input_shape=[3, 8, 8], batch_size=2)
    assert known.input_shape == (3, 8, 8)
    assert "labels" not in known
    assert set(known) == {"input_shape", "batch_size"}
    with pytest.raises(Unknown, match="does not know 'labels'; known: input_shape, batch_size"):
        known.labels  # noqa: B018
    assert set(known.only("batch_size", "labels")) == {"batch_size"}
    assert (known | Knowledge(batch_size=5)).batch_size == 5
    assert known.get("noise", 7) == 7


@pytest.mark.parametrize(
    "ask",
    [
        lambda known: known.get("lables"),
        lambda known: known.get("lables", 1),
        lambda known: known.only("batch_size", "lables"),
        lambda known: known.without("lables"),
        lambda known: "lables" in known,
        lambda known: known.lables,
        lambda known: Knowledge(lables=1),
    ],
    ids=["get", "get with a default", "only", "without", "in", "attribute", "made"],
)
def test_a_name_that_is_no_field_is_an_error_at_every_door(ask) -> None:
    with pytest.raises(UnbatchError, match=r"Knowledge has no field 'lables'\. Did you mean 'labels'"):
        ask(Knowledge(batch_size=2))


def test_knowledge_is_copied_and_asked_for_attributes_as_any_object() -> None:
    known = copy.deepcopy(Knowledge(batch_size=2))
    assert known.batch_size == 2
    assert not hasattr(known, "_repr_html_")


@pytest.mark.parametrize("declared", ["needs", "uses"])
def test_an_attack_declares_fields_of_knowledge(declared: str) -> None:
    with pytest.raises(
        UnbatchError, match=r"'slip' declares what nobody can know: .* no field 'batch_sise'.* 'batch_size'"
    ):
        type("Slip", (Attack,), {declared: frozenset({"batch_sise"}), "__module__": __name__})


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"lables": 1}, "Did you mean 'labels'"),
        ({"input_range": (1, 0)}, "low < high"),
        ({"batch_size": 0}, "at least 1"),
        ({"batch_size": 2, "labels": torch.tensor([1])}, "do not fit batch_size 2"),
        ({"input_shape": (3, 0)}, "empty side"),
    ],
)
def test_knowledge_that_makes_no_sense(facts: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Knowledge(**facts)


def test_the_honest_client_is_explained_by_its_own_data(exchange: Exchange) -> None:
    obs, x, y = exchange(linear(), shape=(4,), n=3)
    assert obs.residual(x, y) == 0
    assert obs.residual(x + 0.1, y) > 1e-3
    flipped = Observation(
        model=obs.model, loss=obs.loss, update={k: -2 * v for k, v in obs.update.items()}, knowledge=obs.knowledge
    )
    assert flipped.residual(x, y) == pytest.approx(1.5)
    assert flipped.fit(x, y) == pytest.approx((-2, 0), abs=1e-6)


def test_residual_is_relative_l2(exchange: Exchange) -> None:
    obs, x, y = exchange(linear(), shape=(4,), n=3)
    update = {k: v.clone() for k, v in obs.update.items()}
    size = math.sqrt(sum(float(v.double().square().sum()) for v in update.values()))
    update["0.bias"][0] += 0.5
    off = Observation(model=obs.model, loss=obs.loss, update=update, knowledge=obs.knowledge)
    after = math.sqrt(sum(float(v.double().square().sum()) for v in update.values()))
    assert off.residual(x, y) == pytest.approx(0.5 / after, rel=1e-5)
    assert after != size


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda u: u | {"ghost": torch.ones(1)}, "names that the model has not: 'ghost'"),
        (lambda u: {f"model.{k}": v for k, v in u.items()}, "Strip the prefix 'model.'"),
        (lambda u: u | {"0.weight": u["0.weight"].T}, "It is the transpose"),
        (lambda u: u | {"0.bias": torch.ones(9)}, r"has shape \(9,\), the model's \(5,\)"),
        (lambda u: u | {"0.bias": torch.full((5,), torch.nan)}, "holds 5 NaN or infinite entries of 5"),
        (lambda u: u | {"0.bias": torch.ones(5, dtype=torch.long)}, "updates are floating point"),
        (lambda u: dict.fromkeys(u), "the update is empty"),
    ],
)
def test_updates_that_do_not_fit(exchange: Exchange, change, words: str) -> None:
    obs, _, _ = exchange(linear(), shape=(4,), n=3)
    with pytest.raises(ValueError, match=words):
        Observation(model=obs.model, loss=obs.loss, update=change(dict(obs.update)))


def test_the_observation_holds_a_copy_from_before_the_step() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    x, y = torch.rand(6, 4, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3
    obs, _ = observe(model, F.cross_entropy, x, y)
    assert obs.model is not model
    assert float(obs.model[1].running_mean.abs().sum()) == 0  # not the batch's statistics
    assert float(model[1].running_mean.abs().sum()) == 0
    assert set(obs.knowledge) >= {"input_shape", "batch_size", "local_steps", "mode"}
    assert "labels" not in obs.knowledge


def test_given_knowledge_wins_over_what_is_published(exchange: Exchange) -> None:
    obs, _, _ = exchange(linear(), shape=(4,), n=3, batch_size=9)
    assert obs.knowledge.batch_size == 9


def test_observe_is_reproducible_and_refuses_what_does_not_fit() -> None:
    x, y = torch.rand(3, 4, generator=torch.Generator()), torch.tensor([0, 2, 1])
    a, b, c = (
        observe(linear(), F.cross_entropy, x, y, defences=["noise:sigma=0.1"], seed=seed)[0] for seed in (4, 4, 5)
    )
    assert all(torch.equal(a.update[k], b.update[k]) for k in a.update)
    assert not torch.equal(a.update["0.bias"], c.update["0.bias"])
    x, y = x[:2], torch.tensor([0, 3])
    with pytest.raises(ValueError, match="labels run from 0 to 3, but the model has 3 classes"):
        observe(linear(), F.cross_entropy, x, y)
    with pytest.raises(ValueError, match="forward fails on inputs of shape"):
        observe(linear(), F.cross_entropy, x[:, :3], y)
    with pytest.raises(ValueError, match="1 NaN"):
        observe(linear(), F.cross_entropy, torch.tensor([[1, 2, 3, math.nan]]), y[:1])
    with pytest.raises(ValueError, match="2 labels for 1 inputs"):
        observe(linear(), F.cross_entropy, x[:1], y)
