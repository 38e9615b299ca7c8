import importlib.metadata
from typing import Annotated, Literal, final

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from unbatch import Attack, Case, Defence
from unbatch import plugin as plugins
from unbatch.defence import Step


@final
class LoudNoise(Defence):
    """A third party's."""

    paper = "none"
    identity = "loud-noise"
    level: Annotated[float, Field(ge=0, le=10, description="how loud")] = 1.0
    steps: Annotated[int | None, Field(gt=0, description="how long")] = None
    on: Annotated[bool, Field(description="whether")] = True
    shape: Annotated[Literal["flat", "pink"], Field(description="which")] = "flat"

    def wrap(self, step: Step) -> Step:
        return step


class Point:
    name, value = "loud-noise", "elsewhere:LoudNoise"

    def load(self) -> type[Defence]:
        return LoudNoise


class Broken:
    name, value = "broken", "elsewhere:Gone"

    def load(self) -> type[Defence]:
        raise ImportError("no module named elsewhere")


@pytest.fixture
def third_party(monkeypatch: pytest.MonkeyPatch):
    points = [Point()]
    monkeypatch.setattr(plugins, "entry_points", lambda group: points if group == "unbatch.defences" else [])
    plugins._discover.cache_clear()
    yield points
    monkeypatch.undo()
    plugins._discover.cache_clear()


def test_third_parties_are_found_by_entry_point(third_party: list[object]) -> None:
    assert Defence.find("loud-noise") is LoudNoise
    assert "clip" in Defence.find()
    # A defence is spelt in full, so that a record shows its strength; other plugins leave out their defaults.
    assert str(Defence.parse("loud-noise:on=false,level=2")) == "loud-noise:level=2.0,steps=none,on=false,shape=flat"
    assert str(Attack.parse("bias-ratio:tol=none")) == "bias-ratio"


def test_a_broken_third_party_does_not_take_the_tool_down(third_party: list[object]) -> None:
    third_party.append(Broken())
    with pytest.warns(UserWarning, match="broken.*no module named elsewhere"):
        assert "clip" in Defence.find()


@given(
    level=st.floats(0, 10),
    steps=st.none() | st.integers(1, 10**9),
    on=st.booleans(),
    shape=st.sampled_from(["flat", "pink"]),
)
def test_spelling_round_trips(level: float, steps: int | None, on: bool, shape: Literal["flat", "pink"]) -> None:
    made = LoudNoise(level=level, steps=steps, on=on, shape=shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plugins, "_discover", lambda folder: {"loud-noise": LoudNoise})
        assert Defence.parse(str(made)) == made


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("bias-ration", "Did you mean 'bias-ratio'"),
        ("bias-ratio:tols=1", "unknown option 'tols'"),
        ("bias-ratio:tol=0", "greater than 0"),
        ("bias-ratio:tol=abc", "valid number"),
        ("bias-ratio:tol", "is not option=value"),
        ("bias-ratio:tol=1,tol=2", "given twice"),
        ("", "unknown attack ''"),
    ],
)
def test_bad_spelling_says_what_is_allowed(spec: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Attack.parse(spec)


def test_booleans_are_true_and_false() -> None:
    assert Case.parse("photos:bias=false").bias is False
    with pytest.raises(ValueError, match="true or false"):
        Case.parse("photos:bias=0")


def test_options_are_described() -> None:
    tol = next(o for o in Attack.find("bias-ratio").options() if o.name == "tol")
    assert tol.default == "none"
    assert "> 0" in tol.type
    assert "rank-one" in tol.description
    shape = next(o for o in LoudNoise.options() if o.name == "shape")
    assert shape.type == "flat | pink"


def test_sets_are_separate() -> None:
    with pytest.raises(ValueError, match="unknown defence 'bias-ratio'"):
        Defence.find("bias-ratio")
    with pytest.raises(TypeError, match="Attack, Defence"):
        plugins.Plugin.find()
    assert importlib.metadata.version("unbatch")
