"""guard: holds back what leaks, lets through what these attacks cannot read, and fails closed."""

import copy
import pickle

import pytest
import torch

import unbatch
from unbatch import Case, Knowledge, Leak, Protocol, UnbatchError, guard, observe
from unbatch.case import Setting
from unbatch.observation import Observation


@pytest.fixture(scope="module")
def setting() -> Setting:
    return Case.parse("digits:width=16").setting()


def sent(s: Setting, *defences: str, **how) -> Observation:
    return observe(s.model, s.loss, s.inputs, s.labels, defences=defences, **how)[0]


def told(s: Setting) -> dict:
    return {"model": s.model, "loss": s.loss, "inputs": s.inputs, "labels": s.labels}


def test_a_leaking_update_is_held_back_and_says_what_leaks(setting: Setting) -> None:
    with pytest.raises(Leak, match=r"must not be sent: Example 0 is recovered exactly") as held:
        guard(sent(setting).update, attacks=["bias-ratio"], **told(setting))
    assert held.value.examples == [0]
    assert held.value.audit.recovered() == {(0, 0)}
    assert held.value.audit.runs[0].examples[0].scores["psnr"] > 80
    assert isinstance(held.value, UnbatchError)
    assert isinstance(held.value, RuntimeError)
    again = pickle.loads(pickle.dumps(held.value))  # out of a client's process
    assert (str(again), again.examples, again.audit) == (str(held.value), [0], held.value.audit)


def test_by_default_a_small_batch_behind_a_dense_layer_is_held_back() -> None:
    s = Case.parse("digits:batch=3,width=64,activation=gelu").setting()
    with pytest.raises(Leak) as held:
        guard(sent(s).update, seconds=120, **told(s))  # it ends as soon as every example is recovered
    assert held.value.examples == [0, 1, 2]
    assert {run.attack for run in held.value.audit.runs} >= {"unmix", "gradient-matching", "bias-ratio"}


@pytest.mark.parametrize("defence", ["noise:sigma=1", "dp-sgd:noise_multiplier=5,accountant=rdp"])
def test_a_protected_update_passes_and_the_audit_does_not_call_it_safe(setting: Setting, defence: str) -> None:
    words = {"attacks": ["label-count", "gradient-matching"], "seconds": 4.0}
    record = guard(sent(setting, defence).update, defences=[defence], **words, **told(setting))
    assert record.recovered() == set()
    assert record.knowledge["noise"]
    assert "the nearest guesses stand beside their chance level" in record.verdict()
    assert "no proof" in (guard.__doc__ or "")


def test_attacks_know_the_defence_and_hold_back_what_only_then_leaks() -> None:
    s = Case.parse("photos:batch=2,size=8,activation=gelu,width=60").setting()
    defence = "prune:share=0.3"
    with pytest.raises(Leak) as held:
        guard(sent(s, defence).update, defences=[defence], attacks=["unmix"], seconds=40, **told(s))
    assert held.value.examples == [0, 1]
    assert [run.adaptive for run in held.value.audit.runs] == [False, True]


def test_local_training_is_guarded_under_its_own_protocol(setting: Setting) -> None:
    protocol = Protocol(local_steps=2, learning_rate=0.1)
    with pytest.raises(Leak):
        guard(sent(setting, protocol=protocol).update, protocol=protocol, attacks=["bias-ratio"], **told(setting))


def test_the_threshold_is_above_chance_and_the_user_s() -> None:
    s = Case.parse("digits:batch=2,width=32,activation=tanh").setting()
    update = sent(s, "noise:sigma=0.003").update
    words = {"attacks": ["gradient-matching:iterations=300"], "seconds": 20.0, "defences": ["noise:sigma=0.003"]}
    with pytest.raises(Leak, match="dB by gradient-matching") as held:
        guard(update, max_psnr=15.0, **words, **told(s))
    best = max(e.scores["psnr"] for run in held.value.audit.runs for e in run.examples)
    assert 15 < best < 80
    guard(update, max_psnr=best + 0.01, **words, **told(s))
    assert set(held.value.examples) <= {0, 1}


def test_where_nothing_could_be_tried_it_is_held_back() -> None:
    s = Case.parse("digits:batch=2,width=16").setting()
    with pytest.raises(Leak, match="No attack could run on it") as held:
        guard(sent(s).update, attacks=["bias-ratio"], **told(s))
    assert held.value.examples == []


def test_what_does_not_fit_is_an_error_and_no_leak(setting: Setting) -> None:
    update = sent(setting).update
    with pytest.raises(ValueError, match="update is empty"):
        guard({}, **told(setting))
    with pytest.raises(ValueError, match="unknown attack"):
        guard(update, attacks=["pray"], **told(setting))
    with pytest.raises(ValueError, match="labels for"):
        guard(update, **{**told(setting), "labels": torch.zeros(3, dtype=torch.long)})


def test_numbers_that_would_let_everything_pass_are_refused(setting: Setting) -> None:
    update = sent(setting).update
    for wrong in ({"max_psnr": float("nan")}, {"seconds": float("nan")}, {"seconds": -1.0}, {"seconds": 0.0}):
        with pytest.raises(ValueError, match="give a number of dB, and a time above 0"):
            guard(update, **wrong, **told(setting))
    with pytest.raises(ValueError, match="inputs and labels are tensors, not list and Tensor"):
        guard(update, **{**told(setting), "inputs": [1.0]})


def test_a_batch_or_a_protocol_that_is_not_behind_the_update_is_an_error_and_lets_nothing_pass(
    setting: Setting,
) -> None:
    s = Case.parse("digits:batch=2,width=16,activation=tanh").setting()
    update, quick = sent(s).update, {"attacks": ["label-count"], "seconds": 2.0}
    assert guard(update, **quick, **told(s)).complete
    with pytest.raises(ValueError, match="not behind this update"):
        guard(update, **quick, **{**told(s), "inputs": 1 - s.inputs})
    with pytest.raises(ValueError, match="its protocol, and the defences"):
        guard(update, **quick, protocol=Protocol(local_steps=2, learning_rate=0.1), **told(s))
    with pytest.raises(ValueError, match="not behind this update"):
        guard(sent(s, "noise:sigma=1").update, **quick, **told(s))
    assert guard(sent(s, "noise:sigma=1").update, **quick, defences=["noise:sigma=1"], **told(s)).complete
    dropping = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.5), torch.nn.Linear(64, 10))
    drawn = {**told(s), "model": dropping}  # no two steps are alike, and none can be compared
    gone = observe(dropping, s.loss, s.inputs, s.labels)[0].update
    assert guard(gone, **quick, **drawn).complete


def test_an_audit_of_a_captured_update_takes_the_truth_if_it_is_known(setting: Setting) -> None:
    obs = sent(setting, "noise:sigma=0.001", knowledge=Knowledge(domain="images", input_range=(0.0, 1.0)))
    truth = unbatch.Truth(inputs=setting.inputs, labels=setting.labels)
    record = unbatch.audit(obs, truth=truth, attacks=["label-count", "tensor-moment-deep"], analyses=())
    assert record.truth
    assert record.runs[0].examples[0].scores["label-accuracy"] in (0.0, 1.0)
    assert "this update is captured" in record.runs[1].words
    assert record.clients[0].reproducible


def test_a_relative_leakage_beyond_its_threshold_is_held_back_and_one_below_it_is_not() -> None:
    s = Case.parse("digits:batch=1,width=8,activation=gelu").setting()
    how = {"attacks": ["gradient-matching:preset=inverting-gradients,iterations=1"], "max_psnr": 90.0, **told(s)}
    record = guard(sent(s).update, max_relative_leakage=9.0, **how)
    score = record.runs[0].examples[0].scores["relative-leakage"]
    with pytest.raises(Leak, match=rf"relative leakage of {score:.2f} by gradient-matching") as held:
        guard(sent(s).update, max_relative_leakage=score - 0.01, **how)
    assert held.value.examples == [0]
    with pytest.raises(UnbatchError, match="of pictures"):
        guard({}, **how | {"inputs": torch.zeros(1, 4), "max_relative_leakage": 1.0})


def imprinted(s: Setting) -> torch.nn.Module:
    """The client's model with the rows and thresholds of an imprint."""
    model = copy.deepcopy(s.model)
    with torch.no_grad():
        model.dense1.weight.fill_(1 / 64)
        model.dense1.bias.copy_(-torch.linspace(0.2, 0.4, len(model.dense1.bias)))
    return model


def test_an_update_of_a_planted_model_is_held_back_unless_what_is_planted_was_frozen() -> None:
    s = Case.parse("digits:batch=8,width=16").setting()
    given = told(s) | {"model": imprinted(s), "attacks": ["label-count"], "seconds": 2.0}
    update = observe(given["model"], s.loss, s.inputs, s.labels)[0].update
    with pytest.raises(Leak, match=r"looks planted: duplicated-rows at 'dense1'"):
        guard(update, **given)
    guard(update, planted="ignore", **given)
    given["model"].dense1.requires_grad_(False)
    frozen = {name: tensor for name, tensor in update.items() if not name.startswith("dense1")}
    guard(frozen, **given)


def test_a_layer_put_in_its_place_shows_beside_the_model_before() -> None:
    s = Case.parse("digits:batch=8,width=16").setting()
    given = told(s) | {"attacks": ["label-count"], "seconds": 2.0}
    before = copy.deepcopy(s.model)
    torch.nn.init.normal_(before.dense1.weight, std=0.1, generator=torch.Generator().manual_seed(1))
    update = sent(s).update
    guard(update, **given, before=s.model)
    with pytest.raises(Leak, match=r"looks planted: replaced-layer at 'dense1'"):
        guard(update, **given, before=before)
    with pytest.raises(UnbatchError, match="before is the state of another model"):
        guard(update, **given, before=torch.nn.Linear(2, 2))
    with pytest.raises(UnbatchError, match="it is one of refuse, ignore"):
        guard(update, **given, planted="freeze")
