"""harden: a known bound is found by climbing and bisection; nothing that only failing attacks support is called safe."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, final

import numpy as np
import pytest
import torch
from torch import Tensor

from unbatch import Case, Defence, Images, Knowledge, Protocol, Setting
from unbatch.analysis import Analysis, Bound
from unbatch.auditing.harden import Family, Hardening, Tried, families, harden
from unbatch.auditing.utility import scene_of
from unbatch.command.cli import main
from unbatch.defence import Step
from unbatch.errors import NotApplicable, UnbatchError
from unbatch.inversion.view import View
from unbatch.loss import loss_named
from unbatch.models import small
from unbatch.progress import tick

CASE = "digits:batch=2,width=16,activation=tanh"


@final
class KnownNoise(Analysis):
    """A bound whose crossing is known: root mean square error = noise / .1, no more than the prior's .25."""

    paper: ClassVar[str] = "none"

    def run(self, view: View, at: tuple[Tensor, Tensor] | None, rng: torch.Generator) -> Sequence[Bound]:
        if "noise" not in view.knowledge:
            raise NotApplicable("no noise is known.")
        if not tick(0.5):  # it is stopped
            raise NotApplicable("there was no time for it.")
        value = min(float(view.knowledge.noise) / 0.1, 0.25)
        name = "zCDP information" if "privacy" in view.knowledge else "known noise"
        unbiased = Bound(name="unbiased", value=10.0, scope="unbiased", assumptions="none", source="none")
        held = Bound(name=name, value=value, scope="any", assumptions="none", source="none")
        whole = [held.model_copy(update={"covers": "training"})] if "privacy" in view.knowledge else []
        return [held, *whole, unbiased]


def search(**how) -> Hardening:
    how = {"attacks": ["label-count"], "analyses": [KnownNoise()], "rounds": 5, "seconds": 1000.0} | how
    return harden(Case.parse(CASE), psnr=how.pop("psnr", 15.0), **how)


def test_bisection_ends_at_the_weakest_noise_that_the_bound_allows() -> None:
    found = search(only=["noise"])
    needed = 0.1 * 10 ** (-15 / 20)  # the noise at which the bound is 15 dB
    rms = scene_of(Case.parse(CASE), 2, 5, 0).rms
    safe = sorted(t.strength * rms for t in found.tried if t.excluded)
    open_ = sorted(t.strength * rms for t in found.tried if t.verdict == "no bound excludes it")
    assert open_[-1] < needed <= safe[0] * 1.001
    assert safe[0] / open_[-1] <= 10 ** (1 / 8) * 1.01  # three bisections of a decade
    assert found.complete
    best = found.cheapest()
    assert best is not None
    assert best.accuracy == max(t.accuracy or 0 for t in found.tried if t.excluded)
    assert best.bound is not None
    assert best.bound <= 15


def test_without_a_bound_nothing_is_safe_however_badly_attacks_fail() -> None:
    found = search(only=["prune", "clip", "batch"])
    assert {t.verdict for t in found.tried} == {"no bound excludes it"}
    assert found.cheapest() is None
    assert "no bound excludes it" in found.answer()


def test_bounds_for_unbiased_attackers_do_not_count() -> None:
    found = search(only=["noise"], psnr=5.0)  # the bound for any attacker ends at 12 dB, the unbiased one at -20
    assert not any(t.excluded for t in found.tried)
    assert [t.strength for t in found.tried] == [0.1, 1.0, 10.0, 100.0]


@final
class OwnTraining(Defence):
    """A third party's local training, which says so by what it makes known."""

    paper: ClassVar[str] = "none"
    identity: ClassVar[str] = ""

    def wrap(self, step: Step) -> Step:
        trained = Protocol(epochs=2, learning_rate=0.1)
        return lambda round_: step(replace(round_, protocol=trained))

    def public(self, known: Knowledge) -> Knowledge:
        return known.without("local_steps") | Knowledge(epochs=2, learning_rate=0.1)


def test_the_server_goes_the_way_that_defences_make_known() -> None:
    scene = scene_of(Case.parse("digits:batch=8,width=32,activation=tanh"), 8, 60, 0)
    plain = scene.undefended(8)
    assert plain > 0.7
    assert scene.accuracy(8, ["local-steps:steps=0"]) == plain  # the declared identity
    assert scene.accuracy(8, ["local-steps:steps=2,learning_rate=0.1"]) > 0.7
    assert scene.accuracy(8, [OwnTraining()]) > 0.7
    assert scene.accuracy(8, [OwnTraining(), "noise:sigma=0"]) == scene.accuracy(8, [OwnTraining()])


@final
class Overclaims(Analysis):
    """A bound that does not hold."""

    paper: ClassVar[str] = "none"

    def run(self, view: View, at: tuple[Tensor, Tensor] | None, rng: torch.Generator) -> Sequence[Bound]:
        return [Bound(name="overclaim", value=0.25, scope="any", assumptions="none", source="none")]


def test_an_attack_that_succeeds_overrules_a_bound() -> None:
    case = Case.parse("digits:batch=1,width=16")
    found = harden(case, psnr=15, only=["clip"], attacks=["bias-ratio"], analyses=[Overclaims()], rounds=2)
    assert {t.verdict for t in found.tried} == {"leaks"}
    assert min(t.psnr or 0 for t in found.tried) > 80
    assert found.cheapest() is None
    assert "above what overclaim allows" in found.tried[0].words


def test_dp_sgd_answers_with_an_epsilon_for_the_training() -> None:
    found = search(only=["dp-sgd"], rounds=8)
    assert {t.family for t in found.tried} == {"dp-sgd", "dp-sgd, batch 16"}
    best = found.cheapest("whole training")
    assert best is not None
    assert best.epsilon is not None
    assert f"epsilon = {best.epsilon:.4g} at delta = 1e-05" in found.answer("whole training")
    assert all(t.epsilon for t in found.tried)
    by_noise = sorted((t for t in found.tried if t.family == "dp-sgd"), key=lambda t: t.strength)
    assert [t.epsilon for t in by_noise] == sorted((t.epsilon for t in by_noise), reverse=True)


def test_more_noise_costs_accuracy() -> None:
    scene = scene_of(Case.parse("digits:batch=8,width=32,activation=tanh"), 8, 150, 0)
    plain, noisy = scene.accuracy(8, []), scene.accuracy(8, [f"noise:sigma={100 * scene.rms}"])
    assert plain > 0.85
    assert noisy < 0.5
    assert scene.accuracy(8, []) == scene.undefended(8) == plain
    assert scene.accuracy(8, ["local-steps:steps=4,learning_rate=0.1"]) > 0.85
    assert scene.accuracy(8, [f"clip:norm={0.01 * scene.size}"]) > 0.8  # scale alone costs little


def test_a_model_that_opacus_cannot_train_is_said_to_be_so() -> None:
    found = harden(
        Case.parse("digits:batch=2,model=resnet-small,width=4"),
        psnr=15,
        only=["dp-sgd"],
        attacks=["label-count"],
        analyses=(),
        rounds=2,
    )
    assert [t.verdict for t in found.tried] == ["not possible"] * 2
    assert "BatchNorm" in found.tried[0].words


def test_time_ends_the_search_and_what_was_found_is_kept() -> None:
    seen: list[int] = []
    found = search(seconds=0.0, sink=lambda held: seen.append(len(held.tried)))
    assert not found.complete
    assert seen == [1]


def test_what_is_called_safe_does_not_depend_on_how_fast_the_machine_is() -> None:
    found = search(only=["noise"], seconds=1e-3)  # far too few for attacks; the one setting tried has its bound
    assert [tried.bound for tried in found.tried] == [t.bound for t in search(only=["noise"]).tried[:1]]
    assert found.tried[0].bound is not None


def test_ladders_and_what_lies_between() -> None:
    for family in families(scene_of(Case.parse(CASE), 2, 5, 0)):
        rising = family.ladder[0] < family.ladder[-1]
        assert list(family.ladder) == sorted(family.ladder, reverse=not rising)
    count = Family("steps", "steps", (2, 8), lambda scene, s: [], whole=True)
    assert count.between(2, 8) == 4
    assert count.between(2, 3) is None
    assert Family("share", "kept", (0.5, 0.1), lambda scene, s: []).between(0.1, 0.001) == pytest.approx(0.01)


def test_what_it_cannot_search(rng: torch.Generator) -> None:
    x = torch.rand(30, 1, 4, 4, generator=rng)
    model = small.build("mlp", (1, 4, 4), 1, width=4, rng=rng)
    images = Images(shape=(1, 4, 4))
    real = Setting(model=model, loss=loss_named("squared-error"), inputs=x, labels=x[:, 0, 0, 0], domain=images)
    with pytest.raises(ValueError, match="needs class labels"):
        harden(real, psnr=15)
    few = Setting(model=model, loss=loss_named("binary-cross-entropy"), inputs=x[:8], labels=torch.arange(8) % 2)
    with pytest.raises(ValueError, match="too few"):
        harden(few, psnr=15)
    for wrong in (
        {"psnr": float("nan")},
        {"psnr": float("inf")},
        {"seconds": float("nan")},
        {"rounds": 0},
        {"batch": 0},
    ):
        with pytest.raises(ValueError, match="make no search"):
            search(**wrong)
    with pytest.raises(ValueError, match="no family is called sigma; known: batch, clip, dp-sgd"):
        search(only=["sigma"])
    with pytest.raises(ValueError, match="unknown analysis 'faith'"):
        search(analyses=["faith"])


def test_a_released_model_is_refused_since_it_sends_no_updates() -> None:
    with pytest.raises(UnbatchError, match="sends no updates"):
        harden(Case.parse("trained:batch=4,width=4,steps=2"), psnr=15.0)


def test_the_command_writes_prints_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    words = ["harden", CASE, "--family", "clip", "--family", "prune", "--attack", "label-count", "--rounds", "3"]
    with pytest.raises(SystemExit) as stop:
        main([*words, "--analysis", "gradient-rank"])
    assert stop.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "no bound excludes it" in said
    assert "No setting tried is shown to keep every attacker to 15 dB over one update" in said
    held = Hardening.model_validate_json(Path("harden/harden.json").read_text())
    assert held.complete
    assert len(held.tried) == 7
    assert Path("harden/harden.png").stat().st_size > 5000
    rng = np.random.default_rng(0)
    np.savez("data.npz", inputs=rng.random((40, 3, 4, 4), dtype=np.float32), labels=np.arange(40) % 3)
    Path("own.py").write_text(
        "from torch import nn\n"
        "def net(): return nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.Tanh(), nn.Linear(8, 3))\n"
    )
    own = ["harden", "--model", "own:net", "--data", "data.npz", "--family", "clip", "--rounds", "2", "--force"]
    with pytest.raises(SystemExit):
        main([*own, "--attack", "label-count", "--analysis", "gradient-rank", "--batch", "3"])
    told = json.loads(Path("harden/harden.json").read_text())
    assert told["case"] == "own:net on data.npz"
    assert {t["batch"] for t in told["tried"]} == {3}
    assert Tried.model_validate(told["tried"][0]).verdict == "no bound excludes it"
