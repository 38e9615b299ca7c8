import importlib.metadata
import re
import subprocess
import sys
from typing import Annotated, Any, Literal, final

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

import unbatch
from unbatch import Attack, Case, Defence, UnbatchError
from unbatch import plugin as plugins
from unbatch.command.catalogue import SETS, first_sentence
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
    assert [o.type for o in LoudNoise.options()] == ["float >= 0 <= 10", "int > 0 | none", "bool", "flat | pink"]
    activation = next(o for o in Case.find("photos").options() if o.name == "activation")
    assert activation.type.startswith("relu | leaky-relu | ")
    assert activation.type.endswith(" | none")


@pytest.mark.parametrize("plugin", [p for kind in SETS for p in kind.find().values()], ids=lambda p: p.name)
def test_the_first_sentence_of_a_plugin_is_plain(plugin: type[plugins.Plugin]) -> None:
    """No formula, no shape, one sentence, one line of a wide terminal: the index is read by whoever knows none of them."""
    words = first_sentence(plugin)
    assert len(words) <= 120
    assert re.fullmatch(r"[A-Z][^.=|<>\[\]^]*\.", words), words
    assert not re.search(r"->|\bargmin\b|\bsum_|[a-z]_[a-z0-9]\b|d[A-Z]/d", words), words


def test_one_or_several_spelt_or_built() -> None:
    matching = Attack.parse("gradient-matching:iterations=3")
    assert Attack.several("unmix") == [Attack.parse("unmix")]
    assert Attack.several(matching) == [matching]
    assert Attack.several(("unmix", matching)) == [Attack.parse("unmix"), matching]
    assert Attack.several(spec for spec in ["unmix"]) == [Attack.parse("unmix")]
    assert Attack.several(()) == []
    assert [plugin.name for plugin in Attack.several(Attack.find())] == list(Attack.find())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("unmx", "Did you mean 'unmix'"),
        (unbatch.attacks.Unmix, r"is a class; give Unmix\(\), or its spelling 'unmix'"),
        ([unbatch.defences.Clip()], "the defence 'clip:norm=1.0' is no attack"),
        (3, r"3 \(int\) is no attack; give an attack's spelling"),
        ([None], "NoneType"),
    ],
    ids=str,
)
def test_what_is_no_plugin_of_the_set_is_refused(given: Any, words: str) -> None:
    with pytest.raises(UnbatchError, match=words):
        Attack.several(given)


@pytest.mark.parametrize("folder", [kind.folder for kind in SETS])
def test_plugins_go_by_the_names_of_their_classes(folder: str) -> None:
    package = getattr(unbatch, folder)
    (kind,) = [kind for kind in SETS if kind.folder == folder]
    assert dir(package) == sorted(plugin.__name__ for plugin in kind.find().values())
    for plugin in kind.find().values():
        assert getattr(package, plugin.__name__) is plugin
    assert folder in dir(unbatch)
    with pytest.raises(AttributeError, match=f"module 'unbatch.{folder}' has no attribute 'Nothing'"):
        _ = package.Nothing


def test_a_class_of_a_third_party_stands_beside_ours(third_party: list[object]) -> None:
    assert unbatch.defences.LoudNoise is LoudNoise
    assert "LoudNoise" in dir(unbatch.defences)
    with pytest.raises(AttributeError, match="Did you mean 'LoudNoise'"):
        _ = unbatch.defences.LoudNoises


def test_to_name_an_open_set_imports_none_of_its_files() -> None:
    code = (
        "import sys, unbatch; unbatch.attacks; from unbatch.attacks import bias_ratio\n"
        "sys.exit('unbatch.attacks.unmix' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_reprs_show_how_a_plugin_is_built() -> None:
    assert repr(Attack.parse("unmix")) == "Unmix()"
    assert repr(unbatch.attacks.Unmix(partial=True)) == "Unmix(partial=True)"
    assert repr(LoudNoise(level=1.0, shape="pink")) == "LoudNoise(shape='pink')"


def test_options_out_of_range_are_an_error_of_ours() -> None:
    with pytest.raises(
        UnbatchError, match=r"option level=11: .* less than or equal to 10. Options of loud-noise: level"
    ):
        LoudNoise(level=11)
    with pytest.raises(UnbatchError, match="unknown option 'volume'"):
        LoudNoise(volume=1)  # type: ignore[call-arg]


def test_sets_are_separate() -> None:
    with pytest.raises(ValueError, match="unknown defence 'bias-ratio'"):
        Defence.find("bias-ratio")
    with pytest.raises(TypeError, match="Attack, Defence"):
        plugins.Plugin.find()
    assert importlib.metadata.version("unbatch")


def test_a_lone_name_stands_for_a_list_wherever_plugins_are_named() -> None:
    case = Case.parse("digits:width=16")
    made = unbatch.audit(
        case, attacks="bias-ratio", defences="clip:norm=9", metrics="psnr", analyses="gradient-rank", remedies="prune"
    )
    assert (made.attacks, made.defences, list(made.metrics)) == (["bias-ratio"], ["clip:norm=9.0"], ["psnr"])
    assert {risk.analysis for risk in made.risks} == {"gradient-rank"}
    assert [remedy.defence for remedy in made.remedies] == ["prune:share=0.9"]
    s = case.setting()
    sums, _ = unbatch.observe(s.model, s.loss, s.inputs, s.labels, defences=unbatch.defences.Clip(norm=0.1))
    assert sums.knowledge.clip == 0.1
    with pytest.raises(unbatch.Leak):
        unbatch.guard(
            sums.update,
            model=s.model,
            loss=s.loss,
            inputs=s.inputs,
            labels=s.labels,
            defences="clip:norm=0.1",
            attacks=unbatch.attacks.BiasRatio(),
        )
