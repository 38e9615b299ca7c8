import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from unbatch.benchmarks import find, matching, store, unmix
from unbatch.benchmarks.pictures import pool
from unbatch.benchmarks.unmix import BatchProblem, batch_problems, scales
from unbatch.errors import UnbatchError
from unbatch.reconstruction import Reconstruction

SMALL = BatchProblem(n=4, width=100, precision="float32", seeds=2)


def test_a_problem_is_measured_printed_and_stored(tmp_path: Path) -> None:
    rows = unmix.run(out=tmp_path, wanted=[SMALL])
    (row,) = rows
    assert row["recovered"] == row["certified"] == 1.0
    assert row["least bound over error"] >= 1
    assert len(row["shares"]) == 2
    assert json.loads((tmp_path / "unmix.json").read_text())["rows"] == json.loads(json.dumps(rows))
    screen = Console(width=200, record=True)
    screen.print(unmix.table(rows))
    text = screen.export_text()
    assert "photos, unit, gelu, n=4, float32, width 100" in text
    seeds = next(column for column in unmix.table(rows).columns if column.header == "seeds")
    assert list(seeds.cells) == ["2"]  # over which the median is


def test_the_last_step_of_a_growth_is_printed_beside_the_fit() -> None:
    grown = unmix.exponents([8, 16, 32, 64], [1.0, 2.0, 4.0, 32.0])
    assert grown["last exponent"] == pytest.approx(3)
    assert 1 < grown["exponent"] < 2
    screen = Console(width=200, record=True)
    screen.print(unmix.table([{"problem": "time against n", **grown}]))
    assert f"exponent {grown['exponent']:.2f}, from 32 on 3.00" in screen.export_text()


def test_a_trained_network_says_how_well(tmp_path: Path) -> None:
    problem = BatchProblem(n=3, width=200, trained=True, seeds=2)
    (row,) = unmix.run(out=tmp_path, wanted=[problem])
    assert 0.9 < row["training accuracy"] <= 1
    assert json.loads((tmp_path / "unmix.json").read_text())["rows"][0]["training accuracy"] == row["training accuracy"]
    (plain,) = unmix.run(wanted=[SMALL])
    assert plain["training accuracy"] is None


def test_a_network_that_does_not_learn_is_no_trained_one() -> None:
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(200, 12, generator=rng), torch.randint(10, (200,), generator=rng)
    with pytest.raises(ValueError, match=r"after 5 steps the network classifies \d+% of its training examples rightly"):
        unmix._train(torch.nn.Linear(12, 10), x, y, steps=5)


def test_peers_get_the_same_gradient_and_are_scored_alike() -> None:
    problem = BatchProblem(n=2, width=50, precision="float32", seeds=1, peers=True)
    (row,) = unmix.run(seconds=3.0, wanted=[problem])  # torch's first optimiser in a process takes over one
    names = [peer["attack"] for peer in row["peers"]]
    assert names == [
        "gradient-matching:preset=dlg",
        "gradient-matching:preset=inverting-gradients",
        "FastICA of the span",
    ]
    assert all(peer["seconds"] >= 3.0 for peer in row["peers"][:2])
    obs, truth, domain, _ = unmix.batch_exchange(replace(problem, data="photos"), pool("photos", None), 0, "cpu")
    first = next(name for name, tensor in obs.update.items() if tensor.ndim == 2)
    rows = torch.linalg.svd(obs.update[first].double(), full_matrices=False)[2][:2]
    draws = torch.randn(200, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) @ rows
    guesses = [Reconstruction(inputs=pair.reshape(truth.inputs.shape)) for pair in draws]
    chance = [unmix._peer("chance", guess, truth, domain, 0.0)["mean |cosine|"] for guess in guesses]
    assert row["peers"][2]["mean |cosine|"] > float(np.quantile(chance, 0.95))  # of random rows of the span
    assert row["peers"][1]["mean |cosine|"] > 0.9
    exact = unmix._peer("truth", Reconstruction(inputs=truth.inputs), truth, domain, 0.0)
    assert exact["recovered"] == 1
    assert exact["mean |cosine|"] == pytest.approx(1)


def test_a_folder_of_data_is_read(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (20, 6, 6), dtype=np.uint8), rng.integers(0, 10, 20)
    np.savez(tmp_path / "mnist_test500.npz", images=images, labels=labels)
    (row,) = unmix.run(tmp_path, wanted=[BatchProblem(data="mnist", n=3, width=60, seeds=1)])
    assert row["recovered"] == 1.0
    with pytest.raises(ValueError, match=r"fashion_mnist500\.npz does not exist"):
        unmix.run(tmp_path, wanted=[BatchProblem(data="fashion")])
    assert unmix.run(wanted=[BatchProblem(data="fashion")]) == []  # no folder, no such pictures


def test_the_problems_are_those_of_the_literature_and_have_names_of_their_own() -> None:
    names = [problem.name for problem in batch_problems()]
    assert len(set(names)) >= len(names) - 2  # those with peers are measured once more
    assert {p.n for p in batch_problems() if p.data == "cifar10"} >= {16, 32, 64, 128, 256}
    assert {p.data for p in batch_problems()} == {"cifar10", "mnist", "fashion", "photos64", "breast-cancer", "adult"}
    for points in scales().values():
        assert len({size for size, _ in points}) == len({problem for _, problem in points}) > 2


def test_a_table_is_read_with_words_one_hot(tmp_path: Path) -> None:
    lines = ["age,work,income", *(f"{20 + i},{'abc'[i % 3]},{'>50K' if i % 4 else '<=50K'}" for i in range(12))]
    (tmp_path / "adult2000.csv").write_text("\n".join(lines) + "\n")
    rows, labels = pool("adult", tmp_path)
    assert rows.shape == (12, 4)
    assert abs(float(rows[:, 0].mean())) < 1e-12
    assert rows[:, 1:].sum(1).tolist() == [1.0] * 12
    assert labels.tolist() == [int(i % 4 > 0) for i in range(12)]


@pytest.mark.slow
def test_problems_run_side_by_side_where_each_takes_one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)
    workers = []

    class Counting(ProcessPoolExecutor):
        def __init__(self, many: int, **kw: Any) -> None:
            workers.append(many)
            super().__init__(many, **kw)

    monkeypatch.setattr("unbatch.benchmarks.ProcessPoolExecutor", Counting)
    wanted = [SMALL, replace(SMALL, n=3)]
    rows = unmix.run(out=tmp_path, wanted=wanted)
    assert [row["problem"] for row in rows] == [problem.name.replace("cifar10", "photos") for problem in wanted]
    assert all(row["recovered"] == 1.0 for row in rows)
    assert workers == [2]


def test_a_run_that_was_cut_short_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    measured = unmix._measure
    asked: list[int] = []

    def counted(problem: unmix.BatchProblem, **kw: Any) -> unmix.Row:
        asked.append(problem.n)
        return measured(problem, **kw)

    monkeypatch.setattr(unmix, "_measure", counted)
    before = unmix.run(out=tmp_path, wanted=[SMALL])
    rows = unmix.run(out=tmp_path, wanted=[SMALL, replace(SMALL, n=3)])
    assert asked == [SMALL.n, 3]
    assert rows[0] == json.loads(json.dumps(before[0]))
    unmix.run(out=tmp_path, seed=1, wanted=[SMALL])  # measured in another way
    assert asked == [SMALL.n, 3, SMALL.n]
    monkeypatch.setattr("unbatch.benchmarks.__version__", "9.9.9")  # by another version
    unmix.run(out=tmp_path, seed=1, wanted=[SMALL])
    assert asked == [SMALL.n, 3, SMALL.n, SMALL.n]


def test_what_was_measured_on_other_data_is_not_replaced(tmp_path: Path) -> None:
    store("unmix", [{"problem": "kept"}], tmp_path, seed=0, data=True)
    before = (tmp_path / "unmix.json").read_text()
    with pytest.raises(ValueError, match=r"unmix\.json was measured with data: true.*data: false.*--out"):
        unmix.run(out=tmp_path, wanted=[SMALL])
    with pytest.raises(ValueError, match="measured with data"):
        store("unmix", [], tmp_path, seed=0, data=False)
    assert (tmp_path / "unmix.json").read_text() == before
    store("unmix", [], tmp_path, seed=1, data=True)
    assert json.loads((tmp_path / "unmix.json").read_text())["rows"] == []


def test_the_stored_rows_are_printed() -> None:
    record = json.loads((Path(__file__).parents[1] / "benchmarks" / "results" / "unmix.json").read_text())
    assert unmix.table(record["rows"]).row_count == len(record["rows"]) + sum(
        len(row.get("peers", ())) for row in record["rows"]
    )
    assert all("measured" in row for row in record["rows"] if "shares" in row)


def test_one_loader_gives_every_benchmark_its_pictures(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 255, (4, 6, 6, 3), dtype=np.uint8)
    np.savez(tmp_path / "cifar10_test600.npz", images=images, labels=np.arange(4))
    pictures, labels = pool("cifar10", tmp_path)
    torch.testing.assert_close(pictures, torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255)
    assert labels.tolist() == [0, 1, 2, 3]
    wide, order, k = matching.scaled(tmp_path, 3)
    assert k == 4
    torch.testing.assert_close(wide, 4 * pictures[order] - 2)  # the labels number the pictures here
    bundled, own = matching.scaled(None, 3)[0], pool("cifar10", None)[0]
    assert bundled.shape == own.shape
    assert sorted(bundled.flatten(1).mean(1).tolist()) == pytest.approx(
        sorted((4 * own.flatten(1).mean(1) - 2).tolist()), abs=1e-5
    )
    with pytest.raises(UnbatchError, match="no folder for the bundled photos"):
        pool("cifar10", tmp_path / "elsewhere")
    with pytest.raises(UnbatchError, match=r"fashion is not bundled; give a folder that holds fashion_mnist500\.npz"):
        pool("fashion", None)


def test_what_is_no_benchmark_is_not_found_as_one() -> None:
    with pytest.raises(UnbatchError, match="unknown benchmark 'pictures'; known: adaptive, bounds"):
        find("pictures")
