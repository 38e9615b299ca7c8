import json
import math
import sys

import pytest
import torch
from audits import captured, exact, features, not_recovered, nothing_ran

import unbatch
from unbatch import Case
from unbatch.analysis import Bound
from unbatch.files import write_atomically
from unbatch.reporting.gate import breaches
from unbatch.reporting.results import Audit, Example, Run, Status


@pytest.fixture(scope="module")
def record() -> Audit:
    return unbatch.audit(Case.parse("digits:clients=2,width=16"), attacks=["bias-ratio"])


def test_json_round_trips_with_a_schema_number(record: Audit, tmp_path) -> None:
    path = tmp_path / "deep" / "audit.json"
    record.save(path)
    assert json.loads(path.read_text())["schema_number"] == 1
    assert Audit.load(path) == record
    assert not list(path.parent.glob("*.tmp"))


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"{", "is no audit of unbatch"), (b'{"a": 1}', "is no audit"), (None, "cannot read"), (b"", "is no audit")],
)
def test_what_is_no_audit(tmp_path, content: bytes | None, words: str) -> None:
    path = tmp_path / "audit.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=words):
        Audit.load(path)


def test_another_schema_is_refused(record: Audit, tmp_path) -> None:
    record.model_copy(update={"schema_number": 99}).save(tmp_path / "a.json")
    with pytest.raises(ValueError, match="has schema 99; this version reads 1"):
        Audit.load(tmp_path / "a.json")


def test_a_full_disk_leaves_the_old_file_whole(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "audit.json"
    write_atomically(path, "old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("unbatch.files.os.fsync", full)
    with pytest.raises(ValueError, match=r"No space left on device.*is untouched"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["audit.json"]


def test_the_gate(record: Audit) -> None:
    assert breaches(record, max_recovered=2) == []
    assert "2 examples recovered exactly, at most 0" in breaches(record, max_recovered=0)[0]
    assert len(breaches(record, max_psnr=20)) == 2
    assert "dB" in breaches(record, max_psnr=20)[0]
    with pytest.raises(ValueError, match="needs a limit"):
        breaches(record)
    for limit in ("max_psnr", "require_bound_psnr"):
        with pytest.raises(ValueError, match="is nan, which every audit would pass"):
            breaches(record, **{limit: math.nan})


def test_the_gate_on_bounds(record: Audit) -> None:
    alone = record.model_copy(update={"clients": record.clients[:1]})

    def bounded(value: float, scope: str, **more: object) -> Audit:
        known = {"name": "B", "value": value, "scope": scope, "assumptions": "", "source": ""} | more
        return alone.model_copy(update={"bounds": [*alone.bounds, Bound.model_validate(known)]})

    def said(audit: Audit) -> list[str]:
        return breaches(audit, max_recovered=2, require_bound_psnr=20)

    assert said(alone) == ["no lower bound holds for any attacker; a bound of at most 20 dB is required."]
    assert said(bounded(0.2, "unbiased")) == said(alone)
    assert said(bounded(0.2, "any", covers="training")) == said(alone)  # who is in this update for sure is not covered
    assert "B, allows 26.0 dB" in said(bounded(0.05, "any"))[0]
    assert "B, allows inf dB" in said(bounded(0.0, "any"))[0]
    assert said(bounded(math.nan, "any")) == said(alone)
    assert said(bounded(0.2, "any")) == said(bounded(math.inf, "any")) == []
    assert len(breaches(bounded(0.2, "any"), max_recovered=0, require_bound_psnr=20)) == 1
    one = bounded(0.2, "any").bounds
    both = record.model_copy(update={"bounds": one})
    assert said(both) == ["no lower bound holds for any attacker of client 1; a bound of at most 20 dB is required."]
    weak = one[0].model_copy(update={"client": 1, "value": 0.05})
    assert "of client 1, B, allows 26.0 dB" in said(record.model_copy(update={"bounds": [*one, weak]}))[0]
    strong = weak.model_copy(update={"value": 0.3})
    assert said(record.model_copy(update={"bounds": [*one, weak, strong]})) == []


def test_every_client_has_bounds_of_its_own_and_old_records_are_those_of_the_first() -> None:
    settings = [Case.parse(f"digits:batch={n},width=16,activation=tanh").setting() for n in (8, 1)]
    made = unbatch.audit(
        settings, attacks=["label-count"], defences=["noise:sigma=0.003"], analyses=["van-trees", "gradient-rank"]
    )
    assert [bound.client for bound in made.bounds] == [0, 1]
    assert made.bounds[1].psnr > made.bounds[0].psnr + 5  # one alone is told more of
    assert len(made.risks) == 2
    between = (made.bounds[0].psnr + made.bounds[1].psnr) / 2
    assert ["client 1" in words for words in breaches(made, max_recovered=9, require_bound_psnr=between)] == [True]
    old = {"name": "B", "value": 0.2, "scope": "any", "assumptions": "", "source": ""}
    assert (Bound.model_validate(old).client, Bound.model_validate(old).covers) == (0, "update")


def test_an_audit_that_proves_nothing_does_not_pass(record: Audit) -> None:
    idle = unbatch.audit(Case.parse("digits:batch=2,width=16"), attacks=["bias-ratio"])
    assert "no attack could run" in breaches(idle, max_recovered=5)[0]
    assert "stopped before its end" in breaches(record.model_copy(update={"complete": False}), max_recovered=5)[0]
    failed = record.model_copy(deep=True)
    failed.runs[0].status = Status.FAILED
    assert "failed" in breaches(failed, max_recovered=5)[0]
    unscored = record.model_copy(update={"metrics": {}})
    with pytest.raises(ValueError, match="no psnr"):
        breaches(unscored, max_psnr=20)


def test_failed_examples_count_in_the_worst_case(record: Audit) -> None:
    worst = record.worst("psnr")
    assert set(worst) == {(0, 0), (1, 0)}
    assert all(hit is not None and hit[0] > 100 for hit in worst.values())


def test_among_exact_recoveries_a_certified_one_stands_for_the_example(record: Audit) -> None:
    run = next(run for run in record.runs if run.client == 0 and run.examples)
    near = run.examples[0].model_copy(update={"error": 1e-9, "scores": {"psnr": 190.0}, "bound": None})
    sure = near.model_copy(update={"error": 1e-7, "scores": {"psnr": 150.0}, "bound": 1e-6})
    far = near.model_copy(update={"error": 1e-1, "scores": {"psnr": 20.0}, "bound": 0.5})

    def hit(*examples: Example) -> float:
        runs = [run.model_copy(update={"examples": [e]}) for e in examples]
        found = record.model_copy(update={"runs": runs}).worst("psnr")[0, near.index]
        assert found is not None
        return found[0]

    assert hit(near, sure) == hit(sure, near) == 150.0
    assert hit(near, far) == hit(far, near) == 190.0


def test_only_its_owner_reads_an_audit(record: Audit, tmp_path) -> None:
    record.save(tmp_path / "audit.json")
    assert (tmp_path / "audit.json").stat().st_mode & 0o777 == 0o600
    write_atomically(tmp_path / "open.json", "{}")
    assert (tmp_path / "open.json").stat().st_mode & 0o777 == 0o644


def test_a_frame_has_one_row_an_example_per_run() -> None:
    audit = not_recovered()
    frame = audit.to_frame()
    assert len(frame) == len(audit.rows()) == 5
    assert list(frame["attack"]) == ["matching"] * 4 + ["labels"]
    assert list(frame["psnr"].dropna()) == [12.0, 9.0]
    assert list(frame["chance psnr"][:4]) == [11.5] * 4
    assert {str(frame[name].dtype) for name in ("psnr", "error", "bound", "residual", "chance l2-error")} == {"float64"}
    assert frame["recovered"].sum() == 0
    assert list(exact().to_frame()["recovered"]) == [True, False]
    assert not features().to_frame()["recovered"].any()


def test_a_run_that_failed_has_its_rows() -> None:
    frame = nothing_ran().to_frame()
    assert list(frame["status"]) == ["not applicable"] * 2 + ["failed"] * 2
    assert list(frame["example"]) == [0, 1, 0, 1]
    assert frame["psnr"].isna().all()
    alone = captured().model_copy(update={"runs": nothing_ran().runs})
    assert [(row["example"], row["status"]) for row in alone.rows()] == [(None, "not applicable"), (None, "failed")]
    assert len(alone.to_frame()) == 2
    assert len(alone.model_copy(update={"runs": []}).to_frame()) == 0


def test_a_frame_says_what_it_needs(record: Audit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(
        unbatch.UnbatchError, match=r"needs pandas, which is not installed: pip install 'unbatch\[pandas\]'"
    ):
        record.to_frame()
    assert len(record.rows()) == 2


def test_the_privacy_of_a_client_is_one_class_and_old_records_of_it_are_read(record: Audit) -> None:
    spent = unbatch.Privacy(clip=1.0, noise_multiplier=1.0, sampling_rate=1.0, steps=9, delta=1e-5, epsilon=math.inf)
    told = record.model_copy(update={"privacy": spent}).model_dump_json()
    assert Audit.model_validate_json(told).privacy == spent
    stored = json.loads(told) | {
        "privacy": {  # as written when the record had a class of its own
            "epsilon": "Infinity",
            "delta": 1e-5,
            "noise_multiplier": 1.0,
            "clip": 1.0,
            "sampling_rate": 1.0,
            "steps": 9,
            "accountant": "",
        }
    }
    assert Audit.model_validate_json(json.dumps(stored)).privacy == spent
    stored["privacy"]["budget"] = 1
    with pytest.raises(ValueError, match=r"privacy\.budget"):
        Audit.model_validate_json(json.dumps(stored))


def test_a_run_s_status_is_one_of_six(record: Audit) -> None:
    stored = record.runs[0].model_dump(mode="json")
    assert stored["status"] == "done"
    assert [Run.model_validate(stored | {"status": s.value}).ran for s in Status] == [True, True] + [False] * 4
    assert [Run.model_validate(stored | {"status": s.value}).finished for s in Status] == [True, False, True] + [
        False
    ] * 3
    with pytest.raises(ValueError, match="status"):
        Run.model_validate(stored | {"status": "finished"})


@pytest.mark.parametrize(
    ("shape", "noun"), [((6,), "row"), ((2, 4, 4, 4), "example"), ((3, 16), "example"), ((1, 4, 4), "image")]
)
def test_only_what_has_one_dimension_is_called_a_row(shape: tuple[int, ...], noun: str) -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(math.prod(shape), 3))
    setting = unbatch.Setting(
        model=model, loss=torch.nn.functional.cross_entropy, inputs=torch.rand(1, *shape), labels=torch.tensor([1])
    )
    record = unbatch.audit(setting, attacks="bias-ratio", analyses=())
    assert record.noun == noun
    assert noun in record.verdict()
