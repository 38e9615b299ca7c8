"""kkt: training pictures out of a released model, chosen without the truth; and what the units do not tell."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from unbatch.attacks.kkt import Kkt, hidden_layer
from unbatch.attacks.silent_units import SilentUnits
from unbatch.auditing.client import observe
from unbatch.case import Case
from unbatch.errors import NotApplicable
from unbatch.inversion.margin_cone import cone_answers
from unbatch.inversion.view import View
from unbatch.knowledge import Knowledge
from unbatch.numerics.search.margin import above_noise, strongest, told_apart, units
from unbatch.observation import Observation
from unbatch.training import Training, trained


def released(model: nn.Module, shape: tuple[int, ...] = (3,), n: int = 2) -> Observation:
    known = Knowledge(input_shape=shape, batch_size=n)
    return Observation(model=model, loss=nn.BCEWithLogitsLoss(), update={}, knowledge=known)


def network(m: int = 8, d: int = 3, act: nn.Module | None = None, *, bias: bool = False, out: int = 1) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(d, m), act or nn.ReLU(), nn.Linear(m, out, bias=bias)).double()


def stationary() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights, biases and outgoing weights of a network at a stationary margin, by hand, and its three examples.

    Inputs at the corners of a triangle round the origin, of classes 1, 1 and 0; units fire on one, or on the first two.
    """
    x = torch.tensor([[2.0, 0.0], [-1.0, 1.75], [-1.0, -1.75]]).double()
    c = torch.tensor([1.0, 1.0, -1.0]).double()
    fires = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 1], [0, 0, 1]]).double()
    v = torch.tensor([1.0, 2.0, 1.5, 0.7, -1.0, -2.0]).double()
    rows = v[:, None] * ((fires * c) @ torch.cat([x, torch.ones(3, 1).double()], 1))
    assert torch.equal((x @ rows[:, :2].T + rows[:, 2] > 0).double().T, fires)
    return rows[:, :2], rows[:, 2], v, x


def test_units_of_one_direction_are_one_and_the_outputs_are_the_network_s() -> None:
    weight, bias, v, x = stationary()
    held = units(weight, bias, v)
    assert len(held.rows) == 4
    z = torch.cat([x, torch.ones(3, 1).double()], 1) @ held.basis.T
    assert torch.allclose(held.outputs(z), (x @ weight.T + bias).clamp_min(0) @ v)
    assert torch.allclose(held.inputs(z), x)


def test_examples_on_which_the_same_units_fire_are_not_told_apart() -> None:
    weight, bias, v, x = stationary()
    held = units(weight, bias, v)
    z = torch.cat([x, torch.ones(3, 1).double()], 1) @ held.basis.T
    assert torch.allclose(told_apart(held, z), torch.ones(3).double())
    twice = torch.cat([z, z[:1] + 0.01 * z[1:2]])
    assert told_apart(held, twice)[[0, 3]].max() < 0.9
    assert told_apart(held, twice)[2] > 0.99


def test_the_strongest_points_come_first_and_copies_are_dropped() -> None:
    z = torch.eye(3).double()[[0, 0, 1, 2]]
    points, strengths = strongest(z, torch.tensor([1.0, 3.0, 2.0, 0.5]).double(), 2)
    assert points.tolist() == [[1, 0, 0], [0, 1, 0]]
    assert strengths.tolist() == [3, 2]


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (network(out=3), "one logit"),
        (network(bias=True), "without"),
        (network(act=nn.Tanh()), "other than one layer"),
    ],
    ids=["classes", "bias", "tanh"],
)
def test_other_networks_are_refused_in_words(model: nn.Module, words: str) -> None:
    with pytest.raises(NotApplicable, match=words):
        hidden_layer(View.of(released(model)))


def test_an_update_is_no_release() -> None:
    seen = released(network())
    update = {name: torch.ones_like(p) for name, p in seen.model.named_parameters()}
    with pytest.raises(NotApplicable, match="this is an update"):
        Kkt()(replace(seen, update=update))


def test_four_pictures_are_chosen_without_the_truth() -> None:
    setting = Case.parse("trained:batch=4,width=100,steps=600,start=0.1,centred=true").setting()
    seen, _ = observe(setting.model, setting.loss, setting.inputs, setting.labels, training=setting.training)
    found = Kkt(starts=128, steps=200, programmes=0)(
        replace(seen, knowledge=seen.knowledge | Knowledge(input_range=(-1.0, 1.0)))
    )
    assert found.inputs is not None
    true, guess = (
        x.double().flatten(1) - x.double().flatten(1).mean(1, keepdim=True) for x in (setting.inputs, found.inputs)
    )
    alike = torch.nn.functional.normalize(guess) @ torch.nn.functional.normalize(true).T
    assert int((alike.max(0).values > 0.9).sum()) >= 3
    assert len(found.trace["determined"]) == len(found.inputs) <= 5


def trained_to_a_margin(
    seed: int, n: int = 8, d: int = 40, m: int = 500
) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """A small network trained on random inputs, the small start it was trained from, and its examples and classes."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 8, generator=rng).double() @ torch.randn(8, d, generator=rng).double() / 3
    x, y = x + 0.5 * torch.randn(n, d, generator=rng), torch.arange(n) % 2
    x = x - x.mean(0)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Flatten(), nn.Linear(d, m), nn.ReLU(), nn.Linear(m, 1, bias=False)).double()
    with torch.no_grad():
        for parameter in model[1].parameters():
            parameter.mul_(1e-4)
    return trained(model, nn.BCEWithLogitsLoss(), x, y, Training(steps=300)), model, x, y


@pytest.mark.parametrize("seed", [0, 2])
def test_a_whole_training_set_by_the_units_that_never_fired_and_its_classes(seed: int) -> None:
    model, _, x, y = trained_to_a_margin(seed)
    found = Kkt()(released(model, (40,), 8))
    assert found.inputs is not None
    assert found.labels is not None
    assert found.bound is None
    away = torch.cdist(x, found.inputs.double()) / x.norm(dim=1, keepdim=True)
    assert float(away.amin(1).max()) < 0.05
    assert torch.equal(found.labels.flatten()[away.argmin(1)].long(), y)
    assert found.trace["agreeing"] > 0.999


def test_a_wrong_facet_shows_in_units_that_fire_where_they_must_not() -> None:
    model, _, _, _ = trained_to_a_margin(0)
    found = Kkt(programmes=0, starts=8, steps=5)(released(model, (40,), 8))
    assert "agreeing" not in found.trace
    weight, bias, outward = hidden_layer(View.of(released(model, (40,), 8)))
    ends = torch.cat([weight, bias[:, None]], 1)
    basis, noise = above_noise(ends)
    rows = ends * outward.sign()[:, None]
    agreeing = list[float]()
    for answer in cone_answers(rows, ends, basis[:8], noise, torch.Generator().manual_seed(0), programmes=600):
        agreeing += [answer.agreeing] if answer is not None else []
        if agreeing and agreeing[-1] == 1:
            break
    assert agreeing[-1] == 1.0
    assert agreeing[0] < 0.98


def test_with_the_starting_weights_the_same_is_exact() -> None:
    model, start, x, _ = trained_to_a_margin(2)
    seen = released(model, (40,), 8)
    before = Knowledge(initial={name: p.detach() for name, p in start.named_parameters()})
    found = SilentUnits()(replace(seen, knowledge=seen.knowledge | before))
    assert found.inputs is not None
    away = torch.cdist(x, found.inputs.double()) / x.norm(dim=1, keepdim=True)
    assert float(away.amin(1).max()) < 1e-7
    assert found.trace["agreeing"] == [1.0] * 8
