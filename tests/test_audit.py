"""The audit: judging, chance, resuming, failing attacks, captured updates."""

import pkgutil
from typing import Annotated, ClassVar, final

import pytest
import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

import unbatch
from unbatch import Attack, Case, Knowledge, NotApplicable, Observation, Protocol, Reconstruction, Setting, observe
from unbatch.analysis import Analysis, Verdict
from unbatch.attack import NOTHING, ActiveAttack, Demo, Guarantee
from unbatch.auditing.suites import passive
from unbatch.inversion.view import View
from unbatch.progress import Watch, afford_or_leave, tick
from unbatch.reporting.results import Audit

CALLS: list[int] = []


@final
class Chosen(Attack):
    """Returns what a test puts into it: an attack that cheats, fails or stops, to see that the judge notices."""

    family: ClassVar[str] = "test"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT
    paper: ClassVar[str] = "none"
    uses: ClassVar[frozenset[str]] = frozenset({"labels"})
    demo: ClassVar[Demo] = Demo(case="digits")
    answers: ClassVar[dict[str, Reconstruction]] = {}

    answer: Annotated[str, Field(description="which")] = "none"

    def run(self, view: View, rng: torch.Generator) -> Reconstruction:
        if self.answer == "obstacle":
            raise NotApplicable("it cannot.")
        CALLS.append(1)
        if self.answer == "fail":
            raise RuntimeError("bang")
        if self.answer == "slow":
            assert not tick(0.5, best=0.25)
            return self.answers["right"]
        return self.answers[self.answer]


@pytest.fixture(scope="module")
def setting() -> Setting:
    made = Case.parse("digits:batch=3,width=16").setting()
    x, y = made.inputs, made.labels
    zero, wide = torch.zeros(3).double(), torch.full((3,), torch.inf).double()
    Chosen.answers.update(
        right=Reconstruction(inputs=x.flip(0), labels=y.flip(0), bound=zero + 1e-3),
        wrong=Reconstruction(inputs=x + 0.3, labels=y, bound=zero + 1e-3),
        guess=Reconstruction(inputs=x + 0.3, labels=y, bound=wide),
        half=Reconstruction(inputs=x[:1], labels=y[:1], bound=zero[:1] + 1e-3),
        labels=Reconstruction(inputs=None, labels=y, bound=zero),
        nan=Reconstruction(inputs=x * torch.nan, bound=zero),
        shape=Reconstruction(inputs=x.flatten(1), bound=zero),
        naked=Reconstruction(inputs=x),
        empty=Reconstruction(inputs=x[:0], labels=y[:0], bound=zero[:0], trace={"stopped": "no layer told them."}),
    )
    return made


def one(setting: Setting, answer: str, **options) -> Audit:
    return unbatch.audit(setting, attacks=[Chosen(answer=answer)], **options)


def test_a_right_answer_in_another_order(setting: Setting) -> None:
    record = one(setting, "right")
    assert record.recovered() == {(0, 0), (0, 1), (0, 2)}
    assert "3 of 3 private images recovered exactly" in record.verdict()
    assert [e.scores["label-accuracy"] for e in record.runs[0].examples] == [1, 1, 1]
    assert record.runs[0].residual == pytest.approx(0, abs=1e-6)
    assert not record.flags
    assert record.complete


def test_a_wrong_claim_is_withdrawn_and_said_so(setting: Setting) -> None:
    record = one(setting, "wrong")
    assert record.recovered() == set()
    assert not {f.name for f in record.flags} & {"exact-claim-fails", "bound-violated"}
    assert [e.bound for e in record.runs[0].examples] == [None] * 3
    assert "3 claims were withdrawn by the second judge" in record.runs[0].words
    assert any(record.runs[0].words in note for note in record.notes)
    assert not one(setting, "guess").runs[0].words


def test_unmatched_examples_score_null_not_zero(setting: Setting) -> None:
    record = one(setting, "half")
    scores = [e.scores["psnr"] for e in record.runs[0].examples]
    assert scores[1:] == [None, None]
    assert scores[0] > 100
    assert record.worst("psnr")[0, 1] is None
    assert record.recovered() == {(0, 0)}


def test_labels_alone_leave_pictures_unscored(setting: Setting) -> None:
    run = one(setting, "labels").runs[0]
    assert "psnr" not in run.examples[0].scores
    assert run.examples[0].scores["label-accuracy"] == 1
    assert run.examples[0].picture is None


@pytest.mark.parametrize(
    ("answer", "words"), [("nan", "not finite"), ("shape", "of shape (64,)"), ("naked", "no bound"), ("fail", "bang")]
)
def test_a_failing_attack_is_recorded_and_stops_nothing(setting: Setting, answer: str, words: str) -> None:
    record = unbatch.audit(setting, attacks=[Chosen(answer=answer), Chosen(answer="right")])
    assert record.runs[0].status == "failed"
    assert words in record.runs[0].words  # of its shape too, although this attack is not handed input_shape
    assert record.runs[1].status == "done"
    assert len(record.recovered()) == 3


def test_obstacles_are_words_in_the_record(setting: Setting) -> None:
    record = one(setting, "obstacle")
    assert (record.runs[0].status, record.runs[0].words) == ("not applicable", "it cannot.")
    assert "not safety" in record.verdict()


def test_a_run_that_returns_nothing_says_why_and_no_guess_is_spoken_of(setting: Setting) -> None:
    record = one(setting, "empty")
    assert (record.runs[0].status, record.runs[0].words) == ("done", "no layer told them.")
    assert record.verdict().endswith("recovered by 1 run; no guess was returned.")
    assert "nearest guesses" in one(setting, "guess").verdict()


def test_chance_uses_as_many_guesses_and_the_same_matching(setting: Setting) -> None:
    few = [e.chance["psnr"] for e in one(setting, "half").runs[0].examples]
    many = [e.chance["psnr"] for e in one(setting, "right").runs[0].examples]
    assert sum(c is not None for c in few) == 1
    assert all(c is not None and 0 < c < 20 for c in many)


def test_finished_runs_are_sunk_one_by_one_and_a_resumed_audit_repeats_none(setting: Setting, tmp_path) -> None:
    seen: list[int] = []

    def sink(record: Audit) -> None:
        seen.append(len(record.runs))
        record.save(tmp_path / "audit.json")
        if len(record.runs) == 2:
            raise KeyboardInterrupt

    attacks = [Chosen(answer=a) for a in ("right", "wrong", "half")]
    with pytest.raises(KeyboardInterrupt):
        unbatch.audit(setting, attacks=attacks, sink=sink)
    before = Audit.load(tmp_path / "audit.json")
    assert (len(before.runs), before.complete) == (2, False)
    CALLS.clear()
    after = unbatch.audit(setting, attacks=attacks, resume=before)
    assert len(CALLS) == 1
    assert [run.attack for run in after.runs] == [str(a) for a in attacks]
    assert after.runs[:2] == before.runs
    assert after.complete


def test_an_audit_that_is_resumed_with_other_attacks_keeps_what_was_found(setting: Setting) -> None:
    before = one(setting, "right")
    after = unbatch.audit(setting, attacks=[Chosen(answer="labels")], seeds=[4], resume=before)
    assert after.runs[:1] == before.runs
    assert [(run.attack, run.seed) for run in after.runs] == [("chosen:answer=right", 0), ("chosen:answer=labels", 4)]
    assert set(after.attacks) == {run.attack for run in after.runs}
    assert set(after.seeds) == {0, 4}
    assert after.verdict() == before.verdict()


def test_an_audit_of_something_else_is_not_resumed(setting: Setting) -> None:
    before = one(setting, "right")
    other = Case.parse("digits:batch=3,width=16,seed=1").setting()
    with pytest.raises(ValueError, match="of another model, batch, protocol or defence"):
        unbatch.audit(other, attacks=[Chosen(answer="right")], resume=before)
    with pytest.raises(ValueError, match="of another"):
        unbatch.audit(setting, attacks=[], defences=["clip:norm=1"], resume=before)


def test_budget_and_stop_end_a_run_with_the_best_it_has(setting: Setting) -> None:
    record = one(setting, "slow", budget=1e-9)
    assert record.runs[0].status == "cut short"
    assert len(record.recovered()) == 3
    assert "search-not-converged" in {f.name for f in record.flags}
    watch = Watch()
    watch.listener = lambda share, best: setattr(watch, "stop", True)
    attacks = [Chosen(answer="slow"), Chosen(answer="right")]
    stopped = unbatch.audit(setting, attacks=attacks, analyses=(), watch=watch)
    assert [run.status for run in stopped.runs] == ["cut short"]
    assert not stopped.complete


@final
class Patient(Analysis):
    """Counts to `steps`, a tick for each, and says how far it came: to see that it is watched."""

    paper: ClassVar[str] = "none"

    steps: Annotated[int, Field(description="ticks")] = 100
    dear: Annotated[float, Field(description="operations in one piece, before the first of them")] = 0.0
    fails: Annotated[str, Field(description="what it raises at the end")] = ""

    def run(self, view: View, at: tuple[torch.Tensor, torch.Tensor] | None, rng: torch.Generator) -> list[Verdict]:
        if self.dear:
            afford_or_leave(self.dear, "a step of many operations")
        done = 0
        while done < self.steps and tick(done / self.steps):
            done += 1
        if self.fails:
            raise {"defect": RuntimeError, "silent": NotApplicable}[self.fails]("it is so.")
        return [Verdict(name="steps", value=done, words="made.")]


def patient(setting: Setting, *analyses: Patient, **options) -> Audit:
    return unbatch.audit(setting, attacks=[], analyses=analyses, **options)


def test_an_analysis_obeys_the_budget_and_keeps_what_it_has(setting: Setting) -> None:
    spent = patient(setting, Patient(), Patient(dear=1e12), Patient(), budget=1e-9)
    assert [each.status for each in spent.analyses] == ["cut short"] * 3
    assert "a step of many operations" in spent.analyses[1].words
    assert [(v.name, v.value, v.analysis) for v in spent.verdicts] == [("steps", 0, "patient")] * 2
    assert spent.complete
    calm = patient(setting, Patient(), Patient(dear=1e12))
    assert [each.status for each in calm.analyses] == ["done"] * 2
    assert [v.value for v in calm.verdicts] == [100, 100]
    assert calm.shortened() == []


def test_an_analysis_is_heard_and_stopped_by_the_watch(setting: Setting) -> None:
    heard: list[float] = []
    names: list[str] = []

    def listen(share: float, best: float | None) -> None:
        heard.append(share)
        watch.stop = len(heard) == 8

    watch = Watch(listener=listen)
    record = patient(setting, Patient(steps=5), Patient(steps=7), Patient(steps=9), watch=watch, announce=names.append)
    assert heard == [0, 1 / 5, 2 / 5, 3 / 5, 4 / 5, 0, 1 / 7, 2 / 7]
    assert [v.value for v in record.verdicts] == [5, 2]
    assert [each.status for each in record.analyses] == ["done", "cut short"]
    assert names == ["patient:steps=5, client 0", "patient:steps=7, client 0"]
    assert not record.complete


def test_what_analyses_say_is_sunk_one_by_one(setting: Setting) -> None:
    seen: list[list[float]] = []

    def sink(record: Audit) -> None:
        seen.append([v.value for v in record.verdicts])

    patient(setting, Patient(steps=1), Patient(steps=2), sink=sink)
    assert seen == [[1], [1, 2], [1, 2]]


def test_default_analyses_share_their_time_and_named_ones_take_what_they_need(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unbatch.auditing.findings.SHARED_SECONDS", 0.0)
    plain = unbatch.audit(setting, attacks=[])
    named = unbatch.audit(setting, attacks=[], analyses=["safer-design", "security-metric"])
    free = unbatch.audit(setting, attacks=[], budget=float("inf"))
    assert [each.analysis for each in plain.analyses] == sorted(
        name for name, analysis in Analysis.find().items() if "update" in analysis.sees
    )
    assert "security-metric" in {each.title for each in plain.shortened()}
    assert not any(v.name == "determined share" for v in plain.verdicts)
    for record in (named, free):
        assert record.shortened() == []
        assert any(v.name == "determined share" for v in record.verdicts)


def test_a_silent_analysis_is_on_record_and_a_failing_one_stops_nothing(setting: Setting) -> None:
    named = patient(setting, Patient(fails="silent"), Patient(fails="defect"), Patient())
    assert [each.status for each in named.analyses] == ["not applicable", "failed", "done"]
    assert named.notes == ["patient: it is so.", "patient: RuntimeError: it is so."]
    assert len(named.verdicts) == 1
    plain = unbatch.audit(setting, attacks=[], budget=float("inf"))
    assert plain.notes == []
    assert {each.title for each in plain.silent()} >= {"van-trees", "cramer-rao", "dp-reconstruction"}
    assert "no Gaussian noise" in next(each.words for each in plain.silent() if each.title == "van-trees")


def test_an_audit_of_before_analyses_were_watched_is_read(setting: Setting) -> None:
    told = patient(setting, Patient()).model_dump(mode="json")
    del told["analyses"]
    again = Audit.model_validate(told)
    assert (again.analyses, again.silent(), again.shortened()) == ([], [], [])


def test_the_default_analyses_of_one_audit_look_once(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the layers' constraints and at the determined share, which several of them tell."""
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(4 * 36, 3))
    x, y = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1])
    looks: list[str] = []
    for place, name in (("analyses.layer_equations", "constraints"), ("analyses.security_metric", "constraints")):
        whole = f"unbatch.{place}.{name}"
        monkeypatch.setattr(whole, heard(looks, name, whole))
    for module in ("security_metric", "safer_design"):
        monkeypatch.setattr(
            f"unbatch.analyses.{module}.share", heard(looks, "share", f"unbatch.analyses.{module}.share")
        )
    chains = heard(looks, "chain", "unbatch.inversion.view.chain")
    monkeypatch.setattr("unbatch.inversion.view.chain", chains)
    own = Setting(model=net, loss=F.cross_entropy, inputs=x, labels=y, protocol=Protocol(mode="eval"))
    unbatch.audit(own, attacks=[], budget=float("inf"))
    assert looks.count("constraints") == 1
    assert looks.count("chain") == 1
    changed = 3  # the stride, the channels, pooling
    assert looks.count("share") == 1 + changed


def heard(looks: list[str], name: str, place: str):
    """The function at `place`, which notes in `looks` that it was called."""
    whole = pkgutil.resolve_name(place)

    def call(*args, **options):
        looks.append(name)
        return whole(*args, **options)

    return call


def test_several_clients_and_seeds() -> None:
    record = unbatch.audit(Case.parse("digits:clients=3,width=16"), attacks=["bias-ratio"], seeds=(0, 1))
    assert [(run.client, run.seed) for run in record.runs] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert len(record.recovered()) == 3
    assert record.size == 3


def test_an_attack_is_handed_only_what_it_declares(setting: Setting) -> None:
    class Nosy(Attack):
        """Reads what it did not declare."""

        family: ClassVar[str] = "test"
        guarantee: ClassVar[Guarantee] = Guarantee.HEURISTIC
        paper: ClassVar[str] = "none"
        demo: ClassVar[Demo] = Demo(case="digits")

        def run(self, view: View, rng: torch.Generator) -> Reconstruction:
            return Reconstruction(inputs=None, labels=view.knowledge.labels)

    told = Setting(
        model=setting.model,
        loss=setting.loss,
        inputs=setting.inputs,
        labels=setting.labels,
        knowledge=Knowledge(labels=setting.labels),
    )
    record = unbatch.audit(told, attacks=[Nosy()])
    assert record.runs[0].status == "failed"
    assert "does not know 'labels'" in record.runs[0].words


def test_an_active_attack_plants_its_model(setting: Setting) -> None:
    class Planted(ActiveAttack):
        """Sees its own parameters."""

        family: ClassVar[str] = "test"
        guarantee: ClassVar[Guarantee] = Guarantee.HEURISTIC
        paper: ClassVar[str] = "none"
        demo: ClassVar[Demo] = Demo(case="digits")

        def plant(self, model: nn.Module, rng: torch.Generator, known: Knowledge = NOTHING) -> nn.Module:
            copy = Case.parse("digits:batch=3,width=16").setting().model
            copy.load_state_dict({k: torch.zeros_like(v) for k, v in model.state_dict().items()})
            return copy

        def run(self, view: View, rng: torch.Generator) -> Reconstruction:
            assert not any(p.any() for p in view.model.parameters())
            return Reconstruction(inputs=None, labels=torch.tensor([0]))

    record = unbatch.audit(setting, attacks=[Planted()])
    assert record.runs[0].status == "done", record.runs[0].words
    assert "malicious server" in record.runs[0].threat_model


def test_features_are_judged_against_true_features() -> None:
    record = unbatch.audit(Case.parse("digits:model=lenet,activation=tanh"), attacks=["bias-ratio"])
    run = record.runs[0]
    assert run.layer
    assert run.examples[0].error < 1e-4
    assert run.examples[0].scores == {}
    assert record.recovered() == set()
    assert "exact features of 1" in record.verdict()


def test_a_client_that_is_not_reproducible_is_flagged() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.5), nn.Linear(5, 3))
    x, y = torch.rand(2, 6, generator=torch.Generator()), torch.tensor([0, 2])
    setting = Setting(model=model, loss=F.cross_entropy, inputs=x, labels=y, protocol=Protocol(mode="train"))
    assert "client-not-reproducible" in {f.name for f in unbatch.audit(setting, attacks=[]).flags}
    calm = Setting(model=model, loss=F.cross_entropy, inputs=x, labels=y, protocol=Protocol(mode="eval"))
    assert not unbatch.audit(calm, attacks=[]).flags


def test_a_captured_update_has_no_scores_but_bounds_residual_and_notes() -> None:
    setting = Case.parse("photos:width=16").setting()
    obs, _ = observe(setting.model, setting.loss, setting.inputs, setting.labels)
    record = unbatch.audit(obs, attacks=["bias-ratio"])
    assert not record.truth
    assert record.runs[0].examples[0].bound < 1e-5
    assert record.runs[0].examples[0].scores == {}
    assert record.runs[0].examples[0].picture
    assert record.runs[0].residual < 1e-4
    assert record.notes == []
    assert "1 image certified" in record.verdict()
    flipped = Observation(
        model=obs.model, loss=obs.loss, update={k: -0.05 * v for k, v in obs.update.items()}, knowledge=obs.knowledge
    )
    assert any("learning rate 0.05" in note for note in unbatch.audit(flipped, attacks=["bias-ratio"]).notes)
    with pytest.raises(ValueError, match="already has its defences"):
        unbatch.audit(obs, attacks=[], remedies=["clip:norm=1"])


def test_remedies_are_measured_beside() -> None:
    record = unbatch.audit(
        Case.parse("digits:width=16"), attacks=["bias-ratio"], remedies=["noise:sigma=0.1", "clip:norm=0.1"]
    )
    noise, clip = record.remedies
    assert (noise.defence, noise.recovered, noise.size) == ("noise:sigma=0.1,relative=false", 0, 1)
    assert clip.recovered == 1  # clipping alone hides nothing
    assert clip.psnr > 80


def test_a_resumed_audit_keeps_its_remedies() -> None:
    case, ran = Case.parse("digits:width=16"), []
    first = unbatch.audit(case, attacks=["bias-ratio"], analyses=(), remedies=["clip:norm=0.1"])
    asked = {"attacks": ["bias-ratio"], "analyses": (), "resume": first, "announce": ran.append}
    again = unbatch.audit(case, remedies=["clip:norm=0.1", "noise:sigma=0.1"], **asked)
    assert again.remedies[0] == first.remedies[0]
    assert [each.defence.partition(":")[0] for each in again.remedies] == ["clip", "noise"]
    assert not [words for words in ran if "clip" in words]  # nothing twice
    assert unbatch.audit(case, **asked).remedies == first.remedies  # and nothing lost


def test_the_server_is_not_told_a_range_read_off_the_private_batch() -> None:
    x, y = 7 * torch.rand(2, 6, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1])
    record = unbatch.audit(Setting(model=nn.Linear(6, 3), loss=F.cross_entropy, inputs=x, labels=y), attacks=[])
    assert "input_range" not in record.knowledge
    assert "input_range" in unbatch.audit(Case.parse("digits"), attacks=[]).knowledge


def test_a_model_of_tokens_is_audited_and_refused_in_words(rng: torch.Generator) -> None:
    model = nn.Sequential(nn.Embedding(20, 4), nn.Flatten(), nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 3))
    x, y = torch.randint(20, (2, 6), generator=rng), torch.tensor([1, 2])
    client = Setting(model=model, loss=nn.functional.cross_entropy, inputs=x, labels=y)
    attacks = passive()
    record = unbatch.audit(client, attacks=attacks)
    assert len(record.runs) == len(attacks)
    assert {run.status for run in record.runs if run.family != "labels"} == {"not applicable"}
    assert all("token" in run.words for run in record.runs if run.status == "not applicable")
    assert "failed" not in {done.status for done in record.analyses}
    assert {risk.layer for risk in record.risks} == {"0", "2", "4"}  # what the gradients' ranks say holds all the same
    assert not [note for note in record.notes if not note.startswith("label-count")]
