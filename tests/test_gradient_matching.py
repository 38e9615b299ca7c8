"""gradient-matching: recovers, chooses by the match alone, and says what it did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from clients import Exchange, Network, perceptron
from torch import Tensor, nn

from unbatch.attacks.gradient_matching import GradientMatching
from unbatch.auditing.client import observe
from unbatch.benchmarks import find
from unbatch.errors import NotApplicable
from unbatch.knowledge import Knowledge
from unbatch.loss import loss_named
from unbatch.models import small
from unbatch.observation import Observation
from unbatch.progress import Watch, watching

CLIENT = {"shape": (1, 6, 6), "n": 2, "dtype": torch.float32, "input_range": (0.0, 1.0)}


def wide(activation: str = "gelu", shape: tuple[int, ...] = (1, 6, 6)) -> Network:
    return perceptron(shape, 5, width=80, activation=activation)


def error(found: Tensor | None, x: Tensor) -> float:
    assert found is not None
    a, b = found.double().flatten(1), x.flatten(1)
    return float((torch.cdist(a, b).min(0).values / b.norm(dim=1)).max())


@pytest.mark.parametrize("activation", ["gelu", "tanh", "relu"])
def test_default_recovers_to_rounding_error(exchange: Exchange, activation: str) -> None:
    obs, x, _ = exchange(wide(activation), **CLIENT | {"n": 3}, tell=True)
    found = GradientMatching()(obs)
    assert error(found.inputs, x) < 1e-4
    assert found.trace["converged"]
    assert found.trace["labels"] == "known"


@pytest.mark.parametrize(
    "protocol",
    [
        {"local_steps": 3, "learning_rate": 0.05},
        {"local_steps": 2, "learning_rate": 0.05, "momentum": 0.9, "weight_decay": 0.01},
        {"epochs": 1, "local_batch_size": 1, "learning_rate": 0.05},
    ],
    ids=str,
)
def test_default_recovers_through_local_steps(exchange: Exchange, protocol: dict[str, Any]) -> None:
    obs, x, _ = exchange(wide(), **CLIENT, tell=True, **protocol)
    assert error(GradientMatching()(obs).inputs, x) < 1e-2


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_in_the_span_of_a_dense_layer_local_steps_are_no_hindrance(exchange: Exchange, activation: str) -> None:
    """Four steps at a rate that moves the model far; for the whole inputs the search stalls in an example's size."""
    protocol = {"local_steps": 4, "learning_rate": 0.1}
    obs, x, _ = exchange(wide(activation, (3, 8, 8)), **CLIENT | {"n": 4, "shape": (3, 8, 8)}, tell=True, **protocol)
    found = GradientMatching(restarts=3)(obs)  # a start may stall; later ones run only then
    assert error(found.inputs, x) < 1e-3


def test_labels_are_counted_where_unknown_and_stay_aligned(exchange: Exchange) -> None:
    obs, x, y = exchange(wide(), **CLIENT | {"n": 3}, y=torch.tensor([4, 1, 1]))
    found = GradientMatching()(obs)
    assert found.trace["labels"] == "counted"
    assert found.inputs is not None
    assert found.labels is not None
    nearest = torch.cdist(found.inputs.double().flatten(1), x.flatten(1)).argmin(1)
    assert found.labels.tolist() == y[nearest].tolist()
    assert error(found.inputs, x) < 1e-3


def test_real_targets_are_optimised(exchange: Exchange) -> None:
    targets = torch.randn(2, 5, generator=torch.Generator().manual_seed(3))
    obs, x, _ = exchange(wide(), "squared-error", **CLIENT, y=targets)
    found = GradientMatching()(obs)
    assert found.trace["labels"] == "optimised"
    assert found.labels is not None
    assert error(found.inputs, x) < 1e-3
    assert float(torch.cdist(found.labels.double(), targets.double()).min(0).values.max()) < 1e-2


def test_classes_under_squared_error_are_optimised_and_read_as_classes(exchange: Exchange) -> None:
    obs, x, _ = exchange(wide(), "squared-error", **CLIENT, y=torch.tensor([1, 4]))
    found = GradientMatching()(obs)
    assert found.labels is not None
    assert sorted(found.labels.tolist()) == [1, 4]
    assert error(found.inputs, x) < 1e-3


def test_dlg_recovers_labels_by_optimising_them(exchange: Exchange) -> None:
    obs, _, _ = exchange(wide("sigmoid"), **CLIENT | {"n": 1}, y=torch.tensor([3]))
    found = GradientMatching(preset="dlg", iterations=300)(obs)
    assert found.trace["labels"] == "optimised"
    assert found.labels is not None
    assert found.labels.tolist() == [3]


def test_labels_of_the_start_are_never_returned(exchange: Exchange) -> None:
    obs, _, _ = exchange(wide(), **CLIENT)
    found = GradientMatching(preset="dlg", iterations=1)(obs)
    assert found.trace["iterations"] == 1
    assert found.labels is None


def test_inverting_gradients_stays_in_range_and_comes_near(exchange: Exchange) -> None:
    obs, x, _ = exchange(wide(), **CLIENT | {"n": 1}, tell=True, domain="images")
    found = GradientMatching(preset="inverting-gradients", iterations=400, tv=1e-4)(obs)
    assert found.inputs is not None
    assert float(found.inputs.min()) >= 0
    assert float(found.inputs.max()) <= 1
    assert error(found.inputs, x) < 0.1


def test_total_variation_is_for_pictures_alone(exchange: Exchange) -> None:
    for domain, alike in (("table", True), ("images", False)):
        obs, _, _ = exchange(wide(), **CLIENT | {"n": 1}, tell=True, domain=domain)
        runs = [GradientMatching(preset="inverting-gradients", iterations=20, tv=tv)(obs).inputs for tv in (0.0, 1.0)]
        assert runs[0] is not None
        assert runs[1] is not None
        assert torch.equal(runs[0], runs[1]) is alike


def test_the_best_restart_is_the_one_with_the_best_match(exchange: Exchange) -> None:
    obs, _, _ = exchange(wide("relu"), **CLIENT, tell=True)
    found = GradientMatching(preset="dlg", iterations=15, restarts=4)(obs)
    finals = found.trace["restarts"]
    assert len(finals) == 4
    assert len(set(finals)) == 4
    assert found.trace["loss"][-1] == pytest.approx(min(finals), rel=0.2)
    assert len(found.trace["seconds"]) == 4


def test_the_trace_is_json_and_thin(exchange: Exchange) -> None:
    obs, _, _ = exchange(wide(), **CLIENT, tell=True)
    trace = GradientMatching(preset="inverting-gradients", iterations=450)(obs).trace
    assert len(json.loads(json.dumps(trace))["loss"]) <= 200
    assert trace["loss"] == sorted(trace["loss"], reverse=True)


@pytest.mark.parametrize("preset", ["default", "dlg", "inverting-gradients"])
def test_told_to_stop_it_returns_the_best_so_far(exchange: Exchange, preset: str) -> None:
    obs, _, _ = exchange(wide("relu"), **CLIENT, tell=True)
    watch, calls = Watch(), []

    def listener(share: float, best: float | None) -> None:
        calls.append((share, best))
        watch.stop = len(calls) == 7

    watch.listener = listener
    with watching(watch):
        found = GradientMatching(preset=preset)(obs)  # type: ignore[arg-type]
    assert found.trace["iterations"] == len(calls) == 7
    assert found.trace["loss"][-1] == calls[-1][1]


def test_same_seed_same_answer_whatever_the_global_generator(exchange: Exchange) -> None:
    obs, _, _ = exchange(wide("relu"), **CLIENT, tell=True)
    attack = GradientMatching(preset="inverting-gradients", iterations=30)
    first, second, third = attack(obs, seed=1).inputs, attack(obs, seed=1).inputs, attack(obs, seed=2).inputs
    assert first is not None
    assert second is not None
    assert third is not None
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_obstacles_are_said_in_words(exchange: Exchange) -> None:
    obs, _, _ = exchange(wide(), **CLIENT, tell=True)
    zero = Observation(
        model=obs.model,
        loss=obs.loss,
        update={k: torch.zeros_like(v) for k, v in obs.update.items()},
        knowledge=obs.knowledge,
    )
    with pytest.raises(NotApplicable, match="zero everywhere"):
        GradientMatching()(zero)
    tokens, _, _ = exchange(wide(), **CLIENT, tell=True, domain="tokens")
    with pytest.raises(NotApplicable, match="tokens"):
        GradientMatching()(tokens)

    def hard_only(outputs: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.nll_loss(outputs.log_softmax(1), labels)

    x, y = torch.rand(8, 1, 6, 6, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1] * 4)
    closed, _ = observe(obs.model, hard_only, x, y)
    with pytest.raises(NotApplicable, match=r"no gradient with respect to them .* ways to label 8 examples"):
        GradientMatching(preset="dlg")(closed)


def test_batch_norm_is_matched_in_the_clients_mode() -> None:
    rng = torch.Generator().manual_seed(0)
    model = small.build("resnet-small", (1, 8, 8), 4, width=4, activation="gelu", rng=rng)
    x, y = torch.rand(2, 1, 8, 8, generator=rng), torch.tensor([0, 3])
    obs, _ = observe(model, loss_named("cross-entropy"), x, y, knowledge=Knowledge(labels=y, input_range=(0, 1)))
    watch, begun = Watch(), []

    def listener(share: float, best: float | None) -> None:
        begun.append(best)
        watch.stop = len(begun) == 60

    watch.listener = listener
    with watching(watch):
        found = GradientMatching()(obs)
    assert found.trace["loss"][-1] < found.trace["loss"][0]


def test_benchmark_gives_every_preset_the_same_problem_and_saves(tmp_path: Path) -> None:
    bench = find("matching")
    problem = bench.SearchProblem(name="tiny", model="mlp", activation="gelu", n=1, width=8)
    rows = bench.run(None, seconds=0.3, seed=0, device="cpu", out=tmp_path, problems=(problem,))
    assert [row["preset"] for row in rows] == list(bench.PRESETS)
    saved = json.loads((tmp_path / "matching.json").read_text())
    assert saved["rows"] == json.loads(json.dumps(rows))
    assert {"torch", "threads", "seconds are"} <= set(saved["environment"])
    assert all(point["worst"] <= point["mean"] for row in rows for point in row["curve"])
    assert bench.table(rows).row_count == 3
    assert rows[0]["seconds per step over plain autograd"] > 0


def test_unknown_benchmarks_and_missing_data_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"known: .*layers, malicious, matching, metric"):
        find("speed")
    with pytest.raises(ValueError, match="cifar10_test600"):
        find("matching").run(tmp_path)
