"""silent-units: training inputs of a network that was trained itself, by the zeros in what its units learned."""

import pytest
import torch

from unbatch import Attack, Case, NotApplicable, Observation, Truth, observe

TRAINED = "trained:batch=4,width=200,steps=60,start=1,method=sgd,threat=start,centred=true"


def release(spec: str) -> tuple[Observation, Truth]:
    client = Case.parse(spec).setting()
    return observe(
        client.model, client.loss, client.inputs, client.labels, knowledge=client.knowledge, training=client.training
    )


@pytest.mark.parametrize(
    "rules",
    ["task=binary", "task=classes,part=3,momentum=0.9", "depth=2,weight_decay=0.01", "task=regression,rate=0.02"],
)
def test_every_input_comes_back_whatever_sgd_does(rules: str) -> None:
    seen, truth = release(f"{TRAINED},{rules}")
    found = Attack.parse("silent-units")(seen)
    true, got = truth.inputs.double().flatten(1), found.inputs.double().flatten(1)
    assert len(got) == 4
    assert float((torch.cdist(true, got).amin(1) / true.norm(dim=1)).max()) < 1e-9
    assert found.bound is None
    assert min(found.trace["agreeing"]) >= 0.94


@pytest.mark.parametrize("rules", ["activation=tanh", "method=adam"])
def test_what_leaves_no_unit_silent_is_refused(rules: str) -> None:
    spec = TRAINED.replace("method=sgd,", "") if "method" in rules else TRAINED
    seen, _ = release(f"{spec},{rules}")
    with pytest.raises(NotApplicable, match=r"no units are silent|Adam"):
        Attack.parse("silent-units")(seen)
