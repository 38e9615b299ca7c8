"""silent-units: training inputs of a network that was trained itself, by the zeros in what its units learned."""

import pytest
import torch

from unbatch import Attack, Case, NotApplicable, Observation, Truth, observe
from unbatch.inversion.trained_span import start_and_end, trained_span
from unbatch.inversion.view import View
from unbatch.numerics.search.silent import alone_in_zeros, silent_combinations, silent_on

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


def test_what_leaves_no_unit_silent_is_refused() -> None:
    seen, _ = release(f"{TRAINED},activation=tanh")
    with pytest.raises(NotApplicable, match="no units are silent"):
        Attack.parse("silent-units")(seen)


@pytest.mark.parametrize("seed", [0, 1])
def test_no_mixture_of_alike_digits_is_taken_for_an_example(seed: int) -> None:
    alike = f"trained:batch=10,width=400,steps=200,start=1,method=sgd,threat=start,seed={seed}"
    seen, truth = release(alike)
    view = View.of(seen)
    span = trained_span(view)
    basis = torch.linalg.svd(span.change, full_matrices=False)[0][:, :10]
    own = torch.linalg.lstsq(
        span.entering(truth.inputs).T, span.change.T
    ).solution.T  # [m, 10]: what each example moved
    own = torch.nn.functional.normalize(basis.T @ own, dim=0)
    before = tuple(end @ span.rows.T for end in start_and_end(view, span.layer))
    rounds = silent_combinations(basis, before, torch.Generator().manual_seed(0), starts=160)
    found = torch.cat([next(rounds)[0], next(rounds)[0]])
    likeness = (found @ own).abs()
    assert bool((likeness.amax(1) > 1 - 1e-9).all())
    assert int((likeness.amax(0) > 1 - 1e-9).sum()) >= 9


def test_mixtures_are_parted_into_examples_and_chance_zeros_are_no_help() -> None:
    rng = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 3, generator=rng).double()
    rows[:12, :2] = 0.0  # silent on the first two examples, which are alike
    rows[12:18, 0], rows[18:24, 1] = 0.0, 0.0
    rows = torch.nn.functional.normalize(rows, dim=1)
    mixed = torch.tensor([rows[30, 1], -rows[30, 0], 0.0]).double()  # one row more vanishes, by choice
    found = alone_in_zeros(rows, torch.nn.functional.normalize(mixed, dim=0)[None])
    assert len(found) == 2
    assert float((found.abs().sort(dim=0).values - torch.tensor([[0.0, 0, 0], [1, 1, 0]])).abs().max()) < 1e-12
    assert len(alone_in_zeros(rows, torch.nn.functional.normalize(torch.ones(1, 3).double(), dim=1))) == 0


def test_one_example_is_found_by_what_the_others_leave() -> None:
    rng = torch.Generator().manual_seed(1)
    weights, z = torch.randn(80, 4, generator=rng).double(), torch.randn(4, 4, generator=rng).double()
    own = (weights @ z.T).clamp_min(0) * torch.rand(80, 4, generator=rng).double()
    basis = torch.linalg.qr(own).Q
    found = silent_on(basis, (weights,), torch.stack([z[3], -z[3]]))
    q = torch.nn.functional.normalize(basis.T @ own[:, 3], dim=0)
    assert float((found @ q).abs().max()) > 1 - 1e-12


def test_more_directions_than_examples_are_refused_at_once() -> None:
    seen, _ = release(TRAINED.replace("method=sgd,", "") + ",method=adam")
    with pytest.raises(NotApplicable, match="Adam"):
        Attack.parse("silent-units")(seen)


def test_float32_is_refused_in_its_own_words() -> None:
    seen, _ = release(f"{TRAINED},double=false")
    with pytest.raises(NotApplicable, match="float32, whose rounding hides"):
        Attack.parse("silent-units")(seen)


def test_where_other_answers_agree_as_well_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """After one step mixtures pass for examples; only how well the units agree tells them, here made to tell nothing."""
    seen, truth = release("trained:batch=4,width=60,steps=1,start=1,method=sgd,threat=start,centred=true")
    found = Attack.parse("silent-units:programmes=0")(seen)
    assert found.trace["combinations"] > len(truth)
    monkeypatch.setattr("unbatch.attacks.silent_units.LEAST_AGREEING", 0.5)
    with pytest.raises(NotApplicable, match=r"agree with \d+ other answers as well"):
        Attack.parse("silent-units:programmes=0")(seen)
