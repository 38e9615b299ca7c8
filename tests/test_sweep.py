"""Sweeps: the plan is the audit's own options, each run is kept once, a failure is a row, all engines give one table."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

import unbatch
from unbatch import UnbatchError
from unbatch.adapters.engines import engine
from unbatch.auditing.sweep import Job, run_jobs
from unbatch.command.cli import app, main
from unbatch.command.plan import jobs_of
from unbatch.reporting.gate import folder_breaches
from unbatch.reporting.query import Query
from unbatch.reporting.results import Audit
from unbatch.reporting.trial import Trial, audit_at
from unbatch.reporting.trials import Trials

AUDIT = typer.main.get_command(app).commands["audit"]
QUICK = {"attack": "bias-ratio", "analysis": "gradient-rank", "metric": "psnr"}
SAME = "select * exclude (seconds) from runs order by all"
STACK = "clip:norm=1,noise:sigma=0.01"


def spelt(plan: Mapping[str, Any]) -> list[str]:
    return [job.trial().command.removeprefix("unbatch audit ") for job in jobs_of(plan, AUDIT)]


def said(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, " ".join(err.split())


def test_a_list_is_an_axis_and_an_inner_list_runs_together() -> None:
    plan = {"case": "digits:width=8", "attack": [["unmix", "bias-ratio"], "unmix"], "seed": [0, 1]}
    assert spelt(plan) == [
        "digits:width=8 --attack unmix --attack bias-ratio --seed 0",
        "digits:width=8 --attack unmix --attack bias-ratio --seed 1",
        "digits:width=8 --attack unmix --seed 0",
        "digits:width=8 --attack unmix --seed 1",
    ]


def test_defences_in_one_text_are_a_stack_and_an_empty_text_is_none() -> None:
    plan = {"case": "digits:width=8", "defence": ["", STACK, ["clip", "noise"], "prune:share=0.5", "clip,noise"]}
    assert spelt(plan) == [
        "digits:width=8",
        "digits:width=8 --defence clip:norm=1 --defence noise:sigma=0.01",
        "digits:width=8 --defence clip --defence noise",
        "digits:width=8 --defence prune:share=0.5",
    ]


def test_every_option_of_an_audit_that_names_its_target_or_its_ways_is_a_key(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(torch.nn.Linear(4, 2).state_dict(), "captured.pt")
    plan = {
        "model": "nets:small",
        "observation": "captured.pt",
        "as": "weights",
        "scale": -1,
        "knows": [["labels", "mode=eval"]],
    }
    (job,) = jobs_of(plan, AUDIT)
    assert spelt(plan) == [
        "--model nets:small --observation captured.pt --as weights --scale -1 --knows labels --knows mode=eval"
    ]
    assert job.given["as_"] == "weights"
    assert job.given["observation"] == tmp_path / "captured.pt"
    spellings = {param.opts[0].removeprefix("--") for param in AUDIT.params}
    with pytest.raises(UnbatchError) as refused:
        jobs_of({"nothing": 1}, AUDIT)
    known = set(str(refused.value).partition("Known: ")[2].rstrip(".").split(", "))
    assert spellings - known == {
        "out",
        "resume",
        "force",
        "save-images",
        "no-private",
        "no-appendix",
        "auditor",
        "json",
        "quiet",
    }


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ({"case": "digits", "defense": "clip"}, "Did you mean 'defence'?"),
        ({"case": "digits", "out": "here"}, "not of one audit"),
        ({"case": "digits", "seed": -1}, "-1 is not in the range"),
        ({"case": "digits", "budget": 0}, "0 is no time"),
        ({"case": "digits", "batch": 4}, "write it as digits:batch=4"),
        ({"case": "digits", "attack": "unmx"}, "Did you mean 'unmix'?"),
        ({"case": "digits", "defence": "noise:sigma=-1"}, "sigma"),
        ({"case": ["digits", ["digits"]]}, "one audit takes one"),
        ({"case": "digits", "seed": True}, "neither words nor a number"),
        ({"case": "digits", "seed": []}, "seed has no value"),
        ({}, "the plan is empty"),
        ({"model": "nets:a"}, "--model alone is not enough"),
    ],
)
def test_a_plan_that_is_wrong_is_refused_before_anything_runs(plan: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UnbatchError, match=words.replace("?", r"\?")):
        unbatch.sweep(plan, out=tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()


def test_what_was_run_is_kept_and_what_is_new_is_added(tmp_path: Path) -> None:
    plan = QUICK | {"case": ["digits:width=8", "digits:batch=2,width=8"]}
    told = list[Trial]()
    first = unbatch.sweep(plan, out=tmp_path, jobs=1, announce=told.append)
    stamps = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.json") if path.stem != "sweep"}
    assert [trial.title.partition(",")[0] for trial in told] == ["digits:width=8", "digits:batch=2"]
    assert len(stamps) == 2
    more = unbatch.sweep(plan | {"seed": ["", 1]}, out=tmp_path, jobs=1)
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in stamps} == stamps
    assert len(more.current) == 4
    assert more.current[0].key == first.current[0].key
    assert oct((tmp_path / f"{first.current[0].key}.json").stat().st_mode)[-3:] == "600"


def test_other_code_and_other_files_are_other_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    nets = tmp_path / "netsofsweep.py"
    nets.write_text("from torch import nn\n\ndef small():\n    return nn.Linear(4, 2)\n")
    plan = {"model": "netsofsweep:small", "data": "table.csv"}
    table = tmp_path / "table.csv"
    table.write_text("a,b,c,d,label\n1,2,3,4,0\n2,3,4,6,1\n")
    keys = [jobs_of(plan, AUDIT)[0].key]
    assert jobs_of(plan, AUDIT)[0].key == keys[0]
    table.write_text("a,b,c,d,label\n1,2,3,4,0\n2,3,4,7,1\n")
    keys.append(jobs_of(plan, AUDIT)[0].key)
    nets.write_text(nets.read_text() + "\n\n# changed\n")
    keys.append(jobs_of(plan, AUDIT)[0].key)
    monkeypatch.setattr("unbatch.command.plan.code_hash", lambda: "other")
    keys.append(jobs_of(plan, AUDIT)[0].key)
    assert len(set(keys)) == 4


def test_a_configuration_that_fails_is_a_row_and_stops_no_other(tmp_path: Path, capsys) -> None:
    plan = QUICK | {"case": "digits:width=8", "protocol": ["learning_rate=0.1", ""]}
    found = unbatch.sweep(plan, out=tmp_path, jobs=1)
    assert [trial.failed for trial in found.current] == [True, False]
    rows = found.rows()
    assert [row["status"] for row in rows] == ["failed", "done"]
    assert "would not be used" in rows[0]["words"]
    assert folder_breaches(found, max_recovered=9) == [
        f"digits:width=8, attack bias-ratio, analysis gradient-rank, metric psnr, protocol learning_rate=0.1: came to no "
        f"audit: {rows[0]['words']}"
    ]
    assert said(capsys, "gate", tmp_path, "--max-recovered", "9")[0] == 1
    code, _, err = said(capsys, "report", tmp_path / f"{found.failed[0].key}.json")
    assert code == 2
    assert "holds no audit" in err


def test_what_has_not_run_is_told_and_passes_no_gate(tmp_path: Path, capsys) -> None:
    plan = QUICK | {"case": "digits:width=8", "seed": [0, 1]}
    first, second = unbatch.sweep(plan, out=tmp_path, jobs=1).current
    assert said(capsys, "gate", tmp_path, "--max-recovered", "1") == (0, "within the limits\n", "")
    (tmp_path / f"{second.key}.json").unlink()
    held = Trials.at(tmp_path)
    assert [trial.key for trial in held.missing] == [second.key]
    assert [row["status"] for row in held.rows()] == ["done", "not run"]
    code, _, err = said(capsys, "gate", tmp_path, "--max-recovered", "1")
    assert code == 1
    assert "has not run" in err
    assert "1 configuration has not run" in said(capsys, "table", tmp_path)[2]
    assert said(capsys, "gate", tmp_path / f"{first.key}.json", "--max-recovered", "0")[0] == 1


def test_a_gate_names_the_configuration_that_breaches_it(tmp_path: Path, capsys) -> None:
    unbatch.sweep(QUICK | {"case": "digits:width=8", "defence": ["", "noise:sigma=0.1"]}, out=tmp_path, jobs=1)
    code, _, err = said(capsys, "gate", tmp_path, "--max-recovered", "0")
    assert code == 1
    assert "metric psnr: 1 example recovered exactly, at most 0 allowed." in err
    assert err.count("recovered exactly") == 1


def test_results_of_older_code_stand_aside(tmp_path: Path) -> None:
    plan = QUICK | {"case": "digits:width=8"}
    (trial,) = unbatch.sweep(plan, out=tmp_path, jobs=1).current
    old = trial.model_copy(update={"key": "0" * 16, "code": "older", "created": "2020-01-01"})
    old.save(tmp_path)
    gone = old.model_copy(update={"key": "1" * 16, "configuration": {"case": "tables"}})
    gone.save(tmp_path)
    held = Trials.at(tmp_path)
    assert [one.key for one in held.current] == [trial.key]
    assert [one.key for one in held.earlier] == [old.key]
    (tmp_path / f"{trial.key}.json").unlink()
    held = Trials.at(tmp_path)
    assert (len(held.current), len(held.earlier), len(held.missing)) == (0, 1, 1)


def test_a_job_s_threads_are_its_own(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    (trial,) = unbatch.sweep(QUICK | {"case": "digits:width=8"}, out=tmp_path, jobs=1, threads=3).current
    assert trial.audit is not None
    assert trial.audit.environment["threads"] == "3"
    assert trial.audit.environment["command"] == trial.command
    assert torch.get_num_threads() == before


def test_a_budget_is_of_each_run(tmp_path: Path) -> None:
    plan = {
        "case": "digits:batch=2,width=16",
        "attack": "gradient-matching",
        "budget": 1e-9,
        "analysis": "gradient-rank",
    }
    (trial,) = unbatch.sweep(plan, out=tmp_path, jobs=1).current
    assert trial.audit is not None
    assert trial.audit.budget == 1e-9
    assert [run.status for run in trial.audit.runs] == ["cut short"]


def test_files_of_a_sweep_are_audits_to_report_and_to_gate(tmp_path: Path, capsys) -> None:
    (trial,) = unbatch.sweep(QUICK | {"case": "digits:width=8"}, out=tmp_path, jobs=1).current
    path = tmp_path / f"{trial.key}.json"
    assert audit_at(path) == trial.audit
    assert said(capsys, "report", path, "--out", tmp_path / "one.html")[0] == 0
    assert "recovered exactly" in (tmp_path / "one.html").read_text()
    with pytest.raises(UnbatchError, match="is no audit of unbatch"):
        Audit.load(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_number": 99}))
    with pytest.raises(UnbatchError, match="another version"):
        Trials.at(tmp_path)


def test_a_folder_of_single_audits_is_a_table_too(tmp_path: Path, capsys) -> None:
    for batch in (1, 2):
        words = ["audit", f"digits:batch={batch},width=8", "--attack", "bias-ratio", "--analysis", "gradient-rank"]
        assert said(capsys, *words, "--quiet", "--out", tmp_path / str(batch))[0] == 0
    assert [row["batch"] for row in Trials.at(tmp_path).rows()] == [1, 2, 2]
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UnbatchError, match="holds no sweep"):
        Trials.at(tmp_path / "nothing")


def test_the_table_answers_sql_and_writes_files(tmp_path: Path, capsys) -> None:
    import duckdb

    plan = QUICK | {"case": ["digits:width=8", "digits:batch=2,width=8"], "protocol": ["", "learning_rate=0.1"]}
    unbatch.sweep(plan, out=tmp_path / "sweep", jobs=1)
    query = Query(Trials.at(tmp_path / "sweep"))
    asked = "select setting, status, count(*), max(psnr) > 100 from runs group by all order by all"
    assert query.rows(asked) == [
        ("digits:batch=2,width=8", "failed", 1, None),
        ("digits:batch=2,width=8", "not applicable", 2, None),
        ("digits:width=8", "done", 1, True),
        ("digits:width=8", "failed", 1, None),
    ]
    with pytest.raises(UnbatchError, match="cannot answer"):
        query.rows("select nothing from runs")
    for name in ("runs.csv", "runs.parquet"):
        query.write(tmp_path / name)
        assert duckdb.sql(f"select count(*) from '{tmp_path / name}'").fetchall() == [(5,)]
    with pytest.raises(UnbatchError, match=r"\.csv or a \.parquet"):
        query.write(tmp_path / "runs.txt")
    code, out, _ = said(capsys, "table", tmp_path / "sweep", "--sql", asked)
    assert code == 0
    assert len(out.splitlines()) == 5
    assert "chance_psnr" in said(capsys, "table", tmp_path / "sweep")[1]
    assert said(capsys, "table", tmp_path / "sweep", "--csv", tmp_path / "two.csv")[0] == 0
    assert (tmp_path / "two.csv").read_text().startswith("key,setting,defence,batch")


def test_without_pictures_everything_counts_as_before() -> None:
    from audits import captured, exact

    for audit in (exact(), captured()):
        whole = Trial.of(audit)
        light = whole.without_pictures()
        assert light.rows() == whole.rows()
        assert light.audit is not None
        assert light.audit.counts == audit.counts
        assert "data:image" not in light.model_dump_json()
        assert "data:image" in whole.model_dump_json()


def test_the_command_line_starts_without_engines_and_tables() -> None:
    slow = {"ray", "distributed", "dask", "duckdb", "joblib", "mlflow", "torch"}
    code = f"import sys, unbatch.command.cli; sys.exit(bool({slow} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_numbers_that_json_lacks_come_through_the_table() -> None:
    from audits import an_audit, example, run

    shown = [example(0, float("inf"), 0.0), example(1, float("nan"), None, bound=float("inf"))]
    trial = Trial.of(an_audit(runs=[run("bias-ratio", shown)]))
    found = Query(Trials.of([trial])).rows("select psnr, bound from runs order by example")
    assert found[0] == (float("inf"), None)
    assert repr(found[1]) == "(nan, inf)"


def test_the_command_prints_what_it_would_run_and_what_it_found(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    plan = tmp_path / "plan.toml"
    plan.write_text('case = "digits:width=8"\nattack = "bias-ratio"\nanalysis = "gradient-rank"\nseed = [0, 1]\n')
    code, out, _ = said(capsys, "sweep", plan, "--dry-run")
    assert code == 0
    assert out.splitlines()[1] == "unbatch audit digits:width=8 --attack bias-ratio --analysis gradient-rank --seed 1"
    assert not (tmp_path / "sweep").exists()
    code, out, _ = said(capsys, "sweep", plan, "--jobs", "1")
    assert code == 0
    assert re.search(r"2 of 2 configurations audited, 0 failed, in [\d.]+ s; private examples: 1 exact\.", out)
    assert said(capsys, "sweep", plan, "--engine", "slurm")[0] == 2
    plan.write_text("case = digits")
    assert "is no TOML" in said(capsys, "sweep", plan)[2]
    assert "cannot read" in said(capsys, "sweep", tmp_path / "none.toml")[2]


@pytest.mark.parametrize(
    ("asked", "words"),
    [({"name": "slurm"}, "unknown engine"), ({"jobs": 0}, "cannot run"), ({"address": "a:1"}, "would not be used")],
)
def test_engines_that_are_none_are_refused(asked: dict[str, Any], words: str) -> None:
    with pytest.raises(UnbatchError, match=words), engine(**asked):
        pass


@pytest.mark.parametrize(
    ("package", "extra", "name"), [("joblib", "sweep", "local"), ("ray", "ray", "ray"), ("distributed", "dask", "dask")]
)
def test_an_engine_that_is_not_installed_says_how_to(
    package: str, extra: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(unbatch.errors.MissingExtra, match=rf"unbatch\[{extra}\]"), engine(name):
        pass


def dies_on(given: Mapping[str, Any]) -> Audit:
    """An audit that ends its process where it is told to."""
    if given["seed"] == 1:
        os._exit(3)
    return unbatch.audit(unbatch.cases.Digits(width=8), attacks="bias-ratio", analyses=())


def deadly(place: Path) -> list[Job]:
    return [
        Job(key=f"{seed:016x}", configuration={"case": "digits", "seed": str(seed)}, given={"seed": seed}, place=place)
        for seed in range(5)
    ]


def test_what_a_dead_worker_had_in_hand_is_run_again_each_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handed = list[list[str]]()

    @contextmanager
    def falling(*asked: Any, **more: Any) -> Iterator[Any]:
        def spread(work: Any, jobs: Iterator[Job]) -> Iterator[str]:
            handed.append([])
            for first, second in zip_longest(jobs, jobs):
                pair = [job for job in (first, second) if job]
                handed[-1] += [job.configuration["seed"] for job in pair]
                if any(job.given["seed"] == 1 for job in pair):
                    raise BrokenPipeError("exit code 3")
                yield from map(work, pair)

        yield spread

    monkeypatch.setattr("unbatch.auditing.sweep.engine", falling)
    run_jobs(deadly(Path.cwd()), dies_on, tmp_path, count=2)
    assert handed == [["0", "1"], ["0"], ["1"], ["2", "3", "4"]]
    found = Trials.at(tmp_path)
    assert [trial.words for trial in found.current] == ["", "its worker died: exit code 3", "", "", ""]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["local", "ray", "dask"])
def test_a_worker_that_dies_costs_its_own_job_alone(name: str, tmp_path: Path, quiet_engines: None) -> None:
    run_jobs(deadly(Path.cwd()), dies_on, tmp_path, name=name, count=2)
    found = Trials.at(tmp_path)
    assert [trial.failed for trial in found.current] == [False, True, False, False, False]
    assert "its worker died" in found.current[1].words


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ray", "dask"])
def test_one_job_at_a_time_on_a_cluster_is_not_in_this_process(name: str, quiet_engines: None) -> None:
    with engine(name, 1) as spread:
        assert os.getpid() not in set(spread(process, range(3)))


def process(number: int) -> int:
    return os.getpid()


@pytest.fixture
def quiet_engines(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Workers find the tests' modules, and clusters ask nobody for anything."""
    here = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    for name, value in {"PYTHONPATH": here, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of how Ray, Dask and loky end, which is theirs
        yield


GRID = (Path(__file__).parent / "grid.toml").read_text()


def started(folder: Path, *words: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "unbatch", "sweep", "plan.toml", "--quiet", *words],
        cwd=folder,
        start_new_session=True,
        stderr=subprocess.PIPE,
    )


def finished(folder: Path) -> int:
    return len(list(folder.glob("[0-9a-f]*.json")))


@pytest.fixture(scope="module")
def as_here(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], list[tuple[Any, ...]]]:
    """The table of the 48 configurations, run in one process."""
    folder = tmp_path_factory.mktemp("here")
    (folder / "plan.toml").write_text(GRID)
    assert started(folder, "--jobs", "1", "--out", "sweep").wait(600) == 0
    query = Query(Trials.at(folder / "sweep"))
    return query.columns(SAME), query.rows(SAME)


@pytest.fixture
def cluster(request: pytest.FixtureRequest, quiet_engines: None) -> Iterator[list[str]]:
    """The options by which a sweep finds a cluster of two workers that runs already."""
    if request.param == "ray":
        from ray.cluster_utils import Cluster

        held = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 100 * 2**20})
        held.add_node(num_cpus=1, object_store_memory=100 * 2**20)
        yield ["--engine", "ray", "--address", held.address]
        held.shutdown()
    elif request.param == "dask":
        from distributed import LocalCluster

        with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as workers:
            yield ["--engine", "dask", "--address", workers.scheduler_address]
    else:
        yield ["--engine", "local"]


@pytest.mark.slow
@pytest.mark.parametrize("cluster", ["local", "ray", "dask"], indirect=True)
def test_48_configurations_killed_once_and_gone_on_with_give_one_table(
    cluster: list[str], as_here: tuple[list[str], list[tuple[Any, ...]]], tmp_path: Path
) -> None:
    (tmp_path / "plan.toml").write_text(GRID)
    words = [*cluster, "--jobs", "2", "--out", "sweep"]
    first = started(tmp_path, *words)
    while finished(tmp_path / "sweep") < 12 and first.poll() is None:
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "sweep").glob("[0-9a-f]*.json")}
    assert 12 <= len(before) < 48
    second = started(tmp_path, *words)
    assert second.wait(600) == 0, second.stderr.read() if second.stderr else b""
    assert {name: (tmp_path / "sweep" / name).stat().st_mtime_ns for name in before} == before
    trials = Trials.at(tmp_path / "sweep")
    assert (len(trials.current), len(trials.failed), len(trials.missing)) == (48, 0, 0)
    query = Query(trials)
    assert query.columns(SAME) == as_here[0]
    assert query.rows(SAME) == as_here[1]


def test_options_and_numbers_are_logged_to_mlflow_once(tmp_path: Path, monkeypatch, capsys) -> None:
    tracking = pytest.importorskip("mlflow.tracking")
    for name, value in {"MLFLOW_TRACKING_URI": f"file://{tmp_path}/mlruns", "MLFLOW_ALLOW_FILE_STORE": "true"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    plan = tmp_path / "plan.toml"
    plan.write_text(
        'case = "digits:width=8"\nattack = "bias-ratio"\nanalysis = "gradient-rank"\nprotocol = ["", "momentum=0.5"]\n'
    )
    for logged in (2, 3):  # the finished one is logged once, the failed one whenever it fails
        assert said(capsys, "sweep", plan, "--jobs", "1", "--mlflow", "audits", "--quiet")[0] == 0
        client = tracking.MlflowClient()
        runs = client.search_runs([client.get_experiment_by_name("audits").experiment_id])
        assert len(runs) == logged
    (done,) = (run for run in runs if run.info.status == "FINISHED")
    assert done.data.params == {"case": "digits:width=8", "attack": "bias-ratio", "analysis": "gradient-rank"}
    assert done.data.metrics["exact"] == 1
    assert done.data.metrics["psnr"] > 100 > done.data.metrics["chance psnr"]
    failed = next(run for run in runs if run.info.status == "FAILED")
    assert "would not be used" in failed.data.tags["unbatch.finding"]
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert not list((tmp_path / "mlruns").rglob("*.png"))
    text = "".join(path.read_text() for path in (tmp_path / "mlruns").rglob("*") if path.is_file())
    assert "data:image" not in text


def test_without_mlflow_the_option_says_what_to_install(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    monkeypatch.setitem(sys.modules, "mlflow.entities", None)
    (tmp_path / "plan.toml").write_text('case = "digits"\n')
    code, _, err = said(capsys, "sweep", tmp_path / "plan.toml", "--mlflow", "audits", "--out", tmp_path / "sweep")
    assert code == 2
    assert "unbatch[mlflow]" in err


@pytest.mark.parametrize(
    "name", ["one process", *(pytest.param(each, marks=pytest.mark.slow) for each in ("local", "ray", "dask"))]
)
def test_workers_find_your_model_and_data_in_your_folder(name: str, tmp_path: Path, quiet_engines: None) -> None:
    (tmp_path / "mynets.py").write_text(
        "from torch import nn\n\n\ndef small():\n    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))\n"
    )
    (tmp_path / "rows.csv").write_text("a,b,c,d,label\n1,2,3,4,0\n2,3,4,6,1\n5,1,2,2,1\n")
    (tmp_path / "plan.toml").write_text(
        'model = "mynets:small"\ndata = "rows.csv"\nbatch = [1, 2]\nattack = "bias-ratio"\nanalysis = "gradient-rank"\n'
    )
    engine_of = ["--jobs", "1"] if name == "one process" else ["--engine", name, "--jobs", "2"]
    ended = started(tmp_path, *engine_of, "--out", "sweep")
    assert ended.wait(300) == 0, ended.stderr.read() if ended.stderr else b""
    found = Trials.at(tmp_path / "sweep")
    assert [trial.words for trial in found.current] == ["", ""]
    assert [row["recovered"] for row in found.rows()] == [True, False, False]
