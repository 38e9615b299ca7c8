"""inspect: finds what was planted by published recipes, leaves honest models alone, and says what a model gives away."""

import json
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import unbatch
from unbatch import Case, Inspection, Sign, UnbatchError
from unbatch.benchmarks.plantings import PLANTINGS, planted
from unbatch.case import Setting
from unbatch.command.cli import main

TELLING = {  # each recipe's sign that must be among those raised
    "imprint": "duplicated-rows",
    "imprint along a drawn row": "duplicated-rows",
    "quantile biases": "lone-units",
    "trap weights": "mirrored-rows",
    "class fishing": "silenced-outputs",
    "feature fishing": "silenced-outputs",
    "hyperplane": "overwhelming-biases",
    "latch": "lopsided-norms",
    "conv imprint": "duplicated-rows",
}


@pytest.fixture(scope="module")
def client() -> Setting:
    return Case.parse("digits:batch=64,width=100,depth=2").setting()


@pytest.fixture(scope="module")
def elsewhere() -> torch.Tensor:
    """What the server knows the statistics by."""
    return Case.parse("digits:batch=300,width=8,seed=5").setting().inputs


def received(client: Setting, model: nn.Module, **how) -> Inspection:
    return unbatch.inspect(model, data=(client.inputs, client.labels), **how)


@pytest.mark.parametrize("name", PLANTINGS)
def test_what_is_planted_is_found_by_its_sign(name: str, client: Setting, elsewhere: torch.Tensor) -> None:
    found = received(client, planted(name, client.model, elsewhere))
    assert TELLING[name] in {sign.sign for sign in found.planted}
    assert found.exit_code == 1
    assert "looks planted" in found.verdict()


def test_every_recipe_has_a_sign_that_must_be_raised() -> None:
    assert set(TELLING) == set(PLANTINGS)
    assert set(TELLING.values()) <= set(Sign.find())


@pytest.mark.parametrize(
    "case",
    [
        "digits:width=16",
        "digits:width=64,depth=3,activation=tanh",
        "digits:model=lenet",
        "digits:model=resnet-small,width=4",
        "digits:model=vit,width=24,depth=1",
        "text:width=16,depth=1",
        "text:width=16,depth=1,task=next",
    ],
)
def test_honest_models_have_none(case: str) -> None:
    setting = Case.parse(case.replace(":", ":batch=32,", 1)).setting()
    found = unbatch.inspect(setting.model, data=setting)
    assert [str(sign) for sign in found.planted] == []
    assert found.exit_code == 0
    assert {"duplicated-rows", "lone-units", "concentrated-gradients"} <= {sign.sign for sign in found.signs}
    assert found.verdict().startswith("No sign of planting.")


def test_limits_lie_beyond_what_honest_models_gave() -> None:
    for sign in Sign.find().values():
        assert sign.honest < sign.limit


def test_the_examples_that_stand_alone_are_those_that_bins_hold(client: Setting, elsewhere: torch.Tensor) -> None:
    """Behind an imprint of many bins nearly every example is named, and each is what a division of gradients gives."""
    wide = Case.parse("digits:batch=64,width=600,depth=2").setting()
    model = planted("imprint", wide.model, elsewhere)
    found = unbatch.inspect(model, data=(wide.inputs, wide.labels), batch=8)
    assert len(found.alone) == 8
    loss = nn.functional.cross_entropy(model(wide.inputs[:8]), wide.labels[:8])
    weight, bias = model.dense1.weight, model.dense1.bias
    dW, db = torch.autograd.grad(loss, [weight, bias])
    gaps = (dW.diff(dim=0) / db.diff()[:, None])[db.diff().abs() > 1e-9]
    near = torch.cdist(gaps, wide.inputs[:8].flatten(1)).amin(0)
    assert bool((near < 1e-2).all())


def test_a_replaced_layer_is_seen_beside_the_round_before(client: Setting) -> None:
    other = Case.parse("digits:batch=64,width=100,depth=2,seed=3").setting().model
    found = received(client, other, before=client.model)
    assert [sign.sign for sign in found.planted] == ["replaced-layer"]
    moved = {
        name: tensor + 0.01 * tensor.norm() / tensor.numel() ** 0.5
        for name, tensor in client.model.state_dict().items()
    }
    assert received(client, client.model, before=moved).planted == []


def test_without_data_the_weights_alone_tell(client: Setting, elsewhere: torch.Tensor) -> None:
    found = unbatch.inspect(planted("imprint", client.model, elsewhere))
    assert "duplicated-rows" in {sign.sign for sign in found.planted}
    assert not found.own
    assert "drawn in their place" in " ".join(found.notes)
    assert not any(each.picture for each in found.alone)


def test_layers_that_share_a_sign_are_named_to_be_frozen(client: Setting, elsewhere: torch.Tensor) -> None:
    found = received(client, planted("trap weights", client.model, elsewhere))
    assert set(found.weights) == {"dense1.weight", "dense1.bias"}


def test_the_model_is_left_as_it_is(client: Setting) -> None:
    client.model.dense1.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in client.model.state_dict().items()}
    received(client, client.model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in client.model.state_dict().items())
    assert not client.model.dense1.weight.requires_grad
    client.model.dense1.weight.requires_grad_(True)


def test_a_widened_network_is_no_planted_one(client: Setting) -> None:
    """Units copied with their biases, as function-preserving growth does, ask nothing twice."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 30), nn.ReLU(), nn.Linear(30, 10))
    with torch.no_grad():
        model[1].weight.copy_(client.model.dense1.weight[:10].repeat(3, 1))
        model[1].bias.copy_(client.model.dense1.bias[:10].repeat(3))
    assert "duplicated-rows" not in {sign.sign for sign in received(client, model).planted}


def test_asked_wrongly(client: Setting) -> None:
    with pytest.raises(UnbatchError, match="no parameters"):
        unbatch.inspect(nn.ReLU())
    with pytest.raises(UnbatchError, match="inputs"):
        unbatch.inspect(client.model, data=(client.inputs,))
    with pytest.raises(UnbatchError):
        unbatch.inspect(client.model, before={"dense1.weight": torch.ones(3)})


def net() -> nn.Module:
    return Case.parse("digits:width=100,depth=2").setting().model


def test_the_command_exits_with_1_and_writes_a_private_page(
    tmp_path: Path, client: Setting, elsewhere: torch.Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(planted("imprint", client.model, elsewhere).state_dict(), tmp_path / "received.safetensors")
    save_file(client.model.state_dict(), tmp_path / "before.safetensors")
    inputs, labels = client.inputs.numpy(), client.labels.numpy()
    import numpy as np

    np.savez(tmp_path / "mine.npz", inputs=inputs, labels=labels)
    words = ["inspect", "--model", "test_inspect:net", "--before", str(tmp_path / "before.safetensors")]
    words += ["--data", str(tmp_path / "mine.npz"), "--classes", "10", "--out", str(tmp_path / "look")]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--received", str(tmp_path / "received.safetensors")])
    assert ended.value.code == 1
    assert "duplicated-rows" in capsys.readouterr().out
    page = tmp_path / "look" / "inspection.html"
    assert stat.S_IMODE(page.stat().st_mode) == 0o600
    assert "data:image/png;base64" in page.read_text()
    assert Inspection.model_validate_json((tmp_path / "look" / "inspection.json").read_text()).exit_code == 1
    with pytest.raises(SystemExit) as ended:
        main([*words, "--received", str(tmp_path / "before.safetensors"), "--no-private", "--json"])
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out)["own"]
    assert "data:image/png;base64" not in page.read_text()
