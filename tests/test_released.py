"""Released models: what is observed of one, who reads it, how it was trained, and how it is kept."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import unbatch
from unbatch import Case, Knowledge, NotApplicable, Observation, UnbatchError, observe
from unbatch.reporting.html import render
from unbatch.threat_model import ThreatModel, of_a_release, sees
from unbatch.training import Training, margins, objective, trained


def release(spec: str, **more: object) -> tuple[Observation, unbatch.Truth]:
    client = Case.parse(spec).setting()
    return observe(
        client.model,
        client.loss,
        client.inputs,
        client.labels,
        knowledge=client.knowledge,
        training=client.training,
        **more,  # type: ignore[arg-type]
    )


def test_a_release_holds_the_trained_model_and_no_update() -> None:
    client = Case.parse("trained:batch=4,width=16,steps=60").setting()
    seen, truth = release("trained:batch=4,width=16,steps=60")
    assert seen.released
    assert not seen.update
    assert len(truth) == 4
    assert not torch.equal(seen.model.dense1.weight, client.model.dense1.weight)
    assert seen.dtype == torch.float64
    assert str(seen.device) == "cpu"
    assert set(seen.knowledge) == {"input_shape", "batch_size"}
    assert seen.as_rounded() is seen
    assert seen.as_gradient() is seen
    with pytest.raises(NotApplicable, match="nothing was sent"):
        seen.residual(truth.inputs, truth.labels)


@pytest.mark.parametrize(
    ("threat", "fields", "who"),
    [
        ("release", set(), ThreatModel.RELEASE),
        ("start", {"initial", "recipe"}, ThreatModel.START),
        ("informed,known=5", {"initial", "recipe", "known_inputs", "known_labels"}, ThreatModel.INFORMED),
    ],
)
def test_a_threat_model_is_what_its_holder_knows(threat: str, fields: set[str], who: ThreatModel) -> None:
    known = Case.parse(f"trained:batch=2,width=8,threat={threat}").setting().knowledge
    assert set(known) == fields
    assert of_a_release(set(known)) == who
    assert who.sees == "release"
    assert sees(who) == "release"
    assert who.means


def test_everybody_else_reads_updates() -> None:
    assert sees(ThreatModel.BUFFERS) == sees(ThreatModel.MALICIOUS) == sees("of a third party's") == "update"
    assert ThreatModel.BUFFERS.grants == {"buffers"}


def test_attacks_and_analyses_of_updates_refuse_a_release() -> None:
    seen, _ = release("trained:batch=2,width=8,steps=20")
    for attack in unbatch.Attack.find().values():
        if sees(attack.threat_model) == "update":
            with pytest.raises(NotApplicable, match="nothing was sent"):
                attack()(seen)
    for analysis in unbatch.Analysis.find().values():
        if "release" not in analysis.sees:
            with pytest.raises(NotApplicable, match="nothing was sent"):
                analysis()(seen)


def test_margin_descent_reaches_the_margin() -> None:
    seen, truth = release("trained:batch=6,width=50,steps=800")
    ahead = margins(seen.model(truth.inputs), truth.labels).detach().flatten()
    assert float(ahead.min()) > 50
    assert float(ahead.max() / ahead.min()) < 1.1  # all six hold the margin


@pytest.mark.parametrize("spec", ["depth=0,start=1", "width=6,activation=tanh,start=1,biases=all"])
def test_a_stationary_point_is_stationary_to_rounding(spec: str) -> None:
    seen, truth = release(f"trained:batch=1,known=12,threat=informed,task=classes,weight_decay=0.01,{spec}")
    known = seen.knowledge
    x = torch.cat([known.known_inputs, truth.inputs])
    y = torch.cat([known.known_labels, truth.labels])
    value = objective(seen.model, seen.loss, x, y, known.recipe["weight_decay"])
    theta = torch.cat([p.detach().flatten() for p in seen.model.parameters()])
    assert float(torch.func.grad(value)(theta).norm()) < 1e-13
    without = objective(seen.model, seen.loss, x[:-1], y[:-1], known.recipe["weight_decay"])
    assert float(torch.func.grad(without)(theta).norm()) > 1e-4  # the private example is in it


def test_sgd_is_what_torch_does() -> None:
    model, x, y = nn.Linear(3, 2).double(), torch.rand(6, 3, generator=torch.Generator().manual_seed(0)).double(), None
    y = torch.tensor([0, 1, 0, 1, 1, 0])
    rules = Training(method="sgd", steps=7, learning_rate=0.3, momentum=0.5, weight_decay=0.1, batch_size=4)
    ours = trained(model, F.cross_entropy, x, y, rules)
    step = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.5, weight_decay=0.1)
    for k in range(7):
        step.zero_grad()
        part = slice(0, 4) if k % 2 == 0 else slice(4, 6)
        F.cross_entropy(model(x[part]), y[part]).backward()
        step.step()
    assert torch.allclose(ours.weight, model.weight, atol=1e-12)


def test_a_defence_works_in_every_step_of_the_training() -> None:
    spec = "trained:batch=4,width=8,method=sgd,steps=5,start=1"
    plain, clipped = release(spec)[0], release(spec, defences="clip:norm=1e-6")[0]
    start = Case.parse(spec).setting().model.state_dict()
    moved = [sum(float((s.model.state_dict()[k] - v).norm()) for k, v in start.items()) for s in (plain, clipped)]
    assert moved[1] < 1e-3 * moved[0]
    same = release(spec, defences="clip:norm=1e9")[0]
    assert torch.allclose(same.model.dense1.weight, plain.model.dense1.weight, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"initial": {"weight": torch.zeros(2, 3)}}, "initial lacks 'bias'"),
        ({"initial": {"weight": torch.zeros(3, 2), "bias": torch.zeros(2)}}, "initial's 'weight' has shape"),
        ({"recipe": {"weight_decay": -1}}, "recipe is"),
        ({"known_inputs": torch.zeros(2, 3), "known_labels": torch.zeros(1)}, "known_labels has 1 rows"),
        ({"candidates": torch.zeros(2, 4), "input_shape": (3,)}, "candidates has the shape"),
    ],
)
def test_knowledge_of_a_training_that_does_not_fit(change: dict, words: str) -> None:
    with pytest.raises(UnbatchError, match=words):
        Observation(model=nn.Linear(3, 2), loss=F.cross_entropy, update={}, knowledge=Knowledge(**change))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("trained:loss=squared-error", "the loss follows from task"),
        ("trained:known=3", "an informed adversary knows examples"),
        ("trained:threat=informed", "an informed adversary knows examples"),
        ("trained:data=mnist", "give files=DIR"),
    ],
)
def test_options_of_trained_that_do_not_go_together(spec: str, words: str) -> None:
    with pytest.raises(UnbatchError, match=words):
        Case.parse(spec)


def test_more_examples_than_there_are() -> None:
    with pytest.raises(UnbatchError, match="want more than the 1781 examples that no client has"):
        Case.parse("trained:outsiders=1797").setting()


def test_margins_of_numbers_and_rounds_of_a_release_are_refused() -> None:
    with pytest.raises(UnbatchError, match="margins are of classes"):
        release("trained:batch=2,width=8,task=regression,method=margin")
    with pytest.raises(UnbatchError, match="a defence changes the gradients of sgd"):
        release("trained:batch=2,width=8", defences="clip")
    with pytest.raises(UnbatchError, match="has no rounds"):
        release("trained:batch=2,width=8", protocol=unbatch.Protocol(local_steps=2))


def test_a_release_is_kept_in_a_bundle(tmp_path) -> None:
    seen, _ = release("trained:batch=2,width=8,steps=20,threat=start,outsiders=2")
    seen.save(tmp_path / "model.safetensors")
    again = Observation.load(
        tmp_path / "model.safetensors", model=Case.parse("trained:batch=2,width=8").setting().model, loss=seen.loss
    )
    assert again.released
    assert again.knowledge.recipe == seen.knowledge.recipe
    assert torch.equal(again.model.dense1.weight, seen.model.dense1.weight)
    assert torch.equal(again.knowledge.initial["dense1.weight"], seen.knowledge.initial["dense1.weight"])
    assert torch.equal(again.knowledge.candidates, seen.knowledge.candidates)


def test_an_audit_says_whose_threat_model_it_is() -> None:
    record = unbatch.audit(Case.parse("trained:batch=2,width=8,steps=20,threat=start"), total_budget=0.5)
    assert record.threat_model.startswith("holder of a released model and its starting weights. He holds")
    assert (
        record.protocol
        == "trained by 20 steps of margin descent, learning rate 0.1; the model is released, and nothing else is sent"
    )
    page = render(record)
    assert record.threat_model in page
    assert "update of one batch" not in page


def test_a_captured_release_is_audited() -> None:
    seen, truth = release("trained:batch=2,width=8,steps=20")
    record = unbatch.audit(seen, total_budget=0.5)
    assert record.threat_model.startswith("holder of a released model. ")
    assert record.clients[0].update_hash == ""
    assert unbatch.audit(seen, truth=truth, attacks=["unmix"], analyses=()).runs[0].status == "not applicable"


def test_an_active_server_has_no_part_in_a_release() -> None:
    case = Case.parse("trained:batch=2,width=8,steps=20")
    run = unbatch.audit(case, attacks=["tensor-moment-deep"], analyses=()).runs[0]
    assert run.status == "not applicable"


def test_bounds_of_private_training_are_those_of_all_its_steps() -> None:
    """A release is no single update: what one step tells bounds nothing of it."""
    spec = "trained:known=9,threat=informed,depth=0,start=1,method=sgd,steps=20,task=classes"
    private = "dp-sgd:noise_multiplier=4,steps=20,accountant=rdp"
    told = {"attacks": ["weight-span"], "analyses": ["dp-reconstruction"]}
    record = unbatch.audit(Case.parse(spec), defences=private, **told)
    assert record.privacy is not None
    assert record.privacy.epsilon is not None
    assert {bound.name for bound in record.bounds} == {"zCDP information", "reconstruction robustness", "Renyi"}
    assert all("20 steps" in bound.assumptions for bound in record.bounds)
    assert "informed adversary" in record.threat_model
