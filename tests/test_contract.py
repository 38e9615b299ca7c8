"""Every plugin, found and not listed, keeps what it declares."""

from typing import ClassVar, final

import pytest

from unbatch.analysis import Analysis
from unbatch.attack import Attack
from unbatch.case import Case
from unbatch.defence import Defence, Step
from unbatch.layer import LayerRule
from unbatch.metric import Metric
from unbatch.plugin import Plugin
from unbatch.sign import Sign
from unbatch.testing import (
    check_analysis,
    check_attack,
    check_case,
    check_defence,
    check_metric,
    check_plugin,
    check_sign,
)

SETS: list[type[Plugin]] = [Attack, Defence, Analysis, Sign, Metric, Case, LayerRule]


@pytest.mark.parametrize("name", Attack.find())
def test_attack(name: str) -> None:
    check_attack(Attack.find(name))


@pytest.mark.parametrize("name", Defence.find())
def test_defence(name: str) -> None:
    check_defence(Defence.find(name))


@pytest.mark.parametrize("name", Analysis.find())
def test_analysis(name: str) -> None:
    check_analysis(Analysis.find(name))


@pytest.mark.parametrize("name", Sign.find())
def test_sign(name: str) -> None:
    check_sign(Sign.find(name))


@pytest.mark.parametrize("name", Metric.find())
def test_metric(name: str) -> None:
    check_metric(Metric.find(name))


@pytest.mark.parametrize("name", Case.find())
def test_case(name: str) -> None:
    check_case(Case.find(name))


@pytest.mark.parametrize("kind", SETS, ids=lambda kind: kind.folder)
def test_one_plugin_a_file_named_after_it(kind: type[Plugin]) -> None:
    found = kind.find()
    assert found
    for name, plugin in found.items():
        check_plugin(plugin)
        assert plugin.__module__ == f"unbatch.{kind.folder}.{name.replace('-', '_')}"


@final
class Boastful(Defence):
    """Does nothing, and says that it clips."""

    paper: ClassVar[str] = "none"
    identity: ClassVar[str] = "boastful"
    clips = property(lambda self: True)

    def wrap(self, step: Step) -> Step:
        return step


def test_a_defence_that_does_nothing_says_so() -> None:
    with pytest.raises(AssertionError, match="defence boastful 'boastful' says of itself clips"):
        check_defence(Boastful)
