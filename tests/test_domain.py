"""Domains: what an attacker is told of one, and the draws that stand in for a batch."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from unbatch import Knowledge, Observation
from unbatch.domain import Images, Table, Tokens, domain_told
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
