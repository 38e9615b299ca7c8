"""Charts: how numbers are written, and where a score stands on an axis."""

import math

import pytest
from audits import L2, LABELS, PSNR, an_audit, example, run

from unbatch.reporting.chart import Axis, Chart, number


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0.0, "0"),
        (132.44, "132.4"),
        (-1470.0, "−1,470"),
        (1.5e-7, "1.5 × 10⁻⁷"),
        (2e9, "2.0 × 10⁹"),
        (math.inf, "∞"),
        (math.nan, "not a number"),
    ],
)
def test_numbers(value: float, words: str) -> None:
    assert number(value) == words


def test_axes() -> None:
    decibels = Axis.of([8.0, 150.0], PSNR)
    assert (decibels.low, decibels.high) == (0.0, 180.0)
    assert decibels.ticks[0] == (3.0, "0")
    assert decibels.at(60.0) < decibels.at(150.0) < decibels.at(180.0) == 97.0  # told apart, where all would pile up
    assert decibels.at(60.0) - decibels.at(0.0) > 2 * (decibels.at(180.0) - decibels.at(60.0))
    exact = Axis.of([-4.0, 131.0, 420.0], PSNR)
    assert (exact.high, exact.at(420.0), exact.at(-4.0)) == (300.0, 97.0, 3.0)
    assert Axis.of([8.0, 43.0], PSNR).at(50.0) == 97.0  # nothing is that near: the axis ends before
    errors = Axis.of([1e-8, 1.3], L2)
    assert errors.log
    assert errors.at(1e-8) > errors.at(1e-4) > errors.at(1.3), "right is nearer to the truth"
    assert errors.at(0.0) == 97.0
    flat = Axis.of([0.5, 0.6], L2)
    assert not flat.log
    assert flat.at(0.0) == 97.0
    for axis in (decibels, exact, errors, flat, Axis.of([0.0], L2), Axis.of([-1.0, 1.0], LABELS)):
        places = [place for place, _ in axis.ticks]
        assert 2 <= len(places) <= 8
        assert all(3 <= place <= 97 for place in places)
        assert places == sorted(places, reverse=axis.flip)


def test_a_point_has_the_tier_of_its_example() -> None:
    came = [example(0, 150.0, 1e-9), example(1, 60.0, 2e-3), example(2, 22.0, 0.1), example(3, 12.0, 0.6)]
    chart = Chart.of(an_audit(runs=[run("a", came), run("deep", came[:1], layer="3.fc")]), "psnr")
    assert chart is not None
    tiers = [[tier for _, _, tier, _ in strip.points] for strip in chart.strips]
    assert tiers == [["exact", "copy", "recognisable", "guess"], ["guess"]]  # features are not the example
    assert [strip.words for strip in chart.strips] == ["1 of 4 exact, 1 copy", "1 of 1 exact as features of 3.fc"]
