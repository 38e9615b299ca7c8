"""Domains: what an attacker is told of one, and the draws that stand in for a batch."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from unbatch import Knowledge, Observation
from unbatch.domain import Images, Table, Tokens, domain_of, domain_told
from unbatch.errors import UnbatchError
from unbatch.inversion.probe import probe
from unbatch.inversion.view import View


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_a_table_of_unknown_range_is_standard_normal() -> None:
    domain = domain_told(Knowledge(input_shape=(50,), domain="table"))
    drawn = domain.prior(400, rng())
    assert isinstance(domain, Table)
    assert abs(float(drawn.mean())) < 0.03
    assert float(drawn.std()) == pytest.approx(1.0, abs=0.03)
    assert float(drawn.min()) < -3
    assert domain_told(Knowledge(input_shape=(50,))) == domain  # nothing says that it is no table


@pytest.mark.parametrize("ends", [(0.0, 1.0), (-0.5, 4.0), (0.0, 255.0)])
def test_a_table_whose_range_holds_no_standard_columns_fills_it(ends: tuple[float, float]) -> None:
    low, high = ends
    drawn = domain_told(Knowledge(input_shape=(50,), domain="table", input_range=ends)).prior(400, rng())
    assert low <= float(drawn.min()) < low + 0.01 * (high - low)
    assert high >= float(drawn.max()) > high - 0.01 * (high - low)
    assert float(drawn.std()) == pytest.approx((high - low) / 12**0.5, rel=0.03)


def test_a_table_of_standardised_columns_is_cut_to_its_range() -> None:
    drawn = domain_told(Knowledge(input_shape=(50,), input_range=(-2.0, 2.0))).prior(400, rng())
    assert float(drawn.abs().max()) == 2.0
    assert float(drawn.std()) == pytest.approx(0.96, abs=0.03)


def test_pictures_and_tokens_are_drawn_as_what_they_are() -> None:
    pictures = domain_told(Knowledge(input_shape=(3, 8, 8), input_range=(-1.0, 1.0)))
    assert isinstance(pictures, Images)
    assert -1 <= float(pictures.prior(8, rng()).min()) < -0.5
    words = domain_told(Knowledge(input_shape=(12,), domain="tokens", input_range=(0, 9)))
    drawn = words.prior(100, rng())
    assert isinstance(words, Tokens)
    assert drawn.dtype == torch.int64
    assert set(drawn.flatten().tolist()) == set(range(10))


def test_a_domain_that_is_none_or_has_another_shape_is_refused() -> None:
    with pytest.raises(UnbatchError, match="unknown domain 'pictures'; known: images, table, tokens"):
        domain_told(Knowledge(input_shape=(3, 8, 8), domain="pictures"))
    with pytest.raises(
        UnbatchError, match=r"images are \[channels, height, width\], and the input's shape is \(192,\)"
    ):
        domain_told(Knowledge(input_shape=(192,), domain="images"))


def test_what_an_analysis_looks_at_without_the_truth_is_a_draw_of_the_domain() -> None:
    model = nn.Linear(400, 3)
    update = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    known = Knowledge(input_shape=(400,), batch_size=4, domain="table")
    obs = Observation(model=model, loss=F.cross_entropy, update=update, knowledge=known)
    x, y, words = probe(View.of(obs), None, rng(), whole=True)
    assert torch.equal(x, domain_told(known).prior(4, rng()))
    assert float(x.min()) < -2  # a table's entries are not those of pictures in [0, 1]
    assert y.shape == (4,)
    assert words == "a batch drawn from the prior"


def test_the_task_tells_its_kind_and_no_range_that_may_have_been_read_off_the_batch() -> None:
    assert Images(shape=(1, 4, 4)).public().input_range == (0.0, 1.0)
    told = Table(shape=(4,), low=-2.0, high=1.5).public()
    assert told.domain == "table"
    assert "input_range" not in told
    assert "input_range" not in domain_told(Knowledge(input_shape=(4,), domain="table")).public()


PEOPLE = Table(
    shape=(4,),
    low=-10,
    high=10,
    columns=("job=clerk", "job=cook", "age", "town=Oslo"),
    categories=((0, 1), (3,)),
    units=((0.0, 1.0), (0.0, 1.0), (40.0, 10.0), (0.0, 1.0)),
)


def test_categories_are_rounded_in_words_and_valid_in_draws() -> None:
    assert PEOPLE.render(torch.tensor([0.3, 0.4, -0.1, 0.2])) == "job = cook, age = 39, town = Oslo"
    assert Table(shape=(2,)).render(torch.tensor([-2.7e-8, 2.7e-5])) == "x0 = 0, x1 = 2.7e-05"
    drawn = PEOPLE.prior(200, rng())
    assert set(map(tuple, drawn[:, :2].tolist())) == {(0.0, 1.0), (1.0, 0.0)}
    assert bool((drawn[:, 3] == 1).all())
    assert float(drawn[:, 2].std()) == pytest.approx(1, abs=0.2)


def test_the_server_knows_which_columns_are_one_category(tmp_path) -> None:
    told = PEOPLE.public()
    assert told.categories == ((0, 1), (3,))
    assert "categories" not in Table(shape=(4,)).public()
    guessed = domain_told(told | Knowledge(input_shape=(4,)))
    assert guessed.categories == ((0, 1), (3,))
    assert bool((guessed.prior(9, rng())[:, :2].sum(1) == 1).all())
    assert guessed.render(torch.tensor([0.0, 1.0, 2.0, 1.0])) == "x0 to x1 = x1, x2 = 2, x3 to x3 = x3"
    model = nn.Linear(4, 2)
    update = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    seen = Observation(model=model, loss=F.cross_entropy, update=update, knowledge=told | Knowledge(input_shape=(4,)))
    seen.save(tmp_path / "seen.safetensors")
    again = Observation.load(tmp_path / "seen.safetensors", model=model, loss=F.cross_entropy)
    assert again.knowledge.categories == ((0, 1), (3,))


@pytest.mark.parametrize("groups", [((0, 1), (1,)), ((4,),), ((-1,),), ((),)])
def test_categories_that_are_no_groups_of_columns_are_refused(groups) -> None:
    with pytest.raises(UnbatchError, match="groups of columns of an input, none of them twice"):
        Knowledge(input_shape=(4,), categories=groups)


@pytest.mark.parametrize(
    "shape",
    [
        (1, 64, 64, 64),
        (64, 64, 64),
        (16, 3, 64, 64),
        (3, 16, 64, 64),
        (2, 4, 32, 256, 256),
        (4, 96, 96),
        (28, 28),
        (1, 16000),
        (6, 500),
        (16, 5000),
        (128, 128, 3),
    ],
)
def test_what_is_no_picture_is_shown_as_a_small_one(shape: tuple[int, ...]) -> None:
    x = torch.rand(2, *shape, generator=rng())
    domain = domain_of(x)
    shown = domain.render(x[0])
    assert domain.name == "table"
    assert shown.startswith("data:image/png;base64,")
    assert len(shown) < 30_000
    assert len(domain.difference(x[0], x[1])) < 30_000
    assert shown != domain.render(x[1])
    assert domain.render(torch.zeros(shape)) != domain.render(torch.ones(shape))


def test_a_long_row_is_shown_by_its_first_columns() -> None:
    row = torch.arange(5000.0)
    words = domain_of(row[None]).render(row)
    assert words.startswith("x0 = 0, x1 = 1, ")
    assert words.endswith(", x99 = 99, and 4900 more columns = 0 to 4999 in all")
    named = Table(shape=(5000,), columns=[f"gene {i}" for i in range(5000)]).render(row)
    assert named.startswith("gene 0 = 0, ")
    assert len(named) < 3000
    assert Table(shape=(200,)).render(torch.zeros(200)).count(" = ") == 200


def test_of_unknown_range_a_block_is_shown_from_its_least_to_its_largest_value() -> None:
    x = torch.linspace(-300, 900, 64).reshape(8, 8)
    domain = domain_told(Knowledge(input_shape=(8, 8), domain="table"))
    assert domain.render(x) == Table(shape=(8, 8)).render((x + 300) / 1200)
