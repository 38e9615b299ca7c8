"""The built-in cases: real data, valid settings, and every option with every case."""

from __future__ import annotations

from itertools import product
from typing import get_args

import pytest
import torch
from torch import Tensor

from unbatch.case import Case, Examples, Setting
from unbatch.cases.photos import PHOTOS
from unbatch.domain import Images, Table
from unbatch.errors import UnbatchError
from unbatch.loss import identify
from unbatch.models import small
from unbatch.models.published import NETWORKS
from unbatch.protocol import Protocol, local_update

TABLES = ["breast-cancer", "diabetes", "wine", "iris"]
PICTURES = ["photos", "digits", "faces"]
ALL = PICTURES + [f"tables:dataset={name}" for name in TABLES]
SIZES = {  # spelling -> examples, input shape, classes
    "photos": (576, (3, 32, 32), 9),
    "photos:size=64": (576, (3, 64, 64), 9),
    "digits": (1797, (1, 8, 8), 10),
    "faces": (200, (1, 25, 25), 2),
    "tables:dataset=breast-cancer": (569, (30,), 2),
    "tables:dataset=diabetes": (442, (10,), 2),
    "tables:dataset=wine": (178, (13,), 3),
    "tables:dataset=iris": (150, (4,), 3),
}


def case(spec: str, **options: object) -> Case:
    tail = ",".join(f"{key}={str(value).lower()}" for key, value in options.items())
    return Case.parse(spec + ("," if ":" in spec else ":") + tail)


def pool(spec: str, seed: int = 0) -> Examples:
    return Case.parse(spec).pool(torch.Generator().manual_seed(seed))


def gradient(setting: Setting) -> dict[str, Tensor]:
    return local_update(setting.model, setting.loss, setting.inputs, setting.labels, Protocol())


@pytest.mark.parametrize("spec", SIZES)
def test_the_pool_is_valid(spec: str) -> None:
    n, shape, k = SIZES[spec]
    examples = pool(spec)
    assert examples.inputs.shape == (n, *shape)
    assert examples.domain.shape == shape
    assert examples.inputs.isfinite().all()
    assert examples.inputs.min() >= examples.domain.low
    assert examples.inputs.max() <= examples.domain.high
    assert examples.labels.dtype == torch.int64
    assert sorted(set(examples.labels.tolist())) == list(range(k))
    assert len(examples.classes) == k == len(set(examples.classes))
    assert isinstance(examples.domain, Table if "tables" in spec else Images)
    if isinstance(examples.domain, Images):
        assert (examples.domain.low, examples.domain.high) == (0, 1)
        assert examples.inputs.max() > 0.9


@pytest.mark.parametrize("spec", ALL)
def test_the_pool_depends_on_the_generator_alone(spec: str) -> None:
    before = torch.random.get_rng_state()
    one, again, other = pool(spec, 3), pool(spec, 3), pool(spec, 4)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(one.inputs, again.inputs)
    assert torch.equal(one.labels, again.labels)
    assert not torch.equal(one.inputs, other.inputs)


def test_sources_are_stated() -> None:
    for name, kind in Case.find().items():
        assert len(kind.source) > 40, name


def test_photos_come_in_rounds_and_all_differ() -> None:
    examples = pool("photos")
    for turn in examples.labels.view(-1, len(PHOTOS)):
        assert sorted(turn.tolist()) == list(range(len(PHOTOS)))
    flat = examples.inputs.flatten(1)
    gaps = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist") / flat.norm(dim=1)
    assert gaps.fill_diagonal_(1).min() > 0.04
    assert examples.inputs.flatten(1).std(1).min() > 0.02


def test_faces_are_labelled_as_the_file_orders_them() -> None:
    examples = pool("faces")
    assert examples.labels.bincount().tolist() == [100, 100]
    contrast = examples.inputs.flatten(1).std(1)
    assert contrast[examples.labels == 0].min() > 0.03  # a face is never flat; some backgrounds are
    assert contrast[examples.labels == 1].min() < 0.02


def test_tables_are_standardised_and_named() -> None:
    examples = pool("tables:dataset=wine")
    assert torch.allclose(examples.inputs.mean(0), torch.zeros(13, dtype=torch.float64), atol=1e-9)
    assert torch.allclose(examples.inputs.var(0, correction=0), torch.ones(13, dtype=torch.float64), atol=1e-9)
    assert "alcohol = " in examples.domain.render(examples.inputs[0])
    cut = pool("tables").inputs
    assert cut.abs().max() == 5
    assert ((cut.abs() == 5).sum() / cut.numel()) < 0.002
    assert pool("tables:dataset=diabetes").labels.bincount().tolist() == [221, 221]


@pytest.mark.parametrize("spec", ALL)
def test_clients_hold_disjoint_examples_and_share_the_model(spec: str) -> None:
    clients = case(spec, batch=5, clients=4)
    settings = [clients.setting(i) for i in range(4)]
    rows = torch.cat([setting.inputs for setting in settings]).flatten(1)
    if "tables" not in spec:  # a table may hold two equal rows
        assert len(rows.unique(dim=0)) == 20
    drawn = clients.pool(torch.Generator().manual_seed(0))
    assert torch.equal(rows, drawn.inputs[:20].float().flatten(1))
    assert torch.equal(torch.cat([setting.labels for setting in settings]), drawn.labels[:20])
    weights = [torch.cat([p.flatten() for p in setting.model.parameters()]) for setting in settings]
    assert all(torch.equal(weights[0], other) for other in weights[1:])


@pytest.mark.parametrize("spec", ALL)
def test_same_spelling_same_bits(spec: str) -> None:
    spelt = str(case(spec, batch=6, clients=2, near_duplicates=2, seed=5))
    one = Case.parse(spelt).setting(1)
    one_inputs = one.inputs.clone()
    one.inputs.zero_()  # a client that spoils its own copy spoils nobody else's
    two = Case.parse(spelt).setting(1)
    assert torch.equal(one_inputs, two.inputs)
    assert torch.equal(one.labels, two.labels)
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True))
    assert one.name == spelt
    other = Case.parse(spelt.replace("seed=5", "seed=6")).setting(1)
    assert not torch.equal(one_inputs, other.inputs)
    assert not torch.equal(next(two.model.parameters()), next(other.model.parameters()))


@pytest.mark.parametrize("spec", ALL)
def test_spelling_round_trip(spec: str) -> None:
    for spelt in (Case.parse(spec), case(spec, batch=3, double=True, bias=False, loss="squared-error", width=7)):
        assert Case.parse(str(spelt)) == spelt
        assert spelt.setting().name == str(spelt)


SMALL = [name for name in get_args(small.Name) if not name.startswith("cnn4")]  # those take no pictures of 8 x 8


@pytest.mark.parametrize(("spec", "name"), [*product(PICTURES, SMALL), *product(["photos"], NETWORKS)])
def test_every_case_with_every_model(spec: str, name: str) -> None:
    narrow = {} if "width" in small.unused(name) else {"width": 4}
    setting = case(spec, model=name, batch=3, **narrow).setting()
    update = gradient(setting)
    assert update.keys() == dict(setting.model.named_parameters()).keys()
    assert all(part.isfinite().all() and part.abs().sum() > 0 for part in update.values())


@pytest.mark.parametrize("loss", ["cross-entropy", "binary-cross-entropy", "squared-error"])
@pytest.mark.parametrize("spec", ALL)
def test_every_case_with_every_loss(spec: str, loss: str) -> None:
    means, sums = (
        case(spec, batch=4, loss=loss, reduction=reduction, activation="tanh", double=True).setting()
        for reduction in ("mean", "sum")
    )
    assert means.inputs.dtype == next(means.model.parameters()).dtype == torch.float64
    averaged, summed = gradient(means), gradient(sums)
    for name, part in averaged.items():
        assert part.abs().sum() > 0
        assert torch.allclose(4 * part, summed[name])
    outputs = means.model(means.inputs)
    k = len(means.classes)
    assert outputs.shape[1] == (1 if loss == "binary-cross-entropy" and k == 2 else k)
    form = identify(means.loss, tuple(outputs.shape))
    assert form is not None
    assert (form.name, form.reduction) == (loss, "mean")


def test_binary_cross_entropy_is_one_against_the_rest_over_many_classes() -> None:
    setting = case("digits", batch=5, loss="binary-cross-entropy", double=True).setting()
    outputs = setting.model(setting.inputs)
    right = torch.nn.functional.one_hot(setting.labels, 10).bool()
    p = outputs.sigmoid()
    expected = -(torch.where(right, p, 1 - p)).log().sum(1).mean()
    assert torch.allclose(setting.loss(outputs, setting.labels), expected)


@pytest.mark.parametrize("batch", [2, 3, 7])
@pytest.mark.parametrize("spec", ALL)
def test_repeated_labels_repeat_in_every_batch(spec: str, batch: int) -> None:
    spelt = case(spec, batch=batch, clients=3, repeated_labels=True)
    settings = [spelt.setting(i) for i in range(3)]
    for setting in settings:
        assert len(setting.labels.unique()) <= max(1, batch // 2)
    drawn = spelt.pool(torch.Generator().manual_seed(0)).inputs.float().flatten(1)
    rows = torch.cat([setting.inputs for setting in settings]).flatten(1)
    where = (rows[:, None] == drawn[None]).all(2).float().argmax(1)
    assert (rows == drawn[where]).all()
    assert "tables" in spec or len(set(where.tolist())) == 3 * batch


@pytest.mark.parametrize("spec", ALL)
def test_near_duplicates_are_one_percent_away(spec: str) -> None:
    plain, spelt = case(spec, batch=5, clients=2), case(spec, batch=5, clients=2, near_duplicates=3)
    for client in range(2):
        setting = spelt.setting(client)
        x = setting.inputs.flatten(1)
        for twin, original in ((2, 0), (3, 1), (4, 0)):
            gap = (x[twin] - x[original]).norm() / x[original].norm()
            assert gap == pytest.approx(0.01, rel=1e-3)
            assert setting.labels[twin] == setting.labels[original]
        assert (x[4] - x[2]).norm() > 1e-3 * x[0].norm()
        assert torch.equal(x[:2], plain.setting(client).inputs.flatten(1)[:2])
        assert setting.inputs.min() >= setting.domain.low
        assert setting.inputs.max() <= setting.domain.high


def test_classes_name_the_labels() -> None:
    setting = case("photos", batch=9).setting()
    assert {setting.label_name(label) for label in setting.labels} == {photo.label for photo in PHOTOS}


def test_refusals_say_what_to_do() -> None:
    with pytest.raises(
        ValueError, match=r"2 clients of 100 examples each want more than the 150 examples.*lower batch"
    ):
        case("tables", dataset="iris", batch=100, clients=2).setting()
    with pytest.raises(ValueError, match="each want more than the 64 examples"):
        case("photos", batch=3, clients=22, repeated_labels=True).setting()
    with pytest.raises(ValueError, match="there is no client 2; they are numbered 0 to 1"):
        case("digits", clients=2).setting(2)
    with pytest.raises(ValueError, match="no client -1"):
        Case.parse("digits").setting(-1)
    for name in ("lenet", "convnet", "resnet-small"):
        with pytest.raises(ValueError, match="use model=mlp"):
            case("tables", model=name).setting()
    with pytest.raises(ValueError, match="near_duplicates=2 must be below batch=2"):
        case("digits", batch=2, near_duplicates=2)
    with pytest.raises(ValueError, match=r"size.*128"):
        Case.parse("photos:size=200")
    with pytest.raises(ValueError, match=r"breast-cancer \| diabetes \| wine \| iris"):
        Case.parse("tables:dataset=titanic")


@pytest.mark.parametrize("size", [8, pytest.param(128, marks=pytest.mark.slow)])
def test_photos_of_extreme_sizes(size: int) -> None:
    setting = case("photos", size=size, batch=2).setting()
    assert setting.inputs.shape == (2, 3, size, size)
    assert gradient(setting)["dense1.weight"].shape == (64, 3 * size * size)


def test_tokens_beyond_an_embedding_are_refused_with_its_size() -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Flatten(), torch.nn.Linear(12, 2))
    tokens, labels = torch.tensor([[3, 12, 1]]), torch.tensor([1])
    with pytest.raises(UnbatchError, match="have 9 rows, and tokens go up to 12 in sequences of 3"):
        Setting(model=model, loss=torch.nn.functional.cross_entropy, inputs=tokens, labels=labels)
